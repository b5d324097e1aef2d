"""What commands share: consoles, errors, JSON on stdout, the ``--rules`` option."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from inductor_ext import registry, settings
from inductor_ext.errors import InductorExtError, SettingError
from inductor_ext.report.shown import shown
from inductor_ext.report.text import WIDTH


class Group(TyperGroup):
    """Shows this package's own errors as one line instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            own = getattr(error, "inner_exception", error)  # torch.compile wraps what a backend raises
            if not isinstance(own, InductorExtError):
                raise
            stderr().print(Text.assemble(("error: ", "bold red"), shown(own)), soft_wrap=True)
            raise typer.Exit(1) from None


def stdout() -> Console:
    """A console made when it is used, so that a redirected stdout is honoured; off a terminal it is wide.

    No text is markup: ``[red]`` in a path or a model's name is shown as it is.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def stderr() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def table(*columns: str) -> Table:
    made = Table(show_lines=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def parse_rules(text: str) -> dict[str, settings.RuleMode]:
    """``"fp8_downcast=always,quantize_once=off"`` as a mapping; names and modes are checked."""
    found: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, mode = item.partition("=")
        found[registry.rule_named(name.strip()).name] = mode.strip() or "auto"
    return dict(settings.Settings().replace(rules=found).rules)


def op_named(name: str) -> Any:
    for op in registry.ops():
        if op.name == name:
            return op
    raise SettingError(f"no op is called {name!r}; ops are {', '.join(op.name for op in registry.ops())}")


def _version(value: bool) -> None:
    if value:
        import torch

        import inductor_ext

        typer.echo(f"inductor-ext {inductor_ext.__version__}, torch {torch.__version__}")
        raise typer.Exit()


def version_option(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions.")] = False,
) -> None:
    pass


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
