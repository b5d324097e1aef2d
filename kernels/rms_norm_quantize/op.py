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
``kernels/steps.py``, MXFP8 that of ``kernels/mx.py``. Static scales are those of ``kernels/static_scale.py``: one, none, or N
with out [N, ..., C]; scale is [0] then. In every other mode ``scales`` is empty.

Only the mean's order of summation differs from eager: given the same r, every byte is eager's. A row with a NaN or an infinity
becomes NaN as in eager. No columns: ValueError.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from inductor_ext.kernels import mx, static_scale, steps
from inductor_ext.kernels.fp8_quantize.op import GRANULARITIES, run_with_one_scale
from inductor_ext.op import Kernel, Op

NORMS = ("cast mul", "mul cast", "mul+1 cast")
TORCHAO_SCALE = "div:448.0 f32"
TORCHAO_PROGRAM = "f32 div:scale max:-448.0 min:448.0"
CPP_NORMS = {"cast mul": "CastThenWeight", "mul cast": "WeightThenCast", "mul+1 cast": "OnePlusWeightThenCast"}


def fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    norm: str,
    granularity: str,
    scale_program: str,
    program: str,
    dtype: torch.dtype,
    scales: Sequence[torch.Tensor],
) -> Any:
    _check(x, residual, weight, norm, granularity, scale_program, program, dtype, scales)
    out = x.new_empty(x.shape, dtype=dtype)
    if granularity == static_scale.GRANULARITY:
        out, scale = static_scale.outputs(x, dtype, scales)
    elif granularity == mx.GRANULARITY:
        scale = x.new_empty(mx.scale_shape(x), dtype=mx.SCALE)
    else:
        shape = (*x.shape[:-1], 1) if granularity == "row" else ()
        scale = x.new_empty(shape, dtype=steps.result_dtype(scale_program, x.dtype))
    return out, scale, x.new_empty((0,)) if residual is None else x.new_empty(x.shape)


def reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    norm: str,
    granularity: str,
    scale_program: str,
    program: str,
    dtype: torch.dtype,
    scales: Sequence[torch.Tensor],
) -> Any:
    _check(x, residual, weight, norm, granularity, scale_program, program, dtype, scales)
    if x.shape[-1] == 0 or (granularity == "tensor" and x.numel() == 0):
        wanted = "at least one column" if granularity != "tensor" else "at least one element"
        raise ValueError(f"rms_norm_quantize: x: wanted {wanted}, found shape {tuple(x.shape)}")
    total = x if residual is None else x + residual
    y = normalise(total, weight, eps, norm)
    if granularity == mx.GRANULARITY:
        out, scale = mx.quantize(y, scale_program)
    elif granularity == static_scale.GRANULARITY:
        out, scale = static_scale.quantize(y, scale_program, program, dtype, scales)
    else:
        amax = y.abs().amax(-1, keepdim=True) if granularity == "row" else y.abs().amax()
        scale = steps.evaluate(scale_program, amax)
        out = steps.evaluate(program, y, scale=scale).to(dtype).contiguous()
    return out, scale.contiguous(), x.new_empty((0,)) if residual is None else total.contiguous()


def normalise(total: torch.Tensor, weight: torch.Tensor, eps: float, norm: str) -> torch.Tensor:
    """RMSNorm as the models spell it, in PyTorch's operators."""
    h = total.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if norm == "cast mul":
        return (weight * h.to(total.dtype)).to(total.dtype)
    return (h * (1.0 + weight.float() if norm == "mul+1 cast" else weight.float())).to(total.dtype)


def _check(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    norm: str,
    granularity: str,
    scale_program: str,
    program: str,
    dtype: torch.dtype,
    scales: Sequence[torch.Tensor],
) -> None:
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in steps.TOKEN_OF_DTYPE:
            raise TypeError(f"rms_norm_quantize: {name}: wanted bfloat16, float16 or float32, found {tensor.dtype}")
    if norm not in NORMS:
        raise ValueError(f"rms_norm_quantize: norm: wanted one of {', '.join(NORMS)}, found {norm!r}")
    if granularity not in (*GRANULARITIES, mx.GRANULARITY, static_scale.GRANULARITY):
        raise ValueError(f"rms_norm_quantize: granularity: wanted row or tensor or mx or static, found {granularity!r}")
    if dtype not in steps.CPP_FP8:
        raise TypeError(f"rms_norm_quantize: dtype: wanted float8_e4m3fn or float8_e5m2, found {dtype}")
    if x.dim() == 0 or weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        wanted = f"the length of a row of x, {tuple(x.shape)}"
        raise ValueError(f"rms_norm_quantize: weight: wanted {wanted}, found shape {tuple(weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        found = f"{residual.dtype} of shape {tuple(residual.shape)}"
        raise ValueError(f"rms_norm_quantize: residual: wanted {x.dtype} of shape {tuple(x.shape)}, as x, found {found}")
    static_scale.check("rms_norm_quantize", x, granularity, scale_program, program, scales)
    if granularity == mx.GRANULARITY:
        return mx.check_granularity("rms_norm_quantize", x, scale_program, program, dtype)
    steps.check_program("rms_norm_quantize", scale_program, 0)
    steps.check_program("rms_norm_quantize", program, 0, scale=True)
    if len(steps.constants(scale_program, program)) > steps.MAX_CONSTS:
        raise ValueError(f"rms_norm_quantize: wanted at most {steps.MAX_CONSTS} numbers in both programs together")


def key(
    x: Any, residual: Any, weight: Any, eps: float, norm: str, granularity: str, scale_program: str, program: str, dtype: Any,
    scales: Any,
) -> Any:  # fmt: skip
    made = x.dtype, residual is not None, weight.dtype, norm, granularity, scale_program, program, dtype
    return (*made, static_scale.key(scales)) if granularity == static_scale.GRANULARITY else made


def source(key: Any) -> str:
    return f"rms_norm_quantize/{'static_scale' if key[4] == static_scale.GRANULARITY else 'rms_norm_quantize'}.cuh"


def exports(key: Any) -> tuple[tuple[str, str], ...]:
    x_dtype, has_residual, weight_dtype, norm, granularity, scale_program, program, dtype, *given = key
    kernel = "RmsNormQuantize"
    types: tuple[str, ...] = (
        steps.CPP_TYPES[x_dtype],
        steps.CPP_TYPES[weight_dtype],
        str(has_residual).lower(),
        f"inductor_ext::{CPP_NORMS[norm]}",
    )
    if granularity == static_scale.GRANULARITY:
        kernel += "Static"
        types += static_scale.quantisation_types(x_dtype, scale_program, program, dtype, *given)
    elif granularity == mx.GRANULARITY:
        types += ("true", *mx.quantisation_types(scale_program))
    else:
        rowwise = str(granularity == "row").lower()
        types += (rowwise, *steps.quantisation_types(x_dtype, scale_program, program, dtype))
    return (("run", f"inductor_ext::{kernel}<{', '.join(types)}>::run"),)


def bind(module: Any, key: Any) -> Callable[..., None]:
    run = module.run
    constants = steps.padded_constants(*(() if key[4] == mx.GRANULARITY else key[5:7]))
    rowwise = key[4] != "tensor"

    def call(
        x: Any, residual: Any, weight: Any, eps: float, _n: str, _g: str, _s: str, _p: str, _d: Any, _scales: Any,
        out: Any, scale: Any, total: Any,
    ) -> None:  # fmt: skip
        operands = (x, residual, weight, eps, out, scale, total)
        if rowwise:
            run(*operands, None, None, *constants)
        else:
            run_with_one_scale(run, x, operands, constants)

    def static(
        x: Any, residual: Any, weight: Any, eps: float, _n: str, _g: str, _s: str, _p: str, _d: Any, scales: Any,
        out: Any, _scale: Any, total: Any,
    ) -> None:  # fmt: skip
        run(x, residual, weight, eps, out, total, *static_scale.padded(scales), *constants)

    return static if key[4] == static_scale.GRANULARITY else call


def qwen3(_target: str) -> list[Any]:
    """Every kernel that a Qwen3 model quantised by torchao may take; a static scale is a layer's own."""
    kinds = itertools.product((True, False), GRANULARITIES)
    dynamic = [_example(torch.bfloat16, residual, torch.bfloat16, "cast mul", granularity) for residual, granularity in kinds]
    return dynamic + [_static(residual, count) for residual in (True, False) for count in (1, 2, 3)]


def _example(dtype: torch.dtype, residual: bool, weight: torch.dtype, norm: str, granularity: str = "row") -> tuple[Any, ...]:
    return dtype, residual, weight, norm, granularity, TORCHAO_SCALE, TORCHAO_PROGRAM, torch.float8_e4m3fn


def _static(residual: bool, count: int) -> tuple[Any, ...]:
    x = torch.bfloat16, residual, torch.bfloat16, "cast mul"
    return *x, static_scale.GRANULARITY, "", TORCHAO_PROGRAM, torch.float8_e4m3fn, (count, torch.float32)


OP = Op(
    schema=(
        "rms_norm_quantize(Tensor x, Tensor? residual, Tensor weight, float eps, str norm, str granularity, "
        "str scale_program, str program, ScalarType dtype, Tensor[] scales) -> (Tensor, Tensor, Tensor)"
    ),
    doc="RMSNorm, the residual added before it if there is one, and FP8: a row's scale, a tensor's, static ones or MXFP8",
    fake=fake,
    reference=reference,
    kernel=Kernel(
        source=source,
        key=key,
        exports=exports,
        bind=bind,
        examples=(
            _example(torch.bfloat16, True, torch.bfloat16, "cast mul"),
            _example(torch.bfloat16, False, torch.bfloat16, "cast mul"),
            _example(torch.bfloat16, True, torch.float32, "mul+1 cast"),
            _example(torch.bfloat16, True, torch.bfloat16, "cast mul", "tensor"),
            (torch.bfloat16, True, torch.bfloat16, "cast mul", mx.GRANULARITY, "rceil", "", mx.DATA),
            _static(True, 1),
            _static(True, 3),
        ),
        presets={"qwen3": qwen3},
    ),
)
