"""What an op is, declared once: reference, fake, CUDA kernel; and what is made of that declaration.

``Op(...).define()`` makes

* ``torch.ops.inductor_ext.<name>``, its schema that of the reference's signature (`signature`), with the reference on every
  device, the kernel on CUDA, and a fake for tracing;
* for ops with outputs ``….<name>.out``, which writes into buffers it is given: ``out`` for one output, ``out0, out1, …`` for
  several (several outputs cannot be described by Inductor's ``ExternKernelOut``, so all ops take the same road).

A kernel that cannot be built or loaded costs one warning; the op then runs its reference, which is the stock operators.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from inductor_ext import jit, settings
from inductor_ext.errors import InductorExtError
from inductor_ext.signature import Signature, written

log = logging.getLogger("inductor_ext")

NAMESPACE = "inductor_ext"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How an op runs on a CUDA device. Functions name the op's arguments that they read, or are a `Call`.

    ``key`` gives a hashable value of all that is compiled in, None where PyTorch's own operators are the better choice;
    ``exports(key)`` the functions to instantiate, as (name, C++ expression), or the expression of ``run`` alone;
    ``bind(module, key)`` what a call of that key runs, with arguments and outputs: whatever does not change between calls is
    looked up there, once. ``examples`` are keys worth prebuilding, or a function of the target that gives them; ``presets``
    other such functions by name.

    An op whose kernel depends on sizes sets ``keys``: every key that a call may have whose sizes are symbolic. One with several
    sources makes ``source`` a function of the key. ``stock`` is PyTorch's own operators writing into the outputs, for a key of
    None; without it the reference runs, and its result is copied.

    ``scratch`` is how many bytes a call needs to keep things in while it runs; 0 for none, the usual answer. They are planned
    as an output is and given behind the outputs: memory that a kernel kept for itself would be shared by two streams, or by two
    CUDA graphs. ``scratch`` is None in a call of ``.out`` that brings none: what ``bind`` gives then takes it itself.
    """

    source: str | Callable[[Any], str]
    key: Callable[..., Hashable]
    exports: Callable[[Any], str | tuple[tuple[str, str], ...]]
    bind: Callable[[Any, Any], Callable[..., None]]
    min_capability: tuple[int, int] = (8, 9)
    examples: Sequence[Hashable] | Callable[[str], Sequence[Hashable]] = ()
    keys: Callable[..., Sequence[Hashable]] | None = None
    stock: Callable[..., None] | None = None
    presets: Mapping[str, Callable[[str], Sequence[Hashable]]] = dataclasses.field(default_factory=dict)
    scratch: Callable[..., int] | None = None


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor of a call that is being compiled, all sizes known. ``offset`` is in elements from its storage's begin."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call of PyTorch's operator that Inductor is about to autotune.

    ``node`` is the call in the post-grad graph; ``operands`` what Inductor passes by position, ``options`` by keyword.
    """

    node: Node
    operands: tuple[Operand, ...]
    out: Operand
    options: Mapping[str, Any]
    device: torch.device


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One kernel for a problem: the key of its `Kernel`, and the literals by which generated code names it."""

    label: str
    key: Hashable
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Autotune:
    """How an op's kernels take part where Inductor autotunes ``stock``, its name for PyTorch's operator.

    ``candidates(problem)`` are the kernels worth measuring, none for a problem that the op cannot compute.
    ``arguments(*operands, out=…, **options)`` are the op's arguments for a call that a candidate with these options won.
    """

    stock: str
    candidates: Callable[[Problem], Sequence[Candidate]]
    arguments: Callable[..., tuple[Any, ...]]


class Op:
    """One operator. ``reference``, in PyTorch's operators, has all of its arguments, annotated; the other functions name those
    that they read.

    ``fake`` returns new, empty outputs; an op that only writes its arguments needs none. ``checks`` run before both, and raise
    TypeError or ValueError naming the argument that is wrong. ``autotune`` lets the op's kernels compete under Inductor's
    ``max_autotune``. An op that another library's kernels serve has a ``library``, which writes into the outputs. It is called
    on CUDA devices only: where there is no kernel, its key is None, or it cannot be had. ``reference_into`` is the reference of
    an op that does not write all of its outputs.

    As attributes these functions, and the kernel's, take every argument by position.
    """

    def __init__(
        self,
        name: str,
        doc: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any] = lambda: None,
        checks: Sequence[Callable[..., None]] = (),
        kernel: Kernel | None = None,
        autotune: Autotune | None = None,
        library: Callable[..., None] | None = None,
        reference_into: Callable[..., None] | None = None,
    ) -> None:
        self.name, self.doc, self.autotune = name, doc, autotune
        self.signature = Signature.of(name, reference)
        scratch = ("scratch",) if kernel is not None and kernel.scratch is not None else ()
        self._given = (*self.signature.outs, *scratch)  # to a kernel, behind the arguments
        first = [self._positional("checks", check) for check in checks]
        self.fake = _after(first, self._positional("fake", fake))
        self.reference = _after(first, self._positional("reference", reference))
        self.library = self._positional("library", library, self._given)
        self.reference_into = self._positional("reference_into", reference_into, self._given)
        self.kernel = kernel and dataclasses.replace(
            kernel,
            key=self._positional("key", kernel.key),
            keys=self._positional("keys", kernel.keys),
            scratch=self._positional("scratch", kernel.scratch),
            stock=self._positional("stock", kernel.stock, self._given),
            bind=lambda module, key: self._positional("bind", kernel.bind(module, key), self._given),
        )
        self._key = self.signature.call("key", kernel.key) if kernel is not None else None
        self._loaded: dict[Hashable, Any] = {}

    def _positional(self, what: str, function: Any, outs: Sequence[str] = ()) -> Any:
        return None if function is None else self.signature.positional(what, function, outs)

    @property
    def schema(self) -> str:
        return self.signature.schema

    @property
    def out_names(self) -> tuple[str, ...]:
        """What ``.out`` calls the outputs; none of an op that only writes its arguments."""
        return self.signature.outs

    @property
    def packet(self) -> Any:
        return getattr(torch.ops.inductor_ext, self.name)

    @property
    def overload(self) -> torch._ops.OpOverload:
        return self.packet.default

    @property
    def mutates(self) -> bool:
        return self.overload._schema.is_mutable

    def define(self) -> None:
        """Register the op, its ``.out`` overload, its fake and its implementations. Called once, by the registry."""
        _library.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._run_reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self.fake, lib=_library)
        runs_on_cuda = self.kernel is not None or self.library is not None
        if runs_on_cuda:
            _library.impl(self.name, self._run_cuda, "CUDA")
        if not self.out_names:
            return
        _library.define(self.signature.out_schema("scratch" in self._given))
        _library.impl(f"{self.name}.out", self._run_reference_out, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}.out", lambda *args, **kwargs: None, lib=_library)
        if runs_on_cuda:
            _library.impl(f"{self.name}.out", self._call, "CUDA")

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
        exports = self.kernel.exports(key)
        return jit.JitSpec(self.name, source, (("run", exports),) if isinstance(exports, str) else exports, arch)

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

    @functools.cached_property
    def _call(self) -> Callable[..., None]:
        """The hot path: a function of all arguments in order and of the outputs by keyword, written for this op."""
        scope = {"_op": self, "_loaded": self._loaded}
        key = "None" if self._key is None else written(self._key, "_key", scope)
        first, kind = next(iter(self.signature.types.items()))
        source = f"""\
def {self.name}({self.signature.parameters(self._given)}):
    _made, _device = {key}, {first}{"[0]" * kind.endswith("[]")}.device
    _run = _loaded.get((_made, _device.index)) or _op._bound(_made, _device)
    _run({", ".join((*self.signature.types, *self._given))})
"""
        return self.signature.compiled("call", source, scope)

    def _run_reference(self, *args: Any) -> Any:
        return self.reference(*args)

    def _run_reference_out(self, *args: Any, **outs: torch.Tensor) -> None:
        missing = list(self.signature.types)[len(args) :]  # the dispatcher leaves out what has its default
        self._run_reference_into(*args, *(self.signature.defaults[name] for name in missing), *outs.values())

    def _run_reference_into(self, *values: Any) -> None:
        first = len(self.signature.types)
        args, outs = values[:first], values[first : first + self.signature.results]  # scratch is not for the reference
        if self.reference_into is not None:
            self.reference_into(*args, *outs)
            return
        results = self.reference(*args)
        for out, result in zip(outs, results if isinstance(results, tuple) else (results,)):
            out.copy_(result.view(out.shape))

    def _run_cuda(self, *args: Any) -> Any:
        if not self.out_names:
            self._call(*args)  # the kernel checks its arguments itself, in a tenth of the time
            return None
        outputs = self.fake(*args)  # checks; real, empty tensors, since the arguments are real
        outs = outputs if isinstance(outputs, tuple) else (outputs,)
        self._call(*args, **dict(zip(self.out_names, outs, strict=True)))
        return outputs


def _after(checks: Sequence[Callable[..., None]], function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **named: Any) -> Any:
        for check in checks:
            check(*args, **named)
        return function(*args, **named)

    return run


def device_of(args: Sequence[Any]) -> torch.device:
    """The device of a call: that of its first argument, or of the first of a list."""
    first = args[0]
    return (first if isinstance(first, torch.Tensor) else first[0]).device
