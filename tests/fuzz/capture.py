"""The post-grad graph of a program before the rules, after every rule that changed it, and after all of Inductor's passes.

The whole of `compile_graph` runs but for code generation; Dynamo too only where a program asks for dynamic sizes. What
Inductor calls the compiled graph is then a run of one of these versions, node by node, so that AOTAutograd's own handling of
mutated and aliased inputs is around it as in a real run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch.utils._pytree as pytree

from inductor_ext import passes, registry, settings, torch_compat
from inductor_ext.backend import compile_graph
from inductor_ext.calls import aten, is_call
from inductor_ext.graph import copy_of, value_of
from inductor_ext.memory import is_view
from inductor_ext.report.compare import unwritten_is_nan
from inductor_ext.report.events import GraphReport
from inductor_ext.report.explain import cloned, compiled_with, run_passes
from tests.fuzz.program import Loaded

FINAL = "Inductor's passes after the rules"


@dataclasses.dataclass
class Version:
    """One graph after ``rule``: "" before the first, `FINAL` after what Inductor does behind the rules (reinplacing)."""

    rule: str
    graph: torch.fx.GraphModule


@dataclasses.dataclass
class Ran:
    """What one version did: its outputs, and the tensors it was given as it left them."""

    outputs: list[torch.Tensor]
    inputs: list[torch.Tensor]
    error: str = ""
    values: list[torch.Tensor] = dataclasses.field(default_factory=list)  # outputs in the dtype that they were computed in


@dataclasses.dataclass
class Captured:
    """One graph's versions, in order, and what the rules did."""

    versions: list[Version]
    report: GraphReport
    runs: list[list[Ran]] = dataclasses.field(default_factory=list)  # one list (of all versions) for each time it was called


class _Plain(torch.nn.Module):
    """A function as a module with a flat tuple of tensors for outputs, which is all that Inductor needs."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any) -> tuple[Any, ...]:
        return tuple(tensors(self.fn(*args)))


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Around any number of captures: a rule's exception is raised, and nothing is logged a graph."""
    registry.ops(), registry.rules(), registry.define_lowerings()
    torch_compat.trace_scaled_mm_v2()
    loggers = [logging.getLogger(name) for name in ("torch", "inductor_ext")]
    raising, levels = passes.RAISE, [logger.level for logger in loggers]
    try:
        passes.RAISE = True
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        passes.RAISE = raising
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def capture(program: Loaded, inputs: tuple[Any, ...]) -> tuple[Callable[..., Any], list[Captured]]:
    """Compile ``program`` as far as its graphs, and give what runs all of their versions when it is called."""
    found: list[Captured] = []
    versions: list[Version] = []
    reports: list[GraphReport] = []

    def observe(rule: str, graph: torch.fx.Graph) -> None:
        versions.append(Version(rule, torch.fx.GraphModule(graph.owning_module or {}, copy_of(graph))))

    def inner(gm: torch.fx.GraphModule, example_inputs: Any, **keywords: Any) -> Callable[..., Any]:
        versions.clear()
        run_passes(gm, example_inputs, **keywords)
        graph = Captured([*versions, Version(FINAL, gm)], reports[-1])
        found.append(graph)
        made_in = _made_in(graph.versions[0].graph)

        def run(given: list[Any]) -> Any:
            if len(graph.versions) > 2:
                graph.runs.append([_run(version.graph, made_in, cloned(list(given))) for version in graph.versions[:-1]])
            result, last = _run_last(graph.versions[-1].graph, made_in, given)
            if graph.runs:
                graph.runs[-1].append(last)
            return result

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    chosen = settings.current(rules=dict(program.rules), build="defer", **dict(program.options))
    if program.dynamic:
        torch._dynamo.reset()
        with compiled_with(chosen, program.fn, reports.append, inner_compile=inner, observer=observe, dynamic=True) as run:
            pass
        return run, found
    with _without_caches():
        made = compile_graph(
            _Plain(program.fn),  # type: ignore[arg-type]
            inputs,
            chosen,
            on_report=reports.append,
            observer=observe,
            inner_compile=inner,
            inductor_options={"fx_graph_cache": False, "fx_graph_remote_cache": False},
        )
    return made, found


@contextlib.contextmanager
def _without_caches() -> Iterator[None]:
    with torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True):
        yield


def _run(graph: torch.fx.GraphModule, made_in: list[torch.dtype | None], given: Any) -> Ran:
    try:
        return _run_last(graph, made_in, given)[1]
    except (RuntimeError, IndexError, ValueError) as error:
        return Ran([], [], f"{type(error).__name__}: {error}".partition("\n")[0])


def _run_last(graph: torch.fx.GraphModule, made_in: list[torch.dtype | None], given: Any) -> tuple[Any, Ran]:
    with torch.no_grad(), unwritten_is_nan():
        outputs = torch_compat.EagerInterpreter(graph).run(*given)
    values = [_as(dtype, each) for dtype, each in zip(made_in, outputs, strict=True) if isinstance(each, torch.Tensor)]
    return outputs, Ran(tensors(outputs), tensors(given), values=values)


def _made_in(graph: torch.fx.GraphModule) -> list[torch.dtype | None]:
    """For each output that is bytes of something else, its dtype: distances between bytes of floats would mean nothing."""
    found: list[torch.dtype | None] = []
    for node in graph.graph.output_node().args[0]:
        dtype = None
        while is_view(node):
            dtype = value_of(node.args[0]).dtype if is_call(node, aten.view.dtype) else dtype
            node = node.args[0]
        found.append(dtype)
    return found


def _as(dtype: torch.dtype | None, value: torch.Tensor) -> torch.Tensor:
    if dtype is None or dtype.is_complex or not value.dim() or not value.numel():
        return value
    whole = value.shape[-1] * value.element_size() % dtype.itemsize == 0
    return value.contiguous().view(dtype) if whole and value.dtype is not dtype else value
