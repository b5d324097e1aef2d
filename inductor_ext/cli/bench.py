"""``inductor-ext bench``: run a benchmark script of the checkout this package is installed from."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from inductor_ext import jit
from inductor_ext.cli.common import stdout, table
from inductor_ext.errors import InductorExtError


class BenchError(InductorExtError):
    """No checkout, no such script, or no GPU."""


def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A script such as kernels/downcast, or a folder: its scripts in turn.")] = "",
) -> None:
    """Run a benchmark of the checkout's benchmarks/ folder; without a name, list them. Further arguments go to it."""
    root = _root()
    paths = [path for path in sorted(root.glob("*/*.py")) if _runs(path)]
    scripts = {path.relative_to(root).with_suffix("").as_posix(): path for path in paths}
    if not name:
        shown = table("benchmark", "what it measures")
        for key, path in scripts.items():
            shown.add_row(key, _title(path))
        stdout().print(shown)
        return
    wanted = name.removeprefix("benchmarks/").removesuffix(".py").rstrip("/")
    chosen = [path for key, path in scripts.items() if wanted in (key, key.partition("/")[0], key.rpartition("/")[2])]
    if not chosen:
        raise BenchError(f"there is no benchmark {name!r}; there are {', '.join(scripts) or 'none'}")
    if not {"--help", "-h"} & set(context.args):
        _need_gpu()
    search = os.pathsep.join(filter(None, (str(root.parent), os.environ.get("PYTHONPATH"))))
    for script in chosen:
        typer.echo(f"{script.relative_to(root.parent)} {' '.join(context.args)}", err=True)
        done = subprocess.run([sys.executable, str(script), *context.args], env={**os.environ, "PYTHONPATH": search})
        if done.returncode:
            raise typer.Exit(done.returncode)


def _root() -> Path:
    root = jit.kernels_root().resolve().parent / "benchmarks"
    if not root.is_dir():
        raise BenchError("benchmarks are in the checkout, not in the installed package: `pip install -e .` in a clone")
    return root


def _need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise BenchError("there is no GPU here: on a CPU the ops run their references, and there is no kernel to time")


def _runs(path: Path) -> bool:
    return 'if __name__ == "__main__"' in path.read_text()


def _title(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
