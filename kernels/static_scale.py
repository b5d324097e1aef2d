"""Scales that are known before the data: a granularity, "static", of the ops that quantise what they compute.

    scale_i = scale_program(scales[i])            one element each, fp32, bf16 or fp16, on the device
    out[i]  = cast(program(y, scale_i), dtype)

One scale, or none where ``program`` holds it as a number: out [..., C]. Several, since each of q, k and v may have been
calibrated by itself: out [N, ..., C], one FP8 tensor a scale, of y computed once. Programs are those of ``kernels/steps.py``.
Scales are inputs here, so the ops' second output is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from inductor_ext.kernels import steps

GRANULARITY = "static"
MAX_SCALES = 4  # q, k, v and one more


def check(
    name: str, x: torch.Tensor, granularity: str, scale_program: str, program: str, scales: Sequence[torch.Tensor]
) -> None:
    """The error of an op's arguments about static scales, if there is one: none where it has none. ``x`` is on its device."""
    if granularity != GRANULARITY:
        if scales:
            raise ValueError(f"{name}: scales: wanted none where the scale is that of {granularity!r}, found {len(scales)}")
        return
    if len(scales) > MAX_SCALES:
        raise ValueError(f"{name}: scales: wanted at most {MAX_SCALES}, found {len(scales)}")
    for scale in scales:
        if scale.dtype not in steps.TOKEN_OF_DTYPE:
            raise TypeError(f"{name}: scales: wanted bfloat16, float16 or float32, found {scale.dtype}")
        if scale.dtype is not scales[0].dtype:
            raise TypeError(f"{name}: scales: wanted one dtype, found {scales[0].dtype} and {scale.dtype}")
        if any(size != 1 for size in scale.shape):
            raise ValueError(f"{name}: scales: wanted one element each, found shape {tuple(scale.shape)}")
        if scale.device != x.device:
            raise ValueError(f"{name}: scales: wanted tensors on {x.device}, found one on {scale.device}")
    steps.check_program(f"{name}: scale_program", scale_program, 0)
    if not scales and (scale_program or any(step.operand == "scale" for step in steps.parse(program))):
        raise ValueError(f"{name}: scales: wanted one for {program!r} and {scale_program!r}, found none")
    steps.check_program(f"{name}: program", program, 0, made=(steps.SCALE,))


def outputs(x: torch.Tensor, dtype: torch.dtype, scales: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """New, empty outputs for a y like ``x``: out, and the scale that is not written."""
    several = (len(scales),) if len(scales) > 1 else ()
    return x.new_empty((*several, *x.shape), dtype=dtype), x.new_empty((0,), dtype=torch.float32)


def quantize(
    y: torch.Tensor, scale_program: str, program: str, dtype: torch.dtype, scales: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those outputs in PyTorch's operators. 0-d scales: converts are written in the program, and nothing else promotes."""
    out, scale = outputs(y, dtype, scales)
    if not scales:
        return out.copy_(steps.evaluate(program, y).to(dtype)), scale
    for place, given in zip(out if len(scales) > 1 else (out,), scales, strict=True):
        place.copy_(steps.evaluate(program, y, scale=steps.evaluate(scale_program, given.reshape(()))).to(dtype))
    return out, scale


def key(scales: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What is compiled in: how many, and of which dtype."""
    return (len(scales), scales[0].dtype) if scales else (0, torch.float32)


def quantisation_types(dtype: torch.dtype, scale_program: str, program: str, fp8: torch.dtype, given: Any) -> tuple[str, ...]:
    """The C++ template arguments Fp8, Saturated, Program and Scales (``downcast_row.cuh``), with ``given`` of `key`."""
    count, scale_dtype = given
    numbers = len(steps.constants(scale_program))
    return (
        steps.CPP_FP8[fp8],
        str(steps.saturated(program, fp8)).lower(),
        steps.to_cpp(program, dtype, first_const=numbers, fp8=fp8, scale=steps.result_dtype(scale_program, scale_dtype)),
        f"inductor_ext::StaticScales<{count}, {steps.CPP_TYPES[scale_dtype]}, {steps.to_cpp(scale_program, scale_dtype)}>",
    )
