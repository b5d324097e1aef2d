"""A run: the sides' processes, asked in turn, and what they answered as one dictionary.

Every side stays alive with its CUDA graph captured until all are measured, and the rounds go over the sides in turn: a GPU
slows down as it warms up, and the side that is measured last must not pay for it. All sides' weights are on the GPU at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import inductor_ext
from inductor_ext import demo
from inductor_ext.bench import breakdown, floor, summary
from inductor_ext.bench.channel import Channel
from inductor_ext.bench.families import ModelShape
from inductor_ext.bench.library import BenchError, import_transformers
from inductor_ext.bench.sides import SIDES, Job, Side
from inductor_ext.bench.workload import Workload
from inductor_ext.report.html import versions

Stage = Callable[[str], contextlib.AbstractContextManager[Any]]
LOG_LINES = 15


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure. ``attention`` is the implementation of this backend's sides, ``others`` that of the others."""

    name: str
    shape: ModelShape
    workload: Workload
    sides: Sequence[Side]
    fp8: str = "row"
    device: str = "cpu"
    attention: str = "sdpa"
    others: str = "sdpa"
    replays: int = 30
    rounds: int = 3
    cosine_inputs: int = 8
    together: bool = False
    limit_s: float | None = None  # for a side to become ready
    coordinate_descent: bool = True  # of Inductor's Triton kernels, as torchao's configurations switch it on
    warm: bool = True  # build our kernels beforehand, so that compile seconds are those of a warm kernel cache

    def job(self, side: Side, folder: Path, reference: bool = False) -> Job:
        attention = self.attention if side.backend == "inductor_ext" else self.others
        common = (self.shape, self.workload, self.fp8, self.device)
        return Job(side, *common, str(folder), attention, self.cosine_inputs, reference, self.coordinate_descent)

    @property
    def how_timed(self) -> str:
        what = "CUDA-graph replays" if self.device == "cuda" else "wall-clock times of a call"
        return f"median of {self.rounds} rounds in turn, each the median of {self.replays} {what}"


class Process:
    """The process of one side: its channel, its log, and what it has told. ``error`` once it has failed."""

    def __init__(self, job: Job, threads: int | None) -> None:
        folder = Path(job.folder)
        folder.mkdir()
        self.side = job.side
        self.log = folder / "log"
        self.ready: dict[str, Any] = {}
        self.rounds: list[float] = []
        self.kernels: list[Any] = []
        self.embeddings = ""
        self.error = ""
        self.started = time.monotonic()
        here, there = socket.socketpair()
        os.set_inheritable(there.fileno(), True)
        command = [sys.executable, "-m", "inductor_ext.bench.worker", str(there.fileno()), job.to_json()]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=_environment(folder, threads), pass_fds=[there.fileno()], stdout=log, stderr=subprocess.STDOUT
            )
        there.close()
        self.channel = Channel(here)

    def receive(self, limit_s: float | None = None) -> dict[str, Any]:
        """The next answer; empty, with ``error`` set, when the process has ended instead or took longer than its limit."""
        try:
            answer = self.channel.receive(limit_s and self.started + limit_s - time.monotonic())
        except TimeoutError:
            self.error = f"the process of {self.side.name!r} was not ready after {limit_s:g} s"
            self.process.kill()
            return {}
        if answer is None:
            code = self.process.wait()
            tail = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            self.error = "\n".join([f"the process of {self.side.name!r} ended with {code}; its last lines:", *tail])
        return answer or {}

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        if self.error:
            return {}
        with contextlib.suppress(OSError):  # it is gone: receive says why
            self.channel.send(ask=what, **arguments)
        return self.receive()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            self.channel.close()


def _environment(folder: Path, threads: int | None) -> dict[str, str]:
    """Empty caches of Inductor and Triton, nothing from the network, this package wherever the parent has it from."""
    root = str(Path(inductor_ext.__file__).parents[1])
    found = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "HF_HUB_OFFLINE": "1",
        "INDUCTOR_EXT_PROGRESS": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
    }
    if threads:
        found["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
    return found


@dataclasses.dataclass(frozen=True)
class Begun:
    """A plan whose sides have compiled, or failed, and wait to be asked."""

    plan: Plan
    scratch: Path
    sides: list[Process]

    def measure(self, stage: Stage) -> dict[str, Any]:
        """Time the sides in turn and compare them; the result of the run."""
        plan, alive = self.plan, [side for side in self.sides if not side.error]
        with stage(f"Timing {len(alive)} sides in turn"):
            for _ in range(plan.rounds):
                for side in alive:
                    if times := side.ask("time", replays=plan.replays).get("ms"):
                        side.rounds.append(statistics.median(times))
        with stage("Profiling one step of each, comparing embeddings"):
            for side in alive:
                side.kernels = side.ask("breakdown").get("kernels", [])
                if plan.cosine_inputs:
                    side.embeddings = side.ask("embed").get("path", "")
            cosines = _cosines(self.scratch, {side.side.name: side.embeddings for side in self.sides})
        return _result(plan, self.sides, cosines)


def run(plan: Plan, stage: Stage = contextlib.nullcontext) -> dict[str, Any]:
    """Compile, measure and compare the sides of ``plan``; ``stage(title)`` is entered around each step."""
    with begun(plan, stage) as sides:
        return sides.measure(stage)


@contextlib.contextmanager
def begun(plan: Plan, stage: Stage, threads: int | None = None) -> Iterator[Begun]:
    """The sides, each compiled or failed, with so many threads of Inductor's; their processes are stopped afterwards."""
    import_transformers()  # its absence is said here, not in a log
    found: list[Process] = []
    if plan.together:
        threads = threads or max(1, (os.cpu_count() or 1) // len(plan.sides))
    with tempfile.TemporaryDirectory(prefix="inductor_ext-bench-") as folder:
        scratch = Path(folder)

        def start(job: Job) -> Process:
            found.append(Process(job, threads))
            return found[-1]

        try:
            if plan.warm and plan.device == "cuda" and not plan.together:
                for index, side in enumerate(side for side in plan.sides if side.backend == "inductor_ext"):
                    with stage(f"Building the kernels of {side.name} (two layers)"):
                        start(_small(plan, side, scratch / f"warm{index}")).receive()
                        found.pop().stop()
            jobs = [plan.job(side, scratch / str(index), index == 0) for index, side in enumerate(plan.sides)]
            if plan.together:
                with stage(f"Compiling {len(jobs)} sides together"):
                    for process in [start(job) for job in jobs]:
                        process.ready = process.receive(plan.limit_s)
            else:
                for job in jobs:
                    with stage(f"{'Compiling' if job.side.backend != 'eager' else 'Building'} {job.side.name}"):
                        process = start(job)
                        process.ready = process.receive(plan.limit_s)
            yield Begun(plan, scratch, found)
        finally:
            for process in found:
                process.stop()


def _small(plan: Plan, side: Side, folder: Path) -> Job:
    """A side with two layers of the model, which hold every kernel that more layers do."""
    shape = dataclasses.replace(plan.shape, layers=min(2, plan.shape.layers))
    return dataclasses.replace(plan, shape=shape, cosine_inputs=0).job(side, folder)


def _cosines(scratch: Path, embeddings: Mapping[str, str]) -> dict[str, dict[str, float] | None]:
    """Of each side, over the texts: mean and least cosine of an embedding to that of the bf16 model, run eagerly.

    ``less_stock`` is the mean of the differences to stock's cosine of the same text, ``standard_error`` that mean's: texts
    differ from each other by more than sides do.
    """
    reference = scratch / "0" / "reference.pt"
    if not reference.exists():
        return dict.fromkeys(embeddings)
    wanted = torch.load(reference).double()
    of = {
        name: torch.nn.functional.cosine_similarity(torch.load(path).double(), wanted, dim=1)
        for name, path in embeddings.items()
        if path
    }
    stock = of.get(SIDES["stock"].name)
    found: dict[str, dict[str, float] | None] = dict.fromkeys(embeddings)
    for name, cosines in of.items():
        found[name] = row = {"inputs": len(cosines), "mean": float(cosines.mean()), "min": float(cosines.min())}
        if stock is not None and cosines is not stock and len(cosines) > 1:
            less = cosines - stock
            row["less_stock"] = float(less.mean())
            row["standard_error"] = float(less.std() / math.sqrt(len(less)))
    return found


def _result(plan: Plan, processes: Sequence[Process], cosines: dict[str, Any]) -> dict[str, Any]:
    lower = floor.floor_us(plan.shape, plan.workload, plan.fp8)
    sides = [_side(plan, process, cosines[process.side.name]) for process in processes]
    stock = next((side["step_ms"] for side in sides if side["name"] == SIDES["stock"].name), None)
    for side in sides:
        side["of_stock"] = round(stock / side["step_ms"], 4) if stock and side["step_ms"] else None
    quantisation = next((side["quantisation"] for side in sides if side["quantisation"]), plan.fp8)
    return {
        "environment": environment(plan.device),
        "what": f"{plan.name} shape, random weights, {plan.shape.layers} layers; {plan.workload}",
        "quantisation": quantisation,
        "model": {"name": plan.name, **dataclasses.asdict(plan.shape)},
        "workload": plan.workload.to_dict(),
        "fp8": plan.fp8,
        "device": plan.device,
        "attention": {"ours": plan.attention, "others": plan.others},
        "how_timed": plan.how_timed,
        "compiled_together": plan.together,
        "coordinate_descent": plan.coordinate_descent,
        "floor": {
            "rates": dataclasses.asdict(floor.Rates()),
            "us": {name: round(us, 1) for name, us in lower.items()},
            "ms": round(sum(lower.values()) / 1e3, 4),
        },
        "sides": sides,
    }


def _side(plan: Plan, process: Process, cosine: dict[str, float] | None) -> dict[str, Any]:
    ms = statistics.median(process.rounds) if process.rounds else None
    parts = breakdown.classify(process.kernels, ms * 1e3) if ms else {}
    return {
        "name": process.side.name,
        "backend": process.side.backend,
        "mode": process.side.mode,
        "rules": dict(process.side.rules),
        "step_ms": ms and round(ms, 4),
        "rounds_ms": [round(one, 4) for one in process.rounds],
        "items_per_s": ms and round(plan.workload.items / ms * 1e3, 1),
        "tokens_per_s": ms and round(plan.workload.tokens / ms * 1e3),
        "compile_s": process.ready.get("compile_s"),
        "graph_breaks": process.ready.get("graph_breaks"),
        "rewrites": process.ready.get("rewrites", {}),
        "quantisation": process.ready.get("quantisation", ""),
        "cosine_to_bf16": cosine,
        "breakdown": breakdown.to_dict(parts),
        "kernels": [[name, count, round(us, 1)] for name, count, us in sorted(process.kernels, key=lambda k: -k[2])[:40]],
        "error": process.error,
    }


def environment(device: str) -> dict[str, str]:
    """What the run was made with, as the results in benchmarks/results say it."""
    transformers = import_transformers()
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": summary.command_line(["inductor-ext", *sys.argv[1:]]),
        **versions(),
        "transformers": transformers.__version__,
    }
    with contextlib.suppress(ImportError), demo.quiet("torchao", "torch.utils._pytree"):
        import torchao

        found["torchao"] = torchao.__version__
    if device == "cuda":
        found["driver"] = _driver()
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def rules_that_fire(plan: Plan) -> list[str]:
    """Names of the rules that rewrite something in two layers of the model: what an ablation has to take apart."""
    side = next(side for side in plan.sides if side.backend == "inductor_ext")
    with tempfile.TemporaryDirectory(prefix="inductor_ext-bench-") as scratch:
        process = Process(_small(plan, side, Path(scratch, "scout")), None)
        try:
            process.ready = process.receive()
        finally:
            process.stop()
    if process.error:
        raise BenchError(process.error)
    return [name for name, count in process.ready["rewrites"].items() if count]
