"""``inductor-ext ops``: the operators."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from inductor_ext import registry
from inductor_ext.cli.common import JsonOption, print_json, stdout, table
from inductor_ext.op import Op


def ops(as_json: JsonOption = False) -> None:
    """List the operators: what each does, its kernel's source and the GPUs it runs on."""
    found = [describe(op) for op in registry.ops()]
    if as_json:
        print_json(found)
        return
    shown = table("op", "what it does, and schema", "kernel", "capability")
    for op in found:
        what = Text.assemble(op["doc"], (f"\n{op['schema']}", "dim"))
        shown.add_row(Text(op["name"], "bold"), what, Text(op["kernel"] or "none"), Text(op["min_capability"] or ""))
    stdout().print(shown)


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
