"""The command line ``inductor-ext``: one module a command or two, put together here."""

from __future__ import annotations

import typer

from inductor_ext.cli import bench, build, cache, demo, doctor, explain, ops, repro, rules
from inductor_ext.cli.common import Group, version_option

app = typer.Typer(
    name="inductor-ext",
    cls=Group,
    help="A torch.compile backend that gives FP8 models fused kernels, and says what it rewrote and why.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.callback()(version_option)
app.command("demo")(demo.demo)
app.command("explain")(explain.explain)
app.command("repro", context_settings=repro.CONTEXT)(repro.repro)
app.command("doctor")(doctor.doctor)
app.add_typer(ops.app, name="ops")
app.add_typer(rules.app, name="rules")
app.command("build")(build.build)
app.add_typer(cache.app, name="cache")
app.add_typer(bench.app, name="bench")
app.command("clangd")(doctor.clangd)


def main() -> None:
    """Entry point of ``inductor-ext``."""
    app()
