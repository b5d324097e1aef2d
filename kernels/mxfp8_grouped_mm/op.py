"""mxfp8_grouped_mm: one matrix product an expert, its weights in MXFP8, written into a planned buffer.

    out[t, n] = Σ_k x[t, k] · sx · w[e, n, k] · 2^sw            e: the group of row t

MXFP8 is e4m3 with one e8m0 scale (``torch.float8_e8m0fnu``, 2^(byte - 127)) for 32 consecutive elements along K. Products are
exact, sums fp32, rounded once; where FP8 tensor cores of compute capability 9.0 multiply (x in FP8), they keep about 14 bits of
the sum of 32 products (128 where `w_block` is), which is then added in fp32.

* x [T, K], rows sorted by group, unit stride along K, any pitch of a multiple of 16 bytes: bf16 or fp16 with ``x_scale`` None
  (the weights alone are MXFP8), or e4m3 with ``x_scale``: MXFP8, or FP8 with ``x_scale`` float32 [T, 1], one number a row.
* w [E, N, K] e4m3, contiguous; K a multiple of 32.
* offs [E] int32, the groups' cumulative ends, ascending. A group may be empty. Rows from ``offs[-1]`` on belong to no group:
  ``.out`` does not write them; what the functional form gives there is not defined (zeros on a CPU).
* scales, plain: ``x_scale`` [T, K/32], ``w_scale`` [E, N, K/32], contiguous.
* scales, ``swizzled``: as tensor cores of compute capability 10.0 read them, in tiles of 128 × 4 scales (``moe/mx.py``).
  ``w_scale`` [E, ceil128(N) · ceil4(K/32)]. ``x_scale`` [R, ceil4(K/32)]: group after group, each padded to 128 rows of its
  own; how many R has to be depends on ``offs``, and T + 128 · E is enough for any. Too few are an error on a CPU, and not
  looked at on a GPU.
* w_block: so many elements of K of a row of w have one scale: 32, as MX has it, or 128, where each four scales that follow
  one another are equal. FP8 tensor cores of 9.0 then scale a quarter as often. On a GPU that they are equal is not looked at.
* any scales may be given as uint8, their bytes: Inductor has no e8m0.
* out [T, N] of ``out_dtype``: bf16, fp16 or fp32.

The schedule is made on the device: no host sync, and nothing allocated but the output and, on 10.0 and for x in MXFP8, a
scratch buffer that is planned as the output is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from inductor_ext import torch_compat
from inductor_ext.kernels.mxfp8_grouped_mm import blackwell, hopper
from inductor_ext.kernels.target import target_of
from inductor_ext.moe import mx
from inductor_ext.moe.mx import dequantize
from inductor_ext.op import Kernel, Op

X_DTYPES = (torch.bfloat16, torch.float16)
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
W_BLOCKS = (32, 128)

#: Targets whose kernel has run on a GPU and been compared with the reference there. Rules in mode "auto" ask this on a CUDA
#: device; a kernel that has only been compiled is for "always".
HAS_RUN: frozenset[str] = frozenset({"sm_90a"})

#: The kernels by GPU target: modules with ``SOURCE``, ``unsupported``, ``slower``, ``keys``, ``scratch``, ``exports``,
#: ``bind``, ``examples``.
KERNELS: dict[str, Any] = {hopper.TARGET: hopper, blackwell.TARGET: blackwell}


def fake(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((x.shape[0], w.shape[1]), dtype=out_dtype)


def reference(
    x: torch.Tensor, x_scale: torch.Tensor | None, w: torch.Tensor, w_scale: torch.Tensor, offs: torch.Tensor,
    out_dtype: torch.dtype, swizzled: bool, w_block: int,
) -> torch.Tensor:  # fmt: skip
    out = x.new_zeros((x.shape[0], w.shape[1]), dtype=out_dtype)
    reference_into(x, x_scale, w, w_scale, offs, out_dtype, swizzled, w_block, out)
    return out


def reference_into(
    x: torch.Tensor, x_scale: torch.Tensor | None, w: torch.Tensor, w_scale: torch.Tensor, offs: torch.Tensor,
    out_dtype: torch.dtype, swizzled: bool, w_block: int, out: torch.Tensor,
) -> None:  # fmt: skip
    """Rows of groups only. On a CPU sums in float64; on a GPU without a host sync, and as PyTorch sums."""
    check(x, x_scale, w, w_scale, offs, out_dtype, swizzled, w_block)
    if tuple(out.shape) != (x.shape[0], w.shape[1]) or out.dtype is not out_dtype or out.device != x.device:
        wanted = f"{out_dtype} [{x.shape[0]}, {w.shape[1]}] on {x.device}"
        raise ValueError(f"mxfp8_grouped_mm: out: wanted {wanted}, found {out.dtype} {list(out.shape)} on {out.device}")
    if x.device.type == "cuda":
        _on_gpu(x, x_scale, w, w_scale, offs, swizzled, out)
        return
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    if any(start > end for start, end in zip(starts, ends)) or (ends and ends[-1] > x.shape[0]):
        raise ValueError(f"mxfp8_grouped_mm: offs: wanted ascending ends from 0 to at most {x.shape[0]}, found {ends}")
    x_scale, w_scale = _plain(x, x_scale, w, w_scale, offs, swizzled)
    _check_equal(w_scale, w_block)
    for expert, (start, end) in enumerate(zip(starts, ends)):
        if start == end:
            continue
        rows = x[start:end]
        left = rows.double() if x_scale is None else _numbers(rows, x_scale[start:end], torch.float64)
        right = dequantize(w[expert], w_scale[expert], torch.float64)
        out[start:end] = (left @ right.t()).to(out_dtype)


def _plain(x: Any, x_scale: Any, w: Any, w_scale: Any, offs: Any, swizzled: bool) -> tuple[Any, Any]:
    """Both scales as plain ones; scales of rows of no group are zero bytes."""
    if not swizzled:
        return x_scale, w_scale
    columns = x.shape[1] // mx.BLOCK
    if x_scale is not None and x_scale.dtype is not torch.float32:
        if not x.is_cuda:
            needed = int(mx.group_starts(offs)[-1])
            if x_scale.shape[0] < needed:
                wanted = f"at least {needed} rows for the groups of offs"
                raise ValueError(f"mxfp8_grouped_mm: x_scale: wanted {wanted}, found shape {list(x_scale.shape)}")
        x_scale = mx.unswizzle(x_scale, x.shape[0], columns, offs)
    each = [mx.unswizzle(group, w.shape[1], columns) for group in w_scale]
    return x_scale, torch.stack(each) if each else w_scale.reshape(0, w.shape[1], columns)


def _on_gpu(x: Any, x_scale: Any, w: Any, w_scale: Any, offs: Any, swizzled: bool, out: torch.Tensor) -> None:
    """What a GPU without our kernel runs: the weights as bf16 and PyTorch's grouped product. Never a host sync."""
    x_scale, w_scale = _plain(x, x_scale, w, w_scale, offs, swizzled)
    rows = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    inside = (rows < offs[-1])[:, None] if offs.numel() else torch.zeros_like(rows, dtype=torch.bool)[:, None]
    if x.dtype is not torch.float16 and out.dtype is torch.bfloat16 and w.shape[1] % 8 == 0:
        of_row = x_scale is not None and x_scale.dtype is torch.float32  # bf16 does not hold x times such a scale
        left = x.to(torch.bfloat16) if x_scale is None or of_row else dequantize(x, x_scale, torch.bfloat16)
        made = torch._grouped_mm(left, dequantize(w, w_scale, torch.bfloat16).transpose(-2, -1), offs)
        out.copy_(torch.where(inside, (made * x_scale).to(torch.bfloat16) if of_row else made, out))
        return
    left = x.float() if x_scale is None else _numbers(x, x_scale, torch.float32)
    made = torch.zeros_like(out, dtype=torch.float32)
    group = torch.bucketize(rows, offs, right=True)[:, None]
    for expert in range(w.shape[0]):  # PyTorch's grouped product is bf16 only, in rows of 16 bytes
        product = left @ dequantize(w[expert], w_scale[expert], torch.float32).t()
        made = torch.where(group == expert, product, made)
    out.copy_(torch.where(inside, made.to(out.dtype), out))


def _numbers(data: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """MXFP8 or FP8 with a scale a row."""
    if scales.dtype is torch.float32:
        return data.to(dtype) * scales.to(dtype)
    return dequantize(data, scales, dtype)


def check(x: Any, x_scale: Any, w: Any, w_scale: Any, offs: Any, out_dtype: Any, swizzled: bool, w_block: int) -> None:
    """TypeError or ValueError naming the argument that is wrong."""
    _check_data(x, w, out_dtype)
    if (x.dtype is mx.DATA) != (x_scale is not None):
        wanted = "scales for float8_e4m3fn" if x.dtype is mx.DATA else f"None for {x.dtype}"
        found = "None" if x_scale is None else f"{x_scale.dtype} {list(x_scale.shape)}"
        raise TypeError(f"mxfp8_grouped_mm: x_scale: wanted {wanted} x, found {found}")
    groups, n, k = w.shape
    if w_block not in W_BLOCKS or k % w_block:
        wanted = f"{' or '.join(map(str, W_BLOCKS))}, a divisor of K"
        raise ValueError(f"mxfp8_grouped_mm: w_block: wanted {wanted}, found {w_block} for K = {k}")
    columns = k // mx.BLOCK
    w_shape = [groups, n, columns]
    if swizzled:
        rows, columns = mx.swizzled_shape(n, columns)
        w_shape = [groups, rows * columns]
    _check_scale("w_scale", w_scale, w_shape, w_shape, x.device)
    if x_scale is not None and x_scale.dtype is torch.float32:
        _check_scale("x_scale", x_scale, [x.shape[0], 1], ["T", 1], x.device, (torch.float32,))
    elif x_scale is not None and swizzled:
        if x_scale.dim() != 2 or x_scale.shape[1] != columns:
            raise ValueError(f"mxfp8_grouped_mm: x_scale: wanted shape [R, {columns}], found shape {list(x_scale.shape)}")
        _check_scale("x_scale", x_scale, list(x_scale.shape), ["R", columns], x.device)
    elif x_scale is not None:
        _check_scale("x_scale", x_scale, [x.shape[0], columns], ["T", columns], x.device)
    if offs.dtype is not torch.int32 or offs.dim() != 1 or offs.device != x.device or offs.shape[0] != groups:
        found = f"{offs.dtype} {list(offs.shape)} on {offs.device}"
        raise ValueError(f"mxfp8_grouped_mm: offs: wanted int32 [{groups}], one end a group, on {x.device}, found {found}")
    if not offs.is_contiguous():
        raise ValueError(f"mxfp8_grouped_mm: offs: wanted unit stride, found {list(offs.stride())}")


def _check_equal(w_scale: torch.Tensor, w_block: int) -> None:
    """ValueError unless the plain scales of each ``w_block`` elements of K are equal."""
    each = w_scale.view(torch.uint8).unflatten(-1, (-1, w_block // mx.BLOCK))
    if bool((each != each[..., :1]).any()):
        expert, row, run, _ = (each != each[..., :1]).nonzero()[0].tolist()
        wanted = f"equal scales for each {w_block} elements of K, as w_block says"
        found = f"{each[expert, row, run].tolist()} in row {row} of {expert}"
        raise ValueError(f"mxfp8_grouped_mm: w_scale: wanted {wanted}, found {found}")


def _check_data(x: Any, w: Any, out_dtype: Any) -> None:
    if x.dtype not in (*X_DTYPES, mx.DATA):
        raise TypeError(f"mxfp8_grouped_mm: x: wanted bfloat16, float16 or float8_e4m3fn, found {x.dtype}")
    if w.dtype is not mx.DATA:
        raise TypeError(f"mxfp8_grouped_mm: w: wanted float8_e4m3fn, found {w.dtype}")
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"mxfp8_grouped_mm: out_dtype: wanted bfloat16, float16 or float32, found {out_dtype}")
    if x.dim() != 2:
        raise ValueError(f"mxfp8_grouped_mm: x: wanted [T, K], found shape {list(x.shape)}")
    if w.dim() != 3 or w.shape[2] != x.shape[1] or w.shape[2] % mx.BLOCK or not w.shape[2]:
        wanted = f"[E, N, {x.shape[1]}], K as x has and a multiple of {mx.BLOCK}"
        raise ValueError(f"mxfp8_grouped_mm: w: wanted {wanted}, found shape {list(w.shape)}")
    if not w.is_contiguous() or w.device != x.device:
        wanted = f"a contiguous tensor on {x.device}"
        raise ValueError(f"mxfp8_grouped_mm: w: wanted {wanted}, found strides {list(w.stride())} on {w.device}")
    if x.stride(1) != 1 or x.stride(0) * x.element_size() % 16:
        wanted = "unit stride along K and rows at multiples of 16 bytes"
        raise ValueError(f"mxfp8_grouped_mm: x: wanted {wanted}, found strides {list(x.stride())} of {x.dtype}")


def _check_scale(
    name: str,
    scale: Any,
    shape: list[Any],
    shown: list[Any],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = (mx.SCALE, torch.uint8),
) -> None:
    if scale.dtype not in dtypes:
        raise TypeError(f"mxfp8_grouped_mm: {name}: wanted float8_e8m0fnu, found {scale.dtype}")
    if scale.dim() != len(shape) or any(have != want for have, want in zip(scale.shape, shape)):
        wanted = f"[{', '.join(map(str, shown))}]"
        raise ValueError(f"mxfp8_grouped_mm: {name}: wanted shape {wanted}, found {list(scale.shape)}")
    if not scale.is_contiguous() or scale.device != device:
        wanted = f"a contiguous tensor on {device}"
        raise ValueError(f"mxfp8_grouped_mm: {name}: wanted {wanted}, found strides {list(scale.stride())} on {scale.device}")


# ---- kernels ---------------------------------------------------------------------------------------------------------


def unsupported(x: Any, x_scale: Any, w: Any, out_dtype: torch.dtype, swizzled: bool) -> tuple[str, str] | None:
    """What is wanted and what was found where no kernel of x's GPU serves such a call; None where one does, and on a CPU."""
    target = target_of(x.device)
    if not target:
        return None
    if target not in KERNELS:
        return f"one of {', '.join(KERNELS)}", target
    found: tuple[str, str] | None = KERNELS[target].unsupported(x, x_scale, w, out_dtype, swizzled)
    return found


def slower(x: Any, x_scale: Any, w: Any) -> tuple[str, str] | None:
    """What is wanted and what was found where PyTorch's product of dequantised weights measured faster."""
    target = target_of(x.device)
    found: tuple[str, str] | None = KERNELS[target].slower(x, x_scale, w) if target in KERNELS else None
    return found


def keys(x: Any, x_scale: Any, w: Any, out_dtype: torch.dtype, swizzled: bool, w_block: int) -> list[Hashable]:
    """(target, its module's key) of every kernel that such a call may take; none where PyTorch's own operators run."""
    target = target_of(x.device)
    if target not in KERNELS or KERNELS[target].unsupported(x, x_scale, w, out_dtype, swizzled) is not None:
        return []
    return [(target, each) for each in KERNELS[target].keys(x, x_scale, w, out_dtype, w_block)]


def key(x: Any, x_scale: Any, w: Any, out_dtype: torch.dtype, swizzled: bool, w_block: int) -> Hashable:
    return next(iter(keys(x, x_scale, w, out_dtype, swizzled, w_block)), None)


def scratch(x: Any, x_scale: Any, w: Any, out_dtype: torch.dtype, swizzled: bool) -> Any:
    """Bytes that a kernel keeps its schedule in (10.0), or x as bf16 (9.0, where x is MXFP8)."""
    target = target_of(x.device)
    served = target in KERNELS and KERNELS[target].unsupported(x, x_scale, w, out_dtype, swizzled) is None
    return KERNELS[target].scratch(x, x_scale, w) if served else 0


def bind(module: Any, key: Any) -> Callable[..., None]:
    run = KERNELS[key[0]].bind(module, key[1])

    def with_bytes(x: Any, x_scale: Any, w: Any, w_scale: Any, offs: Any, out: Any, scratch: Any) -> None:
        if w_scale.dtype is torch.uint8:
            w_scale = w_scale.view(mx.SCALE)
        if x_scale is not None and x_scale.dtype is torch.uint8:
            x_scale = x_scale.view(mx.SCALE)
        run(x, x_scale, w, w_scale, offs, out, scratch)

    return with_bytes


def examples(target: str) -> tuple[Hashable, ...]:
    return tuple((target, each) for each in KERNELS[target].examples()) if target in KERNELS else ()


OP = Op(
    "mxfp8_grouped_mm",
    "a matrix product an expert with MXFP8 weights, x in bf16, fp16, FP8 or MXFP8, into a planned buffer",
    reference=reference,
    reference_into=reference_into,
    fake=fake,
    checks=[check],
    kernel=Kernel(
        source=lambda key: KERNELS[key[0]].SOURCE,
        key=key,
        exports=lambda key: KERNELS[key[0]].exports(key[1]),
        bind=bind,
        min_capability=(9, 0),
        examples=examples,
        keys=keys,
        stock=reference_into,
        scratch=scratch,
    ),
)
torch_compat.computes_mx_grouped(OP.reference)
