"""One self-contained HTML file of a result: no script, no font, no image, nothing from elsewhere. The chart is inline SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inductor_ext.bench.chart import COLOURS, bars
from inductor_ext.bench.tables import notes, tables
from inductor_ext.report import html

WIDTH, ROW, NAMES, LABELS = 1100, 34, 190, 330  # pixels: the drawing, a bar's row, left of the bars, right of them


def page(result: Mapping[str, Any]) -> str:
    shown = bars(result)
    folders = Path(__file__).parent, Path(html.__file__).parent  # the style is the report's
    found: str = (
        html.environment(*folders)
        .get_template("page.html.j2")
        .render(
            result=result,
            notes=notes(result),
            sections=tables(result),
            rows=_rows(shown),
            legend=[(name, colour) for name, colour in COLOURS.items() if any(name in bar.parts for bar in shown)],
            width=WIDTH,
            height=ROW * len(shown),
            names=NAMES,
        )
    )
    return found


def write(result: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(result), encoding="utf-8")


def _rows(shown: list[Any]) -> list[dict[str, Any]]:
    """Bars as rectangles in pixels."""
    scale = (WIDTH - NAMES - LABELS) / max((bar.ms for bar in shown), default=1.0)
    found = []
    for index, bar in enumerate(shown):
        left, parts = float(NAMES), []
        for name, ms in bar.parts.items():
            title = f"{name}: {ms:.3f} ms"
            parts.append({"x": round(left, 1), "width": round(ms * scale, 1), "colour": COLOURS[name], "title": title})
            left += ms * scale
        found.append({"y": index * ROW, "name": bar.name, "parts": parts, "end": round(left + 8, 1), "label": bar.label})
    return found
