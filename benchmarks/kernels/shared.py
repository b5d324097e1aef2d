"""What the scripts here begin and end with: their kernels, built; their rows, shown, or written as a table."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from inductor_ext import jit


def built(specs: Iterable[jit.JitSpec]) -> dict[jit.JitSpec, Any]:
    """The kernels, made in parallel. RuntimeError with the first failure: PyTorch's operators would be timed in its place."""
    modules = jit.prepare(list(dict.fromkeys(specs)))
    for spec, module in modules.items():
        if isinstance(module, Exception):
            raise RuntimeError(f"a kernel does not build: {spec.describe()}") from module
    return modules


def show(rows: Sequence[dict[str, Any]], width: int, without: Collection[str] = ()) -> None:
    """One line a row, one column a key but those of ``without``; None, and a key that a row lacks, is empty."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in without]
    table = Table(*names)
    for row in rows:
        table.add_row(*("" if row.get(name) is None else str(row[name]) for name in names))
    Console(width=width).print(table)


def table_text(shapes: Iterable[dict[str, Any]], **head: Any) -> str:
    """A table of configurations as JSON, a line for each of a shape's rows, so that a new measurement reads as a diff."""
    made = []
    for shape in shapes:
        rows = ",\n   ".join(json.dumps(row) for row in shape["rows"])
        made.append("  " + json.dumps({**shape, "rows": 0})[:-2] + f"[\n   {rows}]}}")
    first = "".join(f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)},\n" for name, value in head.items())
    return "{\n" + first + ' "shapes": [\n' + ",\n".join(made) + "\n ]\n}\n"
