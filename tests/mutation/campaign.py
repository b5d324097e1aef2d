"""Run the tests once to learn which of them each mutant may fail, then each mutant in a process of its own until one does.

It is a pytest plugin: pytest collects the tests, and in place of running them the plugin forks. Torch, the tests and all
mutants are in memory by then, so that a mutant costs the time of its tests and nothing else.

* *Recording*, a process a test file: a mutant can only fail a test in which its guard had something to say, a condition that
  was true, an operand that decided. That is known from one run of the original; all other tests need not run.
* *A mutant* runs the tests that remain, one of each test function first and golden graphs last, until one fails, or its time is
  over. A golden graph says that something changed, not that it is wrong: what only such a test notices is told apart.

Inductor's caches are shared by all these processes, which is safe since a mutant has another `registry.source_digest`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import selectors
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.mutation.sites import Modules, Probe

Send = Callable[[dict[str, Any]], None]

#: Seconds that one test may take, and that a process may take beyond its time before it is ended.
TEST_LIMIT, GRACE = 120, 30


@dataclasses.dataclass
class Result:
    """``status``: killed, golden (killed by a golden graph only), hung (or died), survived, equivalent, or absent:
    nothing to change."""

    status: str
    by: str = ""
    ran: int = 0
    of: int = 0
    seconds: float = 0.0
    digest: str = ""  # of the file that the mutant is in

    def text(self) -> str:
        tests = f"{self.ran} of {self.of} tests that come there"
        return {
            "killed": f"killed by {self.by}",
            "golden": f"killed by a golden graph only: {self.by}",
            "hung": f"hung or died in {self.by}",
            "survived": f"SURVIVED {tests}" if self.of else "SURVIVED: no test comes there",
            "equivalent": f"equivalent: {self.by}",
            "absent": "no call to change",
        }[self.status]


@dataclasses.dataclass
class State:
    """What a campaign knows, and `--out` holds: what every test was seen to reach, and the results so far."""

    recorded: dict[str, Any] = dataclasses.field(default_factory=dict)  # by test file: key, sources, tests, texts
    results: dict[str, Result] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> State:
        found = json.loads(path.read_text(encoding="utf-8"))
        results = {name: Result(**value) for name, value in found["results"].items()}
        return cls(found["recorded"], results)

    def write(self, path: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".part")
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(path)


@dataclasses.dataclass
class Options:
    modules: Modules
    mutants: Sequence[str]  # ids, in the order in which they run
    files: dict[str, str]  # of a mutant: the module it is in, "" for what a rule inserts
    equivalents: dict[str, str]
    state: State
    jobs: int = 1
    stale: bool = False  # take what was recorded of other sources and tests
    budget: float = 60.0
    out: Path | None = None
    shared: tuple[Path, ...] = ()  # folders that all tests depend on
    prepare: Callable[[Campaign], None] = lambda campaign: None  # once the tests are collected
    fresh: Callable[[str], None] = lambda name: None  # in the process: another digest for the caches
    texts: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    changed: Callable[[], int | None] = lambda: None  # how often a mutant of what is inserted changed something
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)


class Campaign:
    """The plugin."""

    def __init__(self, probe: Probe, options: Options) -> None:
        self.probe, self.options = probe, options
        self.failed: str | None = None
        self.message = ""

    # ---- pytest's hooks ---------------------------------------------------------------------------------------------

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.failed is None:
            self.failed = report.when
            self.message = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr))[:500]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("mutate: tests could not be collected")
        self.items = {item.nodeid: item for item in session.items}
        self.options.prepare(self)
        try:
            self._record()
            self._mutate()
        finally:
            if self.options.out:
                self.options.state.write(self.options.out)
        return True

    # ---- recording --------------------------------------------------------------------------------------------------

    def _record(self) -> None:
        options, state = self.options, self.options.state
        sources = {name: options.modules.digest(name) for name in sorted(options.modules.paths)}
        common = [_digest(path) for folder in options.shared for path in sorted(folder.rglob("*.py"))]
        by_file: dict[str, list[Any]] = {}
        for item in self.items.values():
            by_file.setdefault(str(item.path), []).append(item)
        keys = {file: _hash([*common, _digest(Path(file)), *(i.nodeid for i in items)]) for file, items in by_file.items()}
        names = {file: items[0].nodeid.partition("::")[0] for file, items in by_file.items()}
        jobs = []
        for file, items in by_file.items():
            known = state.recorded.get(names[file])
            if known is not None and options.stale:
                items = [item for item in items if item.nodeid not in known["tests"]]
            elif known is None or known["key"] != keys[file] or known["sources"] != sources:
                state.recorded[names[file]] = {"key": keys[file], "sources": sources, "tests": {}, "texts": {}}
            else:
                continue
            if items:
                jobs.append(Job(names[file], lambda send, items=items: self._record_file(items, send), 3600))
        for done, (job, messages) in enumerate(run_all(jobs, options.jobs), 1):
            entry, tests = state.recorded[job.name], [m for m in messages if "seconds" in m]
            shared = {site for message in tests for site in message["setup"]}
            for message in tests:
                message["seen"] = sorted({*message["seen"], *shared})
                if message["failed"] is None:
                    entry["tests"][message["test"]] = [round(message["seconds"], 3), message["golden"], message["seen"]]
            entry["texts"] = next((m["texts"] for m in reversed(messages) if "texts" in m), entry["texts"])
            failed = [f"{message['test']}: {message['failed']}" for message in tests if message["failed"] is not None]
            seconds = sum(message["seconds"] for message in tests)
            options.say(f"recorded {done}/{len(jobs)} {job.name}: {len(tests)} tests in {seconds:.0f} s")
            for name in failed:
                options.say(f"  fails without a mutant, and is left out: {name}")
            if options.out:
                state.write(options.out)
        for entry in state.recorded.values():
            for name, texts in entry["texts"].items():
                options.texts.setdefault(name, set()).update(texts)

    def _record_file(self, items: list[Any], send: Send) -> None:
        self.probe.recording = True
        for index, item in enumerate(items):
            _forget(item.module)
            self.options.fresh(f"recording {item.nodeid}")
            self.probe.seen = set()
            in_setup: set[str] = set()
            began = time.perf_counter()
            original = item.setup

            def setup(original: Any = original, in_setup: set[str] = in_setup) -> None:
                original()
                in_setup.update(self.probe.seen)

            item.setup = setup
            failed = self._run(item, items[index + 1] if index + 1 < len(items) else self._another(item))
            send(
                {
                    "test": item.nodeid,
                    "seconds": time.perf_counter() - began,
                    "failed": self.message if failed is not None else None,
                    "golden": _golden(item),
                    "setup": sorted(in_setup),
                    "seen": sorted(self.probe.seen),
                }
            )
        send({"texts": {name: sorted(texts) for name, texts in self.options.texts.items()}})

    def _another(self, item: Any) -> Any:
        return next((each for each in self.items.values() if each is not item), item)

    def _run(self, item: Any, following: Any) -> str | None:
        """The phase in which the test failed."""
        self.failed = None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return self.failed

    # ---- mutants ----------------------------------------------------------------------------------------------------

    def _mutate(self) -> None:
        options, results = self.options, self.options.state.results
        reaching = self._reaching()
        jobs = []
        for name in options.mutants:
            digest = options.modules.digest(options.files[name]) if options.files[name] else ""
            known = results.get(name)
            tests = ordered(reaching.get(name, []))
            if name in options.equivalents:
                results[name] = Result("equivalent", options.equivalents[name])
            elif known is not None and known.digest == digest and self._stands(known, tests):
                continue
            elif not tests:
                results[name] = Result("survived" if options.files[name] else "absent", digest=digest)
            else:
                results.pop(name, None)
                limit = options.budget + TEST_LIMIT + GRACE
                jobs.append(Job(name, lambda send, name=name, tests=tests: self._mutant(name, tests, send), limit))
        began = time.monotonic()
        for done, (job, messages) in enumerate(run_all(jobs, options.jobs), 1):
            digest = options.modules.digest(options.files[job.name]) if options.files[job.name] else ""
            results[job.name] = dataclasses.replace(_result(messages, len(reaching[job.name])), digest=digest)
            left = (time.monotonic() - began) / done * (len(jobs) - done)
            options.say(f"[{done}/{len(jobs)}, {left / 60:.0f} min left] {job.name}\n    {results[job.name].text()}")
            if options.out and done % 10 == 0:
                options.state.write(options.out)

    def _reaching(self) -> dict[str, list[tuple[float, bool, str]]]:
        """(seconds, golden, test) of every mutant that a test may notice.

        Of a module that has changed since (``stale``), a guard that no test of a file was seen to reach may be new. It is
        taken to be reached where another of its function was.
        """
        options = self.options
        wanted, found = set(options.mutants), {}
        functions: dict[str, list[str]] = {}
        for name in options.mutants:
            functions.setdefault(name.partition(": ")[0], []).append(name)
        for entry in options.state.recorded.values():
            now = {name for name, digest in entry["sources"].items() if options.modules.digests.get(name) == digest}
            known = {site for _, _, seen in entry["tests"].values() for site in seen}
            maybe_new = {name for name in wanted - known if options.files[name] not in {*now, ""}}
            for test, (seconds, golden, seen) in entry["tests"].items():
                if test not in self.items:
                    continue
                near = {name for site in seen for name in functions.get(site.partition(": ")[0], ())}
                for name in wanted.intersection(seen) | (near & maybe_new):
                    found.setdefault(name, []).append((seconds, golden, test))
        return found

    def _stands(self, known: Result, tests: list[str]) -> bool:
        """Whether a result of another run holds: the test that killed is still there, or all of as many have run."""
        if known.status in ("killed", "golden", "hung"):
            return known.by.partition(" (")[0] in self.items
        return known.status == "survived" and known.of == len(tests) == known.ran

    def _mutant(self, name: str, tests: list[str], send: Send) -> None:
        self.options.fresh(name)
        self.probe.active = name
        began = time.monotonic()
        for index, test in enumerate(tests):
            if time.monotonic() - began > self.options.budget:
                break
            item = self.items[test]
            send({"begins": test})
            # Behind the last test too there is one for pytest: the fixtures of the session remain, which all processes share.
            failed = self._run(item, self.items[tests[index + 1]] if index + 1 < len(tests) else self._another(item))
            send({"test": test, "failed": failed, "golden": _golden(item), "took": time.monotonic() - began})
            if failed is not None:
                break
        send({"changed": self.options.changed()})


def _result(messages: list[dict[str, Any]], of: int) -> Result:
    ends = [message for message in messages if "test" in message]
    begins = [message["begins"] for message in messages if "begins" in message]
    seconds = round(ends[-1]["took"], 2) if ends else 0.0
    if ends and ends[-1]["failed"] is not None:
        phase = "" if ends[-1]["failed"] == "call" else f" ({ends[-1]['failed']})"
        return Result("golden" if ends[-1]["golden"] else "killed", ends[-1]["test"] + phase, len(ends), of, seconds)
    if not messages or "changed" not in messages[-1]:
        return Result("hung", begins[-1] if begins else "its beginning", len(begins), of, seconds)
    if messages[-1]["changed"] == 0:
        return Result("absent", "", len(ends), of, seconds)
    return Result("survived", "", len(ends), of, seconds)


def ordered(tests: Iterable[tuple[float, bool, str]]) -> list[str]:
    """Those with golden graphs last, one of every test function first, else the quickest first."""
    rank: Counter[str] = Counter()
    keyed = []
    for seconds, golden, test in sorted(tests):
        function = test.partition("[")[0] + test.partition("[")[2].partition("-")[0]
        keyed.append((golden, rank[function], seconds, test))
        rank[function] += 1
    return [test for *_, test in sorted(keyed)]


def _forget(module: Any) -> None:
    """What one test keeps for the next in a ``functools.cache``: who reaches what would depend on the order."""
    for value in list(vars(module).values()):
        if hasattr(value, "cache_clear") and getattr(value, "__module__", "") == module.__name__:
            value.cache_clear()


def _golden(item: Any) -> bool:
    return "assert_golden" in getattr(getattr(item, "function", None), "__code__", _golden.__code__).co_names


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


# ---- processes -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Job:
    """``work`` sends messages from a process of its own, which is ended after ``limit`` seconds."""

    name: str
    work: Callable[[Send], None]
    limit: float


def run_all(jobs: Sequence[Job], at_once: int) -> Iterable[tuple[Job, list[dict[str, Any]]]]:
    """Every job with what it has sent, as they end."""
    waiting, running = list(reversed(jobs)), {}
    selector = selectors.DefaultSelector()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop()
                pid, pipe = _start(job)
                running[pipe] = (job, pid, time.monotonic() + job.limit, [])
                selector.register(pipe, selectors.EVENT_READ)
            for key, _ in selector.select(timeout=1.0):
                data = os.read(key.fd, 1 << 20)
                running[key.fd][3].append(data)
                if not data:
                    running[key.fd] = (*running[key.fd][:2], 0.0, running[key.fd][3])
            for pipe in [pipe for pipe, (_, _, limit, _) in running.items() if time.monotonic() > limit]:
                selector.unregister(pipe)
                job, pid, _, data = running.pop(pipe)
                _end(pid, pipe)
                lines = b"".join(data).decode().splitlines(keepends=True)
                yield job, [json.loads(line) for line in lines if line.endswith("\n")]
    finally:
        for pipe, (_, pid, _, _) in running.items():
            _end(pid, pipe)


def _start(job: Job) -> tuple[int, int]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        os.setpgid(0, 0)  # so that what it starts ends with it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(reading)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        job.work(lambda message: _write(writing, (json.dumps(message) + "\n").encode()))
        code = 0
    finally:
        os._exit(code)  # without pytest's own end, which would remove the caches of all


def _write(pipe: int, data: bytes) -> None:
    while data:
        data = data[os.write(pipe, data) :]


def _end(pid: int, pipe: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended by itself
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(pipe)
