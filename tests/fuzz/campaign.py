"""Many programs of every family from one seed: counts, faults once a kind, each minimised."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Flaky

from inductor_ext import jit
from tests.fuzz import compiled
from tests.fuzz.capture import FINAL, prepared
from tests.fuzz.check import Outcome, check
from tests.fuzz.compare import Fault
from tests.fuzz.families import FAMILIES
from tests.fuzz.generate import programs
from tests.fuzz.program import Program
from tests.fuzz.reduce import reduced

#: Programs of one hypothesis run. After a fault it only minimises, so runs are short; each has a seed of its own.
CHUNK = 50
#: Seconds for what hypothesis takes back, and compiles for what is left out of the text.
SHRINK_S, REDUCE = 20.0, 150
#: How many faults of one rule and kind are minimised, if what was done to their programs differs: they may be two faults.
EACH = 6

#: A fault's rule and kind, and what had been done to the program it was seen in.
Key = tuple[str, str, str]


@dataclasses.dataclass
class Found:
    """A fault with the program that shows it, and how to draw that program again."""

    fault: Fault
    program: Program
    drawn: Program
    family: str
    chunk: int
    times: int = 1
    compiled: str = ""  # what is to be seen through all of Inductor


@dataclasses.dataclass
class Result:
    graphs: int = 0
    discarded: Counter[str] = dataclasses.field(default_factory=Counter)
    rewrites: Counter[str] = dataclasses.field(default_factory=Counter)
    refusals: Counter[str] = dataclasses.field(default_factory=Counter)
    sampled: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    found: dict[Key, Found] = dataclasses.field(default_factory=dict)

    def minimised(self) -> list[Found]:
        """At most `EACH` of a rule and kind, with the times of all of them."""
        kinds: dict[tuple[str, str], list[Found]] = {}
        for found in self.found.values():
            kinds.setdefault(found.fault.signature, []).append(found)
        for alike in kinds.values():
            alike.sort(key=lambda found: _size(found.program))
            alike[0].times += sum(found.times for found in alike[EACH:])
        return [found for alike in kinds.values() for found in alike[:EACH]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "torch": torch.__version__,
            "graphs": self.graphs,
            "discarded": sum(self.discarded.values()),
            "sampled": self.sampled,
            "seconds": round(self.seconds, 1),
            "cpu_ms_a_graph": round(1e3 * self.cpu_seconds / max(1, self.graphs), 1),
            "rewrites": dict(sorted(self.rewrites.items())),
            "refusals": dict(sorted(self.refusals.items())),
            "faults": [
                {
                    "rule": each.fault.rule,
                    "kind": each.fault.kind,
                    "detail": each.fault.detail,
                    "family": each.family,
                    "chunk": each.chunk,
                    "times": each.times,
                    "through all of Inductor": each.compiled,
                    "program": each.program.source(str(each.fault)),
                }
                for each in self.minimised()
            ],
        }


def tasks(graphs: int, families: Sequence[str]) -> list[tuple[str, int, int]]:
    """(family, round, programs): one hypothesis run each."""
    each = -(-graphs // len(families))
    return [(family, at, min(CHUNK, each - at * CHUNK)) for at in range(-(-each // CHUNK)) for family in families]


class _Shown(Exception):
    """Raised inside hypothesis, so that it minimises."""


@dataclasses.dataclass
class Campaign:
    """``sample``: one program with a rewrite in so many goes through all of Inductor (0: none). ``known`` are faults to count
    and not to minimise. ``dry``: nothing runs. ``kernels``: the only ones that programs may call. ``before`` is
    called before any program runs, ``on_program`` after each that is drawn.
    """

    seed: int = 0
    sample: int = 0
    device: str = "cpu"
    minimise: bool = True
    dry: bool = False
    kernels: frozenset[jit.JitSpec] | None = None
    known: frozenset[Key] = frozenset()
    before: Callable[[Program], None] | None = None
    on_program: Callable[[str, Program, Outcome], None] | None = None
    result: Result = dataclasses.field(default_factory=Result)

    def run(self, graphs: int, families: Sequence[str] = tuple(FAMILIES)) -> Result:
        """As many programs of each family, a round of `CHUNK` at a time."""
        with self.ready():
            for family, chunk, count in tasks(graphs, families):
                self.chunk(family, chunk, count)
        return self.result

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Around any number of `chunk`."""
        started, cpu = time.perf_counter(), time.process_time()
        with _one_thread(), prepared():
            yield
        self.result.seconds += time.perf_counter() - started
        self.result.cpu_seconds += time.process_time() - cpu

    def chunk(self, family: str, chunk: int, count: int) -> None:
        """``count`` programs. Hypothesis ends with a fault: the rest are drawn anew."""
        end, part = self.result.graphs + count, 0
        while self.result.graphs < end and part < count:
            self._part(family, chunk, part, end - self.result.graphs)
            part += 1

    def _part(self, family: str, chunk: int, part: int, count: int) -> None:
        shown: list[Found] = []
        until = 0.0

        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
            print_blob=False,
        )
        @seed(f"{self.seed}/{family}/{chunk}/{part}")
        @given(programs(family, self.device != "cpu"))
        def test(program: Program) -> None:
            nonlocal until
            if not shown:
                shown.extend(self._one(family, chunk, program))
                until = time.perf_counter() + SHRINK_S
            elif time.perf_counter() > until or not self._shows(program, shown[0].fault):
                return  # hypothesis has had its time: what it says next is not asked for
            else:
                shown[0].program = min(program, shown[0].program, key=_size)
            if shown:
                raise _Shown

        with contextlib.suppress(_Shown, Flaky):
            test()
        for found in shown:
            self._make_smaller(found)

    def _make_smaller(self, found: Found) -> None:
        found.program = reduced(found.program, lambda each: self._shows(each, found.fault), REDUCE)
        again = [fault for fault in self._faults(found.program) if fault.signature == found.fault.signature]
        found.fault = again[0] if again else found.fault
        if self.device == "cpu" or found.fault.rule == FINAL:
            through = self._faults(found.program, through_inductor=True)
            found.compiled = "; ".join(map(str, through)) or "as close to eager as stock"
            if found.fault.rule == FINAL and not through:  # Inductor's passes do as much to the graph without our rules
                self.result.found = {key: each for key, each in self.result.found.items() if each is not found}

    def _one(self, family: str, chunk: int, program: Program) -> list[Found]:
        """Check one program; the first of its faults that is to be minimised, if there is one."""
        if self.before:
            self.before(program)
        try:
            outcome = check(program.loaded(), self.device, run=not self.dry, kernels=self.kernels)
        except SyntaxError as error:  # an edit's
            outcome = Outcome(discarded=f"syntax: {error.msg}")
        result = self.result
        result.graphs += 1
        result.rewrites.update(outcome.rewrites)
        result.refusals.update(outcome.refusals)
        if outcome.discarded:
            result.discarded[outcome.discarded] += 1
        rewritten = bool(outcome.rewrites) and not program.backward and not self.dry
        if self.sample and rewritten and not outcome.faults and result.graphs % self.sample == 0:
            result.sampled += 1
            outcome.faults += compiled.faults_of(program.loaded(), self.device)
        new = []
        for fault in outcome.faults:
            key = (*fault.signature, "+".join(sorted(set(program.edits))))
            alike = [each for each in (*result.found, *self.known) if each[:2] == key[:2]]
            if key not in result.found:
                result.found[key] = Found(fault, program, program, family, chunk, times=0)
                if self.minimise and key not in self.known and len(alike) < EACH:
                    new.append(result.found[key])
            result.found[key].times += 1
        if self.on_program:
            self.on_program(family, program, outcome)
        return new[:1]

    def _faults(self, program: Program, through_inductor: bool = False) -> list[Fault]:
        try:
            loaded = program.loaded()
        except SyntaxError:
            return []
        if self.before:
            self.before(program)
        if through_inductor:
            return compiled.faults_of(loaded, self.device)
        return check(loaded, self.device, kernels=self.kernels).faults

    def _shows(self, program: Program, wanted: Fault) -> bool:
        through_inductor = wanted.rule == compiled.WHERE
        return any(fault.signature == wanted.signature for fault in self._faults(program, through_inductor))


def _size(program: Program) -> tuple[int, int]:
    return len(program.edits), len(program.source())


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums do not depend on the machine then, and small tensors are faster."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(kept)
