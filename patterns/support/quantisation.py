"""The dynamic FP8 quantisation of something that a larger kernel computes: amax, a scale from it, the chain to FP8.

    y = …;  s = scale_program(amax(|y|));  q = cast(program(y, s))          amax of each row, or of all

Rules that fuse what makes y ask `parse` whether all of y's users are this, and let `put` place a kernel's two outputs.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Graph, Node

from inductor_ext.graph import CONVERT, aten, call, describe, erase_dead, is_call, is_reshape, replay, same_sizes, value_of
from inductor_ext.kernels import steps
from inductor_ext.patterns.support import dynamic_scale, fp8_chain
from inductor_ext.rule import Context, Refusal


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """``q = cast(program(y, scale))``; ``y`` has no other use."""

    chain: fp8_chain.Chain
    scale: dynamic_scale.DynamicScale
    program: str

    @property
    def arguments(self) -> tuple[str, str, str, torch.dtype]:
        """Granularity, scale program, program and dtype, as the ops take them."""
        return self.scale.granularity, self.scale.program, self.program, self.chain.dtype

    @property
    def granularity(self) -> str:
        return self.scale.granularity

    @property
    def why(self) -> str:
        return "one pass over memory" if self.granularity == "row" else "two launches"

    @property
    def detail(self) -> str:
        return f"{self.scale.granularity}: scale = {self.scale.program or 'amax'}; {self.program} → {self.chain.dtype}"

    @property
    def nodes(self) -> tuple[Node, Node]:
        """What is replaced: the scale and the cast."""
        return self.scale.node, self.chain.cast


def parse(chain: fp8_chain.Chain, context: Context) -> Quantisation | Refusal:
    """The quantisation that ``chain`` is of ``chain.x``, or the first condition that failed."""
    node = chain.cast
    if len(chain.operands) != 1 or dynamic_scale.amax_above(chain.operands[0], chain.x) is None:
        found = ", ".join(map(describe, chain.operands)) or "a number"
        return context.refuse(node, "the scale is static", wanted="the amax of what is quantised", found=found)
    scale = dynamic_scale.trace(chain, chain.operands[0])
    if isinstance(scale, fp8_chain.Failure):
        return context.refuse(scale.node, scale.reason, wanted=scale.wanted, found=scale.found)
    if chain.pre_views:
        found = f"{scale.granularity} of {list(chain.input_value().shape)}"
        return context.refuse(node, "the scale is not of the rows", wanted="amax of each row, or of all", found=found)
    other = _other_user(chain, scale)
    if other is not None:
        wanted = "the quantisation as its only user"
        return context.refuse(chain.x, "what is quantised has a second user", wanted=wanted, found=describe(other))
    program = chain.program.replace(":s0", ":scale").replace(":r0", ":scale")
    numbers = len(steps.constants(scale.program, program))
    if numbers > steps.MAX_CONSTS:
        return context.refuse(node, "too many numbers", wanted=f"at most {steps.MAX_CONSTS}", found=str(numbers))
    return Quantisation(chain, scale, program)


def _other_user(chain: fp8_chain.Chain, scale: dynamic_scale.DynamicScale) -> Node | None:
    """A user of what is quantised besides the chain and the way to its scale."""
    known = {chain.cast, *chain.inner, *scale.inner, scale.node, scale.amax}
    pending, seen = [chain.x], set()
    while pending:
        for user in pending.pop().users:
            if user in known or user in seen:
                continue
            if not (is_reshape(user) or is_call(user, aten.abs.default, CONVERT)):
                return user
            seen.add(user)
            pending.append(user)
    return None


def put(graph: Graph, found: Quantisation, out: Node, scale: Node) -> None:
    """Let users of the quantisation read ``out`` and ``scale``. At the graph's insertion point, where both exist."""
    chain, old = found.chain, found.scale.node
    value = replay(graph, chain.post_views, out)
    if not same_sizes(value_of(scale).shape, value_of(old).shape):
        scale = call(graph, aten.reshape.default, scale, list(value_of(old).shape), like=old)
    fp8_chain.replace_cast(chain.cast, value)
    if not old._erased:
        old.replace_all_uses_with(scale)
        erase_dead(old)
