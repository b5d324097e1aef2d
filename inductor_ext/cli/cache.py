"""``inductor-ext cache``: the kernel binaries of this machine."""

from __future__ import annotations

import sys

import typer
from rich.text import Text

from inductor_ext import settings
from inductor_ext.cli.common import Group, JsonOption, print_json, stderr, stdout, table
from inductor_ext.jit import Entry, KernelCache
from inductor_ext.report.shown import line

app = typer.Typer(cls=Group, help="List, find or delete the kernel binaries of this machine.", no_args_is_help=True)


def _cache() -> KernelCache:
    return KernelCache(settings.current().cache_path())


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List the binaries, newest first."""
    cache = _cache()
    if reason := cache.refusal():
        stderr().print(f"{line(cache.root)} is not used: it {line(reason)}", style="yellow", soft_wrap=True)
    entries = cache.entries()
    if as_json:
        print_json([_describe(entry) for entry in entries])
        return
    if not entries:
        stdout().print(f"no kernels in {line(cache.root)}", soft_wrap=True)
        return
    shown = table("kernel", "target", "size", "age", "instantiation")
    for entry in entries:
        exports = ", ".join(expression for _, expression in entry.spec.exports)
        cells = (entry.name, entry.arch, f"{entry.bytes / 1024:.0f} KiB", _age(entry.age), exports)
        shown.add_row(*(Text(line(cell)) for cell in cells))
    stdout().print(shown)
    stdout().print(f"{len(entries)} kernels, {cache.size / 2**20:.1f} MiB in {line(cache.root)}", soft_wrap=True)


@app.command()
def path() -> None:
    """Print the directory."""
    root = _cache().root
    typer.echo(line(root) if sys.stdout.isatty() else root)  # a script gets the very bytes


@app.command()
def clear() -> None:
    """Delete every binary; they are built again when they are needed. What inductor_ext did not make is left alone."""
    cache = _cache()
    count, left = cache.clear()
    stdout().print(f"deleted {count} kernels from {line(cache.root)}", soft_wrap=True)
    if left:
        names = ", ".join(map(line, left[:10])) + (", …" if len(left) > 10 else "")
        stdout().print(f"left alone, because inductor_ext did not make it: {names}", soft_wrap=True)


def _describe(entry: Entry) -> dict[str, object]:
    return {
        **entry.spec.to_dict(),
        "key": entry.key,
        "path": str(entry.path),
        "bytes": entry.bytes,
        "age_s": round(entry.age),
    }


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
