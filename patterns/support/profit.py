"""Whether a quantising chain is worth a kernel of its own: where it has to read memory anyway, and its result be in memory."""

from __future__ import annotations

from torch.fx import Node

from inductor_ext.graph import describe, feeds_opaque, is_opaque, value_of
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


def check_scale(node: Node, scale: Node, x: Node, context: Context) -> None:
    """Miss where Inductor computes ``scale`` in the same kernel that scales ``x`` by it and casts.

    A scale that is made of x itself: its kernel has x at hand. One that nothing else reads: it is computed on the way.
    """
    on_host = value_of(scale).device != value_of(x).device  # a number for either kernel
    if context.forced or on_host or is_opaque(scale):
        return
    reason = fused("chain", "scale")
    if made_of(scale, x):
        raise Miss(reason, node, f"a scale that is not made of {describe(x)}", describe(scale))
    if not feeds_opaque(scale):
        wanted = "a scale that is a graph input, or is read elsewhere too"
        raise Miss(reason, node, wanted, describe(scale))


def made_of(node: Node, x: Node, opaque: bool = False) -> bool:
    """Whether ``node`` is computed from ``x``, all of it by Inductor's own code or, with ``opaque``, by any kernels."""
    pending, seen = [node], set[Node]()
    while pending:
        each = pending.pop()
        if each is x:
            return True
        if each in seen or each < x or (is_opaque(each) and not opaque):
            continue
        seen.add(each)
        pending.extend(each.all_input_nodes)
    return False


def check_consumer(node: Node, context: Context) -> None:
    """The same of what reads ``node`` alone."""
    if not context.forced and not feeds_opaque(node):
        wanted = "a GEMM, another opaque kernel or the graph's output as consumer"
        raise Miss(fused("chain", "consumer"), node, wanted, ", ".join(map(describe, node.users)))
