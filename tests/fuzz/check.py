"""One program: eager, then its graphs' versions against each other."""

from __future__ import annotations

import dataclasses
import traceback
from collections import Counter
from typing import Any

import torch

from inductor_ext import jit, settings
from inductor_ext.report.compare import unwritten_is_nan
from inductor_ext.report.explain import cloned
from tests.fuzz.capture import Captured, capture, tensors
from tests.fuzz.compare import CONTRACT, Fault, compared
from tests.fuzz.program import Loaded
from tests.support.equal import different
from tests.support.kernels import called_in

#: What eager says where an index is out of range; other errors make a program worthless.
OUT_OF_RANGE = ("out of bounds", "out of range")


@dataclasses.dataclass
class Outcome:
    """``discarded`` says why a program was no use; the counts are by rule."""

    faults: list[Fault] = dataclasses.field(default_factory=list)
    rewrites: Counter[str] = dataclasses.field(default_factory=Counter)
    refusals: Counter[str] = dataclasses.field(default_factory=Counter)
    discarded: str = ""
    graphs: list[Captured] = dataclasses.field(default_factory=list)


def check(program: Loaded, device: str = "cpu", *, run: bool = True, kernels: frozenset[jit.JitSpec] | None = None) -> Outcome:
    """Compare what the rules make of ``program`` with what it was.

    On a GPU eager runs on the CPU all the same: an index out of range would cost the CUDA context. ``run=False`` stops after
    the graphs; a program that needs others than ``kernels`` is discarded.
    """
    outcome = Outcome()
    try:
        inputs = _inputs(program)
    except Exception as error:
        outcome.discarded = f"inputs: {_short(error)}"
        return outcome
    beyond, eager = "", []
    try:
        with unwritten_is_nan():  # what an index out of memory that nothing wrote gives is nothing to compare with
            eager = _called(program, program.fn, cloned(inputs))
    except Exception as error:
        beyond = _short(error)
        if device != "cpu" or not any(words in str(error) for words in OUT_OF_RANGE):
            outcome.discarded = f"eager: {beyond}"
            return outcome
    inputs, ours = moved(inputs, device), []
    try:
        compiled, outcome.graphs = capture(program, cloned(inputs))
        rewritten = program.dynamic or any(graph.report.rewrites for graph in outcome.graphs)
        if kernels is not None and not kernels.issuperset(specs_of(outcome)):
            outcome.discarded = "another kernel"
            return outcome
        if not run or not rewritten:
            _count(outcome)
            return outcome
        ours = _called(program, compiled, cloned(inputs))
        if beyond and any(run[0].error for graph in outcome.graphs for run in graph.runs):  # as it would without our rules
            outcome.faults.append(Fault(_rules(outcome), "does not raise where eager does", beyond))
    except Exception as error:
        if not beyond:
            rule = _rule_that_raised(error) if CONTRACT not in str(error) else ""
            if rule:
                outcome.faults.append(Fault(rule, f"raised {type(error).__name__}", _short(error)))
            else:
                outcome.discarded = f"compiling: {_short(error)}"
    _count(outcome)
    if not beyond:
        faults = [fault for graph in outcome.graphs for fault in compared(graph)]
        if device == "cpu" and faults and _same(eager, ours):  # it is stock's decompositions that differ from eager
            faults = [fault for fault in faults if fault.about_memory]
        outcome.faults += faults
    return outcome


def specs_of(outcome: Outcome) -> list[jit.JitSpec]:
    """The kernels that any version of any graph calls, on a CUDA device."""
    arch = jit.current_arch(settings.current())
    graphs = [version.graph.graph for graph in outcome.graphs for version in graph.versions]
    return list(dict.fromkeys(spec for graph in graphs for spec in called_in(graph, arch))) if arch is not None else []


def moved(inputs: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """The same tensors on ``device``, still views of one another where they are."""
    if device == "cpu":
        return inputs
    memo: dict[int, torch.UntypedStorage] = {}

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if type(value) is not torch.Tensor:
            return value.to(device)
        storage = value.untyped_storage()
        if storage.data_ptr() not in memo:
            memo[storage.data_ptr()] = storage.to(device=torch.device(device))
        made = torch.empty(0, dtype=value.dtype, device=device)
        made.set_(memo[storage.data_ptr()], value.storage_offset(), value.shape, value.stride())
        return made.requires_grad_(value.requires_grad)

    return tuple(map(move, inputs))


def _inputs(program: Loaded) -> tuple[Any, ...]:
    made = program.inputs()
    if not program.backward:
        return made
    return tuple(x.requires_grad_() if _trainable(x) else x for x in made)


def _trainable(x: Any) -> bool:
    return type(x) is torch.Tensor and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and not x._is_view()


def _same(eager: list[torch.Tensor], ours: list[torch.Tensor]) -> bool:
    alike = len(eager) == len(ours) and all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(eager, ours))
    return alike and not any(bool(different(a, b).any()) for a, b in zip(eager, ours) if type(a) is torch.Tensor)


def _called(program: Loaded, fn: Any, inputs: Any) -> list[torch.Tensor]:
    """Outputs, and inputs as the call leaves them."""
    outputs = tensors(fn(*inputs))
    if program.backward:
        differentiable = [out.float().sum() for out in outputs if out.requires_grad]
        if differentiable:
            torch.stack(differentiable).sum().backward()
    return [each.detach() for each in (*outputs, *tensors(inputs))]


def _count(outcome: Outcome) -> None:
    for graph in outcome.graphs:
        outcome.rewrites.update(graph.report.counts())
        outcome.refusals.update(refusal.rule for refusal in graph.report.refusals)


def _rules(outcome: Outcome) -> str:
    return "+".join(sorted({event.rule for graph in outcome.graphs for event in graph.report.rewrites}))


def _rule_that_raised(error: Exception) -> str:
    """The file of ours that was running, if any: an error of stock's own has none of `patterns` in its traceback."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = [name for name in frames if "/patterns/" in name or "/kernels/" in name or name.endswith("inductor_ext/passes.py")]
    cause = error.__cause__
    if not ours and isinstance(cause, Exception):
        return _rule_that_raised(cause)
    rules = [name for name in ours if "/patterns/" in name and "/support/" not in name]
    return (rules or ours)[0].rsplit("/", 1)[-1].removesuffix(".py") if ours else ""


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
