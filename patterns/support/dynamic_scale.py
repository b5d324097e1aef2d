"""Recognise a scale computed from the maximum of the very tensor it scales, and write the way there as a step program."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import CONVERT, aten, is_call
from inductor_ext.graph import constant_of, describe, is_reshape, same_sizes, value_of
from inductor_ext.kernels import steps
from inductor_ext.miss import SCALE_DTYPE, Miss, second_user
from inductor_ext.patterns.support.fp8_chain import FLOATS, Chain

_STEPS = {
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.clamp_min.default: "max",
    aten.maximum.default: "max",
    aten.clamp_max.default: "min",
    aten.minimum.default: "min",
}
_COMMUTATIVE = (aten.mul.Tensor, aten.maximum.default, aten.minimum.default)


@dataclasses.dataclass(frozen=True)
class DynamicScale:
    """``scale = program(amax(x))``; ``granularity`` is "row" or "tensor"; ``node`` is the scale in the graph."""

    node: Node
    amax: Node
    granularity: str
    program: str
    inner: tuple[Node, ...]  # nodes between amax's input and the scale, both ends excluded


def amax_above(scale: Node, x: Node, limit: int = 16) -> Node | None:
    """The reduction of ``x`` that ``scale`` is computed from, however it is spelled; None for a static scale."""
    frontier: list[Node] = [scale]
    seen: set[Node] = set()
    while frontier and len(seen) < limit:
        node = frontier.pop()
        if not isinstance(node, Node) or node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if _is_amax(node):
            if _source(node) is x:
                return node
            continue
        frontier.extend(node.all_input_nodes)
    return None


def trace(chain: Chain, scale: Node) -> DynamicScale:
    """The program from amax to ``scale``, one of ``chain``'s operands, or the first condition that failed."""
    amax = amax_above(scale, chain.x)
    assert amax is not None
    collected: list[steps.Step] = []
    inner: list[Node] = []
    node = scale
    while node is not amax:
        if node is not scale:
            if len(node.users) > 1:
                raise Miss(second_user("a step of the scale"), node, "only the scale itself used", describe(node))
            inner.append(node)
        if is_reshape(node) or is_call(node, operator.getitem):
            node = node.args[0]
            continue
        node = step(node, collected)
    if len(amax.users) > 1:
        raise Miss(second_user("a step of the scale"), amax, "only the scale itself used", describe(amax))
    granularity = _granularity(amax, chain)
    if value_of(scale).dtype not in FLOATS:
        raise Miss(SCALE_DTYPE, scale, "float32, bfloat16 or float16", str(value_of(scale).dtype))
    program = list(reversed(collected))
    taken_in = value_of(amax.args[0]).dtype
    if taken_in is not value_of(chain.x).dtype:  # amax of x.float(): a widening convert commutes with the maximum
        program.insert(0, steps.Step("to", taken_in))
    return DynamicScale(scale, amax, granularity, steps.text_of(program), tuple(inner))


def step(node: Node, collected: list[steps.Step]) -> Node:
    """Record one step of the scale program and go up."""
    if is_call(node, CONVERT) and node.args[1] in FLOATS and value_of(node.args[0]).dtype in FLOATS:
        collected.append(steps.Step("to", node.args[1]))
        return node.args[0]
    if is_call(node, aten.reciprocal.default):
        collected.append(steps.Step("recip"))
        return node.args[0]
    if is_call(node, *_STEPS):
        value, other = node.args[0], node.args[1]
        if node.target in _COMMUTATIVE and constant_of(value) is not None:
            value, other = other, value
        number = constant_of(other)
        if number is not None and isinstance(value, Node) and value_of(value).dtype is value_of(node).dtype:
            collected.append(steps.Step(_STEPS[node.target], number))
            return value
    wanted = "convert, reciprocal, or mul, div, clamp by a number"
    raise Miss("a step of the scale is not one the kernel computes", node, wanted, describe(node))


def _is_amax(node: Node) -> bool:
    if is_call(node, aten.amax.default, aten.max.default, aten.max.dim):
        return is_call(_through_converts(node.args[0]), aten.abs.default)
    return False


def _through_converts(node: Node) -> Node:
    """Above reshapes and widening converts, neither of which changes a value."""
    while is_reshape(node) or (
        is_call(node, CONVERT) and node.args[1] is torch.float32 and value_of(node.args[0]).dtype in FLOATS
    ):
        node = node.args[0]
    return node


def _source(amax: Node) -> Node:
    return _through_converts(_through_converts(amax.args[0]).args[0])


def _granularity(amax: Node, chain: Chain) -> str:
    taken = value_of(amax.args[0])
    if is_call(amax, aten.max.default):
        return "tensor"
    dims = amax.args[1] if len(amax.args) > 1 else list(range(taken.dim()))
    dims = sorted({d % taken.dim() for d in ([dims] if isinstance(dims, int) else dims)}) if taken.dim() else []
    if len(dims) in (0, taken.dim()):
        return "tensor"
    wanted = "the last dimension of what is scaled, or all of it"
    if dims != [taken.dim() - 1]:
        raise Miss("amax granularity", amax, wanted, f"dimensions {dims} of {taken.dim()}")
    if not same_sizes(taken.shape, chain.input_value().shape):
        raise Miss("amax granularity", amax, wanted, f"{list(taken.shape)} scaled as {list(chain.input_value().shape)}")
    scaled = [view for view in chain.pre_views if is_call(view, aten.permute.default)]
    if [each.args[1] for each in _permutes(amax.args[0], chain.x)] != [each.args[1] for each in scaled]:
        raise Miss("amax granularity", amax, wanted, "rows of a permuted view of what is scaled")
    return "row"


def _permutes(node: Any, x: Node) -> list[Node]:
    """The permutes between ``x`` and ``node``, nearest ``x`` first."""
    found: list[Node] = []
    while node is not x:
        if is_call(node, aten.permute.default):
            found.insert(0, node)
        node = node.args[0]
    return found
