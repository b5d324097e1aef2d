"""What is told while kernels build: one event a step, and a line on a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Literal

from inductor_ext.jit.spec import JitSpec

State = Literal["loaded", "building", "built", "failed"]


@dataclasses.dataclass(frozen=True)
class BuildEvent:
    """One step of ``prepare`` or ``prebuild``. ``done`` of ``total`` are finished, ``seconds`` went into this one."""

    spec: JitSpec
    state: State
    done: int
    total: int
    seconds: float = 0.0
    error: Exception | None = None


Listener = Callable[[BuildEvent], None]


class Counter:
    """Turns steps of several threads into events with a running count, one at a time."""

    def __init__(self, total: int, *listeners: Listener | None) -> None:
        self.total = total
        self.done = 0
        self._listeners = [listener for listener in listeners if listener]
        self._lock = threading.Lock()

    def step(self, spec: JitSpec, state: State, seconds: float = 0.0, error: Exception | None = None) -> None:
        with self._lock:
            self.done += state != "building"
            event = BuildEvent(spec, state, self.done, self.total, seconds, error)
            for listener in self._listeners:
                listener(event)


@contextlib.contextmanager
def terminal_line(total: int, *, show: bool) -> Iterator[Listener | None]:
    """A listener that draws ``Building kernels 3/7 …`` on stderr and clears it at the end; None off a terminal."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("Building kernels"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        active: dict[JitSpec, None] = {}

        def listen(event: BuildEvent) -> None:
            if event.state == "building":
                active[event.spec] = None
            else:
                active.pop(event.spec, None)
            bar.update(task, completed=event.done, description=", ".join(spec.name for spec in active))

        yield listen
