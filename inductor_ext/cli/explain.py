"""``inductor-ext explain``: what the backend does to a user's model, and with ``--verify`` whether it is right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import inductor_ext
from inductor_ext.cli.common import JsonOption, parse_rules, print_json, stderr, stdout
from inductor_ext.cli.target import load
from inductor_ext.report.shown import line


def explain(
    target: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT.py:FUNCTION",
            help="A function in a script, or in a module (pkg.mod:function), that returns (model, args[, kwargs]).",
        ),
    ],
    rules: Annotated[str, typer.Option(help='Modes of single rules: "fp8_downcast=always,quantize_once=off".')] = "",
    as_json: JsonOption = False,
    html: Annotated[Path | None, typer.Option(help="Also write the report as one HTML file.")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Also show the graphs' diff, before and after.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Also compare rewrites and results with stock.")] = False,
    dynamic: Annotated[bool | None, typer.Option(help="torch.compile's `dynamic`.")] = None,
) -> None:
    """Say what is rewritten in a model, what is nearly, and why not.

    The function is called without arguments; its model runs once in eager mode, on copies of the inputs.
    """
    from inductor_ext.report import html as report_html
    from inductor_ext.report import text

    model, args, kwargs = load(target)
    modes = parse_rules(rules) or None
    explanation = inductor_ext.explain(model, *args, rules=modes, dynamic=dynamic, **kwargs)
    verification = inductor_ext.verify(model, *args, rules=modes, dynamic=dynamic, **kwargs) if verify else None
    if as_json:
        found = explanation.to_dict()
        print_json({**found, "verify": verification.to_dict()} if verification else found)
    else:
        console = stdout()
        console.print(explanation)
        if diff:
            console.print(text.diff(explanation.diff() or "(no graph changed)"), soft_wrap=True)
        if verification:
            console.print(verification)
    if html:
        extra = [report_html.verification_section(verification)] if verification else None
        stderr().print(f"report: {line(report_html.write(explanation, html, extra))}", soft_wrap=True)
    if verification and not verification.ok:
        raise typer.Exit(1)
