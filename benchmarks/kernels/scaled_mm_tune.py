"""Tune scaled_mm: time every sensible configuration of every problem on this GPU and write the table that `choice.py` reads.

    python -m benchmarks.kernels.scaled_mm_tune --table kernels/scaled_mm/table_sm_90a.json
    … --update --sizes 7168 --shapes 4096x1024 --fast          measures some problems anew, and keeps the table's other rows

Operands are cold in L2, times are medians of CUDA-graph replays. A first round times all candidates shortly, once in each
order; a second one the best of them and ``torch._scaled_mm`` again, in turn, for longer. Candidates compete with row-wise
scales; with tensor-wise ones only the best of those are timed, since the kernels are the same.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks import timing
from benchmarks.kernels import scaled_mm_cases as cases
from benchmarks.kernels.scaled_mm_cases import Problem
from benchmarks.kernels.shared import table_text
from inductor_ext import registry
from inductor_ext.kernels.scaled_mm import choice
from inductor_ext.kernels.scaled_mm.config import Config, parse

SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 7168, 16384)
SMS = 132
TILES = ("64x128p", "64x256p", "128x128p", "128x160p", "128x192p", "128x128c", "128x192c", "128x256c", "256x128c")
CLUSTERS = ("", "@2x1")
KEPT = 4  # configurations that the second round times


def candidates(problem: Problem) -> list[Config]:
    """Configurations worth timing: tiles that fit M, splits that fill the GPU, tile counts not far from the best."""
    m, n, k = problem.m, problem.n, problem.k
    found = []
    if m <= 1024:
        for tokens in (8, 16, 32, 64, 128):
            if not min(m, 64) <= tokens <= max(8, 2 * m):
                continue
            for channels in (64, 128):
                ctas = math.ceil(n / channels) * math.ceil(m / tokens)
                splits = [s for s in (1, 2, 4, 8) if s <= tokens and s <= k // 128 and (s == 1 or ctas * s <= 4 * SMS)]
                if ctas <= 6 * SMS:
                    found += [Config("stream", tokens, channels, split=s) for s in splits]
    if m > 32:
        tiles = [parse(f"tile:{tile}{cluster}") for tile in TILES for cluster in CLUSTERS if not cluster or m >= 512]
        tiles = [tile for tile in tiles if tile.supports(not problem.fast)]
        costs = {tile: _waves(problem, tile) * tile.m * tile.n for tile in tiles}
        found += [tile for tile, cost in costs.items() if cost <= 1.6 * min(costs.values())]
    return [config for config in found if config.supports(not problem.fast)]


def _waves(problem: Problem, config: Config) -> int:
    return math.ceil(math.ceil(problem.m / config.m) * math.ceil(problem.n / config.n) / SMS)


def tune(problem: Problem, names: list[Config], modules: dict[Any, Any]) -> dict[str, Any]:
    """Times of the best configurations and of PyTorch's operator, µs."""
    sets = cases.cold_operands(problem)

    def time_us(calls: list[Any], replays: int) -> float:
        return timing.graph_time(calls, replays=replays, **cases.effort(problem)) * 1e6

    first: dict[Config, float] = {}
    for config in (*names, *reversed(names)):  # a GPU that slows down while it gets warm does so for other candidates
        taken = time_us([cases.ours(config, modules, problem, x) for x in sets], 3)
        first[config] = min(taken, first.get(config, math.inf))
    best = sorted(first, key=first.__getitem__)[:KEPT]
    rounds: dict[str, list[float]] = {}
    for _ in range(2):
        rounds.setdefault("stock", []).append(time_us([cases.stock(problem, x) for x in sets], 9))
        for config in best:
            calls = [cases.ours(config, modules, problem, x) for x in sets]
            rounds.setdefault(config.name, []).append(time_us(calls, 9))
    times = {name: round(min(values), 3) for name, values in rounds.items()}
    stock = times.pop("stock")
    return {"m": problem.m, "stock_us": stock, "ours_us": dict(sorted(times.items(), key=lambda item: item[1]))}


def main(
    out: Annotated[Path | None, typer.Option(help="Where every time goes; the table has the fastest's.")] = None,
    table: Annotated[Path, typer.Option(help="The table to write.")] = Path("table_sm_90a.json"),
    shapes: Annotated[str, typer.Option(help="N×K pairs, such as 4096x1024,1024x2048; default: all.")] = "",
    sizes: Annotated[str, typer.Option(help="M, separated by commas.")] = ",".join(map(str, SIZES)),
    fast_only: Annotated[bool, typer.Option("--fast", help="Fast accumulation alone.")] = False,
    update: Annotated[bool, typer.Option(help="Keep what the table has of other problems.")] = False,
    budget_s: Annotated[float, typer.Option(help="Stop starting new shapes after this many seconds.")] = 480.0,
) -> None:
    console, started = Console(width=150), time.perf_counter()
    registry.ops()
    wanted = [tuple(map(int, pair.split("x"))) for pair in shapes.split(",") if pair]
    wanted = wanted or [*cases.GRID, *cases.LLAMA_8B, *cases.OTHERS]
    rows_of, modes = [int(m) for m in sizes.split(",")], (True,) if fast_only else (True, False)
    every = [Problem(m, n, k, True, fast) for fast in modes for n, k in wanted for m in rows_of]
    modules = cases.build([(config, problem) for problem in every for config in candidates(problem)])
    console.print(f"built {len(modules)} kernels in {time.perf_counter() - started:.0f} s")
    entries = []
    with Progress(console=console) as progress:
        task = progress.add_task("tuning", total=2 * len(modes) * len(wanted))
        for n, k in wanted:
            if time.perf_counter() - started > budget_s:
                console.print(f"out of time: N={n} K={k} and what follows was not tuned")
                break
            for fast in modes:
                rows = {True: [], False: []}
                for m in rows_of:
                    row = tune(Problem(m, n, k, True, fast), candidates(Problem(m, n, k, True, fast)), modules)
                    rows[True].append(row)
                    known = [parse(name) for name in row["ours_us"]]
                    rows[False].append(tune(Problem(m, n, k, False, fast), known, modules))
                for rowwise, found in rows.items():
                    entries.append({"kind": choice.kind(rowwise, fast), "n": n, "k": k, "rows": found})
                    progress.advance(task)
                torch.cuda.empty_cache()
    if out is not None:
        timing.write_json(out, {"shapes": entries})
    table.write_text(_table(entries, json.loads(table.read_text()) if update else None))
    for entry in entries:
        gains = [row["stock_us"] / min(row["ours_us"].values()) for row in entry["rows"]]
        line = " ".join(f"{row['m']}:{gain:.2f}" for row, gain in zip(entry["rows"], gains))
        console.print(f"{entry['n']}x{entry['k']} {entry['kind']}: {line}", soft_wrap=True)


def _table(entries: list[dict[str, Any]], old: dict[str, Any] | None) -> str:
    known = {(shape["kind"], shape["n"], shape["k"]): shape["rows"] for shape in old["shapes"]} if old else {}
    for entry in entries:
        fastest = [(row, *next(iter(row["ours_us"].items()))) for row in entry["rows"]]
        rows = {row["m"]: [row["m"], name, ours, row["stock_us"]] for row, name, ours in fastest}
        key = entry["kind"], entry["n"], entry["k"]
        known[key] = [row for _, row in sorted({**{row[0]: row for row in known.get(key, ())}, **rows}.items())]
    shapes = [{"kind": kind, "n": n, "k": k, "rows": rows} for (kind, n, k), rows in known.items()]
    command = "python -m benchmarks.kernels.scaled_mm_tune --table kernels/scaled_mm/table_sm_90a.json"
    columns = ["M", "configuration", "ours, µs", "torch._scaled_mm, µs"]
    gpu = torch.cuda.get_device_name()
    return table_text(shapes, gpu=gpu, made_by=command, torch=torch.__version__, columns=columns)


if __name__ == "__main__":
    typer.run(main)
