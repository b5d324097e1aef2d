"""What the scripts here share: their command, their kernels, built; their rows, shown, or written as a table.

    script(measure, CASES)         the command: --out FILE.json, --only REGEX; one row, or several, of each measure(*case)
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import timing
from inductor_ext import jit, registry

Case = tuple[Any, ...]
Rows = list[dict[str, Any]]
Out = Annotated[Path | None, typer.Option(help="Where the numbers go.")]


def script(
    measure: Callable[..., dict[str, Any] | Rows],
    cases: Iterable[Case] | Callable[[], Iterable[Case]],
    *,
    quick: Collection[Case] = (),
    build: Callable[[list[Case]], Any] | None = None,
    payload: Callable[[Rows], dict[str, Any]] = lambda rows: {"rows": rows},
    width: int = 130,
    without: Collection[str] = (),
) -> None:
    """Run as a command: ``build``, measure the cases that were asked for, write them as ``payload`` says, show them."""

    def main(
        out: Out = None,
        only: Annotated[str, typer.Option(help="Only cases in whose words and numbers this regular expression is found.")] = "",
        few: Annotated[bool, typer.Option("--quick", help="Fewer cases, where a script knows some.")] = False,
    ) -> None:
        registry.ops()
        every = quick if few and quick else cases() if callable(cases) else cases
        chosen = [case for case in every if re.search(only, label(case))]
        if build is not None:
            build(chosen)
        rows: Rows = []
        for case in chosen:
            made = measure(*case)
            rows += made if isinstance(made, list) else [made]
            if out is not None:  # after each case: a run that is stopped keeps what it has
                timing.write_json(out, {"how_timed": timing.HOW, **payload(rows)})
        show(rows, width, without)

    typer.run(main)


def label(case: Case) -> str:
    """The words and numbers of a case, as ``--only`` sees them."""
    return ", ".join(str(part) for part in case if dataclasses.is_dataclass(part) or isinstance(part, (str, int, tuple)))


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
