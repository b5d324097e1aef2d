"""What scaled_mm_add.py, scaled_mm_act_mul.py and scaled_mm_rope.py share: one launch against several, and an op's table.

    python -m benchmarks.kernels.scaled_mm_add --out FILE.json             measures
    python -m benchmarks.kernels.scaled_mm_add --table-of FILE.json        writes the op's table from it; needs no GPU

Sides are CUDA-graph replays, in turn, three rounds, over enough buffers to find L2 cold when a product begins; what comes after
it finds what the product left there, as in a model. Each configuration is checked first. ``apart`` is several launches, with
PyTorch's products or with ours, whichever is faster here; the other side one launch, in the fastest of its configurations.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import typer

from benchmarks import timing
from benchmarks.kernels import shared
from benchmarks.kernels.scaled_mm_cases import E4
from inductor_ext.bench import summary
from inductor_ext.kernels.scaled_mm.op_table import OpTable

BF16 = torch.bfloat16


class Case(Protocol):
    """One set of buffers, and what runs on them."""

    def by_torch(self) -> None: ...
    def ours(self, config: str) -> None: ...
    def fused(self, config: str) -> None: ...
    def check(self, config: str) -> None:
        """RuntimeError where a configuration's result is not that of ``ours``."""


@dataclasses.dataclass(frozen=True)
class Fused:
    """A benchmark. ``name``: what its rows call one launch; ``columns`` and ``over`` say in the table what its times are of."""

    table: OpTable
    name: str
    configs: Sequence[str]
    columns: tuple[str, str]
    over: str

    def measure(self, make: Callable[[], Case], moved: int, apart: str, row: dict[str, Any]) -> dict[str, Any]:
        """``row``, and the times of both; ``apart`` is the configuration of scaled_mm's that several launches take."""
        sets = [make() for _ in range(timing.sets_for(moved, 16))]
        for config in self.configs:
            sets[0].check(config)
        sides: dict[str, list[Callable[[], Any]]] = {
            "torch": [case.by_torch for case in sets],
            "ours": [functools.partial(case.ours, apart) for case in sets],
            **{config: [functools.partial(case.fused, config) for case in sets] for config in self.configs},
        }
        found = timing.in_turn(sides, replays=7)
        times = timing.medians(found)
        us = {side: times[f"{side}_us"] for side in sides}
        best, slower = min(self.configs, key=us.__getitem__), min("torch", "ours", key=us.__getitem__)
        torch.cuda.empty_cache()
        return {
            **row, "apart": "torch" if slower == "torch" else apart, "apart_us": us[slower], self.name: best,
            f"{self.name}_us": us[best], "ratio": timing.ratio(found[slower], found[best]), "spread": times["spread"],
            "all_us": us,
        }  # fmt: skip

    def script(self, measure: Callable[..., Any], cases: Sequence[Any], build: Callable[[list[Any]], Any]) -> None:
        if "--table-of" in sys.argv:
            typer.run(self.write_table)
        else:
            shared.script(measure, cases, build=build, width=150, without=("all_us",))

    def write_table(self, table_of: Path = typer.Option(..., help="Results.")) -> None:  # noqa: B008
        """The op's table for sm_90a."""
        measured, op = summary.read(table_of), self.table.folder.name
        shapes: dict[tuple[str, int, int], list[Any]] = {}
        for row in measured["rows"]:
            us = row[f"{self.name}_us"]
            end = dataclasses.replace(self.table, end=row.get("end", ""))
            shape = end.kind(row["rowwise"], True), row["n"], row["k"]
            shapes.setdefault(shape, []).append([row["m"], row[self.name], us, round(us * row["ratio"], 2)])
        made = [{"kind": kind, "n": n, "k": k, "rows": rows} for (kind, n, k), rows in shapes.items()]
        text = shared.table_text(
            made,
            gpu=measured["environment"]["gpu"],
            made_by=f"python -m benchmarks.kernels.{op} --table-of benchmarks/results/h200/{op}.json",
            torch=measured["environment"]["torch"],
            columns=["M", "configuration", *self.columns],
            over=self.over,
        )
        (self.table.folder / "table_sm_90a.json").write_text(text)


def specs(op: Any, configs: Iterable[str], *more: Any) -> list[Any]:
    """The kernels of a product's op, bf16 and with fast accumulation."""
    return [op.spec_of_key((config, E4, E4, BF16, True, *more), "sm_90a") for config in configs]
