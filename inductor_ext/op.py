"""What an op is, declared once: schema, fake, reference, CUDA kernel; and what is made of that declaration.

``Op(...).define()`` makes

* ``torch.ops.inductor_ext.<name>`` with the reference on every device, the kernel on CUDA, and a fake for tracing;
* for functional ops ``….<name>.out``, which writes into buffers it is given: ``out`` for one output, ``out0, out1, …`` for
  several (several outputs cannot be described by Inductor's ``ExternKernelOut``, so all ops take the same road);
* a lowering (`define_lowering`) that lets Inductor plan those buffers: it allocates, reuses and frees them like its own.

A kernel that cannot be built or loaded costs one warning; the op then runs its reference, which is the stock operators.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from inductor_ext import jit, settings
from inductor_ext.errors import InductorExtError

log = logging.getLogger("inductor_ext")

NAMESPACE = "inductor_ext"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # noqa: TOR901 (kept for the life of the process)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How an op runs on a CUDA device. Every callable takes the op's arguments in schema order.

    ``key(*args)`` is a hashable value of all that is compiled in; ``exports(key)`` the functions to instantiate, as
    (name, C++ expression); ``launch(module, *args, *outputs)`` calls them. ``examples`` are keys worth prebuilding.
    """

    source: str
    key: Callable[..., Hashable]
    exports: Callable[[Any], tuple[tuple[str, str], ...]]
    launch: Callable[..., None]
    min_capability: tuple[int, int] = (8, 9)
    examples: tuple[Hashable, ...] = ()


@dataclasses.dataclass(frozen=True)
class Op:
    """One operator. ``fake(*args)`` returns new, empty outputs (None for an op that mutates its arguments)."""

    schema: str
    doc: str
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    kernel: Kernel | None = None
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
        arguments, _, returns = self.schema.rpartition(" -> ")
        _library.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._run_reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self.fake, lib=_library)
        if self.kernel is not None:
            _library.impl(self.name, self._run_cuda, "CUDA")
        if returns == "()":
            return
        outs = self._out_names(returns)
        extra = ", ".join(f"Tensor({chr(97 + i)}!) {name}" for i, name in enumerate(outs))
        signature = arguments.replace("(", ".out(", 1)[:-1] + f", *, {extra}) -> ()"
        _library.define(signature)
        _library.impl(f"{self.name}.out", self._run_reference_out, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}.out", lambda *args, **kwargs: None, lib=_library)
        if self.kernel is not None:
            _library.impl(f"{self.name}.out", self._run_cuda_out, "CUDA")

    @staticmethod
    def _out_names(returns: str) -> list[str]:
        count = returns.count("Tensor")
        return ["out"] if count == 1 else [f"out{i}" for i in range(count)]

    def define_lowering(self) -> None:
        """Let Inductor plan the outputs of a functional op; mutating ops need none (it is their ``auto_functionalized``)."""
        if self.mutates:
            return
        from torch._inductor import ir, lowering

        out_names = self._out_names(self.schema.rpartition(" -> ")[2])

        def lower(*args: Any, **kwargs: Any) -> Any:
            node = ir.V.graph.current_node
            values = node.meta["val"]
            values = values if isinstance(values, (tuple, list)) else (values,)
            buffers = {name: _planned_buffer(value) for name, value in zip(out_names, values, strict=True)}
            ir.FallbackKernel.create(self.packet.out, *args, **kwargs, **buffers)
            return tuple(buffers.values()) if len(buffers) > 1 else next(iter(buffers.values()))

        lowering.register_lowering(self.overload, type_promotion_kind=None)(lower)

    # ---- kernels ----------------------------------------------------------------------------------------------------

    def spec(self, args: Sequence[Any], arch: str) -> jit.JitSpec | None:
        """The kernel that this call needs on ``arch``; ``args`` may be fake tensors. None for an op without a kernel."""
        if self.kernel is None:
            return None
        return self.spec_of_key(self.kernel.key(*args), arch)

    def spec_of_key(self, key: Hashable, arch: str) -> jit.JitSpec:
        assert self.kernel is not None
        return jit.JitSpec(self.name, self.kernel.source, self.kernel.exports(key), arch)

    def _module(self, key: Hashable, device: int) -> Any:
        """The loaded kernel, or None after one warning when it cannot be had."""
        options = settings.current()
        major, minor = torch.cuda.get_device_capability(device)
        assert self.kernel is not None
        module = None
        if (major, minor) < self.kernel.min_capability:
            need = ".".join(map(str, self.kernel.min_capability))
            log.warning("%s: needs compute capability %s, found %d.%d; running PyTorch's own operators instead",
                        self.name, need, major, minor)  # fmt: skip
        else:
            try:
                module = jit.load(self.spec_of_key(key, jit.current_arch(options) or ""), options)
            except InductorExtError as error:
                log.warning("%s: running PyTorch's own operators instead, since its kernel is not available: %s", self.name, error)
        self._loaded[key, device] = module
        return module

    # ---- implementations --------------------------------------------------------------------------------------------

    def _run_reference(self, *args: Any) -> Any:
        return self.reference(*args)

    def _run_reference_out(self, *args: Any, **outs: torch.Tensor) -> None:
        self._copy_reference(args, tuple(outs.values()))

    def _copy_reference(self, args: Sequence[Any], outs: Sequence[torch.Tensor]) -> None:
        results = self.reference(*args)
        for out, result in zip(outs, results if isinstance(results, tuple) else (results,), strict=True):
            out.copy_(result.view(out.shape))

    def _run_cuda(self, *args: Any) -> Any:
        outputs = self.fake(*args)  # real, empty tensors here: the arguments are real
        outs = outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)
        self._launch(args, outs)
        return outputs

    def _run_cuda_out(self, *args: Any, **outs: torch.Tensor) -> None:
        self._launch(args, tuple(outs.values()))

    def _launch(self, args: Sequence[Any], outs: Sequence[torch.Tensor]) -> None:
        kernel = self.kernel
        assert kernel is not None
        key, device = kernel.key(*args), args[0].device.index
        try:
            module = self._loaded[key, device]
        except KeyError:
            module = self._module(key, device)
        if module is not None:
            kernel.launch(module, *args, *outs)
        elif outs:
            self._copy_reference(args, outs)
        else:
            self.reference(*args)


def _planned_buffer(value: torch.Tensor) -> Any:
    """An uninitialised buffer of Inductor's own, with the size, strides and dtype of the fake ``value``."""
    from torch._inductor import ir, lowering

    sizes, strides = (ir.convert_shape_to_inductor(shape) for shape in (value.shape, value.stride()))
    make = lowering.lowerings[torch.ops.aten.empty_strided.default]
    return make(sizes, strides, dtype=value.dtype, device=value.device)
