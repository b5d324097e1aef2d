"""What an op is, declared once: schema, fake, reference, CUDA kernel; and what is made of that declaration.

``Op(...).define()`` makes

* ``torch.ops.inductor_ext.<name>`` with the reference on every device, the kernel on CUDA, and a fake for tracing;
* for ops with outputs ``….<name>.out``, which writes into buffers it is given: ``out`` for one output, ``out0, out1, …`` for
  several (several outputs cannot be described by Inductor's ``ExternKernelOut``, so all ops take the same road);
* a lowering (`define_lowering`) that lets Inductor plan those buffers: it allocates, reuses and frees them like its own.

A kernel that cannot be built or loaded costs one warning; the op then runs its reference, which is the stock operators.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from inductor_ext import jit, settings
from inductor_ext.errors import InductorExtError

if TYPE_CHECKING:
    from inductor_ext.autotune import Autotune

log = logging.getLogger("inductor_ext")

NAMESPACE = "inductor_ext"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How an op runs on a CUDA device. Every callable takes the op's arguments in schema order.

    ``key(*args)`` is a hashable value of all that is compiled in, None where PyTorch's own operators are the better choice;
    ``exports(key)`` the functions to instantiate, as (name, C++ expression); ``bind(module, key)`` gives what a call of that
    key runs, as ``run(*args, *outputs)``: whatever does not change between calls is looked up there, once. ``examples`` are
    keys worth prebuilding, or a function of the target that gives them; ``presets`` other such functions by name.

    An op whose kernel depends on sizes sets ``keys(*args)``: every key that a call may have whose sizes are symbolic. One
    with several sources makes ``source`` a function of the key. ``stock(*args, *outputs)`` is PyTorch's own operators writing
    into the outputs, for a key of None; without it the reference runs, and its result is copied.

    ``scratch(*args)`` is how many bytes a call needs to keep things in while it runs; 0 for none, the usual answer. They are
    planned as an output is and given behind the outputs: memory that a kernel kept for itself would be shared by two streams,
    or by two CUDA graphs. ``scratch`` is None in a call of ``.out`` that brings none: what ``bind`` gives then takes it itself.
    """

    source: str | Callable[[Any], str]
    key: Callable[..., Hashable]
    exports: Callable[[Any], tuple[tuple[str, str], ...]]
    bind: Callable[[Any, Any], Callable[..., None]]
    min_capability: tuple[int, int] = (8, 9)
    examples: tuple[Hashable, ...] | Callable[[str], tuple[Hashable, ...]] = ()
    keys: Callable[..., Sequence[Hashable]] | None = None
    stock: Callable[..., None] | None = None
    presets: Mapping[str, Callable[[str], Sequence[Hashable]]] = dataclasses.field(default_factory=dict)
    scratch: Callable[..., int] | None = None


@dataclasses.dataclass(frozen=True)
class Op:
    """One operator. ``fake(*args)`` returns new, empty outputs (None for an op that only writes its arguments).

    ``autotune`` lets its kernels compete under Inductor's ``max_autotune``. An op that another library's kernels serve has a
    ``library(*args, *outputs)``, called on CUDA devices only: where there is no kernel, its key is None, or it cannot be had.
    ``reference_into(*args, *outputs)`` is the reference of an op that does not write all of its outputs.
    """

    schema: str
    doc: str
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    kernel: Kernel | None = None
    autotune: Autotune | None = None
    library: Callable[..., None] | None = None
    reference_into: Callable[..., None] | None = None
    _loaded: dict[Hashable, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    @property
    def packet(self) -> Any:
        return getattr(torch.ops.inductor_ext, self.name)

    @property
    def overload(self) -> torch._ops.OpOverload:
        return self.packet.default

    @property
    def mutates(self) -> bool:
        return self.overload._schema.is_mutable

    # ---- definition -------------------------------------------------------------------------------------------------

    def define(self) -> None:
        """Register the op, its ``.out`` overload, its fake and its implementations. Called once, by the registry."""
        arguments = self.schema.rpartition(" -> ")[0]
        _library.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._run_reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self.fake, lib=_library)
        runs_on_cuda = self.kernel is not None or self.library is not None
        if runs_on_cuda:
            _library.impl(self.name, self._run_cuda, "CUDA")
        outs = self.out_names
        if not outs:
            return
        taken = arguments.count("!")  # letters of arguments that are written
        extra = ", ".join(f"Tensor({chr(97 + taken + i)}!) {name}" for i, name in enumerate(outs))
        extra += ", Tensor(z!)? scratch=None" if self._has_scratch else ""
        signature = arguments.replace("(", ".out(", 1)[:-1] + f", *, {extra}) -> ()"
        _library.define(signature)
        _library.impl(f"{self.name}.out", self._run_reference_out, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}.out", lambda *args, **kwargs: None, lib=_library)
        if runs_on_cuda:
            _library.impl(f"{self.name}.out", self._call, "CUDA")

    @property
    def _has_scratch(self) -> bool:
        return self.kernel is not None and self.kernel.scratch is not None

    @property
    def out_names(self) -> list[str]:
        """What ``.out`` calls the outputs; none of an op that only writes its arguments."""
        count = self.schema.rpartition(" -> ")[2].count("Tensor")
        return ["out"] if count == 1 else [f"out{i}" for i in range(count)]

    def define_lowering(self) -> None:
        """Let Inductor plan the outputs of a functional op, and call the kernel from generated code without the dispatcher.

        The dispatcher takes 3 to 5 µs for arguments like these, more than the rest of the call. Generated code therefore
        calls ``extern_kernels.inductor_ext_<name>``, Inductor's own place for Python kernels, where `_call` is put.
        """
        from torch._inductor import ir, lowering
        from torch._inductor.select_algorithm import extern_kernels

        direct = f"{NAMESPACE}_{self.name}"
        setattr(extern_kernels, direct, self._call)
        out_names = self.out_names
        target = self.packet.out if out_names else self.overload
        written = [argument.is_write for argument in self.overload._schema.arguments]

        def lower(*args: Any, **kwargs: Any) -> Any:
            values = ir.V.graph.current_node.meta["val"] if out_names else ()
            values = values if isinstance(values, (tuple, list)) else (values,)
            if out_names:
                traced = zip(args, ir.V.graph.current_node.args, written)
                args = tuple(each if write else _in_traced_order(each, node) for each, node, write in traced)
            outs = {name: _planned_buffer(value) for name, value in zip(out_names, values, strict=True)}
            buffers = outs | self._planned_scratch(ir.V.graph.current_node)
            for write, value in zip(written, args):
                if write and value is not None:
                    # `FallbackKernel` would do it too, but after it has taken its place in the order of operations: what has
                    # read the buffer so far, and is not computed yet, would then run after the write.
                    ir.V.graph.mark_buffer_mutated(value.get_name())
            known = len(ir.V.graph.operations)
            result = ir.FallbackKernel.create(target, *args, **kwargs, **buffers)
            for operation in ir.V.graph.operations[known:]:
                # A C++ wrapper finds the op by its name in the dispatcher, and keeps it.
                own = isinstance(operation, ir.FallbackKernel) and operation.op_overload is target
                if own and not ir.V.graph.cpp_wrapper:
                    operation.python_kernel_name = f"extern_kernels.{direct}"
            if not outs:
                return result
            return tuple(outs.values()) if len(outs) > 1 else next(iter(outs.values()))

        lowering.register_lowering(self.overload, type_promotion_kind=None)(lower)
        if self.autotune is not None:
            from inductor_ext import autotune

            autotune.register(self)

    def _planned_scratch(self, node: torch.fx.Node) -> dict[str, Any]:
        """A buffer of Inductor's for what a kernel keeps while it runs, where one does."""
        if self.kernel is None or self.kernel.scratch is None:
            return {}
        args = torch.fx.map_arg(node.args, lambda each: each.meta["val"])
        size = self.kernel.scratch(*args)
        needed = isinstance(size, torch.SymInt) or size > 0
        return {"scratch": _planned_empty([size], [1], torch.uint8, device_of(args))} if needed else {}

    # ---- kernels ----------------------------------------------------------------------------------------------------

    def specs(self, args: Sequence[Any], arch: str) -> list[jit.JitSpec]:
        """The kernels that such a call may need on ``arch``; ``args`` may be fake tensors, with symbolic sizes too."""
        if self.kernel is None:
            return []
        keys = self.kernel.keys(*args) if self.kernel.keys is not None else (self.kernel.key(*args),)
        return [self.spec_of_key(key, arch) for key in keys if key is not None]

    def examples(self, arch: str, preset: str = "") -> list[jit.JitSpec]:
        """The kernels worth building ahead for ``arch``: those of ``preset`` where the op has such a list."""
        if self.kernel is None:
            return []
        keys = self.kernel.presets.get(preset, self.kernel.examples)
        found = [self.spec_of_key(key, arch) for key in (keys(arch) if callable(keys) else keys)]
        return list(dict.fromkeys(found))

    def spec_of_key(self, key: Hashable, arch: str) -> jit.JitSpec:
        assert self.kernel is not None
        source = self.kernel.source if isinstance(self.kernel.source, str) else self.kernel.source(key)
        return jit.JitSpec(self.name, source, self.kernel.exports(key), arch)

    def _bound(self, key: Hashable, device: torch.device) -> Callable[..., None]:
        """What a call of ``key`` on ``device`` runs: the kernel or, after one warning, PyTorch's own operators."""
        wanted = device.type == "cuda" and self.kernel is not None and key is not None
        module = self._module(key, device) if wanted else None
        if module is not None and self.kernel is not None:
            run: Callable[..., None] = self.kernel.bind(module, key)
        elif device.type == "cuda" and key is None and self.kernel is not None and self.kernel.stock is not None:
            run = self.kernel.stock
        elif device.type == "cuda" and self.library is not None:
            run = self.library
        else:
            run = self._run_reference_into
        self._loaded[key, device.index] = run
        return run

    def _module(self, key: Hashable, device: torch.device) -> Any:
        assert self.kernel is not None
        options = settings.current()
        found, need = torch.cuda.get_device_capability(device), self.kernel.min_capability
        if found < need:
            log.warning("%s: needs compute capability %d.%d, found %d.%d; running PyTorch's own operators instead",
                        self.name, *need, *found)  # fmt: skip
            return None
        try:
            return jit.load(self.spec_of_key(key, jit.current_arch(options) or ""), options)
        except InductorExtError as error:
            log.warning("%s: running PyTorch's own operators instead, since its kernel is not available: %s", self.name, error)
            return None

    # ---- implementations --------------------------------------------------------------------------------------------

    def _call(self, *args: Any, **outs: torch.Tensor) -> None:
        """The hot path: everything given, outputs too. ``args`` are complete and in schema order."""
        key = self.kernel.key(*args) if self.kernel is not None else None
        device = device_of(args)
        run = self._loaded.get((key, device.index)) or self._bound(key, device)
        run(*args, *outs.values())

    def _run_reference(self, *args: Any) -> Any:
        return self.reference(*args)

    def _run_reference_out(self, *args: Any, **outs: torch.Tensor) -> None:
        self._run_reference_into(*args, *outs.values())

    def _run_reference_into(self, *values: Any) -> None:
        first = len(self.overload._schema.arguments)
        count = len(self.overload._schema.returns)
        args, outs = values[:first], values[first : first + count]  # a kernel's scratch, behind them, is not for the reference
        if self.reference_into is not None:
            self.reference_into(*args, *outs)
            return
        results = self.reference(*args)
        for out, result in zip(outs, results if isinstance(results, tuple) else (results,)):
            out.copy_(result.view(out.shape))

    def _run_cuda(self, *args: Any) -> Any:
        if not self.overload._schema.returns:
            self._call(*args)  # the kernel checks its arguments itself, in a tenth of the time
            return None
        outputs = self.fake(*args)  # checks; real, empty tensors, since the arguments are real
        outs = outputs if isinstance(outputs, tuple) else (outputs,)
        self._call(*args, **{str(index): out for index, out in enumerate(outs)})
        return outputs


def device_of(args: Sequence[Any]) -> torch.device:
    """The device of a call: that of its first argument, or of the first of a list."""
    first = args[0]
    return (first if isinstance(first, torch.Tensor) else first[0]).device


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
