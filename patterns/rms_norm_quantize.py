"""rms_norm_quantize: RMSNorm, the residual added before it and its FP8 quantisation become one kernel.

    t = x + residual;  y = rms_norm(t) * weight;  s = program(amax(|y|));  q = cast(clamp(y / s))
        →   q, s, t = inductor_ext.rms_norm_quantize(x, residual, weight, …)
    t = …;  q_i = cast(clamp(y / s_i))        static scales, one or up to four
        →   q, _, t = inductor_ext.rms_norm_quantize(x, residual, weight, …, [s_0, …]);  q_i = q[i]

One pass over memory instead of one for each reduction. The mean's order of summation differs from eager's: the scale may differ
in its last place, and a value by one FP8 step. On an H200 1.2 to 1.7 times as fast as Inductor's kernels; with a residual, and
memory the limit, as fast (benchmarks/results/h200/producers.json).

Static scales leave out the maximum. q, k and v, or gate and up, have one each where they were calibrated apart: the kernel then
writes each of them from one y. A y that is read elsewhere too, or quantised in two ways, stays with Inductor; so does, up to
torch 2.12, a single fp32 quantisation of a norm that ends in a rounding (Gemma's, torch's own): the graph has lost it there.

The quantisation may also be inductor_ext.mxfp8_quantize with plain scales. On a GPU where the kernel has not run yet
(``HAS_RUN``) that waits for ``always``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.graph import call, describe, erase_dead, value_of
from inductor_ext.kernels.rms_norm_quantize.op import OP
from inductor_ext.miss import INPUT_LAYOUT, Miss
from inductor_ext.patterns.support import fp8_chain, quantisation, rms_norm
from inductor_ext.rule import Call, Context, Example, Match, Rule

E4 = torch.float8_e4m3fn

#: Where two launches for a tensor with one scale gain on Inductor's: on an H200 1.05 to 1.5 times from 16 to 7168 rows of 1024;
#: 0.66 for one row, which Inductor does in one launch, and 0.86 to 1.14 with 30 million elements and more, which miss L2.
TENSOR_ROWS, TENSOR_ELEMENTS = 16, 1 << 23


def guard(node: Node, context: Context) -> Match | None:
    chain = quantisation.trace(node)
    if chain is None:
        return None
    traced = _normed(chain)
    if traced is None:
        return None
    chain, norm = traced
    found = quantisation.parse(chain, context)
    if found.granularity == "tensor" and not context.forced:
        shape = value_of(norm.total).shape
        rows = math.prod(shape[:-1])
        if not isinstance(rows, int) or rows < TENSOR_ROWS or rows * shape[-1] > TENSOR_ELEMENTS:
            wanted = f"at least {TENSOR_ROWS} rows, and at most {TENSOR_ELEMENTS} elements in all"
            reason = "one scale for all: Inductor's kernels are as fast"
            raise Miss(reason, node, wanted, f"{list(shape)}")
    place = _place(found, norm)
    quantisation.check_place(found, place)
    if norm.weight >= place:
        wanted = f"a weight before {describe(place)}, which reads the sum"
        raise Miss("the weight is computed too late", norm.weight, wanted, describe(norm.weight))
    inputs = norm.addends or (norm.total, None)
    for each in inputs:
        if each is not None and not fp8_chain.collapses_to_rows(value_of(each)):
            strides = f"{describe(each)} strides {list(value_of(each).stride())}"
            raise Miss(INPUT_LAYOUT, node, "rows of one pitch and unit stride", strides)
    x, residual = (None if each is None else value_of(each) for each in inputs)
    rest = (norm.eps, norm.norm, *found.arguments)
    detail = f"{'residual, ' if norm.addends else ''}norm {norm.norm!r}, {found.detail}"
    made = Call(OP, (x, residual, value_of(norm.weight), *torch.fx.map_arg(rest, value_of)))
    return Match(node, (made,), detail, found.why, (found, norm, (*inputs, norm.weight, *rest)))


def _normed(chain: Any) -> tuple[Any, rms_norm.RmsNorm] | None:
    """The chain, from one of its `quantisation.starts`, and the norm that it begins behind."""
    missed = None
    for each in quantisation.starts(chain):
        try:
            norm = rms_norm.trace(each.x)
        except Miss as miss:
            missed = miss
            continue
        if norm is not None:
            return each, norm
    if missed is not None:
        raise missed
    return None


def _place(found: quantisation.AnyQuantisation, norm: rms_norm.RmsNorm) -> Node:
    """Before which node the kernel is called: where the sum was, or else the first that reads one of its outputs."""
    if norm.addends and norm.weight < norm.total:
        return norm.total
    others = [user for user in norm.total.users if user is not norm.y and user not in norm.inner] if norm.addends else []
    return min([*found.nodes, *others])


def replace(match: Match) -> None:
    found, norm, arguments = match.data
    graph, place = match.node.graph, _place(found, norm)
    fused = arguments[1] is not None
    total_value = value_of(norm.total)
    quantisation.make_room(found, place)
    with graph.inserting_before(place):
        made = call(graph, OP.overload, *arguments, like=match.node)
        out, scale, total = (call(graph, operator.getitem, made, i, like=match.node) for i in range(3))
        quantisation.put(graph, found, out, scale)
    if fused and not norm.total._erased:
        total.meta["val"] = total_value
        norm.total.replace_all_uses_with(total)
        erase_dead(norm.total)


# ---- examples --------------------------------------------------------------------------------------------------------


def _quantise(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = (y.abs().amax(-1, keepdim=True) / 448.0).float()
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


RULE = Rule(
    name="rms_norm_quantize",
    doc="RMSNorm with its residual and its FP8 quantisation → one kernel",
    anchors=quantisation.anchors,
    guard=guard,
    replace=replace,
    exact=False,
    cost="the mean is summed in another order: the scale within its last place (MXFP8: a factor 2), values within one FP8 step",
    matches=(
        Example("llama", lambda x, w: _quantise(_llama(x, w)), _inputs),
        Example("llama_dynamic_shape", lambda x, w: _quantise(_llama(x, w)), _inputs, dynamic=True),
        Example("gemma", lambda x, w: _quantise(_gemma(x, w)), _inputs),
        Example("torch", lambda x, w: _quantise(torch.nn.functional.rms_norm(x, (64,), w, 1e-6)), _inputs),
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
            lambda x, w, s: (torch.nn.functional.rms_norm(x, (64,), w, 1e-6) * s.reciprocal()).to(torch.float8_e5m2),
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
            lambda x, w, s: (torch.nn.functional.rms_norm(x.float(), (64,), w.float(), 1e-6) / s).to(E4),
            _with_scales(1),
            reason="norm dtype",
        ),
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
