"""The share for a GPU: the kernels of all programs are built in one parallel batch, then the programs run.

Generators are the CPU's. nvcc takes half a minute a kernel, so a program that would need one kernel more than allowed is left
out: what it is drawn from (programs of chains, dtypes, head sizes) is a small set, and most programs share their kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import typer

from inductor_ext import jit, settings
from tests.fuzz.campaign import Campaign
from tests.fuzz.check import Outcome, specs_of
from tests.fuzz.families import FAMILIES
from tests.fuzz.program import Program


def build_kernels(campaign: Campaign, graphs: int, families: Sequence[str] | None, most: int) -> None:
    """Collect what the programs of ``campaign`` would call, build up to ``most`` of it, and let only those programs run."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("device: wanted a CUDA GPU, found none; on a CPU the references run, with --device cpu")
    wanted: dict[Any, None] = {}

    def collect(_family: str, program: Program, outcome: Outcome) -> None:
        specs = specs_of(outcome)
        if len(wanted.keys() | set(specs)) <= most:
            wanted.update(dict.fromkeys(specs))

    dry = Campaign(campaign.seed, device=campaign.device, minimise=False, on_program=collect, dry=True)
    dry.run(graphs, tuple(families or FAMILIES))
    built = jit.prepare(list(wanted), settings.current())
    failed = [(spec, module) for spec, module in built.items() if isinstance(module, Exception)]
    for spec, error in failed:
        typer.echo(f"{spec.describe()}: {error}", err=True)
    campaign.kernels = frozenset(spec for spec in wanted if not isinstance(built[spec], Exception))
    typer.echo(f"{len(campaign.kernels)} kernels built, {len(failed)} failed", err=True)
