"""``inductor-ext bench``: a benchmark script of the checkout this package is installed from, or a whole model."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

from inductor_ext import jit
from inductor_ext.cli import bench_model
from inductor_ext.cli.common import Group, stdout, table
from inductor_ext.errors import InductorExtError


class BenchError(InductorExtError):
    """No checkout, no such script, or no GPU."""


class ScriptGroup(Group):
    """Takes a first word that is no command for the name of a script."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            return "script", self.commands["script"], args
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=ScriptGroup)
app.command("model")(bench_model.model)


@app.callback(invoke_without_command=True, subcommand_metavar="[model | SCRIPT | FOLDER] [ARGS]...")
def bench(context: typer.Context) -> None:
    """Run a benchmark: `model`, or a script of the checkout's benchmarks/ folder. Without a name, list the scripts.

    SCRIPT is a name such as kernels/downcast, FOLDER runs its scripts in turn; further arguments go to them.
    """
    if context.invoked_subcommand is None:
        shown = table("benchmark", "what it measures")
        for key, path in _scripts(_root()).items():
            shown.add_row(key, _title(path))
        shown.add_row("model", "A whole Hugging Face model, FP8, stock and through inductor_ext: see `bench model --help`.")
        stdout().print(shown)


@app.command("script", hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def script(context: typer.Context, name: str) -> None:
    """Run a benchmark script of the checkout's benchmarks/ folder, or those of a folder in turn."""
    root = _root()
    scripts = _scripts(root)
    wanted = name.removeprefix("benchmarks/").removesuffix(".py").rstrip("/")
    chosen = [path for key, path in scripts.items() if wanted in (key, key.partition("/")[0], key.rpartition("/")[2])]
    if not chosen:
        raise BenchError(f"there is no benchmark {name!r}; there are {', '.join(scripts) or 'none'}")
    if not {"--help", "-h"} & set(context.args):
        _need_gpu()
    search = os.pathsep.join(filter(None, (str(root.parent), os.environ.get("PYTHONPATH"))))
    for path in chosen:
        typer.echo(f"{path.relative_to(root.parent)} {' '.join(context.args)}", err=True)
        done = subprocess.run([sys.executable, str(path), *context.args], env={**os.environ, "PYTHONPATH": search})
        if done.returncode:
            raise typer.Exit(done.returncode)


def _root() -> Path:
    root = jit.kernels_root().resolve().parent / "benchmarks"
    if not root.is_dir():
        raise BenchError("benchmarks are in the checkout, not in the installed package: `pip install -e .` in a clone")
    return root


def _scripts(root: Path) -> dict[str, Path]:
    """Scripts by name: their path in the folder, without the suffix."""
    paths = [path for path in sorted(root.glob("*/*.py")) if _runs(path)]
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in paths}


def _need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise BenchError("there is no GPU here: on a CPU the ops run their references, and there is no kernel to time")


def _runs(path: Path) -> bool:
    return 'if __name__ == "__main__"' in path.read_text()


def _title(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
