"""``inductor-ext ops`` and ``ops show NAME``: the operators, and the whole of what one is."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from rich.text import Text

from inductor_ext import registry
from inductor_ext.cli.common import Group, JsonOption, op_named, print_json, stdout, table
from inductor_ext.op import Op

app = typer.Typer(cls=Group, help="List the operators; `ops show NAME` says all of one.", invoke_without_command=True)


@app.callback()
def ops(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the operators: what each does, its kernel's source and the GPUs it runs on."""
    if context.invoked_subcommand:
        return
    found = [describe(op) for op in registry.ops()]
    if as_json:
        print_json(found)
        return
    shown = table("op", "what it does, and schema", "kernel", "capability")
    for op in found:
        what = Text.assemble(op["doc"], (f"\n{op['schema']}", "dim"))
        shown.add_row(Text(op["name"], "bold"), what, Text(op["kernel"] or "none"), Text(op["min_capability"] or ""))
    stdout().print(shown)
    stdout().print("`inductor-ext ops show NAME` says all of one.", style="dim")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="An op, as `inductor-ext ops` lists them.")], as_json: JsonOption = False
) -> None:
    """What an op computes, of which shapes, dtypes and layouts, and its errors."""
    op = op_named(name)
    found = {**describe(op), "documentation": inspect.getdoc(registry.module_of(op)) or op.doc}
    if as_json:
        print_json(found)
        return
    lines = [("schema", found["schema"]), ("kernel", found["kernel"] or "none: the op runs its reference")]
    if found["min_capability"]:
        lines.append(("runs on", f"compute capability {found['min_capability']} or later; the reference on a CPU"))
    built = ", ".join(f"{count} for {arch}" for arch, count in found["prebuilt_examples"].items() if count)
    lines.append(("built ahead", built or "nothing"))
    stdout().print(Text.assemble((op.name, "bold"), f": {op.doc}"))
    stdout().print(Text(found["documentation"]))
    for title, text in lines:
        stdout().print(Text.assemble((f"{title:12}", "dim"), text), soft_wrap=True)


def describe(op: Op) -> dict[str, Any]:
    kernel = op.kernel
    examples = {arch: op.examples(arch) for arch in ("sm_90a", "sm_100a")}
    sources = sorted({spec.source for specs in examples.values() for spec in specs})
    return {
        "name": op.name,
        "doc": op.doc,
        "schema": op.schema,
        "mutates": op.mutates,
        "kernel": ", ".join([*sources, *(["other libraries'"] if op.library else [])]) or None,
        "min_capability": "{}.{}".format(*kernel.min_capability) if kernel else None,
        "prebuilt_examples": {arch: len(specs) for arch, specs in examples.items()},
    }
