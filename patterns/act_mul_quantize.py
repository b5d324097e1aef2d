"""act_mul_quantize: a gated activation and its FP8 quantisation become one kernel, or two for a whole tensor's dynamic scale.

    y = act(gate) * up;  s = program(amax(|y|));  q = cast(clamp(y / s))   →   q, s = inductor_ext.act_mul_quantize(gate, up, …)
    y = …;  q = cast(clamp(y / s))                 static   →   q, _ = inductor_ext.act_mul_quantize(gate, up, …, [s])

act is SiLU or GELU, gate and up two buffers or the halves of one. One pass over memory: on an H200 1.7 to 2.7 times as fast
as Inductor's two for [T, 3072], T from 1 to 7168 (benchmarks/results/h200/producers.json).

The quantisation may also be inductor_ext.mxfp8_quantize with plain scales. On a GPU where the kernel has not run yet
(``HAS_RUN``) that waits for ``always``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import aten, is_call
from inductor_ext.graph import describe, same_sizes, value_of
from inductor_ext.kernels.act_mul_quantize.op import ACTIVATIONS, OP
from inductor_ext.miss import INPUT_LAYOUT, Miss, no_other_users
from inductor_ext.patterns.support import fp8_chain, quantisation
from inductor_ext.patterns.support.expression import Expression
from inductor_ext.rule import Call, Context, Example, Match, Rule

E4 = torch.float8_e4m3fn
_EXPRESSIONS = {name: Expression(fn) for name, fn in ACTIVATIONS.items()}


def guard(node: Node, context: Context) -> Match | None:
    chain = quantisation.trace(node)
    if chain is None:
        return None
    traced = gated(chain.x)
    if traced is None:
        return None
    act, gate, up, inner = traced
    no_other_users(inner, {chain.x, *inner}, "a step of the activation", "the product with up only")
    found = quantisation.parse(chain, context)
    for each in (gate, up):
        if not fp8_chain.collapses_to_rows(value_of(each)):
            strides = f"{describe(each)} strides {list(value_of(each).stride())}"
            raise Miss(INPUT_LAYOUT, node, "rows of one pitch and unit stride", strides)
    quantisation.check_place(found, min(found.nodes))
    made = Call(OP, (value_of(gate), value_of(up), act, *torch.fx.map_arg(found.arguments, value_of)))
    return Match(node, (made,), f"{act}, {found.detail}", found.why, (found, (gate, up, act, *found.arguments)))


def gated(y: Node) -> tuple[str, Node, Node, list[Node]] | None:
    """Activation, gate, up, and the activation's nodes of ``y = act(gate) * up``."""
    if not is_call(y, aten.mul.Tensor):
        return None
    for activated, up in (y.args[:2], y.args[1::-1]):
        for act, expression in _EXPRESSIONS.items():
            traced = expression.trace(activated)
            if traced is None or not isinstance(up, Node):
                continue
            gate, inner = traced
            alike = value_of(gate).dtype is value_of(up).dtype is value_of(y).dtype
            if alike and same_sizes(value_of(gate).shape, value_of(up).shape):
                return act, gate, up, inner
    return None


def replace(match: Match) -> None:
    found, arguments = match.data
    quantisation.insert(match.node, found, OP.overload, arguments)


# ---- examples --------------------------------------------------------------------------------------------------------


def _quantise(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = (y.abs().amax(-1, keepdim=True) / 448.0).float()
    return (y.float() / s).clamp(-448.0, 448.0).to(E4), s


def _bounded(y: torch.Tensor, bound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = y.abs().amax(-1, keepdim=True).float().clamp(max=bound) / 448.0
    return (y.float() * s.reciprocal()).clamp(-448.0, 448.0).to(E4), s


def _gate_and_up(device: str) -> tuple[torch.Tensor, ...]:
    return tuple((torch.randn(6, 4, 64, device=device) * 3).bfloat16() for _ in range(2))


def _both(device: str) -> tuple[torch.Tensor, ...]:
    return ((torch.randn(24, 128, device=device) * 3).bfloat16(),)


def _silu(gate: torch.Tensor, up: torch.Tensor) -> Any:
    return _quantise(torch.nn.functional.silu(gate) * up)


def _static(y: torch.Tensor, *scales: Any) -> Any:
    return [(y.float() / scale).clamp(-448.0, 448.0).to(E4) for scale in scales]


def _with_scales(count: int) -> Callable[[str], tuple[torch.Tensor, ...]]:
    return lambda device: (*_gate_and_up(device), *(torch.tensor(0.05 * (i + 1), device=device) for i in range(count)))


def _silu_static(gate: torch.Tensor, up: torch.Tensor, *scales: Any) -> Any:
    return _static(torch.nn.functional.silu(gate) * up, *scales)


def _silu_mxfp8(both: torch.Tensor, swizzled: bool = False) -> Any:
    gate, up = both.chunk(2, -1)
    return torch.ops.inductor_ext.mxfp8_quantize(torch.nn.functional.silu(gate) * up, None, "rceil", swizzled)


def _gelu_tanh(gate: torch.Tensor, up: torch.Tensor) -> Any:
    return _quantise(torch.nn.functional.gelu(gate, approximate="tanh") * up)


RULE = Rule(
    name="act_mul_quantize",
    doc="SiLU or GELU times up and its FP8 quantisation → one kernel",
    anchors=quantisation.anchors,
    guard=guard,
    replace=replace,
    exact=False,
    cost="SiLU keeps every byte; GELU's erf and tanh are PyTorch's kernel's, and a value may differ by one FP8 step",
    matches=(
        Example("silu", _silu, _gate_and_up),
        Example("silu_dynamic_shape", _silu, _gate_and_up, dynamic=True),
        Example("gelu", lambda g, u: _quantise(u * torch.nn.functional.gelu(g)), _gate_and_up),
        Example("gelu_tanh", _gelu_tanh, _gate_and_up),
        Example(
            "one_scale_for_all",
            lambda g, u: (lambda y: (y.float() / (y.abs().amax() / 448.0).float()).clamp(-448.0, 448.0).to(E4))(
                torch.nn.functional.silu(g) * u
            ),
            _gate_and_up,
        ),
        Example(
            "bounded",
            lambda g, u, bound: _bounded(torch.nn.functional.silu(g) * u, bound),
            lambda device: (*_gate_and_up(device), torch.full((1,), 4.0, device=device)),
        ),
        Example("halves_of_one_buffer", lambda both: _silu(*both.chunk(2, -1)), _both),
        Example("static_scale", _silu_static, _with_scales(1)),
        Example("static_scale_dynamic_shape", _silu_static, _with_scales(1), dynamic=True),
        Example("static_scales", _silu_static, _with_scales(2)),
        Example("static_number", lambda g, u: _silu_static(g, u, 0.1), _gate_and_up),
        Example(
            "static_scale_one_over",
            lambda both, s: (torch.nn.functional.gelu(both[:, 64:]) * both[:, :64] * (1.0 / s)).to(torch.float8_e5m2),
            lambda device: (*_both(device), torch.tensor(0.1, dtype=torch.bfloat16, device=device)),
        ),
        Example("mxfp8", _silu_mxfp8, _both, mode="always"),
        Example("mxfp8_dynamic_shape", _silu_mxfp8, _both, mode="always", dynamic=True),
    ),
    near_misses=(
        Example(
            "read_elsewhere",
            lambda g, u: (lambda y: (*_quantise(y), y * 3))(torch.nn.functional.silu(g) * u),
            _gate_and_up,
            reason="what is quantised has a second user",
        ),
        Example("swizzled", lambda both: _silu_mxfp8(both, True), _both, reason="the scales are swizzled"),
        Example(
            "static_and_read_elsewhere",
            lambda g, u, s: (lambda y: (*_static(y, s), y * 3))(torch.nn.functional.silu(g) * u),
            _with_scales(1),
            reason="what is quantised has a second user",
        ),
        Example("static_scales_of_five", _silu_static, _with_scales(5), reason="quantised too often"),
        Example(
            "static_and_back",
            lambda g, u, s: _silu_static(g, u, s)[0].float() * s,
            _with_scales(1),
            reason="Inductor fuses this chain into its consumer for free",
        ),
        Example(
            "dynamic_and_smoothed",
            lambda g, u, s: (lambda y: ((y.float() * s) / (y.abs().amax() / 448.0).float()).clamp(-448.0, 448.0).to(E4))(
                torch.nn.functional.silu(g) * u
            ),
            _with_scales(1),
            reason="several scales in one chain",
        ),
    ),
)
