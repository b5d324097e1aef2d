"""``inductor-ext doctor`` and ``clangd``: the state of this machine, and editor settings for the kernels."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from inductor_ext import jit
from inductor_ext.cli.common import JsonOption, print_json, stdout, table
from inductor_ext.report.shown import shown

_MARKS = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("–", "yellow")}


def doctor(as_json: JsonOption = False) -> None:
    """Check what building and running kernels needs, each with its fix. Status 1 when something required is broken."""
    checks = [_entry_point(), *jit.diagnose()]
    broken = [check for check in checks if check.ok is False]
    verdict = summary(checks)
    if as_json:
        print_json({"ok": not broken, "summary": verdict, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        rows = table("", "check", "found", "to fix")
        for check in checks:
            mark, style = _MARKS[check.ok]
            rows.add_row(Text(mark, style), *(Text(shown(each)) for each in (check.name, check.found, check.fix)))
        stdout().print(rows)
        stdout().print(verdict, style="bold", soft_wrap=True)
    if broken:
        raise typer.Exit(1)


def summary(checks: list[jit.Check]) -> str:
    """One sentence: what works on this machine."""
    broken = [check.name for check in checks if check.ok is False]
    if broken:
        return f"Broken: {', '.join(broken)}."
    state = {check.name: check.ok for check in checks}
    missing = [name for name in ("nvcc", "host compiler") if not state.get(name)]
    kind = "only loads kernels: it has no " + ", no ".join(missing) if missing else "builds kernels"
    if not missing and not state.get("CUTLASS headers"):
        kind = "builds kernels but those of products: it has no CUTLASS headers"
    if not _has_gpu():
        return f"Reference mode: no GPU, so every op runs its PyTorch reference. This environment {kind}."
    if not missing or state.get("prebuilt directory") or state.get("kernel wheels"):
        return f"Ready. This environment {kind}."
    return f"No prebuilt kernels, and this environment {kind}. Graphs keep stock operators unless the cache has theirs."


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _entry_point() -> jit.Check:
    """Whether ``backend="inductor_ext"`` is found without an import."""
    found = [entry for entry in metadata.entry_points(group="torch_dynamo_backends") if entry.name == "inductor_ext"]
    if found:
        return jit.Check("backend", True, 'torch.compile(model, backend="inductor_ext") finds it')
    return jit.Check("backend", False, "the entry point is not installed", "install the package: pip install -e .")


def clangd(
    directory: Annotated[Path, typer.Argument(help="Where to write; the root of the checkout.", file_okay=False)] = Path(),
) -> None:
    """Write .clangd and compile_commands.json, so that an editor understands the kernels."""
    for path in jit.write_clangd(directory):
        typer.echo(path)
