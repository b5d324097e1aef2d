"""Can every kernel be trusted? One run on a GPU that says so op by op, or what failed.

    python -m benchmarks.trust --prebuild                      every kernel that is needed, built in parallel
    python -m benchmarks.trust --all --out FILE.json           all parts, each in a process of its own with a time limit
    python -m benchmarks.trust --only replay                   one of them, in this process

calls      every call of `calls.CALLS` against its reference
replay     CUDA graphs replayed 10 000 times, or 500, with other operands each time
threads    four threads on four streams, a mix of all ops
huge       tensors of more than 2^31 elements
memcheck   compute-sanitizer over one call of everything; racecheck likewise, and synccheck with --only

Prints a table of ops and checks last. A part that takes longer than its limit is stopped; what it found so far is kept.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import timing
from benchmarks.kernels.shared import show
from benchmarks.trust import calls, huge, replay, running, sanitize, threads
from inductor_ext import jit, registry
from inductor_ext.bench import summary as summary_of

#: Seconds that a part may take under --all.
LIMITS = {"calls": 150, "replay": 200, "threads": 150, "huge": 180, "memcheck": 300, "racecheck": 400}
REPLAYS, THREAD_CALLS = 10_000, 2000
PARTS = ("calls", "replay", "threads", "huge", "bare")  # bare: the calls that a sanitizer watches
SANITIZERS = ("memcheck", "racecheck", "synccheck")
COMPLETE = "exit code 0"  # in what is told of a part
SHOWN = 20  # lines of what failed


@dataclasses.dataclass(frozen=True)
class Row:
    """What one check found of one call; ``said`` is "" where all was well, None where it could not be looked at."""

    check: str
    op: str
    call: str
    said: str | None
    seconds: float


def kernels(device: str, arch: str) -> list[jit.JitSpec]:
    """Every kernel that any part needs, by fake tensors: the largest are not made."""
    registry.ops()
    with FakeTensorMode():
        found = [spec for call in calls.CALLS for spec in calls.specs(call, device, arch)]
        for case in huge.CASES:
            found += calls.op_named(case.op).specs(case.make(device), arch)
    return list(dict.fromkeys(found))


def prebuild() -> None:
    start, wanted = time.perf_counter(), kernels("cuda", jit.current_arch() or "sm_90a")
    print(f"{len(wanted)} kernels", flush=True)

    def step(event: jit.BuildEvent) -> None:
        if event.state in ("built", "failed"):
            what = event.spec.describe()[:110]
            print(f"{event.done}/{event.total} {event.state} in {event.seconds:.0f} s: {what}", flush=True)

    failed = [(spec, made) for spec, made in jit.prepare(wanted, on_progress=step).items() if isinstance(made, Exception)]
    for spec, error in failed:
        print(f"does not build: {spec.describe()}\n{error}", flush=True)
    print(f"{len(wanted) - len(failed)} of {len(wanted)} kernels in {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        raise typer.Exit(1)


def run_part(part: str, device: str, emit: running.Emit) -> None:
    """One part, in this process."""
    registry.ops()
    go: dict[str, Callable[[], None]] = {  # by `PARTS`
        "calls": lambda: running.run_calls(calls.CALLS, device, emit),
        "bare": lambda: running.run_bare(calls.CALLS, device, emit),
        "replay": lambda: replay.run(device, REPLAYS, replay.FEW, emit),
        "threads": lambda: threads.run(calls.CALLS, device, THREAD_CALLS, emit),
        "huge": lambda: huge.run(huge.CASES, device, emit),
    }
    go[part]()


def part_in_a_process(part: str, limit: float, folder: Path, device: str = "cuda") -> tuple[list[Row], str]:
    """A part under a time limit: its rows as far as it came, and what is to be said of the whole."""
    rows, log = folder / f"{part}.jsonl", folder / f"{part}.log"
    if part in SANITIZERS:
        found, told = sanitize.run(part, limit, log, rows)
        seconds = {(row.op, row.call): row.seconds for row in read(rows)}
        return [Row(part, op, call, said, seconds.get((op, call), 0.0)) for op, call, said in found], told
    start = time.perf_counter()
    line = [sys.executable, "-m", "benchmarks.trust", "--only", part, "--rows", str(rows), "--device", device]
    with log.open("w") as out:
        code = sanitize.stopped_after(line, limit, out, dict(os.environ))
    ended = f"stopped after {limit:.0f} s" if code is None else f"exit code {code}"
    made = read(rows)
    told = f"{part}: {len(made)} lines, {time.perf_counter() - start:.0f} s, {ended}"
    if code:
        told += f"; the log ends: {' / '.join(log.read_text(errors='replace').splitlines()[-3:])}"
    return made, told


def read(path: Path) -> list[Row]:
    """The rows that a process wrote; the last line of one that was stopped may be half."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(Row(**json.loads(line)))
        except ValueError:
            break
    return found


def writer(check: str, rows: Path | None) -> running.Emit:
    def emit(op: str, call: str, said: str | None, seconds: float) -> None:
        row = Row(check, op, call, said, round(seconds, 3))
        if rows is not None:
            with rows.open("a") as out:
                out.write(json.dumps(dataclasses.asdict(row)) + "\n")
        if rows is None or said:
            print(f"{check} {seconds:6.2f} s  {op}: {call}: {'not looked at' if said is None else said or 'ok'}", flush=True)

    return emit


def table(rows: Sequence[Row], parts: Iterable[str]) -> list[dict[str, Any]]:
    """A line an op: of each check how many of its calls were right, in how many seconds."""
    found = []
    for op in [op.name for op in registry.ops() if op.kernel is not None]:
        line: dict[str, Any] = {"op": op}
        for part in parts:
            mine = [row for row in rows if row.op == op and row.check == part]
            wrong, seen = sum(bool(row.said) for row in mine), sum(row.said is not None for row in mine)
            seconds = sum(row.seconds for row in mine)
            if mine:
                line[part] = (f"{wrong} FAILED of {seen}" if wrong else f"ok {seen}") + f", {seconds:.0f} s"
                line[part] += f", {len(mine) - seen} not" if seen < len(mine) else ""
        found.append(line)
    return found


def summary(rows: Sequence[Row], told: dict[str, str], parts: Sequence[str]) -> str:
    """What a committed result says of the sanitizers."""
    lines = []
    for part in [part for part in parts if part in SANITIZERS]:
        lines += [told[part]]
        for line in table([row for row in rows if row.check == part], [part]):
            lines.append(f"  {line['op']:20} {line.get(part, 'not reached')}")
        lines += [f"  {row.op}: {row.call}: {row.said}" for row in rows if row.check == part and row.said]
    return "\n".join(lines) + "\n"


def main(
    build: Annotated[bool, typer.Option("--prebuild", help="Build every kernel that is needed, and do nothing else.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All parts, each in a process of its own.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="A part; with --out in a process of its own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the result goes; the sanitizers' text beside it.")] = None,
    jobs: Annotated[int, typer.Option(help="Parts that run at once.")] = 1,
    limit: Annotated[float, typer.Option(help="Multiplies every part's seconds.")] = 1.0,
    rows: Annotated[Path | None, typer.Option(help="Where a part writes its lines.")] = None,
    device: Annotated[str, typer.Option(help="cpu: every op is its reference, which tries this program alone.")] = "cuda",
) -> None:
    if build:
        return prebuild()
    parts = list(LIMITS) if everything else list(only or [])
    if not parts or not set(parts) <= {*PARTS, *SANITIZERS}:
        raise typer.BadParameter(f"wanted --prebuild, --all or --only of {', '.join((*PARTS, *SANITIZERS))}, found {only}")
    if out is None and not set(parts) & set(SANITIZERS):
        for part in parts:
            run_part(part, device, writer(part, rows))
        return
    registry.ops()
    out = out or Path("trust.json")
    folder = out.parent / f"{out.stem}_parts"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    found: list[Row] = []
    told: dict[str, str] = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        limits = {part: limit * LIMITS.get(part, 300) for part in parts}
        longest_first = sorted(parts, key=lambda part: -limits[part])
        started = {pool.submit(part_in_a_process, part, limits[part], folder, device): part for part in longest_first}
        for done in concurrent.futures.as_completed(started):
            part = started[done]
            try:
                made, told[part] = done.result()
            except OSError as error:
                made, told[part] = [], f"{part}: {error}"
            found += made
            print(told[part], flush=True)
            _write(out, found, told, parts)  # after every part: a later one that takes the machine with it loses nothing
    failed, short = [row for row in found if row.said], [part for part in parts if COMPLETE not in told[part]]
    for row in failed[:SHOWN]:
        print(f"FAILED {row.check}  {row.op}: {row.call}: {(row.said or '')[:300]}", flush=True)
    show(table(found, parts), 180)
    ended = f"not complete: {', '.join(short)}" if short else "all parts complete"
    Console(width=180).print(f"{len(found)} checks, {len(failed)} failed; {ended}; {out}")
    raise typer.Exit(bool(failed or short))


def _write(out: Path, rows: Sequence[Row], told: dict[str, str], parts: Sequence[str]) -> None:
    done = [part for part in parts if part in told]
    payload = {"parts": {part: told[part] for part in done}, "table": table(rows, done)}
    listed = [dataclasses.asdict(row) for row in rows if row.said != ""]
    counts = {part: sum(row.check == part and row.said == "" for row in rows) for part in done}
    if torch.cuda.is_available():
        timing.write_json(out, {**payload, "right": counts, "others": listed})
    else:
        summary_of.write(out, {**payload, "right": counts, "others": listed})
    if set(done) & set(SANITIZERS):
        out.with_name(f"{out.stem}_sanitizer.txt").write_text(summary(rows, told, done))


if __name__ == "__main__":
    typer.run(main)
