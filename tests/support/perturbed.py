"""Graphs as a rule's guard gets them, each changed in one place: another keyword, another dtype, another reader.

    captured = capture(example.fn, inputs)            the post-grad graph of a function, before any rule
    for change in changes(captured): …                every way in which this module can change one node of it
    rewritten(changed(captured, change), modes)       what the rules make of the changed graph

A rule that reads a node without one of its arguments, or takes a convert to any dtype for the one it knows, gives other results
than the changed graph does. What cannot be computed (a dtype that an operator does not have) is no graph, and is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, GraphModule, Node

from inductor_ext import registry, settings
from inductor_ext.calls import CONVERT, aten, calls
from inductor_ext.graph import copy_of
from inductor_ext.passes import RewritePass
from inductor_ext.report.compare import unwritten_is_nan
from inductor_ext.report.explain import cloned, compiled_with, copied, run_passes
from tests.support.equal import different

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool)


@dataclasses.dataclass
class Captured:
    """``graph`` before the rules, and the ``inputs`` that its placeholders are given."""

    graph: Graph
    inputs: list[Any]
    fake_mode: Any

    @property
    def tensors(self) -> int:
        return sum(isinstance(each, torch.Tensor) for each in self.inputs)


@dataclasses.dataclass(frozen=True)
class Change:
    """``apply(node)`` changes the node called ``node`` of a copy of the graph."""

    node: str
    what: str
    apply: Callable[[Node], None]

    def __str__(self) -> str:
        return f"{self.node}: {self.what}"


def capture(fn: Callable[..., Any], inputs: tuple[Any, ...], *, dynamic: bool | None = None, **options: Any) -> list[Captured]:
    """The graphs that ``fn`` compiles to, as they are before the first rule, with their inputs."""
    found: list[Captured] = []
    graphs: list[Graph] = []

    def inner(gm: GraphModule, example_inputs: Any, **keywords: Any) -> Callable[..., Any]:
        original = copied(gm)
        run_passes(gm, example_inputs, **keywords)
        graph = graphs.pop()
        values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
        mode = next((each.fake_mode for each in values if isinstance(each, torch.Tensor)), None)

        def run(*given: Any) -> Any:
            found.append(Captured(graph, cloned(list(given)), mode))
            return torch.fx.Interpreter(original).run(*given)

        return run

    def observe(rule: str, graph: Graph) -> None:
        if not rule:
            graphs.append(copy_of(graph))

    off = {rule.name: "off" for rule in registry.rules()}
    chosen = settings.current(build="defer", rules=off, **options)
    torch._dynamo.reset()
    with compiled_with(chosen, fn, None, inner_compile=inner, observer=observe, dynamic=dynamic) as run:
        run(*cloned(inputs))
    return found


# ---- changes ---------------------------------------------------------------------------------------------------------


def changes(graph: Graph) -> Iterator[Change]:
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target.namespace in ("aten", "prims"):
                yield from _arguments(node)
            yield from _results(node)


def _arguments(node: Node) -> Iterator[Change]:
    """Every argument that is no tensor, given another value of its kind."""
    for index, argument in enumerate(node.target._schema.arguments):
        position = None if argument.kwarg_only else index
        current = node.kwargs.get(argument.name, argument.default_value)
        if position is not None and position < len(node.args):
            current = node.args[position]
        if argument.name in ("layout", "device", "pin_memory", "memory_format", "non_blocking", "implicit"):
            continue
        for other in _others(str(argument.type), argument.name, current, node):
            yield Change(node.name, f"{argument.name}={other}", _setter(index, argument, other))
    if len(node.args) > 1 and isinstance(node.args[0], Node) and isinstance(node.args[1], Node):
        yield Change(node.name, "operands swapped", lambda n: setattr(n, "args", (n.args[1], n.args[0], *n.args[2:])))


def _others(kind: str, name: str, current: Any, node: Node) -> list[Any]:
    if name in ("dtype", "out_dtype") or isinstance(current, torch.dtype):
        return [dtype for dtype in DTYPES if dtype is not current]
    if isinstance(current, Node) or (isinstance(current, (list, tuple)) and any(isinstance(each, Node) for each in current)):
        return []
    if isinstance(current, bool) or kind == "bool":
        return [not current]
    if isinstance(current, float):
        return [current * 2, current + 0.5]
    if isinstance(current, int):
        return [current + 1, current - 1, *([0.5] if kind == "number" else ())]
    if isinstance(current, (list, tuple)) and name in ("dim", "dims") and all(isinstance(each, int) for each in current):
        rank = next(each.meta["val"].dim() for each in node.all_input_nodes)
        return [[dim] for dim in range(rank) if [dim] != [each % rank for each in current]] + [list(range(rank))]
    return []


def _setter(index: int, argument: Any, value: Any) -> Callable[[Node], None]:
    def apply(node: Node) -> None:
        if argument.kwarg_only:
            node.kwargs = {**node.kwargs, argument.name: value}
            return
        known = node.target._schema.arguments
        args = list(node.args)
        while len(args) <= index:
            name = known[len(args)].name
            args.append(node.kwargs.get(name, known[len(args)].default_value))
        args[index] = value
        node.kwargs = {name: each for name, each in node.kwargs.items() if name not in {a.name for a in known[: len(args)]}}
        node.args = tuple(args)

    return apply


def _results(node: Node) -> Iterator[Change]:
    """What a node gives: read by the caller too, or through another dtype and back, or halved by a broadcast of itself."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return
    if node.target is not aten.empty.memory_format:  # nobody knows what is in it
        yield Change(node.name, "returned too", _returned)
        yield Change(node.name, "a view of it returned too", _view_returned)
    if value.dtype.is_floating_point:
        for dtype in DTYPES:
            if dtype is not value.dtype:
                yield Change(node.name, f"through {dtype}", _through(dtype))


def _returned(node: Node) -> None:
    output = node.graph.output_node()
    output.args = ([*pytree.tree_leaves(output.args[0]), node],)


def _view_returned(node: Node) -> None:
    with node.graph.inserting_after(node):
        view = node.graph.call_function(aten.unsqueeze.default, (node, 0))
    _returned(view)


def _through(dtype: torch.dtype) -> Callable[[Node], None]:
    def apply(node: Node) -> None:
        users = list(node.users)
        with node.graph.inserting_after(node):
            there = node.graph.call_function(CONVERT, (node, dtype))
        with node.graph.inserting_after(there):
            back = node.graph.call_function(CONVERT, (there, node.meta["val"].dtype))
        for user in users:
            user.replace_input_with(node, back)

    return apply


# ---- running ---------------------------------------------------------------------------------------------------------


def changed(captured: Captured, change: Change) -> Graph | None:
    """A copy of the graph with the change made and its fake values computed anew; None where it is no graph."""
    graph = copy_of(captured.graph)
    known = set(graph.nodes)
    node = next(each for each in graph.nodes if each.name == change.node)
    kept = dict(captured.graph.output_node().meta)
    change.apply(node)
    graph.output_node().meta.update({name: value for name, value in kept.items() if name != "user_visible_output_idxs"})
    try:
        graph.lint()
        with torch.no_grad(), captured.fake_mode or contextlib.nullcontext():
            _propagate(graph, {node, *(each for each in graph.nodes if each not in known)})
    except Exception:
        return None
    return None if any(map(_reads_past_its_operands, graph.nodes)) else graph


def _propagate(graph: Graph, stale: set[Node]) -> None:
    """Fake values of ``stale`` nodes and of what reads one that has changed; those of all nodes take three times as long."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not (node in stale or stale.intersection(node.all_input_nodes)):
            continue
        args, keywords = torch.fx.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
        before, node.meta["val"] = node.meta.get("val"), node.target(*args, **keywords)
        if _alike(before, node.meta["val"]):
            stale.discard(node)
        else:
            stale.add(node)


def _alike(a: Any, b: Any) -> bool:
    """Whether two fake tensors are the same to who reads them; symbolic sizes are not compared, which could add guards."""
    if type(a) is not type(b) or not isinstance(a, torch.Tensor):
        return False
    sizes = (*a.shape, *a.stride(), a.storage_offset(), *b.shape, *b.stride(), b.storage_offset())
    same = a.dtype == b.dtype and a.device == b.device and all(type(each) is int for each in sizes)
    return same and (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())


def _reads_past_its_operands(node: Node) -> bool:
    """Whether attention gets other shapes than it takes: PyTorch's for a CPU does not look at them, and reads what is there."""
    if not calls(node, aten._scaled_dot_product_flash_attention_for_cpu.default):
        return False
    q, k, v = (each.meta["val"].shape for each in node.args[:3])
    return len(q) != 4 or q[:2] != k[:2] or k != v or q[3] != k[3]


def rewritten(graph: Graph, modes: dict[str, Any], **options: Any) -> tuple[Graph, dict[str, int]]:
    """The graph after the rules of ``modes``, and how often each has changed it. No module: its code would be written twice."""
    from torch._inductor.virtualized import V

    made = copy_of(graph)
    reports: list[Any] = []
    chosen = settings.current(build="defer", rules=modes, **options)
    mode = next((n.meta["val"].fake_mode for n in made.nodes if isinstance(n.meta.get("val"), torch.Tensor)), None)
    with V.set_fake_mode(mode) if mode is not None else contextlib.nullcontext():
        RewritePass(chosen, None, reports.append)(made)
    return made, reports[0].counts()


def run(graph: Graph, inputs: list[Any]) -> list[torch.Tensor] | None:
    """Outputs, then inputs as they are left; None where the graph raises.

    What an operator does not write (rows of no expert) is NaN, so that it can be told from what it does.
    """
    copies = cloned(inputs)
    try:
        with torch.no_grad(), unwritten_is_nan():
            outputs = torch.fx.Interpreter(graph.owning_module or torch.nn.Module(), graph=graph).run(*copies)
    except Exception:
        return None
    return [each for each in pytree.tree_leaves((outputs, copies)) if isinstance(each, torch.Tensor)]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> tuple[int, float]:
    """How many elements have other bytes, where ``wanted`` was written at all, and ‖found - wanted‖ / ‖wanted‖."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return wanted.numel(), float("inf")
    written = ~torch.isnan(wanted.float()) if wanted.is_floating_point() else torch.ones_like(wanted, dtype=torch.bool)
    mask = different(found, wanted) & written
    gap, norm = (found.double() - wanted.double())[mask].norm(), wanted.double()[written].norm()
    return int(mask.sum()), float((gap / norm if norm else gap).nan_to_num(nan=float("inf")))
