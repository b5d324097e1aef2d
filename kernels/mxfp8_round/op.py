"""mxfp8_round: the numbers that are left of x in MXFP8, as x's own dtype.

    out = data · 2^(scale - 127)        data, scale = mxfp8_quantize(x, None, rounding, False)

x [T, K] or [E, N, K], bf16, fp16 or fp32, K a multiple of 32. In bf16 and fp32 exact, within their range. It is how a graph
says that a product takes quantised activations: the rule ``mxfp8_grouped_mm`` replaces it by the quantisation, and nothing
computes the rounded tensor. One node, since Inductor has no code for e8m0. On a GPU it is mxfp8_quantize, and then PyTorch.
"""

from __future__ import annotations

import torch

from inductor_ext.kernels.mxfp8_quantize.op import OP as QUANTIZE
from inductor_ext.kernels.mxfp8_quantize.op import check
from inductor_ext.moe.mx import dequantize
from inductor_ext.op import Op


def reference(x: torch.Tensor, rounding: str) -> torch.Tensor:
    data, scales = QUANTIZE.packet(x, None, rounding, False)
    return dequantize(data, scales, x.dtype)


OP = Op(
    "mxfp8_round",
    "x rounded to what MXFP8 holds of it, in its own dtype",
    reference=reference,
    fake=lambda x: x.new_empty(x.shape),
    checks=[lambda x, rounding: check(x, None, rounding)],
)
