"""quantize_moe_: the experts' weights of a model become MXFP8, in place, when it is asked for, and it says what that costs.

    report = inductor_ext.quantize_moe_(model)                    a Hugging Face model, experts_implementation="grouped_mm"
    report = inductor_ext.quantize_moe_(model, weights={"layers.*.w1": "[E, N, K]"})      any other

Every weight is replaced by an `MXFP8Weight`: 8.25 bits a number in the place of 16. The report names each
weight with the relative error ‖w - ŵ‖ / ‖w‖ that it costs and the largest single one, and every 3-D weight that was left alone,
with the reason. Nothing is quantised anywhere else: a compiled bf16 model stays bf16.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from inductor_ext.errors import SettingError
from inductor_ext.moe.weight import ACTIVATIONS, BLOCK, MXFP8Weight

AUTO = "auto"
#: How a weight lies in memory, with K what is summed over. ``grouped_mm`` takes [E, K, N]: the first kind is transposed for it.
LAYOUTS = {"[E, N, K]": False, "[E, K, N]": True}
#: Rounding to e4m3 costs 2.7 % in the root mean square. Far more is no rounding but a kernel that has gone wrong.
MAX_ERROR = 0.1


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """One weight that was quantised."""

    name: str
    shape: tuple[int, ...]
    error: float  # ‖w - ŵ‖ / ‖w‖
    max_error: float  # max |w - ŵ|
    max_weight: float  # max |w|
    bytes_before: int
    bytes_after: int
    squares: tuple[float, float]  # ‖w - ŵ‖², ‖w‖²


@dataclasses.dataclass(frozen=True)
class Skipped:
    """One 3-D weight that was left alone."""

    name: str
    reason: str
    wanted: str
    found: str


@dataclasses.dataclass(frozen=True)
class MoEReport:
    """What `quantize_moe_` did."""

    weights: tuple[QuantizedWeight, ...]
    skipped: tuple[Skipped, ...]
    activations: str
    rounding: str

    @property
    def error(self) -> float:
        """‖w - ŵ‖ / ‖w‖ over all weights."""
        gap, norm = (sum(weight.squares[i] for weight in self.weights) for i in range(2))
        return math.sqrt(gap / norm) if norm else 0.0

    @property
    def bytes_before(self) -> int:
        return sum(weight.bytes_before for weight in self.weights)

    @property
    def bytes_after(self) -> int:
        return sum(weight.bytes_after for weight in self.weights)

    def to_dict(self) -> dict[str, Any]:
        totals = {"error": self.error, "bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return {**totals, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        from inductor_ext.report import text

        return text.render(self)

    __repr__ = __str__

    def __rich__(self) -> Any:
        from inductor_ext.report import text

        return text.quantized_moe(self)


@torch.no_grad()
def quantize_moe_(
    model: torch.nn.Module,
    *,
    activations: str = AUTO,
    rounding: str = "rceil",
    weights: Mapping[str, str] | None = None,
    swizzled: bool | None = None,
    show: bool = True,
) -> MoEReport:
    """Quantise the experts' weights of ``model`` to MXFP8, in place; returns, and prints if ``show``, what it cost.

    ``activations``: "bf16" leaves them as they are. "mxfp8" quantises them too, before each product, which tensor cores of
    compute capability 10.0 multiply at once. "fp8" quantises them with one scale a row, for the FP8 tensor cores of compute
    capability 9.0: faster there than "bf16", which is more exact, at any number of tokens. "auto" is "mxfp8" on 10.0, "fp8" on
    9.0 and "bf16" elsewhere. ``rounding`` of MX scales: "rceil" (cuBLAS's) or "floor" (OCP MX 1.0).

    Which weights: those of Hugging Face's experts, whose layout they say themselves, where the model runs them by
    ``grouped_mm``; and parameters whose names match a pattern in ``weights``, which gives their layout, "[E, N, K]" where the
    code transposes them for ``grouped_mm`` and "[E, K, N]" where it does not. ``swizzled`` keeps scales as compute capability
    10.0 reads them (None: where activations are MXFP8 and the device is one).
    """
    if activations not in (AUTO, *ACTIVATIONS):
        raise SettingError(f"activations: wanted auto, {', '.join(ACTIVATIONS)}, found {activations!r}")
    if rounding not in ("rceil", "floor"):
        raise SettingError(f"rounding: wanted rceil or floor, found {rounding!r}")
    named = dict(weights or {})
    _check_patterns(named, model)
    done: list[QuantizedWeight] = []
    skipped: list[Skipped] = []
    made: dict[int, Any] = {}  # a parameter with two names stays one
    chosen = activations
    for owner, attribute, name, parameter in _candidates(model):
        layout = _layout(owner, attribute, name, named)
        if isinstance(layout, Skipped):
            skipped.append(layout)
            continue
        if id(parameter) in made:
            owner._parameters[attribute] = made[id(parameter)]
            continue
        reason = _unsuitable(name, parameter, layout)
        if reason is not None:
            skipped.append(reason)
            continue
        chosen = _activations(activations, parameter.device)
        tiles = chosen == "mxfp8" and _has_mx(parameter.device) if swizzled is None else swizzled
        weight = MXFP8Weight.quantize(parameter, transposed=layout, activations=chosen, rounding=rounding, swizzled=tiles)
        done.append(_cost(name, parameter, weight))
        made[id(parameter)] = torch.nn.Parameter(weight, requires_grad=False)
        owner._parameters[attribute] = made[id(parameter)]
    report = MoEReport(tuple(done), tuple(skipped), chosen, rounding)
    if show:
        from inductor_ext.cli.common import stdout

        stdout().print(report)
    return report


def _candidates(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, str, torch.Tensor]]:
    """Every parameter of three dimensions: its module, its name there, its whole name."""
    for path, owner in list(model.named_modules()):
        for attribute, parameter in list(owner._parameters.items()):
            if parameter is not None and parameter.dim() == 3:
                yield owner, attribute, f"{path}.{attribute}".lstrip("."), parameter


def _check_patterns(named: Mapping[str, str], model: torch.nn.Module) -> None:
    names = [name for _, _, name, _ in _candidates(model)]
    for pattern, layout in named.items():
        if layout not in LAYOUTS:
            raise SettingError(f"weights: {pattern}: wanted {' or '.join(LAYOUTS)}, found {layout!r}")
        if not fnmatch.filter(names, pattern):
            known = ", ".join(names[:8]) + (", …" if len(names) > 8 else "") or "none"
            found = f"{pattern!r}, which none is called; there is {known}"
            raise SettingError(f"weights: wanted a pattern of 3-D parameters, found {found}")


def _layout(owner: torch.nn.Module, attribute: str, name: str, named: Mapping[str, str]) -> bool | Skipped:
    """Whether the weight is [E, K, N]; or why it is left alone."""
    for pattern, layout in named.items():
        if fnmatch.fnmatch(name, pattern):
            return LAYOUTS[layout]
    if not (isinstance(getattr(owner, "is_transposed", None), bool) and hasattr(owner, "has_gate")):
        wanted = 'an entry in weights={…} that says how it lies, such as {"' + name + '": "[E, N, K]"}'
        return Skipped(name, "not known to be read by grouped_mm", wanted, f"{type(owner).__name__}.{attribute}")
    if not attribute.endswith("_proj"):
        return Skipped(name, "no weight of a grouped product", "gate_up_proj, up_proj or down_proj", attribute)
    implementation = getattr(getattr(owner, "config", None), "_experts_implementation", None)
    if implementation != "grouped_mm":
        wanted = 'experts_implementation="grouped_mm" (model.set_experts_implementation)'
        return Skipped(name, "its model does not run it by grouped_mm", wanted, repr(implementation))
    return bool(owner.is_transposed)


def _unsuitable(name: str, parameter: torch.Tensor, transposed: bool) -> Skipped | None:
    if isinstance(parameter, MXFP8Weight):
        return Skipped(name, "already quantised", "a bf16 weight", repr(parameter))
    if type(parameter) is not torch.nn.Parameter:
        return Skipped(name, "another kind of tensor", "a plain parameter", type(parameter).__name__)
    if parameter.dtype is not torch.bfloat16:
        return Skipped(name, "dtype", "bfloat16", str(parameter.dtype)[6:])
    if parameter.device.type not in ("cpu", "cuda"):
        return Skipped(name, "device", "cpu or cuda", str(parameter.device))
    k = parameter.shape[-2 if transposed else -1]
    if k % BLOCK or not parameter.numel():
        return Skipped(name, f"K is not a multiple of {BLOCK}", f"a multiple of {BLOCK}", f"K {k} of {list(parameter.shape)}")
    if not bool(torch.stack([torch.isfinite(expert).all() for expert in parameter]).all()):
        return Skipped(name, "not finite", "finite weights", "NaN or infinity")
    return None


def _activations(asked: str, device: torch.device) -> str:
    if asked != AUTO:
        return asked
    if _has_mx(device):
        return "mxfp8"
    return "fp8" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) else "bf16"


def _has_mx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


def _cost(name: str, before: torch.Tensor, after: MXFP8Weight) -> QuantizedWeight:
    """An expert at a time: in float32 all of them would take twice the memory of the weight."""
    found = []
    for wanted, given in zip(before.detach(), after.experts()):
        difference = wanted.float() - given.float()
        squares = difference.double().square().sum(), wanted.double().square().sum()
        found.append(torch.stack([*squares, difference.abs().max().double(), wanted.abs().max().double()]))
    each = torch.stack(found).cpu()
    (gap, norm), (max_error, max_weight) = each[:, :2].sum(0).tolist(), each[:, 2:].amax(0).tolist()
    error = math.sqrt(gap / norm) if norm else 0.0
    if not error <= MAX_ERROR:
        advice = "the weight is as it was; try torch.ops.inductor_ext.mxfp8_quantize on a CPU copy of it"
        wanted_error = f"a relative error of at most {MAX_ERROR}"
        raise RuntimeError(f"quantize_moe_: {name}: wanted {wanted_error}, found {error:.3g}; {advice}")
    shape = tuple(before.shape)
    return QuantizedWeight(name, shape, error, max_error, max_weight, before.nbytes, after.quantized_nbytes, (gap, norm))
