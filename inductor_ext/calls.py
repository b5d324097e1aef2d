"""Recognising a call in a graph: its operator with every argument that it has.

`is_call` knows a node by its operator only if all arguments that its caller does not look at have their defaults, so that a
reader cannot take ``add(a, b, alpha=2)`` for ``a + b``. Which ones callers look at is one table here. Who wants them all asks
`arguments`; `is_convert` takes a convert together with its dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
prims = torch.ops.prims

CONVERT = prims.convert_element_type.default

#: Arguments with a default that whoever recognises the operator has to look at, since they say which elements are meant. Every
#: other argument that has a default must have it, or `is_call` does not know the node: nobody reads an addition's ``alpha`` or
#: a mean's ``dtype``, and so nobody can forget to.
_READ: dict[Any, tuple[str, ...]] = {
    aten.amax.default: ("dim", "keepdim"),
    aten.amin.default: ("dim", "keepdim"),
    aten.any.dim: ("keepdim",),
    aten.as_strided.default: ("storage_offset",),
    aten.cat.default: ("dim",),
    aten.constant_pad_nd.default: ("value",),
    aten.cumsum.default: ("dtype",),
    aten.full.default: ("dtype",),
    aten.histc.default: ("bins", "min", "max"),
    aten.index_put.default: ("accumulate",),
    aten._unsafe_index_put.default: ("accumulate",),
    aten.max.dim: ("keepdim",),
    aten.mean.dim: ("keepdim",),
    aten.scalar_tensor.default: ("dtype",),
    aten.slice.Tensor: ("dim", "start", "end", "step"),
    aten.slice_scatter.default: ("dim", "start", "end", "step"),
    aten.sort.default: ("dim", "descending"),
    aten.sort.stable: ("dim", "descending"),
    aten.split.Tensor: ("dim",),
    aten.split_with_sizes.default: ("dim",),
    aten.sum.dim_IntList: ("keepdim",),
    aten.unbind.int: ("dim",),
}

#: Where a tensor lies in memory, and how a copy is made: no element depends on it.
_PLACEMENT = frozenset({"layout", "device", "pin_memory", "memory_format", "non_blocking", "implicit"})

#: Operators with more options than operands: their readers take `arguments`, and so have all of them.
_READ_WHOLE = ("_scaled_mm", "_scaled_mm_v2", "_grouped_mm", "_scaled_grouped_mm_v2", "_scaled_dot_product_")


def calls(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of ``targets``, whatever its arguments: for who reads `arguments`, or none of them."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_call(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of ``targets``, and every argument that callers of this do not look at (see `_READ`) has its
    default: an addition with ``alpha`` is no addition, a sum in another dtype no sum."""
    if not calls(node, *targets):
        return False
    for position, name, default in _unread(node.target):
        by_place = position is not None and position < len(node.args)
        value = node.args[position] if by_place else node.kwargs.get(name, default)
        if value is not default and value != default:
            return False
    return True


def calling(*targets: Any) -> Callable[[Graph], list[Node]]:
    """What finds every node of a graph that `is_call` of one of ``targets``, in the graph's order: a rule's anchors."""

    def find(graph: Graph) -> list[Node]:
        found = [node for target in targets for node in graph.find_nodes(op="call_function", target=target)]
        return [node for node in sorted(found) if is_call(node, *targets)]

    return find


@functools.cache
def _unread(target: Any) -> tuple[tuple[int | None, str, Any], ...]:
    """(position or None, name, default) of the arguments of one of PyTorch's operators that nobody looks at."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return ()
    name = target._schema.name.partition("::")[2]
    if any(name == whole or (whole.endswith("_") and name.startswith(whole)) for whole in _READ_WHOLE):
        return ()
    read = _PLACEMENT.union(_READ.get(target, ()))
    return tuple(
        (None if argument.kwarg_only else index, argument.name, argument.default_value)
        for index, argument in enumerate(target._schema.arguments)
        if argument.has_default_value() and argument.name not in read
    )


def arguments(node: Node) -> dict[str, Any]:
    """Every argument of a call of an operator by its name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    named = {argument.name: argument.default_value for argument in schema}
    named.update(zip(named, node.args))
    return {**named, **node.kwargs}


def is_convert(node: Any, *dtypes: torch.dtype) -> bool:
    """Whether a node converts to one of ``dtypes``: what a convert does depends on nothing as much."""
    return calls(node, CONVERT) and node.args[1] in dtypes


def by_position(graph: Graph) -> None:
    """Give every operator its positional arguments by position: a pass may have named them, and rules read ``args``."""
    for node in graph.nodes:
        if node.op != "call_function" or not node.kwargs or not isinstance(node.target, torch._ops.OpOverload):
            continue
        args, kwargs = list(node.args), dict(node.kwargs)
        positional = [argument for argument in node.target._schema.arguments if not argument.kwarg_only]
        while len(args) < len(positional) and any(argument.name in kwargs for argument in positional[len(args) :]):
            argument = positional[len(args)]
            args.append(kwargs.pop(argument.name, argument.default_value))
        if len(args) != len(node.args):
            node.args, node.kwargs = tuple(args), kwargs
