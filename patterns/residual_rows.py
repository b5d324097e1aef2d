"""residual_rows: a residual stream that lies in columns, and is copied into rows for a norm, lies in rows from that copy on.

    c = clone(s); norm(c); t = s + y; d = clone(t); norm(d)        →        c = clone(s); norm(c); t = c + y; norm(t)

Behind a convolution (Whisper, ViT, SigLIP) the tokens of ``conv(x).flatten(2).transpose(1, 2)`` lie side by side, and so does
every sum with them that follows. PyTorch's norm wants rows and copies. Inductor decides itself how what it computes lies in
memory, so that these copies cost nothing in a graph of its own. A fused kernel wants rows, and what reads ``s`` again takes the
sum apart down to the convolution, in every layer. Only strides change, of values that the graph does not return, and no number.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext import memory
from inductor_ext.calls import arguments, aten, calling, calls, is_call
from inductor_ext.graph import call, describe, erase_dead, known_equal, same_sizes, value_of
from inductor_ext.miss import Miss
from inductor_ext.patterns.support.strides import drop_idle_copies
from inductor_ext.rule import Context, Example, Match, Rule

#: What reads a tensor element by element, however it lies. Beside them: operators that PyTorch tags as pointwise.
_REDUCTIONS = aten.var_mean.correction, aten.mean.dim, aten.sum.dim_IntList, aten.amax.default

#: Views that say where in memory they look.
_STRIDED = aten.as_strided.default, aten.view.dtype

_FP8 = torch.float8_e4m3fn, torch.float8_e5m2
SEEN = "something may see how the residual stream lies"


def anchors(graph: Graph) -> Iterable[Node]:
    """Copies into rows, in a graph with FP8 work: in others there is no kernel that wants them."""
    fp8 = any(isinstance(value_of(node), torch.Tensor) and value_of(node).dtype in _FP8 for node in graph.nodes)
    return calling(aten.clone.default)(graph) if fp8 else ()


@dataclasses.dataclass(frozen=True)
class _Plan:
    """``copy`` of ``stream`` takes its place, which gives these nodes ``values`` of other strides."""

    stream: Node
    copy: Node
    values: dict[Node, torch.Tensor]


def guard(node: Node, context: Context) -> Match | None:
    if not is_call(node, aten.clone.default) or arguments(node)["memory_format"] is not torch.contiguous_format:
        return None
    stream = node.args[0]
    if not isinstance(stream, Node) or not _computed(stream) or value_of(stream).dim() < 2:
        return None
    value = value_of(stream)
    if not value.dtype.is_floating_point or known_equal(value.stride(-1), 1):
        return None
    others = [user for user in stream.users if user is not node]
    if not others:
        return None
    plan = _Plan(stream, node, _with_other_strides(stream, node))
    copies = sum(_is_copy_into_rows(each) for each in plan.values)
    detail = f"{list(value.shape)}, {len(others)} other reader{'s'[: len(others) != 1]}"
    return Match(node, (), detail, f"no reader goes through the columns again{', nor do later sums' if copies else ''}", plan)


def _computed(node: Node) -> bool:
    """Whether ``node`` is a new tensor that Inductor computes element by element."""
    target: Any = node.target
    return node.op == "call_function" and torch.Tag.pointwise in getattr(target, "tags", ()) and not memory.is_view(node)


def _is_copy_into_rows(node: Node) -> bool:
    return any(is_call(user, aten.clone.default) for user in node.users)


def _with_other_strides(stream: Node, copy: Node) -> dict[Node, torch.Tensor]:
    """The fake values below ``stream`` that change where ``copy`` is read in its place; Miss where someone may see that."""
    made = {stream: value_of(copy)}
    nodes = iter(stream.graph.nodes)
    while next(nodes) is not stream:
        pass
    for node in nodes:
        if node is copy or not any(each in made for each in node.all_input_nodes):
            continue
        if not _sees_values_alone(node):
            seen = next(each for each in node.all_input_nodes if each in made)
            wanted = "readers that compute element by element, or reduce"
            raise Miss(SEEN, seen, wanted, "the caller" if node.op == "output" else describe(node))
        value = _again(node, made)
        old = value_of(node)
        if isinstance(old, torch.Tensor) and isinstance(value, torch.Tensor) and not same_sizes(value.stride(), old.stride()):
            made[node] = value
    del made[stream]
    return made


def _sees_values_alone(node: Node) -> bool:
    if node.op != "call_function":
        return False
    by_values = is_call(node, aten.clone.default, *_REDUCTIONS) or (memory.is_view(node) and not calls(node, *_STRIDED))
    return by_values or _computed(node)


def _again(node: Node, made: dict[Node, torch.Tensor]) -> Any:
    look = functools.partial(_value, made=made)
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), look)
    target: Any = aten.reshape.default if is_call(node, aten.view.default) else node.target
    with next(iter(made.values())).fake_mode:  # type: ignore[attr-defined]
        return target(*args, **kwargs)


def _value(node: Node, made: dict[Node, torch.Tensor]) -> Any:
    return made.get(node, value_of(node))


def replace(match: Match) -> None:
    plan: _Plan = match.data
    stream, graph = plan.stream, match.node.graph
    with graph.inserting_after(stream):
        copy = call(graph, aten.clone.default, stream, like=plan.copy, memory_format=torch.contiguous_format)
    plan.copy.replace_all_uses_with(copy)
    erase_dead(plan.copy)
    stream.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)
    for node, value in plan.values.items():
        if is_call(node, aten.view.default):
            node.target = aten.reshape.default
        node.meta["val"] = value
    for node in plan.values:
        drop_idle_copies(node)


# ---- examples --------------------------------------------------------------------------------------------------------

SHAPE = B, C, T = 2, 64, 24


def _cast(s: Any) -> torch.Tensor:
    """What a norm begins with, the copy, and what quantising it ends with: numbers that Inductor computes as eager does."""
    return s.contiguous().clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def _encoder(x: Any, positions: Any) -> tuple[torch.Tensor, ...]:
    """Whisper: a convolution's output, its channels last, and positions; then two sums with it."""
    s = x.abs().permute(0, 2, 1) + positions
    first = _cast(s)
    s = s + first.to(s.dtype)
    second = _cast(s)
    return first, second, _cast(s + second.to(s.dtype))


def _one_sum(x: Any, positions: Any) -> torch.Tensor:
    s = x.transpose(1, 2) + positions
    return _cast(s + _cast(s).to(s.dtype))


def _any_length(x: Any, positions: Any) -> torch.Tensor:
    if x.shape[1] != C:
        raise ValueError(f"wanted {C} channels, found {x.shape[1]}")
    return _one_sum(x, positions)


def _pooled(x: Any, positions: Any) -> tuple[torch.Tensor, ...]:
    """Maxima of the sums, and of a view of them, as well."""
    s = x.transpose(1, 2) + positions
    t = s + _cast(s).to(s.dtype)
    return _cast(t), t.amax(1), t.reshape(B, T, 4, C // 4).amax(-1)


def _returned(x: Any, positions: Any) -> tuple[torch.Tensor, ...]:
    s = x.transpose(1, 2) + positions
    t = s + _cast(s).to(s.dtype)
    return _cast(t), t


def _by_strides(x: Any, positions: Any) -> tuple[torch.Tensor, ...]:
    s = x.transpose(1, 2) + positions
    return _cast(s), torch.as_strided(s * 2, (B, C, T), (C * T, T, 1)) + 1


def _multiplied(x: Any, positions: Any) -> tuple[torch.Tensor, ...]:
    s = x.transpose(1, 2) + positions
    return _cast(s), s @ s.mT


def _inputs(device: str) -> tuple[torch.Tensor, ...]:
    return torch.randn(SHAPE, device=device), torch.randn(T, C, device=device)


RULE = Rule(
    name="residual_rows",
    doc="a residual stream in columns that is copied into rows for its norms → rows from the first copy on",
    anchors=anchors,
    guard=guard,
    replace=replace,
    matches=(
        Example("encoder", _encoder, _inputs),
        Example("one_sum", _one_sum, _inputs),
        Example("pooled", _pooled, _inputs),
        Example("dynamic_shape", _any_length, _inputs, dynamic=True),
    ),
    near_misses=(
        Example("returned", _returned, _inputs, reason=SEEN),
        Example("by_strides", _by_strides, _inputs, reason=SEEN),
        Example("multiplied", _multiplied, _inputs, reason=SEEN),
    ),
)
