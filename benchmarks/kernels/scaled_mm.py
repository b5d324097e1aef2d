"""scaled_mm against ``torch._scaled_mm``, with the table's choices: speed, siblings, accuracy and the cost of a call.

    python -m benchmarks.kernels.scaled_mm --out benchmarks/results/h200/scaled_mm.json [--collectives]

Operands are cold in L2. Both sides are CUDA-graph replays, timed in turn, three rounds; a ratio is the median of the rounds'.
Where the table keeps PyTorch's operator both sides are one call, and the ratio is 1 by choice. ``--collectives`` also times
CUTLASS's own SM90 collectives (a minute a kernel to build), the yardstick of the kernels written here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import timing
from benchmarks.kernels import scaled_mm_cases as cases
from benchmarks.kernels.scaled_mm_cases import Operands, Problem
from benchmarks.kernels.shared import Out, show
from inductor_ext import jit, registry
from inductor_ext.kernels.scaled_mm import choice
from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm.op import OP

QKV = (2048, 1024, 1024)
GATE_UP = (3072, 3072)
BF16 = torch.bfloat16


def problems(kinds: Sequence[tuple[bool, bool]]) -> list[Problem]:
    shapes = [(m, n, k) for n, k in cases.GRID for m in cases.GRID_M]
    shapes += [(m, n, k) for n, k in cases.LLAMA_8B for m in cases.LLAMA_M] + [(8192, 8192, 8192)]
    return [Problem(m, n, k, rowwise, fast) for m, n, k in shapes for rowwise, fast in kinds]


def direct(problem: Problem, x: Operands, config: str) -> Callable[[], Any]:
    """What a compiled graph calls."""
    lists = [x.a], [x.b], [x.scale_a], [x.scale_b], [None]
    return lambda: OP._call(*lists, problem.out_dtype, problem.fast, True, config, out=x.out)


def time_grid(kinds: Sequence[tuple[bool, bool]], yardstick: Any) -> list[dict[str, Any]]:
    rows = []
    for problem in problems(kinds):
        chosen, sets = problem.chosen, cases.cold_operands(problem)
        sides = {"stock": [cases.stock(problem, x) for x in sets]}
        if chosen.use:
            sides["ours"] = [direct(problem, x, chosen.config.name) for x in sets]
        for name, call in (yardstick or {}).items():
            if name[1] == problem.fast and problem.rowwise:
                sides[name[0]] = [lambda x=x, c=call: c(x.a, x.b, x.scale_a, x.scale_b, None, x.out) for x in sets]
        found = timing.in_turn(sides, replays=9, **cases.effort(problem))
        kind = choice.kind(problem.rowwise, problem.fast)
        row = {**problem.row, "kind": kind, "choice": chosen.config.name if chosen.use else "stock", **timing.medians(found)}
        rows.append({**row, "ratio": timing.ratio(found["stock"], found["ours"]) if chosen.use else 1.0})
        torch.cuda.empty_cache()
    show(rows, 150, without=("rowwise",))
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Geometric means: over Qwen3-0.6B's projections, over Llama-3.1-8B's projections and 8192³, over all; the lowest point."""
    found = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        groups = {
            "grid": [row["ratio"] for row in mine if (row["n"], row["k"]) in cases.GRID],
            "llama and 8192": [row["ratio"] for row in mine if (row["n"], row["k"]) not in cases.GRID],
            "all": [row["ratio"] for row in mine],
        }
        found[kind] = {name: round(statistics.geometric_mean(values), 3) for name, values in groups.items() if values}
        found[kind]["lowest"] = min(row["ratio"] for row in mine)
    return found


def by_shape(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kind, N and K, with lists over M. Of CUTLASS's collectives the fastest."""
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in rows:
        collectives = [us for name, us in row.items() if name.startswith("cutlass")]
        lists = {name: row.get(name) for name in ("m", "choice", "stock_us", "ours_us", "ratio")}
        lists |= {"collectives_us": min(collectives)} if collectives else {}
        shape = found.setdefault((row["kind"], row["n"], row["k"]), {name: row[name] for name in ("kind", "n", "k")})
        for name, value in lists.items():
            shape.setdefault(name, []).append(value)
    return list(found.values())


def time_siblings(widths: tuple[int, ...], k: int, m: int, rowwise: bool) -> dict[str, Any]:
    """One launch for products that share a, against a ``torch._scaled_mm`` for each and against a launch of ours for each."""
    apart = [Problem(m, n, k, rowwise, True) for n in widths]
    together = Problem(m, sum(widths), k, rowwise, True)
    decided = scaled_mm.decide("sm_90a", m, widths, k, rowwise, True)
    assert decided is not None
    count = timing.sets_for(together.bytes, cases.MAX_SETS)
    stock, ours, each_ours = [], [], []
    for _ in range(count):
        x = [cases.operands(problem) for problem in apart]
        a, scale_a = x[0].a, x[0].scale_a
        for part in x:
            part.a, part.scale_a = a, scale_a
        out = torch.empty(m, sum(widths), device="cuda", dtype=BF16)
        lists = [a], [part.b for part in x], [scale_a], [part.scale_b for part in x], [None] * len(x)
        stock.append(lambda x=x: [cases.stock(problem, part)() for problem, part in zip(apart, x)])
        ours.append(lambda lists=lists, out=out: OP._call(*lists, BF16, True, True, decided.config.name, out=out))
        each_ours.append(lambda x=x: [direct(problem, part, "")() for problem, part in zip(apart, x)])
    sides = {"stock": stock, "ours": ours, "apart": each_ours}
    found = timing.in_turn(sides, replays=9, **cases.effort(together))
    return {
        "widths": list(widths), "k": k, "m": m, "rowwise": rowwise, "kernel": decided.config.name, "used": decided.use,
        "stock_apart_us": round(statistics.median(found["stock"]), 2),
        "ours_apart_us": round(statistics.median(found["apart"]), 2),
        "together_us": round(statistics.median(found["ours"]), 2),
        "ratio_to_stock": timing.ratio(found["stock"], found["ours"]),
        "ratio_to_apart": timing.ratio(found["apart"], found["ours"]),
    }  # fmt: skip


def accuracy(k: int, fast: bool, rowwise: bool) -> dict[str, Any]:
    """‖out - fp64‖ / ‖fp64‖ of both."""
    problem = Problem(512, 1024, k, rowwise, fast)
    x = cases.operands(problem)
    wanted = (x.a.double() @ x.b.double()) * x.scale_a.double() * x.scale_b.double()
    stock = cases.stock(problem, x)()
    distance = lambda made: float((made.double() - wanted).norm() / wanted.norm())  # noqa: E731
    found: dict[str, Any] = {"k": k, "kind": choice.kind(rowwise, fast), "stock": distance(stock)}
    for config in ("stream:64x64/4", "tile:128x128p" if fast else "tile:128x128c"):
        direct(problem, x, config)()
        found[config] = distance(x.out)
    return found


def overhead() -> dict[str, float]:
    """Host µs of a call, the device far behind: with the kernel named, looked up by M, three siblings; and PyTorch's."""
    problem = Problem(64, 1024, 1024, True, True)
    x = cases.operands(problem)
    wide = torch.empty(64, 3072, device="cuda", dtype=BF16)
    lists = [x.a], [x.b] * 3, [x.scale_a], [x.scale_b] * 3, [None] * 3
    calls = {
        "kernel named": direct(problem, x, "stream:64x64/4"),
        "kernel looked up": direct(problem, x, ""),
        "three siblings": lambda: OP._call(*lists, BF16, True, True, "stream:64x64/4", out=wide),
        "torch._scaled_mm": cases.stock(problem, x),
    }
    return {name: round(timing.call_time(call) * 1e6, 2) for name, call in calls.items()}


def main(
    out: Out = None,
    collectives: Annotated[bool, typer.Option(help="Time CUTLASS's own collectives too.")] = False,
) -> None:
    console = Console(width=110)
    registry.ops()
    kinds = ((True, True), (False, True), (True, False), (False, False))
    chosen = [(problem.chosen.config, problem) for problem in problems(kinds)]
    modules = cases.build(chosen)
    console.print(f"{len(modules)} kernels")
    yardstick = _collectives() if collectives else {}
    rows = time_grid(kinds, yardstick)
    siblings = [
        time_siblings(widths, 1024, m, rowwise)
        for widths in (QKV, GATE_UP) for m in (1, 16, 64, 512, 1024, 7168) for rowwise in (True, False)
    ]  # fmt: skip
    accuracies = [accuracy(k, fast, row) for k in (256, 1024, 4096, 16384) for fast in (True, False) for row in (True, False)]
    costs = overhead()
    found = summary(rows)
    parts = {"summary": found, "call_us": costs, "siblings": siblings, "accuracy": accuracies}
    if out is not None:
        timing.write_json(out, {"how_timed": timing.HOW, **parts, "shapes": by_shape(rows)})
    show(siblings, 150, without=("k",))
    show(accuracies, 130)
    console.print(found, costs)


def _collectives() -> dict[tuple[str, bool], Any]:
    from benchmarks.kernels import cutlass_collectives

    made = [each for each in cutlass_collectives.USUAL if not each.exact]
    jit.prepare([each.spec("sm_90a", (cases.E4, cases.E4, BF16)) for each in made])
    return {
        (each.name, True): cutlass_collectives.load(each.tile_m, each.tile_n, each.pingpong, each.cluster_m, each.exact)
        for each in made
    }


if __name__ == "__main__":
    typer.run(main)
