"""layer_norm_quantize: LayerNorm, the residual added before it, its modulation and its FP8 quantisation become one kernel.

    t = x + residual;  y = layer_norm(t) * weight + bias;  s = program(amax(|y|));  q = cast(clamp(y / s))
        →   q, s, t, _ = inductor_ext.norm_quantize(x, residual, weight, bias, …)                      BERT, ViT, Whisper
    y = layer_norm(x) * (1 + scale) + shift          a scale and a shift a sample                      Flux, SD3, DiT, Wan
        →   q, s, _, _ = inductor_ext.norm_quantize(x, None, None, None, scale, shift, …)

With weight and bias, one of them or neither, in any dtypes and roundings; the residual in its own dtype or in fp32; modulated
by vectors of a sample or of a token. Scales are those of rms_norm_quantize: a row's, one for all, static ones, MXFP8; and so is
what becomes of a y that is read elsewhere too.

One pass over memory. The means' order of summation differs from eager's: the scale may differ in its last place, and a value by
one FP8 step. It was measured in models on an H200 (benchmarks/results/h200/suite.json); on a GPU on which it was not
(``MEASURED``) it waits for ``always``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from inductor_ext.patterns.support import normed, quantisation
from inductor_ext.rule import Context, Example, Match, Rule

E4 = torch.float8_e4m3fn
F = torch.nn.functional


def guard(node: torch.fx.Node, context: Context) -> Match | None:
    return normed.match(node, context, "layer")


# ---- examples --------------------------------------------------------------------------------------------------------


def _quantise(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = (y.abs().amax(-1, keepdim=True) / 448.0).float()
    return (y.float() / s).clamp(-448.0, 448.0).to(E4), s


def _x(device: str) -> torch.Tensor:
    return (torch.randn(6, 4, 64, device=device) * 3 + 1).bfloat16()


def _inputs(device: str) -> tuple[torch.Tensor, ...]:
    return _x(device), torch.rand(64, device=device).bfloat16() + 0.5, torch.randn(64, device=device).bfloat16()


def _with_residual(device: str) -> tuple[torch.Tensor, ...]:
    return _x(device), *_inputs(device)


def _modulation(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    return _x(device), *(torch.randn(*(shape or (6, 1, 64)), device=device).to(dtype) for _ in range(2))


def _residual(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    """BERT's: the normalised value is the next layer's residual, and so it is read twice."""
    y = F.layer_norm(x + r, (64,), weight, bias, 1e-12)
    return *_quantise(y), y


def _pre_norm(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    total = x + r
    return *_quantise(F.layer_norm(total, (64,), weight, bias, 1e-5)), total * 2


def _fp32_residual(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    total = x.float() + r.float()
    return *_quantise(F.layer_norm(total, (64,), weight.float(), bias.float(), 1e-5).to(x.dtype)), total.to(x.dtype)


def _modulated(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> Any:
    return _quantise(F.layer_norm(x, (64,), None, None, 1e-6) * (1 + scale) + shift)


def _chunks(x: torch.Tensor, embedding: torch.Tensor) -> Any:
    """adaLN: one product makes shift, scale and gate of a sample."""
    shift, scale, gate = embedding.chunk(3, -1)
    return *_modulated(x, scale[:, None], shift[:, None]), x * gate[:, None]


def _in_fp32(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> Any:
    """Wan: everything in fp32 and one rounding at the end."""
    return _quantise((F.layer_norm(x.float(), (64,), None, None, 1e-6) * (1 + scale.float()) + shift.float()).type_as(x))


def _spelled(norm: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda x, weight, bias: _quantise((norm(x.float()) * weight + bias).to(x.dtype))


def _two_steps(h: torch.Tensor) -> torch.Tensor:
    centred = h - h.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


def _variance(h: torch.Tensor) -> torch.Tensor:
    return (h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, keepdim=True, correction=0) + 1e-5)


def _given_eps(x: torch.Tensor, eps: torch.Tensor) -> Any:
    h = x.float()
    return _quantise(((h - h.mean(-1, True)) * torch.rsqrt(h.var(-1, False, True) + eps)).to(x.dtype))


def _static(y: torch.Tensor, *scales: torch.Tensor) -> Any:
    return [(y.float() / scale).clamp(-448.0, 448.0).to(E4) for scale in scales]


RULE = Rule(
    name="layer_norm_quantize",
    doc="LayerNorm with its residual or its modulation, and its FP8 quantisation → one kernel",
    anchors=quantisation.anchors,
    guard=guard,
    replace=normed.replace,
    exact=False,
    cost="the means are summed in another order: the scale within its last place (MXFP8: a factor 2), values in one FP8 step",
    matches=(
        Example("weight_and_bias", lambda x, w, b: _quantise(F.layer_norm(x, (64,), w, b, 1e-5)), _inputs, mode="always"),
        Example(
            "dynamic_shape", lambda x, w, b: _quantise(F.layer_norm(x, (64,), w, b, 1e-5)), _inputs, mode="always", dynamic=True
        ),
        Example("weight_alone", lambda x, w, _: _quantise(F.layer_norm(x, (64,), w, None, 1e-5)), _inputs, mode="always"),
        Example("neither", lambda x, *_: _quantise(F.layer_norm(x, (64,), None, None, 1e-5)), _inputs, mode="always"),
        Example(
            "fp32_weight_and_bias",
            lambda x, w, b: _quantise(F.layer_norm(x.float(), (64,), w.float(), b.float(), 1e-5).to(x.dtype)),
            _inputs,
            mode="always",
        ),
        Example("bert", _residual, _with_residual, mode="always"),
        Example("pre_norm", _pre_norm, _with_residual, mode="always"),
        Example("fp32_residual", _fp32_residual, _with_residual, mode="always"),
        Example("variance", _spelled(_variance), _inputs, mode="always"),
        Example("mean_and_variance_apart", _spelled(_two_steps), _inputs, mode="always"),
        Example("modulated", _modulated, _modulation, mode="always"),
        Example("modulated_dynamic_shape", _modulated, _modulation, mode="always", dynamic=True),
        Example("modulated_for_all", _modulated, lambda device: _modulation(device, 1, 1, 64), mode="always"),
        Example("modulated_by_token", _modulated, lambda device: _modulation(device, 6, 4, 64), mode="always"),
        Example("modulated_in_fp32", _in_fp32, _modulation, mode="always"),
        Example(
            "modulated_by_chunks",
            _chunks,
            lambda device: (_x(device), torch.randn(6, 192, device=device).bfloat16()),
            mode="always",
        ),
        Example(
            "one_scale_for_all",
            lambda x, w, b: (lambda y: (y.float() / (y.abs().amax() / 448.0).float()).clamp(-448.0, 448.0).to(E4))(
                F.layer_norm(x, (64,), w, b, 1e-5)
            ),
            _inputs,
            mode="always",
        ),
        Example(
            "static_scales",
            lambda x, w, b, *s: _static(F.layer_norm(x, (64,), w, b, 1e-5), *s),
            lambda device: (*_inputs(device), *(torch.tensor(0.01 * (i + 1), device=device) for i in range(3))),
            mode="always",
        ),
        Example(
            "mxfp8",
            lambda x, w, b: torch.ops.inductor_ext.mxfp8_quantize(
                F.layer_norm(x, (64,), w, b, 1e-5).view(-1, 64), None, "rceil", False
            ),
            _inputs,
            mode="always",
        ),
    ),
    near_misses=(
        Example(
            "pointwise_reader",
            lambda x, w, b: (lambda y: (*_quantise(y), y * 3))(F.layer_norm(x, (64,), w, b, 1e-5)),
            _inputs,
            reason="what is quantised has a second user",
        ),
        Example(
            "modulated_by_column",
            _modulated,
            lambda device: _modulation(device, 6, 4, 1),
            reason="norm modulation",
        ),
        Example(
            "modulated_by_position",
            _modulated,
            lambda device: _modulation(device, 1, 4, 64),
            reason="norm modulation",
        ),
        Example(
            "weight_and_bias_of_two_dtypes",
            lambda x, w, b: _quantise((F.layer_norm(x.float(), (64,), None, None, 1e-5) * w + b).to(x.dtype)),
            lambda device: (*_inputs(device)[:2], _inputs(device)[2].float()),
            reason="norm operands",
        ),
        Example(
            "eps_is_an_input",
            _given_eps,
            lambda device: (_x(device), torch.tensor(1e-6, device=device)),
            reason="eps is not a constant of the graph",
        ),
    ),
)
