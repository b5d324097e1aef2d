"""fp8_quantize: FP8 with a dynamic scale, the scale being the second output.

    amax  = max |x|  over the last dimension ("row") or over everything ("tensor"), NaN propagates
    scale = scale_program(amax)                                 row: x.shape[:-1] + (1,); tensor: 0-d
    out   = cast(program(x, scale, amax), dtype)                x's shape

A group of 128 is "row" on ``x.view(..., K // 128, 128)``. Both programs are those of ``kernels/steps.py``; ``program`` names
``scale``, or ``amax`` where x is scaled by something else than the scale that is written. torchao's row-wise recipe, which
takes ``amax / 448`` in bf16, is ``scale_program="div:448.0 f32"``, ``program="f32 div:scale max:-448.0 min:448.0"``. Bit-exact:
a maximum does not depend on the order it is taken in.
Row: one pass up to 16 384 columns; tensor: one launch that keeps x on the chip, or two.
``bound``, one fp32 element, is what both programs call ``s0``: ``"f32 min:s0 div:448.0"`` bounds the maximum by it.
An empty row, or an empty tensor, has no maximum: ValueError.
"""

from __future__ import annotations

from typing import Any

import torch

from inductor_ext.kernels import quantized, steps
from inductor_ext.kernels.quantized import GRANULARITIES, WORKSPACE_FLOATS
from inductor_ext.kernels.quantized import TORCHAO_PROGRAM as TORCHAO_PROGRAM
from inductor_ext.kernels.quantized import TORCHAO_SCALE as TORCHAO_SCALE
from inductor_ext.op import Kernel, Op
from inductor_ext.signature import Call


def reference(
    x: torch.Tensor, granularity: str, scale_program: str, program: str, dtype: torch.dtype, bound: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    if x.numel() == 0 and (granularity == "tensor" or x.shape[-1] == 0):
        raise ValueError(f"fp8_quantize: x: wanted at least one element in what is reduced, found shape {tuple(x.shape)}")
    return quantized.quantize(x, granularity, scale_program, program, dtype, _given(bound))


def fake(x: torch.Tensor, granularity: str, scale_program: str, dtype: torch.dtype) -> Any:
    return torch.empty_like(x, dtype=dtype), quantized.outputs(x, granularity, scale_program, dtype, ())[1]


def _given(bound: torch.Tensor | None) -> list[torch.Tensor]:
    return [] if bound is None else [bound]


def check(
    x: torch.Tensor, granularity: str, scale_program: str, program: str, dtype: torch.dtype, bound: torch.Tensor | None
) -> None:
    if x.dtype not in steps.TOKEN_OF_DTYPE:
        raise TypeError(f"fp8_quantize: x: wanted bfloat16, float16 or float32, found {x.dtype}")
    if dtype not in steps.CPP_FP8:
        raise TypeError(f"fp8_quantize: dtype: wanted float8_e4m3fn or float8_e5m2, found {dtype}")
    if granularity not in GRANULARITIES or (granularity == "row" and x.dim() == 0):
        raise ValueError(f"fp8_quantize: granularity: wanted row (of at least one dimension) or tensor, found {granularity!r}")
    quantized.check_programs("fp8_quantize", scale_program, program, x, "bound", _given(bound))


def exports(key: Any) -> str:
    x_dtype, granularity, scale_program, program, dtype = key
    types = steps.CPP_TYPES[x_dtype], *steps.quantisation_types(x_dtype, scale_program, program, dtype)
    return f"inductor_ext::Fp8Quantize{granularity.capitalize()}<{', '.join(types)}>::run"


def bind(module: Any, key: Any) -> Any:
    run, constants = module.run, steps.padded_constants(*key[2:4])
    if key[1] == "row":
        return Call(run, "x, out0, out1, bound, *constants", constants=constants)

    def tensor(x: torch.Tensor, bound: torch.Tensor | None, out0: torch.Tensor, out1: torch.Tensor) -> None:
        run(x, out0, out1, x.new_empty(WORKSPACE_FLOATS, dtype=torch.float32), bound, *constants)

    return tensor


OP = Op(
    "fp8_quantize",
    "amax, scale, clamp and cast to FP8 with a dynamic scale a row, a group or a tensor",
    reference=reference,
    fake=fake,
    checks=[check],
    kernel=Kernel(
        source="fp8_quantize/fp8_quantize.cuh",
        key=lambda x, granularity, scale_program, program, dtype: (x.dtype, granularity, scale_program, program, dtype),
        exports=exports,
        bind=bind,
        examples=[(torch.bfloat16, *quantized.dynamic(granularity)) for granularity in GRANULARITIES],
    ),
)
