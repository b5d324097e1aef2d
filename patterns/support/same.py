"""Whether two nodes of a graph hold the same values: compared node by node, down to what they share.

Only operators that are deterministic, have no side effects and are cheap to compare count: what quantising an activation and
viewing a tensor are made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import CONVERT, aten
from inductor_ext.graph import RESHAPES, known_equal, same_sizes, value_of

PURE = frozenset(
    {
        CONVERT,
        aten.abs.default,
        aten.amax.default,
        aten.amin.default,
        aten.max.default,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.reciprocal.default,
        aten.clamp_min.default,
        aten.clamp_min.Tensor,
        aten.clamp_max.default,
        aten.clamp_max.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.full.default,
        aten.log2.default,
        aten.ceil.default,
        aten.floor.default,
        aten.sub.Tensor,
        aten.neg.default,
        aten.exp2.default,
        *RESHAPES,
    }
)

#: Reshapes that keep the order of the elements: what such a chain gives depends on its input and its last shape only.
IN_ORDER = RESHAPES - {aten.permute.default}


def is_pure(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in PURE


def root(node: Node) -> Node:
    """The first node that is not pure on the way up through first inputs: nodes of the same value have the same root."""
    while is_pure(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def input_pairs(a: Node, b: Node) -> Iterator[tuple[Node, Node]]:
    yield from zip(a.all_input_nodes, b.all_input_nodes)


def same_value(a: Node, b: Node) -> bool:
    """Whether two nodes are one, or the same pure operators on the same values."""
    if a is b:
        return True
    if not is_pure(a) or not is_pure(b) or a.target != b.target:
        return False
    if len(a.all_input_nodes) != len(b.all_input_nodes):
        return False
    names = dict(input_pairs(a, b))
    renamed = torch.fx.map_arg((a.args, a.kwargs), lambda n: names[n])
    return str(renamed) == str((b.args, b.kwargs)) and all(same_value(*pair) for pair in input_pairs(a, b))


def in_order(node: Node) -> Node:
    """The first node above ``node`` that is not a reshape which keeps the elements' order."""
    return way_in_order(node)[0]


def way_in_order(node: Node) -> tuple[Node, list[Node]]:
    """`in_order`, and the reshapes that lead from it to ``node``, the last one first."""
    way = []
    while isinstance(node, Node) and node.op == "call_function" and node.target in IN_ORDER:
        way.append(node)
        node = node.args[0]
    return node, way


def same_elements(a: Node, b: Node) -> bool:
    """Whether two nodes hold the same elements in the same order, whatever their shapes: unsqueeze and reshape are one."""
    return known_equal(value_of(a).numel(), value_of(b).numel()) and same_value(in_order(a), in_order(b))


def same_tensor(a: Node, b: Node) -> bool:
    """`same_elements` in the same shape."""
    return a is b or (same_sizes(value_of(a).shape, value_of(b).shape) and same_elements(a, b))
