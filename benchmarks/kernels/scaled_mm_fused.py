"""What scaled_mm_add.py, scaled_mm_act_mul.py and scaled_mm_rope.py share: one launch against several, and an op's table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.kernels.shared import table_text
from inductor_ext.bench import summary
from inductor_ext.kernels.scaled_mm.op_table import OpTable


def compare(
    sides: Mapping[str, Sequence[Callable[[], Any]]], configs: Sequence[str], name: str, ours: str = "ours", replays: int = 7
) -> dict[str, Any]:
    """A row's times: several launches, "torch" or ``ours``, whichever is faster; one, ``name``, the fastest of ``configs``."""
    found = timing.in_turn(sides, replays=replays)
    times = {side: round(statistics.median(each), 2) for side, each in found.items()}
    best, apart = min(configs, key=times.__getitem__), min("torch", "ours", key=times.__getitem__)
    return {
        "apart": apart if apart == "torch" else ours, "apart_us": times[apart], name: best, f"{name}_us": times[best],
        "ratio": round(timing.ratio(found[apart], found[best]), 3), "all_us": times,
    }  # fmt: skip


def write_table(table: OpTable, results: Path, name: str, made_by: str, columns: tuple[str, str], over: str) -> None:
    """``table`` for sm_90a, from a file of results whose rows call one launch ``name``. ``columns``: what both times are of."""
    measured = summary.read(results)
    shapes: dict[tuple[str, int, int], list[Any]] = {}
    for row in measured["rows"]:
        us = row[f"{name}_us"]
        end = OpTable(table.folder, table.default, table.exact, row.get("end", ""))
        shape = end.kind(row["rowwise"], True), row["n"], row["k"]
        shapes.setdefault(shape, []).append([row["m"], row[name], us, round(us * row["ratio"], 2)])
    made = [{"kind": kind, "n": n, "k": k, "rows": rows} for (kind, n, k), rows in shapes.items()]
    gpu, torch = (measured["environment"][key] for key in ("gpu", "torch"))
    names = ["M", "configuration", *columns]
    text = table_text(made, gpu=gpu, made_by=made_by, torch=torch, columns=names, over=over)
    (table.folder / "table_sm_90a.json").write_text(text)
