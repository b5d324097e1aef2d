"""The process of one side: ``python -m inductor_ext.bench.worker FD JOB``.

It builds and quantises the model, compiles it by calling it once, answers "ready", and then does what it is asked:

    time       milliseconds of ``replays`` CUDA-graph replays of one step (on a CPU: of calls)
    breakdown  the kernels of one call: name, launches, µs
    embed      the embeddings of ``cosine_inputs`` random texts, in a file

The step is the compiled model, from its inputs to hidden states; making embeddings of those is no part of it.
"""

from __future__ import annotations

import gc
import importlib
import math
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from inductor_ext import settings
from inductor_ext.bench import families, quantize
from inductor_ext.bench import model as models
from inductor_ext.bench.cache import decode_cache
from inductor_ext.bench.channel import Channel
from inductor_ext.bench.sides import Job
from inductor_ext.bench.workload import Inputs
from inductor_ext.report.events import GraphReport

WARM_REPLAYS = 3
FIRST_SEED = 1  # texts of the timed step; those of "embed" follow


class Worker:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.cuda = job.device == "cuda"
        self.rewrites: dict[str, int] = {}
        self.cache: Inputs = {}
        if job.workload.context:
            made = decode_cache(job.shape, job.workload.items, job.workload.context, job.device)
            self.cache = {"past_key_values": made, "use_cache": True}
        if job.reference and job.cosine_inputs:
            self.save("reference", self._build("sdpa"), "sdpa")
        self.inputs = self.texts(0, job.attention)
        model, self.how = quantize.quantize(lambda: self._build(job.attention), job.fp8, self._run, job.device)
        if not job.coordinate_descent:  # which torchao's configurations switch on
            torch._inductor.config.coordinate_descent_tuning = False
            torch._inductor.config.coordinate_descent_check_all_directions = False
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()  # the bf16 weights: other sides share this GPU
        self.model = self._compile(model)

    def _build(self, attention: str) -> torch.nn.Module:
        return models.build(self.job.shape, self.job.device, attention)

    def _run(self, model: torch.nn.Module) -> torch.Tensor:
        return model(**self.inputs).last_hidden_state

    def _compile(self, model: torch.nn.Module) -> Callable[..., Any]:
        side = self.job.side
        if side.backend == "eager":
            return model
        importlib.import_module("torch._inductor.compile_fx")  # importing Inductor is not compiling
        if side.backend == "inductor":
            return torch.compile(model, mode=side.mode)
        from inductor_ext.backend import compile_graph

        chosen = settings.current(**({"rules": dict(side.rules)} if side.rules else {}))

        def backend(gm: torch.fx.GraphModule, inputs: Any, *, mode: str | None = None, **_: Any) -> Callable[..., Any]:
            return compile_graph(gm, inputs, chosen, mode=mode, on_report=self._count)

        return torch.compile(model, backend=backend, mode=side.mode)

    def _count(self, report: GraphReport) -> None:
        for rule, count in report.counts().items():
            self.rewrites[rule] = self.rewrites.get(rule, 0) + count

    def texts(self, index: int, attention: str) -> Inputs:
        """Random texts as the model's arguments; sdpa gets a mask that the model makes, other attentions get bounds."""
        work, device, shape = self.job.workload, self.job.device, self.job.shape
        if shape.kind.reads != "text":
            return families.inputs(shape, work.items, work.lengths[0], device, FIRST_SEED + index)
        found = work.inputs(shape.vocab, device, FIRST_SEED + index)
        if attention != "sdpa" and work.packed:
            found.update(work.bounds(device), **({"padded": False} if attention == models.OURS else {}))
        return {**found, **self.cache}

    def step(self) -> Any:
        return self.model(**self.inputs)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def start(self) -> dict[str, Any]:
        """The first call, which compiles, and what the parent is told about it."""
        self.synchronize()
        started = time.perf_counter()
        self.step()
        self.synchronize()
        seconds = time.perf_counter() - started
        self.once = self._timer()
        return {
            "compile_s": None if self.job.side.backend == "eager" else round(seconds, 2),
            "rewrites": self.rewrites,
            "quantisation": self.how,
            "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        }

    def _timer(self) -> Callable[[], float]:
        """Milliseconds of one step, each time it is called."""
        if not self.cuda:

            def once() -> float:
                started = time.perf_counter()
                self.step()
                return (time.perf_counter() - started) * 1e3

            return once
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(WARM_REPLAYS):
                self.step()
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.step()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def replay() -> float:
            start.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))

        return replay

    def time(self, replays: int) -> dict[str, Any]:
        for _ in range(WARM_REPLAYS):
            self.once()
        return {"ms": [self.once() for _ in range(replays)]}

    def breakdown(self) -> dict[str, Any]:
        """Kernels of one step as [name, launches, µs]; nothing on a CPU, which launches none.

        Of a call and not of a replay: CUPTI, once started in a process that holds CUDA graphs, is known to trip over them.
        """
        if not self.cuda:
            return {"kernels": []}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.step()
            torch.cuda.synchronize()
        events = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [event for event in events if not event.is_user_annotation]
        return {"kernels": [[event.key, event.count, event.self_device_time_total] for event in kernels]}

    def embed(self) -> dict[str, Any]:
        return {"path": self.save("embeddings", self.model, self.job.attention)}

    def save(self, name: str, model: Callable[..., Any], attention: str) -> str:
        """Embeddings of ``cosine_inputs`` texts as ``name.pt``: fp32, [N, H]."""
        wanted, items = self.job.cosine_inputs, self.job.workload.items
        found = []
        for index in range(math.ceil(wanted / items)):
            hidden = model(**self.texts(index, attention)).last_hidden_state
            found.append(self.job.workload.embeddings(hidden, self.job.shape.kind.causal).float().cpu())
        path = Path(self.job.folder, f"{name}.pt")
        torch.save(torch.cat(found)[:wanted], path)
        return str(path)


def main(fd: int, job: Job) -> None:
    channel = Channel(socket.socket(fileno=fd))
    with torch.no_grad():
        worker = Worker(job)
        channel.send(**worker.start())
        while (asked := channel.receive()) is not None:
            channel.send(**getattr(worker, asked.pop("ask"))(**asked))


if __name__ == "__main__":
    main(int(sys.argv[1]), Job.from_json(sys.argv[2]))
