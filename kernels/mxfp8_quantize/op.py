"""mxfp8_quantize: MXFP8, e4m3 data with one e8m0 scale for every 32 elements of a row.

    scale = 2^k from amax of the block, rounded "rceil" (cuBLAS's) or "floor" (OCP MX 1.0);  data = saturating cast(x / scale)

x [T, K], or weights [E, N, K], bf16, fp16 or fp32, K a multiple of 32, unit stride within a row and any between rows; data
e4m3 of x's shape, contiguous. Scales are plain, [T, K/32] or [E, N, K/32], or ``swizzled`` for the tensor cores of compute
capability 10.0, which alone read them: [T, K] as one group, [rows padded to 128, K/32 padded to 4]; [E, N, K] as E groups,
[E, the bytes of one]. ``offs`` [E] int32 are the cumulative ends of groups of x's rows (sorted tokens of experts): every
group of the scale buffer is padded to 128 rows, [T + 128·E, K/32 padded to 4] being enough wherever they end. Padding is
zero. Rows past ``offs[-1]`` have data and, swizzled, no scales. The bytes are those of ``moe/mx.py``, torchao's.

One pass over memory, and no host sync: the kernel finds its group from ``offs`` on the device.
"""

from __future__ import annotations

from typing import Any

import torch

from inductor_ext import settings
from inductor_ext.kernels import steps
from inductor_ext.moe import mx
from inductor_ext.op import Kernel, Op
from inductor_ext.signature import Call

#: Targets whose kernels have run on a GPU and been compared with the reference there, those of the ops that quantise what they
#: compute ("mx" of rms_norm_quantize and act_mul_quantize) too. Rules in mode "auto" ask this on a CUDA device.
HAS_RUN: frozenset[str] = frozenset({"sm_90a"})


def fake(x: torch.Tensor, offs: torch.Tensor | None, swizzled: bool) -> Any:
    cols = x.shape[-1] // mx.BLOCK
    shape: tuple[int, ...] = (*x.shape[:-1], cols)
    if swizzled and offs is not None:
        shape = mx.grouped_shape(x.shape[0], cols, offs.shape[0])
    elif swizzled:
        rows, cols = mx.swizzled_shape(x.shape[-2], cols)
        shape = (rows, cols) if x.dim() == 2 else (x.shape[0], rows * cols)
    return x.new_empty(x.shape, dtype=mx.DATA), x.new_empty(shape, dtype=mx.SCALE)


def reference(
    x: torch.Tensor, offs: torch.Tensor | None, rounding: str, swizzled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if offs is not None and (settings.checks_enabled() or not offs.is_cuda):
        mx.check_offs("mxfp8_quantize", offs, x.shape[0])
    data, scales = mx.quantize(x, rounding)
    return data, mx.swizzle(scales, offs) if swizzled else scales


def check(x: torch.Tensor, offs: torch.Tensor | None, rounding: str) -> None:
    if x.dtype not in steps.TOKEN_OF_DTYPE:
        raise TypeError(f"mxfp8_quantize: x: wanted bfloat16, float16 or float32, found {x.dtype}")
    if x.dim() not in (2, 3):
        raise ValueError(f"mxfp8_quantize: x: wanted [T, K] or [E, N, K], found shape {tuple(x.shape)}")
    if x.shape[-1] % mx.BLOCK != 0:
        raise ValueError(f"mxfp8_quantize: x: wanted rows of a multiple of {mx.BLOCK} elements, found shape {tuple(x.shape)}")
    if rounding not in mx.ROUNDINGS:
        raise ValueError(f"mxfp8_quantize: rounding: wanted rceil or floor, found {rounding!r}")
    if offs is None:
        return
    if x.dim() != 2:
        raise ValueError(f"mxfp8_quantize: offs: wanted None for weights of shape {tuple(x.shape)}, whose groups are E")
    if offs.dim() != 1 or offs.dtype is not torch.int32 or offs.device != x.device:
        found = f"{offs.dtype} of shape {tuple(offs.shape)} on {offs.device}"
        raise ValueError(f"mxfp8_quantize: offs: wanted int32 [E] on {x.device}, found {found}")


def exports(key: Any) -> str:
    dtype, rounding, swizzled = key
    layout = "Swizzled" if swizzled else "Plain"
    return f"inductor_ext::Mxfp8Quantize{layout}<{steps.CPP_TYPES[dtype]}, inductor_ext::mx::{rounding.capitalize()}>::run"


def bind(module: Any, key: Any) -> Any:
    run = module.run
    if not key[2]:
        return Call(run, "x, out0, out1")
    if not settings.checks_enabled():
        return Call(run, "x, offs, out0, out1")

    def checked(x: torch.Tensor, offs: torch.Tensor | None, out0: torch.Tensor, out1: torch.Tensor) -> None:
        if offs is not None:
            mx.check_offs("mxfp8_quantize", offs, x.shape[0])
        run(x, offs, out0, out1)

    return checked


OP = Op(
    "mxfp8_quantize",
    "e4m3 data and one e8m0 scale for every 32 elements of a row, plain or in tiles for compute capability 10.0",
    reference=reference,
    fake=fake,
    checks=[check],
    kernel=Kernel(
        source="mxfp8_quantize/mxfp8_quantize.cuh",
        key=lambda x, rounding, swizzled: (x.dtype, rounding, swizzled),
        exports=exports,
        bind=bind,
        examples=[(torch.bfloat16, "rceil", False), (torch.bfloat16, "rceil", True), (torch.float32, "floor", True)],
    ),
)
