"""Which kernel for which problem: a measured table a GPU target, read when M is known.

A table (``table_<target>.json``, made by ``benchmarks/kernels/scaled_mm_tune.py``) holds, for each (N, K) measured, for
tensor-wise or row-wise scales and fast or exact accumulation, rows ``[M, configuration, our µs, PyTorch's µs]``: the fastest
configuration, measured with inputs that are not in L2. A problem takes the row of the nearest (N, K), and in it the smallest
M that is not under its own.

PyTorch's operator stays where it measured faster or as fast, within the spread of two measurements (`MEASURED_GAIN`). On an
(N, K) that was not measured it stays unless the nearest one says that we gain `UNMEASURED_GAIN`. A target without a table keeps
PyTorch's operator for everything.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from inductor_ext.kernels.scaled_mm.config import Config, parse

_HERE = Path(__file__).parent

#: The spread of medians between two runs on one H200: 2 %.
MEASURED_GAIN = 1.02

#: What the nearest measured shape must gain before an unmeasured one is rewritten.
UNMEASURED_GAIN = 1.05

#: M from which one more measured row would change nothing: the largest grid is many waves.
MAX_M = 1 << 20


@dataclasses.dataclass(frozen=True)
class Choice:
    """The fastest configuration of ours, the measured times, and whether it replaces PyTorch's operator.

    Times are those of the problem asked about, in µs: the measured ones scaled by N·K and M where the shape is another.
    """

    config: Config
    ours_us: float
    stock_us: float
    use: bool
    why: str

    @property
    def gain(self) -> float:
        return self.stock_us / self.ours_us


@dataclasses.dataclass(frozen=True)
class Row:
    m: int
    config: Config
    ours_us: float
    stock_us: float


class Table:
    """One target's measurements. ``over`` names what ours were measured against."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.gpu, self.over = content["gpu"], content.get("over", "torch._scaled_mm")
        self.kinds: dict[str, dict[tuple[int, int], list[Row]]] = {}
        for entry in content["shapes"]:
            rows = [Row(m, parse(config), ours, stock) for m, config, ours, stock in entry["rows"]]
            self.kinds.setdefault(entry["kind"], {})[entry["n"], entry["k"]] = rows

    def nearest(self, kind: str, n: int, k: int) -> tuple[tuple[int, int], list[Row]] | None:
        shapes = self.kinds.get(kind)
        if not shapes:
            return None
        shape = min(shapes, key=lambda s: (abs(math.log(s[0] / n)) + abs(math.log(s[1] / k)), s))
        return shape, shapes[shape]

    def choose(self, kind: str, m: int, n: int, k: int) -> Choice | None:
        found = self.nearest(kind, n, k)
        if found is None:
            return None
        shape, rows = found
        row = rows[min(bisect.bisect_left([row.m for row in rows], m), len(rows) - 1)]
        gain = row.stock_us / row.ours_us
        wanted = MEASURED_GAIN if shape == (n, k) else UNMEASURED_GAIN
        where = f"M={row.m} N={shape[0]} K={shape[1]}" + ("" if shape == (n, k) else f", the nearest measured to N={n} K={k}")
        why = f"{gain:.2f}x the speed of {self.over} at {where}, {kind}, on {self.gpu}"
        scale = n * k / (shape[0] * shape[1]) * max(1.0, m / row.m)
        return Choice(row.config, row.ours_us * scale, row.stock_us * scale, gain >= wanted, why)

    def rows(self, kind: str, n: int, k: int) -> list[Row]:
        found = self.nearest(kind, n, k)
        return found[1] if found else []


@functools.cache
def table(arch: str, folder: Path = _HERE) -> Table | None:
    """The table of a target, of the op in ``folder``; None when nothing was measured there."""
    path = folder / f"table_{arch}.json"
    return Table(json.loads(path.read_text())) if path.is_file() else None


def kind(rowwise: bool, fast: bool) -> str:
    return f"{'row-wise' if rowwise else 'tensor-wise'}, {'fast' if fast else 'exact'} accumulation"


@functools.lru_cache(maxsize=4096)
def choose(arch: str, m: int, n: int, k: int, rowwise: bool, fast: bool) -> Choice | None:
    """The choice for one problem, or for one launch of siblings with ``n`` output channels in all; None without a table."""
    found = table(arch)
    return found.choose(kind(rowwise, fast), max(m, 1), n, k) if found else None


def possible(arch: str, n: int, k: int, rowwise: bool, fast: bool, least_m: int = 1, most_m: int = MAX_M) -> list[Choice]:
    """Every choice that some M between two bounds leads to."""
    found = table(arch)
    sizes = sizes_of(found.rows(kind(rowwise, fast), n, k) if found else [], least_m, most_m)
    choices = [choose(arch, m, n, k, rowwise, fast) for m in sizes]
    return [choice for choice in choices if choice is not None]


def sizes_of(rows: Sequence[Row], least_m: int, most_m: int) -> list[int]:
    """The M between two bounds that take another of ``rows`` than the M before: each measured one and the next above it."""
    sizes = {least_m, *(row.m for row in rows if least_m <= row.m <= most_m)}
    sizes |= {m + 1 for m in sizes if m < most_m}
    return sorted(m for m in sizes if m <= most_m)


def bounds(size: torch.SymInt) -> tuple[int, int]:
    """Least and greatest M that a symbolic one may be, at most `MAX_M`."""
    environment, expression = size.node.shape_env, size.node.expr
    bounds = environment.bound_sympy(expression)
    finite = bounds.upper.is_Integer and int(bounds.upper) < MAX_M
    return max(int(bounds.lower), 1), int(bounds.upper) if finite else MAX_M
