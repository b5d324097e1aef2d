"""A campaign in processes of its own: a program that takes the process with it (an integer divided by zero) is a line in the
result and not the end of a night's run, and several processes may share the work.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.fuzz.campaign import Campaign, Found, Key, Result, tasks
from tests.fuzz.compare import Fault
from tests.fuzz.program import Program

#: Seconds without a word after which a process is given up: one program takes a tenth of one, a fault's minimisation a minute.
SILENCE_S = 400.0

Task = tuple[str, int, int]


class _Worker:
    """One process, and the round it is at."""

    def __init__(self, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._folder = tempfile.TemporaryDirectory(prefix="inductor_ext-fuzz-")
        self.last = Path(self._folder.name) / "program.pickle"
        self.process = context.Process(target=_work, args=(theirs, options, str(self.last)), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None

    def give(self, task: Task, known: frozenset[Key]) -> None:
        self.task = task
        self.connection.send((task, known))

    def end(self) -> None:
        """Nothing is left to do, or the process no longer answers."""
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(10)
        self.process.terminate()
        self.process.join()
        self._folder.cleanup()


def run(
    options: dict[str, Any], graphs: int, families: Sequence[str], jobs: int, tell: Callable[[str, int, Result], None]
) -> Result:
    """``options`` are `Campaign`'s. ``tell`` gets a family, how many programs it has had since, and all there is so far."""
    pending, total, started = tasks(graphs, families)[::-1], Result(), time.perf_counter()
    workers = [_Worker(options) for _ in range(min(jobs, len(pending)))]
    for worker in workers:
        worker.give(pending.pop(), frozenset())
    while workers:
        ready = wait([worker.connection for worker in workers], timeout=SILENCE_S)
        for index, worker in enumerate(list(workers)):
            if ready and worker.connection not in ready:
                continue
            assert worker.task is not None
            try:
                if not ready:
                    raise EOFError
                message = worker.connection.recv()
            except (EOFError, OSError):
                _died(worker, total)
                workers[index] = worker = _Worker(options)
            else:
                if isinstance(message, int):
                    tell(worker.task[0], message, total)
                    continue
                merge(total, message)
            if pending:
                worker.give(pending.pop(), frozenset(total.found))
            else:
                worker.end()
                worker.task = None
        workers = [worker for worker in workers if worker.task is not None]
    total.seconds = time.perf_counter() - started
    return total


def _died(worker: _Worker, total: Result) -> None:
    """Blame the program that the process was at."""
    assert worker.task is not None
    program: Program = pickle.loads(worker.last.read_bytes())
    worker.process.join(1)
    code = worker.process.exitcode or 0  # None: it has not answered for long
    worker.end()
    fault = Fault("the process", f"ended with {code}", "signal" if code < 0 else "")
    known = total.found.setdefault((*fault.signature, ""), Found(fault, program, program, *worker.task[:2], times=0))
    known.times += 1


def merge(total: Result, more: Result) -> None:
    total.graphs += more.graphs
    total.sampled += more.sampled
    total.cpu_seconds += more.cpu_seconds
    for name in ("discarded", "rewrites", "refusals"):
        counter: Counter[str] = getattr(total, name)
        counter.update(getattr(more, name))
    for signature, found in more.found.items():
        if signature not in total.found:
            total.found[signature] = found
        else:
            total.found[signature].times += found.times


def _work(connection: Connection, options: dict[str, Any], last: str) -> None:
    since = 0

    def before(program: Program) -> None:
        Path(last).write_bytes(pickle.dumps(program))

    def after(*_: Any) -> None:
        nonlocal since
        since += 1
        if since == 10:
            connection.send(since)
            since = 0

    while True:
        task = connection.recv()
        if task is None:
            return
        (family, chunk, count), known = task
        campaign = Campaign(**options, known=known, before=before, on_program=after)
        with campaign.ready():
            campaign.chunk(family, chunk, count)
        connection.send(campaign.result)
