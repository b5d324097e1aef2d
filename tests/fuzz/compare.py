"""Versions of one graph against each other: bytes or distances, errors, what is written, and which results share memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from inductor_ext import registry
from inductor_ext.rule import Rule
from tests.fuzz.capture import FINAL, Captured, Ran
from tests.support.equal import different

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

#: Of the elements of one value, by rules that are not exact: on a CPU the references take the very operators they replace in
#: nearly every case, and only sums in another order round a few elements otherwise. Systematic differences are more.
FEW = 0.05
#: Where the reference is another sequence of operators: attention, a product that is rounded once and not twice, and a sum that
#: is rounded once and not after each addition.
ELSEWHERE = ("causal_attention", "grouped_queries", "prefill_only", "mxfp8_grouped_mm", "moe_scatter")
#: Products of groups of rows.
GROUPED = ("mxfp8_grouped_mm", "mxfp8_scaled_grouped_mm")
#: A rule's tolerance is of what it changes; what a program computes of that, as an activation, may make it larger.
AMPLIFIED = 2.0
#: Of one element: what another order of an fp32 sum does. And what is lost where a product is subnormal.
NOISE, TINY = 1e-5, 1e-36
#: An error of ours that may take the place of results that mean nothing: groups of a product that overlap.
CONTRACT = "offs: wanted ascending ends"
#: An error of eager mode that ours does without: a bound or a scale on the host is a number for a kernel.
HOSTED = "Expected all tensors to be on the same device"


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong, with the rule that did it. ``kind`` is what two faults have in common, ``detail`` the numbers."""

    rule: str
    kind: str
    detail: str = ""

    @property
    def signature(self) -> tuple[str, str]:
        return self.rule, self.kind

    @property
    def about_memory(self) -> bool:
        return self.kind.startswith("results")

    def __str__(self) -> str:
        return f"{self.rule}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


def compared(graph: Captured) -> list[Fault]:
    """Every fault of a graph's versions; each is compared with the one before it."""
    names = [version.rule for version in graph.versions]
    found: list[Fault] = []
    for run in graph.runs:
        for name, old, new in zip(names[1:], run, run[1:]):
            found += _pair(name, old, new)
    return found


def _pair(name: str, old: Ran, new: Ran) -> list[Fault]:
    rule = None if name == FINAL else registry.rule_named(name)
    if old.error or new.error:
        if bool(old.error) == bool(new.error) or CONTRACT in new.error or HOSTED in old.error:
            return []
        return [Fault(name, "does not raise" if old.error else "raises", old.error or new.error)]
    pairs = [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(old.values, new.values, strict=True))]
    if rule is None or not rule.drops_writes:
        pairs += [(f"input {i} afterwards", a, b) for i, (a, b) in enumerate(zip(old.inputs, new.inputs, strict=True))]
    extreme = name in ELSEWHERE and any(map(_is_extreme, old.inputs))
    found = [fault for where, a, b in pairs for fault in [_value(name, rule, where, a, b, extreme)] if fault]
    # What Inductor's lowering makes of a graph that returns an input it has written to, a copy, is not in the graph.
    return found if rule is None else found + _sharing(name, old, new)


def _is_extreme(value: torch.Tensor) -> bool:
    """Whether a sum of such values may overflow or cancel in one order of its terms and not in another, or meet a key that a
    mask hides by adding a finite number, beside which it is seen all the same: NaN, infinite, or more than that number."""
    return value.is_floating_point() and bool((~(value.float().abs() <= 1e30)).any())


def _value(
    name: str, rule: Rule | None, where: str, old: torch.Tensor, new: torch.Tensor, extreme: bool = False
) -> Fault | None:
    kind = "input" if where.startswith("input") else "output"
    if old.shape != new.shape or old.dtype != new.dtype:
        was, now = (f"{t.dtype} {list(t.shape)}" for t in (old, new))
        return Fault(name, f"{kind} of another shape or dtype", f"{where}: {was} became {now}")
    mask = (different(old, new) & ~both_nan(old, new)).cpu()
    count = int(mask.sum())
    if not count:
        return None
    detail = f"{where}: {count} of {mask.numel()} elements differ, {_first(old, new, mask)}"
    if rule is None or rule.exact:
        return Fault(name, f"{kind} differs", detail)
    a, b = old.double().cpu(), new.double().cpu()
    if name in GROUPED:  # rows of no group hold what was there: nothing, or 0
        b = torch.where(a.isnan() & (b == 0), a, b)
    one_kind = a.isfinite() == b.isfinite()
    if not bool(one_kind.all()) and not extreme:
        return Fault(name, f"{kind} is finite in one only", detail)
    finite = a.isfinite() & b.isfinite()
    norm, gap = float(a[finite].norm()), float((a - b)[finite].norm())
    if gap > AMPLIFIED * rule.tolerance * norm + TINY and not extreme:
        return Fault(name, f"{kind} is too far", f"{detail}, distance {gap / norm if norm else gap:.1e}")
    seen = int((mask & ((a - b).abs() > NOISE * a.abs())).sum())
    if old.device.type == "cpu" and name not in ELSEWHERE and seen > max(2, FEW * mask.numel()):
        return Fault(name, f"many of an {kind} differ", f"{detail}, distance {gap / norm if norm else gap:.1e}")
    if old.dtype in FP8 and int(_steps(old, new)[mask].max()) > 1:
        return Fault(name, f"{kind} is more than one FP8 step away", detail)
    return None


def both_nan(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Where both hold a NaN of e4m3 as a byte, in a cache that is given as bytes: a conversion may give it either sign."""
    if old.dtype not in (torch.uint8, torch.int8):
        return torch.zeros_like(old, dtype=torch.bool)
    return ((old & 127) == 127) & ((new & 127) == 127)


def _steps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many FP8 numbers lie between two of one sign; zeros of either sign are one number."""
    one, two = (t.contiguous().view(torch.uint8).int().cpu() for t in (a, b))
    one, two = (torch.where(t > 127, 128 - t, t) for t in (one, two))
    return (one - two).abs()


def _first(old: torch.Tensor, new: torch.Tensor, mask: torch.Tensor) -> str:
    at = tuple(mask.nonzero()[0].tolist())
    a, b = (t[at].item() if t.dtype.is_complex else t[at].double().item() for t in (old, new))
    return f"first at {list(at)}: {a} became {b}"


# ---- memory -----------------------------------------------------------------------------------------------------------


def _sharing(name: str, old: Ran, new: Ran) -> list[Fault]:
    before, after = (sharing(ran.outputs, ran.inputs) for ran in (old, new))
    found = []
    for pair in sorted(before ^ after):
        kind = "overlap" if pair in after else "no longer overlap"
        found.append(Fault(name, f"results {kind}", f"{pair[0]} and {pair[1]}"))
    return found


def sharing(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> set[tuple[str, str]]:
    """Pairs of tensors with an output among them whose bytes overlap."""
    named = [*((f"input {i}", t) for i, t in enumerate(inputs)), *((f"output {i}", t) for i, t in enumerate(outputs))]
    found = set()
    for index, (one, a) in enumerate(named):
        for two, b in named[max(index + 1, len(inputs)) :]:
            if overlap(a, b):
                found.add((one, two))
    return found


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether an element of one is an element of the other. Strided tensors' bytes are listed: two columns do not overlap."""
    if type(a) is not torch.Tensor or type(b) is not torch.Tensor or not a.numel() or not b.numel():
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    (first, last), (start, end) = _range(a), _range(b)
    if last <= start or end <= first:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    return not set(_places(a)).isdisjoint(_places(b))


def _range(t: torch.Tensor) -> tuple[int, int]:
    start = t.storage_offset() * t.element_size()
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return start, start + (reach + 1) * t.element_size()


def _places(t: torch.Tensor) -> list[int]:
    at = torch.zeros((), dtype=torch.int64) + t.storage_offset()
    for size, stride in zip(t.shape, t.stride()):
        at = at[..., None] + torch.arange(size) * stride
    size = t.element_size()
    return (at.reshape(-1)[:, None] * size + torch.arange(size)).reshape(-1).tolist()
