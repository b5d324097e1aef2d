"""Whether a quantising chain is worth a kernel of its own: where it has to read memory anyway, and its result be in memory."""

from __future__ import annotations

from torch.fx import Node

from inductor_ext.graph import describe, feeds_opaque, is_opaque
from inductor_ext.miss import Miss, fused
from inductor_ext.rule import Context


def check(node: Node, source: Node, context: Context) -> None:
    """Miss where the chain from ``source`` to ``node`` is left to Inductor; never where the rule is forced."""
    if context.forced:
        return
    if not is_opaque(source):
        wanted = "a graph input, a GEMM, attention or another opaque kernel as producer"
        raise Miss(fused("chain", "producer"), node, wanted, describe(source))
    check_consumer(node, context)


def check_consumer(node: Node, context: Context) -> None:
    """The same of what reads ``node`` alone."""
    if not context.forced and not feeds_opaque(node):
        wanted = "a GEMM, another opaque kernel or the graph's output as consumer"
        raise Miss(fused("chain", "consumer"), node, wanted, ", ".join(map(describe, node.users)))
