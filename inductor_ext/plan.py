"""Which kernels a rewritten graph needs: those of the ops that are in it, and of no op that a later rule has replaced.

    kernels_of(graph, arch)  →  the `JitSpec`s of all calls of our ops on CUDA devices, in the graph's order

Rules change the graph before a kernel exists, so that all kernels can be built together, in parallel, once it is known what is
left. A kernel that cannot be had costs another round of the rules, on the untouched graph, that does without it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch._higher_order_ops import auto_functionalize
from torch.fx import Graph, Node

from inductor_ext import jit, registry
from inductor_ext.calls import calls
from inductor_ext.graph import value_of
from inductor_ext.op import Op, device_of

log = logging.getLogger("inductor_ext")


def kernels_of(graph: Graph, arch: str | None) -> list[jit.JitSpec]:
    """A model may call ops of ours itself: where one does not take its arguments it says so when it runs, not here."""
    if arch is None:
        return []
    found: dict[jit.JitSpec, None] = {}
    ops = {op.overload: op for op in registry.ops()}
    for node in graph.nodes:
        writes = calls(node, auto_functionalize.auto_functionalized_v2)
        op = ops.get(node.args[0] if writes else node.target) if node.op == "call_function" else None
        if op is None:
            continue
        try:
            args = arguments_of(op, node)
            if device_of(args).type == "cuda":
                found.update(dict.fromkeys(op.specs(args, arch)))
        except Exception:
            log.debug("%s: which kernel %s needs is not known", op.name, node.name, exc_info=True)
    return list(found)


def arguments_of(op: Op, node: Node) -> tuple[Any, ...]:
    """Those of a call of ``op`` in schema order, fakes for tensors."""
    if calls(node, auto_functionalize.auto_functionalized_v2):
        named = _written(node)
    else:
        given, named = torch.fx.map_arg((node.args, node.kwargs), value_of)
        named = {**dict(zip(_defaults(op), given)), **named}
    return tuple({**_defaults(op), **named}.values())


def _defaults(op: Op) -> dict[str, Any]:
    return {argument.name: argument.default_value for argument in op.overload._schema.arguments}


def _written(node: Node) -> dict[str, Any]:
    """The arguments of an op that writes, by name: a functional graph holds what it writes as views of bases."""
    op: Any = node.args[0]
    named = dict(torch.fx.map_arg(node.kwargs, value_of))
    bases = named.pop("_all_bases")
    views = auto_functionalize.read_view_information_from_args(*auto_functionalize.get_mutable_args(op), named, bases)
    for name, view in views.items():
        if view is None:
            named[name] = None
            continue
        with bases[view.base_index].fake_mode:
            named[name] = view.regenerate_view(bases)
    return named
