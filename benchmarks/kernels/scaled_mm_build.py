"""Seconds that nvcc takes for scaled_mm's kernels and for CUTLASS's own collectives, from cold, one at a time. Needs no GPU.

    python -m benchmarks.kernels.scaled_mm_build --out benchmarks/results/nvcc/scaled_mm_build.json
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.kernels.cutlass_collectives import USUAL
from inductor_ext import jit, registry, settings
from inductor_ext.bench import summary
from inductor_ext.kernels.scaled_mm.op import OP

E4 = torch.float8_e4m3fn
ARCH = "sm_90a"
OURS = (
    *(("stream:8x64/1", True), ("stream:16x64/8", True), ("stream:64x128/2", True), ("stream:64x64/4", False)),
    *(("tile:64x128p", True), ("tile:128x128p", True), ("tile:128x256c", True), ("tile:256x128c", False)),
)


def seconds_of(spec: jit.JitSpec) -> float:
    """One build into an empty directory."""
    with tempfile.TemporaryDirectory() as folder:
        options = settings.current(cache_dir=f"{folder}/cache", arch=ARCH, progress=False)
        started = time.perf_counter()
        (built,) = jit.prebuild([spec], Path(folder) / "out", options).values()
        if isinstance(built, Exception):
            raise built
        return round(time.perf_counter() - started, 1)


def main(out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("scaled_mm_build.json")) -> None:
    registry.ops()
    wanted = {f"{name} {'fast' if fast else 'exact'}": ((name, E4, E4, torch.bfloat16, fast)) for name, fast in OURS}
    specs = {name: OP.spec_of_key(key, ARCH) for name, key in wanted.items()}
    ours = {name: seconds_of(spec) for name, spec in specs.items()}
    collectives = {each.name: seconds_of(each.spec(ARCH, (E4, E4, torch.bfloat16))) for each in USUAL}
    table = Table("kernel", "s", title=f"nvcc, {ARCH}, {os.cpu_count()} cores, one build at a time")
    for name, seconds in {**ours, **collectives}.items():
        table.add_row(name, f"{seconds:.1f}")
    Console().print(table)
    environment = {
        "command": "python -m benchmarks.kernels.scaled_mm_build",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "compilers": jit.find_toolchain().describe(),
    }
    medians = {"ours": statistics.median(ours.values()), "cutlass collectives": statistics.median(collectives.values())}
    content = {"environment": environment, "median_s": medians, "ours_s": ours, "cutlass_collectives_s": collectives}
    summary.write(out, content)


if __name__ == "__main__":
    typer.run(main)
