"""Whether a weight may be loaded while the kernel ahead of ours still runs: what ``static_b`` promises."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from inductor_ext.calls import is_call
from inductor_ext.graph import value_of
from inductor_ext.memory import through_views


def static_b(a: Node, b: Node) -> bool:
    """Whether nothing that still runs in the stream when our kernel starts can be writing b.

    Under programmatic dependent launch the kernel starts while the one before it ends, and with this promise loads b's first
    tiles before it waits. That is safe when b was written before this graph began, a being computed by a kernel of this graph:
    that kernel lies between whatever wrote b and ours. It began after the writer was done, or, launched the same way, let ours
    begin only after waiting for the writer itself: every kernel of ours waits before it lets the next one start.

    So b has to lie in the memory of a graph input, and a must not. What makes a is a kernel for sure when none of its inputs
    has a's dtype: Inductor drops copies and casts that change nothing. (Inductor copies an input that is not at a multiple of
    16 bytes at every call. That copy lets no kernel start before all of its blocks have ended.)
    """
    made_by = through_views(a)
    if is_call(made_by, operator.getitem):
        made_by = made_by.args[0]
    above = [value_of(node) for node in made_by.all_input_nodes]
    read = [value.dtype for value in above if isinstance(value, torch.Tensor)]
    return bool(read) and value_of(a).dtype not in read and _in_an_input(b)


def _in_an_input(node: Node) -> bool:
    """Whether ``node`` is a graph input or a true view of one; a reshape may be a copy, and then has storage of its own."""
    above = through_views(node)
    storages = {value_of(each).untyped_storage()._cdata for each in (node, above)}
    return above.op in ("placeholder", "get_attr") and len(storages) == 1
