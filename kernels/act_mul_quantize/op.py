"""act_mul_quantize: a gated activation and FP8 with a dynamic scale or static ones.

    y     = round(act(gate.float())) * up           each step rounded to gate's dtype, as eager does
    scale = scale_program(max |y|);  out = cast(program(y, scale), dtype)     max over a row or, "tensor", over all
    "mx": scale and out are MXFP8, an e8m0 scale for 32 elements             scale_program is the rounding, program ""
    "static": scale_i = scale_program(scales[i]), out[i] = cast(program(y, scale_i), dtype); no maximum is taken

``act``: "silu" (Llama, Mistral, Qwen, Phi), "gelu" (erf) or "gelu_tanh" (Gemma). gate and up [..., C] of one dtype, bf16, fp16
or fp32, each with one pitch between its rows: two buffers, or the halves of one. Outputs: out [..., C] contiguous, scale
[..., 1], [] or [..., C / 32]. Programs are those of ``kernels/steps.py``, MXFP8 that of ``moe/mx.py``. Static scales are
those of ``kernels/static_scale.py``: one, none, or N with out [N, ..., C]; scale is [0] then. With a dynamic scale ``scales``
has what bounds it, if that is a tensor (``kernels/quantized.py``). C up to 32 768; no columns: ValueError. The kernel is
act_quantize's, the op for every other form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from inductor_ext.kernels import quantized, steps
from inductor_ext.kernels.quantized import TORCHAO_PROGRAM as TORCHAO_PROGRAM
from inductor_ext.kernels.quantized import TORCHAO_SCALE as TORCHAO_SCALE
from inductor_ext.signature import Call

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
CPP_ACTIVATIONS = {"silu": "Silu", "gelu": "Gelu", "gelu_tanh": "GeluTanh"}


def reference(
    gate: torch.Tensor, up: torch.Tensor, act: str, granularity: str, scale_program: str, program: str, dtype: torch.dtype,
    scales: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    quantized.check_not_empty("act_mul_quantize: gate", gate, granularity)
    out, scale = quantized.quantize(ACTIVATIONS[act](gate) * up, granularity, scale_program, program, dtype, scales)
    return out.contiguous(), scale.contiguous()


def check(
    gate: torch.Tensor, up: torch.Tensor, act: str, granularity: str, scale_program: str, program: str, dtype: torch.dtype,
    scales: Sequence[torch.Tensor],
) -> None:  # fmt: skip
    quantized.check("act_mul_quantize", "gate", gate, granularity, scale_program, program, dtype, scales)
    if up.shape != gate.shape or up.dtype != gate.dtype or gate.dim() == 0:
        wanted = f"{gate.dtype} of shape {tuple(gate.shape)}, as gate, of at least one dimension"
        raise ValueError(f"act_mul_quantize: up: wanted {wanted}, found {up.dtype} of shape {tuple(up.shape)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act_mul_quantize: act: wanted one of {', '.join(ACTIVATIONS)}, found {act!r}")


def types(gate: torch.dtype, act: str) -> tuple[str, ...]:
    form = f"inductor_ext::Gated<inductor_ext::{CPP_ACTIVATIONS[act]}>"
    return (f"inductor_ext::ActRow<{steps.CPP_TYPES[gate]}, {form}, inductor_ext::Inputs::kTwo>",)


SILU, GELU_TANH = (torch.bfloat16, "silu"), (torch.bfloat16, "gelu_tanh")
OP = quantized.producer(
    "act_mul_quantize",
    "a gated activation (SiLU, GELU) and FP8: a row's scale, a tensor's, static ones or MXFP8",
    reference=reference,
    check=check,
    fake=Call(quantized.outputs, "gate, granularity, scale_program, dtype, scales"),
    operands="gate, up",
    compiled="gate.dtype, act",
    types=types,
    kernel="act_quantize",
    examples=[
        (*SILU, *quantized.dynamic("row")),
        (*GELU_TANH, *quantized.dynamic("row")),
        (*SILU, *quantized.dynamic("tensor")),
        (*SILU, *quantized.mxfp8()),
        (*SILU, *quantized.static(1)),
    ],
    qwen3=[(*SILU, *each) for each in (*map(quantized.dynamic, quantized.GRANULARITIES), quantized.static(1))],
)
