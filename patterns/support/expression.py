"""Recognise what a function becomes in a graph, by tracing the function itself.

    silu = Expression(torch.nn.functional.silu)
    silu.input_of(node)  →  the node x where ``node`` is what Inductor makes of ``silu(x)``, or None

    shifted = Expression(lambda h, eps: h.pow(2).mean(-1, keepdim=True) + eps, numbers=1)
    shifted.match(node)  →  h and eps, whatever number it is, and the nodes between; or None

A decomposition is nobody's interface: its nodes change from one torch version to the next. Tracing the function with Inductor's
own table, in the dtype at hand, gives the nodes that this version writes. Operands of sums and products may stand in either
order, dimensions be counted from either end, and the same value be computed twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.calls import arguments, aten
from inductor_ext.graph import constant_of, known_equal, value_of
from inductor_ext.patterns.support.same import same_value

#: What activations are computed in.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

_COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default)

#: What stands for a function's numbers and for its number of columns while it is traced: nothing computes with these by itself.
_NUMBERS = (0.84147098, 0.64278761)
_COLUMNS = 37


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a function's parameters are in a graph, and the nodes from its tensors to its result, this one included."""

    tensors: list[Node]
    numbers: list[Any]
    nodes: list[Node]


@dataclasses.dataclass(frozen=True)
class Expression:
    """``fn`` of tensors, and of ``numbers`` numbers behind them that may be any; element-wise, or reducing columns."""

    fn: Callable[..., torch.Tensor]
    tensors: int = 1
    numbers: int = 0

    def input_of(self, node: Any) -> Node | None:
        """The tensor that ``node`` is ``fn`` of."""
        found = self.match(node)
        return None if found is None else found.tensors[0]

    def trace(self, node: Any) -> tuple[Node, list[Node]] | None:
        """That tensor, and the nodes from it to ``node``, this one included."""
        found = self.match(node)
        return None if found is None else (found.tensors[0], found.nodes)

    def match(self, node: Any) -> Bound | None:
        if not isinstance(value_of(node), torch.Tensor) or value_of(node).dtype not in FLOATS:
            return None
        template = _template(self.fn, self.tensors, self.numbers, value_of(node).dtype)
        (made,) = (each.args[0] for each in template.nodes if each.op == "output")
        found = _Matching({}, {}).alike(node, made[0] if isinstance(made, (tuple, list)) else made)
        if found is None:
            return None
        given = [each for each in template.nodes if each.op == "placeholder"]
        tensors = [found.nodes[each] for each in given]
        columns = found.numbers.get(_COLUMNS)
        if columns is not None and not known_equal(columns, value_of(tensors[0]).shape[-1]):
            return None
        numbers = [found.numbers[index] for index in range(self.numbers)]
        return Bound(tensors, numbers, [mine for theirs, mine in found.nodes.items() if theirs not in given])


@functools.cache
def _template(fn: Callable[..., torch.Tensor], tensors: int, numbers: int, dtype: torch.dtype) -> Graph:
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():  # a graph is being compiled, with fake tensors
        given = [torch.ones(2, _COLUMNS, dtype=dtype) for _ in range(tensors)]
        made = make_fx(lambda *each: fn(*each, *_NUMBERS[:numbers]), decomposition_table=select_decomp_table())(*given)
    for alias in made.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):  # Inductor removes them
        alias.replace_all_uses_with(alias.args[0])
    made.graph.eliminate_dead_code()
    return made.graph


@dataclasses.dataclass(frozen=True)
class _Matching:
    """What a template's nodes are so far, and its numbers: by index, or the number of columns."""

    nodes: dict[Node, Node]
    numbers: dict[int, Any]

    def alike(self, mine: Any, theirs: Any) -> _Matching | None:
        """This and more, where ``mine`` is ``theirs``, dtypes and all, each of its inputs being the same everywhere."""
        if not isinstance(theirs, Node):
            return self._constant(mine, theirs)
        if not isinstance(mine, Node):
            return None
        if theirs in self.nodes:
            return self if same_value(self.nodes[theirs], mine) else None
        one, two = value_of(mine), value_of(theirs)
        if isinstance(one, torch.Tensor) != isinstance(two, torch.Tensor):
            return None
        if isinstance(one, torch.Tensor) and one.dtype is not two.dtype:
            return None
        if theirs.op == "placeholder":
            return self._with(theirs, mine)
        if mine.target != theirs.target:
            return None
        for given in _orders(mine):
            found: _Matching | None = self
            for name, wanted in _arguments(theirs):
                found = found and found._argument(mine, theirs, name, given.get(name, _MISSING), wanted)
            if found is not None:
                return found._with(theirs, mine)
        return None

    def _argument(self, mine: Node, theirs: Node, name: str, given: Any, wanted: Any) -> _Matching | None:
        if name == "dim":
            same = _from_the_end(given, mine) == _from_the_end(wanted, theirs)
            return self if same else None
        if isinstance(wanted, (tuple, list)):
            if not isinstance(given, (tuple, list)) or len(given) != len(wanted):
                return None
            found: _Matching | None = self
            for one, two in zip(given, wanted):
                found = found and found.alike(one, two)
            return found
        return self.alike(given, wanted)

    def _constant(self, mine: Any, theirs: Any) -> _Matching | None:
        if isinstance(theirs, bool) or not isinstance(theirs, (int, float)):
            return self if not isinstance(mine, Node) and type(mine) is type(theirs) and mine == theirs else None
        if isinstance(mine, bool) or not isinstance(mine, (int, float, Node)):
            return None
        for index, number in (*enumerate(_NUMBERS), (_COLUMNS, _COLUMNS)):
            if math.isclose(theirs, number, rel_tol=1e-6):  # torch rounds an eps to fp32
                known = self.numbers.get(index, mine)
                if known != mine:
                    return None
                return dataclasses.replace(self, numbers={**self.numbers, index: mine})
        return self if constant_of(mine) == theirs else None

    def _with(self, theirs: Node, mine: Node) -> _Matching:
        return dataclasses.replace(self, nodes={**self.nodes, theirs: mine})


_MISSING = object()


def _arguments(node: Node) -> list[tuple[str, Any]]:
    """Every argument by name; by position where the function has no schema."""
    if isinstance(node.target, torch._ops.OpOverload):
        return list(arguments(node).items())
    return [(str(index), value) for index, value in enumerate(node.args)]


def _orders(node: Node) -> Iterator[dict[str, Any]]:
    """Its arguments, and the same with the operands of a sum or a product exchanged."""
    given = dict(_arguments(node))
    yield given
    if node.target in _COMMUTATIVE:
        one, two = list(given)[:2]
        yield {**given, one: given[two], two: given[one]}


def _from_the_end(dims: Any, node: Node) -> Any:
    """Dimensions of what a node reduces, counted from the last, which is -1."""
    rank = value_of(node.args[0]).dim()
    if isinstance(dims, int):
        dims = [dims]
    return [dim - rank if dim >= 0 else dim for dim in dims] if isinstance(dims, (list, tuple)) else dims
