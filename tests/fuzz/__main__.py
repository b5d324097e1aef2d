"""./run fuzz: random programs around every rewrite rule, compared with what they were.

./run fuzz --graphs 20000 --seed 0             a long run; exit status 1 where something differs
./run fuzz --family downcast_fp8 --graphs 500  one family
./run fuzz tests/fuzz/corpus/*.py              programs from files, those of the corpus say
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    files: Annotated[list[Path] | None, typer.Argument(help="Replay these programs instead of drawing any.")] = None,
    graphs: Annotated[int, typer.Option(help="How many programs to draw, over all families.")] = 500,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    family: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    sample: Annotated[
        int, typer.Option(help="One program in so many through all of Inductor as well, seconds each; 0: none.")
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda: kernels are built in one batch first.")] = "cpu",
    max_kernels: Annotated[int, typer.Option(help="cuda: programs that need more kernels than these are left out.")] = 150,
    jobs: Annotated[int, typer.Option(help="Processes that share the work.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Where the result goes as JSON.")] = None,
    minimise: Annotated[bool, typer.Option(help="Make programs that fail smaller.")] = True,
) -> None:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="inductor_ext-fuzz-"))
    if files:
        raise typer.Exit(_replay(files, device))
    raise typer.Exit(_draw(graphs, seed, family, sample, device, max_kernels, jobs, out, minimise))


def _replay(files: list[Path], device: str) -> int:
    from tests.fuzz.capture import prepared
    from tests.fuzz.check import check
    from tests.fuzz.program import load

    failed = 0
    with prepared():
        for path in files:
            outcome = check(load(path), device)
            said = [str(fault) for fault in outcome.faults] or [outcome.discarded or "as eager"]
            print(f"{path}: {'; '.join(said)}; rewrites {dict(outcome.rewrites)}")
            failed += bool(outcome.faults)
    return int(failed > 0)


def _draw(
    graphs: int, seed: int, family: Any, sample: int, device: str, max_kernels: int, jobs: int, out: Path | None, minimise: bool
) -> int:
    import rich
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from inductor_ext import registry
    from tests.fuzz import workers
    from tests.fuzz.families import FAMILIES

    unknown = [name for name in family or () if name not in FAMILIES]
    if unknown:
        raise typer.BadParameter(f"family: wanted one of {', '.join(FAMILIES)}, found {unknown[0]!r}")
    options: dict[str, Any] = {"seed": seed, "sample": sample, "device": device, "minimise": minimise}
    families = tuple(family or FAMILIES)
    if device != "cpu":
        from tests.fuzz.gpu import kernels_of

        options["kernels"] = kernels_of(options, graphs, families, max_kernels)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=rich.console.Console(stderr=True)) as progress:
        task = progress.add_task("fuzz", total=graphs)

        def tell(name: str, count: int, so_far: Any) -> None:
            progress.update(task, advance=count, description=f"{name:24} {len(so_far.found)} kinds of faults")

        result = workers.run(options, graphs, families, jobs, tell)
    data = {"seed": seed, "device": device, **result.to_dict()}
    if out:
        out.write_text(json.dumps(data, indent=1) + "\n")
    _print(data, [rule.name for rule in registry.rules()])
    return int(bool(result.found))


def _print(data: dict[str, Any], rules: list[str]) -> None:
    import rich
    from rich.table import Table

    console = rich.console.Console()
    table = Table("rule", "rewrites", "refusals", title=f"{data['graphs']} graphs, seed {data['seed']}, torch {data['torch']}")
    for rule in rules:
        table.add_row(rule, str(data["rewrites"].get(rule, 0)), str(data["refusals"].get(rule, 0)))
    console.print(table)
    console.print(
        f"{data['discarded']} discarded, {data['sampled']} through all of Inductor, "
        f"{data['seconds']:.0f} s, {data['cpu_ms_a_graph']} ms of CPU a graph"
    )
    for fault in data["faults"]:
        where = f"--family {fault['family']} --seed {data['seed']}, round {fault['chunk']}"
        console.print(
            f"\n[bold red]{fault['rule']}: {fault['kind']}[/] {fault['times']} times, first with {where}", highlight=False
        )
        console.print(f"through all of Inductor: {fault['through all of Inductor'] or 'not tried'}", highlight=False)
        print(fault["program"])


if __name__ == "__main__":
    sys.exit(app())
