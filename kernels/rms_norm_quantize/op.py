"""rms_norm_quantize: RMSNorm, with or without the residual added before it, and FP8 with a dynamic scale or static ones.

    total = x + residual                      in x's dtype, the third output; x itself without a residual
    h     = total.float();  r = rsqrt(mean(h²) + eps)        over the last dimension
    y     = norm(h * r, weight)               rounded to x's dtype, as `NORMS` says
    scale = scale_program(max |y|);  out = cast(program(y, scale), dtype)     max over a row or, "tensor", over all
    "mx": scale and out are MXFP8, an e8m0 scale for 32 elements             scale_program is the rounding, program ""
    "static": scale_i = scale_program(scales[i]), out[i] = cast(program(y, scale_i), dtype); no maximum is taken

``norm`` names what models do with the weight: ``"cast mul"`` rounds before it multiplies (Llama, Mistral, Qwen, Phi),
``"mul cast"`` multiplies in fp32 (``torch.nn.functional.rms_norm``, OLMo 2), ``"mul+1 cast"`` by 1 + weight in fp32 (Gemma).

x [..., C] with one pitch between rows, residual alike, weight [C]; bf16, fp16 or fp32 each. Outputs: out [..., C] contiguous,
scale [..., 1], [] or [..., C / 32], total [..., C] contiguous, or [0] without a residual. Programs are those of
``kernels/steps.py``, MXFP8 that of ``moe/mx.py``. Static scales are those of ``kernels/static_scale.py``: one, none, or N
with out [N, ..., C]; scale is [0] then. With a dynamic scale ``scales`` has what bounds it, if that is a tensor
(``kernels/quantized.py``).

Only the mean's order of summation differs from eager: given the same r, every byte is eager's. A row with a NaN or an infinity
becomes NaN as in eager. No columns: ValueError. The kernel is norm_quantize's, the op for every other norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from inductor_ext.kernels import norms, quantized, steps
from inductor_ext.kernels.norms import CPP_NORMS as CPP_NORMS
from inductor_ext.kernels.quantized import GRANULARITIES
from inductor_ext.kernels.quantized import TORCHAO_PROGRAM as TORCHAO_PROGRAM
from inductor_ext.kernels.quantized import TORCHAO_SCALE as TORCHAO_SCALE

NORMS = tuple(CPP_NORMS)


def reference(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, norm: str, granularity: str,
    scale_program: str, program: str, dtype: torch.dtype, scales: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    quantized.check_not_empty("rms_norm_quantize: x", x, granularity)
    total = x if residual is None else x + residual
    y = normalise(total, weight, eps, norm)
    out, scale = quantized.quantize(y, granularity, scale_program, program, dtype, scales)
    return out.contiguous(), scale.contiguous(), x.new_empty((0,)) if residual is None else total.contiguous()


def normalise(total: torch.Tensor, weight: torch.Tensor, eps: float, norm: str) -> torch.Tensor:
    """RMSNorm as the models spell it, in PyTorch's operators."""
    return norms.normalise(total, eps, "rms", norm, {"weight": weight}, total.dtype)


def fake(
    x: torch.Tensor, residual: torch.Tensor | None, granularity: str, scale_program: str, dtype: torch.dtype, scales: Any
) -> Any:
    total = x.new_empty((0,) if residual is None else x.shape)
    return *quantized.outputs(x, granularity, scale_program, dtype, scales), total


def check(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, norm: str, granularity: str, scale_program: str,
    program: str, dtype: torch.dtype, scales: Sequence[torch.Tensor],
) -> None:  # fmt: skip
    quantized.check("rms_norm_quantize", "x", x, granularity, scale_program, program, dtype, scales)
    if weight.dtype not in steps.TOKEN_OF_DTYPE:
        raise TypeError(f"rms_norm_quantize: weight: wanted bfloat16, float16 or float32, found {weight.dtype}")
    if norm not in NORMS:
        raise ValueError(f"rms_norm_quantize: norm: wanted one of {', '.join(NORMS)}, found {norm!r}")
    if x.dim() == 0 or weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        wanted = f"the length of a row of x, {tuple(x.shape)}"
        raise ValueError(f"rms_norm_quantize: weight: wanted {wanted}, found shape {tuple(weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        found = f"{residual.dtype} of shape {tuple(residual.shape)}"
        raise ValueError(f"rms_norm_quantize: residual: wanted {x.dtype} of shape {tuple(x.shape)}, as x, found {found}")


def types(x: torch.dtype, residual: bool, weight: torch.dtype, norm: str) -> tuple[str, ...]:
    return (norms.row_type(x, "Rounded" if residual else "None", "rms", norm, weight, None, keep=False),)


def _bf16(residual: bool, *quantisation: Any, weight: torch.dtype = torch.bfloat16, norm: str = "cast mul") -> tuple[Any, ...]:
    return torch.bfloat16, residual, weight, norm, *quantisation


OP = quantized.producer(
    "rms_norm_quantize",
    "RMSNorm, the residual added before it if there is one, and FP8: a row's scale, a tensor's, static ones or MXFP8",
    reference=reference,
    check=check,
    fake=fake,
    operands="x, residual, weight, None, None, None, eps",
    compiled="x.dtype, residual is not None, weight.dtype, norm",
    types=types,
    outs="out2, None",
    kernel="norm_quantize",
    examples=[
        _bf16(True, *quantized.dynamic("row")),
        _bf16(False, *quantized.dynamic("row")),
        _bf16(True, *quantized.dynamic("row"), weight=torch.float32, norm="mul+1 cast"),
        _bf16(True, *quantized.dynamic("tensor")),
        _bf16(True, *quantized.mxfp8()),
        _bf16(True, *quantized.static(1)),
        _bf16(True, *quantized.static(3)),
    ],
    # Every kernel that a Qwen3 model quantised by torchao may take; a static scale is a layer's own.
    qwen3=[
        _bf16(residual, *quantisation)
        for residual in (True, False)
        for quantisation in (*map(quantized.dynamic, GRANULARITIES), *map(quantized.static, (1, 2, 3)))
    ],
)
