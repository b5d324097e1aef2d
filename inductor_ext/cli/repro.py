"""``inductor-ext repro``: a script that PyTorch wrote of a graph, run with the rewrites, which such a script does not hold."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

import inductor_ext
from inductor_ext.cli.common import parse_rules, stderr
from inductor_ext.report.events import GraphReport
from inductor_ext.report.shown import shown

#: Arguments of the script are its own, whatever they look like.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def repro(
    context: typer.Context,
    script: Annotated[
        Path, typer.Argument(help="fx_graph_runnable.py, repro.py or a script of your own.", exists=True, dir_okay=False)
    ],
    rules: Annotated[str, typer.Option(help='Modes of single rules: "fp8_downcast=always,quantize_once=off".')] = "",
) -> None:
    """Run a script that TORCH_COMPILE_DEBUG=1 or the minifier wrote of a graph, with the rewrites in Inductor.

    PyTorch writes Inductor's settings into such a script, but no pass of anyone's: alone, it compiles the graph as stock does.
    What was rewritten is said on stderr. Arguments behind the script go to it.
    """
    import torch

    def tell(report: GraphReport) -> None:
        stderr().print(Text(shown(report.summary())), soft_wrap=True)

    options = {"rules": parse_rules(rules)} if rules else {}
    made = inductor_ext.graph_pass(on_report=tell, **options)
    given, sys.argv = sys.argv, [str(script), *context.args]
    try:
        with torch._inductor.config.patch(post_grad_custom_post_pass=made):
            runpy.run_path(str(script), run_name="__main__")
        made.complete()
    finally:
        sys.argv = given
