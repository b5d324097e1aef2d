"""Four host threads on four streams, each calling a mix of all ops on operands of its own; all bytes are those of one thread.

The first calls in the process are made by all threads at once: kernels load, and are configured, in a race. Then each thread
makes many more in an order of its own, and compares on the device.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.trust import running
from benchmarks.trust.calls import op_named
from benchmarks.trust.operands import Args, Call, Maker

THREADS = 4


class Worker:
    """One thread's operands, and what it found: for each call the number of times that its bytes were others."""

    def __init__(self, number: int, calls: Sequence[Call], device: str) -> None:
        self.calls, self.device = calls, device
        self.order = random.Random(number)
        self.args: list[Args] = [call.make(Maker(device, 100 + number)) for call in calls]
        self.stream = torch.cuda.Stream() if device == "cuda" else None
        self.wrong = torch.zeros(len(calls), dtype=torch.int64, device=device)
        self.cold: dict[int, list[torch.Tensor]] = {}
        self.wanted: list[list[torch.Tensor]] = []
        self.error = ""

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext():
            yield
        if self.stream is not None:
            self.stream.synchronize()

    def once(self, i: int) -> list[torch.Tensor]:
        """A call on copies of its operands, and a copy of what it wrote."""
        op, given = op_named(self.calls[i].op), running.copied(self.args[i])
        outs = running.outputs(op, given)
        running.launch(op, given, outs)
        return [each.clone() for each in running.results(op, given, outs)]

    def first(self) -> None:
        order = list(range(len(self.calls)))
        self.order.shuffle(order)
        with self.on_stream():
            self.cold = {i: self.once(i) for i in order}

    def alone(self) -> None:
        """What one thread makes of these operands; and how the first calls' bytes compare."""
        with self.on_stream():
            self.wanted = [self.once(i) for i in range(len(self.calls))]
            for i, found in self.cold.items():
                self.wrong[i] += sum(int(not torch.equal(f, w)) for f, w in zip(found, self.wanted[i], strict=True))
            self.cold = {}

    def many(self, count: int) -> None:
        with self.on_stream():
            used: dict[int, tuple[Args, list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]] = {}
            for _ in range(count):
                i = self.order.randrange(len(self.calls))
                op = op_named(self.calls[i].op)
                if i not in used:
                    given = running.copied(self.args[i])
                    fresh = [running.bytes_of(x) for x in running.written(op, self.args[i])]
                    restored = list(zip([running.bytes_of(x) for x in running.written(op, given)], fresh, strict=True))
                    used[i] = given, running.outputs(op, given), restored
                given, outs, restored = used[i]
                for there, here in restored:
                    there.copy_(here)
                for out in outs:
                    running.bytes_of(out).fill_(running.POISON)
                running.launch(op, given, outs)
                for f, w in zip(running.results(op, given, outs), self.wanted[i], strict=True):
                    self.wrong[i] += (f != w).any()


def run(calls: Sequence[Call], device: str, times: int, emit: running.Emit) -> None:
    """``times`` calls in each thread, after one of each; a line for each op."""
    start, fallbacks = time.perf_counter(), running.Fallbacks()
    steady = [call for call in calls if call.compared]
    workers = [Worker(number, steady, device) for number in range(THREADS)]
    if device == "cuda":
        torch.cuda.synchronize()
    _at_once(workers, lambda worker: worker.first())
    for worker in workers:
        if not worker.error:
            _guarded(worker, lambda worker: worker.alone())
    _at_once(workers, lambda worker: worker.many(times))
    said = "; ".join(filter(None, [fallbacks.taken(), *(worker.error for worker in workers)]))
    seconds = (time.perf_counter() - start) / len({call.op for call in steady})
    for op in dict.fromkeys(call.op for call in steady):
        found = [
            f"{call.what}: other bytes in {int(worker.wrong[i])} calls of thread {number}"
            for number, worker in enumerate(workers)
            for i, call in enumerate(steady)
            if not worker.error and call.op == op and int(worker.wrong[i])
        ]
        emit(op, f"{THREADS} threads, {times} calls each", said or "; ".join(found), seconds)


def _at_once(workers: Sequence[Worker], go: Callable[[Worker], Any]) -> None:
    barrier = threading.Barrier(len(workers))

    def body(worker: Worker) -> None:
        barrier.wait()
        if not worker.error:
            _guarded(worker, go)

    threads = [threading.Thread(target=body, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _guarded(worker: Worker, go: Callable[[Worker], Any]) -> None:
    try:
        go(worker)
    except Exception as error:
        worker.error = f"{type(error).__name__}: {str(error)[:400]}"
