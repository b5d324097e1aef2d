"""Five hundred programs of a fixed seed, by family, and every program that once failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.campaign import Campaign
from tests.fuzz.capture import prepared
from tests.fuzz.check import check
from tests.fuzz.families import FAMILIES
from tests.fuzz.program import load

GRAPHS = 500
CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.py"))


@pytest.mark.parametrize("family", FAMILIES)
def test_programs_are_what_they_were(family: str) -> None:
    result = Campaign(seed=0).run(GRAPHS // len(FAMILIES), [family])
    assert result.graphs > sum(result.discarded.values())
    assert not result.found, "\n\n".join(found.program.source(str(found.fault)) for found in result.found.values())


def _program(path: Path) -> Any:
    marks = [pytest.mark.xfail(strict=True, reason=load(path).doc)] if load(path).xfail else []
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", map(_program, CORPUS))
def test_program_that_once_failed(path: Path) -> None:
    with prepared():
        outcome = check(load(path))
    assert not outcome.discarded
    assert not outcome.faults, "; ".join(map(str, outcome.faults))
