"""The FP8 quantisation of something that a larger kernel computes: amax, a scale from it, the chain to FP8; or MXFP8.

    y = …;  s = scale_program(amax(|y|));  q = cast(program(y, s))          amax of each row, or of all
    y = …;  q = cast(program(y, s)), once or for several s                  static scales: `static_quantisation`
    y = …;  q, s = inductor_ext.mxfp8_quantize(y, …)                        plain scales

Rules that fuse what makes y begin at `anchors`, `trace` what those quantise, ask `parse` whether all of y's users are this, and
let `put` place a kernel's two outputs.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator
from typing import Any

from torch.fx import Graph, Node

from inductor_ext.calls import CONVERT, aten, calling, is_call
from inductor_ext.graph import call, describe, erase_dead, is_reshape, known_equal, replay, same_sizes, value_of
from inductor_ext.kernels import quantized
from inductor_ext.kernels.mxfp8_quantize.op import HAS_RUN
from inductor_ext.kernels.mxfp8_quantize.op import OP as MXFP8
from inductor_ext.miss import SCALE_LATE, SEVERAL_SCALES, Miss, found_or_none, second_user
from inductor_ext.moe import mx
from inductor_ext.patterns.support import dynamic_scale, fp8_chain, has_run, static_quantisation
from inductor_ext.patterns.support.same import in_order
from inductor_ext.patterns.support.static_quantisation import WHAT as WHAT
from inductor_ext.patterns.support.static_quantisation import StaticQuantisation
from inductor_ext.rule import Context


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A call of mxfp8_quantize: of ``x``, perhaps through views that keep the order of its elements."""

    cast: Node
    x: Node


def anchors(graph: Graph) -> list[Node]:
    """Nodes that end a quantisation."""
    return sorted([*fp8_chain.casts(graph), *calling(MXFP8.overload)(graph)])


def trace(anchor: Node) -> fp8_chain.Chain | Blocks | None:
    """What ``anchor`` quantises and how; None for a cast that is no quantisation."""
    if is_call(anchor, MXFP8.overload):
        return Blocks(anchor, in_order(anchor.args[0]))
    return found_or_none(fp8_chain.trace, anchor)


def starts(chain: fp8_chain.Chain | Blocks) -> Iterator[fp8_chain.Chain | Blocks]:
    """``chain``, and the same begun at a rounding that the walk upwards took for its first step."""
    yield chain
    shorter = chain.behind_convert() if isinstance(chain, fp8_chain.Chain) else None
    if shorter is not None:
        yield shorter


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """``q = cast(program(y))``; ``y`` has no other use."""

    chain: fp8_chain.Chain
    scale: dynamic_scale.DynamicScale

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Granularity, scale program, program, dtype and static scales, as the ops take them."""
        return self.scale.granularity, self.scale.scale_program, self.scale.program, self.chain.dtype, list(self.scale.bounds)

    @property
    def granularity(self) -> str:
        return self.scale.granularity

    @property
    def why(self) -> str:
        return "one pass over memory" if self.granularity == "row" else "two launches"

    @property
    def detail(self) -> str:
        return f"{self.scale.described} → {self.chain.dtype}"

    @property
    def nodes(self) -> tuple[Node, Node]:
        """What is replaced: what is made of the maximum and read elsewhere, and the cast."""
        return self.scale.written, self.chain.cast

    def behind(self, place: Node) -> list[Node] | Node:
        """What makes the bound of the scale and stands behind ``place``, as of `StaticQuantisation`."""
        return static_quantisation.behind(self.scale.bounds, place)


@dataclasses.dataclass(frozen=True)
class BlockQuantisation:
    """``q, scale = mxfp8_quantize(y)`` with plain scales; ``y`` has no other use."""

    node: Node
    rounding: str
    granularity: str = quantized.MX
    why: str = "one pass over memory"

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.granularity, self.rounding, "", mx.DATA, []

    @property
    def detail(self) -> str:
        return f"MXFP8, scales rounded {self.rounding!r}"

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (self.node,)


AnyQuantisation = Quantisation | BlockQuantisation | StaticQuantisation


def parse(chain: fp8_chain.Chain | Blocks, context: Context, kept: bool = False) -> AnyQuantisation:
    """The quantisation that ``chain`` is of ``chain.x``, or the first condition that failed.

    ``kept``: y is written too, so that it may have other users, which are then no condition.
    """
    if isinstance(chain, Blocks):
        return _parse_blocks(chain, context, kept)
    node = chain.cast
    if all(dynamic_scale.amax_above(operand, chain.x) is None for operand in chain.operands):
        return static_quantisation.parse(chain, starts, context, kept)
    if len(chain.operands) != 1:
        found = ", ".join(map(describe, chain.operands))
        raise Miss(SEVERAL_SCALES, node, "one scale", found)
    scale = dynamic_scale.trace(chain, chain.operands[0])
    _check_rows(chain, scale)
    other = None if kept else _other_user(chain, scale)
    if other is not None:
        wanted = "the quantisation as its only user"
        raise Miss(second_user(WHAT), chain.x, wanted, describe(other))
    return Quantisation(chain, scale)


def _check_rows(chain: fp8_chain.Chain, scale: dynamic_scale.DynamicScale) -> None:
    """Miss unless the rows that are quantised are those of y, or one scale is for all of it, perhaps flattened or split."""
    y, scaled = value_of(chain.x), chain.input_value()
    in_order = not any(is_call(view, aten.permute.default) for view in chain.pre_views)
    rows = scale.granularity == "tensor" or (y.dim() > 0 and known_equal(y.shape[-1], scaled.shape[-1]))
    if not (in_order and rows):
        found = f"{scale.granularity} of {list(scaled.shape)}, {'' if in_order else 'permuted, '}of {list(y.shape)}"
        raise Miss("the scale is not of the rows", chain.cast, "amax of each row of what is quantised, or of all", found)


def _parse_blocks(blocks: Blocks, context: Context, kept: bool) -> BlockQuantisation:
    node, y = blocks.cast, blocks.x
    x, _, rounding, swizzled = node.args
    if swizzled:
        found = "tiles for compute capability 10.0"
        raise Miss("the scales are swizzled", node, "plain scales", found)
    shape, wanted_shape = value_of(y).shape, value_of(x).shape
    rows = len(wanted_shape) == 2 and len(shape) > 0 and known_equal(shape[-1], wanted_shape[-1])
    if not rows and not same_sizes(shape, wanted_shape):
        wanted, found = "blocks of the rows of what is quantised", f"{list(wanted_shape)} of {list(shape)}"
        raise Miss("the scale is not of the rows", node, wanted, found)
    pending = [] if kept else [y]
    while pending:
        for user in pending.pop().users:
            if is_reshape(user):
                pending.append(user)
            elif user is not node:
                wanted = "the quantisation as its only user"
                raise Miss(second_user(WHAT), y, wanted, describe(user))
    has_run.check(node, context, value_of(y).device, HAS_RUN)
    return BlockQuantisation(node, rounding)


def _other_user(chain: fp8_chain.Chain, scale: dynamic_scale.DynamicScale) -> Node | None:
    """A user of what is quantised besides the chain and the way to its scale."""
    known = {chain.cast, *chain.inner, scale.amax.node}
    pending, seen = [chain.x], set()
    while pending:
        for user in pending.pop().users:
            if user in known or user in seen:
                continue
            if not (is_reshape(user) or is_call(user, CONVERT) or user in scale.amax.inner):
                return user
            seen.add(user)
            pending.append(user)
    return None


def insert(node: Node, found: AnyQuantisation, target: Any, arguments: Iterable[Any]) -> None:
    """Let a call of ``target``, whose outputs are what is quantised and its scale, take the place of ``found``."""
    graph, place = node.graph, min(found.nodes)
    make_room(found, place)
    with graph.inserting_before(place):
        made = call(graph, target, *arguments, like=node)
        out, scale = (call(graph, operator.getitem, made, i, like=node) for i in range(2))
        put(graph, found, out, scale)


def put(graph: Graph, found: AnyQuantisation, out: Node, scale: Node) -> None:
    """Let users of the quantisation read ``out`` and ``scale``. At the graph's insertion point, where both exist."""
    if isinstance(found, StaticQuantisation):
        return static_quantisation.put(graph, found, out)
    if isinstance(found, BlockQuantisation):
        return _put_blocks(graph, found.node, out, scale)
    chain = found.chain
    value = replay(graph, [*chain.pre_views, *chain.post_views], out)
    found.scale.put(graph, scale)
    fp8_chain.replace_cast(chain.cast, value)


def _put_blocks(graph: Graph, node: Node, out: Node, scale: Node) -> None:
    values = [out, scale]
    for index, old in enumerate(value_of(node)):
        if not same_sizes(value_of(values[index]).shape, old.shape):  # rows in one dimension where y has several
            values[index] = call(graph, aten.reshape.default, values[index], [-1, old.shape[-1]], like=node)
    for user in list(node.users):
        if is_call(user, operator.getitem):
            user.replace_all_uses_with(values[user.args[1]])
            graph.erase_node(user)
    erase_dead(node)


def check_place(found: AnyQuantisation, place: Node) -> None:
    """Miss where a static scale, or the bound of a dynamic one, is not known at ``place``, where the kernel will be called."""
    behind = [] if isinstance(found, BlockQuantisation) else found.behind(place)
    if isinstance(behind, Node):
        raise Miss(SCALE_LATE, behind, f"scales before {describe(place)}", describe(behind))


def make_room(found: AnyQuantisation, place: Node) -> None:
    """Move what makes static scales, bounds of dynamic ones, and sizes of views, before ``place``."""
    if isinstance(found, Quantisation):
        found.chain.make_room(place)
    behind = [] if isinstance(found, BlockQuantisation) else found.behind(place)
    for node in behind if isinstance(behind, list) else ():
        place.prepend(node)
