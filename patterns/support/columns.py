"""Put column slices of one buffer where several matrices were: what may read them, and what has to follow.

A slice ``buffer[:, lo:hi]`` holds the same numbers as the matrix it replaces, with rows further apart. Pointwise code,
reductions, attention and matrix products read it as it is. `check` finds those users that would copy it or go wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.calls import aten, is_call
from inductor_ext.graph import call, describe, erase_dead, known_equal, value_of
from inductor_ext.memory import is_returned, readers
from inductor_ext.miss import Miss
from inductor_ext.patterns.support.same import PURE, in_order
from inductor_ext.patterns.support.strides import refresh

#: Higher-order operators that take any strides. The others may hold what was traced with the strides of eager: a user's Triton
#: kernel was given them as numbers.
_STRIDED = frozenset({"flex_attention"})

#: What may be done to a weight or a scale on the way to a product; moving it up changes nothing.
_MOVABLE = PURE | {aten.slice.Tensor, aten.select.int, aten.t.default, aten.transpose.int, aten.expand.default}


def check(matrix: Node, forced: bool, width: Any = None) -> None:
    """Miss where a user keeps ``matrix`` from being a column slice; ``forced`` takes what is merely slower.

    ``width``: how many elements a row has, where ``matrix`` is a view with more dimensions than two.
    """
    width = value_of(matrix).shape[1] if width is None else width
    for reached, user in readers(matrix):
        if user.op == "output":
            if not forced:
                wanted = "a product used inside the graph only: Inductor would copy a column slice before returning it"
                raise Miss("a sibling is returned to the caller", matrix, wanted, f"{describe(reached)} among the outputs")
        elif _reads_by_strides(user):
            raise Miss("a user reads it by strides", matrix, "users that take any row stride", describe(user))
        elif forced:
            continue
        elif not _any_strides(user.target):
            wanted = "PyTorch's operators as users: others get the strides they had in eager, by a copy"
            raise Miss("a user is not one of PyTorch's operators", matrix, wanted, describe(user))
        elif _merges_rows(matrix, user, width):
            shape = list(value_of(user).shape)
            wanted = "views that keep the columns apart from the rows"
            raise Miss("a user merges its rows: a column slice would be copied", matrix, wanted, f"a view as {shape}")


def may_be_columns(matrix: Node, forced: bool, width: Any = None) -> bool:
    """Whether `check` finds nothing."""
    try:
        check(matrix, forced, width)
    except Miss:
        return False
    return True


def _reads_by_strides(user: Node) -> bool:
    if isinstance(user.target, torch._ops.HigherOrderOperator):
        return user.target.name() not in _STRIDED
    return is_call(user, aten.as_strided.default)


def _any_strides(target: Any) -> bool:
    return not isinstance(target, torch._ops.OpOverload) or target.namespace in ("aten", "prims", "inductor_ext")


def _merges_rows(matrix: Node, user: Node, row: Any) -> bool:
    """Whether ``user`` is a reshape of ``matrix`` in which no dimension begins where a row, of ``row`` elements, does."""
    if in_order(user) is not matrix or user is matrix:
        return False
    width: Any = 1
    for size in reversed(value_of(user).shape):
        if known_equal(width, row):
            return False
        width = width * size
    return not known_equal(width, row)


def hoist(node: Node | None, above: Node, move: bool) -> Node | None:
    """Whether ``node`` can be computed before ``above``, and with ``move`` do so. Gives the first node that cannot, or None."""
    if node is None or node < above:
        return None
    if node.op != "call_function" or node.target not in _MOVABLE:
        return node
    for needed in node.all_input_nodes:
        stuck = hoist(needed, above, move)
        if stuck is not None:
            return stuck
    if move:
        above.prepend(node)
    return None


def floor(node: Node) -> Node:
    """The last node that has to be there before ``node`` can be computed, once all that may be moved up is."""
    if node.op != "call_function" or node.target not in _MOVABLE:
        return node
    return max(map(floor, node.all_input_nodes), default=node)


def behind(needed: Iterable[Node], place: Node) -> list[Node]:
    """What ``needed`` is computed with and stands behind ``place``, itself behind each one's `floor`: in order, to be moved."""
    found, pending = set[Node](), list(needed)
    while pending:
        node = pending.pop()
        if node > place and node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return sorted(found)


def split(graph: Graph, buffer: Node, matrices: Sequence[Node]) -> None:
    """Let users of ``matrices``, side by side in ``buffer``, read their columns of it, and those of all of them all of it."""
    parts: list[Node] = []
    low = 0
    for matrix in matrices:
        high = low + value_of(matrix).shape[1]
        with graph.inserting_after(parts[-1] if parts else buffer):
            parts.append(call(graph, aten.slice.Tensor, buffer, 1, low, high, like=matrix))
        low = high
    for matrix, part in zip(matrices, parts):
        matrix.replace_all_uses_with(part)
        erase_dead(matrix)
    for whole in [user for user in parts[0].users if _joins(user, parts)]:
        if is_returned(whole) and any(map(is_returned, parts)):
            continue  # a caller may write to either
        whole.replace_all_uses_with(buffer)
        erase_dead(whole)
    refresh(buffer)
    for part in parts:
        erase_dead(part)


def _joins(user: Node, parts: Sequence[Node]) -> bool:
    """Whether ``user`` is the concatenation of all parts in their order: the buffer itself."""
    return is_cat_of_columns(user) and list(user.args[0]) == list(parts)


def taken(node: Node) -> range | None:
    """Which columns a slice takes; None where ``node`` is no slice of the last dimension, or its ends are not numbers."""
    if not is_call(node, aten.slice.Tensor):
        return None
    given = list(node.args[1:])
    dim, low, high, step = given + [0, 0, None, 1][len(given) :]
    whole = value_of(node.args[0])
    width, numbers = whole.shape[-1], all(each is None or isinstance(each, int) for each in (low, high, step))
    if dim not in (-1, whole.dim() - 1) or step != 1 or not numbers or not isinstance(width, int):
        return None
    return range(width)[low:high]


def is_cat_of_columns(node: Any) -> bool:
    """Whether a node concatenates along the last dimension."""
    if not is_call(node, aten.cat.default):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return isinstance(dim, int) and dim in (-1, value_of(node).dim() - 1)
