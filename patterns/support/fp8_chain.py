"""Recognise a scale-clamp-cast chain on the nodes of a graph, whatever its spelling, and write it as a step program.

`trace` walks upwards from a cast to FP8. Everything on the way is either a step of ``kernels/steps.py`` (converts, multiplying
or dividing by a scale, clamping), a view, or the end: the chain's input ``x``. The result holds the program in the dtypes the
graph computes in, the operands, and where ``x`` and the views are. Nothing is changed here and nothing is assumed about who
asks, so static, dynamic and KV-cache rules share it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.calls import CONVERT, aten, calling, is_call
from inductor_ext.graph import constant_of, describe, erase_dead, is_reshape, known_equal, replay, same_sizes, value_of
from inductor_ext.kernels import steps
from inductor_ext.miss import INPUT_DTYPE, SCALE_DTYPE, SCALE_LAYOUT, Miss, second_user

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = tuple(steps.TOKEN_OF_DTYPE)

_CLAMPS = {
    aten.clamp_min.default: "max",
    aten.clamp_min.Tensor: "max",
    aten.maximum.default: "max",
    aten.clamp_max.default: "min",
    aten.clamp_max.Tensor: "min",
    aten.minimum.default: "min",
}
_COMMUTATIVE = (aten.mul.Tensor, aten.maximum.default, aten.minimum.default)
_SCALES = {aten.mul.Tensor: "mul", aten.div.Tensor: "div"}
_SCALED = "mul or div by a scale; a cast alone is one kernel of Inductor's, which moves no more bytes than ours would"
_ONE_OR_ROWS = "one value, or one value a row of the last dimension"
#: What a chain consists of, besides converts and views.
STEPS = (*_CLAMPS, *_SCALES)


@dataclasses.dataclass
class Chain:
    """``cast(program(x))``: ``x`` goes through ``pre_views`` before the op, the result through ``post_views``."""

    cast: Node
    dtype: torch.dtype
    x: Node  # never a reshape itself
    pre_views: list[Node]  # nearest x first
    steps: list[steps.Step]
    operands: list[Node]
    post_views: list[Node]
    inner: list[Node]  # every node strictly between x and the cast
    head: tuple[int, list[Node]] | None = None  # a scale a head: of which dimension, and the views behind it

    @property
    def program(self) -> str:
        return steps.text_of(self.steps)

    def behind_convert(self) -> Chain | None:
        """The same chain begun behind its first step where that rounds: what makes ``x`` may count it among its own."""
        above = self.inner[-1] if self.inner else None
        if above is None or not is_call(above, CONVERT) or above.args[1] is torch.float32:
            return None
        below = [view for view in self.pre_views if view in self.inner]  # others stand between x and the rounding
        return dataclasses.replace(self, x=above, pre_views=below, steps=self.steps[1:], inner=self.inner[:-1])

    def input_value(self) -> torch.Tensor:
        """The fake tensor that the op reads: ``x`` after ``pre_views``."""
        return value_of(self.pre_views[-1] if self.pre_views else self.x)

    def make_room(self, place: Node) -> None:
        """Move what computes the sizes of the views before ``place``, where they will be."""
        behind: set[Node] = set()
        pending = [size for view in (*self.pre_views, *self.post_views) for size in view.all_input_nodes[1:]]
        while pending:
            node = pending.pop()
            if node not in behind and place < node and not isinstance(value_of(node), torch.Tensor):
                behind.add(node)
                pending.extend(node.all_input_nodes)
        for node in sorted(behind):
            place.prepend(node)

    def insert(self, graph: Graph, make: Callable[[Node], Node]) -> Node:
        """``post_views(make(pre_views(x)))`` at the graph's insertion point."""
        return replay(graph, self.post_views, make(replay(graph, self.pre_views, self.x)))


def is_fp8_cast(node: Node) -> bool:
    return is_call(node, CONVERT) and node.args[1] in FP8


def casts(graph: Graph) -> list[Node]:
    """Every cast to FP8, in the graph's order."""
    return [node for node in calling(CONVERT)(graph) if is_fp8_cast(node)]


def trace(cast: Node, unscaled: bool = False, heads: bool = False) -> Chain:
    """The chain that ends in ``cast``, as long as it can be made, or the first condition that failed.

    ``unscaled`` takes a cast without a scale too: a clamp and a cast, or a cast alone. ``heads`` takes a scale that has several
    values along one dimension, not the last, as ``s0`` too, and says in `Chain.head` along which.
    """
    walk = _Walk(cast, unscaled, heads)
    walk.run()
    return walk.chain()


class _Walk:
    """State of one walk upwards. Steps and views are collected last first."""

    def __init__(self, cast: Node, unscaled: bool = False, heads: bool = False) -> None:
        self.cast = cast
        self.unscaled = unscaled
        self.heads = heads
        self.head: tuple[int, int] | None = None  # its dimension, and how many views are below the step
        self.node: Node = cast.args[0]
        self.steps: list[steps.Step] = []
        self.operands: list[Node] = []
        self.views: list[Node] = []
        self.views_at_rows: int | None = None  # how many views are below (after) the step with a row operand
        self.inner: list[Node] = []
        self.stopped: Miss | None = None

    def run(self) -> None:
        if value_of(self.node) is None or not isinstance(value_of(self.node), torch.Tensor):
            raise Miss("the cast has no tensor input", self.cast, "a tensor", describe(self.node))
        while self.stopped is None:
            node = self.node
            if is_reshape(node):
                advanced = self._view(node)
            elif is_call(node, CONVERT):
                advanced = self._convert(node)
            elif is_call(node, *_CLAMPS):
                advanced = self._binary(node, _CLAMPS[node.target])
            elif is_call(node, *_SCALES):
                advanced = self._binary(node, _SCALES[node.target])
            else:
                break
            if not advanced:
                break
        if not self.scaled and (self.stopped is not None or not self.unscaled):
            raise self.stopped or Miss("no scale before the cast", self.cast, _SCALED, describe(self.node))
        dtype = value_of(self.node).dtype
        if dtype not in FLOATS:
            # Named by the node that reads it: a graph input has no source line.
            raise Miss(INPUT_DTYPE, self._below, "bfloat16, float16 or float32", describe(self.node))

    def chain(self) -> Chain:
        keep = self.views_at_rows
        if keep is None:  # no row operand: the program does not see shapes, so only views directly on x go before it
            keep = len(self.views)
            while keep and self.inner and self.views[keep - 1] is self.inner[-1]:
                keep -= 1
                self.inner.pop()
        return Chain(
            cast=self.cast,
            dtype=self.cast.args[1],
            x=self.node,
            pre_views=list(reversed(self.views[keep:])),
            steps=self._renumbered(),
            operands=list(reversed(self.operands)),
            post_views=list(reversed(self.views[:keep])),
            inner=self.inner,
            head=None if self.head is None else (self.head[0], list(reversed(self.views[: self.head[1]]))),
        )

    def _renumbered(self) -> list[steps.Step]:
        """Steps and operands in the order they run in; they were collected from the last to the first."""
        last = len(self.operands) - 1
        return [
            dataclasses.replace(step, operand=f"{step.operand[0]}{last - int(step.operand[1:])}")
            if isinstance(step.operand, str)
            else step
            for step in reversed(self.steps)
        ]

    @property
    def scaled(self) -> bool:
        return any(step.op in ("mul", "div") for step in self.steps)

    # ---- one node upwards; False ends the walk with this node as x ---------------------------------------------------

    def _only_user(self, node: Node) -> bool:
        """Whether nothing else reads ``node``; when something does, the chain begins below it or there is none."""
        if len(node.users) <= 1:
            return True
        ends = self.unscaled and node.target not in _SCALES  # a scale that something else reads is one that cannot be had
        if not self.scaled and not ends:
            kind = "clamped" if node.target in _CLAMPS else "scaled" if node.target in _SCALES else "converted"
            other = next(user for user in node.users if user is not self._below)
            what = second_user(f"the {kind} value")
            self.stopped = Miss(what, node, "one user, the next step of the chain", describe(other))
        return False

    @property
    def _below(self) -> Node:
        return self.inner[-1] if self.inner else self.cast

    def _up(self, node: Node, above: Any) -> bool:
        self.inner.append(node)
        self.node = above
        return True

    def _view(self, node: Node) -> bool:
        # Views of x itself cost nothing to repeat, so a second user only matters while the scale is still above.
        if not self.scaled and not self.unscaled and not self._only_user(node):
            return False
        self.views.append(node)
        return self._up(node, node.args[0])

    def _convert(self, node: Node) -> bool:
        above = node.args[0]
        source, target = value_of(above).dtype, node.args[1]
        if target not in FLOATS or source not in FLOATS:
            if not self.scaled:
                self.stopped = Miss(INPUT_DTYPE, node, "bfloat16, float16 or float32", str(source))
            return False
        # A widening convert with other users (RMSNorm reads x.float() too) is free to repeat: the kernel reads x itself.
        if len(node.users) > 1 and not (target is torch.float32 and source is not torch.float32):
            self._only_user(node)
            return False
        if source is not target:
            self.steps.append(steps.Step("to", target))
        return self._up(node, above)

    def _binary(self, node: Node, op: str) -> bool:
        if not self._only_user(node):
            return False
        value, other = node.args[0], node.args[1]
        shape = value_of(node).shape
        if node.target in _COMMUTATIVE and not _carries(value, shape):
            value, other = other, value
        if not _carries(value, shape):
            return False
        operand = self._operand(node, op, value, other, shape)
        if operand is None:
            return False
        self.steps.append(steps.Step(op, operand))
        if value_of(value).dtype is not value_of(node).dtype:  # type promotion by the operand: bf16 x, fp32 [R, 1] scale
            if value_of(node).dtype not in FLOATS or value_of(value).dtype not in FLOATS:
                self.steps.pop()
                return False
            self.steps.append(steps.Step("to", value_of(node).dtype))
        return self._up(node, value)

    def _operand(self, node: Node, op: str, value: Node, other: Any, shape: Any) -> float | str | None:
        number = constant_of(other)
        if number is not None:
            if number != number:
                return self._stop(node, "a bound or scale is NaN", "a number", "nan")
            if number == 0 and isinstance(other, Node) and op in ("max", "min"):
                # maximum(-0.0, 0.0) is +0.0 or -0.0 by the order of its arguments; clamp_min(-0.0, 0) keeps -0.0.
                return self._stop(
                    node, "a bound of zero in a tensor", "a Python number, or a bound that is not zero", describe(other)
                )
            if self._numbers(node) >= steps.MAX_CONSTS:
                return None
            return number
        if not isinstance(other, Node):
            return self._stop(node, "scale is a symbolic number", "a number or a tensor", describe(other))
        tensor = value_of(other)
        if not isinstance(tensor, torch.Tensor):
            return self._stop(node, "scale is a symbolic number", "a number or a tensor", describe(other))
        if tensor.dtype not in FLOATS:
            return self._stop(node, SCALE_DTYPE, "float32, bfloat16 or float16", str(tensor.dtype))
        kind = "s"
        head = self._head(tensor.shape, shape) if self.heads and op in ("mul", "div") and not self.scaled else None
        if head is not None:
            self.head = head, len(self.views)
        elif not all(known_equal(size, 1) for size in tensor.shape):
            kind = "r"
            if not self._rows(tensor.shape, shape):
                columns = known_equal(tensor.shape[-1], shape[-1])
                wanted = f"{_ONE_OR_ROWS}: no kernel here scales columns" if columns else _ONE_OR_ROWS
                return self._stop(node, SCALE_LAYOUT, wanted, describe(other))
        if len(self.operands) == steps.MAX_OPERANDS:
            return None
        if tensor.device != value_of(node).device and self._numbers(node) >= steps.MAX_CONSTS:
            return None
        self.operands.append(other)
        return f"{kind}{len(self.operands) - 1}"

    def _numbers(self, node: Node) -> int:
        """How many constants the kernel takes so far: numbers, and operands on the host, which it gets as numbers."""
        hosted = sum(value_of(operand).device != value_of(node).device for operand in self.operands)
        return hosted + sum(isinstance(step.operand, float) for step in self.steps)

    def _head(self, scale: Any, shape: Any) -> int | None:
        """The one dimension of several along which a scale has more than one value, if it is not the last one."""
        padded = (1,) * (len(shape) - len(scale)) + tuple(scale)
        several = [dim for dim, size in enumerate(padded) if not known_equal(size, 1)]
        if len(scale) > len(shape) or len(several) != 1 or several[0] == len(shape) - 1:
            return None
        return several[0] if known_equal(padded[several[0]], shape[several[0]]) else None

    def _rows(self, scale: Any, shape: Any) -> bool:
        """Whether a scale broadcasts one value a row, and the rows are those of every other row operand."""
        padded = (1,) * (len(shape) - len(scale)) + tuple(scale)
        if len(scale) > len(shape) or not known_equal(padded[-1], 1) or not same_sizes(padded[:-1], shape[:-1]):
            return False
        if self.scaled:
            return False  # further up, a product with one value a row is a norm, not a scale
        if self.views_at_rows not in (None, len(self.views)):
            return False  # rows of another view than those of the operand below
        self.views_at_rows = len(self.views)
        return True

    def _stop(self, node: Node, reason: str, wanted: str, found: str) -> Any:
        if not self.scaled:
            self.stopped = Miss(reason, node, wanted, found)


def _carries(value: Any, shape: Any) -> bool:
    """Whether ``value`` is the big operand: a tensor of the result's own shape."""
    tensor = value_of(value)
    return isinstance(value, Node) and isinstance(tensor, torch.Tensor) and same_sizes(tensor.shape, shape)


# ---- replacement values ----------------------------------------------------------------------------------------------


def collapses_to_rows(tensor: torch.Tensor) -> bool:
    """Whether a tensor is [R, C] with unit stride in C and one pitch for all rows: what row kernels read without a copy."""
    if tensor.dim() == 0:
        return False
    if not known_equal(tensor.stride(-1), 1):
        return False
    leading = zip(tensor.shape[:-1], tensor.stride()[:-1])
    sized = [(size, stride) for size, stride in leading if not known_equal(size, 1)]  # one index: its stride leads nowhere
    return all(known_equal(above, size * stride) for (_, above), (size, stride) in itertools.pairwise(sized))


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements fill one block of memory, in any order of dimensions."""
    expected: Any = 1
    pairs = [(stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if not known_equal(size, 1)]
    while pairs:
        nearest = next((pair for pair in pairs if known_equal(pair[0], expected)), None)
        if nearest is None:
            return False
        pairs.remove(nearest)
        expected = expected * nearest[1]
    return True


def replace_cast(cast: Node, value: Node) -> None:
    """Put ``value`` where the cast was; its fake keeps the strides the rest of the graph was traced with."""
    value.meta["val"] = value_of(cast)
    cast.replace_all_uses_with(value)
    erase_dead(cast)
