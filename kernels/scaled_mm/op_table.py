"""Which kernel an op takes that ends scaled_mm's tiles in a way of its own (``ends.cuh``) and has a table of its own.

The table, ``table_<target>.json`` in the op's folder, is read as scaled_mm's is (`choice`), but what was measured is more than
a product: what comes after it too. So nothing is known of fewer rows than the least that were measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from inductor_ext.kernels.scaled_mm import choice


@dataclasses.dataclass(frozen=True)
class OpTable:
    """The table in ``folder``. ``default``: the configuration of what is not in it, ``exact`` that with exact accumulation.

    ``end``: what tells this op's rows in the table from those of a variant of it, which is an `OpTable` of its own.
    """

    folder: Path
    default: str
    exact: str
    end: str = ""

    def kind(self, rowwise: bool, fast: bool) -> str:
        """What the table calls such problems."""
        return ", ".join(filter(None, (choice.kind(rowwise, fast), self.end)))

    def decide(self, target: str, m: int, n: int, k: int, rowwise: bool, fast: bool) -> choice.Choice | None:
        """What was measured of one problem; None below the least M that was, and without a table."""
        found, kind = choice.table(target, self.folder), self.kind(rowwise, fast)
        rows = found.rows(kind, n, k) if found is not None else []
        return found.choose(kind, m, n, k) if found is not None and rows and m >= rows[0].m else None

    def choose(self, target: str, m: int, n: int, k: int, rowwise: bool, fast: bool) -> str:
        """The configuration for one problem on ``target``; "" where there is none."""
        if target != "sm_90a":
            return ""
        found = self.decide(target, m, n, k, rowwise, fast)
        if found is not None:
            return found.config.name
        return self.default if fast else self.exact

    def sizes(self, target: str, m: Any, n: int, k: int, rowwise: bool, fast: bool) -> list[int]:
        """M or, where it is symbolic, those in its range at which `decide` may change its mind."""
        if isinstance(m, int):
            return [m]
        found = choice.table(target, self.folder)
        rows = found.rows(self.kind(rowwise, fast), n, k) if found is not None else []
        return choice.sizes_of(rows, *choice.bounds(m))

    def choices(self, target: str, m: Any, n: int, k: int, rowwise: bool, fast: bool) -> list[str]:
        """What `choose` may say for M, symbolic or not."""
        sizes = self.sizes(target, m, n, k, rowwise, fast)
        return list(dict.fromkeys(self.choose(target, size, n, k, rowwise, fast) for size in sizes))

    def preset(self, target: str, shapes: Iterable[tuple[int, int]]) -> list[str]:
        """Those that problems of these (N, K) may take with fast accumulation, for any M; none without a table."""
        found = choice.table(target, self.folder)
        if found is None:
            return []
        kinds = [self.kind(rowwise, True) for rowwise in (True, False)]
        rows = [row for kind in kinds for n, k in shapes for row in found.rows(kind, n, k)]
        return list(dict.fromkeys(row.config.name for row in rows))
