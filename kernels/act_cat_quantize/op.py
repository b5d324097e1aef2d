"""act_cat_quantize: columns as they are beside an activation, and FP8 with a dynamic scale a row, or MXFP8.

    y = cat([x, FORMS[form](gate, up)], -1), the other way round without x_first
    scale, out                      as kernels/quantized.py has them for "row" and "mx"

The activation is act_quantize's: its forms, its gate and up [..., C1], its pairs. x is [..., C0], or heads [..., H, D] that lie
side by side in y, C0 = H * D. Its rows may have two pitches, its heads any: attention's [B, H, S, D] is given as [B, S, H, D].
Outputs: out [..., C0 + C1] contiguous, and scale. C0 + C1 up to 32 768; no columns on either side: ValueError.

One scale for a whole tensor and static ones have no kernel: y would go to memory, or one pass over memory is what Inductor has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from inductor_ext.kernels import quantized
from inductor_ext.kernels.act_quantize import op as act_quantize
from inductor_ext.kernels.act_quantize.op import FORMS, inputs_of
from inductor_ext.signature import Call

GRANULARITIES = ("row", quantized.MX)
MAX_COLUMNS = 32768


def reference(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, form: str, pairs: bool, x_first: bool, granularity: str,
    scale_program: str, program: str, dtype: torch.dtype, scales: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    columns = x.flatten(-2) if x.dim() > gate.dim() else x
    activated = FORMS[form].fn(*inputs_of(gate, up, pairs))
    for name, part in (("x", columns), ("gate", activated)):
        if part.shape[-1] == 0:
            raise ValueError(f"act_cat_quantize: {name}: wanted at least one column, found shape {tuple(part.shape)}")
    y = torch.cat([columns, activated] if x_first else [activated, columns], -1)
    out, scale = quantized.quantize(y, granularity, scale_program, program, dtype, scales)
    return out.contiguous(), scale.contiguous()


def fake(
    x: torch.Tensor, gate: torch.Tensor, pairs: bool, granularity: str, scale_program: str, dtype: torch.dtype,
    scales: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return quantized.outputs(_like_y(x, gate, pairs), granularity, scale_program, dtype, scales)


def _like_y(x: torch.Tensor, gate: torch.Tensor, pairs: bool) -> torch.Tensor:
    """A tensor of y's shape and dtype, in the memory of one element."""
    columns = x.shape[-1] * (x.shape[-2] if x.dim() > gate.dim() else 1)
    return gate.new_empty(()).expand(*gate.shape[:-1], columns + gate.shape[-1] // (2 if pairs else 1))


def check(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, form: str, pairs: bool, granularity: str, scale_program: str,
    program: str, dtype: torch.dtype, scales: Sequence[torch.Tensor],
) -> None:  # fmt: skip
    act_quantize.check_inputs("act_cat_quantize", gate, up, form, pairs)
    leading = gate.dim() - 1
    if x.dtype is not gate.dtype or x.dim() not in (leading + 1, leading + 2) or x.shape[:leading] != gate.shape[:-1]:
        wanted = f"{gate.dtype} of the rows of gate, {list(gate.shape[:-1])}, and columns or heads"
        raise ValueError(f"act_cat_quantize: x: wanted {wanted}, found {x.dtype} of shape {tuple(x.shape)}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"act_cat_quantize: granularity: wanted {' or '.join(GRANULARITIES)}, found {granularity!r}")
    y = _like_y(x, gate, pairs)
    quantized.check("act_cat_quantize", "x and gate", y, granularity, scale_program, program, dtype, scales)


def _bf16(form: str, *quantisation: Any, pairs: bool = False) -> tuple[Any, ...]:
    return torch.bfloat16, form, pairs, *quantisation


OP = quantized.producer(
    "act_cat_quantize",
    "columns as they are beside an activation, gated or not, and FP8: a row's scale or MXFP8",
    reference=reference,
    check=check,
    fake=Call(fake, "x, gate, pairs, granularity, scale_program, dtype, scales"),
    operands="x, gate, up, x_first",
    compiled="gate.dtype, form, pairs",
    types=act_quantize.types,
    examples=[
        *(_bf16(form, *quantized.dynamic("row")) for form in ("gelu_tanh", "gelu", "silu", "silu mul")),
        _bf16("gelu_tanh", *quantized.mxfp8()),
    ],
)
