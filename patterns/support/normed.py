"""A norm, the residual before it and the FP8 quantisation behind it as one call: what the rules for both norms share.

    q, s, t    = inductor_ext.rms_norm_quantize(x, residual, weight, …)          the three RMSNorms with a weight alone
    q, s, t, y = inductor_ext.norm_quantize(x, residual, weight, bias, factor, shift, …)        every other one, and y too
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import CONVERT, aten, is_call
from inductor_ext.graph import call, describe, erase_dead, feeds_opaque, is_opaque, is_reshape, known_equal, producer, value_of
from inductor_ext.kernels.norm_quantize.op import MEASURED, WIDE
from inductor_ext.kernels.norm_quantize.op import OP as ANY
from inductor_ext.kernels.rms_norm_quantize.op import OP as RMS
from inductor_ext.miss import INPUT_LAYOUT, SCALE_LATE, Miss, second_user
from inductor_ext.op import Op
from inductor_ext.patterns.support import fp8_chain, has_run, norm, profit, quantisation, rms_norm
from inductor_ext.rule import Call, Context, Match

GATE = "the gate would be a kernel of its own"

#: Where two launches for a tensor with one scale gain on Inductor's: on an H200 1.05 to 1.5 times from 16 to 7168 rows of 1024;
#: 0.66 for one row, which Inductor does in one launch, and 0.86 to 1.14 with 30 million elements and more, which miss L2.
TENSOR_ROWS, TENSOR_ELEMENTS = 16, 1 << 23


@dataclasses.dataclass(frozen=True)
class Fused:
    """What a match replaces, and by which call. ``kept``: y has other readers, which the call's last output is for."""

    found: quantisation.AnyQuantisation
    norm: norm.Norm
    op: Op
    arguments: tuple[Any, ...]
    kept: bool

    @property
    def place(self) -> Node:
        """Before which node the kernel is called: where the sum was, or else the first that reads one of its outputs."""
        read = self.norm
        if read.addends and all(each < read.total for each in self.operands):
            return read.total
        others = [user for user in read.total.users if user is not read.y and user not in read.inner] if read.addends else []
        return min([*self.found.nodes, *others, *(read.y.users if self.kept else ())])

    @property
    def operands(self) -> list[Node]:
        """What the norm reads besides x and its residual."""
        return [each for each in self.arguments[2:6] if isinstance(each, Node)]


def match(node: Node, context: Context, kind: str) -> Match | None:
    """The norm of ``kind`` that ``node`` quantises, the quantisation and the call that does both."""
    chain = quantisation.trace(node)
    traced = None if chain is None else _normed(chain, kind)
    if traced is None:
        return None
    chain, read = traced
    found, kept = _quantised(chain, read, context)
    _check_tensor(found, read, context)
    op, leading, detail = _call(read, kept)
    fused = Fused(found, read, op, (*leading, *found.arguments), kept)
    place = fused.place
    quantisation.check_place(found, place)
    for each in fused.operands:
        if each >= place:
            wanted = f"a weight before {describe(place)}, which reads the sum"
            raise Miss("the weight is computed too late", each, wanted, describe(each))
    inputs = [*(read.addends or (read.total,)), *(read.node(each) for each in ("factor", "shift"))]
    for each in inputs:
        if each is not None and not fp8_chain.collapses_to_rows(value_of(each)):
            strides = f"{describe(each)} strides {list(value_of(each).stride())}"
            raise Miss(INPUT_LAYOUT, node, "rows of one pitch and unit stride", strides)
    _check_sum(read)
    _check_gate(read, context)
    if op is ANY:
        has_run.check(node, context, value_of(read.y).device, MEASURED, has_run.NOT_MEASURED)
    residual = ("fp32 residual, " if read.wide else "residual, ") if read.addends else ""
    made = Call(op, torch.fx.map_arg(fused.arguments, value_of))
    return Match(node, (made,), f"{residual}{detail}, {found.detail}{', y too' if kept else ''}", found.why, fused)


def _normed(chain: Any, kind: str) -> tuple[Any, norm.Norm] | None:
    """The chain, from one of its `quantisation.starts`, and the norm of ``kind`` that it begins behind."""
    missed = None
    for each in quantisation.starts(chain):
        try:
            read = norm.trace(each.x, kind)
        except Miss as miss:
            missed = miss
            continue
        if read is not None:
            return each, read
    if missed is not None:
        raise missed
    return None


def _quantised(chain: Any, read: norm.Norm, context: Context) -> tuple[quantisation.AnyQuantisation, bool]:
    """The quantisation, and whether y has other readers that need it in memory anyway."""
    try:
        return quantisation.parse(chain, context), False
    except Miss as miss:
        if miss.reason != second_user(quantisation.WHAT) or miss.node is not read.y:
            raise
        found = quantisation.parse(chain, context, kept=True)
        if not (context.forced or _has_to_be_in_memory(read.y, found.nodes)) or not _is_contiguous(value_of(read.y)):
            raise
        for scale in found.arguments[-1]:
            if profit.made_of(scale, read.y, opaque=True):
                wanted = f"a scale that is there before {describe(read.y)}"
                raise Miss(SCALE_LATE, chain.cast, wanted, describe(scale)) from None
        return found, True


def _has_to_be_in_memory(y: Node, own: Sequence[Node]) -> bool:
    """Whether the graph returns ``y``, or something besides ``own`` reads it that is in no kernel of Inductor's that makes y: a
    router, which is opaque, or the next residual's sum, which waits for what opaque kernels make of ``own``.
    """
    for user in y.users:
        if user.op == "output" or (user not in own and (is_opaque(user) or _waits(user, own))):
            return True
        if is_reshape(user) and _has_to_be_in_memory(user, own):
            return True
    return False


def _waits(user: Node, own: Sequence[Node]) -> bool:
    """Whether an opaque kernel stands between ``own`` and ``user``."""
    first, seen, pending = min(own), set[tuple[Node, bool]](), [(user, False)]
    while pending:
        node, behind = pending.pop()
        for each in node.all_input_nodes:
            if each in own and behind:
                return True
            way = each, behind or is_opaque(each)
            if each > first and each not in own and way not in seen:
                seen.add(way)
                pending.append(way)
    return False


def _is_contiguous(value: torch.Tensor) -> bool:
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride())):
        if not known_equal(size, 1) and not known_equal(stride, expected):
            return False
        expected = expected * size
    return True


def _check_tensor(found: quantisation.AnyQuantisation, read: norm.Norm, context: Context) -> None:
    if found.granularity != "tensor" or context.forced:
        return
    shape = value_of(read.total).shape
    rows = math.prod(shape[:-1])
    if not isinstance(rows, int) or rows < TENSOR_ROWS or rows * shape[-1] > TENSOR_ELEMENTS:
        wanted = f"at least {TENSOR_ROWS} rows, and at most {TENSOR_ELEMENTS} elements in all"
        raise Miss("one scale for all: Inductor's kernels are as fast", found.nodes[-1], wanted, f"{list(shape)}")


def _check_sum(read: norm.Norm) -> None:
    """Miss where something reads an fp32 sum as it is: the kernel hands on its rounding."""
    for user in read.total.users if read.wide else ():
        if user not in read.inner and user not in read.roundings:
            raise Miss(second_user("the fp32 sum"), read.total, f"only its roundings to {read.dtype} used", describe(user))


def _check_gate(read: norm.Norm, context: Context) -> None:
    """Miss where something of y's size would have to be written for the kernel alone, which computes no gate.

    norm(x) * silu(z), or norm(x * silu(z)): reading x and z and writing FP8 is five bytes an element; with a gate that is
    written and read, in bf16, it is nine. What Inductor makes of it has not been measured against that. A shift of that size is
    a residual (OLMo 2), which is in memory.
    """
    if context.forced:
        return
    wanted = "what is normalised, and factors of single elements, in memory anyway"
    factor = read.node("factor")
    if factor is not None and _is_of_all(factor, read) and not is_opaque(factor) and not feeds_opaque(factor):
        raise Miss(GATE, factor, wanted, describe(factor))
    made = producer(read.total)
    made = producer(made.args[0]) if is_call(made, CONVERT) else made  # type: ignore[arg-type]
    gated = is_call(made, aten.mul.Tensor) and all(isinstance(each, Node) and _is_of_all(each, read) for each in made.args[:2])
    others = [user for user in read.total.users if user is not read.y and user not in read.inner]
    if gated and not read.addends and not others:
        raise Miss(GATE, read.total, wanted, describe(made))


def _is_of_all(node: Node, read: norm.Norm) -> bool:
    """Whether ``node`` has a number for each element of y."""
    return known_equal(value_of(node).numel(), value_of(read.y).numel())


def _call(read: norm.Norm, kept: bool) -> tuple[Op, tuple[Any, ...], str]:
    """The op, its arguments before the quantisation's, and what they are in words."""
    x, residual = read.addends or (read.total, None)
    plain = None if kept else rms_norm.of(read)
    if plain is not None:
        return RMS, (x, residual, plain.weight, plain.eps, plain.norm), f"norm {plain.norm!r}"
    operands = [read.node(each) for each in ("weight", "bias", "factor", "shift")]
    steps = f"{WIDE} {read.steps}" if read.wide else read.steps
    return ANY, (x, residual, *operands, read.eps, read.kind, steps, kept), f"{read.kind} norm {read.steps!r}"


def replace(match: Match) -> None:
    fused: Fused = match.data
    read, found = fused.norm, fused.found
    graph, place = match.node.graph, fused.place
    summed, y, roundings = read.total, read.y, read.roundings
    values = {node: value_of(node) for node in (summed, y, *roundings)}
    quantisation.make_room(found, place)
    with graph.inserting_before(place):
        made = call(graph, fused.op.overload, *fused.arguments, like=match.node)
        out, scale, total = (call(graph, operator.getitem, made, i, like=match.node) for i in range(3))
        kept = call(graph, operator.getitem, made, 3, like=match.node) if fused.kept else None
        quantisation.put(graph, found, out, scale)
    if kept is not None:
        kept.meta["val"] = values[y]
        y.replace_all_uses_with(kept)
        erase_dead(y)
    for old in roundings if read.wide else [summed] if read.addends else []:
        if not old._erased:
            total.meta["val"] = values[old]
            old.replace_all_uses_with(total)
            erase_dead(old)
    if not summed._erased:
        erase_dead(summed)
