"""act_mul_quantize: a gated activation and FP8 with a dynamic scale or static ones.

    y     = round(act(gate.float())) * up           each step rounded to gate's dtype, as eager does
    scale = scale_program(max |y|);  out = cast(program(y, scale), dtype)     max over a row or, "tensor", over all
    "mx": scale and out are MXFP8, an e8m0 scale for 32 elements             scale_program is the rounding, program ""
    "static": scale_i = scale_program(scales[i]), out[i] = cast(program(y, scale_i), dtype); no maximum is taken

``act``: "silu" (Llama, Mistral, Qwen, Phi), "gelu" (erf) or "gelu_tanh" (Gemma). gate and up [..., C] of one dtype, bf16, fp16
or fp32, each with one pitch between its rows: two buffers, or the halves of one. Outputs: out [..., C] contiguous, scale
[..., 1], [] or [..., C / 32]. Programs are those of ``kernels/steps.py``, MXFP8 that of ``kernels/mx.py``. Static scales are
those of ``kernels/static_scale.py``: one, none, or N with out [N, ..., C]; scale is [0] then. In every other mode ``scales`` is
empty. C up to 32 768; no columns: ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from inductor_ext.kernels import mx, static_scale, steps
from inductor_ext.kernels.fp8_quantize.op import GRANULARITIES, run_with_one_scale
from inductor_ext.op import Kernel, Op

TORCHAO_SCALE = "div:448.0 f32"
TORCHAO_PROGRAM = "f32 div:scale max:-448.0 min:448.0"
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
CPP_ACTIVATIONS = {"silu": "Silu", "gelu": "Gelu", "gelu_tanh": "GeluTanh"}


def fake(
    gate: torch.Tensor,
    up: torch.Tensor,
    act: str,
    granularity: str,
    scale_program: str,
    program: str,
    dtype: torch.dtype,
    scales: Sequence[torch.Tensor],
) -> Any:
    _check(gate, up, act, granularity, scale_program, program, dtype, scales)
    if granularity == static_scale.GRANULARITY:
        return static_scale.outputs(gate, dtype, scales)
    if granularity == mx.GRANULARITY:
        return gate.new_empty(gate.shape, dtype=dtype), gate.new_empty(mx.scale_shape(gate), dtype=mx.SCALE)
    shape = (*gate.shape[:-1], 1) if granularity == "row" else ()
    scale = gate.new_empty(shape, dtype=steps.result_dtype(scale_program, gate.dtype))
    return gate.new_empty(gate.shape, dtype=dtype), scale


def reference(
    gate: torch.Tensor,
    up: torch.Tensor,
    act: str,
    granularity: str,
    scale_program: str,
    program: str,
    dtype: torch.dtype,
    scales: Sequence[torch.Tensor],
) -> Any:
    _check(gate, up, act, granularity, scale_program, program, dtype, scales)
    if gate.shape[-1] == 0 or (granularity == "tensor" and gate.numel() == 0):
        wanted = "at least one column" if granularity != "tensor" else "at least one element"
        raise ValueError(f"act_mul_quantize: gate: wanted {wanted}, found shape {tuple(gate.shape)}")
    y = ACTIVATIONS[act](gate) * up
    if granularity == mx.GRANULARITY:
        return mx.quantize(y, scale_program)
    if granularity == static_scale.GRANULARITY:
        return static_scale.quantize(y, scale_program, program, dtype, scales)
    amax = y.abs().amax(-1, keepdim=True) if granularity == "row" else y.abs().amax()
    scale = steps.evaluate(scale_program, amax)
    return steps.evaluate(program, y, scale=scale).to(dtype).contiguous(), scale.contiguous()


def _check(
    gate: torch.Tensor,
    up: torch.Tensor,
    act: str,
    granularity: str,
    scale_program: str,
    program: str,
    dtype: torch.dtype,
    scales: Sequence[torch.Tensor],
) -> None:
    if gate.dtype not in steps.TOKEN_OF_DTYPE:
        raise TypeError(f"act_mul_quantize: gate: wanted bfloat16, float16 or float32, found {gate.dtype}")
    if up.shape != gate.shape or up.dtype != gate.dtype or gate.dim() == 0:
        wanted = f"{gate.dtype} of shape {tuple(gate.shape)}, as gate, of at least one dimension"
        raise ValueError(f"act_mul_quantize: up: wanted {wanted}, found {up.dtype} of shape {tuple(up.shape)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act_mul_quantize: act: wanted one of {', '.join(ACTIVATIONS)}, found {act!r}")
    if granularity not in (*GRANULARITIES, mx.GRANULARITY, static_scale.GRANULARITY):
        raise ValueError(f"act_mul_quantize: granularity: wanted row or tensor or mx or static, found {granularity!r}")
    if dtype not in steps.CPP_FP8:
        raise TypeError(f"act_mul_quantize: dtype: wanted float8_e4m3fn or float8_e5m2, found {dtype}")
    static_scale.check("act_mul_quantize", gate, granularity, scale_program, program, scales)
    if granularity == mx.GRANULARITY:
        return mx.check_granularity("act_mul_quantize", gate, scale_program, program, dtype)
    steps.check_program("act_mul_quantize", scale_program, 0)
    steps.check_program("act_mul_quantize", program, 0, scale=True)
    if len(steps.constants(scale_program, program)) > steps.MAX_CONSTS:
        raise ValueError(f"act_mul_quantize: wanted at most {steps.MAX_CONSTS} numbers in both programs together")


def key(gate: Any, up: Any, act: str, granularity: str, scale_program: str, program: str, dtype: Any, scales: Any) -> Any:
    made = gate.dtype, act, granularity, scale_program, program, dtype
    return (*made, static_scale.key(scales)) if granularity == static_scale.GRANULARITY else made


def source(key: Any) -> str:
    return f"act_mul_quantize/{'static_scale' if key[2] == static_scale.GRANULARITY else 'act_mul_quantize'}.cuh"


def exports(key: Any) -> tuple[tuple[str, str], ...]:
    in_dtype, act, granularity, scale_program, program, dtype, *given = key
    kernel = "ActMulQuantize"
    types: tuple[str, ...] = steps.CPP_TYPES[in_dtype], f"inductor_ext::{CPP_ACTIVATIONS[act]}"
    if granularity == static_scale.GRANULARITY:
        kernel += "Static"
        types += static_scale.quantisation_types(in_dtype, scale_program, program, dtype, *given)
    elif granularity == mx.GRANULARITY:
        types += ("true", *mx.quantisation_types(scale_program))
    else:
        rowwise = str(granularity == "row").lower()
        types += (rowwise, *steps.quantisation_types(in_dtype, scale_program, program, dtype))
    return (("run", f"inductor_ext::{kernel}<{', '.join(types)}>::run"),)


def bind(module: Any, key: Any) -> Callable[..., None]:
    run = module.run
    constants = steps.padded_constants(*(() if key[2] == mx.GRANULARITY else key[3:5]))
    rowwise = key[2] != "tensor"

    def call(gate: Any, up: Any, _a: str, _g: str, _s: str, _p: str, _d: Any, _scales: Any, out: Any, scale: Any) -> None:
        operands = (gate, up, out, scale)
        if rowwise:
            run(*operands, None, None, *constants)
        else:
            run_with_one_scale(run, gate, operands, constants)

    def static(gate: Any, up: Any, _a: str, _g: str, _s: str, _p: str, _d: Any, scales: Any, out: Any, _scale: Any) -> None:
        run(gate, up, out, *static_scale.padded(scales), *constants)

    return static if key[2] == static_scale.GRANULARITY else call


def qwen3(_target: str) -> list[Any]:
    """Every kernel that a Qwen3 model quantised by torchao may take."""
    rest = (TORCHAO_SCALE, TORCHAO_PROGRAM, torch.float8_e4m3fn)
    return [(torch.bfloat16, "silu", granularity, *rest) for granularity in GRANULARITIES] + [_STATIC]


_STATIC = (
    torch.bfloat16, "silu", static_scale.GRANULARITY, "", TORCHAO_PROGRAM, torch.float8_e4m3fn, (1, torch.float32),
)  # fmt: skip


OP = Op(
    schema=(
        "act_mul_quantize(Tensor gate, Tensor up, str act, str granularity, str scale_program, str program, "
        "ScalarType dtype, Tensor[] scales) -> (Tensor, Tensor)"
    ),
    doc="a gated activation (SiLU, GELU) and FP8: a row's scale, a tensor's, static ones or MXFP8",
    fake=fake,
    reference=reference,
    kernel=Kernel(
        source=source,
        key=key,
        exports=exports,
        bind=bind,
        examples=(
            (torch.bfloat16, "silu", "row", TORCHAO_SCALE, TORCHAO_PROGRAM, torch.float8_e4m3fn),
            (torch.bfloat16, "gelu_tanh", "row", TORCHAO_SCALE, TORCHAO_PROGRAM, torch.float8_e4m3fn),
            (torch.bfloat16, "silu", "tensor", TORCHAO_SCALE, TORCHAO_PROGRAM, torch.float8_e4m3fn),
            (torch.bfloat16, "silu", mx.GRANULARITY, "rceil", "", mx.DATA),
            _STATIC,
        ),
        presets={"qwen3": qwen3},
    ),
)
