"""A pytest plugin that writes down each test's outcome as soon as it is known: a run that is stopped loses none.

    pytest -p tests.support.outcomes --outcomes FILE
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest


@dataclasses.dataclass(frozen=True)
class Outcome:
    """``said`` is why it was skipped or what failed; ``seconds`` is set-up, call and teardown together."""

    test: str
    outcome: str
    seconds: float
    said: str = ""


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path, self.phases = path, dict[str, list[pytest.TestReport]]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        phases = self.phases.setdefault(report.nodeid, [])
        phases.append(report)
        if report.when == "teardown":
            del self.phases[report.nodeid]
            told = next((each for each in phases if each.failed), None) or next((each for each in phases if each.skipped), None)
            outcome = "failed" if told and told.failed else "skipped" if told else "passed"
            made = Outcome(report.nodeid, outcome, round(sum(each.duration for each in phases), 3), _said(told))
            with self.path.open("a") as out:
                out.write(json.dumps(dataclasses.asdict(made)) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            with self.path.open("a") as out:
                out.write(json.dumps(dataclasses.asdict(Outcome(report.nodeid, "failed", 0.0, _said(report)))) + "\n")


def _said(report: Any) -> str:
    if report is None:
        return ""
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip()


def read(path: Path) -> list[Outcome]:
    """What was written so far; the last line of a run that was stopped may be half."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(Outcome(**json.loads(line)))
        except ValueError:
            break
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file for one line of JSON a test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):  # the workers of pytest-xdist report to the first process
        config.pluginmanager.register(_Writer(path))
