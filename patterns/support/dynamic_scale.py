"""Recognise a scale computed from the maximum of the very tensor it scales, and write the way there as step programs.

    a = max |x|;  … → w → … → s;  y = x / s      w, or any other node made of a, may be read elsewhere too

The kernel writes one node of that way, or beside it: the one from which everything else that is read elsewhere follows
(`_written`). What x is scaled by, it computes from that node, or from the maximum itself: ``mul:scale|recip``. So each node has
its own bytes: x times a reciprocal is never x over the scale. Nodes that follow from the written one stay in the graph.

One step may be a bound by a tensor of one fp32 element, ``minimum(…, scale_ub)``: the kernel reads it, as ``s0``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.calls import CONVERT, aten, is_call
from inductor_ext.graph import call, constant_of, describe, erase_dead, is_reshape, known_equal, same_sizes, value_of
from inductor_ext.kernels import steps
from inductor_ext.kernels.quantized import BOUND, is_bounded
from inductor_ext.kernels.steps import Step
from inductor_ext.miss import SCALE_DTYPE, TOO_MANY_NUMBERS, Miss, found_or_none
from inductor_ext.patterns.support.expression import Expression
from inductor_ext.patterns.support.fp8_chain import FLOATS, Chain
from inductor_ext.patterns.support.same import same_value

_BY_NUMBER = {
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.add.Tensor: "add",
    aten.clamp_min.default: "max",
    aten.clamp_min.Tensor: "max",
    aten.maximum.default: "max",
    aten.clamp_max.default: "min",
    aten.clamp_max.Tensor: "min",
    aten.minimum.default: "min",
}
_BY_TENSOR = {
    aten.clamp_min.Tensor: "max",
    aten.maximum.default: "max",
    aten.clamp_max.Tensor: "min",
    aten.minimum.default: "min",
}
_COMMUTATIVE = (aten.mul.Tensor, aten.add.Tensor, aten.maximum.default, aten.minimum.default)
_UNARY = {
    aten.reciprocal.default: "recip",
    aten.abs.default: "abs",
    aten.log2.default: "log2",
    aten.exp2.default: "exp2",
    aten.ceil.default: "ceil",
    aten.floor.default: "floor",
}
_LARGEST = (aten.amax.default, aten.max.default, aten.max.dim)
_LEAST = (aten.amin.default, aten.min.default, aten.min.dim)
_WIDE = (*FLOATS, torch.float64)

#: How far above a scale its maximum is looked for, in nodes.
REACH = 40


def _with_bool(value: torch.Tensor) -> torch.Tensor:
    bits = value.view(torch.int32)
    return ((((bits >> 23) & 0xFF) + (bits & 0x7FFFFF).bool().int()) << 23).view(torch.float32)


def _deep_gemm(value: torch.Tensor) -> torch.Tensor:
    bits = value.view(torch.int32)
    return ((((bits >> 23) & 0xFF) + (bits & 0x7FFFFF).bool().int()).clamp(1, 254) << 23).view(torch.float32)


#: Ways to write a rounding of the exponent by its bits, each traced; a new one is a function of the same values.
_BY_BITS: tuple[tuple[str, Callable[[torch.Tensor], torch.Tensor]], ...] = (
    ("bits_up", steps.bits_up),
    ("bits_up", _with_bool),
    ("ue8m0", steps.ue8m0),
    ("ue8m0", _deep_gemm),
)


@dataclasses.dataclass(frozen=True)
class Amax:
    """``node`` is max |x| over ``dims`` of ``taken``, all of them for None; ``inner`` are the nodes between x and ``node``.

    ``signed``: zeros may come out as -0, since the maximum is taken of signed values.
    """

    node: Node
    source: Node
    taken: Node
    dims: tuple[int, ...] | None
    inner: frozenset[Node]
    signed: bool = False


@dataclasses.dataclass(frozen=True)
class Way:
    """One step up from a node: ``step`` of ``above`` gives it, None where only its shape differs; ``inner`` lie between.

    ``bound`` is the tensor that the step names, and ``widens`` whether the value becomes fp32 before it, as that is.
    """

    above: Node
    step: Step | None
    inner: frozenset[Node] = frozenset()
    bound: Node | None = None
    widens: bool = False


@dataclasses.dataclass(frozen=True)
class DynamicScale:
    """``written = scale_program(max |x|)``, a row or a tensor; ``program`` is the chain's, made of it.

    ``bounds`` has what the programs call s0, if they do.
    """

    amax: Amax
    written: Node
    granularity: str
    scale_program: str
    program: str
    bounds: tuple[Node, ...] = ()

    @property
    def described(self) -> str:
        bound = "".join(f"; s0 = {each.name}" for each in self.bounds)
        return f"{self.granularity}: scale = {self.scale_program or 'amax'}; {self.program}{bound}"

    def put(self, graph: Graph, made: Node) -> None:
        """Let users of the written node read ``made``, the kernel's scale."""
        old = self.written
        if old._erased:
            return
        if not same_sizes(value_of(made).shape, value_of(old).shape):
            made = call(graph, aten.reshape.default, made, list(value_of(old).shape), like=old)
        old.replace_all_uses_with(made)
        erase_dead(old)


# ---- the maximum -----------------------------------------------------------------------------------------------------


def amax_above(scale: Node, x: Node) -> Amax | None:
    """The maximum of ``x`` that ``scale`` is computed from, however it is spelled; None for a static scale."""
    frontier: list[Node] = [scale]
    seen: set[Node] = set()
    while frontier and len(seen) < REACH:
        node = frontier.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        found = read_amax(node)
        if found is not None and found.source is x:
            return found
        if found is None:
            frontier.extend(node.all_input_nodes)
    return None


def read_amax(node: Node) -> Amax | None:
    """The maximum of absolute values that ``node`` is, whatever its spelling."""
    if is_call(node, aten.maximum.default):
        return _of_both_ends(node)
    reduction = _reduction(node, *_LARGEST)
    if reduction is None:
        return None
    taken, dims, above = reduction
    magnitude, upper = _through(taken)
    if not is_call(magnitude, aten.abs.default):
        return None
    source, lower = _through(magnitude.args[0])
    return Amax(node, source, taken, dims, frozenset({*above, *upper, magnitude, *lower}))


def _of_both_ends(node: Node) -> Amax | None:
    """maximum(max x, -min x), or of their absolute values: what aminmax leads to."""
    ends: dict[Any, tuple[Node, tuple[int, ...] | None]] = {}
    inner: list[Node] = []
    signed = False
    for end in node.args:
        size = end
        if is_call(end, aten.abs.default, aten.neg.default):
            inner.append(end)
            end = end.args[0]
        reduction = _reduction(end, *_LARGEST, *_LEAST)
        if reduction is None or (is_call(size, aten.neg.default) and not _is_least(end)) or (size is end and _is_least(end)):
            return None
        signed |= not is_call(size, aten.abs.default)
        ends[_is_least(end)] = reduction[:2]
        inner += [*reduction[2], end]
    if len(ends) < 2 or ends[True] != ends[False]:
        return None
    taken, dims = ends[True]
    source, lower = _through(taken)
    return Amax(node, source, taken, dims, frozenset({*inner, *lower}), signed)


def _is_least(node: Node) -> bool:
    node = node.args[0] if is_call(node, operator.getitem) else node
    return is_call(node, *_LEAST)


def _reduction(node: Any, *targets: Any) -> tuple[Node, tuple[int, ...] | None, list[Node]] | None:
    """What one of the reductions ``targets`` is of, over which dimensions, and the nodes of it besides ``node``."""
    inner: list[Node] = []
    if is_call(node, operator.getitem):
        pair, index = node.args
        if index != 0 or not is_call(pair, aten.max.dim, aten.min.dim):
            return None
        inner, node = [pair], pair
    elif is_call(node, aten.max.dim, aten.min.dim):
        return None
    if not is_call(node, *targets):
        return None
    taken = node.args[0]
    count = value_of(taken).dim()
    dims = node.args[1] if len(node.args) > 1 else []
    dims = tuple(sorted({d % count for d in ([dims] if isinstance(dims, int) else dims)})) if count else ()
    return taken, None if len(dims) in (0, count) else dims, inner


def _through(node: Node) -> tuple[Node, list[Node]]:
    """Above reshapes and widening converts, neither of which changes a value; and those."""
    passed = []
    while is_reshape(node) or _widens(node):
        passed.append(node)
        node = node.args[0]
    return node, passed


def _widens(node: Any) -> bool:
    return is_call(node, CONVERT) and node.args[1] is torch.float32 and value_of(node.args[0]).dtype in FLOATS


# ---- the way from it -------------------------------------------------------------------------------------------------


def step(node: Node, amax: Node | None = None) -> Way:
    """The step that makes ``node``, or a Miss. Given the maximum ``amax`` that it is made of, a bound may be a tensor."""
    if is_reshape(node) and _keeps_order(node):
        return Way(node.args[0], None)
    found = _convert(node) or _function(node) or _by_number(node) or _choice(node) or _by_bits(node)
    if found is None and amax is not None:
        found = _by_bound(node, amax)
    if found is None:
        wanted = "a convert, a rounding of the exponent, a reciprocal, or a sum, product, quotient or bound by a number"
        if amax is not None:
            wanted += ", or a bound by one float32 element"
        raise Miss("a step of the scale is not one the kernel computes", node, wanted, describe(node))
    return found


def _convert(node: Node) -> Way | None:
    if not is_call(node, CONVERT):
        return None
    source, target = value_of(node.args[0]).dtype, node.args[1]
    narrows = target is torch.float32 if source is torch.float64 else source in FLOATS
    if target not in _WIDE or not narrows:
        return None
    return Way(node.args[0], Step("to", target))


def _function(node: Node) -> Way | None:
    if is_call(node, aten.pow.Scalar):  # of 2, where it is what exp2 is: rounded nowhere
        base, power = node.args
        integral = is_call(power, aten.ceil.default, aten.floor.default)
        return Way(power, Step("pow2")) if base == 2 and integral and value_of(node).dtype is torch.float32 else None
    if not is_call(node, *_UNARY):
        return None
    op, dtype = _UNARY[node.target], value_of(node).dtype
    if dtype is torch.float64:
        known = op in steps.WIDE_STEPS
    else:
        known = dtype is torch.float32 or (dtype in FLOATS and op not in steps.FP32_STEPS)
    return Way(node.args[0], Step(op)) if known and value_of(node.args[0]).dtype is dtype else None


def _by_number(node: Node) -> Way | None:
    if not is_call(node, *_BY_NUMBER):
        return None
    value, other = node.args[0], node.args[1]
    if node.target in _COMMUTATIVE and constant_of(value) is not None:
        value, other = other, value
    number, op = constant_of(other), _BY_NUMBER[node.target]
    if number is None or math.isnan(number) or not isinstance(value, Node):
        return None
    if op in ("max", "min") and number == 0 and isinstance(other, Node):
        return None  # the sign of a zero depends on the order of the two
    dtype = value_of(node).dtype
    if value_of(value).dtype is not dtype or dtype not in _WIDE:
        return None
    if op == "add" and dtype in (torch.bfloat16, torch.float16):
        return None  # a CPU rounds the number first, a GPU does not
    return Way(value, None if op in ("mul", "div") and number == 1 else Step(op, number))


def _by_bound(node: Node, amax: Node) -> Way | None:
    """A bound by one fp32 element, and the other side made of ``amax``, in fp32 where the element makes it so.

    Of a maximum of 0 and a bound of -0 a GPU makes what eager mode makes there; a CPU may give the other sign.
    """
    if not is_call(node, *_BY_TENSOR):
        return None
    value, bound = node.args[:2]
    if not (isinstance(value, Node) and isinstance(bound, Node)):
        return None
    if node.target in _COMMUTATIVE and not _leads(value, amax):
        value, bound = bound, value
    if not _leads(value, amax) or _leads(bound, amax):
        return None
    known, made, given = value_of(node), value_of(value), value_of(bound)
    one = given.dtype is torch.float32 and all(known_equal(size, 1) for size in given.shape) and given.device == known.device
    widens = made.dtype is not known.dtype
    if not one or made.dtype not in FLOATS or known.dtype not in (made.dtype, torch.float32):
        return None
    return Way(value, Step(_BY_TENSOR[node.target], BOUND), bound=bound, widens=widens)


def _leads(node: Node, amax: Node) -> bool:
    """Whether ``node`` is made of ``amax``, as far as `amax_above` looks."""
    pending, seen = [node], set[Node]()
    while pending and len(seen) < REACH:
        each = pending.pop()
        if each is amax:
            return True
        if each not in seen:
            seen.add(each)
            pending.extend(each.all_input_nodes)
    return False


def _choice(node: Node) -> Way | None:
    """``where(value > 0, value, number)`` and ``where(value == 0, number, value)``."""
    if not is_call(node, aten.where.self):
        return None
    condition, one, other = node.args
    if is_call(condition, aten.gt.Scalar, aten.ne.Scalar):
        value, number, op = one, _filled(other, node), "positive_or" if condition.target is aten.gt.Scalar else "nonzero_or"
    elif is_call(condition, aten.eq.Scalar):
        value, number, op = other, _filled(one, node), "nonzero_or"
    else:
        return None
    asked, zero = condition.args
    alike = isinstance(value, Node) and value_of(value).dtype is value_of(node).dtype and value_of(node).dtype in FLOATS
    if number is None or zero != 0 or not alike or not same_sizes(value_of(value).shape, value_of(node).shape):
        return None
    if not same_value(_unwidened(asked), _unwidened(value)):
        return None
    return Way(value, Step(op, number), frozenset({condition}))


def _filled(node: Any, like: Node) -> float | None:
    """The number that every element of ``node`` is, in the dtype of ``like``."""
    if not isinstance(node, Node) or value_of(node).dtype is not value_of(like).dtype:
        return None
    if is_call(node, aten.full.default) and isinstance(node.args[1], (int, float)):
        number = float(node.args[1])
        return None if math.isnan(number) or torch.tensor(number).to(value_of(node).dtype).item() != number else number
    return constant_of(node)


def _unwidened(node: Node) -> Node:
    while _widens(node):
        node = node.args[0]
    return node


def _by_bits(node: Node) -> Way | None:
    if not is_call(node, aten.view.dtype):
        return None
    for op, fn in _BY_BITS:
        traced = _expression(fn).trace(node)
        if traced is not None:
            return Way(traced[0], Step(op), frozenset(traced[1]) - {node})
    return None


@functools.cache
def _expression(fn: Callable[[torch.Tensor], torch.Tensor]) -> Expression:
    return Expression(fn)


def _keeps_order(view: Node) -> bool:
    """Whether a reshape keeps the order of the elements: a permute does that moves dimensions of one element only."""
    if not is_call(view, aten.permute.default):
        return True
    shape = value_of(view.args[0]).shape
    moved = [d % len(shape) for d in view.args[1]]
    kept = [d for d in moved if not known_equal(shape[d], 1)]
    return kept == sorted(kept)


# ---- which node is written -------------------------------------------------------------------------------------------


class _Ways:
    """The ways from the maximum to the scale of a chain, and to what else is made of it."""

    def __init__(self, chain: Chain, scale: Node, amax: Amax) -> None:
        self.amax = amax
        self.chain = {*chain.inner, chain.cast}
        self.up: dict[Node, Way] = {}
        self.path = [scale]
        self.bounds: tuple[Node, ...] = ()
        while self.path[-1] is not amax.node:
            node = self.path[-1]
            self.up[node] = way = step(node, amax.node)
            if way.bound not in (None, *self.bounds):
                self.bounds += (way.bound,)  # type: ignore[arg-type]
            self.path.append(way.above)
        if len(self.bounds) > 1:
            found = ", ".join(map(describe, self.bounds))
            raise Miss("the scale has several bounds", scale, "one tensor that bounds it", found)
        self.inner = frozenset().union(*(way.inner for way in self.up.values()))

    def written(self, node: Node) -> Node | None:
        """The node, ``node`` or made of it, of which all follow that are read elsewhere; None where nothing is."""
        below: list[Node] = []
        own = [each for each in self.path[:-1] if self.up[each].above is node]  # perhaps no user: nodes lie between
        for user in dict.fromkeys([*own, *node.users]):
            if user in self.chain and node is self.path[0]:
                continue
            if user in self.inner:
                if any(each not in self.inner and each not in self.up for each in user.users):
                    return node
                continue
            if user not in self.up:
                way = found_or_none(step, user, self.amax.node)
                if way is None or way.above is not node or way.inner or way.bound not in (None, *self.bounds):
                    return node
                self.up[user] = way
            found = self.written(user)
            below += [] if found is None else [found]
        return node if len(below) > 1 else below[0] if below else None

    def steps(self, node: Node, above: Node) -> list[Step]:
        """From ``above``, a node on the way up from ``node``, to it."""
        made: list[Step] = []
        while node is not above:
            way = self.up[node]
            if way.step is not None:
                made.append(way.step)
            if way.widens:
                made.append(Step("to", torch.float32))
            node = way.above
        return made[::-1]


def trace(chain: Chain, scale: Node) -> DynamicScale:
    """How ``scale``, the one operand of ``chain``, is made of the maximum, or the first condition that failed."""
    amax = amax_above(scale, chain.x)
    assert amax is not None
    ways = _Ways(chain, scale, amax)
    granularity = _granularity(amax, chain)
    if value_of(scale).dtype not in FLOATS:
        raise Miss(SCALE_DTYPE, scale, "float32, bfloat16 or float16", str(value_of(scale).dtype))
    taken_in = value_of(amax.taken).dtype
    # amax of x.float(): a widening convert commutes with the maximum
    first = [] if taken_in is value_of(chain.x).dtype else [Step("to", taken_in)]
    _check_sign(amax, ways)

    written = ways.written(amax.node) or scale
    while value_of(written).dtype not in FLOATS:
        written = ways.up[written].above
    while True:
        scale_program = steps.text_of([*first, *ways.steps(written, amax.node)])
        program = _program(chain, ways, scale, written, first)
        numbers = len(steps.constants(scale_program, program))
        if numbers <= steps.MAX_CONSTS:
            break
        if written in ways.path:
            raise Miss(TOO_MANY_NUMBERS, chain.cast, f"at most {steps.MAX_CONSTS}", str(numbers))
        written = ways.up[written].above  # nearer to the maximum: what is made of it is left to the graph
    bounds = ways.bounds if is_bounded(scale_program, program) else ()
    return DynamicScale(amax, written, granularity, scale_program, program, bounds)


def _program(chain: Chain, ways: _Ways, scale: Node, written: Node, first: list[Step]) -> str:
    """The chain's steps, its scale made of the one that is written or, where that is another, of the maximum."""
    same = written
    while same not in ways.path and ways.up[same].step is None:
        same = ways.up[same].above
    if same in ways.path:
        name, via = steps.SCALE, ways.steps(scale, same)
    else:
        name, via = steps.AMAX, [*first, *ways.steps(scale, ways.amax.node)]
    by_scale = [Step(each.op, name, tuple(via)) if each.operand in ("s0", "r0") else each for each in chain.steps]
    return steps.text_of(by_scale)


def _check_sign(amax: Amax, ways: _Ways) -> None:
    """Miss where a maximum of zeros, which may be -0 in the graph and is +0 in a kernel, would show."""
    if not amax.signed:
        return
    for node in reversed(ways.path[:-1]):
        way = ways.up[node]
        if len(way.above.users) > 1:
            break
        by_number = way.step is not None and way.bound is None
        if by_number and way.step.op in ("max", "add") and way.step.operand > 0:  # type: ignore[operator, union-attr]
            return
        if way.step is not None and way.step.op != "to":
            break
    wanted = "a bound above zero as the first step, or maximum(|min|, |max|)"
    raise Miss("a maximum of zeros may be -0", amax.node, wanted, describe(amax.node))


def _granularity(amax: Amax, chain: Chain) -> str:
    if amax.dims is None:
        return "tensor"
    taken, scaled = value_of(amax.taken), chain.input_value()
    wanted = "the last dimension of what is scaled, or all of it"
    if amax.dims != (taken.dim() - 1,):
        raise Miss("amax granularity", amax.node, wanted, f"dimensions {list(amax.dims)} of {taken.dim()}")
    if scaled.dim() == 0 or not known_equal(taken.shape[-1], scaled.shape[-1]):
        raise Miss("amax granularity", amax.node, wanted, f"{list(taken.shape)} scaled as {list(scaled.shape)}")
    mine, theirs = _views(amax.taken, chain.x), list(chain.pre_views)
    while mine and theirs and _same_view(mine[0], theirs[0]):
        mine, theirs = mine[1:], theirs[1:]
    if not all(map(_keeps_order, [*mine, *theirs])):
        raise Miss("amax granularity", amax.node, wanted, "rows of a permuted view of what is scaled")
    return "row"


def _views(node: Any, x: Node) -> list[Node]:
    """The reshapes between ``x`` and ``node``, nearest ``x`` first."""
    found: list[Node] = []
    while node is not x:
        if is_reshape(node):
            found.insert(0, node)
        node = node.args[0]
    return found


def _same_view(a: Node, b: Node) -> bool:
    """Whether two reshapes of the same tensor, or of equal views of it, are one."""
    return a is b or (a.target == b.target and a.args[1:] == b.args[1:] and same_sizes(value_of(a).shape, value_of(b).shape))
