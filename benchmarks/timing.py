"""Timing on a CUDA device, the same way for every benchmark.

    seconds = graph_time([lambda: op(x0, y0), lambda: op(x1, y1), …])    median of CUDA-graph replays, per call
    times   = in_turn({"stock": calls, "ours": calls})                   µs of each side, a number a round
    medians(times), ratio(times["stock"], times["ours"]), of_copy(nbytes, times["ours"])                       what a row says
    rate    = copy_bandwidth(nbytes)                                     bytes/s, read + written, of a device-to-device copy
    write_json(path, {"rows": rows})                                     a summary, and `environment()`

One graph holds many calls, so that launch gaps count as they do in a served model and the host does not. To measure with a
cold L2, pass calls over enough buffer sets: `sets_for(bytes_per_call)` says how many.
"""

from __future__ import annotations

import datetime
import itertools
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from inductor_ext.bench import summary

Side = TypeVar("Side", bound=Hashable)
ROUNDS = 3
HOW = f"medians of {ROUNDS} rounds in turn, each the median of CUDA-graph replays"  # of `in_turn`
COLD_FACTOR = 4  # buffers between two uses of the same one, in sizes of L2


def sets_for(bytes_per_call: int, limit: int = 64) -> int:
    """How many buffer sets to rotate over so that each call finds nothing of its own in L2 (at most ``limit``)."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(limit, math.ceil(COLD_FACTOR * l2 / max(bytes_per_call, 1))))


def graph_time(calls: Sequence[Callable[[], Any]], *, replays: int = 25, least_calls: int = 20, least_s: float = 5e-4) -> float:
    """Seconds per call: the median over ``replays`` of one CUDA graph that makes the calls in turn, again and again."""
    once = torch.cuda.Stream()
    with torch.cuda.stream(once):
        for call in calls[:3]:
            call()  # modules load, allocators fill
    torch.cuda.synchronize()
    count = _round_up(least_calls, len(calls))
    graph = _capture(calls, count)
    guess = min(_replay_times(graph, 3)) / count
    if guess * count < least_s:
        count = _round_up(min(4000, math.ceil(least_s / guess)), len(calls))
        graph = _capture(calls, count)
    _replay_times(graph, 3)
    return statistics.median(_replay_times(graph, replays)) / count


def in_turn(
    sides: Mapping[Side, Sequence[Callable[[], Any]]], *, rounds: int = ROUNDS, **options: Any
) -> dict[Side, list[float]]:
    """Microseconds of a call of each side, a number a round: the chip's clock changes, for all of them alike."""
    found: dict[Side, list[float]] = {name: [] for name in sides}
    for _, (name, calls) in itertools.product(range(rounds), sides.items()):
        found[name].append(graph_time(calls, **options) * 1e6)
    return found


def medians(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """``NAME_us`` of each side, and how far the rounds of the least steady one are apart."""
    us = {f"{name}_us": round(statistics.median(each), 2) for name, each in found.items()}
    return {**us, "spread": max(summary.spread(each) for each in found.values())}


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over the rounds of one side's time by another's."""
    return round(statistics.median(a / b for a, b in zip(above, below)), 3)


def of_copy(nbytes: int, us: Sequence[float]) -> float:
    """The time of a device-to-device copy of as many bytes, over the median of ``us``."""
    return round(copy_time(nbytes) * 1e6 / statistics.median(us), 3)


def graph_us(call: Callable[[], Any], calls: int = 10) -> float:
    """Microseconds of one call, over the same buffers every time."""
    return graph_time([call], least_calls=calls) * 1e6


def _round_up(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple


def _capture(calls: Sequence[Callable[[], Any]], count: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    torch.cuda.synchronize()
    return graph


def _replay_times(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


def copy_time(nbytes: int) -> float:
    """Seconds of a device-to-device copy that reads and writes ``nbytes`` together, cold."""
    half = max(-(-nbytes // 2048) * 1024, 1024)  # whole KiB: an odd size takes a slower road
    pairs = []
    for _ in range(sets_for(nbytes)):
        source = torch.randint(0, 255, (half,), dtype=torch.uint8, device="cuda")
        pairs.append((source, torch.empty_like(source)))
    return graph_time([lambda s=s, d=d: d.copy_(s) for s, d in pairs])


def copy_bandwidth(nbytes: int = 3 << 29) -> float:
    """Bytes read and written a second by a device-to-device copy of that many bytes."""
    return nbytes / copy_time(nbytes)


def call_time(call: Callable[[], Any], *, calls: int = 2000) -> float:
    """Host seconds a call costs to submit, the device being far behind or idle; the median of batches."""
    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(calls // 10):
            call()
        times.append((time.perf_counter() - start) / (calls // 10))
        torch.cuda.synchronize()
    return statistics.median(times)


def environment() -> dict[str, Any]:
    import triton

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": summary.command_line(["python", *_program(), *map(str, sys.argv[1:])]),
        "gpu": torch.cuda.get_device_name(),
        "driver": _nvidia_smi("driver_version"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def _program() -> list[str]:
    """As it has to be called from the repository's root."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name] if spec is not None else sys.argv[:1]


def _nvidia_smi(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def write_json(path: str | Path, payload: dict[str, Any]) -> None:
    """A summary of that and `environment()`; what it leaves out is in PATH.samples.json, which git ignores."""
    summary.write(Path(path), {"environment": environment(), **payload})
