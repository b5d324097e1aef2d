"""``inductor-ext bench model``: a whole Hugging Face model, FP8, eager, stock and through this backend, in one run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from inductor_ext.bench import chart, page, sides, summary, tables
from inductor_ext.bench import model as models
from inductor_ext.bench import suite as suites
from inductor_ext.bench.families import ModelShape
from inductor_ext.bench.quantize import RECIPES
from inductor_ext.bench.run import Plan, rules_that_fire, run
from inductor_ext.bench.workload import Workload, parse_lengths
from inductor_ext.cli.common import parse_rules, stdout, table
from inductor_ext.cli.demo import stages
from inductor_ext.errors import SettingError
from inductor_ext.report.html import Section
from inductor_ext.report.shown import shown as spelt_out

#: Texts and tokens a text of a step, by device: a GPU gets what the results in benchmarks/results were made with.
BATCH, LENGTH = {"cuda": 14, "cpu": 4}, {"cuda": 512, "cpu": 64}
MOST_COSINES = 256


def model(
    name: Annotated[str, typer.Option("--model", help=f"{', '.join(models.MODELS)}. Default: Qwen3-0.6B; tiny on a CPU.")] = "",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers, instead of the model's own number.")] = None,
    fp8: Annotated[str, typer.Option(help="Linear layers: row, tensor (dynamic scales), static or none (bf16).")] = "row",
    batch: Annotated[int | None, typer.Option(min=1, help="Texts a step.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of each text.")] = None,
    lengths: Annotated[
        str, typer.Option(help='Instead of --length: "512,128,…", or "lognormal:mean=200,sigma=0.6,max=2048" (--batch texts).')
    ] = "",
    pack: Annotated[bool, typer.Option("--pack", help="Put the texts end to end in one row, without padding.")] = False,
    decode: Annotated[
        int, typer.Option(help="Instead of --length: decode one token of --batch sequences of so many, FP8 KV cache.")
    ] = 0,
    side_names: Annotated[str, typer.Option("--sides", help=f"Some of {','.join(sides.SIDES)}.")] = "stock,ours",
    rules: Annotated[str, typer.Option(help='Modes of rules on our sides: "name=auto|always|off,…".')] = "",
    ablate: Annotated[bool, typer.Option("--ablate", help="Instead of --sides: our rules, one more a side.")] = False,
    attention: Annotated[str, typer.Option(help="attn_implementation of our sides. Default: sdpa; packed inductor_ext.")] = "",
    stock_attention: Annotated[str, typer.Option(help="attn_implementation of the other sides.")] = "sdpa",
    replays: Annotated[int, typer.Option(min=1, help="Timed steps of a side in each round.")] = 30,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over the sides in turn.")] = 3,
    cosine_inputs: Annotated[
        int, typer.Option(min=0, max=MOST_COSINES, help="Random texts whose embeddings are compared with bf16's.")
    ] = 8,
    together: Annotated[
        bool, typer.Option("--together", help="Compile all sides at once; compile seconds then mean nothing.")
    ] = False,
    limit: Annotated[float | None, typer.Option(min=1, help="Seconds after which a side not compiled is given up.")] = None,
    suite: Annotated[
        str,
        typer.Option(help=f'Several models instead of --model, {suites.LAYERS} layers each: "all" or names, stock and ours.'),
    ] = "",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the result as JSON; every round and kernel goes to FILE.samples.json.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the result; needs matplotlib.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the result as one HTML page, with the chart.")] = None,
    from_path: Annotated[
        Path | None, typer.Option("--from", exists=True, dir_okay=False, help="Measure nothing: show this --json result.")
    ] = None,
) -> None:
    """Time a whole model: Hugging Face's, random weights, nothing downloaded.

    Each side compiles in a process of its own with empty Inductor caches and is then measured under CUDA graphs, the
    sides in turn. Without a GPU it runs a tiny model on the CPU, to show that the road runs.
    """
    if png:
        chart.need_matplotlib()
    console = stdout()
    if from_path:
        result = summary.read(from_path)
    elif suite:
        if png or html or name or lengths or pack or decode or ablate:
            raise SettingError("--suite goes with --layers, --fp8, --batch, --length, --rules, how to time and --json")
        where = _device(device)
        timing: dict[str, Any] = {
            "replays": replays,
            "rounds": rounds,
            "cosine_inputs": cosine_inputs,
            "together": together,
            "limit_s": limit,
            "rules": parse_rules(rules),
        }
        size = layers, batch or BATCH[where], length or LENGTH[where]
        result = _suite(console, suite, *size, fp8=_recipe(fp8), device=where, **timing)
    else:
        where = _device(device)
        modes = parse_rules(rules)
        known, shape = models.named(name or ("Qwen3-0.6B" if where == "cuda" else "tiny"), layers)
        workload = _workload(shape, batch, length, lengths, pack, decode, where)
        chosen = sides.parse_sides("ours" if ablate else side_names, modes)
        attentions = (attention or (models.OURS if pack else "sdpa"), stock_attention)
        plan = Plan(
            known, shape, workload, chosen, _recipe(fp8), where, *attentions, replays, rounds, cosine_inputs, together, limit
        )
        console.print(Text(f"{known}, random weights, {shape.layers} layers, on {where}: {workload}"), soft_wrap=True)
        with stages(console, 4 if together else 4 + len(chosen)) as stage:
            if ablate:
                with stage("Asking which rules fire"):
                    fired = rules_that_fire(plan)
                plan = dataclasses.replace(plan, sides=sides.ablation(fired, modes), warm=False)  # asking built the kernels
            result = run(plan, stage)
    written = [path for path in (png, html) if path]
    if json_path:
        written += summary.write(json_path, result)
    if png:
        chart.write_png(result, png)
    if html:
        page.write(result, html)
    _show(console, result)
    for path in written:
        console.print(Text(f"Written: {spelt_out(path)}"), soft_wrap=True)
    if any(each["error"] for each in result.get("suite", result.get("sides"))):
        raise typer.Exit(1)


def _device(device: str | None) -> str:
    import torch

    found = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if found not in BATCH or (found == "cuda" and not torch.cuda.is_available()):
        raise SettingError(f"--device: wanted cpu, or cuda with a GPU that torch sees; found {found!r}")
    return found


def _recipe(name: str) -> str:
    if name not in RECIPES:
        raise SettingError(f"--fp8: wanted one of {', '.join(RECIPES)}, found {name!r}")
    return name


def _suite(console: Any, names: str, layers: int | None, batch: int, length: int, **options: Any) -> dict[str, Any]:
    known = suites.parse(names)
    with stages(console, 1 + 2 * len(known) if options["together"] else 6 * len(known)) as stage:
        told = lambda line: console.print(Text(line), soft_wrap=True)  # noqa: E731
        return suites.run_suite(known, layers or suites.LAYERS, batch, length, told=told, stage=stage, **options)


def _workload(
    shape: ModelShape, batch: int | None, length: int | None, lengths: str, pack: bool, decode: int, device: str
) -> Workload:
    if shape.kind.reads != "text" and (lengths or pack or decode or (shape.positions and length is not None)):
        found = "one of these" if not shape.positions else f"one of these, and {shape.positions} positions an item"
        raise SettingError(f"--lengths, --pack, --decode, --length: wanted none for a model that reads no text, found {found}")
    if shape.positions:
        return suites.workload(shape, batch or BATCH[device], length or LENGTH[device])
    if decode:
        if length is not None or lengths or pack:
            raise SettingError("--decode takes the place of --length, --lengths and --pack")
        return Workload((1,) * (batch or BATCH[device]), context=decode)
    if not lengths:
        return Workload((length or LENGTH[device],) * (batch or BATCH[device]), pack)
    if length is not None or (batch is not None and ":" not in lengths):
        raise SettingError("--lengths takes the place of --length, and a list of lengths that of --batch too")
    return Workload(parse_lengths(lengths, batch or BATCH[device]), pack)


def _show(console: Any, result: tables.Result) -> None:
    if "suite" in result:
        _print(console, suites.section(result))
        for row in result["suite"]:
            if row["error"]:
                console.print(Text.assemble((f"{row['model']} failed: ", "bold red"), spelt_out(row["error"])), soft_wrap=True)
        return
    console.print(Text(f"{result['what']}; {result['quantisation']}"), soft_wrap=True)
    for section in tables.tables(result):
        _print(console, section)
    for note in tables.notes(result):
        console.print(Text(note, style="yellow"), soft_wrap=True)
    for side in result["sides"]:
        if side["error"]:
            console.print(Text.assemble((f"{side['name']} failed: ", "bold red"), spelt_out(side["error"])), soft_wrap=True)


def _print(console: Any, section: Section) -> None:
    shown = table(*section.columns)
    for row in section.rows:
        shown.add_row(*row)
    console.print(Text(section.title, style="bold"), Text(section.text))
    console.print(shown)
