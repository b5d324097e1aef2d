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
from tests.fuzz.capture import prepared
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


@dataclasses.dataclass
class Found:
    """A fault with the program that shows it, and how to draw that program again."""

    fault: Fault
    program: Program
    drawn: Program
    family: str
    chunk: int
    times: int = 1


@dataclasses.dataclass
class Result:
    graphs: int = 0
    discarded: Counter[str] = dataclasses.field(default_factory=Counter)
    rewrites: Counter[str] = dataclasses.field(default_factory=Counter)
    refusals: Counter[str] = dataclasses.field(default_factory=Counter)
    sampled: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    found: dict[tuple[str, str], Found] = dataclasses.field(default_factory=dict)

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
                    "program": each.program.source(str(each.fault)),
                }
                for each in self.found.values()
            ],
        }


class _Shown(Exception):
    """Raised inside hypothesis, so that it minimises."""


@dataclasses.dataclass
class Campaign:
    """``sample``: one program with a rewrite in so many goes through all of Inductor (0: none). ``known`` are faults to count
    and not to minimise. ``dry``: nothing runs. ``kernels``: the only ones that programs may call. ``on_program`` is called
    after each program.
    """

    seed: int = 0
    sample: int = 0
    device: str = "cpu"
    minimise: bool = True
    dry: bool = False
    kernels: frozenset[jit.JitSpec] | None = None
    known: frozenset[tuple[str, str]] = frozenset()
    on_program: Callable[[str, Program, Outcome], None] | None = None
    result: Result = dataclasses.field(default_factory=Result)

    def run(self, graphs: int, families: Sequence[str] = tuple(FAMILIES)) -> Result:
        """As many programs of each family, a round of `CHUNK` at a time."""
        each = -(-graphs // len(families))
        started, cpu = time.perf_counter(), time.process_time()
        with _one_thread(), prepared():
            for chunk in range(-(-each // CHUNK)):
                for family in families:
                    self._chunk(family, chunk, min(CHUNK, each - chunk * CHUNK))
        self.result.seconds = time.perf_counter() - started
        self.result.cpu_seconds = time.process_time() - cpu
        return self.result

    def _chunk(self, family: str, chunk: int, count: int) -> None:
        minimising: dict[str, Any] = {}

        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
            print_blob=False,
        )
        @seed(f"{self.seed}/{family}/{chunk}")
        @given(programs(family, self.device != "cpu"))
        def test(program: Program) -> None:
            if minimising:
                if time.perf_counter() < minimising["end"] and self._shows(program, minimising["signature"]):
                    minimising["program"] = min(program, minimising["program"], key=_size)
                    raise _Shown
                return
            new = self._one(family, chunk, program)
            if new is not None:
                minimising.update(signature=new.fault.signature, program=program, end=time.perf_counter() + SHRINK_S)
                raise _Shown

        with contextlib.redirect_stdout(None), contextlib.suppress(_Shown, Flaky):
            test()
        if minimising:
            found = self.result.found[minimising["signature"]]
            found.program = reduced(minimising["program"], lambda each: self._shows(each, found.fault.signature), REDUCE)
            again = [fault for fault in self._faults(found.program) if fault.signature == found.fault.signature]
            found.fault = again[0] if again else found.fault

    def _one(self, family: str, chunk: int, program: Program) -> Found | None:
        """Check one program; a fault of a kind not seen so far, if it has one that is to be minimised."""
        outcome = check(program.loaded(), self.device, run=not self.dry, kernels=self.kernels)
        result = self.result
        result.graphs += 1
        result.rewrites.update(outcome.rewrites)
        result.refusals.update(outcome.refusals)
        if outcome.discarded:
            result.discarded[outcome.discarded] += 1
        rewritten = bool(outcome.rewrites) and not program.backward
        if self.sample and rewritten and not self.dry and not outcome.faults and result.graphs % self.sample == 0:
            result.sampled += 1
            outcome.faults += compiled.faults_of(program.loaded(), self.device)
        new = None
        for fault in outcome.faults:
            if fault.signature in result.found:
                result.found[fault.signature].times += 1
                continue
            result.found[fault.signature] = Found(fault, program, program, family, chunk)
            if self.minimise and fault.signature not in self.known and new is None:
                new = result.found[fault.signature]
        if self.on_program:
            self.on_program(family, program, outcome)
        return new

    def _faults(self, program: Program, through_inductor: bool = False) -> list[Fault]:
        try:
            loaded = program.loaded()
        except SyntaxError:
            return []
        if through_inductor:
            return compiled.faults_of(loaded, self.device)
        return check(loaded, self.device, kernels=self.kernels).faults

    def _shows(self, program: Program, signature: tuple[str, str]) -> bool:
        through_inductor = signature[0] == compiled.WHERE
        return any(fault.signature == signature for fault in self._faults(program, through_inductor))


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
