"""norm_quantize: any RMSNorm or LayerNorm, the residual before it, and FP8 with a dynamic scale or static ones; y too.

    total = x + residual              in x's dtype, an output; "wide" norms the fp32 sum itself, of which total is the rounding
    y     = norm(total)               in x's dtype, with weight, bias, factor and shift: the last output where ``keep`` is set
    scale, out                        as kernels/quantized.py has them: a scale a row, one for all, MXFP8 or static ones

``kind`` is "rms" or "layer", ``norm`` what follows the division by the root: both as ``kernels/norms.py`` has them, with the
word "wide" before it for the fp32 sum. x [..., C] with one pitch between rows, residual alike, weight and bias [C] of one
dtype; factor and shift [..., C] of one dtype, R rows or fewer, each for as many consecutive rows of x; bf16, fp16 or fp32 each.
Outputs: out [..., C] or, for N static scales, [N, ..., C]; scale; total [..., C], or [0] without a residual; y [..., C] or [0].

Only the order of the means' summation differs from eager, and h / sqrt(…) is a product here: given those, every byte is
eager's. A row with a NaN or an infinity becomes NaN as in eager. No columns: ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from inductor_ext.kernels import norms, quantized, steps

#: GPUs on which this has been measured against Inductor's own code. Rules in mode "auto" ask this on a CUDA device.
MEASURED = frozenset({"sm_90a"})
WIDE = "wide"


def _split(norm: str) -> tuple[bool, str]:
    first, _, rest = norm.partition(" ")
    return (True, rest) if first == WIDE else (False, norm)


def reference(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    factor: torch.Tensor | None, shift: torch.Tensor | None, eps: float, kind: str, norm: str, keep: bool, granularity: str,
    scale_program: str, program: str, dtype: torch.dtype, scales: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    quantized.check_not_empty("norm_quantize: x", x, granularity)
    wide, program_of_norm = _split(norm)
    summed = x if residual is None else x.float() + residual.float() if wide else x + residual
    given = {"weight": weight, "bias": bias, "factor": factor, "shift": shift}
    y = norms.normalise(summed, eps, kind, program_of_norm, given, x.dtype)
    out, scale = quantized.quantize(y, granularity, scale_program, program, dtype, scales)
    none = x.new_empty((0,))
    total = none if residual is None else summed.to(x.dtype).contiguous()
    return out.contiguous(), scale.contiguous(), total, y.contiguous() if keep else x.new_empty((0,))


def fake(
    x: torch.Tensor, residual: torch.Tensor | None, keep: bool, granularity: str, scale_program: str, dtype: torch.dtype,
    scales: Any,
) -> Any:  # fmt: skip
    total = x.new_empty((0,) if residual is None else x.shape)
    return *quantized.outputs(x, granularity, scale_program, dtype, scales), total, x.new_empty(x.shape if keep else (0,))


def check(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    factor: torch.Tensor | None, shift: torch.Tensor | None, kind: str, norm: str, granularity: str, scale_program: str,
    program: str, dtype: torch.dtype, scales: Sequence[torch.Tensor],
) -> None:  # fmt: skip
    quantized.check("norm_quantize", "x", x, granularity, scale_program, program, dtype, scales)
    if kind not in norms.KINDS:
        raise ValueError(f"norm_quantize: kind: wanted one of {', '.join(norms.KINDS)}, found {kind!r}")
    wide, program_of_norm = _split(norm)
    if wide and residual is None:
        raise ValueError(f"norm_quantize: norm: wanted a residual for {WIDE}, found None")
    try:
        reads = norms.operands_of(program_of_norm)
    except ValueError as error:
        raise ValueError(f"norm_quantize: norm: {error}") from None
    if x.dim() == 0:
        raise ValueError("norm_quantize: x: wanted at least one dimension, found a 0-d tensor")
    given = {"weight": weight, "bias": bias, "factor": factor, "shift": shift}
    for name, tensor in given.items():
        if (tensor is not None) != (name in reads):
            wanted = "a tensor" if name in reads else "None"
            raise ValueError(f"norm_quantize: {name}: wanted {wanted} for {norm!r}, found {_shown(tensor)}")
        if tensor is None:
            continue
        if tensor.dtype not in steps.TOKEN_OF_DTYPE:
            raise TypeError(f"norm_quantize: {name}: wanted bfloat16, float16 or float32, found {tensor.dtype}")
        vector = name in ("weight", "bias")
        if tensor.dim() == 0 or tensor.shape[-1] != x.shape[-1] or (vector and tensor.dim() != 1):
            wanted = f"{'a row' if vector else 'rows'} of {x.shape[-1]} columns, as x has"
            raise ValueError(f"norm_quantize: {name}: wanted {wanted}, found shape {tuple(tensor.shape)}")
    for one, two in (("weight", "bias"), ("factor", "shift")):
        a, b = given[one], given[two]
        if a is not None and b is not None and a.dtype is not b.dtype:
            raise TypeError(f"norm_quantize: {two}: wanted {a.dtype}, as {one}, found {b.dtype}")
    _check_samples(x, factor, shift)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        found = f"{residual.dtype} of shape {tuple(residual.shape)}"
        raise ValueError(f"norm_quantize: residual: wanted {x.dtype} of shape {tuple(x.shape)}, as x, found {found}")


def _check_samples(x: torch.Tensor, factor: torch.Tensor | None, shift: torch.Tensor | None) -> None:
    """ValueError where rows of factor and shift are not each for as many rows of x; symbolic sizes are the rule's."""
    for name, tensor in (("factor", factor), ("shift", shift)):
        if tensor is None:
            continue
        rows, samples = math.prod(x.shape[:-1]), math.prod(tensor.shape[:-1])  # torch.Size.numel() makes numbers of symbols
        both = isinstance(rows, int) and isinstance(samples, int)
        if both and (samples == 0 or rows % samples):
            wanted = f"a row for as many of the {rows} rows of x each"
            raise ValueError(f"norm_quantize: {name}: wanted {wanted}, found shape {tuple(tensor.shape)}")
    if factor is None or shift is None:
        return
    rows, samples = math.prod(factor.shape[:-1]), math.prod(shift.shape[:-1])
    if isinstance(rows, int) and isinstance(samples, int) and rows != samples:
        wanted = f"as many rows as factor, {tuple(factor.shape)}"
        raise ValueError(f"norm_quantize: shift: wanted {wanted}, found shape {tuple(shift.shape)}")


def _shown(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def types(
    x: torch.dtype, residual: bool, weight: torch.dtype | None, factor: torch.dtype | None, kind: str, norm: str, keep: bool
) -> tuple[str, ...]:
    wide, program = _split(norm)
    summed = "None" if not residual else "Wide" if wide else "Rounded"
    return (norms.row_type(x, summed, kind, program, weight, factor, keep),)


def _dtype_of(one: str, two: str) -> str:
    """The dtype of two operands, whichever is there, as an expression; None for none."""
    return f"{one}.dtype if {one} is not None else {two}.dtype if {two} is not None else None"


def _bf16(kind: str, norm: str, *, residual: bool = False, keep: bool = False) -> tuple[Any, ...]:
    """The begin of a key for bf16 everywhere."""
    reads = norms.operands_of(_split(norm)[1])
    pairs = ("weight", "bias"), ("factor", "shift")
    dtypes = (torch.bfloat16 if any(each in reads for each in pair) else None for pair in pairs)
    return torch.bfloat16, residual, *dtypes, kind, norm, keep


OP = quantized.producer(
    "norm_quantize",
    "any RMSNorm or LayerNorm, the residual before it, and FP8: a row's scale, a tensor's, static ones or MXFP8; y too",
    reference=reference,
    check=check,
    fake=fake,
    operands="x, residual, weight, bias, factor, shift, eps",
    compiled=f"x.dtype, residual is not None, {_dtype_of('weight', 'bias')}, {_dtype_of('factor', 'shift')}, kind, norm, keep",
    types=types,
    outs="out2, out3",
    examples=[
        (*_bf16("layer", "mul add cast"), *quantized.dynamic("row")),
        (*_bf16("layer", "mul add cast", residual=True), *quantized.dynamic("row")),
        (*_bf16("layer", "mul cast"), *quantized.dynamic("row")),
        (*_bf16("layer", "cast factor+1r cast shift"), *quantized.dynamic("row")),
        (*_bf16("rms", "wide cast mul", residual=True), *quantized.dynamic("row")),
        (*_bf16("rms", "cast mul", residual=True, keep=True), *quantized.dynamic("row")),
        (*_bf16("layer", "mul add cast"), *quantized.static(1)),
    ],
)
