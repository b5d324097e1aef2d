"""The share for a GPU: the kernels of all programs are built in one parallel batch, then the programs run.

Generators are the CPU's. nvcc takes half a minute a kernel, so a program that would need one kernel more than allowed is left
out: what it is drawn from (programs of chains, dtypes, head sizes) is a small set, and most programs share their kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import typer

from inductor_ext import jit, settings
from tests.fuzz.campaign import Campaign
from tests.fuzz.check import Outcome, specs_of
from tests.fuzz.program import Program


def kernels_of(options: dict[str, Any], graphs: int, families: Sequence[str], most: int) -> frozenset[jit.JitSpec]:
    """Collect what the programs of a campaign would call, build up to ``most`` of it, and say what there is."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("device: wanted a CUDA GPU, found none; with --device cpu the references run")
    asked: dict[str, list[list[jit.JitSpec]]] = {family: [] for family in families}

    def collect(family: str, _program: Program, outcome: Outcome) -> None:
        asked[family].append(specs_of(outcome))

    Campaign(**{**options, "minimise": False}, dry=True, on_program=collect).run(graphs, families)
    wanted: dict[jit.JitSpec, None] = {}
    for specs in (specs for turn in itertools.zip_longest(*asked.values(), fillvalue=[]) for specs in turn):
        if len(wanted.keys() | set(specs)) <= most:  # families by turns: none takes all kernels
            wanted.update(dict.fromkeys(specs))
    built = jit.prepare(list(wanted), settings.current())
    failed = {spec: module for spec, module in built.items() if isinstance(module, Exception)}
    for spec, error in failed.items():
        typer.echo(f"{spec.describe()}: {error}", err=True)
    typer.echo(f"{len(wanted) - len(failed)} kernels, {len(failed)} failed", err=True)
    return frozenset(wanted.keys() - failed.keys())
