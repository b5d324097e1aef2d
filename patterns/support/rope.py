"""Recognise rotate-half RoPE, and the RMSNorm of each head before it, above an addition.

    out = x * cos + cat(-x[..., D/2:], x[..., :D/2]) * sin            x [B, H, S, D] or [B, S, H, D]; [T, H, D] or [H, T, D]

cos and sin have one number for each position (and batch) and column: they broadcast over the heads, and where they do tells
which dimension the heads are. Tables in fp32 make the products fp32: the rotation may then begin with a cast to fp32, and its
end be a cast back.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.calls import CONVERT, aten, is_call
from inductor_ext.graph import call, describe, known_equal, value_of
from inductor_ext.miss import DTYPES, Miss, no_other_users
from inductor_ext.patterns.support import rms_norm
from inductor_ext.patterns.support.columns import is_cat_of_columns
from inductor_ext.patterns.support.same import in_order

HALVES = "cat(-x[..., D/2:], x[..., :D/2])"


@dataclasses.dataclass(frozen=True)
class View:
    """``node.permute(dims)``, with a batch of one put before it where there is none."""

    node: Node
    dims: tuple[int, ...]

    @property
    def value(self) -> torch.Tensor:
        value = value_of(self.node)
        with value.fake_mode:
            value = value.permute(self.dims)
            return value if value.dim() == 4 else value.unsqueeze(0)

    def put(self, graph: Graph, like: Node) -> Node:
        node = self.node
        if self.dims != tuple(sorted(self.dims)):
            node = call(graph, aten.permute.default, node, list(self.dims), like=like)
        return node if len(self.dims) == 4 else call(graph, aten.unsqueeze.default, node, 0, like=like)


@dataclasses.dataclass(frozen=True)
class Table:
    """cos or sin as [1 or B, S, D]: what broadcasts over the heads, less that dimension."""

    node: Node
    heads_dim: int  # of a node that has as many dimensions as x; -1 where the table has no such dimension
    batched: bool  # whether a batch dimension is there

    @property
    def value(self) -> torch.Tensor:
        value = value_of(self.node)
        with value.fake_mode:
            value = value if self.heads_dim < 0 else value.squeeze(self.heads_dim)
            return value if self.batched else value.unsqueeze(0)

    def put(self, graph: Graph, like: Node) -> Node:
        node = self.node
        if self.heads_dim >= 0:
            node = call(graph, aten.squeeze.dim, node, self.heads_dim, like=like)
        return node if self.batched else call(graph, aten.unsqueeze.default, node, 0, like=like)


@dataclasses.dataclass(frozen=True)
class Rope:
    """``end`` is the rotation of ``x``, [B, S, H, D], normalised before if there is a ``norm``."""

    end: Node
    x: View
    norm: rms_norm.RmsNorm | None
    cos: Table
    sin: Table
    dtype: torch.dtype
    dims: tuple[int, ...]  # permutes x's view (and the result) into the shape of ``end``, without a batch put before it
    inner: frozenset[Node]  # what the rotation alone reads

    @property
    def inputs(self) -> list[Node]:
        weight = [] if self.norm is None else [self.norm.weight]
        return [self.x.node, self.cos.node, self.sin.node, *weight]

    def put_result(self, graph: Graph, out: Node) -> Node:
        if len(self.dims) == 3:
            out = call(graph, aten.squeeze.dim, out, 0, like=self.end)
        if self.dims == tuple(sorted(self.dims)):
            return out
        return call(graph, aten.permute.default, out, list(self.dims), like=self.end)

    @property
    def turned(self) -> torch.Tensor:
        """The fake of ``end`` as [B, S, H, D]."""
        return View(self.end, self.dims).value

    @property
    def result(self) -> torch.Tensor:
        """What `put_result` gives, as a fake."""
        value = self.x.value
        with value.fake_mode:
            out = value.new_empty(value.shape, dtype=self.dtype)
            return (out.squeeze(0) if len(self.dims) == 3 else out).permute(self.dims)


def trace(add: Node) -> Rope | None:
    """The rotation that ends in ``add``; None where there is nothing like one."""
    found = _terms(add)
    if found is None:
        return None
    plain, turned, joined, sin = found
    halves = _halves(joined)
    if halves is None:
        raise Miss("the rotation is not by halves", joined, HALVES, describe(joined))
    x, inner = halves
    cos = next((other for one, other in (plain.args[:2], plain.args[1::-1]) if one is x), None)
    if not isinstance(cos, Node):
        raise Miss("what is rotated is not what is multiplied by cos", plain, describe(x), describe(plain))
    inner = [*inner, joined, turned, plain]
    end, rotated, x_or_wide = add, value_of(add).dtype, x
    if is_call(x, CONVERT) and x.args[1] is torch.float32:
        inner.append(x)
        x = x.args[0]
    dtype = value_of(x).dtype
    if rotated is torch.float32 and dtype is not rotated and len(add.users) == 1:
        (user,) = add.users
        if is_call(user, CONVERT) and user.args[1] is dtype:
            inner.append(add)
            end = user
    dtypes = [value_of(each).dtype for each in (cos, sin)]
    if dtypes != [rotated] * 2 or rotated not in (dtype, torch.float32) or value_of(x_or_wide).dtype not in (dtype, rotated):
        wanted = "cos and sin of x's dtype, or of float32"
        raise Miss(DTYPES, end, wanted, f"x {dtype}, cos {dtypes[0]}, sin {dtypes[1]}, products {rotated}")
    heads, tables = _layout(end, x, cos, sin)
    source, norm = _source(x)
    if norm is not None:
        inner += [norm.y, x]
    kept = {end, *inner, *(() if norm is None else norm.inner)}
    no_other_users(inner, kept, "a step of the rotation", "the rotation only")
    for user in end.users:
        if is_cat_of_columns(user):
            raise Miss("only part of a head is rotated", end, "all columns of a head", describe(user))
    to_rows = _to_rows(value_of(x).dim(), heads)
    view = View(source[0], tuple(source[1][dim] for dim in to_rows))
    return Rope(end, view, norm, *tables, value_of(end).dtype, to_rows, frozenset(kept - {end}))


def _terms(add: Node) -> tuple[Node, Node, Node, Node] | None:
    """x * cos, turned * sin, turned and sin of an addition that looks like a rotation: turned is joined of a negation."""
    if not is_call(add, aten.add.Tensor) or add.kwargs.get("alpha", 1) != 1:
        return None
    for plain, product in (add.args[:2], add.args[1::-1]):
        if not is_call(plain, aten.mul.Tensor) or not is_call(product, aten.mul.Tensor):
            continue
        for joined, sin in (product.args[:2], product.args[1::-1]):
            if not isinstance(joined, Node) or not isinstance(sin, Node):
                continue
            whole = in_order(joined)
            if not is_call(whole, aten.cat.default) or len(whole.args[0]) != 2:
                continue
            if any(is_call(in_order(part), aten.neg.default) for part in whole.args[0]):
                return plain, product, joined, sin
    return None


def _halves(joined: Node) -> tuple[Node, list[Node]] | None:
    """x and the nodes from it, of ``joined = cat(-x[..., D/2:], x[..., :D/2])``."""
    if not is_cat_of_columns(joined):
        return None
    negated, low = joined.args[0]
    if not is_call(negated, aten.neg.default):
        return None
    high = negated.args[0]
    one, two = _half(high), _half(low)
    if one is None or two is None or one[0] is not two[0] or (one[1], two[1]) != (1, 0):
        return None
    return one[0], [negated, high, low, *one[2], *two[2]]


def _half(node: Any) -> tuple[Node, int, list[Node]] | None:
    """x, which half of its columns ``node`` is (0 or 1), and the nodes between them."""
    if is_call(node, aten.slice.Tensor):
        given = list(node.args[1:])
        dim, start, end, step = given + [0, 0, None, 1][len(given) :]
        columns = _columns(node.args[0], dim)
        if columns is None or columns % 2 or not all(isinstance(each, int | None) for each in (start, end)) or step != 1:
            return None
        bounds = range(columns)[start:end]
        for index in (0, 1):
            if bounds == range(columns)[index * columns // 2 : (index + 1) * columns // 2]:
                return node.args[0], index, []
        return None
    if is_call(node, operator.getitem) and is_call(node.args[0], aten.split.Tensor, aten.split_with_sizes.default):
        split = node.args[0]
        x, sizes = split.args[:2]
        columns = _columns(x, split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0))
        if columns is not None and columns % 2 == 0 and sizes in (columns // 2, [columns // 2] * 2):
            return x, node.args[1], [split]
    return None


def _columns(x: Node, dim: int) -> int | None:
    """The last dimension's size, if it is ``dim`` and a number."""
    value = value_of(x)
    last = value.dim() - 1
    return value.shape[last] if dim in (last, -1) and isinstance(value.shape[last], int) else None


def _layout(end: Node, x: Node, cos: Node, sin: Node) -> tuple[int, tuple[Table, Table]]:
    """Which dimension of ``x`` the heads are, and the tables without it."""
    shape = value_of(x).shape
    if len(shape) not in (3, 4):
        raise Miss("x is not heads of tokens", end, "3 or 4 dimensions", describe(x))
    for heads in (1, 2) if len(shape) == 4 else (1, 0):
        tables = [_table(each, shape, heads) for each in (cos, sin)]
        if tables[0] is not None and tables[1] is not None and known_equal(tables[0].value.shape[0], tables[1].value.shape[0]):
            return heads, (tables[0], tables[1])
    wanted = "one number a position and column, for all heads"
    raise Miss("cos and sin are not tables of positions", end, wanted, f"{describe(cos)} and {describe(sin)}")


def _table(node: Node, shape: Sequence[Any], heads: int) -> Table | None:
    sizes, missing = list(value_of(node).shape), len(shape) - value_of(node).dim()
    if missing < 0:
        return None
    padded = [1] * missing + sizes
    tokens = len(shape) - 2 if heads != len(shape) - 2 else heads - 1
    batched = len(shape) == 4
    wanted = {heads: 1, len(shape) - 1: shape[-1], tokens: shape[tokens]}
    if not all(known_equal(padded[dim], size) for dim, size in wanted.items()):
        return None
    if batched and not known_equal(padded[0], 1) and not known_equal(padded[0], shape[0]):
        return None
    made = Table(node, heads - missing if heads >= missing else -1, batched and missing == 0)
    if is_call(node, aten.unsqueeze.default) and made.batched and node.args[1] % len(shape) == heads:
        return Table(node.args[0], -1, True)
    return made


def _source(x: Node) -> tuple[tuple[Node, tuple[int, ...]], rms_norm.RmsNorm | None]:
    """What ``x`` is computed from as (node, dims): the permutation of the node that has x's shape; and the norm between."""
    same = tuple(range(value_of(x).dim()))
    y, dims = _permuted(x, same)
    for each, order in ((x, same), (y, dims)):
        norm = rms_norm.trace(each)
        if norm is not None:
            return _permuted(norm.total, order), norm
    return (y, dims), None


def _permuted(node: Node, dims: tuple[int, ...]) -> tuple[Node, tuple[int, ...]]:
    """``node.permute(dims)`` with a permutation that makes ``node`` merged into it, if rows stay rows."""
    if not is_call(node, aten.permute.default):
        return node, dims
    inner = [dim % len(dims) for dim in node.args[1]]
    return (node.args[0], tuple(inner[dim] for dim in dims)) if inner[-1] == len(dims) - 1 else (node, dims)


def _to_rows(ndim: int, heads: int) -> tuple[int, ...]:
    """The permutation to [B, S, H, D] or [T, H, D], and back: it is its own inverse."""
    if ndim == 4:
        return (0, 2, 1, 3) if heads == 1 else (0, 1, 2, 3)
    return (0, 1, 2) if heads == 1 else (1, 0, 2)
