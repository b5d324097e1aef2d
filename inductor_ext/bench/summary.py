"""What a benchmark writes: a summary that a person reads and a diff shows, and every sample of the run in a file beside it.

    write(path, {"environment": …, "rows": [{"m": 1, "us": 3.1}, …]})    PATH; also PATH.samples.json, where PATH says less
    read(path)["rows"]                                                   [{"m": 1, "us": 3.1}, …]
    python -m inductor_ext.bench.summary FILE.json…                      makes summaries of whole results, in place

A summary has medians, their spread and the number of samples. What it leaves out (`SAMPLES`) is in the second file, which git
ignores. A list of flat dictionaries is written as ``{"columns": …, "rows": …}``, a row a line; anything else that fits is on
one line.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTH, DIGITS = 160, 6
#: Times of single rounds, by key: in their place stand how many there were and how far apart, relative to their median.
ROUNDS = ("rounds_ms", "step_us")
#: What else a summary leaves out: each kernel of a step, each configuration beside the fastest, what was refused and why, and
#: the modes of all rules, which the command and a side's name say.
SAMPLES = (*ROUNDS, "kernels", "all_us", "refusals", "rules")


def command_line(words: Sequence[str]) -> str:
    """A command as anyone may repeat it: of a file in some folder of this machine its name is said."""
    return shlex.join(Path(each).name if Path(each).is_absolute() else each for each in words)


def spread(samples: Sequence[float]) -> float:
    """How far the samples are apart, relative to their median."""
    return round((max(samples) - min(samples)) / statistics.median(samples), 4)


def summary(value: Any) -> Any:
    """``value`` without its samples."""
    if isinstance(value, Mapping):
        found = {}
        for key, each in value.items():
            if key not in SAMPLES:
                found[key] = summary(each)
            elif key in ROUNDS and each:
                found |= {"rounds": len(each), "spread": spread(each)}
        return found
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{DIGITS}g}")
    return [summary(each) for each in value] if isinstance(value, (list, tuple)) else value


def write(path: Path, result: Mapping[str, Any]) -> list[Path]:
    """The files that were written: the summary of ``result`` and, if that leaves anything out, the whole of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    short = summary(result)
    path.write_text(text(short), encoding="utf-8")
    whole = path.with_suffix(".samples.json")
    if not _has_samples(result):
        whole.unlink(missing_ok=True)  # of an earlier run
        return [path]
    whole.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    return [path, whole]


def _has_samples(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any((key in SAMPLES and each) or _has_samples(each) for key, each in value.items())
    return isinstance(value, (list, tuple)) and any(map(_has_samples, value))


def read(path: Path) -> Any:
    """Any JSON, with the tables of `write` as lists of dictionaries again; a cell that is null is no key of its row."""

    def rows(found: dict[str, Any]) -> Any:
        if found.keys() != {"columns", "rows"}:
            return found
        return [{key: cell for key, cell in zip(found["columns"], row) if cell is not None} for row in found["rows"]]

    return json.loads(path.read_text(encoding="utf-8"), object_hook=rows)


# ---- text ------------------------------------------------------------------------------------------------------------


def text(value: Any) -> str:
    """``value`` as JSON; the items of the outermost dictionary are never all on one line."""
    if isinstance(value, Mapping) and value:
        return "\n".join(["{", *_filled(value, 1), "}"]) + "\n"
    return "\n".join(_lines(value, 0)) + "\n"


def _item(key: str, value: Any, depth: int) -> list[str]:
    head = f"{' ' * depth}{_json(key)}: "
    first, *rest = _lines(value, depth, len(head))
    return [head + first, *rest]


def _lines(value: Any, depth: int, used: int = 0) -> list[str]:
    """``used``: columns of the first line that are taken; that line is made without its indentation."""
    if _is_table(value):
        columns = list(dict.fromkeys(key for row in value for key, cell in row.items() if cell is not None))
        *rows, last = [" " * (depth + 1) + _json([row.get(key) for key in columns]) for row in value]
        return [f'{{"columns": {_json(columns)}, "rows": [', *(row + "," for row in rows), last, " " * depth + "]}"]
    one = _json(value)
    if used + len(one) < WIDTH or not isinstance(value, (Mapping, list, tuple)):
        return [one]
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    return [opening, *_filled(value, depth + 1), " " * depth + closing]


def _filled(value: Any, depth: int) -> Iterator[str]:
    """The items, as many to a line as fit; one that takes several lines has them for itself."""
    items = [_item(key, each, depth) for key, each in value.items()] if isinstance(value, Mapping) else None
    items = items or [[" " * depth + first, *rest] for first, *rest in (_lines(each, depth, depth) for each in value)]
    line = ""
    for index, (first, *rest) in enumerate(items):
        comma = "," if index + 1 < len(items) else ""
        if rest:
            yield from filter(None, [line, first, *rest[:-1]])
            yield rest[-1] + comma
            line = ""
        elif line and len(line) + len(first.lstrip()) + 2 <= WIDTH:
            line += f" {first.lstrip()}{comma}"
        else:
            if line:
                yield line
            line = first + comma
    if line:
        yield line


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_table(value: Any) -> bool:
    """Whether ``value`` is a list of dictionaries that hold numbers and words, or lists of them."""

    def flat(cell: Any) -> bool:
        return isinstance(cell, (str, int, float, type(None))) or (isinstance(cell, (list, tuple)) and all(map(flat, cell)))

    rows = isinstance(value, (list, tuple)) and len(value) > 1 and all(isinstance(row, Mapping) and row for row in value)
    return rows and all(flat(cell) for row in value for cell in row.values())


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(text(summary(read(Path(name)))), encoding="utf-8")
