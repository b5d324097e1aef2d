"""Which column of which tensor each column of a node is: slices, halves, pairs, concatenations and signs seen through.

    x.chunk(2, -1)[1]                   columns D/2, D/2 + 1, … of x
    -x[..., 1::2]                       columns 1, 3, … of x, negated
    torch.stack((a, b), -1).flatten(-2) column 0 of a, column 0 of b, column 1 of a, …

`trace` reads a node as a list of `Cell`s, in order, so that two spellings of one rearrangement are one list. It looks through
what moves columns within the last dimensions and keeps every other dimension's elements in their order; anything else is where
a cell comes from. A convert that widens to fp32 changes no number, and is looked through as well.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from inductor_ext.calls import aten, is_call, is_convert
from inductor_ext.graph import value_of

#: Heads are narrower; a list a column is no way to read a matrix.
MAX_COLUMNS = 1024

_NARROW = (torch.bfloat16, torch.float16)


class Cell(NamedTuple):
    """Column ``column`` of ``node``, negated if ``sign`` is -1."""

    node: Node
    column: int
    sign: int = 1


def trace(
    node: Node, stops: Collection[Node] = (), *, wide: bool = True, tail: int = 1
) -> tuple[list[Cell], set[Node]] | None:
    """The cells of ``node``'s last ``tail`` dimensions, and the nodes that were looked through; None if they have no few sizes.

    Nothing is looked for above ``stops``, nor with ``wide=False`` above a convert.
    """
    walk = _Walk(stops, wide)
    found = walk.cells(node, tail)
    return None if found is None else (found, walk.seen)


def above(node: Node) -> Node | None:
    """What `trace` looks at next on the way up from ``node``, where that is one tensor."""
    if is_call(node, operator.getitem) and is_call(
        node.args[0], aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int
    ):
        return node.args[0].args[0]
    if is_call(node, *_ONE_INPUT) or widens(node):
        return node.args[0]
    return None


_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_SAME = (aten.alias.default, aten.clone.default)
_ONE_INPUT = (*_RESHAPES, *_SAME, aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.neg.default)


def widens(node: Node) -> bool:
    """Whether a node converts to fp32 what is narrower, which changes no number."""
    return is_convert(node, torch.float32) and value_of(node.args[0]).dtype in _NARROW


class _Walk:
    def __init__(self, stops: Collection[Node], wide: bool) -> None:
        self.stops, self.wide, self.seen = stops, wide, set[Node]()

    def cells(self, node: Node, tail: int) -> list[Cell] | None:
        """The cells of the last ``tail`` dimensions, in the order of memory."""
        sizes = _sizes(node, tail)
        if sizes is None:
            return None
        before = set(self.seen)
        found = None if node in self.stops else self._through(node, tail, sizes)
        if found is not None:
            self.seen.add(node)
            return found
        self.seen = before
        return [Cell(node, column) for column in range(math.prod(sizes))]

    def _through(self, node: Node, tail: int, sizes: list[int]) -> list[Cell] | None:
        if is_call(node, aten.neg.default):
            found = self.cells(node.args[0], tail)
            return None if found is None else [Cell(each.node, each.column, -each.sign) for each in found]
        if is_call(node, *_SAME) or (self.wide and widens(node)):
            return self.cells(node.args[0], tail)
        if is_call(node, aten.slice.Tensor, aten.select.int):
            return self._taken(node, tail)
        if is_call(node, operator.getitem):
            return self._item(node, tail)
        if is_call(node, aten.cat.default):
            return self._joined(node, tail, sizes)
        if is_call(node, aten.unsqueeze.default):
            dim = node.args[1] % value_of(node).dim()
            inside = dim >= value_of(node).dim() - tail
            return self.cells(node.args[0], tail - 1 if inside and tail > 1 else tail) if tail > 1 or not inside else None
        if is_call(node, *_RESHAPES):
            return self._reshaped(node, sizes)
        return None

    def _reshaped(self, node: Node, sizes: list[int]) -> list[Cell] | None:
        """The last dimensions of what is reshaped that hold the same columns."""
        source = value_of(node.args[0])
        for tail in range(1, source.dim() + 1):
            found = _sizes(node.args[0], tail)
            if found is None or math.prod(found) > math.prod(sizes):
                return None
            if math.prod(found) == math.prod(sizes):
                return self.cells(node.args[0], tail)
        return None

    def _taken(self, node: Node, tail: int) -> list[Cell] | None:
        source = value_of(node.args[0])
        if is_call(node, aten.select.int):
            dim, index = node.args[1] % source.dim(), node.args[2]
            if not isinstance(index, int) or dim < source.dim() - tail - 1:
                return None
            return self._part(node.args[0], tail + 1, dim, lambda size: [index % size])
        given = list(node.args[1:])
        dim, low, high, step = given + [0, None, None, 1][len(given) :]
        if not all(each is None or isinstance(each, int) for each in (dim, low, high, step)) or dim % source.dim() < (
            source.dim() - tail
        ):
            return None
        return self._part(node.args[0], tail, dim % source.dim(), lambda size: list(range(size)[low:high:step]))

    def _item(self, node: Node, tail: int) -> list[Cell] | None:
        many, index = node.args
        if is_call(many, aten.unbind.int):
            source = value_of(many.args[0])
            dim = (many.args[1] if len(many.args) > 1 else 0) % source.dim()
            if dim < source.dim() - tail - 1:
                return None
            found = self._part(many.args[0], tail + 1, dim, lambda size: [index % size])
        elif is_call(many, aten.split.Tensor, aten.split_with_sizes.default):
            x, sizes = many.args[:2]
            dim = (many.args[2] if len(many.args) > 2 else 0) % value_of(x).dim()
            if dim < value_of(x).dim() - tail:
                return None
            found = self._part(x, tail, dim, lambda size: _piece(size, sizes, index))
        else:
            return None
        if found is not None:
            self.seen.add(many)
        return found

    def _part(self, x: Node, tail: int, dim: int, wanted: Any) -> list[Cell] | None:
        """The cells of x's last ``tail`` dimensions at the indices ``wanted(size)`` of ``dim``."""
        sizes = _sizes(x, tail)
        if sizes is None:
            return None
        cells, at = self.cells(x, tail), dim - (value_of(x).dim() - tail)
        indices, inner = wanted(sizes[at]), math.prod(sizes[at + 1 :])
        if cells is None or indices is None:
            return None
        outer = range(0, len(cells), sizes[at] * inner) if sizes[at] * inner else ()
        return [cell for o in outer for i in indices for cell in cells[o + i * inner : o + (i + 1) * inner]]

    def _joined(self, node: Node, tail: int, sizes: list[int]) -> list[Cell] | None:
        dims = value_of(node).dim()
        dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % dims
        if dim < dims - tail:
            return None
        at = dim - (dims - tail)
        outer, parts = math.prod(sizes[:at]), []
        for part in node.args[0]:
            if value_of(part).dim() != dims or value_of(part).dtype is not value_of(node).dtype:
                return None
            cells = self.cells(part, tail)
            if cells is None:
                return None
            parts.append((cells, len(cells) // outer if outer else 0))
        return [cell for o in range(outer) for cells, run in parts for cell in cells[o * run : (o + 1) * run]]


def _sizes(node: Node, tail: int) -> list[int] | None:
    """The last ``tail`` sizes, if they are numbers and few columns."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or not 1 <= tail <= value.dim():
        return None
    sizes = list(value.shape[value.dim() - tail :])
    if not all(isinstance(each, int) for each in sizes) or math.prod(sizes) > MAX_COLUMNS:
        return None
    return sizes


def _piece(size: int, sizes: Any, index: int) -> list[int] | None:
    """The indices that part ``index`` of a split has."""
    if isinstance(sizes, int):
        return list(range(size)[index * sizes : (index + 1) * sizes])
    if not all(isinstance(each, int) for each in sizes):
        return None
    low = sum(sizes[:index])
    return list(range(low, low + sizes[index]))

