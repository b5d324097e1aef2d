"""How a call is run and judged: operands copied with their strides, outputs poisoned, found bytes or distances.

Everything is compared by storage, so that a byte written beside a slice shows. It works on a CPU too, where an op is its
reference.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.trust.calls import op_named
from benchmarks.trust.operands import Args, Call, Maker
from inductor_ext.op import Op

#: One line of a result: (op, call, what is wrong or "", seconds). None for what is wrong: it was not looked at.
Emit = Callable[[str, str, "str | None", float], None]

#: Ops whose reference sums in another order on a GPU, or reads cuBLAS's mind: asked on the CPU, in fp32 or fp64.
ON_CPU = ("scaled_mm", "scaled_mm_add", "scaled_mm_act_mul", "scaled_mm_rope", "mxfp8_grouped_mm", "varlen_attention")
SETTLE_S = 0.03  # until what a sanitizer, another process, has to say of a call is printed
POISON = 0xFF  # NaN in every float dtype here
#: An element may be so much of itself, and of the root of the mean square, off: two codes of e4m3, and sums that cancel.
ELEMENT, OF_MEAN = 0.15, 0.05


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the memory that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def tensors_of(args: Args) -> list[torch.Tensor]:
    each = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
    return [x for x in each if isinstance(x, torch.Tensor)]


def storages_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The bytes of each memory once, in order; host scalars are no part of it."""
    found = {x.untyped_storage()._cdata: x for x in tensors if x.device.type == tensors[0].device.type}
    return [bytes_of(x) for x in found.values()]


def copied(args: Args, device: Any = None) -> Args:
    """Arguments in memory of their own, on ``device`` or where they are, with the strides and the sharing that they have."""
    made: dict[int, torch.Tensor] = {}

    def one(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [one(each) for each in x]
        if not isinstance(x, torch.Tensor):
            return x
        whole = made.setdefault(x.untyped_storage()._cdata, bytes_of(x).to(device or x.device, copy=True))
        view = torch.empty(0, dtype=x.dtype, device=whole.device)
        return view.set_(whole.untyped_storage(), x.storage_offset(), x.shape, x.stride())

    return tuple(one(arg) for arg in args)


def outputs(op: Op, args: Args) -> list[torch.Tensor]:
    """New, poisoned outputs of a call: what it does not write stays NaN."""
    if not op.out_names:
        return []
    made = op.fake(*args)
    outs = list(made) if isinstance(made, tuple) else [made]
    for out in outs:
        bytes_of(out).fill_(POISON)
    return outs


def written(op: Op, args: Args) -> list[torch.Tensor]:
    """The arguments that a call writes."""
    schema = op.overload._schema.arguments
    return [x for argument, x in zip(schema, args) if argument.is_write and x is not None]


def launch(op: Op, args: Args, outs: Sequence[torch.Tensor]) -> None:
    """The call, through the dispatcher."""
    if outs:
        op.packet.out(*args, **dict(zip(op.out_names, outs, strict=True)))
    else:
        op.overload(*args)


def results(op: Op, args: Args, outs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The bytes that a call has written, and those around them."""
    changed = [*outs, *written(op, args)]
    return storages_of(changed) if changed else []


def check_has_kernel(op: Op, args: Args) -> None:
    """RuntimeError where PyTorch's operators would be tested in the kernel's place."""
    if op.kernel is None or op.kernel.key(*args) is None:
        raise RuntimeError(f"{op.name}: this call takes PyTorch's operators, not the kernel")


class Fallbacks(logging.Handler):
    """Collects the warnings of ops whose kernel could not be had."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("inductor_ext").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if "running PyTorch's own operators instead" in record.getMessage():
            self.messages.append(record.getMessage())

    def taken(self) -> str:
        said, self.messages = "; ".join(self.messages), []
        return said


# ---- comparing -------------------------------------------------------------------------------------------------------


def difference(found: torch.Tensor, wanted: torch.Tensor, limit: float) -> str:
    """What is wrong with a result, or "". NaN equals NaN; with ``limit`` 0 everything else has to have the same bytes."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{found.dtype} {list(found.shape)} against {wanted.dtype} {list(wanted.shape)}"
    if not found.numel():
        return ""
    f, w = (x.reshape(-1).contiguous() for x in (found, wanted))
    number = f.dtype.is_floating_point
    f_value, w_value = _numbers(f), _numbers(w)
    both_nan = f_value.isnan() & w_value.isnan() if number else torch.zeros_like(f_value, dtype=torch.bool)
    if not limit:
        size = f.element_size()
        bad = (f.view(torch.uint8).view(-1, size) != w.view(torch.uint8).view(-1, size)).any(-1) & ~both_nan
        what = "bytes"
    else:
        f_value, w_value = (x.masked_fill(both_nan, 0.0) for x in (f_value, w_value))
        apart, mean = (f_value - w_value).abs(), w_value.square().mean().sqrt()
        off = float(apart.norm() / w_value.norm().clamp_min(1e-30))
        bad, what = ~(apart <= ELEMENT * w_value.abs() + OF_MEAN * mean), f"numbers ({off:.1e} of the norm)"
        if not off <= limit:
            return f"{off:.1e} of the norm away, wanted at most {limit:.0e}"
    count = int(bad.sum())
    if not count:
        return ""
    at = int(bad.nonzero()[0])
    return f"{count} of {f.numel()} {what} differ, first at {at}: {float(f_value[at])} for {float(w_value[at])}"


def _numbers(x: torch.Tensor) -> torch.Tensor:
    """As float64; e8m0 by its bits, since not every torch converts it on a GPU."""
    if x.dtype is not torch.float8_e8m0fnu:
        return x.float().double() if x.dtype.itemsize == 1 else x.double()
    exponent = x.view(torch.uint8).double()
    return torch.where(exponent == 255, torch.nan, torch.exp2(exponent - 127))


def reference(call: Call, args: Args) -> tuple[list[torch.Tensor], Args]:
    """What the reference makes of a call's arguments, which stay as they are: its outputs, and the arguments it wrote."""
    op = op_named(call.op)
    given = copied(args, "cpu" if call.op in ON_CPU else None)
    outs = outputs(op, given)
    if outs:
        op._run_reference_out(*given, **dict(zip(op.out_names, outs, strict=True)))
    else:
        op._run_reference(*given)
    return outs, given


def checked(call: Call, device: str) -> str | None:
    """Runs a call and says how it differs from the reference: "" not at all, None where it cannot be asked."""
    op, args = op_named(call.op), call.make(Maker(device))
    given = copied(args)
    outs = outputs(op, given)
    if device == "cuda":
        check_has_kernel(op, given)
    launch(op, given, outs)
    if device == "cuda":
        torch.cuda.synchronize()
    if not call.compared:
        return None
    wanted_outs, wanted_args = reference(call, args)
    names = [*op.out_names, *(argument.name for argument in op.overload._schema.arguments if argument.is_write)]
    found, wanted = ([*o, *written(op, a)] for o, a in ((outs, given), (wanted_outs, wanted_args)))
    for name, f, w in zip(names, found, wanted):
        said = difference(f, w.to(f.device), call.limit)
        if said:
            return f"{name}: {said}"
    if not call.limit:  # beside slices too
        for f, w in zip(results(op, given, outs), results(op, wanted_args, wanted_outs), strict=True):
            if not torch.equal(f, w.to(f.device)) and not any(_numbers(x).isnan().any() for x in found):
                return "bytes around the results differ"
    return ""


def run_calls(calls: Sequence[Call], device: str, emit: Emit) -> None:
    """Every call against its reference."""
    fallbacks = Fallbacks()
    for call in calls:
        start = time.perf_counter()
        try:
            said = checked(call, device)
        except Exception as error:
            said = f"{type(error).__name__}: {str(error)[:400]}"
        emit(call.op, call.what, fallbacks.taken() or said, time.perf_counter() - start)


def run_bare(calls: Sequence[Call], device: str, emit: Emit) -> None:
    """Every call once, nothing compared: what compute-sanitizer watches. A line before each says whose its reports are."""
    fallbacks = Fallbacks()
    for call in calls:
        start = time.perf_counter()
        print(f"\n@@ {call.name}", flush=True)
        try:
            op, args = op_named(call.op), call.make(Maker(device))
            outs = outputs(op, args)
            if device == "cuda":
                check_has_kernel(op, args)
            launch(op, args, outs)
            if device == "cuda":
                torch.cuda.synchronize()
            said = fallbacks.taken()
        except Exception as error:
            said = f"{type(error).__name__}: {str(error)[:400]}"
        emit(call.op, call.what, said, time.perf_counter() - start)
        time.sleep(SETTLE_S)
    print("\n@@ end", flush=True)
