"""qk_norm_rope: RMSNorm of each head of q and k, if the model has it, and RoPE on both, in one launch.

    y   = norm(x * rsqrt(mean(x²) + eps), weight)        over D, as ``kernels/rms_norm_quantize`` names norms; x for norm ""
    out = y * cos + cat(-y[..., D/2:], y[..., :D/2]) * sin        each product and the sum rounded, then cast to ``dtype``

With ``pairs`` neighbours are turned with each other, -y[1], y[0], -y[3], y[2], … in place of the halves. With ``rotary`` only
so many columns are turned, the first ones, and the others are y's; 0 is all of them.

q [B, S, H, D] and k [B, S, Hkv, D] (or None) with unit last stride, the others free: columns of one qkv buffer, or permuted.
cos and sin [1 or B, S, R], in q's dtype or in fp32: those make products and sum fp32, as type promotion does. They have R/2
columns where both columns that are turned with each other have the same numbers. By pairs one table may have both, [1 or B, S,
R/2, 2], as ``view_as_real`` of complex numbers gives it: cos is that then, and sin, of its shape, is not read. Weights [D].
q and k are bf16, fp16 or fp32, D even, 2 to 256. Outputs, contiguous: [B, S, H, D] and [B, S, Hkv, D], or [0] without k.

Only the mean's order of summation differs from eager: without a norm every byte is eager's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from inductor_ext.kernels import steps
from inductor_ext.kernels.rms_norm_quantize.op import CPP_NORMS, normalise
from inductor_ext.kernels.rms_norm_quantize.op import NORMS as _NORMS
from inductor_ext.op import Kernel, Op
from inductor_ext.signature import Call

NORMS = ("", *_NORMS)
MAX_HEAD_DIM = 256


def reference(
    q: torch.Tensor, k: torch.Tensor | None, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, cos: torch.Tensor,
    sin: torch.Tensor, eps: float, norm: str, dtype: torch.dtype, pairs: bool = False, rotary: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    columns = rotary or q.shape[-1]
    if cos.dim() == 4:  # has both
        cos, sin = cos.unbind(-1)
    if cos.shape[-1] != columns:  # one number for two columns
        cos, sin = (each.repeat_interleave(2, -1) if pairs else each.repeat(1, 1, 2) for each in (cos, sin))
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)

    def one(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        y = x if weight is None or not norm else normalise(x, weight, eps, norm)
        turning, passing = y[..., :columns], y[..., columns:]
        rotated = turning * cos + (rotate_pairs if pairs else rotate_half)(turning) * sin
        return torch.cat((rotated.to(dtype), passing.to(dtype)), -1).contiguous()

    return one(q, q_weight), q.new_empty((0,), dtype=dtype) if k is None else one(k, k_weight)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def check(
    op: str, heads: Sequence[tuple[str, Any, Any]], cos: torch.Tensor, sin: torch.Tensor, norm: str, dtype: torch.dtype,
    pairs: bool = False, rotary: int = 0,
) -> None:  # fmt: skip
    """TypeError or ValueError of ``op`` unless ``heads``, (name, heads, weight) of q and k, can be turned; one is there."""
    (one, q, _), *others = heads
    if q.dtype not in steps.TOKEN_OF_DTYPE:
        raise TypeError(f"{op}: {one}: wanted bfloat16, float16 or float32, found {q.dtype}")
    if q.dim() != 4 or q.shape[3] % 2 or q.shape[3] > MAX_HEAD_DIM or q.shape[3] == 0:
        wanted = f"[B, S, H, D], D even, 2 to {MAX_HEAD_DIM}"
        raise ValueError(f"{op}: {one}: wanted {wanted}, found shape {tuple(q.shape)}")
    for name, k, _ in others:
        if k is not None and (k.dim() != 4 or k.dtype != q.dtype or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]):
            wanted = f"{q.dtype}, tokens and D of {one}, {tuple(q.shape)}"
            raise ValueError(f"{op}: {name}: wanted {wanted}, found {k.dtype} of shape {tuple(k.shape)}")
    if norm not in NORMS:
        raise ValueError(f"{op}: norm: wanted one of {', '.join(map(repr, NORMS))}, found {norm!r}")
    for name, x, weight in heads:
        _check_weight(op, f"{name}_weight", weight, q, bool(norm) and x is not None)
    dtypes = [(f"{name}_weight", weight.dtype) for name, _, weight in heads if weight is not None]
    for name, found in dtypes[1:]:
        if found != dtypes[0][1]:
            raise TypeError(f"{op}: {name}: wanted {dtypes[0][1]}, as {dtypes[0][0]}, found {found}")
    columns, even = rotary or q.shape[3], 4 if pairs else 2
    if rotary < 0 or columns > q.shape[3] or columns % even:
        wanted = f"0 for all columns, or a multiple of {even} up to {q.shape[3]}"
        raise ValueError(f"{op}: rotary: wanted {wanted}, found {rotary}{' with pairs' if pairs else ''}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (q.dtype, torch.float32) or table.dtype != cos.dtype:
            raise TypeError(f"{op}: {name}: wanted {q.dtype}, as {one}, or float32, cos and sin alike, found {table.dtype}")
        sizes = 1 if table.dim() in (3, 4) and table.shape[0] == 1 else q.shape[0], q.shape[1]
        own = (columns, columns // 2) if table.dim() == 3 else (columns // 2,)
        known = table.dim() == 3 or (table.dim() == 4 and pairs and table.shape[3] == 2)
        if not known or table.shape[:2] != sizes or table.shape[2] not in own:
            wanted = f"[1 or {q.shape[0]}, {q.shape[1]}, {columns} or {columns // 2}]"
            wanted += f", or [1 or {q.shape[0]}, {q.shape[1]}, {columns // 2}, 2]" if pairs else ""
            raise ValueError(f"{op}: {name}: wanted shape {wanted}, found {tuple(table.shape)}")
    if cos.dim() != sin.dim() or cos.shape[0] != sin.shape[0] or cos.shape[2] != sin.shape[2]:
        raise ValueError(f"{op}: sin: wanted the shape of cos, {tuple(cos.shape)}, found {tuple(sin.shape)}")
    if dtype not in (q.dtype, cos.dtype):
        raise TypeError(f"{op}: dtype: wanted that of {one} or of cos, {q.dtype} or {cos.dtype}, found {dtype}")


def _check_weight(op: str, name: str, weight: torch.Tensor | None, q: torch.Tensor, wanted: bool) -> None:
    if (weight is not None) != wanted:
        found = "None" if weight is None else f"shape {tuple(weight.shape)}"
        raise ValueError(f"{op}: {name}: wanted {'a tensor' if wanted else 'None'}, found {found}")
    if weight is None:
        return
    if weight.dtype not in steps.TOKEN_OF_DTYPE:
        raise TypeError(f"{op}: {name}: wanted bfloat16, float16 or float32, found {weight.dtype}")
    if weight.dim() != 1 or weight.shape[0] != q.shape[3]:
        raise ValueError(f"{op}: {name}: wanted shape ({q.shape[3]},), found {tuple(weight.shape)}")


# ---- kernels ---------------------------------------------------------------------------------------------------------


def key(
    q: torch.Tensor, q_weight: torch.Tensor | None, cos: torch.Tensor, norm: str, dtype: torch.dtype, pairs: bool, rotary: int
) -> tuple[Any, ...]:
    weight = None if q_weight is None else q_weight.dtype
    return q.dtype, weight, cos.dtype, norm, dtype, *turn(q, cos, pairs, rotary)


def turn(q: torch.Tensor, cos: torch.Tensor, pairs: bool, rotary: int) -> tuple[str, ...]:
    """The C++ type of what is turned with what, as the end of a key: nothing for the halves of whole heads."""
    partial = rotary not in (0, q.shape[3])
    halved = cos.shape[2] != (rotary or q.shape[3])
    if not (pairs or halved or partial):
        return ()
    flags = (pairs, halved, partial, *((True,) if cos.dim() == 4 else ()))
    return (f"inductor_ext::Turn<{', '.join(str(each).lower() for each in flags)}>",)


def types(
    q: torch.dtype, weight: torch.dtype | None, table: torch.dtype, norm: str, dtype: torch.dtype, *turn: str
) -> tuple[str, ...]:
    """The template arguments of a key."""
    floats = (steps.CPP_TYPES[each] for each in (q, weight or q, table, dtype))
    return (*floats, f"inductor_ext::{CPP_NORMS[norm] if norm else 'NoNorm'}", *turn)


def bind(module: Any, key: tuple[Any, ...]) -> Call:
    tensors = "q, k, q_weight, k_weight, cos, sin, eps"
    return Call(module.run, f"{tensors}, rotary, out0, out1" if key[5:] else f"{tensors}, out0, out1")


BF16 = torch.bfloat16
#: Keys of bf16 models: Qwen 3, Llama and Gemma 3.
QWEN3, GEMMA3 = ((BF16, BF16, BF16, norm, BF16) for norm in ("cast mul", "mul+1 cast"))
LLAMA = (BF16, None, BF16, "", BF16)
#: Serving frameworks' own spelling, of whole heads by halves with tables of half a head: with a norm and without.
NATIVE = [(*key, "inductor_ext::Turn<false, true, false>") for key in (QWEN3, LLAMA)]
OP = Op(
    "qk_norm_rope",
    "RMSNorm of each head of q and k, if the model has it, and RoPE on both",
    reference=reference,
    fake=lambda q, k, dtype: (q.new_empty(q.shape, dtype=dtype), q.new_empty((0,) if k is None else k.shape, dtype=dtype)),
    checks=[Call(check, "'qk_norm_rope', (('q', q, q_weight), ('k', k, k_weight)), cos, sin, norm, dtype, pairs, rotary")],
    kernel=Kernel(
        source="qk_norm_rope/qk_norm_rope.cuh",
        key=key,
        exports=lambda key: f"inductor_ext::QkNormRope<{', '.join(types(*key))}>::{'turn' if key[5:] else 'run'}",
        bind=bind,
        examples=[QWEN3, LLAMA, GEMMA3, *NATIVE],
        presets={"qwen3": lambda _: [QWEN3]},
    ),
)
