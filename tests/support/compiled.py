"""Compile a function and keep what happened: reports of every graph, outputs, and what was written to the arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

from inductor_ext import settings
from inductor_ext.backend import compile_graph
from inductor_ext.moe import MXFP8Weight
from inductor_ext.report.events import GraphReport, Refusal
from inductor_ext.report.explain import cloned


@dataclasses.dataclass
class Recorder:
    """A backend that keeps its reports: ``torch.compile(f, backend=Recorder(rules={…}))``."""

    options: dict[str, Any]
    reports: list[GraphReport] = dataclasses.field(default_factory=list)

    def __init__(self, **options: Any) -> None:
        self.options, self.reports = options, []

    def __call__(self, gm: Any, example_inputs: Any, *, mode: Any = None, options: Any = None, **_: Any) -> Any:
        chosen = settings.current(**self.options)
        return compile_graph(gm, example_inputs, chosen, mode=mode, options=options, on_report=self.reports.append)

    def counts(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for report in self.reports:
            for rule, count in report.counts().items():
                total[rule] = total.get(rule, 0) + count
        return total

    def refusals(self, rule: str | None = None) -> list[Refusal]:
        found = [refusal for report in self.reports for refusal in report.refusals]
        return [refusal for refusal in found if rule in (None, refusal.rule)]


def run_compiled(
    fn: Callable[..., Any], inputs: tuple[Any, ...], *, dynamic: bool | None = False, mode: str | None = None, **options: Any
) -> tuple[list[torch.Tensor], Recorder]:
    """Tensors returned by and then arguments of the compiled function, run on copies of ``inputs``."""
    torch._dynamo.reset()
    recorder = Recorder(**options)
    return run_copies(torch.compile(fn, backend=recorder, dynamic=dynamic, mode=mode), inputs), recorder


def run_copies(fn: Callable[..., Any], inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    """Tensors returned by ``fn`` and then, as it left them, copies of its arguments."""
    copies = cloned(inputs)
    outputs = fn(*copies)
    leaves = [leaf.detach() for leaf in pytree.tree_leaves((outputs, copies)) if isinstance(leaf, torch.Tensor)]
    return [leaf.dequantize() if isinstance(leaf, MXFP8Weight) else leaf for leaf in leaves]
