"""Recognise a store into a cache in a functional graph: which buffer is written, through which views, at which rows.

After functionalisation ``kv.unbind(0)[1].view(-1, H, D)[slots] = q`` is a chain of views down from the buffer (the *root*), a
scatter into the last view, and the inverse of every view back up to a new version of the whole buffer (the *top*):

    root → select → reshape → index_put → reshape → select_scatter → top ( → copy_(root, top) at the end of the graph)

`trace` follows both legs. Only the top matters to the rest of the graph; users of the scatter itself get a view of the top.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.calls import aten, is_call
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
)

#: What puts a written view back into the tensor it is a view of.
INVERSES = (
    aten.reshape.default,
    aten.view.default,
    aten.view.dtype,
    aten.alias.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
)


@dataclasses.dataclass
class Store:
    """``top`` is ``root`` with rows of ``destination`` (a view of root through ``views``, nearest root first) replaced."""

    scatter: Node
    value: Node  # what is stored: [T, …] rows
    root: Node
    views: list[Node]
    top: Node
    loc: Node | None  # int index of every row, or None for consecutive rows
    mult: Any  # int or node
    offset: Any

    @property
    def one_row(self) -> bool:
        """Whether the value is a single row without the leading dimension, as the tracer leaves it for T = 1."""
        return value_of(self.value).dim() < value_of(self.scatter).dim()

    @property
    def direct(self) -> bool:
        """Whether the cache is written without any view: what stock Inductor does in one kernel."""
        return not self.views

    def destination(self) -> torch.Tensor:
        return value_of(self.views[-1] if self.views else self.root)


def trace(scatter: Node) -> Store:
    """The store around a scatter node."""
    destination: Node = scatter.args[0]
    views, root = _down(destination)
    # A copy into a slice is the slice_scatter above it: the rows of that slice.
    value, loc, mult, offset = _rows(scatter)
    top = _up(scatter, views)
    return Store(scatter, value, root, views, top, loc, mult, offset)


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


def _rows(scatter: Node) -> tuple[Node, Node | None, Any, Any]:
    """(value, loc, mult, offset) of a scatter along dimension 0."""
    target_shape = value_of(scatter.args[0]).shape
    value: Node = scatter.args[1] if not _is_index_put(scatter) else scatter.args[2]
    if _is_index_put(scatter):
        indices = scatter.args[1]
        accumulate = scatter.args[3] if len(scatter.args) > 3 else scatter.kwargs.get("accumulate", False)
        if accumulate:
            raise Miss(STORE_ACCUMULATES, scatter, "accumulate=False", "accumulate=True")
        if len(indices) != 1 or not isinstance(indices[0], Node):
            raise Miss(INDEX_LAYOUT, scatter, "one index tensor, of rows, on dimension 0", str(indices))
        index = value_of(indices[0])
        if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64) or not packed(index):
            found = f"{index.dtype} {list(index.shape)} strides {list(index.stride())}"
            raise Miss(INDEX_LAYOUT, scatter, "a 1-d int32 or int64 index, contiguous", found)
        rows: tuple[Node | None, Any, Any] = (indices[0], 1, 0)
        count = index.shape[0]
    elif is_call(scatter, aten.copy.default):
        rows, count = (None, 1, 0), target_shape[0] if target_shape else 0
    else:
        dim = scatter.args[2] if len(scatter.args) > 2 else 0
        start = scatter.args[3] if len(scatter.args) > 3 else 0
        step = scatter.args[5] if len(scatter.args) > 5 else 1
        if dim != 0:
            raise Miss(INDEX_LAYOUT, scatter, "a slice of dimension 0", f"a slice of dimension {dim}")
        start = 0 if start is None else start
        if isinstance(start, int) and start < 0:
            raise Miss(INDEX_LAYOUT, scatter, "a slice that starts at or after 0", f"start {start}")
        rows, count = (None, step, start), value_of(value).shape[0] if value_of(value).dim() else 0
    shape = value_of(value).shape
    if known_equal(count, 1) and same_sizes(shape, target_shape[1:]):
        shape = (1, *shape)
    # The number of rows and of indices are symbols of their own when both are dynamic; eager would broadcast a single row.
    if len(shape) < 2 or not same_sizes(shape[1:], target_shape[1:]) or not guarded_equal(shape[0], count):
        found = f"{describe(value)} into {list(target_shape)}"
        raise Miss(ROWS_BROADCAST, scatter, "[T, …] rows of the cache's own trailing sizes", found)
    return value, *rows


def packed(index: torch.Tensor) -> bool:
    """Whether indices of one dimension lie one after the other, as kernels read them."""
    return known_equal(index.stride(0), 1) or known_equal(index.shape[0], 1)


def _is_index_put(node: Node) -> bool:
    return is_call(node, aten.index_put.default, aten._unsafe_index_put.default)


def _up(scatter: Node, views: list[Node]) -> Node:
    """The new version of the root: follow the inverse of each view, last view first."""
    top = scatter
    for view in reversed(views):
        inverse = next((user for user in top.users if _inverts(user, top, view)), None)
        if inverse is None:
            raise Miss("the view is not written back", scatter, f"the inverse of {describe(view)}", _users(top))
        top = inverse
    return top


def _users(node: Node) -> str:
    return ", ".join(describe(user) for user in node.users) or "no user"


def _inverts(user: Node, top: Node, view: Node) -> bool:
    above = _above(view)
    if is_call(view, aten.reshape.default, aten.view.default, aten.alias.default):
        return is_call(user, aten.reshape.default, aten.view.default, aten.alias.default) and same_sizes(
            value_of(user).shape, value_of(above).shape
        )
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
