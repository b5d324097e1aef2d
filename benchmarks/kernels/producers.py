"""Producers fused with a row's FP8 quantisation, against stock Inductor and a device copy.

    python benchmarks/kernels/producers.py --out benchmarks/results/h200/producers.json

Stock is ``torch.compile`` of the same eager lines. All are CUDA-graph replays, timed in turn, three rounds, over enough buffers
to find L2 cold. ``of copy`` is the time of a device-to-device copy of as many bytes as the work must move, over ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import timing
from inductor_ext import registry
from inductor_ext.kernels.rms_norm_quantize.op import OP as RMS_NORM
from inductor_ext.kernels.rms_norm_quantize.op import TORCHAO_PROGRAM, TORCHAO_SCALE, normalise

E4, BF16 = torch.float8_e4m3fn, torch.bfloat16
SHAPES = ((1, 1024), (16, 1024), (128, 1024), (1024, 1024), (7168, 1024), (65536, 1024), (1, 4096), (128, 4096), (65536, 8192))
ROUNDS = 3


def quantise(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torchao's row-wise recipe."""
    scale = (y.abs().amax(-1, keepdim=True) / 448.0).float()
    return (y.float() / scale).clamp(-448.0, 448.0).to(E4), scale


def norm(x: torch.Tensor, weight: torch.Tensor) -> Any:
    return quantise(normalise(x, weight, 1e-6, "cast mul"))


def norm_with_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    total = x + residual
    return *quantise(normalise(total, weight, 1e-6, "cast mul")), total


def rms_norm(rows: int, columns: int, residual: bool) -> tuple[int, Callable[[], Any]]:
    """Bytes that must move, and what makes one (stock, ours) pair of calls over buffers of its own."""
    fn = norm_with_residual if residual else norm
    compiled = torch.compile(fn, dynamic=False)

    def make() -> tuple[Callable[[], Any], Callable[[], Any]]:
        x, other = (torch.randn(rows, columns, device="cuda").to(BF16) for _ in range(2))
        weight = torch.rand(columns, device="cuda").to(BF16)
        out = torch.empty(rows, columns, device="cuda", dtype=E4)
        scale = torch.empty(rows, 1, device="cuda")
        total = torch.empty_like(x) if residual else x.new_empty(0)
        tensors = (x, other, weight) if residual else (x, weight)
        call = (x, other if residual else None, weight, 1e-6, "cast mul", TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
        return lambda: compiled(*tensors), lambda: RMS_NORM._call(*call, out0=out, out1=scale, out2=total)

    return rows * (columns * (7 if residual else 3) + 4), make


def measure(rows: int, columns: int, residual: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    moved, make = rms_norm(rows, columns, residual)
    pairs = [make() for _ in range(timing.sets_for(moved, 32))]
    sides = {"stock": [pair[0] for pair in pairs], "ours": [pair[1] for pair in pairs]}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, calls in sides.items():
            found[name].append(timing.graph_time(calls, replays=9) * 1e6)
    ratio = statistics.median(a / b for a, b in zip(found["stock"], found["ours"]))
    ours = statistics.median(found["ours"])
    return {
        "work": "rms_norm + residual + quantise" if residual else "rms_norm + quantise", "rows": rows, "columns": columns,
        "stock_us": round(statistics.median(found["stock"]), 2), "ours_us": round(ours, 2), "ratio": round(ratio, 3),
        "of_copy": round(timing.copy_time(moved) * 1e6 / ours, 3),
    }  # fmt: skip


def main(out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("producers.json")) -> None:
    registry.ops()
    rows = [measure(*shape, residual) for shape in SHAPES for residual in (True, False)]
    timing.write_json(out, {"rows": rows})
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
