"""Prove what an attention mask allows, from the positions that it is computed from, without building it.

    read(bias)  →  Band(left, right): key j is allowed for query i where i - left <= j <= i + right;  None is no bound

A mask is ``where(allowed, 0, very negative)``; ``allowed`` is computed from ``iota``s and numbers. Each integer in it is
followed as an affine function of its own indices (`Affine`), each boolean as the inequalities of its indices that have to hold
(`Allowed`): ``le(iota_j, iota_i)`` is j - i <= 0. Nothing has a length in it, so that symbolic sizes are no matter, and the
[S, S] mask is never evaluated. What transformers derives from ``position_ids = iota`` to tell packed sequences apart, a
difference, a cumsum and a gather, is affine as well: a constant, so that its equality holds everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import CONVERT, aten, calls, is_call, is_convert, prims
from inductor_ext.graph import RESHAPES, constant_of, describe, known_equal, value_of
from inductor_ext.miss import Miss

#: A bias at most this (float16's lowest number) hides a key: exp of it is 0 beside any score that attention meets.
HIDDEN = -65504.0


@dataclasses.dataclass(frozen=True)
class Band:
    """Keys from ``i - left`` to ``i + right`` are allowed for query i; None is no bound."""

    left: int | None = None
    right: int | None = None

    def and_(self, other: Band) -> Band:
        bounds = [[b for b in pair if b is not None] for pair in ((self.left, other.left), (self.right, other.right))]
        return Band(*(min(each, default=None) for each in bounds))


@dataclasses.dataclass(frozen=True)
class Affine:
    """``Σ factors[d] · index[d] + const`` at every index of a tensor. The factor of a dimension of size 1 is 0."""

    factors: tuple[int, ...]
    const: int = 0

    @property
    def constant(self) -> bool:
        return not any(self.factors)

    def times(self, number: int) -> Affine:
        return Affine(tuple(number * factor for factor in self.factors), number * self.const)

    def plus(self, other: Affine) -> Affine:
        rank = max(len(self.factors), len(other.factors))
        pairs = zip(_padded(self.factors, rank), _padded(other.factors, rank))
        return Affine(tuple(a + b for a, b in pairs), self.const + other.const)

    @property
    def never_positive(self) -> bool:
        """Whether it is <= 0 at every index; indices are not negative."""
        return self.const <= 0 and all(factor <= 0 for factor in self.factors)


@dataclasses.dataclass(frozen=True)
class Allowed:
    """True where every one of ``least`` is <= 0; the contrary if ``negated``."""

    least: tuple[Affine, ...]
    rank: int
    negated: bool = False

    def negate(self) -> Allowed:
        return _allowed(self.least, self.rank, not self.negated)

    @property
    def known(self) -> bool | None:
        """True or False where it is that everywhere."""
        if not self.least:
            return not self.negated
        if any(each.constant and each.const > 0 for each in self.least):
            return self.negated
        return None


def _allowed(least: Sequence[Affine], rank: int, negated: bool = False) -> Allowed:
    kept = tuple(each for each in dict.fromkeys(least) if not each.never_positive)
    if negated and len(kept) == 1:
        return _allowed((_contrary(kept[0]),), rank)
    return Allowed(kept, rank, negated)


def _contrary(each: Affine) -> Affine:
    """Of integers: not (x <= 0) is 1 - x <= 0."""
    return each.times(-1).plus(Affine((), 1))


class _Unknown(Exception):
    """A part of the mask that is no function of positions alone: ``node``; ``packed``: compared for equality with another."""

    def __init__(self, node: Node, packed: bool = False) -> None:
        super().__init__(node.name)
        self.node, self.packed = node, packed


def read(bias: Node, assumed: Mapping[Node, Affine] | None = None) -> Band:
    """What the additive mask ``bias`` [..., query, key] allows; ``assumed`` is what is known of graph inputs."""
    try:
        return _band(_Reader(bias, assumed).mask(bias), bias)
    except _Unknown as unknown:
        node = unknown.node
        given = node.op in ("placeholder", "get_attr")
        if given and unknown.packed:
            wanted = 'positions that the model makes itself; packed sequences: attn_implementation="inductor_ext"'
            raise Miss("the mask tells packed sequences of a graph input apart", bias, wanted, describe(node)) from None
        if given:
            raise Miss("the mask depends on a graph input", bias, "a mask of positions alone", describe(node)) from None
        wanted = "where(comparisons of iotas, 0, -inf)"
        raise Miss("the bias is not a mask of positions", bias, wanted, describe(node)) from None


def positions(node: Node, assumed: Mapping[Node, Affine] | None = None) -> Affine | None:
    """The integer tensor ``node`` as a function of its indices; None where it is none."""
    try:
        return _Reader(node, assumed).integer(node)
    except _Unknown:
        return None


def _band(mask: Allowed, bias: Node) -> Band:
    """A conjunction of inequalities, each of key - query or nothing."""
    if mask.negated and mask.known is None:
        raise Miss("the mask is no band", bias, "a conjunction of bounds", "a disjunction")
    band = Band()
    for each in mask.least:
        *batch, query, key = _padded(each.factors, max(2, len(each.factors)))
        if any(batch) or query != -key or abs(key) != 1:
            found = f"{_text(each)} <= 0"
            raise Miss("the mask is no band", bias, "bounds of key - query, the same for every sequence and head", found)
        band = band.and_(Band(right=-each.const) if key == 1 else Band(left=-each.const))
    if any(bound is not None and bound < 0 for bound in (band.left, band.right)) or mask.known is False:
        raise Miss("the mask hides a token from itself", bias, "a band with the diagonal in it", str(band))
    return band


def _text(each: Affine) -> str:
    names = ["batch", "head", "query", "key"][-len(each.factors) :]
    return " + ".join([f"{factor}·{name}" for factor, name in zip(each.factors, names) if factor] + [str(each.const)])


# ---- the walk --------------------------------------------------------------------------------------------------------

_COMPARISONS: dict[str, Callable[[Affine], tuple[Affine, ...]]] = {  # of left - right, with integers
    "le": lambda d: (d,),
    "lt": lambda d: (d.plus(Affine((), 1)),),
    "ge": lambda d: (d.times(-1),),
    "gt": lambda d: (d.times(-1).plus(Affine((), 1)),),
    "eq": lambda d: (d, d.times(-1)),
    "ne": lambda d: (d, d.times(-1)),
}
_AND = (aten.bitwise_and.Tensor, aten.logical_and.default)
_OR = (aten.bitwise_or.Tensor, aten.logical_or.default)
_NOT = (aten.bitwise_not.default, aten.logical_not.default)
_COPIES = (aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default, aten.contiguous.default)
_INTEGERS = (torch.int64, torch.int32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Reader:
    """Follows the nodes of one mask; every node once."""

    def __init__(self, bias: Node, assumed: Mapping[Node, Affine] | None = None) -> None:
        self._seen: dict[Node, Affine | Allowed] = dict(assumed or {})
        self._current = bias  # what to name where an argument is not understood

    def mask(self, bias: Node) -> Allowed:
        """Where the additive ``bias`` is 0; everywhere else it hides."""
        inner = _through_padding(bias)
        if inner is not None:
            return self.mask(inner)
        if _is_float_convert(bias) or is_call(bias, *_COPIES):
            return self._flat(bias, self.mask(bias.args[0]))
        if is_call(bias, aten.expand.default, *RESHAPES):
            return self._flat(bias, self._moved(bias, self.mask(bias.args[0])))
        if is_call(bias, aten.where.self):
            condition, yes, no = bias.args
            shown, hidden = (uniform(each) for each in (yes, no))
            if hidden == 0 and shown is not None and shown <= HIDDEN:
                return self._like(self.boolean(condition).negate(), bias)
            if shown == 0 and hidden is not None and hidden <= HIDDEN:
                return self._like(self.boolean(condition), bias)
        number = uniform(bias)
        if number == 0:
            return Allowed((), value_of(bias).dim())
        raise _Unknown(bias)

    def boolean(self, node: Any) -> Allowed:
        found = self._value(node)
        if not isinstance(found, Allowed):
            raise _Unknown(node)
        return found

    def integer(self, node: Any) -> Affine:
        if isinstance(node, (int, float)) and not isinstance(node, bool) and float(node).is_integer():
            return Affine((), int(node))
        found = self._value(node)
        if isinstance(found, Allowed):
            if found.known is None:
                raise _Unknown(node)
            return Affine((0,) * found.rank, int(found.known))
        return found

    def _value(self, node: Any) -> Affine | Allowed:
        if not isinstance(node, Node):
            raise _Unknown(self._current)
        if node not in self._seen:
            self._current = node
            self._seen[node] = self._flat(node, self._follow(node))
        return self._seen[node]

    def _follow(self, node: Node) -> Affine | Allowed:
        """One node; raises `_Unknown` for what is not understood."""
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            raise _Unknown(node)
        rank = value.dim()
        if is_call(node, *_COPIES):
            return self._value(node.args[0])
        if is_call(node, aten.expand.default, *RESHAPES):
            return self._moved(node, self._value(node.args[0]))
        if value.dtype is torch.bool:
            return self._boolean(node, rank)
        if value.dtype not in _INTEGERS:
            raise _Unknown(node)
        number = uniform(node)
        if number is not None:
            return Affine((0,) * rank, int(number))
        if is_call(node, prims.iota.default):
            start, step = (node.kwargs[name] for name in ("start", "step"))
            if isinstance(start, int) and isinstance(step, int):
                return Affine((step,), start)
        elif is_convert(node, *_INTEGERS):
            return self.integer(node.args[0])
        elif is_call(node, aten.add.Tensor, aten.sub.Tensor):
            sign = 1 if is_call(node, aten.add.Tensor) else -1
            return self.integer(node.args[0]).plus(self.integer(node.args[1]).times(sign))
        elif is_call(node, aten.neg.default):
            return self.integer(node.args[0]).times(-1)
        elif is_call(node, aten.mul.Tensor):
            a, b = map(self.integer, node.args)
            if a.constant or b.constant:
                a, b = (a, b) if b.constant else (b, a)
                return Affine((0,) * rank).plus(a.times(b.const))
        elif is_call(node, aten.slice.Tensor):
            return self._sliced(node, rank)
        elif is_call(node, aten.select.int):
            inside, dim, at = self.integer(node.args[0]), node.args[1] % (rank + 1), node.args[2]
            if isinstance(at, int) and at >= 0:
                return Affine(inside.factors[:dim] + inside.factors[dim + 1 :], inside.const + inside.factors[dim] * at)
        elif is_call(node, aten.cat.default):
            return self._joined(node, rank)
        elif is_call(node, aten.cumsum.default):
            inside = self.integer(node.args[0])
            if inside.constant:
                dim = node.args[1] % rank
                return Affine(tuple(inside.const if d == dim else 0 for d in range(rank)), inside.const)
        elif is_call(node, aten.index.Tensor):
            return self._gathered(node, rank)
        raise _Unknown(node)

    def _boolean(self, node: Node, rank: int) -> Allowed:
        name = str(node.target).removeprefix("aten.").partition(".")[0]
        if name in _COMPARISONS and len(node.args) == 2:
            return self._compared(node, name, rank)
        if is_call(node, *_AND, aten.mul.Tensor):
            return self._both(self.boolean(node.args[0]), self.boolean(node.args[1]), rank, node)
        if is_call(node, *_OR):
            a, b = (self.boolean(each).negate() for each in node.args)
            return self._both(a, b, rank, node).negate()
        if is_call(node, *_NOT):
            return self.boolean(node.args[0]).negate()
        if is_call(node, aten.where.self):
            condition, yes, no = map(self.boolean, node.args)
            if no.known is False:
                return self._both(condition, yes, rank, node)
            if yes.known is False:
                return self._both(condition.negate(), no, rank, node)
        if is_convert(node, torch.bool):
            inside = self._value(node.args[0])
            if isinstance(inside, Allowed):
                return inside
            if inside.constant:
                return _allowed(() if inside.const else (Affine((), 1),), rank)
        if is_call(node, aten.slice.Tensor) and (*node.args, 0, 0)[2] == 0 and (*node.args, 0, 0, 0, 1)[4] in (0, 1):
            return self.boolean(node.args[0])
        if is_call(node, aten.full.default, aten.scalar_tensor.default):
            return _allowed(() if node.args[-1 if node.target is aten.full.default else 0] else (Affine((), 1),), rank)
        raise _Unknown(node)

    def _both(self, a: Allowed, b: Allowed, rank: int, node: Node) -> Allowed:
        for one, other in ((a, b), (b, a)):
            if one.known is not None:
                return dataclasses.replace(other if one.known else one, rank=rank)
        if a.negated or b.negated:
            raise _Unknown(node)
        return _allowed((*a.least, *b.least), rank)

    def _compared(self, node: Node, name: str, rank: int) -> Allowed:
        left, right = node.args
        if name in ("le", "lt") and is_call(left, aten.abs.default):  # |x| <= c is x <= c and -x <= c
            inside, bound = self.integer(left.args[0]), self.integer(right).times(-1)
            sides = [inside.plus(bound), inside.times(-1).plus(bound)]
            return _allowed([least for side in sides for least in _COMPARISONS[name](side)], rank)
        try:
            apart = self.integer(left).plus(self.integer(right).times(-1))
        except _Unknown as unknown:
            both = all(isinstance(each, Node) for each in node.args)
            raise _Unknown(unknown.node, packed=unknown.packed or (name == "eq" and both)) from None
        return _allowed(_COMPARISONS[name](apart), rank, negated=name == "ne")

    def _sliced(self, node: Node, rank: int) -> Affine:
        defaults: tuple[Any, ...] = (None, 0, 0, None, 1)
        source, dim, start, _, step = node.args + defaults[len(node.args) :]
        inside, dim, start = self.integer(source), dim % rank, start or 0
        if not isinstance(start, int) or start < 0 or not isinstance(step, int):
            raise _Unknown(node)
        factors = tuple(f * step if d == dim else f for d, f in enumerate(inside.factors))
        return Affine(factors, inside.const + inside.factors[dim] * start)

    def _joined(self, node: Node, rank: int) -> Affine:
        """A first piece of length 1 that the second continues backwards: ``cat([x[:1] - 1, x])`` of x = iota."""
        pieces, dim = node.args[0], (node.args[1] if len(node.args) > 1 else 0) % rank
        if len(pieces) == 2 and known_equal(value_of(pieces[0]).shape[dim], 1):
            first, rest = map(self.integer, pieces)
            whole = Affine(rest.factors, rest.const - rest.factors[dim])  # rest, one place further on
            others = [f for d, f in enumerate(whole.factors) if d != dim]
            if first.const == whole.const and others == [f for d, f in enumerate(first.factors) if d != dim]:
                return whole
        raise _Unknown(node)

    def _gathered(self, node: Node, rank: int) -> Affine:
        source, indices = self.integer(node.args[0]), node.args[1]
        found = Affine((0,) * rank, source.const)
        if source.constant:
            return found
        if len(indices) != len(source.factors) or None in indices:
            raise _Unknown(node)
        for factor, index in zip(source.factors, indices):
            at = self.integer(index)
            if at.const < 0 or any(f < 0 for f in at.factors):
                raise _Unknown(node)  # an index from the end
            found = found.plus(at.times(factor))
        return found

    # ---- shapes -----------------------------------------------------------------------------------------------------

    def _like(self, mask: Allowed, node: Node) -> Allowed:
        return dataclasses.replace(mask, rank=value_of(node).dim())

    def _moved(self, node: Node, inside: Any) -> Any:
        """What a reshape, expand or permute does to the indices."""
        old, new = value_of(node.args[0]).shape, value_of(node).shape
        if is_call(node, aten.permute.default):
            order: list[int | None] = [dim % len(old) for dim in node.args[1]]
        elif is_call(node, aten.expand.default):
            order = [None] * (len(new) - len(old)) + list(range(len(old)))
        else:
            order = _same_but_ones(old, new)
        return _reordered(inside, order, node, len(old))

    def _flat(self, node: Node, found: Any) -> Any:
        """Factors for the node's own rank, 0 where a dimension has one index only."""
        shape = value_of(node).shape

        def flat(each: Affine) -> Affine:
            factors = _padded(each.factors, len(shape))
            return Affine(tuple(0 if known_equal(size, 1) else f for f, size in zip(factors, shape)), each.const)

        if isinstance(found, Affine):
            return flat(found)
        return _allowed([flat(each) for each in found.least], len(shape), found.negated)


def _reordered(inside: Any, order: list[int | None], node: Node, rank: int) -> Any:
    """``inside`` with its dimension ``order[d]`` as dimension d; None is a new one. Dimensions left out must not matter."""

    def one(each: Affine) -> Affine:
        factors = _padded(each.factors, rank)
        if any(f for d, f in enumerate(factors) if d not in order):
            raise _Unknown(node)
        return Affine(tuple(0 if d is None else factors[d] for d in order), each.const)

    if isinstance(inside, Affine):
        return one(inside)
    return Allowed(tuple(map(one, inside.least)), len(order), inside.negated)


def _same_but_ones(old: Sequence[Any], new: Sequence[Any]) -> list[int | None]:
    """Where each dimension of ``new`` comes from, if only dimensions of size 1 came or went; else none comes from anywhere."""
    kept = [d for d, size in enumerate(old) if not known_equal(size, 1)]
    order: list[int | None] = []
    for size in new:
        if known_equal(size, 1):
            order.append(None)
        elif kept and known_equal(old[kept[0]], size):
            order.append(kept.pop(0))
        else:
            return [None] * len(new)
    return order


def _padded(factors: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (0,) * (rank - len(factors)) + factors


def uniform(node: Any) -> float | None:
    """The number that every element of ``node`` is."""
    while is_call(node, aten.expand.default, *_COPIES, *RESHAPES):
        node = node.args[0]
    if calls(node, CONVERT):
        return _held(uniform(node.args[0]), node.args[1])
    if is_call(node, aten.full.default) and isinstance(node.args[1], (int, float)):
        return _held(float(node.args[1]), value_of(node).dtype)
    number = constant_of(node)
    if number is None and is_call(node, aten.scalar_tensor.default) and isinstance(node.args[0], float):
        return _held(node.args[0], value_of(node).dtype) if math.isinf(node.args[0]) else None
    return number


def _held(number: float | None, dtype: torch.dtype) -> float | None:
    """``number`` as a tensor of ``dtype`` holds it, as near as tells zeros, hidden places and indices; None if unknown."""
    if number is None:
        return None
    if dtype in FLOATS:
        return number if abs(number) <= torch.finfo(dtype).max else math.copysign(math.inf, number)
    if dtype is torch.bool:
        return float(bool(number))
    return number if dtype in _INTEGERS and number.is_integer() else None


def _is_float_convert(node: Node) -> bool:
    """Whether a convert leaves zeros zero and what is hidden hidden."""
    return is_convert(node, *FLOATS) and value_of(node.args[0]).dtype in FLOATS


def _through_padding(bias: Node) -> Node | None:
    """PyTorch pads a bias's rows to a multiple of 16 bytes and slices that off again: the bias itself."""
    if is_call(bias, aten.slice.Tensor) and is_call(bias.args[0], aten.constant_pad_nd.default):
        inner = bias.args[0].args[0]
        same = value_of(inner).dim() == value_of(bias).dim() and all(
            known_equal(a, b) for a, b in zip(value_of(inner).shape, value_of(bias).shape)
        )
        starts_at = bias.args[2] if len(bias.args) > 2 else 0
        before = list(bias.args[0].args[1])[::2]
        return inner if same and not starts_at and all(n == 0 for n in before) else None
    return None
