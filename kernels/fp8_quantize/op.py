"""fp8_quantize: FP8 with a dynamic scale, the scale being the second output.

    amax  = max |x|  over the last dimension ("row") or over everything ("tensor"), NaN propagates
    scale = scale_program(amax)                                 row: x.shape[:-1] + (1,); tensor: 0-d
    out   = cast(program(x, scale), dtype)                      x's shape

A group of 128 is "row" on ``x.view(..., K // 128, 128)``. Both programs are those of ``kernels/steps.py``; ``program`` names
the scale ``scale``. torchao's row-wise recipe, which takes ``amax / 448`` in bf16, is ``scale_program="div:448.0 f32"``,
``program="f32 div:scale max:-448.0 min:448.0"``. Bit-exact: a maximum does not depend on the order it is taken in.
Row: one pass up to 16 384 columns; tensor: one launch that keeps x on the chip, or two.
An empty row, or an empty tensor, has no maximum: ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from inductor_ext.kernels import steps
from inductor_ext.op import Kernel, Op

GRANULARITIES = ("row", "tensor")
TORCHAO_SCALE = "div:448.0 f32"
TORCHAO_PROGRAM = "f32 div:scale max:-448.0 min:448.0"
WORKSPACE_FLOATS = 1024  # partial maxima, one a CTA


def run_with_one_scale(
    run: Callable[..., bool], x: torch.Tensor, operands: tuple[Any, ...], constants: Sequence[float]
) -> None:
    """Runs a kernel that computes y like ``x`` and quantises it with one scale; with y's memory, if it asks for that."""
    partial = x.new_empty(WORKSPACE_FLOATS, dtype=torch.float32)
    if run(*operands, None, partial, *constants):
        run(*operands, x.new_empty(x.shape), partial, *constants)


def fake(x: torch.Tensor, granularity: str, scale_program: str, program: str, dtype: torch.dtype) -> Any:
    _check(x, granularity, scale_program, program, dtype)
    shape = (*x.shape[:-1], 1) if granularity == "row" else ()
    scale = x.new_empty(shape, dtype=steps.result_dtype(scale_program, x.dtype))
    return torch.empty_like(x, dtype=dtype), scale


def reference(x: torch.Tensor, granularity: str, scale_program: str, program: str, dtype: torch.dtype) -> Any:
    _check(x, granularity, scale_program, program, dtype)
    if x.numel() == 0 and (granularity == "tensor" or x.shape[-1] == 0):
        raise ValueError(f"fp8_quantize: x: wanted at least one element in what is reduced, found shape {tuple(x.shape)}")
    amax = x.abs().amax(-1, keepdim=True) if granularity == "row" else x.abs().amax()
    scale = steps.evaluate(scale_program, amax)
    return steps.evaluate(program, x, scale=scale).to(dtype), scale


def _check(x: torch.Tensor, granularity: str, scale_program: str, program: str, dtype: torch.dtype) -> None:
    if x.dtype not in steps.TOKEN_OF_DTYPE:
        raise TypeError(f"fp8_quantize: x: wanted bfloat16, float16 or float32, found {x.dtype}")
    if dtype not in steps.CPP_FP8:
        raise TypeError(f"fp8_quantize: dtype: wanted float8_e4m3fn or float8_e5m2, found {dtype}")
    if granularity not in GRANULARITIES or (granularity == "row" and x.dim() == 0):
        raise ValueError(f"fp8_quantize: granularity: wanted row (of at least one dimension) or tensor, found {granularity!r}")
    steps.check_program("fp8_quantize", scale_program, 0)
    steps.check_program("fp8_quantize", program, 0, scale=True)
    if len(steps.constants(scale_program, program)) > steps.MAX_CONSTS:
        raise ValueError(f"fp8_quantize: wanted at most {steps.MAX_CONSTS} numbers in both programs together")


def key(x: torch.Tensor, granularity: str, scale_program: str, program: str, dtype: torch.dtype) -> Any:
    return x.dtype, granularity, scale_program, program, dtype


def exports(key: Any) -> tuple[tuple[str, str], ...]:
    x_dtype, granularity, scale_program, program, dtype = key
    types = ", ".join(
        (steps.CPP_TYPES[x_dtype], *steps.quantisation_types(x_dtype, scale_program, program, dtype))
    )
    return (("run", f"inductor_ext::Fp8Quantize{granularity.capitalize()}<{types}>::run"),)


def bind(module: Any, key: Any) -> Callable[..., None]:
    run = module.run
    _, granularity, scale_program, program, _ = key
    constants = steps.padded_constants(scale_program, program)
    if granularity == "row":

        def row(x: Any, _g: str, _s: str, _p: str, _d: Any, out: Any, scale: Any) -> None:
            run(x, out, scale, *constants)

        return row

    def tensor(x: Any, _g: str, _s: str, _p: str, _d: Any, out: Any, scale: Any) -> None:
        run(x, out, scale, x.new_empty(WORKSPACE_FLOATS, dtype=torch.float32), *constants)

    return tensor


OP = Op(
    schema="fp8_quantize(Tensor x, str granularity, str scale_program, str program, ScalarType dtype) -> (Tensor, Tensor)",
    doc="amax, scale, clamp and cast to FP8 with a dynamic scale a row, a group or a tensor",
    fake=fake,
    reference=reference,
    kernel=Kernel(
        source="fp8_quantize/fp8_quantize.cuh",
        key=key,
        exports=exports,
        bind=bind,
        examples=tuple(
            (torch.bfloat16, granularity, TORCHAO_SCALE, TORCHAO_PROGRAM, torch.float8_e4m3fn) for granularity in GRANULARITIES
        ),
    ),
)
