"""Whether a quantising chain is worth a kernel of its own: where it has to read memory anyway, and its result be in memory."""

from __future__ import annotations

from torch.fx import Node

from inductor_ext.graph import describe, feeds_opaque, is_opaque
from inductor_ext.rule import Context, Refusal


def refusal(node: Node, source: Node, context: Context) -> Refusal | None:
    """Why the chain from ``source`` to ``node`` is left to Inductor, if it is; None too where the rule is forced."""
    if context.forced:
        return None
    if not is_opaque(source):
        return context.refuse(
            node,
            "Inductor fuses this chain into its producer for free",
            wanted="a graph input, a GEMM, attention or another opaque kernel as producer",
            found=describe(source),
        )
    return consumer_refusal(node, context)


def consumer_refusal(node: Node, context: Context) -> Refusal | None:
    """The same of what reads ``node`` alone."""
    if not context.forced and not feeds_opaque(node):
        return context.refuse(
            node,
            "Inductor fuses this chain into its consumer for free",
            wanted="a GEMM, another opaque kernel or the graph's output as consumer",
            found=", ".join(map(describe, node.users)),
        )
    return None
