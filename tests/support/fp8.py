"""FP8 in float64, written down from the formats' definitions and not from PyTorch: what the ops are compared with."""

from __future__ import annotations

import dataclasses

import torch

from inductor_ext import torch_compat


@dataclasses.dataclass(frozen=True)
class Format:
    mantissa: int
    smallest_exponent: int  # of a normal number
    largest: float
    overflow: float


FORMATS = {
    torch.float8_e4m3fn: Format(3, -6, 448.0, 448.0 if torch_compat.e4m3fn_saturates() else float("nan")),
    torch.float8_e5m2: Format(2, -14, 57344.0, float("inf")),
}


def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value`` (float64) rounded to nearest even in ``dtype``, as float64; past the largest number what torch gives."""
    assert value.dtype is torch.float64
    form = FORMATS[dtype]
    _, exponent = torch.frexp(value)
    step = torch.pow(2.0, (exponent - 1).clamp(min=form.smallest_exponent).double() - form.mantissa)
    result = torch.round(value / step) * step  # torch.round is half to even
    past = torch.copysign(torch.full_like(value, form.overflow), value)
    return torch.where((result.abs() > form.largest) & ~value.isnan(), past, result)
