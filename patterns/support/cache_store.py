"""Recognise a store into a cache in a functional graph: which buffer is written, through which views, at which rows.

After functionalisation ``kv.unbind(0)[1].view(-1, H, D)[slots] = q`` is a chain of views down from the buffer (the *root*), a
scatter into the last view, and the inverse of every view back up to a new version of the whole buffer (the *top*):

    root → select → reshape → index_put → reshape → select_scatter → top ( → copy_(root, top) at the end of the graph)

`trace` follows both legs. Only the top matters to the rest of the graph; users of the scatter itself get a view of the top.

A row is told by one index, on dimension 0 or, of a cache [H, S, D], on dimension 1; or by two, a block and a row of it, on
dimensions 0 and 1 of [blocks, block, …] or 0 and 2 of [blocks, H, block, D]. Where both are made of one slot by division by the
size of a block, the slot says the same, out of range too: ``slot // block`` wraps and ends where the slot does.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.calls import arguments, aten, calls, is_call
from inductor_ext.graph import call, describe, guarded_equal, known_equal, same_sizes, value_of
from inductor_ext.miss import INDEX_LAYOUT, ROWS_BROADCAST, STORE_ACCUMULATES, Miss

SCATTERS = (aten.index_put.default, aten._unsafe_index_put.default, aten.slice_scatter.default, aten.copy.default)
_VIEWS = (
    aten.reshape.default,
    aten.view.default,
    aten.view.dtype,
    aten.select.int,
    aten.slice.Tensor,
    aten.alias.default,
    aten.permute.default,
)

#: What puts a written view back into the tensor it is a view of.
INVERSES = (
    aten.reshape.default,
    aten.view.default,
    aten.view.dtype,
    aten.alias.default,
    aten.permute.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
)


@dataclasses.dataclass
class Store:
    """``top`` is ``root`` with rows of ``destination`` (a view of root through ``views``, nearest root first) replaced."""

    scatter: Node
    value: Node  # what is stored: [T, …] rows; [H, T, D] where dimension 1 is indexed
    root: Node
    views: list[Node]
    top: Node
    loc: Node | None  # int index of every row, or None for consecutive rows
    mult: Any  # int or node
    offset: Any
    at: Node | None = None  # int index of every row in its block, which loc then is
    dims: tuple[int, ...] = (0,)  # of the destination, that are indexed
    way: list[Node] = dataclasses.field(default_factory=list)  # from the scatter to the top, both left out

    @property
    def one_row(self) -> bool:
        """Whether the value is a single row without the leading dimension, as the tracer leaves it for T = 1."""
        return value_of(self.value).dim() <= value_of(self.scatter).dim() - len(self.dims)

    @property
    def direct(self) -> bool:
        """Whether the cache is written without any view: what stock Inductor does in one kernel."""
        return not self.views

    @property
    def whole(self) -> bool:
        """Whether what is indexed is the buffer as it is, row by row."""
        return self.direct and self.dims == (0,)

    def destination(self) -> torch.Tensor:
        return value_of(self.views[-1] if self.views else self.root)


def trace(scatter: Node) -> Store:
    """The store around a scatter node."""
    destination: Node = scatter.args[0]
    views, root = _down(destination)
    # A copy into a slice is the slice_scatter above it: the rows of that slice.
    value, loc, mult, offset, at, dims = _indexed(scatter) if _is_index_put(scatter) else (*_rows(scatter), None, (0,))
    way = _up(scatter, views)
    return Store(scatter, value, root, views, way[-1], loc, mult, offset, at, dims, way[1:-1])


def _is_view(node: Node) -> bool:
    return is_call(node, *_VIEWS) or (is_call(node, operator.getitem) and is_call(node.args[0], aten.unbind.int))


def _above(view: Node) -> Node:
    """What a view looks at; ``unbind(x)[i]`` looks at x."""
    return view.args[0].args[0] if is_call(view, operator.getitem) else view.args[0]


def _down(destination: Node) -> tuple[list[Node], Node]:
    views: list[Node] = []
    while _is_view(destination):
        views.append(destination)
        destination = _above(destination)
    return list(reversed(views)), destination


#: Dimensions of the destination that an index says something of.
_DIMS = ((0,), (1,), (0, 1), (0, 2))
_INDICES = (
    "one index tensor, of rows, on dimension 0, or on dimension 1 of [H, S, D]; or two, of blocks and of rows in them, on the "
    "first dimensions of [blocks, block, …], or either side of H in [blocks, H, block, D]"
)


def _indexed(scatter: Node) -> tuple[Node, Node, Any, Any, Node | None, tuple[int, ...]]:
    """(value, loc, mult, offset, at, dims) of an ``index_put``."""
    indices, value = scatter.args[1], scatter.args[2]
    accumulate = scatter.args[3] if len(scatter.args) > 3 else scatter.kwargs.get("accumulate", False)
    if accumulate:
        raise Miss(STORE_ACCUMULATES, scatter, "accumulate=False", "accumulate=True")
    dims = tuple(dim for dim, index in enumerate(indices) if index is not None)
    target = value_of(scatter.args[0]).shape
    rest = tuple(size for dim, size in enumerate(target) if dim not in dims)
    heads = 2 if dims in ((1,), (0, 2)) else len(rest)  # what is left of a cache whose heads come before its rows
    given = [indices[dim] for dim in dims]
    if dims not in _DIMS or len(rest) != heads or not all(isinstance(index, Node) for index in given):
        raise Miss(INDEX_LAYOUT, scatter, _INDICES, f"{indices} of {list(target)}")
    if len(dims) == 2 and len(rest) not in (1, 2):
        raise Miss(INDEX_LAYOUT, scatter, "[H, D] or [D] behind blocks and their rows", f"{indices} of {list(target)}")
    first = value_of(given[0])
    for index in map(value_of, given):
        if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64) or not packed(index):
            found = f"{index.dtype} {list(index.shape)} strides {list(index.stride())}"
            raise Miss(INDEX_LAYOUT, scatter, "a 1-d int32 or int64 index, contiguous", found)
        if index.dtype != first.dtype or not guarded_equal(index.shape[0], first.shape[0]):
            found = ", ".join(map(describe, given))
            raise Miss(INDEX_LAYOUT, scatter, "as many indices of blocks as of rows in them, of one dtype", found)
    count, behind = first.shape[0], dims == (1,)
    _check_value(scatter, value, (rest[0], None, rest[1]) if behind else (None, *rest), count)
    slot = _slot(given[0], given[1], target[dims[1]]) if len(dims) == 2 else given[0]
    return (value, given[0], 1, 0, given[1], dims) if slot is None else (value, slot, 1, 0, None, dims)


def _slot(block: Node, row: Node, size: Any) -> Node | None:
    """What ``block`` is the quotient of, and ``row`` the rest, by ``size``, the rows of a block; None where they are not."""
    if not calls(block, aten.div.Tensor_mode) or not is_call(row, aten.remainder.Scalar):
        return None
    of_block = arguments(block)
    slot, divisor = of_block["self"], of_block["other"]
    if of_block["rounding_mode"] != "floor" or row.args[0] is not slot or not isinstance(slot, Node):
        return None
    found, index = value_of(slot), value_of(block)
    if found.dim() != 1 or found.dtype != index.dtype or found.dtype != value_of(row).dtype or not packed(found):
        return None
    sizes = [value_of(each) for each in (divisor, row.args[1])]
    same = all(isinstance(each, (int, torch.SymInt)) and known_equal(each, size) for each in sizes)
    return slot if same else None


def _check_value(scatter: Node, value: Node, wanted: tuple[Any, ...], count: Any) -> None:
    """Miss where ``value`` is not as large as that, with ``count`` rows for None; a single one may lack its dimension."""
    shape = value_of(value).shape
    rows = next(dim for dim, size in enumerate(wanted) if size is None)
    rest = (*wanted[:rows], *wanted[rows + 1 :])
    if known_equal(count, 1) and same_sizes(shape, rest):
        shape = (*shape[:rows], 1, *shape[rows:])
    # The number of rows and of indices are symbols of their own when both are dynamic; eager would broadcast a single row.
    others = (*shape[:rows], *shape[rows + 1 :])
    if len(shape) < 2 or not same_sizes(others, rest) or not guarded_equal(shape[rows], count):
        found = f"{describe(value)} into {list(value_of(scatter.args[0]).shape)}"
        raise Miss(ROWS_BROADCAST, scatter, "[T, …] rows of the cache's own trailing sizes", found)


def _rows(scatter: Node) -> tuple[Node, None, Any, Any]:
    """(value, loc, mult, offset) of a copy, or of a slice along dimension 0."""
    target_shape = value_of(scatter.args[0]).shape
    value: Node = scatter.args[1]
    if is_call(scatter, aten.copy.default):
        mult, offset, count = 1, 0, target_shape[0] if target_shape else 0
    else:
        dim = scatter.args[2] if len(scatter.args) > 2 else 0
        start = scatter.args[3] if len(scatter.args) > 3 else 0
        mult = scatter.args[5] if len(scatter.args) > 5 else 1
        if dim != 0:
            raise Miss(INDEX_LAYOUT, scatter, "a slice of dimension 0", f"a slice of dimension {dim}")
        offset = 0 if start is None else start
        if isinstance(offset, int) and offset < 0:
            raise Miss(INDEX_LAYOUT, scatter, "a slice that starts at or after 0", f"start {offset}")
        count = value_of(value).shape[0] if value_of(value).dim() else 0
    _check_value(scatter, value, (None, *target_shape[1:]), count)
    return value, None, mult, offset


def packed(index: torch.Tensor) -> bool:
    """Whether indices of one dimension lie one after the other, as kernels read them."""
    return known_equal(index.stride(0), 1) or known_equal(index.shape[0], 1)


def _is_index_put(node: Node) -> bool:
    return is_call(node, aten.index_put.default, aten._unsafe_index_put.default)


def _up(scatter: Node, views: list[Node]) -> list[Node]:
    """From the scatter to the new version of the root: the inverse of each view, last view first."""
    way = [scatter]
    for view in reversed(views):
        inverse = next((user for user in way[-1].users if _inverts(user, way[-1], view)), None)
        if inverse is None:
            raise Miss("the view is not written back", scatter, f"the inverse of {describe(view)}", _users(way[-1]))
        way.append(inverse)
    return way


def _users(node: Node) -> str:
    return ", ".join(describe(user) for user in node.users) or "no user"


def _inverts(user: Node, top: Node, view: Node) -> bool:
    above = _above(view)
    if is_call(view, aten.reshape.default, aten.view.default, aten.alias.default):
        return is_call(user, aten.reshape.default, aten.view.default, aten.alias.default) and same_sizes(
            value_of(user).shape, value_of(above).shape
        )
    if is_call(view, aten.permute.default):
        if not is_call(user, aten.permute.default):
            return False
        there, back = ([dim % value_of(view).dim() for dim in each.args[1]] for each in (view, user))
        return [there[dim] for dim in back] == list(range(len(there)))
    if is_call(view, aten.view.dtype):
        return is_call(user, aten.view.dtype) and user.args[1] == value_of(above).dtype
    if is_call(view, aten.slice.Tensor):
        return is_call(user, aten.slice_scatter.default) and user.args[1] is top and list(user.args[2:]) == list(view.args[1:])
    if not is_call(user, aten.select_scatter.default) or user.args[1] is not top:
        return False
    if is_call(view, operator.getitem):
        unbind = view.args[0]
        dim = unbind.args[1] if len(unbind.args) > 1 else 0
        return (user.args[2], user.args[3]) == (dim, view.args[1])
    return (user.args[2], user.args[3]) == (view.args[1], view.args[2])


# ---- writing -----------------------------------------------------------------------------------------------------------


def view_of(graph: Graph, store: Store, root: Node) -> Node:
    """The store's destination as a view of another version of the root."""
    for view in store.views:
        if is_call(view, operator.getitem):
            unbind = view.args[0]
            dim = unbind.args[1] if len(unbind.args) > 1 else 0
            root = call(graph, aten.select.int, root, dim, view.args[1], like=view)
        else:
            root = call(graph, view.target, root, *view.args[1:], like=view)
    return root


def geometry(store: Store, base: torch.Tensor) -> torch.Tensor:
    """The destination as a fake view of ``base``, for its sizes, strides and offset."""
    with base.fake_mode:
        for view in store.views:
            if is_call(view, operator.getitem):
                unbind = view.args[0]
                dim = unbind.args[1] if len(unbind.args) > 1 else 0
                base = base.select(dim, view.args[1])
            else:
                arguments = torch.fx.map_arg(view.args[1:], value_of)
                base = view.target(base, *arguments)
    return base
