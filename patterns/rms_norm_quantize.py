"""rms_norm_quantize: RMSNorm, the residual added before it and its FP8 quantisation become one kernel.

    t = x + residual;  y = rms_norm(t) * weight;  s = program(amax(|y|));  q = cast(clamp(y / s))
        →   q, s, t = inductor_ext.rms_norm_quantize(x, residual, weight, …)
    t = …;  q_i = cast(clamp(y / s_i))        static scales, one or up to four
        →   q, _, t = inductor_ext.rms_norm_quantize(x, residual, weight, …, [s_0, …]);  q_i = q[i]
    t = x.float() + residual.float();  …      the sum in fp32, no weight, a modulation; or y is read elsewhere too
        →   q, s, t, y = inductor_ext.norm_quantize(x, residual, weight, …)

One pass over memory instead of one for each reduction. The mean's order of summation differs from eager's: the scale may differ
in its last place, and a value by one FP8 step. On an H200 1.2 to 1.7 times as fast as Inductor's kernels; with a residual, and
memory the limit, as fast (benchmarks/results/h200/producers.json). On a GPU on which norm_quantize
has not been measured (``MEASURED``) the rule waits for ``always``.

Static scales leave out the maximum. q, k and v, or gate and up, have one each where they were calibrated apart: the kernel then
writes each of them from one y. A y that is read elsewhere is written too where it has to be in memory: a router reads it,
another branch, the graph returns it. Where Inductor would fuse its reader, or it is quantised in two ways, all stays with
Inductor; so does, up to torch 2.12, a single fp32 quantisation of a norm that ends in a rounding (Gemma's, torch's own): the
graph has lost it there.

The quantisation may also be inductor_ext.mxfp8_quantize with plain scales. On a GPU where the kernel has not run yet
(``HAS_RUN``) that waits for ``always``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from inductor_ext.patterns.support import normed, quantisation
from inductor_ext.patterns.support.normed import GATE
from inductor_ext.rule import Context, Example, Match, Rule

E4 = torch.float8_e4m3fn
F = torch.nn.functional


def guard(node: torch.fx.Node, context: Context) -> Match | None:
    return normed.match(node, context, "rms")


# ---- examples --------------------------------------------------------------------------------------------------------


def _quantise(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = (y.abs().amax(-1, keepdim=True) / 448.0).float()
    return (y.float() / s).clamp(-448.0, 448.0).to(E4), s


def _bounded(y: torch.Tensor, bound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = torch.minimum(y.abs().amax(-1, keepdim=True).float() / 448.0, bound)
    return (y.float() / s).clamp(-448.0, 448.0).to(E4), s


def _mxfp8(y: torch.Tensor, rounding: str = "rceil", swizzled: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.inductor_ext.mxfp8_quantize(y, None, rounding, swizzled)


def _llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _given_eps(x: torch.Tensor, weight: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _gemma(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).type_as(x)


def _inputs(device: str) -> tuple[torch.Tensor, ...]:
    return torch.randn(6, 4, 64, device=device).bfloat16(), torch.rand(64, device=device).bfloat16() + 0.5


def _with_residual(device: str) -> tuple[torch.Tensor, ...]:
    x, weight = _inputs(device)
    return x, torch.randn(6, 4, 64, device=device).bfloat16(), weight


def _residual(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor) -> Any:
    total = x + r
    return *_quantise(_llama(total, weight)), total * 2


def _weight_after_residual(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor) -> Any:
    total = x + r
    return *_quantise(_llama(total, 1.5 - weight)), total * 2


def _weight_of_residual(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor) -> Any:
    total = x + r
    return *_quantise(_llama(total, weight * total[0, 0])), total * 2


def _bounded_by_residual(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor) -> Any:
    total = x + r
    return *_bounded(_llama(total, weight), total.float().abs().amax() / 1000.0), total * 2


def _gated(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> Any:
    """Qwen3-Next's norm behind linear attention."""
    h = _llama(x, weight) * F.silu(gate.float())
    return _quantise(h.to(x.dtype))


def _gated_first(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> Any:
    """Mamba 2's, in 16 bits."""
    return _quantise(_llama(x * F.silu(gate), weight))


def _gated_first_in_fp32(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> Any:
    h = x.float() * F.silu(gate.float())
    return _quantise(weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype))


def _static(y: torch.Tensor, *scales: Any) -> Any:
    """One quantisation for each scale, as linear layers that were calibrated apart have."""
    return [(y.float() / scale).clamp(-448.0, 448.0).to(E4) for scale in scales]


def _scales(device: str, count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.tensor([[0.01 * (i + 1)]], dtype=dtype, device=device) for i in range(count)]


def _with_scales(count: int, dtype: torch.dtype = torch.float32) -> Callable[[str], tuple[torch.Tensor, ...]]:
    return lambda device: (*_inputs(device), *_scales(device, count, dtype))


def _static_after_residual(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, *scales: torch.Tensor) -> Any:
    total = x + r
    return *_static(_llama(total, weight), *scales), total * 2


def _static_in_views(x: torch.Tensor, weight: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> Any:
    rows = _llama(x, weight).view(-1, 64)
    return [each.view(48, 32) for each in _static(rows, q, k)]


def _scale_of_the_sum(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor) -> Any:
    total = x + r
    return *_static(_llama(total, weight), total.abs().amax().float()), total * 2


def _residual_mxfp8(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor) -> Any:
    total = x + r
    return *_mxfp8(_llama(total, weight).view(-1, 64), "floor"), total * 2


def _fp32_sum(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What serving frameworks write: the norm is of the sum before it is rounded."""
    total = x.float() + r.float()
    return (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight, total


def _fp32_residual(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor) -> Any:
    y, total = _fp32_sum(x, r, weight)
    return *_quantise(y), total.to(x.dtype)


def _fp32_residual_is_read(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor) -> Any:
    y, total = _fp32_sum(x, r, weight)
    return *_quantise(y), total * 2


def _spelled(norm: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda x, weight: _quantise(weight * norm(x.float()).to(x.dtype))


def _rows(device: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(6, 1, 64, device=device).to(dtype)


def _router(device: str) -> tuple[torch.Tensor, ...]:
    return *_with_residual(device), torch.randn(8, 64, device=device).bfloat16()


def _routed(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, router: torch.Tensor) -> Any:
    total = x + r
    y = _llama(total, weight)
    return *_quantise(y), F.linear(y.view(-1, 64), router), total * 2


RULE = Rule(
    name="rms_norm_quantize",
    doc="RMSNorm with its residual and its FP8 quantisation → one kernel",
    anchors=quantisation.anchors,
    guard=guard,
    replace=normed.replace,
    exact=False,
    cost="the mean is summed in another order: the scale within its last place (MXFP8: a factor 2), values within one FP8 step",
    matches=(
        Example("llama", lambda x, w: _quantise(_llama(x, w)), _inputs),
        Example("llama_dynamic_shape", lambda x, w: _quantise(_llama(x, w)), _inputs, dynamic=True),
        Example(
            "bounded",
            lambda x, r, w, bound: (lambda total: (*_bounded(_llama(total, w), bound), total * 2))(x + r),
            lambda d: (*_with_residual(d), torch.full((1,), 0.005, device=d)),
        ),
        Example("gemma", lambda x, w: _quantise(_gemma(x, w)), _inputs),
        Example("torch", lambda x, w: _quantise(F.rms_norm(x, (64,), w, 1e-6)), _inputs),
        Example(
            "one_scale_for_all",
            lambda x, w: (lambda y: (y.float() / (y.abs().amax() / 448.0).float()).clamp(-448.0, 448.0).to(E4))(_llama(x, w)),
            _inputs,
        ),
        Example("residual_is_read_later", _residual, _with_residual),
        Example("weight_after_residual", _weight_after_residual, _with_residual),
        Example("static_scale", lambda x, w, s: _static(_llama(x, w), s), _with_scales(1)),
        Example("static_scale_dynamic_shape", lambda x, w, s: _static(_llama(x, w), s), _with_scales(1), dynamic=True),
        Example("static_scales_gemma", lambda x, w, *s: _static(_gemma(x, w), *s), _with_scales(2)),
        Example(
            "static_scale_torch",
            lambda x, w, s: (F.rms_norm(x, (64,), w, 1e-6) * s.reciprocal()).to(torch.float8_e5m2),
            _with_scales(1, torch.bfloat16),
        ),
        Example("static_number", lambda x, w: _static(_llama(x, w), 0.02), _inputs),
        Example("static_scales_of_q_k_v", lambda x, w, *s: _static(_llama(x, w), *s), _with_scales(3)),
        Example(
            "static_scales_after_residual", _static_after_residual, lambda d: (*_with_residual(d), *_scales(d, 2)), dynamic=True
        ),
        Example("static_scales_in_views", _static_in_views, _with_scales(2)),
        Example(
            "static_scales_made_later",
            lambda x, r, w, s: _static_after_residual(x, r, w, s, torch.maximum(s, s * 2)),
            lambda d: (*_with_residual(d), *_scales(d, 1)),
        ),
        Example("root_below", _spelled(lambda h: h / torch.sqrt(h.square().mean(-1, keepdim=True) + 1e-6)), _inputs),
        Example("one_over_root", _spelled(lambda h: h * (1 / torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-6))), _inputs),
        Example("sum_over_columns", _spelled(lambda h: h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / 64 + 1e-6)), _inputs),
        Example(
            "fp32_weight_behind_the_rounding",
            lambda x, w: _quantise((w * F.rms_norm(x, (64,), None, 1e-6)).to(x.dtype)),
            lambda device: (_inputs(device)[0], _inputs(device)[1].float()),
        ),
        Example("one_plus_weight_in_bf16", lambda x, w: _quantise(_llama(x, 1 + w)), _inputs),
        Example(
            "sum_in_fp32_handed_on_rounded",
            lambda x, r, w: (lambda total: (*_quantise(_llama(total, w)), total * 2))((x.float() + r.float()).to(x.dtype)),
            _with_residual,
        ),
        Example("no_weight", lambda x, _: _quantise(F.rms_norm(x, (64,), None, 1e-6)), _inputs, mode="always"),
        Example("fp32_residual", _fp32_residual, _with_residual, mode="always"),
        Example("fp32_residual_dynamic_shape", _fp32_residual, _with_residual, mode="always", dynamic=True),
        Example("fp32_residual_ends", lambda x, r, w: _quantise(_fp32_sum(x, r, w)[0]), _with_residual, mode="always"),
        Example(
            "fp32_residual_static_scales",
            lambda x, r, w, *s: (*_static(_fp32_sum(x, r, w)[0], *s), _fp32_sum(x, r, w)[1].to(x.dtype)),
            lambda device: (*_with_residual(device), *_scales(device, 2)),
            mode="always",
        ),
        Example(
            "modulated",
            lambda x, w, scale: _quantise(F.rms_norm(x, (64,), w, 1e-6) * (1 + scale)),
            lambda device: (*_inputs(device), _rows(device)),
            mode="always",
        ),
        Example("router_reads_it_too", _routed, _router, mode="always"),
        Example("router_reads_it_too_dynamic_shape", _routed, _router, mode="always", dynamic=True),
        Example("gated_forced", _gated, _with_residual, mode="always"),
        Example(
            "gate_in_memory",
            lambda x, gate, w: _quantise(F.rms_norm(x, (64,), w, 1e-6) * gate),
            _with_residual,
        ),
        Example("returned_too", lambda x, w: (lambda y: (*_quantise(y), y))(_llama(x, w)), _inputs, mode="always"),
        Example(
            "static_and_returned_too",
            lambda x, w, *s: (lambda y: (*_static(y, *s), y))(_llama(x, w)),
            _with_scales(2),
            mode="always",
        ),
        Example("mxfp8", lambda x, w: _mxfp8(_llama(x, w).view(-1, 64)), _inputs, mode="always"),
        Example("mxfp8_dynamic_shape", lambda x, w: _mxfp8(_llama(x, w).view(-1, 64)), _inputs, mode="always", dynamic=True),
        Example("mxfp8_after_residual", _residual_mxfp8, _with_residual, mode="always"),
    ),
    near_misses=(
        Example("weight_of_the_sum", _weight_of_residual, _with_residual, reason="the weight is computed too late"),
        Example(
            "norm_is_read_elsewhere",
            lambda x, w: (lambda y: (*_quantise(y), y * 3))(_llama(x, w)),
            _inputs,
            reason="what is quantised has a second user",
        ),
        Example(
            "norm_is_read_beside_mxfp8",
            lambda x, w: (lambda y: (*_mxfp8(y), y * 3))(_llama(x, w).view(-1, 64)),
            _inputs,
            reason="what is quantised has a second user",
        ),
        Example("fp32_residual_is_read", _fp32_residual_is_read, _with_residual, reason="the fp32 sum has a second user"),
        Example(
            "two_weights",
            lambda x, w: _quantise(F.rms_norm(x, (64,), w, 1e-6) * w),
            _inputs,
            reason="a norm with two such operands",
        ),
        Example(
            "modulated_by_two_dtypes",
            lambda x, w, scale, shift: _quantise((_llama(x, w).float() * (1 + scale) + shift).to(x.dtype)),
            lambda device: (*_inputs(device), _rows(device, torch.half), _rows(device, torch.float32)),
            reason="norm operands",
        ),
        Example(
            "eps_is_an_input",
            lambda x, w, eps: _quantise(_given_eps(x, w, eps)),
            lambda device: (*_inputs(device), torch.tensor(1e-6, device=device)),
            reason="eps is not a constant of the graph",
        ),
        Example(
            "swizzled",
            lambda x, w: _mxfp8(_llama(x, w).view(-1, 64), swizzled=True),
            _inputs,
            reason="the scales are swizzled",
        ),
        Example(
            "blocks_across_rows",
            lambda x, w: _mxfp8(_llama(x, w).view(12, 128)),
            _inputs,
            reason="the scale is not of the rows",
        ),
        Example(
            "one_scale_for_one_row",
            lambda x, w: (lambda y: (y.float() / (y.abs().amax() / 448.0).float()).clamp(-448.0, 448.0).to(E4))(
                _llama(x[:1, :1], w)
            ),
            _inputs,
            reason="one scale for all: Inductor's kernels are as fast",
        ),
        Example(
            "static_and_read_elsewhere",
            lambda x, w, s: (lambda y: (*_static(y, s), y * 3))(_llama(x, w)),
            _with_scales(1),
            reason="what is quantised has a second user",
        ),
        Example(
            "static_and_dynamic",
            lambda x, w, s: (lambda y: (*_static(y, s), *_quantise(y)))(_llama(x, w)),
            _with_scales(1),
            reason="what is quantised has a second user",
        ),
        Example(
            "static_scales_of_five",
            lambda x, w, *s: _static(_llama(x, w), *s),
            _with_scales(5),
            reason="quantised too often",
        ),
        Example(
            "static_in_two_dtypes",
            lambda x, w, s: (lambda y: (*_static(y, s), (y.float() / s).to(torch.float8_e5m2)))(_llama(x, w)),
            _with_scales(1),
            reason="quantised in different ways",
        ),
        Example(
            "static_scale_of_fp32",
            lambda x, w, s: (F.rms_norm(x.float(), (64,), w.float(), 1e-6) / s).to(E4),
            _with_scales(1),
            reason="norm dtype",
        ),
        Example("gated", _gated, _with_residual, reason=GATE),
        Example("gated_first", _gated_first, _with_residual, reason=GATE),
        Example("gated_first_in_fp32", _gated_first_in_fp32, _with_residual, reason="norm dtype"),
        Example("bounded_by_the_sum", _bounded_by_residual, _with_residual, reason="the scale is computed too late"),
        Example("static_scale_of_the_sum", _scale_of_the_sum, _with_residual, reason="the scale is computed too late"),
        Example(
            "static_scale_a_row",
            lambda x, w, s: _static(_llama(x, w), s),
            lambda device: (*_inputs(device), torch.rand(6, 4, 1, device=device) + 0.5),
            reason="a static scale a row",
        ),
        Example(
            "static_and_smoothed",
            lambda x, w, s, t: ((_llama(x, w).float() * t) / s).clamp(-448.0, 448.0).to(E4),
            _with_scales(2),
            reason="several scales in one chain",
        ),
        Example(
            "static_and_back",
            lambda x, w, s: _static(_llama(x, w), s)[0].float() * s,
            _with_scales(1),
            reason="Inductor fuses this chain into its consumer for free",
        ),
    ),
)
