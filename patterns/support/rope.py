"""Recognise rotary position embedding (RoPE), and the RMSNorm of each head before it, whatever its spelling.

    by halves    out = x * cos + cat(-x[..., R/2:R], x[..., :R/2]) * sin     for the first R columns; the others are x's
    by pairs     out[2i], out[2i + 1] = x[2i] * cos - x[2i + 1] * sin, x[2i + 1] * cos + x[2i] * sin

    x [B, S, H, D] or [B, H, S, D]; [T, H, D] or [H, T, D]

A rotation is read column by column (`cells`): each column of the result is a column of x times one of cos, plus or minus a
column of x times one of sin, the products and the sum each in one dtype. How halves, pairs and signs are taken and put together
again, before or behind the arithmetic, makes no difference then. Tables have R columns, or R/2 that serve both halves, or both
of a pair. By pairs one table may have both, [..., R/2, 2], cos and sin in turn.

    complex      view_as_real(view_as_complex(x.float(), as pairs) * table), the table complex: by pairs too

Eager mode's complex product rounds its four products, and its sums, in another way on each device: at most one unit in the last
place of fp32 apart from what the kernel does, which rounds each.

cos and sin have one number for each position (and batch) and column: they broadcast over the heads, and where they do tells
which dimension the heads are. Tables in fp32 make the products fp32: the rotation may then begin with a cast to fp32, and its
end be a cast back. Tables of 16 bits beside an x that is cast to fp32 are cast too, which loses nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.calls import CONVERT, aten, is_call, is_convert
from inductor_ext.graph import call, describe, is_reshape, known_equal, same_sizes, value_of
from inductor_ext.memory import is_view
from inductor_ext.miss import DTYPES, Miss, found_or_none, no_other_users
from inductor_ext.patterns.support import cells, rms_norm
from inductor_ext.patterns.support.cells import Cell
from inductor_ext.patterns.support.columns import is_cat_of_columns
from inductor_ext.patterns.support.same import in_order

HALVES = "x * cos + cat(-x[..., R/2:R], x[..., :R/2]) * sin"
PAIRS = "the same with -x[..., 1::2] and x[..., ::2] in turn"
#: Where `trace` may find that a rotation ends.
ANCHORS = (aten.add.Tensor, aten.cat.default, aten.view_as_real.default)

PART_OF_A_HEAD, FIRST_COLUMNS = "only part of a head is rotated", "the first columns of a head, and the others as they are"
NOT_A_ROTATION = "the rotation is not by halves nor by pairs"
COMPLEX, NO_TABLES = "the complex product is not read as a rotation", "cos and sin are not tables of positions"


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
    """cos or sin as [1 or B, S, R or R/2], in the products' dtype: what broadcasts over the heads, less that dimension.

    Both in one are [1 or B, S, R/2, 2], of which a complex ``node`` has no last dimension.
    """

    node: Node
    heads_dim: int  # of a node that has as many dimensions as x; -1 where the table has no such dimension
    batched: bool  # whether a batch dimension is there
    dtype: torch.dtype

    @property
    def value(self) -> torch.Tensor:
        value = value_of(self.node)
        with value.fake_mode:
            value = torch.view_as_real(value) if value.is_complex() else value
            value = value if self.heads_dim < 0 else value.squeeze(self.heads_dim)
            return (value if self.batched else value.unsqueeze(0)).to(self.dtype)

    def put(self, graph: Graph, like: Node) -> Node:
        node = self.node
        if value_of(node).is_complex():
            views = (user for user in node.users if is_call(user, aten.view_as_real.default) and user < like)
            node = next(views, None) or call(graph, aten.view_as_real.default, node, like=like)
        if value_of(node).dtype is not self.dtype:
            made = (user for user in node.users if is_convert(user, self.dtype) and user < like)  # of another layer
            node = next(made, None) or call(graph, CONVERT, node, self.dtype, like=like)
        if self.heads_dim >= 0:
            node = call(graph, aten.squeeze.dim, node, self.heads_dim, like=like)
        return node if self.batched else call(graph, aten.unsqueeze.default, node, 0, like=like)


@dataclasses.dataclass(frozen=True)
class Rope:
    """``end`` is the rotation of ``x``, [B, S, H, D], normalised before if there is a ``norm``.

    Its first ``rotary`` columns are turned: neighbours with each other if ``pairs``, else the two halves of them.
    """

    end: Node
    x: View
    norm: rms_norm.RmsNorm | None
    cos: Table
    sin: Table
    pairs: bool
    rotary: int
    dtype: torch.dtype
    dims: tuple[int, ...]  # permutes x's view (and the result) into the shape of ``end``, without a batch put before it
    inner: frozenset[Node]  # what the rotation alone reads

    @property
    def plain(self) -> bool:
        """Whether it is the halves of whole heads that are turned, by tables of a number for each column."""
        columns = self.x.value.shape[3]
        return not self.pairs and self.rotary == columns and known_equal(self.cos.value.shape[2], columns)

    @property
    def described(self) -> str:
        halved = ", one number of cos for both" if not known_equal(self.cos.value.shape[2], self.rotary) else ""
        return f"{'pairs' if self.pairs else 'halves'} of {self.rotary} columns{halved}"

    @property
    def inputs(self) -> list[Node]:
        weight = [] if self.norm is None else [self.norm.weight]
        return [self.x.node, self.cos.node, self.sin.node, *weight]

    def put_tables(self, graph: Graph) -> tuple[Node, Node]:
        """cos and sin for a call; a table that has both is both."""
        cos = self.cos.put(graph, self.end)
        return cos, cos if self.sin == self.cos else self.sin.put(graph, self.end)

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


def trace(anchor: Node) -> Rope | None:
    """The rotation that ends in an addition or a concatenation, but for views and a cast; None where there is nothing like one.

    Of nested concatenations the outermost that is a rotation counts, and what it joins is none by itself.
    """
    if is_call(anchor, aten.view_as_real.default):
        read = _complex(anchor)
    else:
        read = _real(anchor)
    if read is None:
        return None
    end, found = read
    x, inner = found.x, found.inner
    dtype = value_of(x).dtype
    if value_of(end).dtype is torch.float32 and dtype is not torch.float32 and len(end.users) == 1:
        (user,) = end.users
        if is_convert(user, dtype):
            inner.add(end)
            end = user
    dtypes = [_numbers_of(each) for each in (found.cos, found.sin)]
    known = found.dtype in (dtype, torch.float32) and value_of(end).dtype in (dtype, found.dtype)
    widened = found.dtype is torch.float32 and dtypes[0] in (torch.bfloat16, torch.float16)  # x is, and takes them along
    if not known or dtypes[0] is not dtypes[1] or not (dtypes[0] is found.dtype or widened):
        wanted = "cos and sin of x's dtype, or of float32"
        raise Miss(DTYPES, end, wanted, f"x {dtype}, cos {dtypes[0]}, sin {dtypes[1]}, products {found.dtype}")
    heads, tables = _layout(end, found)
    source, norm = _source(x)
    if norm is not None:
        inner |= {norm.y, x}
    kept = {end, *inner, *(() if norm is None else norm.inner)}
    no_other_users(sorted(inner), kept, "a step of the rotation", "the rotation only")
    for user in end.users:
        if is_cat_of_columns(user):
            raise Miss(PART_OF_A_HEAD, end, FIRST_COLUMNS, describe(user))
    to_rows = _to_rows(value_of(x).dim(), heads)
    view = View(source[0], tuple(source[1][dim] for dim in to_rows))
    rotation = found.pairs, found.rotary, value_of(end).dtype
    return Rope(end, view, norm, *tables, *rotation, to_rows, frozenset(kept - {end}))


def _numbers_of(table: Node) -> torch.dtype:
    """The dtype of the real numbers in a table."""
    dtype = value_of(table).dtype
    return torch.float32 if dtype is torch.complex64 else dtype  # type: ignore[no-any-return]


def _real(anchor: Node) -> tuple[Node, _Read] | None:
    end = _whole(anchor)
    width = _columns(end)
    if width is None or any(found_or_none(trace, outer) for outer in _joins(anchor)):
        return None
    found = _read(end, width)
    return None if found is None else (end, found)


def _complex(real: Node) -> tuple[Node, _Read] | None:
    """The rotation of pairs of columns, as complex numbers, by a complex table; None where no such are multiplied."""
    product: Any = real.args[0]
    sides = product.args[:2] if is_call(product, aten.mul.Tensor) else ()
    if not any(is_call(side, aten.view_as_complex.default) for side in sides):
        return None
    shape = value_of(product).shape
    numbers, table = product.args[:2]
    if not is_call(numbers, aten.view_as_complex.default) or not same_sizes(value_of(numbers).shape, shape):
        numbers, table = table, numbers
    if not is_call(numbers, aten.view_as_complex.default) or not same_sizes(value_of(numbers).shape, shape):
        raise Miss(COMPLEX, product, "heads as complex numbers, of the product's shape", describe(product))
    half = _columns(numbers)
    known = isinstance(table, Node) and value_of(table).dtype is torch.complex64 and not _is_conjugated(table)
    if not known or value_of(product).dtype is not torch.complex64:
        raise Miss(DTYPES, product, "two tensors of complex64, not conjugated", ", ".join(map(describe, sides)))
    if half is None or _columns(table) != half:
        raise Miss(NO_TABLES, product, "one number a position and pair, for all heads", describe(table))
    flattened = _flattened(real, 2 * half)
    if flattened is None:
        wanted = f"its only reader to make rows of {2 * half} columns of it"
        raise Miss(COMPLEX, real, wanted, describe(next(iter(real.users), real)))
    end, inner = flattened
    pairs = x = numbers.args[0]
    while x is not None and (cells.widens(x) or not same_sizes(value_of(x).shape, value_of(end).shape)):
        x = cells.above(x)
    read = None if x is None else cells.trace(pairs, (x,), tail=2)
    if x is None or read is None or read[0] != [Cell(x, column) for column in range(2 * half)]:
        raise Miss(COMPLEX, numbers, f"neighbouring columns of one x as pairs, {list(value_of(end).shape)}", describe(pairs))
    inner |= {real, product, numbers, *read[1]}
    return end, _Read(x, table, table, True, 2 * half, torch.float32, inner - {end, x}, joined=True)


def _is_conjugated(table: Node) -> bool:
    """Whether what is in memory is the conjugate, which has no view as real numbers; Inductor's graphs have copies of such."""
    at: Any = table
    while is_view(at):
        if is_call(at, aten._conj.default):
            return True
        at = at.args[0]
    return False


def _flattened(real: Node, width: int) -> tuple[Node, set[Node]] | None:
    """The view of pairs as ``width`` columns, and what is between, perhaps a cast; None if ``real`` has other readers."""
    at, shape, inner = real, [*value_of(real).shape[:-2], width], set[Node]()
    while len(at.users) == 1:
        (user,) = at.users
        if is_reshape(user) and same_sizes(value_of(user).shape, shape) and not is_call(user, aten.permute.default):
            return user, inner
        if at is not real or not is_call(user, CONVERT):
            break
        inner.add(user)
        at = user
    return None


def anchor_of(total: Node) -> Node:
    """The node that `trace` is asked about a rotation of which ``total`` is a sum: the outermost concatenation of it."""
    joined = _joins(total)
    return anchor_of(joined[0]) if joined else total


def _joins(node: Node) -> list[Node]:
    """Concatenations that ``node`` is a part of, as it is, or cast, or seen through a view."""
    found = list[Node]()
    for user in node.users:
        if is_call(user, aten.cat.default):
            found.append(user)
        elif is_reshape(user) or is_call(user, CONVERT):
            found += _joins(user)
    return found


def _whole(anchor: Node) -> Node:
    """``anchor``; or of a concatenation of pairs, [..., D/2, 2], the view of it as columns."""
    if not is_cat_of_columns(anchor) or value_of(anchor).shape[-1] != 2 or len(anchor.users) != 1:
        return anchor
    (user,) = anchor.users
    return user if is_reshape(user) else anchor


def _columns(x: Node) -> int | None:
    """The last dimension's size, if it is a number."""
    value = value_of(x)
    size = value.shape[-1] if isinstance(value, torch.Tensor) and value.dim() > 0 else None
    return size if isinstance(size, int) else None


# ---- the arithmetic, column by column ----------------------------------------------------------------------------------


@dataclasses.dataclass
class _Read:
    """What is multiplied by what: x and its tables, in whatever shapes the graph has them."""

    x: Node
    cos: Node
    sin: Node
    pairs: bool
    rotary: int
    dtype: torch.dtype  # of products and sums
    inner: set[Node]  # x and ``end`` excluded
    joined: bool = False  # cos and sin are one node: complex, or [..., R/2, 2]


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product that is added, or with ``sign`` -1 subtracted."""

    node: Node
    sign: int

    @property
    def sides(self) -> list[tuple[Node, Node]]:
        one, two = self.node.args[:2]
        return [(one, two), (two, one)] if isinstance(one, Node) and isinstance(two, Node) else []

    @property
    def turns(self) -> bool:
        """Whether one side is a concatenation of which a part is negated."""
        for side, _ in self.sides:
            whole = in_order(side)
            parts = whole.args[0] if is_call(whole, aten.cat.default) else ()
            if len(parts) == 2 and any(is_call(in_order(part), aten.neg.default) for part in parts):
                return True
        return False


@dataclasses.dataclass(frozen=True)
class _Term:
    """One column of a product: column ``own`` of x, and column ``at`` of ``table``, before views of it are seen through."""

    own: int
    sign: int
    table: Node
    at: int


def _read(end: Node, width: int) -> _Read | None:
    """The rotation that the columns of ``end`` are; None where none is meant, and a Miss where it is another one."""
    outside = cells.trace(end)
    if outside is None:
        return None
    columns, inner = outside
    sums = {leaf: _products(leaf) for leaf in dict.fromkeys(cell.node for cell in columns)}
    products = [each for found in sums.values() for each in found]
    if not products or len(columns) != width:
        return None
    for x in _sources(products, end):
        found = _rotation(end, columns, sums, x)
        if found is not None:
            return dataclasses.replace(found, inner=(inner | found.inner) - {end})
    turning = next((each for each in products if each.turns), None)
    if turning is None:
        return None
    raise Miss("what is rotated is not what is multiplied by cos", end, f"one x: {HALVES}", describe(turning.node))


def _products(leaf: Node) -> tuple[_Product, ...]:
    """The two products that ``leaf``, or what it is a cast of, adds or subtracts; none where it does not."""
    total = leaf.args[0] if is_call(leaf, CONVERT) else leaf
    if not is_call(total, aten.add.Tensor, aten.sub.Tensor):
        return ()
    one, two = total.args[:2]  # type: ignore[union-attr]
    if not is_call(one, aten.mul.Tensor) or not is_call(two, aten.mul.Tensor):
        return ()
    return _Product(one, 1), _Product(two, -1 if is_call(total, aten.sub.Tensor) else 1)  # type: ignore[arg-type]


def _sources(products: Sequence[_Product], end: Node) -> list[Node]:
    """What may be x: of ``end``'s shape, on the way up from a product's sides, nearest first, and not widened by a cast."""
    found = dict[Node, None]()
    for at in (side for product in products for side, _ in product.sides):
        while at is not None:
            if same_sizes(value_of(at).shape, value_of(end).shape) and not cells.widens(at):
                found[at] = None
            at = cells.above(at)  # type: ignore[assignment]
    return list(found)


def _rotation(end: Node, columns: list[Cell], sums: dict[Node, tuple[_Product, ...]], x: Node) -> _Read | None:
    """`_read` if it is ``x`` that is rotated; None where it is not."""
    inner, terms, dtypes = set[Node](), dict[Node, list[list[_Term]]](), set[torch.dtype]()
    for leaf, products in sums.items():
        if leaf is x:
            continue
        if not products or not _same_rows(leaf, x):
            return None
        if value_of(leaf).dtype is not value_of(end).dtype:  # a rounding that is widened again
            raise Miss(DTYPES, end, f"sums of {value_of(end).dtype}", describe(leaf))
        inner |= {leaf, leaf.args[0]} if is_call(leaf, CONVERT) else {leaf}  # type: ignore[arg-type]
        for product in products:
            found = _terms(product, x)
            if found is None:
                return None
            terms.setdefault(leaf, []).append(found[0])
            inner |= found[1] | {product.node}
            dtypes.add(value_of(product.node).dtype)
    if all(term.own == term.at for found in terms.values() for each in found for term in each):
        if any(product.turns for products in sums.values() for product in products):
            raise _other(end, "no column that is turned")
        return None
    rotary = sum(cell.node is not x for cell in columns)
    if columns[rotary:] != [Cell(x, column) for column in range(rotary, len(columns))]:
        raise Miss(PART_OF_A_HEAD, end, FIRST_COLUMNS, f"{rotary} of {len(columns)} columns, in another order")
    if len(dtypes) != 1:
        raise Miss(DTYPES, end, "both products in one dtype", " and ".join(sorted(map(str, dtypes))))
    plain, turned = list[_Term](), list[_Term]()
    for column, cell in enumerate(columns[:rotary]):
        one, two = (each[cell.column] for each in terms[cell.node])
        if two.own == column:
            one, two = two, one
        if one.own != column or one.sign != 1 or cell.sign != 1:
            raise _other(end, f"column {column} of x[{one.own}] and x[{two.own}], with signs {one.sign:+} and {two.sign:+}")
        plain.append(one)
        turned.append(two)
    cos, sin = (_table_of(each, rotary, joined=True) for each in (plain, turned))
    joined = cos is not None and sin is not None and cos[0] is sin[0] and _in_turn(cos[2], sin[2])
    if not joined:
        cos, sin = _table_of(plain, rotary), _table_of(turned, rotary)
    if cos is None or sin is None or _columns(cos[0]) != _columns(sin[0]):
        raise _other(end, "tables of other columns")
    by_sin = [(term.own, term.sign * sign) for term, sign in zip(turned, sin[1])]
    pairs = not _pairing(by_sin, pairs=False)
    if (pairs and not _pairing(by_sin, pairs=True)) or any(sign != 1 for sign in cos[1]):
        raise _other(end, f"columns {[term.own for term in turned]} of x times sin, with other signs or in another order")
    whole, half = list(range(rotary)), [column // 2 if pairs else column % (rotary // 2) for column in range(rotary)]
    of_columns = (table[2] == (whole if _columns(table[0]) == rotary else half) for table in (cos, sin))
    if not (pairs if joined else all(of_columns)):
        raise _other(end, "columns of cos and sin in another order")
    return _Read(x, cos[0], sin[0], pairs, rotary, dtypes.pop(), inner, joined)


def _in_turn(cos: list[int], sin: list[int]) -> bool:
    """Whether these are the numbers of a table of cos and sin in turn, one of each for two columns that are neighbours."""
    return cos == [column // 2 * 2 for column in range(len(cos))] and sin == [column + 1 for column in cos]


def _other(end: Node, found: str) -> Miss:
    return Miss(NOT_A_ROTATION, end, f"{HALVES}, or {PAIRS}", found)


def _pairing(turned: list[tuple[int, int]], pairs: bool) -> bool:
    """Whether these columns of x with their signs, one for each column, are what is multiplied by sin."""
    half = len(turned) // 2
    if pairs:
        wanted = [(column ^ 1, 1 if column % 2 else -1) for column in range(len(turned))]
    else:
        wanted = [(column - half, 1) if column >= half else (column + half, -1) for column in range(len(turned))]
    return len(turned) % 2 == 0 and turned == wanted


def _terms(product: _Product, x: Node) -> tuple[list[_Term], set[Node]] | None:
    """The columns of a product of columns of x and of a table, and the nodes between x and it; None where it is none."""
    for side, table in product.sides:
        found = cells.trace(side, (x,))
        if found is None or any(cell.node is not x for cell in found[0]) or _columns(table) != len(found[0]):
            continue
        if _same_rows(side, x) and same_sizes(value_of(side).shape, value_of(product.node).shape):
            terms = [_Term(cell.column, cell.sign * product.sign, table, at) for at, cell in enumerate(found[0])]
            return terms, found[1]
    return None


def _same_rows(a: Node, b: Node) -> bool:
    """Whether only the last dimension may differ: rows of columns are the same rows, and tables broadcast alike."""
    return same_sizes(value_of(a).shape[:-1], value_of(b).shape[:-1])


def _table_of(terms: list[_Term], rotary: int, joined: bool = False) -> tuple[Node, list[int], list[int]] | None:
    """The nearest tensor of ``rotary`` columns or half as many that all terms' tables are of; their signs and columns in it.

    ``joined``: of [..., R/2, 2] instead, whose columns are counted in one row.
    """
    at: Node | None = terms[0].table
    while at is not None:
        shape = value_of(at).shape
        fits = same_sizes(shape[-2:], (rotary // 2, 2)) if joined else _columns(at) in (rotary, rotary // 2)
        if fits and not is_call(at, aten.neg.default):
            seen = {table: cells.trace(table, (at,), wide=False) for table in {term.table for term in terms}}
            of_it = all(each is not None and all(cell.node is at for cell in each[0]) for each in seen.values())
            rows = shape[: -2 if joined else -1]
            if of_it and all(same_sizes(value_of(table).shape[:-1], rows) for table in seen):
                found = [seen[term.table][0][term.at] for term in terms]  # type: ignore[index]
                return at, [cell.sign for cell in found], [cell.column for cell in found]
        at = None if is_call(at, CONVERT) else cells.above(at)
    return None


# ---- the layout --------------------------------------------------------------------------------------------------------


def _layout(end: Node, found: _Read) -> tuple[int, tuple[Table, Table]]:
    """Which dimension of x the heads are, and the tables without it."""
    cos, sin = found.cos, found.sin
    shape = [*value_of(found.x).shape[:-1], _table_sizes(found, cos)[-1]]
    if len(shape) not in (3, 4):
        raise Miss("x is not heads of tokens", end, "3 or 4 dimensions", describe(found.x))
    for heads in (1, 2) if len(shape) == 4 else (1, 0):
        tables = [_table(each, _table_sizes(found, each), shape, heads, found.dtype) for each in (cos, sin)]
        if tables[0] is not None and tables[1] is not None and known_equal(tables[0].value.shape[0], tables[1].value.shape[0]):
            return heads, (tables[0], tables[1])
    wanted = "one number a position and column, for all heads"
    raise Miss(NO_TABLES, end, wanted, f"{describe(cos)} and {describe(sin)}")


def _table_sizes(found: _Read, table: Node) -> list[Any]:
    """Those of a table as far as it has the dimensions of x."""
    value = value_of(table)
    return list(value.shape[:-1] if found.joined and not value.is_complex() else value.shape)


def _table(node: Node, sizes: list[Any], shape: Sequence[Any], heads: int, dtype: torch.dtype) -> Table | None:
    missing = len(shape) - len(sizes)
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
    made = Table(node, heads - missing if heads >= missing else -1, batched and missing == 0, dtype)
    if is_call(node, aten.unsqueeze.default) and made.batched and node.args[1] % value_of(node).dim() == heads:
        return Table(node.args[0], -1, True, dtype)
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
