"""``inductor-ext demo``: the whole road on a Qwen3 model, or a trained one's answers; progress, tables and the HTML report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from inductor_ext import demo as work
from inductor_ext.cli.common import stdout, table
from inductor_ext.demo import Result
from inductor_ext.report import html as report_html
from inductor_ext.report.html import Section, verification_section
from inductor_ext.report.shown import line

TableData = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]

STAGES = 7

CPU_NOTE = (
    "There is no GPU here, so the ops run their references, which are PyTorch's own operators: no speed-up is to be "
    "expected, and these times only show that the road runs."
)


def demo(
    html: Annotated[Path, typer.Option(help="Where to write the HTML report.")] = Path("inductor_ext_demo.html"),
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the results as JSON.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the model, instead of its own number.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    model: Annotated[str, typer.Option(help="qwen3, or a trained model: smollm2 (answers), minilm (searches).")] = "qwen3",
) -> None:
    """Compile an FP8 Qwen3 model stock and through inductor_ext: what is rewritten, is it right, is it faster.

    Random weights, nothing downloaded: the 0.6B shape on a GPU, a small one on a CPU. With --model a small trained model, which
    is a package of its own, says what FP8 costs its answers.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise work.DemoError(f"--device: wanted cpu, or cuda with a GPU that torch sees; found {device!r}")
    if model != "qwen3":
        _trained(model, device, layers, html, json_path)
        return
    shape = work.QWEN3_06B if device == "cuda" else work.SMALL
    if layers:
        shape = dataclasses.replace(shape, layers=layers)
    console = stdout()
    console.print(f"Qwen3Model, random weights: {shape}; on {device}")
    with stages(console) as stage:
        result = work.run(shape, device, stage)
        with stage("Writing the report"):
            path = report_html.write(result.explanation, html, sections(result))
    console.print(f"Linear layers: {result.quantisation}\n", soft_wrap=True)
    console.print(result.explanation)
    console.print(result.verification)
    _end(console, result, (output_rows(result), time_rows(result)), device, path, json_path)
    if not result.ok:
        raise typer.Exit(1)


def _trained(name: str, device: str, layers: int | None, html: Path, json_path: Path | None) -> None:
    """``--model``: a trained model's answers in bf16 and in FP8, eager and compiled."""
    from inductor_ext import trained

    console = stdout()
    with stages(console, trained.STAGES) as stage:
        result = trained.run(name, device, layers, stage)
        with stage("Writing the report"):
            columns, rows = answer_rows(result)
            section = Section("What the trained model answers", result.quantisation, columns, rows)
            path = report_html.write(result.explanation, html, [section])
    console.print(f"Linear layers: {result.quantisation}", soft_wrap=True)
    console.print("\n".join(graph.summary() for graph in result.explanation.graphs), soft_wrap=True)
    _end(console, result, ((columns, rows),), device, path, json_path)


def _end(console: Console, result: Any, tables: Sequence[TableData], device: str, path: Path, json_path: Path | None) -> None:
    """What every demo ends with: its tables, what a CPU's times mean, and where the results are."""
    for columns, rows in tables:
        shown = table(*columns)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    if device == "cpu":
        console.print(CPU_NOTE, style="yellow")
    if json_path:
        json_path.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    console.print(Text.assemble("Report: ", (line(path), "bold")), soft_wrap=True)


def answer_rows(result: Any) -> TableData:
    """A line a side, a column a measure, and what it wrote."""
    measures = [name for name in result.answers[0].measures]
    columns = ("side", *measures, *(["what it writes"] if result.answers[0].text else []))
    rows = []
    for answer in result.answers:
        numbers = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in answer.measures.values()]
        rows.append((answer.side, *numbers, *([answer.text] if answer.text else [])))
    return columns, rows


@contextlib.contextmanager
def stages(console: Console, total: int = STAGES) -> Iterator[Any]:
    """Gives ``stage(title)``: a bar over all stages while they run, a line for each that has ended."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)

        @contextlib.contextmanager
        def stage(title: str) -> Iterator[None]:
            started = time.perf_counter()
            bar.update(task, description=title)
            yield
            bar.advance(task)
            console.print(Text(f"  ✓ {title:<48} {time.perf_counter() - started:6.1f} s"))

        yield stage


def output_rows(result: Result) -> TableData:
    rows = [
        (pair, f"{found.max_abs:.3g}", f"{found.cosine:.6f}", f"{found.relative:.3g}")
        for pair, found in result.distances.items()
    ]
    return ("outputs", "max |a - b|", "cosine", "relative distance"), rows


def time_rows(result: Result) -> TableData:
    stock = result.run_ms["stock"]
    rows = [(name, f"{ms:.2f} ms", f"{stock / ms:.2f}×") for name, ms in result.run_ms.items()]
    return ("compiled with", result.how_timed, "of stock's speed"), rows


def sections(result: Result) -> list[Section]:
    """The demo's own parts of the HTML report."""
    note = CPU_NOTE if result.device == "CPU" else ""
    outputs = (
        "FP8 turns one different rounding into a step of up to an eighth, so compiled outputs differ from eager ones, "
        "stock's too; ours must not be further from eager than stock's are."
    )
    return [
        Section("The demo", f"Hugging Face Qwen3Model with random weights on {result.device}: {result.shape}. "
                f"Linear layers: {result.quantisation}."),
        Section("Times", note, *time_rows(result)),
        Section("Outputs", outputs, *output_rows(result), ok=result.outputs_ok),
        verification_section(result.verification),
    ]  # fmt: skip
