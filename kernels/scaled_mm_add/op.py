"""scaled_mm_add: one FP8 matrix product with scales, and a residual added to it.

    out = rounded((a · b) * scale_a * scale_b + bias) + residual

Operands are those of ``scaled_mm`` (``kernels/scaled_mm/op.py``), one of each; ``residual`` and ``out`` [M, N] are of
``out_dtype``, and their rows may have any stride that is a multiple of 16 bytes. The product is rounded to ``out_dtype`` before
the residual is added, as two operators do it. The residual is read while its tile is multiplied: a norm after it then reads one
tensor where it read two and wrote one.

Kernels are the tile family's (``kernels/scaled_mm/tile.cuh``, ``AddResidual``). Which one, and whether it is faster than a
product and a norm that adds, is in ``table_<target>.json`` (``benchmarks/kernels/scaled_mm_add.py``): on an H200 it is where
the product is small, as those of Qwen3-0.6B are, and not where arithmetic takes longer than the addition's traffic.
"""

from __future__ import annotations

from pathlib import Path

import torch

from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm import product
from inductor_ext.kernels.scaled_mm.op_table import OpTable

#: What a problem takes that is not in the table: 128 × 128 fills most grids.
DEFAULT = "tile:128x128p"
TABLE = OpTable(Path(__file__).parent, DEFAULT, DEFAULT)

#: Of a thread, for one tile: 192 spill 72 bytes beside the residual.
MAX_ACCUMULATORS = 160


def check(a: torch.Tensor, b: torch.Tensor, residual: torch.Tensor, out_dtype: torch.dtype) -> None:
    if residual.dtype != out_dtype or residual.dim() != 2:
        wanted = f"{out_dtype} of two dimensions, as the output"
        raise TypeError(f"scaled_mm_add: residual: wanted {wanted}, found {residual.dtype} of shape {tuple(residual.shape)}")
    if a.dim() == b.dim() == 2 and (residual.shape[0] != a.shape[0] or residual.shape[1] != b.shape[1]):
        wanted = f"shape {(a.shape[0], b.shape[1])}"
        raise ValueError(f"scaled_mm_add: residual: wanted {wanted}, found {tuple(residual.shape)}")


def reference(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None,
    residual: torch.Tensor, out_dtype: torch.dtype, use_fast_accum: bool, static_b: bool, config: str,
) -> torch.Tensor:  # fmt: skip
    operands = [a], [b], [scale_a], [scale_b], [bias]
    return scaled_mm.reference(*operands, out_dtype, use_fast_accum, static_b, config) + residual


OP = product.ended(
    "scaled_mm_add",
    "an FP8 matrix product and a residual added to it, in one kernel",
    reference=reference,
    check=check,
    operands="[a], [b], [scale_a], [scale_b], [bias]",
    named=lambda what, i: what,
    product="a, (b,), (scale_a, scale_b)",
    end=lambda: "AddResidual",
    run=("run_add", "a, b, scale_a, scale_b, bias, residual"),
    table=TABLE,
    examples=[(DEFAULT, True)],
    qwen3=[(1024, 2048), (1024, 3072)],  # o and down
)
