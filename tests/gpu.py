"""./run test-gpu: every test that is marked `gpu`, with all the kernels that they need built first, in one parallel batch.

./run test-gpu --out outcome.json           on a machine with a GPU and nvcc; exit status 1 where something failed
./run test-gpu --dry-run                    which kernels that would be; needs neither
./run test-gpu --no-run -k moe_combine      builds them for --arch, where nvcc is and no GPU

Starts from nothing: kernels go to a temporary folder (--kernels keeps them), and caches of this user are not looked at. What a
test builds although no test had said that it is needed is told at the end: that is a `kernels=` to complete
(`tests/support/kernels.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from inductor_ext import jit, settings
from tests.support import outcomes
from tests.support.kernels import wanted_by

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 4
SHOWN = 400  # characters of what a failure said


@dataclasses.dataclass
class Built:
    """What became of the batch."""

    kernels: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    slowest: list[tuple[float, str]] = dataclasses.field(default_factory=list)  # seconds of nvcc on busy cores


def marked_files() -> list[str]:
    """Only these are collected: others may import what a machine with a GPU does not have."""
    found = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    return [str(path.relative_to(ROOT)) for path in found]


def collected(expression: str) -> list[pytest.Item]:
    """The tests, without running them."""

    class Kept:
        items: list[pytest.Item] = []  # noqa: RUF012 (of the class, which is made anew each time)

        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.items.extend(session.items)

    kept, said = Kept(), io.StringIO()
    line = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *(["-k", expression] if expression else [])]
    with contextlib.redirect_stdout(said):
        code = pytest.main([*line, "--continue-on-collection-errors", *marked_files()], plugins=[kept])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        raise SystemExit(f"tests.gpu: nothing was collected:\n{said.getvalue()[-3000:]}")
    return kept.items


def by_cost(items: Iterable[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Tests whose kernels are known at once, and those for which a graph has to be compiled as far as the rules."""
    known, compiled = [], []
    for item in items:
        mark = item.get_closest_marker("gpu")
        make = mark.kwargs.get("kernels") if mark else None
        if make is not None:
            (known if len(inspect.signature(make).parameters) == 1 else compiled).append(item)
    return known, compiled


def kernels_of(items: Iterable[pytest.Item], arch: str) -> list[jit.JitSpec]:
    return list(dict.fromkeys(spec for item in items for spec in wanted_by(item, arch)))


class Batch:
    """Builds into a folder what it is given, `beside` what the caller does meanwhile."""

    def __init__(self, folder: Path, options: settings.Settings) -> None:
        self.folder, self.options, self.built = folder, options, Built()
        self.started = time.perf_counter()

    def build(self, specs: list[jit.JitSpec]) -> None:
        made = jit.prebuild(specs, self.folder, self.options, on_progress=self._step)
        self.built.kernels += len(made)
        self.built.failed |= {spec.describe(): str(error) for spec, error in made.items() if isinstance(error, Exception)}
        self.built.seconds = time.perf_counter() - self.started

    @contextlib.contextmanager
    def beside(self, specs: list[jit.JitSpec]) -> Iterator[None]:
        thread = threading.Thread(target=self.build, args=(specs,))
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def _step(self, event: jit.BuildEvent) -> None:
        if event.state not in ("built", "failed"):
            return
        self.built.slowest = sorted([*self.built.slowest, (round(event.seconds, 1), event.spec.describe())])[-10:]
        if event.state == "failed" or event.done % 20 == 0 or event.done == event.total:
            said = f": {event.spec.describe()} failed" if event.state == "failed" else ""
            print(f"{event.done}/{event.total} kernels, {time.perf_counter() - self.started:.0f} s{said}", flush=True)


def run(folder: Path, kernels: Path, expression: str, processes: int, limit: float) -> tuple[list[outcomes.Outcome], str]:
    """The tests in processes of their own; their outcomes, and what is to be said of the whole."""
    written, log = folder / "outcomes.jsonl", folder / "pytest.log"
    line = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-p", "tests.support.outcomes"]
    line += ["--outcomes", str(written), "--continue-on-collection-errors", *(["-k", expression] if expression else [])]
    line += [f"--numprocesses={processes}", "--dist=worksteal"] if processes > 1 and find_spec("xdist") else []
    own = {"INDUCTOR_EXT_PREBUILT_DIR": str(kernels), "XDG_CACHE_HOME": str(folder / "cache")}
    with log.open("w") as out:
        process = subprocess.Popen([*line, *marked_files()], cwd=ROOT, env={**os.environ, **own}, stdout=out, stderr=out)
        try:
            ended = f"exit code {process.wait(timeout=limit)}"
        except subprocess.TimeoutExpired:
            process.terminate()  # pytest ends its workers
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
            ended = f"stopped after {limit:.0f} s"
    found = outcomes.read(written)
    if not found:
        ended += "; the log ends:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    return found, ended


def late(folder: Path) -> list[str]:
    """Kernels that tests had to build themselves."""
    cache = jit.KernelCache(folder / "cache" / "inductor_ext")
    return sorted(entry.spec.describe() for entry in cache.entries())


def table(found: list[outcomes.Outcome]) -> str:
    """One line a file, then what was skipped and what failed."""
    files: dict[str, list[outcomes.Outcome]] = {}
    for each in found:
        files.setdefault(each.test.partition("::")[0], []).append(each)
    lines = [f"{'file':<52} {'passed':>7} {'failed':>7} {'skipped':>7} {'seconds':>8}"]
    for file, those in sorted(files.items(), key=lambda pair: -sum(each.seconds for each in pair[1])):
        counts = Counter(each.outcome for each in those)
        numbers = "".join(f"{counts[name]:>8}" for name in ("passed", "failed", "skipped"))
        lines.append(f"{file:<52}{numbers} {sum(each.seconds for each in those):8.1f}")
    skipped = Counter(each.said for each in found if each.outcome == "skipped")
    lines += [f"skipped {count:>4}  {reason[:SHOWN]}" for reason, count in skipped.most_common()]
    lines += [f"FAILED {each.test}: {each.said[:SHOWN]}" for each in found if each.outcome == "failed"]
    return "\n".join(lines)


def main(
    out: Annotated[Path | None, typer.Option(help="Where the result goes as JSON.")] = None,
    kernels: Annotated[Path | None, typer.Option(help="Folder for the kernels; those of an earlier run are used.")] = None,
    arch: Annotated[str, typer.Option(help="Target of the kernels; tests run on the GPU's own only.")] = "",
    expression: Annotated[str, typer.Option("-k", help="Only these tests, as pytest selects them.")] = "",
    processes: Annotated[int, typer.Option(help="That run tests, on one GPU.")] = PROCESSES,
    limit: Annotated[float, typer.Option(help="Seconds for everything; what was found until then is kept.")] = 590.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the kernels.")] = False,
    no_run: Annotated[bool, typer.Option("--no-run", help="Build the kernels only.")] = False,
) -> None:
    start = time.perf_counter()
    options = settings.current(progress=False)
    here = jit.current_arch(options)
    target = arch or here or "sm_90a"
    if not (here or dry_run or no_run):
        raise typer.BadParameter("wanted a CUDA GPU, found none; --dry-run and --no-run need none")
    os.chdir(ROOT)
    items = collected(expression)
    known, compiled = by_cost(items)
    if dry_run:
        specs = kernels_of([*known, *compiled], target)
        print("\n".join(spec.describe() for spec in specs))
        print(f"{len(items)} tests, {len(specs)} kernels for {target}: {dict(Counter(spec.source for spec in specs))}")
        return
    with tempfile.TemporaryDirectory(prefix="inductor_ext-gpu-") as name:
        folder, batch = Path(name), Batch(kernels or Path(name) / "kernels", options)
        first = kernels_of(known, target)
        with batch.beside(first):
            rest = [spec for spec in kernels_of(compiled, target) if spec not in set(first)]
        batch.build(rest)
        built = batch.built
        print(f"{built.kernels} kernels in {built.seconds:.0f} s, {len(built.failed)} failed", flush=True)
        found: list[outcomes.Outcome] = []
        told, started = "not run", time.perf_counter()
        if not no_run:
            found, told = run(folder, batch.folder, expression, processes, max(10.0, limit - (started - start)))
        seconds, missed = time.perf_counter() - started, late(folder)
    counts = Counter(each.outcome for each in found)
    print(table(found))
    print("\n".join(f"no test says that it needs {spec}" for spec in missed))
    print("\n".join(f"does not build: {spec}: {error[:SHOWN]}" for spec, error in built.failed.items()))
    print(
        f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped of {len(items)} ({told}); "
        f"{built.kernels} kernels in {built.seconds:.0f} s and {len(missed)} later, tests {seconds:.0f} s, "
        f"all {time.perf_counter() - start:.0f} s"
    )
    complete = no_run or counts["passed"] + counts["skipped"] == len(items)
    if out is not None:
        result: dict[str, Any] = {"arch": target, "environment": environment(), "tests": len(items), **counts, "ended": told}
        result |= {"build": dataclasses.asdict(built), "late": missed, "run_seconds": round(seconds, 1)}
        result["skipped_for"] = dict(Counter(each.said for each in found if each.outcome == "skipped"))
        result["failures"] = {each.test: each.said for each in found if each.outcome == "failed"}
        result["slowest"] = [dataclasses.astuple(each)[:3] for each in sorted(found, key=lambda each: -each.seconds)[:20]]
        out.write_text(json.dumps(result, indent=1) + "\n")
    raise typer.Exit(int(bool(built.failed) or not complete))


def environment() -> dict[str, str]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"python": sys.version.split()[0], "torch": torch.__version__, "gpu": name, "cores": str(os.cpu_count())}


if __name__ == "__main__":
    typer.run(main)
