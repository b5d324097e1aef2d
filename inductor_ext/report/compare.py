"""Two versions of a graph on the same inputs: their results, the memory these share, and each rewrite by itself.

`run` runs a version as Inductor will: stores put back in place first. `shared` tells which results overlap. `rewrites` takes
the values that the older version has where a rule begins, computes what the rule put there, and gives what the first unchanged
nodes behind it make of that beside what they made before: a difference there is the rule's own, which nothing has enlarged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, GraphModule, Node

from inductor_ext import torch_compat
from inductor_ext.calls import calls
from inductor_ext.graph import copy_of
from inductor_ext.report.explain import cloned

#: An integer of each size in bytes, to look at memory through.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass
class Results:
    """Tensors among a graph's outputs, and its tensor inputs as the run has left them."""

    outputs: list[torch.Tensor]
    inputs: list[torch.Tensor]


def in_place(graph: Graph) -> GraphModule:
    """A copy of ``graph`` with its stores in place, as Inductor makes them."""
    copied = copy_of(graph)
    copied.output_node().meta = dict(graph.output_node().meta)
    module = GraphModule(graph.owning_module or {}, copied)
    torch_compat.reinplace(module)
    return module


def run(module: GraphModule, inputs: Any) -> Results:
    """Run a graph node by node on copies of ``inputs``."""
    copies = cloned(list(inputs))
    with torch.no_grad():
        outputs = torch_compat.EagerInterpreter(module).run(*copies)
    return Results(*([v for v in pytree.tree_leaves(tree) if isinstance(v, torch.Tensor)] for tree in (outputs, copies)))


def shared(results: Results) -> set[tuple[str, str]]:
    """Pairs of an output with another output, or with an input, that have a byte in common."""
    named = [(f"output {index}", value) for index, value in enumerate(results.outputs)]
    others = [*named, *((f"input {index}", value) for index, value in enumerate(results.inputs))]
    pairs = itertools.product(enumerate(named), enumerate(others))
    return {(one, two) for (i, (one, a)), (j, (two, b)) in pairs if i < j and _overlap(a, b)}


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have a byte in common: strides may interleave them without that."""
    storage = a.untyped_storage()
    if a.device != b.device or not storage.nbytes() or storage.data_ptr() != b.untyped_storage().data_ptr():
        return False
    ranges = sorted((each.storage_offset() * each.element_size(), _end(each)) for each in (a, b))
    if not a.numel() or not b.numel() or ranges[0][1] <= ranges[1][0]:
        return False
    marks = torch.zeros(storage.nbytes(), dtype=torch.uint8, device=a.device)
    _like(a, marks).fill_(-1)
    return bool(_like(b, marks).any())


def _end(value: torch.Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()))
    return (value.storage_offset() + last + 1) * value.element_size()


def _like(value: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """The places of ``value`` in another storage of the same size."""
    size, wide = value.element_size(), 1
    if size not in _BITS:  # complex128
        size, wide = 8, value.element_size() // 8
    shape, stride = list(value.shape), [each * wide for each in value.stride()]
    if wide > 1:
        shape, stride = [*shape, wide], [*stride, 1]
    made = torch.empty(0, dtype=_BITS[size], device=value.device)
    return made.set_(marks.untyped_storage(), value.storage_offset() * wide, shape, stride)


def rewrites(before: GraphModule, after: GraphModule, inputs: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(node, its value before, its value after) for each node of both graphs that reads or does something else now.

    What it reads is computed from the values of ``before``, so that each rewrite is seen by itself.
    """
    old = {node.name: node for node in before.graph.nodes}
    new, edges = _changes(old, after.graph)
    needed = {each.name for node in (*new, *edges) for each in node.all_input_nodes if each.name in old}
    needed |= {node.name for node in edges}
    known = _values(before, needed, inputs)
    interpreter = torch_compat.EagerInterpreter(after)
    made: dict[str, Any] = {}
    with torch.no_grad(), unwritten_is_nan():
        for node in after.graph.nodes:
            if node in new or node in edges:
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: made[n.name] if n in new else known[n.name])
                if _writes(node):
                    args, kwargs = cloned((args, kwargs))
                value = args[0] if node.op == "output" else getattr(interpreter, node.op)(node.target, args, kwargs)
                if node in new:
                    made[node.name] = value
                    continue
                for was, now in zip(_used(node, known[node.name]), _used(node, value), strict=True):
                    if isinstance(was, torch.Tensor):
                        yield node.name, was, now


def _used(node: Node, value: Any) -> list[Any]:
    """What of a node's value anything reads: attention also gives the state of a random generator, for instance."""
    if not isinstance(value, (tuple, list)) or node.op == "output":
        return pytree.tree_leaves(value)
    items = {user.args[1] for user in node.users if calls(user, operator.getitem)}
    return [each for index, each in enumerate(value) if index in items]


def _changes(old: dict[str, Node], after: Graph) -> tuple[set[Node], set[Node]]:
    """Nodes that a rule has made, and nodes that it left but for what they read or what they call."""
    new, edges = set(), set()
    for node in after.nodes:
        was = old.get(node.name)
        if was is None or was.op != node.op:
            new.add(node)
        elif (str(was.args), str(was.kwargs), was.target) != (str(node.args), str(node.kwargs), node.target):
            edges.add(node)
    return new, edges


def _values(module: GraphModule, needed: set[str], inputs: Any) -> dict[str, Any]:
    """Values of the nodes called so; inputs as they were given."""
    known: dict[str, Any] = {}

    class Recorder(torch_compat.EagerInterpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if n.name in needed:
                known[n.name] = cloned(value) if any(_writes(user) for user in n.users) else value
            return value

    with torch.no_grad(), unwritten_is_nan():
        Recorder(module).run(*cloned(list(inputs)))
    return known


@contextlib.contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Memory that an operator does not write, as a grouped product's rows of no group, is alike in all versions."""
    known = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operators that are not deterministic say so
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(known[0], warn_only=known[1])


def _writes(node: Node) -> bool:
    target: Callable[..., Any] | str = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
