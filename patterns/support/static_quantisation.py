"""FP8 quantisations, with scales that are known beforehand, of something that a larger kernel computes.

    y = …;  q_i = cast(program(y, scale_program(s_i)))          one, or several that differ in their scale alone

torchao calibrates the input of every linear layer by itself: q, k and v quantise one norm with three scales, gate and up with
two. One kernel then writes each of them. What is computed from a scale on its way, such as a reciprocal, the kernel does too,
so that no launch is spent on one number. `quantisation.parse` comes here where no scale follows from the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch.fx import Graph, Node

from inductor_ext.calls import CONVERT, aten, is_call
from inductor_ext.graph import call, describe, is_reshape, replay, value_of
from inductor_ext.kernels import static_scale, steps
from inductor_ext.miss import SEVERAL_SCALES, Miss, found_or_none, second_user
from inductor_ext.patterns.support import dynamic_scale, profit
from inductor_ext.patterns.support.fp8_chain import FLOATS, STEPS, Chain, is_fp8_cast, replace_cast
from inductor_ext.patterns.support.fp8_chain import trace as trace_chain
from inductor_ext.patterns.support.same import is_pure
from inductor_ext.rule import Context

#: What `second_user` is told of.
WHAT = "what is quantised"


@dataclasses.dataclass(frozen=True)
class StaticQuantisation:
    """``chains``, in the graph's order, of one y that nothing else reads; ``scales`` has one each, or none: a number then."""

    chains: tuple[Chain, ...]
    scales: tuple[Node, ...]
    scale_program: str
    program: str
    granularity: str = static_scale.GRANULARITY
    why: str = "one pass over memory"

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.granularity, self.scale_program, self.program, self.chains[0].dtype, list(self.scales)

    @property
    def detail(self) -> str:
        names = ", ".join(each.name for each in self.scales)
        given = f"scale = {f'{self.scale_program} of ' if self.scale_program else ''}{names}; " if names else ""
        return f"static: {given}{self.program} → {self.chains[0].dtype}"

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(chain.cast for chain in self.chains)

    def behind(self, place: Node) -> list[Node] | Node:
        """`behind` of the scales."""
        return behind(self.scales, place)


def behind(scales: Iterable[Node], place: Node) -> list[Node] | Node:
    """What makes ``scales`` and stands behind ``place``, in order, to be moved before it; or what cannot be moved."""
    behind: set[Node] = set()
    pending = list(scales)
    while pending:
        node = pending.pop()
        if node < place or node in behind or node.op == "placeholder":
            continue
        if node is place or not (node.op == "get_attr" or is_pure(node)):
            return node
        behind.add(node)
        pending.extend(node.all_input_nodes)
    return sorted(behind)


@dataclasses.dataclass(frozen=True)
class _Read:
    """One chain: its scale, if it is no number, and how that and the data are used."""

    scale: Node | None
    scale_program: str
    program: str

    def way(self, chain: Chain) -> str:
        scale = "" if self.scale is None else f"{value_of(self.scale).dtype} {self.scale_program}".rstrip() + " as scale; "
        return f"{scale}{self.program} → {chain.dtype}"


def parse(
    chain: Chain, starts: Callable[[Chain], Iterable[Any]], context: Context, kept: bool = False
) -> StaticQuantisation:
    """The quantisations of ``chain.x``, this chain among them, or the first condition that failed.

    ``kept``: x is written too, and may have other users.
    """
    first = _read(chain)
    chains, scales = _chains(chain.x, starts), []
    for each in chains:
        read = _read(each)
        if read.way(each) != first.way(chain):
            wanted, found = first.way(chain), read.way(each)
            raise Miss("quantised in different ways", each.cast, wanted, found)
        scales += [] if read.scale is None else [read.scale]
    most = static_scale.MAX_SCALES if scales else 1
    if len(chains) > most:
        wanted = f"at most {most} times, with as many scales"
        raise Miss("quantised too often", chain.cast, wanted, f"{len(chains)} times")
    reader = None if kept else _other_user(chain.x, chains)
    if reader is not None:
        raise Miss(second_user(WHAT), chain.x, "the quantisation as its only user", describe(reader))
    for each in chains:
        profit.check_consumer(each.cast, context)
    return StaticQuantisation(tuple(chains), tuple(scales), first.scale_program, first.program)


def _read(chain: Chain) -> _Read:
    if any(step.operand == "r0" for step in chain.steps):
        raise Miss("a static scale a row", chain.cast, "one scale for all rows", describe(chain.operands[0]))
    if len(chain.operands) > 1:
        found = ", ".join(map(describe, chain.operands))
        raise Miss(SEVERAL_SCALES, chain.cast, "one scale", found)
    if not chain.operands:
        return _Read(None, "", chain.program)
    program = chain.program.replace(":s0", ":scale")
    scale, scale_program = _computed(chain.operands[0], program)
    if value_of(scale).device != value_of(chain.x).device:
        wanted = f"a tensor on {value_of(chain.x).device}"
        raise Miss("the scale is on another device", chain.cast, wanted, f"{describe(scale)} on {value_of(scale).device}")
    return _Read(scale, scale_program, program)


def _computed(scale: Node, program: str) -> tuple[Node, str]:
    """The number in memory that ``scale`` is computed from, as far as the kernel can do that too, and how."""
    node, collected = scale, list[steps.Step]()
    while (way := found_or_none(dynamic_scale.step, node)) is not None and value_of(way.above).dtype in FLOATS:
        collected += [] if way.step is None else [way.step]
        node = way.above
    text = steps.text_of(list(reversed(collected)))
    return (node, text) if len(steps.constants(text, program)) <= steps.MAX_CONSTS else (scale, "")


def _chains(x: Node, starts: Callable[[Chain], Iterable[Any]]) -> list[Chain]:
    """Every quantisation of ``x``, in the graph's order."""
    casts, seen, pending = list[Node](), set[Node](), [x]
    while pending:
        for user in pending.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if is_fp8_cast(user):
                casts.append(user)
            elif is_reshape(user) or is_call(user, CONVERT, *STEPS):
                pending.append(user)
    traced = (found_or_none(trace_chain, cast) for cast in sorted(casts))
    return [each for chain in traced if chain is not None for each in starts(chain) if each.x is x]


def _other_user(x: Node, chains: Iterable[Chain]) -> Node | None:
    """Something that reads ``x``, or a step of its quantisations, and belongs to none of them."""
    inside = {x, *(node for chain in chains for node in (*chain.pre_views, *chain.inner))}
    known = inside | {chain.cast for chain in chains}
    return next((user for node in inside for user in node.users if user not in known), None)


def put(graph: Graph, found: StaticQuantisation, out: Node) -> None:
    """Let users of each quantisation read its part of ``out``."""
    values = []
    for index, chain in enumerate(found.chains):
        one = out if len(found.chains) == 1 else call(graph, aten.select.int, out, 0, index, like=chain.cast)
        values.append(replay(graph, [*chain.pre_views, *chain.post_views], one))
    for chain, value in zip(found.chains, values, strict=True):  # now, for the graph's insertion point may be a cast
        replace_cast(chain.cast, value)
