"""docs/results.md, and the table in README.md, are what their script makes of the committed results."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[2]


def test_the_committed_page_is_what_the_script_makes() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == report.page(), "run `python -m benchmarks.report`"


def test_the_readmes_table_is_what_the_script_makes() -> None:
    text = report.README.read_text(encoding="utf-8")
    assert text == report.with_headline(text), "run `python -m benchmarks.report`"


def test_results_are_named_where_they_are_used_and_those_named_are_there() -> None:
    """A result that no page and no comment names is not worth its bytes."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = [ROOT / name for name in listed.stdout.split("\0") if name and not name.startswith("benchmarks/results/")]
    text = "\n".join(
        path.read_text(errors="ignore") for path in tracked if path.is_file() and path.suffix in (".md", ".py", ".cuh")
    )
    for result in sorted((ROOT / "benchmarks" / "results").glob("*/*")):
        if not result.name.endswith(".samples.json"):
            assert result.name in text, result.name
    for name in set(re.findall(r"benchmarks/results/\w+/\w+\.(?:json|txt|png)", text)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (99.96, "100"), (12.0, "12.0"), (0.78935, "0.789"), (1.99788, "2.00")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_a_grid_has_a_column_for_each_size_and_leaves_holes_empty() -> None:
    rows = [{"shape": "a", "m": 1024, "us": "2"}, {"shape": "b", "m": 16, "us": "3"}, {"shape": "a", "m": 16, "us": "1"}]
    made = report.grid(rows, "shape", "m", lambda row: row["shape"], lambda row: row["us"])
    assert made.splitlines() == ["| shape | 16 | 1,024 |", "| --- | --- | --- |", "| a | 1 | 2 |", "| b | 3 |  |"]
