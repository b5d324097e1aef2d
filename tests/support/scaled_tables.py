"""Tables of measurements made up for a test, in place of those of a real GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from inductor_ext.kernels.scaled_mm import choice, op

#: (M, configuration, our µs, PyTorch's µs)
Row = tuple[int, str, float, float]

ALL_KINDS = tuple(choice.kind(rowwise, fast) for rowwise in (False, True) for fast in (False, True))
STREAM, TILE = "stream:16x64/8", "tile:128x128p"
#: Ours is faster whatever M is, and time does not depend on N: one launch beats several.
FASTER: tuple[Row, ...] = ((16, STREAM, 2.0, 4.0), (16384, TILE, 2.0, 4.0))
SLOWER: tuple[Row, ...] = ((16, STREAM, 4.0, 3.0), (16384, TILE, 4.0, 3.0))
#: Ours is faster up to M = 64 only.
SMALL: tuple[Row, ...] = ((64, STREAM, 2.0, 4.0), (16384, TILE, 4.0, 2.0))


def content(shapes: dict[tuple[int, int], tuple[Row, ...]], kinds: tuple[str, ...] = ALL_KINDS) -> dict[str, Any]:
    """A table file's content: the same rows for each kind. Shapes are (N, K)."""
    entries = [{"kind": kind, "n": n, "k": k, "rows": rows} for kind in kinds for (n, k), rows in shapes.items()]
    return {"gpu": "a test's GPU", "shapes": entries}


def forget() -> None:
    """Drop what was chosen by another table."""
    choice.choose.cache_clear()
    op._decide_group.cache_clear()


def use(
    monkeypatch: pytest.MonkeyPatch,
    shapes: dict[tuple[int, int], tuple[Row, ...]],
    target: str = "sm_90a",
    kinds: tuple[str, ...] = ALL_KINDS,
) -> None:
    """Let these measurements be all there are, on ``target`` only."""
    made = choice.Table(content(shapes, kinds))
    monkeypatch.setattr(choice, "table", lambda arch, folder=None: made if arch == target else None)
    forget()


def forgetting() -> Iterator[None]:
    """A fixture's body: no test sees another one's choices."""
    forget()
    yield
    forget()
