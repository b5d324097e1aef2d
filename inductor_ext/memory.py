"""Which nodes of a graph look at the same memory, and who sees it: asked by every rule that moves, merges or shares something.

A functional graph computes values, and values do not care where they lie. Memory shows in three places:

* *outputs*: a caller may write to one of two results. They may overlap only where they do in eager mode, so two values that are
  both returned, by whatever views, are never made one;
* *graph inputs that are written*: what reads the old bytes comes before the write, what reads the new ones behind it. The list
  of results reads too, and it reads last;
* *an op that writes*: it may not read, by another name, what it writes, since its threads do both at once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx import Node

from inductor_ext.calls import aten, calls
from inductor_ext.graph import is_reshape, value_of

#: What gives a new version of its first argument, which Inductor may make in that one's memory.
_STORES = (
    aten.index_put.default,
    aten._unsafe_index_put.default,
    aten.index_copy.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.as_strided_scatter.default,
    aten.scatter.src,
    aten.copy.default,
)


def is_view(node: Any) -> bool:
    """Whether a node gives a tensor (or several) in the memory of its first argument, or may do so."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return is_view(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.returns:
        return False
    alias = node.target._schema.returns[0].alias_info
    return is_reshape(node) or (alias is not None and not alias.is_write)


def through_views(node: Node) -> Node:
    """The first node above ``node`` that is not a view."""
    while is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def readers(node: Node) -> Iterator[tuple[Node, Node]]:
    """(value, user) for ``node`` and for every view of it; views are users too, and so is the list of results."""
    pending, seen = [node], {node}
    while pending:
        value = pending.pop()
        for user in value.users:
            yield value, user
            if is_view(user) and user.args[0] is value and user not in seen:
                seen.add(user)
                pending.append(user)


def is_returned(node: Node) -> bool:
    """Whether the caller gets the memory of ``node``: itself, or a view of it or of what it is a view of."""
    return any(user.op == "output" for _, user in readers(through_views(node)))


def is_written_back(node: Node) -> bool:
    """Whether ``node``, a new version of a graph input, is the last one: what the input holds in the end."""
    end = through_views(node)
    return any(calls(user, aten.copy_.default) and user.args[0] is written_input(end) for _, user in readers(end))


def may_be_one(a: Node, b: Node) -> bool:
    """Whether equal values ``a`` and ``b`` may share memory: not if both are returned, for a caller may write to either."""
    return a is b or not (is_returned(a) and is_returned(b))


def written_input(node: Any) -> Node | None:
    """The graph input in whose memory ``node`` is or may come to be: a view of it, a version of it, or both."""
    while isinstance(node, Node) and node.op == "call_function":
        if calls(node, operator.getitem) and calls(node.args[0], auto_functionalized_v2):
            bases, results = node.args[0].kwargs["_all_bases"], value_of(node.args[0])
            index = node.args[1] - (len(results) - len(bases))  # the op's own outputs come first
            if index < 0:
                return None
            node = bases[index]
        elif is_view(node) or calls(node, *_STORES):
            node = node.args[0]
        else:
            return None
    return node if isinstance(node, Node) and node.op == "placeholder" else None


def read_by_another_name(inputs: Iterable[Any], written: Iterable[Node]) -> Node | None:
    """The first of an op's ``inputs`` that lies in one of the graph inputs ``written`` by it."""
    written = set(written)
    return next((node for node in inputs if isinstance(node, Node) and written_input(node) in written), None)
