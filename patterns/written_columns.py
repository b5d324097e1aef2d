"""written_columns: columns of a buffer that were just written in place are read from what was written, the others from before.

    b = slice_scatter(a, x, 1, 4, 8);  y = b[:, 4:8];  z = b[:, :4]        →        y = x;  z = a[:, :4]

``k.div_(scale)`` on columns of one qkv buffer makes a new version of the whole buffer in a functional graph, which Inductor
computes column by column, and no rule sees where k comes from. Where every reader takes columns that were written, or columns
that were not, the new version is not needed. No number changes. A store into one of the model's inputs is left alone: it has to
happen.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext import memory
from inductor_ext.calls import aten, calling, calls, is_call
from inductor_ext.graph import call, describe, erase_dead, known_equal, same_sizes, value_of
from inductor_ext.miss import Miss
from inductor_ext.patterns.support.strides import refresh
from inductor_ext.rule import Context, Example, Match, Rule

#: A reader, the node that it reads columns by, the tensor that has them now, and which of its columns.
Read = tuple[Node, Node, range]


def anchors(graph: Graph) -> Iterable[Node]:
    """The last version first: what it is a version of is then read by less."""
    return reversed(calling(aten.slice_scatter.default)(graph))


def guard(node: Node, context: Context) -> Match | None:
    given = memory.written_input(node)
    if given is not None and any(calls(user, aten.copy_.default) and user.args[0] is given for user in given.users):
        return None
    dim = _dim(node)
    written = _columns(node.args[0], dim, *node.args[3:])
    if written is None or not _has(node.args[1], node, dim, written):
        return None
    reads, others = list[Read](), list[Node]()
    for reader, columns in _readers(node, dim):
        if columns is not None and not set(columns) - set(written):
            low = columns.start - written.start
            reads.append((reader, node.args[1], range(low, low + len(columns))))
        elif columns is not None and not set(columns) & set(written):
            reads.append((reader, node.args[0], columns))
        else:
            others.append(reader)
    if not reads:
        return None
    if memory.is_returned(node):
        raise Miss("the buffer that is written is returned", node, "readers of its columns in the graph", "the caller")
    if others:
        wanted = f"readers of columns {written.start} to {written.stop}, or of others"
        raise Miss("written columns are read together with others", node, wanted, describe(others[0]))
    detail = f"columns {written.start} to {written.stop}, {len(reads)} reader{'s'[: len(reads) != 1]}"
    return Match(node, (), detail, "no new version of the whole buffer is made", (dim, reads))


def _readers(node: Node, dim: int) -> Iterator[tuple[Node, range | None]]:
    """What reads ``node``, and which columns: None for all of them, or what cannot be told."""
    for user in node.users:
        if is_call(user, aten.slice.Tensor) and _dim(user) == dim:
            yield user, _columns(node, dim, *user.args[2:])
        elif is_call(user, aten.split.Tensor, aten.split_with_sizes.default):
            given = user.args[2] if len(user.args) > 2 else 0
            along = given % value_of(node).dim() == dim  # type: ignore[operator]
            for item in user.users:
                part = item.args[1] if along and is_call(item, operator.getitem) else None
                yield item, _part(value_of(node).shape[dim], user.args[1], part)
        else:
            yield user, None


def _dim(node: Node) -> int:
    """That of a slice, or of a scatter into one."""
    at = 2 if is_call(node, aten.slice_scatter.default) else 1
    dim: Any = node.args[at] if len(node.args) > at else 0
    return dim % value_of(node).dim()


def _columns(source: Any, dim: int, start: Any = None, end: Any = None, step: Any = 1) -> range | None:
    """Those that a slice takes, one after the other; None where they are not, or its ends are not numbers."""
    size = value_of(source).shape[dim]
    if not all(each is None or isinstance(each, int) for each in (start, end)) or step != 1 or not isinstance(size, int):
        return None
    return range(size)[start:end]


def _part(size: Any, sizes: Any, index: Any) -> range | None:
    """The columns of item ``index`` of a split."""
    if not isinstance(size, int) or not isinstance(index, int):
        return None
    if isinstance(sizes, int):
        return range(size)[index * sizes : (index + 1) * sizes]
    if not isinstance(sizes, (list, tuple)) or not all(isinstance(each, int) for each in sizes):
        return None
    low = sum(sizes[:index])
    return range(low, low + sizes[index])


def _has(value: Any, node: Node, dim: int, columns: range) -> bool:
    """Whether ``value`` is what these columns of ``node`` are then, element by element."""
    new, sizes = value_of(value), list(value_of(node).shape)
    sizes[dim] = len(columns)
    return isinstance(value, Node) and new.dtype is value_of(node).dtype and len(columns) > 0 and same_sizes(new.shape, sizes)


def replace(match: Match) -> None:
    graph, (dim, reads) = match.node.graph, match.data
    for reader, source, columns in reads:
        made = source
        if not known_equal(value_of(source).shape[dim], len(columns)):
            with graph.inserting_before(reader):
                made = call(graph, aten.slice.Tensor, source, dim, columns.start, columns.stop, like=reader)
        reader.replace_all_uses_with(made)
        refresh(made)
        erase_dead(reader)


# ---- examples --------------------------------------------------------------------------------------------------------

WIDTHS = [64, 32, 32]


def _in_place(x: Any, w: Any, k_scale: Any, v_scale: Any) -> tuple[torch.Tensor, ...]:
    """SGLang's ``set_kv_buffer`` divides k and v, columns of one buffer, where they are."""
    q, k, v = (x @ w).split(WIDTHS, -1)
    k.div_(k_scale)
    v.div_(v_scale)
    return q * 2, k * 2, v * 2


def _of_an_input(x: Any, w: Any, k_scale: Any, v_scale: Any) -> tuple[torch.Tensor, ...]:
    """A copy of what the caller gives, which a functional graph does not need."""
    q, k, _ = x.clone().split([8, 8, 16], -1)
    k.mul_(k_scale)
    return q * v_scale, k * v_scale


def _some_of_it(x: Any, w: Any, k_scale: Any, v_scale: Any) -> torch.Tensor:
    qkv = x @ w
    qkv[:, 64:96] *= k_scale
    return qkv[:, 72:80] * v_scale


def _whole(x: Any, w: Any, k_scale: Any, v_scale: Any) -> torch.Tensor:
    qkv = x @ w
    qkv[:, 64:96] *= k_scale
    return (qkv * v_scale)[:, :32] + qkv[:, 64:96]


def _across(x: Any, w: Any, k_scale: Any, v_scale: Any) -> torch.Tensor:
    qkv = x @ w
    qkv[:, 64:96] *= k_scale
    return qkv[:, 48:80] * v_scale + qkv[:, :32]


def _returned(x: Any, w: Any, k_scale: Any, v_scale: Any) -> tuple[torch.Tensor, ...]:
    qkv = x @ w
    k = qkv[:, 64:96]
    k *= k_scale
    return k * 2, k


def _inputs(device: str) -> tuple[torch.Tensor, ...]:
    x, w = torch.randn(9, 32, device=device), torch.randn(32, sum(WIDTHS), device=device)
    return x, w, torch.tensor(0.5, device=device), torch.tensor(2.0, device=device)


RULE = Rule(
    name="written_columns",
    doc="columns of a buffer that were written in place → what was written",
    anchors=anchors,
    guard=guard,
    replace=replace,
    matches=(
        Example("k_and_v_scaled_in_place", _in_place, _inputs, count=2),
        Example("some_of_what_was_written", _some_of_it, _inputs, count=2),
        Example("copy_of_an_input", _of_an_input, _inputs),
    ),
    near_misses=(
        Example("all_columns", _whole, _inputs, reason="written columns are read together with others"),
        Example("columns_across", _across, _inputs, reason="written columns are read together with others"),
        Example("returned", _returned, _inputs, reason="the buffer that is written is returned"),
    ),
)
