"""Several models, one after the other, a few layers of each: what a family gains, beside what its shapes ask for.

Every model is a `run` of its own. Coordinate descent, which torchao's configurations switch on and which compiles for minutes,
is off on all sides.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from inductor_ext.bench import model as models
from inductor_ext.bench.families import ModelShape
from inductor_ext.bench.run import Begun, Plan, Stage, begun, environment, run
from inductor_ext.bench.sides import parse_sides
from inductor_ext.bench.tables import number
from inductor_ext.bench.workload import Workload
from inductor_ext.report.html import Section
from inductor_ext.settings import RuleMode

#: Those that stand for a family. Others are the same layers in another size.
DEFAULT = (
    "Qwen3-0.6B", "Qwen2-1.5B", "Llama-3.1-8B", "Mistral-7B", "Phi-3-mini", "OLMo-2-1B", "Gemma-2-2B", "Gemma-3-1B",
    "BERT-large", "BERT-base", "MiniLM-L6", "ModernBERT-base", "SigLIP-so400m", "Whisper-large-encoder", "Flux-single",
    "Qwen3-30B-A3B",
)  # fmt: skip

#: Layers of each model: what is outside of them must not hide what they gain.
LAYERS = 4

#: With ``together``: two sides compile, and one of them builds kernels.
CORES_A_MODEL = 3


def parse(names: str) -> list[str]:
    """``"all"``, or names of models with commas between."""
    wanted = list(DEFAULT) if names == "all" else [name.strip() for name in names.split(",")]
    return [models.named(name)[0] for name in wanted]


def workload(shape: ModelShape, batch: int, length: int) -> Workload:
    """``batch`` texts of ``length`` or, of a model that fixes its positions, about as many of those."""
    if not shape.positions:
        return Workload((length,) * batch)
    return Workload((shape.positions,) * max(1, round(batch * length / shape.positions)))


def run_suite(
    names: Sequence[str],
    layers: int,
    batch: int,
    length: int,
    *,
    told: Callable[[str], None],
    stage: Stage,
    rules: Mapping[str, RuleMode] = types.MappingProxyType({}),
    **options: Any,
) -> dict[str, Any]:
    """One row a model, ``told`` of as it begins; ``rules`` are modes of our side's, ``options`` those of `Plan`.

    A model that fails has its error in its row, and costs no other. With ``together`` all models compile first, several at
    once, and none is timed before all have: their weights are on the GPU at once.
    """
    plans = []
    for name in names:
        shape = models.named(name, layers)[1]
        sides = parse_sides("stock,ours", rules)
        plans.append(Plan(name, shape, workload(shape, batch, length), sides, coordinate_descent=False, **options))
    rows = []
    with contextlib.ExitStack() as stack:
        together = _together(plans, stack, stage) if options.get("together") else None
        for index, plan in enumerate(plans):
            told(f"{plan.name}: {plan.workload}")
            rows.append(_row(together[index].measure(stage) if together else run(plan, stage)))
    ratios = [row["of_stock"] for row in rows if row["of_stock"]]
    mean = round(statistics.geometric_mean(ratios), 4) if ratios else None
    head = {"environment": environment(plan.device), "fp8": plan.fp8, "device": plan.device, "how_timed": plan.how_timed}
    return {**head, "coordinate_descent": False, "geometric_mean": mean, "suite": rows}


def _together(plans: Sequence[Plan], stack: contextlib.ExitStack, stage: Stage) -> list[Begun]:
    """All of them compiled; their processes live as long as ``stack``."""
    cores = os.cpu_count() or 1
    at_once = max(1, cores // CORES_A_MODEL)

    def begin(plan: Plan) -> Begun:
        return stack.enter_context(begun(plan, contextlib.nullcontext, threads=max(1, cores // (2 * at_once))))

    with stage(f"Compiling {len(plans)} models, {at_once} at once"), ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(begin, plans))


def _row(result: dict[str, Any]) -> dict[str, Any]:
    stock, ours = result["sides"]
    both = {"stock": stock, "ours": ours}
    return {
        "model": result["model"]["name"],
        "layers": result["model"]["layers"],
        "workload": f"{result['workload']['items']} × {max(result['workload']['lengths'])}",
        "stock_ms": stock["step_ms"],
        "ours_ms": ours["step_ms"],
        "of_stock": ours["of_stock"],
        "floor_ms": result["floor"]["ms"],
        "compile_s": {name: side["compile_s"] for name, side in both.items()},
        "rewrites": ours["rewrites"],
        "cosine_to_bf16": {name: side["cosine_to_bf16"] for name, side in both.items()},
        "breakdown": {name: side["breakdown"] for name, side in both.items()},
        "kernels": {name: side["kernels"] for name, side in both.items()},
        "error": stock["error"] or ours["error"],
    }


def section(result: Mapping[str, Any]) -> Section:
    """The table that a person reads."""
    columns = ("model", "layers", "items × tokens", "stock, ms", "ours, ms", "stock / ours", "floor, ms", "rewrites")
    mean = f"stock / ours, geometric mean: {number(result['geometric_mean'], '.2f')}"
    return Section("Models", mean, columns, [_cells(row) for row in result["suite"]])


def _cells(row: Mapping[str, Any]) -> list[str]:
    times = [number(row[name], ".2f") for name in ("stock_ms", "ours_ms", "of_stock", "floor_ms")]
    rewrites = ", ".join(f"{name} ×{count}" for name, count in row["rewrites"].items())
    return [row["model"], str(row["layers"]), row["workload"], *times, rewrites]
