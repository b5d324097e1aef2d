"""Recognise what a function of one tensor becomes in a graph, by tracing the function itself.

    silu = Expression(torch.nn.functional.silu)
    silu.input_of(node)  →  the node x where ``node`` is what Inductor makes of ``silu(x)``, or None

A decomposition is nobody's interface: its nodes change from one torch version to the next. Tracing the function with Inductor's
own table, in the dtype at hand, gives the nodes that this version writes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.graph import value_of

#: What activations are computed in.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Expression:
    """``fn`` of one tensor, element-wise."""

    fn: Callable[[torch.Tensor], torch.Tensor]

    def input_of(self, node: Any) -> Node | None:
        """The tensor that ``node`` is ``fn`` of."""
        found = self.trace(node)
        return None if found is None else found[0]

    def trace(self, node: Any) -> tuple[Node, list[Node]] | None:
        """That tensor, and the nodes from it to ``node``, this one included."""
        if not isinstance(node, Node) or not isinstance(value_of(node), torch.Tensor) or value_of(node).dtype not in FLOATS:
            return None
        template = _template(self.fn, value_of(node).dtype)
        (made,) = (each.args[0] for each in template.nodes if each.op == "output")
        bound: dict[Node, Node] = {}
        if not _alike(node, made[0] if isinstance(made, (tuple, list)) else made, bound):
            return None
        (given,) = (each for each in template.nodes if each.op == "placeholder")
        return bound[given], [mine for theirs, mine in bound.items() if theirs is not given]


@functools.cache
def _template(fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> Graph:
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():  # a graph is being compiled, with fake tensors
        made = make_fx(lambda x: fn(x), decomposition_table=select_decomp_table())(torch.ones(2, 3, dtype=dtype))
    for alias in made.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):  # Inductor removes them
        alias.replace_all_uses_with(alias.args[0])
    made.graph.eliminate_dead_code()
    return made.graph


def _alike(mine: Any, theirs: Any, bound: dict[Node, Node]) -> bool:
    """Whether ``mine`` is ``theirs``, dtypes and all, with its one input bound to some node; the same input everywhere."""
    if not isinstance(theirs, Node):
        return not isinstance(mine, Node) and type(mine) is type(theirs) and mine == theirs
    if not isinstance(mine, Node):
        return False
    if theirs in bound:
        return bound[theirs] is mine
    if value_of(mine).dtype is not value_of(theirs).dtype:
        return False
    if theirs.op != "placeholder":
        if mine.op != "call_function" or mine.target != theirs.target or mine.kwargs.keys() != theirs.kwargs.keys():
            return False
        if len(mine.args) != len(theirs.args) or not all(_alike(*pair, bound) for pair in zip(mine.args, theirs.args)):
            return False
        if not all(_alike(mine.kwargs[name], value, bound) for name, value in theirs.kwargs.items()):
            return False
    bound[theirs] = mine
    return True
