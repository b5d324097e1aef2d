"""The tables of a result, for the terminal and the HTML page alike. A result is the dictionary that `run.run` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inductor_ext.bench.breakdown import CLASSES, GAPS
from inductor_ext.report.html import Section

Result = Mapping[str, Any]


def tables(result: Result) -> list[Section]:
    found = [_sides(result)]
    if any(side["breakdown"] for side in result["sides"]):
        found.append(_breakdown(result))
    if any(side["rewrites"] for side in result["sides"]):
        found.append(_rewrites(result))
    return found


def notes(result: Result) -> list[str]:
    """What has to be known to read the tables."""
    found = []
    if result["device"] != "cuda":
        found.append(
            "This ran on a CPU, where this backend's ops run their references, which are PyTorch's own operators: no speed-up "
            "is to be expected, and these times only show that the road runs."
        )
    if result["compiled_together"]:
        found.append("Sides compiled at the same time: their compile seconds compare with nothing, and tuning was disturbed.")
    if result["attention"]["ours"] != result["attention"]["others"]:
        ours, others = result["attention"]["ours"], result["attention"]["others"]
        found.append(f"attn_implementation: {ours} for this backend's sides, {others} for the others.")
    return found


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _sides(result: Result) -> Section:
    ablated = any(side["name"] == "no rules" for side in result["sides"])
    cosines = ("cosine to bf16: mean", "least", "mean less stock's")
    columns = ("side", "step, ms", "of stock's speed", "items/s", "tokens/s", "compile, s", *cosines)
    rows = []
    before: float | None = None
    for side in result["sides"]:
        ms, cosine = side["step_ms"], side["cosine_to_bf16"] or {}
        row = [
            side["name"],
            "failed" if ms is None else number(ms, ".3f"),
            "–" if side["of_stock"] is None else f"{side['of_stock']:.2f}×",
            number(side["items_per_s"], ",.0f"),
            number(side["tokens_per_s"], ",.0f"),
            number(side["compile_s"], ".1f"),
            number(cosine.get("mean"), ".6f"),
            number(cosine.get("min"), ".6f"),
            f"{cosine['less_stock']:+.6f} ± {cosine['standard_error']:.6f}" if "less_stock" in cosine else "–",
        ]
        if ablated:
            row.append("–" if before is None or ms is None else f"{before - ms:+.3f}")
            before = ms
        rows.append(row)
    if result["device"] == "cuda":
        rows.append([f"floor ({result['floor']['rates']['gpu']})", f"{result['floor']['ms']:.3f}", *["–"] * (len(rows[0]) - 2)])
    return Section("Times", result["how_timed"], columns + (("saved, ms",) if ablated else ()), rows)


def _breakdown(result: Result) -> Section:
    names = [name for name in (*CLASSES, GAPS) if any(name in side["breakdown"] for side in result["sides"])]
    rows = []
    for side in result["sides"]:
        parts = side["breakdown"]
        if parts:
            cells = [f"{parts[name]['us']:,.0f} ({parts[name]['launches']})" if name in parts else "–" for name in names[:-1]]
            launches = sum(part["launches"] for part in parts.values())
            rows.append([side["name"], *cells, f"{parts[GAPS]['us']:,.0f}", str(launches)])
    lower = result["floor"]["us"]
    rows.append(["floor", *[f"{lower[name]:,.0f}" if name in lower else "0" for name in names], "–"])
    columns = ("side", *(f"{name}, µs (launches)" for name in names[:-1]), f"{GAPS}, µs", "launches")
    text = "By the names of the kernels, from the profile of one call; gaps are those of the CUDA graph."
    return Section("Kernels of one step", text, columns, rows)


def _rewrites(result: Result) -> Section:
    names = list(dict.fromkeys(name for side in result["sides"] for name in side["rewrites"]))
    rows = [
        [side["name"], *(str(side["rewrites"].get(name, 0)) for name in names)]
        for side in result["sides"]
        if side["backend"] == "inductor_ext"
    ]
    return Section("Rewrites", "", ("side", *names), rows)
