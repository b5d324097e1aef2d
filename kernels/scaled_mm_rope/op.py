"""scaled_mm_rope: the q, k and v projections of an attention layer, with q and k normalised and rotated on the way out.

    x_i           = rounded((a · b_i) * scale_a * scale_b_i)                                 for i in 0 … len(b) - 1
    out columns i = qk_norm_rope(x_i as [B, S, N_i / 128, 128], weight, cos, sin)            for the first ``rotated`` products
                    x_i                                                                      for the others

Operands are those of ``scaled_mm`` (``kernels/scaled_mm/op.py``) with one a for all and no bias; the norm and the rotation are
those of ``qk_norm_rope`` (``kernels/qk_norm_rope/op.py``), of heads of 128. out [M, ΣN_i] bf16. cos and sin [1 or B, S, 128],
weights [128] (``q_weight`` of product 0, ``k_weight`` of product 1; None without a norm), all bf16. M = B · S: row t of a is
position t % S of sequence t // S. N_i are multiples of 128, ``rotated`` is 1 or 2, at most 4 products.

A head is a tile's row, so that it is normalised and rotated while it is still in registers: the launch that would read q and k
again and write them elsewhere goes. Each step is rounded as the two operators round it; only the norm's sum is taken in another
order. Kernels are the tile family's (``kernels/scaled_mm/tile.cuh``). Which one, and where it is faster than two launches, says
``table_<target>.json``, by ``benchmarks/kernels/scaled_mm_rope.py``: `table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from inductor_ext.kernels.qk_norm_rope import op as qk_norm_rope
from inductor_ext.kernels.rms_norm_quantize.op import CPP_NORMS
from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm import product
from inductor_ext.kernels.scaled_mm.config import Config, parse
from inductor_ext.kernels.scaled_mm.op_table import OpTable

#: Of a head, and so of a tile.
HEAD_DIM = 128
OUT_DTYPE = torch.bfloat16
MAX_PRODUCTS = scaled_mm.MAX_GROUP
NORMS = qk_norm_rope.NORMS

#: What a problem takes that the table does not know, and the same with partial sums beside the sums.
DEFAULT, EXACT = "tile:128x128p", "tile:128x128c"

#: What the table calls heads that are normalised too.
NORMALISED = "normalised heads"
_TABLES = {bool(end): OpTable(Path(__file__).parent, DEFAULT, EXACT, end) for end in ("", NORMALISED)}


def is_ours(config: Config) -> bool:
    """Whether a configuration's tile holds whole heads, in rows that a warpgroup has to itself."""
    return config.family == "tile" and config.n == HEAD_DIM and config.m <= 128


def table(norm: str) -> OpTable:
    """What was measured, of heads with or without a norm. N is that of all products together."""
    return _TABLES[bool(norm)]


# ---- what it computes ------------------------------------------------------------------------------------------------


def reference(
    a: torch.Tensor, b: Sequence[torch.Tensor], scale_a: torch.Tensor, scale_b: Sequence[torch.Tensor],
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, rotated: int,
    eps: float, norm: str, out_dtype: torch.dtype, use_fast_accum: bool, static_b: bool, config: str,
) -> torch.Tensor:  # fmt: skip
    operands = [a], b, [scale_a], scale_b, [None] * len(b)
    out = scaled_mm.reference(*operands, out_dtype, use_fast_accum, static_b, config)
    rows, positions = a.shape[0], cos.shape[1]
    sequences = rows // positions if positions else cos.shape[0]
    parts = out.split([each.shape[1] for each in b], 1)
    heads = [part.unflatten(1, (-1, HEAD_DIM)).unflatten(0, (sequences, positions)) for part in parts[:rotated]]
    q, k = (*heads, None)[:2]
    turned = qk_norm_rope.reference(q, k, q_weight, k_weight, cos, sin, eps, norm, out_dtype)[:rotated]
    return torch.cat([*(each.flatten(2).flatten(0, 1) for each in turned), *parts[rotated:]], 1)


def check(
    a: torch.Tensor, b: Sequence[torch.Tensor], q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, cos: torch.Tensor,
    sin: torch.Tensor, rotated: int, norm: str, out_dtype: torch.dtype, config: str,
) -> None:  # fmt: skip
    if not 1 <= len(b) <= MAX_PRODUCTS:
        raise ValueError(f"scaled_mm_rope: b: wanted 1 to {MAX_PRODUCTS} products, found {len(b)}")
    if rotated not in (1, 2) or rotated > len(b):
        raise ValueError(f"scaled_mm_rope: rotated: wanted 1 or 2 of {len(b)} products, found {rotated}")
    if out_dtype is not OUT_DTYPE:
        raise TypeError(f"scaled_mm_rope: out_dtype: wanted {OUT_DTYPE}, found {out_dtype}")
    if norm not in NORMS:
        raise ValueError(f"scaled_mm_rope: norm: wanted one of {', '.join(map(repr, NORMS))}, found {norm!r}")
    if config and not is_ours(parse(config)):
        raise ValueError(f"scaled_mm_rope: config: wanted a tile of 64 or 128 by {HEAD_DIM}, found {config!r}")
    for i, each in enumerate(b):
        if each.dim() != 2 or each.shape[1] % HEAD_DIM:
            raise ValueError(f"scaled_mm_rope: b[{i}]: wanted [K, N], N a multiple of {HEAD_DIM}, found {tuple(each.shape)}")
    _check_weight("q_weight", q_weight, bool(norm), out_dtype)
    _check_weight("k_weight", k_weight, bool(norm) and rotated == 2, out_dtype)
    _check_tables(a, cos, sin, out_dtype)


def _check_weight(name: str, weight: torch.Tensor | None, wanted: bool, dtype: torch.dtype) -> None:
    if (weight is not None) != wanted:
        found = "None" if weight is None else f"shape {tuple(weight.shape)}"
        raise ValueError(f"scaled_mm_rope: {name}: wanted {'a tensor' if wanted else 'None'}, found {found}")
    if weight is None:
        return
    if weight.dtype is not dtype:
        raise TypeError(f"scaled_mm_rope: {name}: wanted {dtype}, as the output, found {weight.dtype}")
    if weight.dim() != 1 or weight.shape[0] != HEAD_DIM or weight.stride(0) != 1:
        found = f"shape {tuple(weight.shape)}, strides {tuple(weight.stride())}"
        raise ValueError(f"scaled_mm_rope: {name}: wanted {HEAD_DIM} elements in a row, found {found}")


def _check_tables(a: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype is not dtype:
            raise TypeError(f"scaled_mm_rope: {name}: wanted {dtype}, as the output, found {table.dtype}")
        if table.dim() != 3 or table.shape[2] != HEAD_DIM:
            wanted = f"[1 or B, S, {HEAD_DIM}]"
            raise ValueError(f"scaled_mm_rope: {name}: wanted shape {wanted}, found {tuple(table.shape)}")
        if table.stride(2) != 1:
            raise ValueError(f"scaled_mm_rope: {name}: wanted columns of unit stride, found strides {tuple(table.stride())}")
    if sin.shape[0] != cos.shape[0] or sin.shape[1] != cos.shape[1]:
        raise ValueError(f"scaled_mm_rope: sin: wanted the shape of cos, {tuple(cos.shape)}, found {tuple(sin.shape)}")
    if a.dim() != 2:
        raise ValueError(f"scaled_mm_rope: a: wanted two dimensions, found shape {tuple(a.shape)}")
    rows, positions = a.shape[0], cos.shape[1]
    if (rows % positions if positions != 0 else rows) != 0:
        raise ValueError(f"scaled_mm_rope: a: wanted rows of whole sequences of {positions}, as cos has, found {rows}")
    if cos.shape[0] != 1 and cos.shape[0] * positions != rows:
        wanted = f"[1, {positions}, {HEAD_DIM}] or a table of each sequence, {rows} rows together"
        raise ValueError(f"scaled_mm_rope: cos: wanted {wanted}, found shape {tuple(cos.shape)}")


OP = product.ended(
    "scaled_mm_rope",
    "FP8 products side by side, the first ones normalised by heads and rotated: q, k and v, in one kernel",
    reference=reference,
    check=check,
    operands="[a], b, [scale_a], scale_b, [None for _ in b]",
    named=lambda what, i: what if what in ("a", "scale_a") else f"{what}[{i}]",
    product="a, b, (scale_a, *scale_b)",
    end=lambda norm: f"NormRope<inductor_ext::{CPP_NORMS[norm] if norm else 'NoNorm'}>",
    compiled="norm",
    run=("run_rope", "a, b, scale_a, scale_b, q_weight, k_weight, cos, sin, rotated, eps"),
    table=table,
    # Each norm once, one with exact accumulation: Qwen3's, Llama's, which has none, and Gemma 3's.
    examples=[(DEFAULT, True, "cast mul"), (DEFAULT, True, ""), (EXACT, False, "mul+1 cast")],
    qwen3=[(4096, 1024)],
    qwen3_end=("cast mul",),
)
