"""act_quantize: an activation in any form, gated or not, and its FP8 quantisation become one kernel.

    y = act(x);  s = program(amax(|y|));  q = cast(clamp(y / s))    →   q, s = inductor_ext.act_quantize(x, None, "gelu", …)
    y = form(gate, up);  …                                          →   q, s = inductor_ext.act_quantize(gate, up, form, …)

Forms are those of kernels/act_quantize/op.py: GELU (erf, tanh, quick), SiLU and ReLU² alone (BERT, ViT, Whisper, Flux); times
up with one rounding; gpt-oss's clamped one; gate and up in neighbouring columns. What act_mul_quantize takes is its own.

One pass over memory where Inductor has two. It was measured in models on an H200 (benchmarks/results/h200/suite.json); on a GPU
on which it was not (``MEASURED``) it waits for ``always``. So does a chain whose scale is given everywhere: Inductor needs one
pass for it as well.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import arguments, aten, is_call, is_convert
from inductor_ext.graph import describe, same_sizes, value_of
from inductor_ext.kernels.act_quantize.op import FORMS, MEASURED, OP
from inductor_ext.miss import INPUT_LAYOUT, NOT_FASTER, Miss, no_other_users
from inductor_ext.patterns.support import fp8_chain, has_run, quantisation
from inductor_ext.patterns.support.expression import Expression
from inductor_ext.rule import Call, Context, Example, Match, Rule

E4 = torch.float8_e4m3fn
F = torch.nn.functional
_EXPRESSIONS = {name: Expression(form.fn, tensors=form.inputs) for name, form in FORMS.items()}


@dataclasses.dataclass(frozen=True)
class Activated:
    """``y = form(gate, up)``; with ``pairs`` gate holds both in its even and odd columns. ``inner`` are the nodes of y."""

    y: Node
    form: str
    gate: Node
    up: Node | None
    pairs: bool
    inner: list[Node]


def guard(node: Node, context: Context) -> Match | None:
    chain = quantisation.trace(node)
    traced = None if chain is None else _activated(chain)
    if traced is None:
        return None
    chain, read = traced
    no_other_users([each for each in read.inner if each is not read.y], read.inner, "a step of the activation", "it only")
    found = quantisation.parse(chain, context)
    for each in (read.gate, read.up):
        if each is not None and not fp8_chain.collapses_to_rows(value_of(each)):
            strides = f"{describe(each)} strides {list(value_of(each).stride())}"
            raise Miss(INPUT_LAYOUT, node, "rows of one pitch and unit stride", strides)
    quantisation.check_place(found, min(found.nodes))
    if found.granularity == "static" and not context.forced:
        raise Miss(NOT_FASTER, node, "a scale that follows from the data", found.detail)
    has_run.check(node, context, value_of(read.y).device, MEASURED, has_run.NOT_MEASURED)
    given = (read.gate, read.up, read.form, read.pairs, *found.arguments)
    made = Call(OP, torch.fx.map_arg(given, value_of))
    return Match(node, (made,), f"{read.form}{', pairs' if read.pairs else ''}, {found.detail}", found.why, (found, given))


def _activated(chain: Any) -> tuple[Any, Activated] | None:
    """The chain, from one of its `quantisation.starts`, and the activation that it begins behind."""
    for each in quantisation.starts(chain):
        read = trace(each.x)
        if read is not None:
            return each, read
    return None


def trace(y: Node) -> Activated | None:
    """The activation that ends in ``y``, in the first form that fits."""
    for name, expression in _EXPRESSIONS.items():
        found = expression.match(y)
        if found is None:
            continue
        gate, *rest = found.tensors
        if not all(same_sizes(value_of(each).shape, value_of(y).shape) for each in found.tensors):
            continue
        if any(is_convert(each, torch.float32) for each in found.tensors):  # the inside of the same in 16 bits
            continue
        if not rest:
            return Activated(y, name, gate, None, False, found.nodes)
        pairs = _pairs(gate, rest[0])
        return Activated(y, name, pairs or gate, None if pairs else rest[0], pairs is not None, found.nodes)
    return None


def _pairs(gate: Node, up: Node) -> Node | None:
    """What ``gate`` and ``up`` are the even and the odd columns of."""
    parts = [arguments(each) if is_call(each, aten.slice.Tensor) else {} for each in (gate, up)]
    if not all(parts) or parts[0]["self"] is not parts[1]["self"]:
        return None
    x = parts[0]["self"]
    columns = value_of(x).shape[-1]
    if not isinstance(columns, int) or columns % 2:
        return None
    for first, part in enumerate(parts):
        dim, start, end, step = (part[name] for name in ("dim", "start", "end", "step"))
        last = dim in (-1, value_of(x).dim() - 1)
        if not last or not all(isinstance(each, int | None) for each in (start, end, step)):
            return None
        if range(columns)[slice(start, end, step)] != range(first, columns, 2):
            return None
    return x  # type: ignore[no-any-return]


def replace(match: Match) -> None:
    found, given = match.data
    quantisation.insert(match.node, found, OP.overload, given)


# ---- examples --------------------------------------------------------------------------------------------------------


def _quantise(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = (y.abs().amax(-1, keepdim=True) / 448.0).float()
    return (y.float() / s).clamp(-448.0, 448.0).to(E4), s


def _x(device: str) -> tuple[torch.Tensor, ...]:
    return ((torch.randn(6, 4, 64, device=device) * 3).bfloat16(),)


def _both(device: str) -> tuple[torch.Tensor, ...]:
    return ((torch.randn(24, 128, device=device) * 5).bfloat16(),)


def _two(device: str) -> tuple[torch.Tensor, ...]:
    return *_x(device), *_x(device)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gpt_oss(gate_up: torch.Tensor) -> Any:
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate.clamp(min=None, max=7.0), up.clamp(min=-7.0, max=7.0)
    return _quantise((up + 1) * (gate * torch.sigmoid(gate * 1.702)))


def _one_rounding(gate: torch.Tensor, up: torch.Tensor) -> Any:
    return _quantise((F.silu(gate.float()) * up.float()).to(gate.dtype))


RULE = Rule(
    name="act_quantize",
    doc="GELU, SiLU, ReLU² alone, or a gated activation of any form, and its FP8 quantisation → one kernel",
    anchors=quantisation.anchors,
    guard=guard,
    replace=replace,
    exact=False,
    cost="exponentials, erf and tanh are PyTorch's GPU kernel's, and a value may differ by one FP8 step",
    matches=(
        Example("gelu", lambda x: _quantise(F.gelu(x)), _x, mode="always"),
        Example("gelu_tanh", lambda x: _quantise(F.gelu(x, approximate="tanh")), _x, mode="always"),
        Example(
            "gelu_tanh_dynamic_shape", lambda x: _quantise(F.gelu(x, approximate="tanh")), _x, mode="always", dynamic=True
        ),
        Example("quick_gelu", lambda x: _quantise(_quick_gelu(x)), _x, mode="always"),
        Example("silu", lambda x: _quantise(F.silu(x)), _x, mode="always"),
        Example("relu_squared", lambda x: _quantise(F.relu(x).square()), _x, mode="always"),
        Example("quick_gelu_times_up", lambda g, u: _quantise(_quick_gelu(g) * u), _two, mode="always"),
        Example("relu_squared_times_up", lambda g, u: _quantise(u * F.relu(g).pow(2)), _two, mode="always"),
        Example("one_rounding", _one_rounding, _two, mode="always"),
        Example("one_rounding_of_halves", lambda both: _one_rounding(*both.chunk(2, -1)), _both, mode="always"),
        Example("gpt_oss", _gpt_oss, _both, mode="always"),
        Example("gpt_oss_dynamic_shape", _gpt_oss, _both, mode="always", dynamic=True),
        Example(
            "silu_of_pairs", lambda both: _quantise(F.silu(both[..., ::2]) * both[..., 1::2]), _both, mode="always"
        ),
        Example(
            "one_scale_for_all",
            lambda x: (lambda y: (y.float() / (y.abs().amax() / 448.0).float()).clamp(-448.0, 448.0).to(E4))(F.gelu(x)),
            _x,
            mode="always",
        ),
        Example(
            "static_scale",
            lambda x, s: (F.gelu(x).float() / s).clamp(-448.0, 448.0).to(E4),
            lambda device: (*_x(device), torch.tensor(0.05, device=device)),
            mode="always",
        ),
        Example(
            "mxfp8",
            lambda x: torch.ops.inductor_ext.mxfp8_quantize(F.gelu(x).view(-1, 64), None, "rceil", False),
            _x,
            mode="always",
        ),
    ),
    near_misses=(
        Example(
            "read_elsewhere",
            lambda x: (lambda y: (*_quantise(y), y * 3))(F.gelu(x)),
            _x,
            reason="what is quantised has a second user",
        ),
        Example(
            "a_step_is_read",
            lambda x: (lambda t: (*_quantise(t.square()), t * 3))(F.relu(x)),
            _x,
            reason="a step of the activation has a second user",
        ),
        Example(
            "static_scale_by_itself",
            lambda x, s: (F.gelu(x).float() / s).clamp(-448.0, 448.0).to(E4),
            lambda device: (*_x(device), torch.tensor(0.05, device=device)),
            reason="it would not be faster",
        ),
        Example(
            "every_other_column", lambda both: _quantise(F.gelu(both[..., ::2])), _both, reason="input layout"
        ),
        Example(
            "odd_times_even",
            lambda both: _quantise(F.silu(both[..., 1::2]) * both[..., ::2]),
            _both,
            reason="input layout",
        ),
    ),
)
