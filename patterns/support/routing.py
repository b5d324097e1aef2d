"""Recognise how a mixture of experts sorts its rows: expert ids, the sorting permutation and its inverse, masks and group ends.

    ids [T·k]; sorted_ids, perm = sort(ids)                     a row for each expert that a token goes to, sorted by expert
    offs = cumsum(histc(sorted_ids, bins=E, min=0, max=E - 1))  where each expert's rows end
    mask = sorted_ids >= E                                      rows of no expert here: at or past offs[-1]
    inverse[perm] = arange(T·k)                                 from a token's row back to the sorted one

Ids are not negative: an expert is a number from 0 on. Ids of experts that are not here are E and up; they sort to the end, and
histc leaves them out.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import arguments, aten, is_call, is_convert, prims
from inductor_ext.graph import known_equal, same_sizes, value_of
from inductor_ext.patterns.support.same import in_order

INTEGERS = (torch.int64, torch.int32)
#: What holds every expert's number as it is.
_EXACT = (torch.float32, torch.float64, *INTEGERS)
_NOT = (aten.bitwise_not.default, aten.logical_not.default)
#: Comparisons of ids with a number: whether they hold for the experts past it, and how far it is from the first of those.
_COMPARISONS = {
    aten.ge.Scalar: (True, 0),
    aten.gt.Scalar: (True, 1),
    aten.lt.Scalar: (False, 0),
    aten.le.Scalar: (False, 1),
}


@dataclasses.dataclass(frozen=True)
class RowMask:
    """``where(ids >= experts, fill, kept)``: one condition a row, ``ids`` of one dimension."""

    ids: Node
    experts: int
    fill: Any
    kept: Node


def row_mask(node: Node) -> RowMask | None:
    """What ``node``, a where, masks, if its condition is a comparison of one integer a row with a number."""
    if not is_call(node, aten.where.self):
        return None
    condition, true, false = node.args
    shape, given = value_of(node).shape, value_of(condition).shape
    if not given or not known_equal(given[-1], 1) or not same_sizes(given[:-1], shape[:-1]):
        return None
    compared, negated = in_order(condition), False
    while is_call(compared, *_NOT):
        compared, negated = in_order(compared.args[0]), not negated
    if not is_call(compared, *_COMPARISONS) or not isinstance(compared.args[1], int):
        return None
    past, further = _COMPARISONS[compared.target]
    fill, kept = (true, false) if past is not negated else (false, true)
    ids = in_order(compared.args[0])
    alike = same_sizes(value_of(kept).shape, shape) and value_of(kept).dtype is value_of(node).dtype
    if not alike or value_of(ids).dtype not in INTEGERS:
        return None
    return RowMask(ids, compared.args[1] + further, fill, kept)


@dataclasses.dataclass(frozen=True)
class Sorted:
    """``sorted_ids, perm = sort(ids)``, ascending, of one dimension; ``ids`` flat or [T, k]."""

    sort: Node
    ids: Node


def sorted_ids(node: Node) -> Sorted | None:
    """The sort whose values ``node`` is."""
    return _sort(node, 0)


def permutation(node: Node) -> Sorted | None:
    """The sort whose indices ``node`` is."""
    return _sort(node, 1)


def _sort(node: Any, item: int) -> Sorted | None:
    if not is_call(node, operator.getitem) or node.args[1] != item:
        return None
    sort = node.args[0]
    if not is_call(sort, aten.sort.default, aten.sort.stable) or value_of(sort.args[0]).dim() != 1:
        return None
    return None if arguments(sort)["descending"] else Sorted(sort, in_order(sort.args[0]))


def inverse_of(node: Node) -> Sorted | None:
    """The sort whose permutation ``node``, of one dimension, is the inverse of: iota written to the places that this names, or
    what sorts it. Other places may name a row twice, and another one never: they have no inverse."""
    if is_call(node, aten.index_put.default):
        _, indices, values = node.args[:3]
        if arguments(node)["accumulate"]:
            return None
        perm = indices[0]
    elif is_call(node, aten.scatter.src):
        _, _, perm, values = node.args[:4]
    else:
        again = permutation(node)
        return None if again is None else permutation(again.ids)
    counts = is_call(values, prims.iota.default) and values.kwargs["start"] == 0 and values.kwargs["step"] == 1
    alike = same_sizes(value_of(node).shape, value_of(perm).shape) and same_sizes(value_of(values).shape, value_of(perm).shape)
    return permutation(perm) if counts and alike else None


def in_token_order(vector: Node, inverse: Node) -> Node | None:
    """What ``vector[inverse]`` is, ``vector`` having a number for each sorted row, if that is in the graph already."""
    sort = inverse_of(inverse)
    if sort is None:
        return None
    if is_call(vector, aten.index.Tensor) and permutation(vector.args[1][0]) == sort:
        return vector.args[0] if same_sizes(value_of(vector.args[0]).shape, value_of(vector).shape) else None
    return sort.ids if sorted_ids(vector) == sort else None


@dataclasses.dataclass(frozen=True)
class GroupEnds:
    """``cumsum(histc(ids, bins=experts, min=0, max=experts - 1))``: ids in whatever order, each an integer."""

    ids: Node
    experts: int


def group_ends(offs: Node) -> GroupEnds | None:
    """What ``offs`` of a grouped matmul counts."""
    if not is_call(offs, aten.cumsum.default):
        return None
    counts = offs.args[0]
    if not is_call(counts, aten.histc.default):
        return None
    ids, bins, low, high = (arguments(counts)[name] for name in ("self", "bins", "min", "max"))
    while is_convert(ids, *_EXACT):
        ids = ids.args[0]
    if value_of(ids).dtype not in INTEGERS or not isinstance(bins, int) or low != 0 or high != bins - 1:
        return None
    return GroupEnds(in_order(ids), bins)
