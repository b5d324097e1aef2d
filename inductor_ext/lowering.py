"""How Inductor compiles a call of an op: it plans the outputs, and generated code calls the kernel past the dispatcher."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from inductor_ext.op import NAMESPACE, Op, device_of


def define(op: Op) -> None:
    """Let Inductor plan the outputs of a functional op, and call the kernel from generated code without the dispatcher.

    The dispatcher takes 3 to 5 µs for arguments like these, more than the rest of the call. Generated code therefore calls
    ``extern_kernels.inductor_ext_<name>``, Inductor's own place for Python kernels, where the op's `_call` is put.
    """
    from torch._inductor import ir, lowering
    from torch._inductor.select_algorithm import extern_kernels

    direct = f"{NAMESPACE}_{op.name}"
    setattr(extern_kernels, direct, op._call)
    out_names = op.out_names
    target = op.packet.out if out_names else op.overload
    written = [argument.is_write for argument in op.overload._schema.arguments]

    def lower(*args: Any, **kwargs: Any) -> Any:
        values = ir.V.graph.current_node.meta["val"] if out_names else ()
        values = values if isinstance(values, (tuple, list)) else (values,)
        if out_names:
            traced = zip(args, ir.V.graph.current_node.args, written)
            args = tuple(each if write else _in_traced_order(each, node) for each, node, write in traced)
        outs = {name: _planned_buffer(value) for name, value in zip(out_names, values, strict=True)}
        buffers = outs | _planned_scratch(op, ir.V.graph.current_node)
        for write, value in zip(written, args):
            if write and value is not None:
                # `FallbackKernel` would do it too, but after it has taken its place in the order of operations: what has
                # read the buffer so far, and is not computed yet, would then run after the write.
                ir.V.graph.mark_buffer_mutated(value.get_name())
        known = len(ir.V.graph.operations)
        result = _kernel_class().create(target, *args, **kwargs, **buffers)
        for operation in ir.V.graph.operations[known:]:
            # A C++ wrapper finds the op by its name in the dispatcher, and keeps it.
            own = isinstance(operation, ir.FallbackKernel) and operation.op_overload is target
            if own and not ir.V.graph.cpp_wrapper:
                operation.python_kernel_name = f"extern_kernels.{direct}"
        if not outs:
            return result
        return tuple(outs.values()) if len(outs) > 1 else next(iter(outs.values()))

    lowering.register_lowering(op.overload, type_promotion_kind=None)(lower)


@functools.cache
def _kernel_class() -> Any:
    """Inductor's fallback kernel, whose generated code also says where the names that it calls come from.

    It may be loaded by a process that has compiled nothing: an artefact of `standalone_compile`, a cached graph, a dumped
    ``output_code.py``.
    """
    from torch._inductor import ir

    class Kernel(ir.FallbackKernel):
        def codegen(self, wrapper: Any) -> None:
            if not ir.V.graph.cpp_wrapper:
                wrapper.add_import_once("import inductor_ext.registry; inductor_ext.registry.define_lowerings()")
            super().codegen(wrapper)

    return Kernel


def _planned_scratch(op: Op, node: torch.fx.Node) -> dict[str, Any]:
    """A buffer of Inductor's for what a kernel keeps while it runs, where one does."""
    if op.kernel is None or op.kernel.scratch is None:
        return {}
    args = torch.fx.map_arg(node.args, lambda each: each.meta["val"])
    size = op.kernel.scratch(*args)
    needed = isinstance(size, torch.SymInt) or size > 0
    return {"scratch": _planned_empty([size], [1], torch.uint8, device_of(args))} if needed else {}


def _in_traced_order(values: Any, nodes: Any) -> Any:
    """Lowered arguments with their dimensions in the order in memory that they were traced with, which rules have checked.

    Inductor decides itself how what it computes lies in memory, and takes the order of what that reads: quantising
    ``x.t().contiguous()`` gives columns. An argument that is in memory already is as it was traced, and stays where it is.
    """
    from torch._inductor import ir

    if isinstance(values, (list, tuple)):
        return type(values)(_in_traced_order(value, node) for value, node in zip(values, nodes))
    traced = nodes.meta.get("val") if isinstance(nodes, torch.fx.Node) else None
    if not isinstance(values, ir.IRNode) or not isinstance(traced, torch.Tensor):
        return values
    values.realize()  # in a buffer for all who read it: what is not in memory yet would be copied into one for this call alone
    order = ir.get_stride_order(traced.stride(), ir.V.graph.sizevars.shape_env)
    return ir.ExternKernel.require_stride_order(values, order)


def _planned_buffer(value: torch.Tensor) -> Any:
    """An uninitialised buffer of Inductor's own, with the size, strides and dtype of the fake ``value``."""
    return _planned_empty(value.shape, value.stride(), value.dtype, value.device)


def _planned_empty(shape: Sequence[Any], stride: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
    from torch._inductor import ir, lowering

    sizes, strides = (ir.convert_shape_to_inductor(each) for each in (shape, stride))
    make = lowering.lowerings[torch.ops.aten.empty_strided.default]
    if not sizes:  # Inductor fills an empty tensor of no dimensions, with a kernel of its own: 0.7 us and its launch a scale
        return lowering.lowerings[torch.ops.aten.reshape.default](make([1], [1], dtype=dtype, device=device), [])
    return make(sizes, strides, dtype=dtype, device=device)
