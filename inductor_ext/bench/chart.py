"""The chart of a result as PNG: a bar a side, its step in milliseconds, divided by class of kernel, and the floor.

`bars` is what the chart says; the HTML page draws the same bars itself. Colours are told apart with colour blindness too
(Okabe and Ito's).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inductor_ext.bench.breakdown import ATTENTION, GAPS, GEMM, MEMORY, MEMSET, OTHER
from inductor_ext.bench.library import EXTRA, BenchError

STEP = "step"
COLOURS = {
    STEP: "#0072b2",
    GEMM: "#0072b2",
    ATTENTION: "#e69f00",
    MEMORY: "#009e73",
    MEMSET: "#cc79a7",
    OTHER: "#56b4e9",
    GAPS: "#bbbbbb",
}


@dataclasses.dataclass(frozen=True)
class Bar:
    """``parts``: milliseconds by class; ``label`` stands behind the bar."""

    name: str
    parts: Mapping[str, float]
    label: str

    @property
    def ms(self) -> float:
        return sum(self.parts.values())


def bars(result: Mapping[str, Any]) -> list[Bar]:
    """The sides that were measured, then the floor where there is a GPU that it is of."""
    found = []
    for side in result["sides"]:
        if side["step_ms"] is None:
            continue
        parts = {name: max(part["us"], 0.0) / 1e3 for name, part in side["breakdown"].items()} or {STEP: side["step_ms"]}
        speed = f" ({side['of_stock']:.2f}× stock)" if side["of_stock"] else ""
        found.append(Bar(side["name"], parts, f"{side['step_ms']:.2f} ms{speed}, {side['tokens_per_s']:,} tokens/s"))
    if result["device"] == "cuda":
        lower = result["floor"]
        parts = {name: us / 1e3 for name, us in lower["us"].items()}
        found.append(Bar("floor", parts, f"{lower['ms']:.2f} ms, from the shapes ({lower['rates']['gpu']})"))
    return found


def need_matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        hint = "or leave --png out and draw it later, elsewhere, with --from FILE.json"
        raise BenchError(f"--png needs matplotlib ({error}); {EXTRA}, {hint}") from error
    return matplotlib


def write_png(result: Mapping[str, Any], path: Path) -> None:
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = bars(result)
    figure = Figure(figsize=(11, 1.6 + 0.5 * len(shown)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    seen: set[str] = set()
    for row, bar in enumerate(shown):
        left = 0.0
        for name, ms in bar.parts.items():
            axes.barh(row, ms, left=left, height=0.66, color=COLOURS[name], label="" if name in seen else name)
            seen.add(name)
            left += ms
        axes.text(left, row, f"  {bar.label}", va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), [bar.name for bar in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max((bar.ms for bar in shown), default=1.0))  # room for the labels
    axes.set_xlabel("one step, ms")
    axes.set_title(result["what"], fontsize=10, loc="left", wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    if seen - {STEP}:
        axes.legend(loc="lower right", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
