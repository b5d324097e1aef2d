"""act_quantize: an activation in any of the forms that models write, gated or not, and FP8 with a dynamic scale or static ones.

    y = FORMS[form](gate, up)       rounded as eager does, or once: "fp32 silu" is (silu(gate.float()) * up.float()).to(dtype)
    scale, out                      as kernels/quantized.py has them: a scale a row, one for all, MXFP8 or static ones

A form without up reads gate alone; with ``pairs`` gate is [..., 2C], its even columns the gate and its odd ones up.
gate and up [..., C] of one dtype, bf16, fp16 or fp32, each with one pitch between its rows. Outputs: out [..., C] contiguous
or, for N static scales, [N, ..., C], and scale. C up to 32 768; no columns: ValueError.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from inductor_ext.kernels import quantized, steps
from inductor_ext.kernels.act_mul_quantize.op import ACTIVATIONS, CPP_ACTIVATIONS
from inductor_ext.signature import Call

#: GPUs on which this has been measured against Inductor's own code. Rules in mode "auto" ask this on a CUDA device.
MEASURED = frozenset({"sm_90a"})


@dataclasses.dataclass(frozen=True)
class Form:
    """``fn`` of gate, and of up where ``inputs`` is 2; ``cpp`` is its type in include/inductor_ext/activation.cuh."""

    fn: Callable[..., torch.Tensor]
    inputs: int
    cpp: str


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _clamped_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """transformers' GptOssExperts, alpha 1.702 and limit 7."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def _in_fp32(act: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda gate, up: (act(gate.float()) * up.float()).to(gate.dtype)


def _gated(act: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda gate, up: act(gate) * up


_ALONE = {**ACTIVATIONS, "quick_gelu": _quick_gelu, "relu_squared": lambda x: torch.relu(x).square()}
_CPP = {**CPP_ACTIVATIONS, "quick_gelu": "QuickGelu", "relu_squared": "ReluSquared"}

FORMS: dict[str, Form] = {
    **{name: Form(act, 1, f"Alone<inductor_ext::{_CPP[name]}>") for name, act in _ALONE.items()},
    **{f"{name} mul": Form(_gated(_ALONE[name]), 2, f"Gated<inductor_ext::{_CPP[name]}>") for name in _ALONE},
    **{
        f"fp32 {name} mul": Form(_in_fp32(act), 2, f"GatedInFp32<inductor_ext::{_CPP[name]}>")
        for name, act in ACTIVATIONS.items()
    },
    "clamped_swiglu": Form(_clamped_swiglu, 2, "ClampedSwiglu"),
}


def inputs_of(gate: torch.Tensor, up: torch.Tensor | None, pairs: bool) -> tuple[torch.Tensor, ...]:
    """What a form is called with."""
    if pairs:
        return gate[..., ::2], gate[..., 1::2]
    return (gate,) if up is None else (gate, up)


def reference(
    gate: torch.Tensor, up: torch.Tensor | None, form: str, pairs: bool, granularity: str, scale_program: str, program: str,
    dtype: torch.dtype, scales: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    y = FORMS[form].fn(*inputs_of(gate, up, pairs))
    quantized.check_not_empty("act_quantize: gate", y, granularity)
    out, scale = quantized.quantize(y, granularity, scale_program, program, dtype, scales)
    return out.contiguous(), scale.contiguous()


def fake(
    gate: torch.Tensor, pairs: bool, granularity: str, scale_program: str, dtype: torch.dtype, scales: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantized.outputs(gate[..., ::2] if pairs else gate, granularity, scale_program, dtype, scales)


def check(
    gate: torch.Tensor, up: torch.Tensor | None, form: str, pairs: bool, granularity: str, scale_program: str, program: str,
    dtype: torch.dtype, scales: Sequence[torch.Tensor],
) -> None:  # fmt: skip
    y = gate[..., ::2] if pairs and gate.dim() > 0 else gate
    quantized.check("act_quantize", "gate", y, granularity, scale_program, program, dtype, scales)
    check_inputs("act_quantize", gate, up, form, pairs)


def check_inputs(op: str, gate: torch.Tensor, up: torch.Tensor | None, form: str, pairs: bool) -> None:
    """The error of ``op``, if there is one, in what it activates."""
    if gate.dim() == 0:
        raise ValueError(f"{op}: gate: wanted at least one dimension, found a 0-d tensor")
    if pairs and gate.shape[-1] % 2 != 0:
        raise ValueError(f"{op}: gate: wanted pairs of columns, found shape {tuple(gate.shape)}")
    if form not in FORMS:
        raise ValueError(f"{op}: form: wanted one of {', '.join(FORMS)}, found {form!r}")
    if pairs and FORMS[form].inputs != 2:
        raise ValueError(f"{op}: pairs: wanted a form of gate and up, found {form!r}")
    if (up is not None) != (FORMS[form].inputs == 2 and not pairs):
        wanted = "None" if up is not None else "a tensor"
        raise ValueError(f"{op}: up: wanted {wanted} for {form!r}, found {'a tensor' if up is not None else 'None'}")
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        wanted = f"{gate.dtype} of shape {tuple(gate.shape)}, as gate"
        raise ValueError(f"{op}: up: wanted {wanted}, found {up.dtype} of shape {tuple(up.shape)}")


def types(gate: torch.dtype, form: str, pairs: bool) -> tuple[str, ...]:
    inputs = "kPairs" if pairs else ("kOne", "kTwo")[FORMS[form].inputs - 1]
    return (f"inductor_ext::ActRow<{steps.CPP_TYPES[gate]}, inductor_ext::{FORMS[form].cpp}, inductor_ext::Inputs::{inputs}>",)


def _bf16(form: str, *quantisation: Any, pairs: bool = False) -> tuple[Any, ...]:
    return torch.bfloat16, form, pairs, *quantisation


OP = quantized.producer(
    "act_quantize",
    "an activation, gated or not, in any form, and FP8: a row's scale, a tensor's, static ones or MXFP8",
    reference=reference,
    check=check,
    fake=Call(fake, "gate, pairs, granularity, scale_program, dtype, scales"),
    operands="gate, up",
    compiled="gate.dtype, form, pairs",
    types=types,
    examples=[
        *(_bf16(form, *quantized.dynamic("row")) for form in _ALONE),
        _bf16("fp32 silu mul", *quantized.dynamic("row")),
        _bf16("clamped_swiglu", *quantized.dynamic("row"), pairs=True),
        _bf16("gelu_tanh", *quantized.dynamic("tensor")),
        _bf16("gelu_tanh", *quantized.static(1)),
    ],
)
