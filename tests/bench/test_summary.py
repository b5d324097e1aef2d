"""What a benchmark writes: the summary, and every sample beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inductor_ext.bench import summary

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
NAMES = st.text().filter(lambda name: name not in ("columns", "rows"))
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=40)


def test_medians_stay_and_samples_go_beside_them(tmp_path: Path) -> None:
    sides = [{"name": "ours", "step_ms": 2.0, "rounds_ms": [1.9, 2.0, 2.2], "kernels": [["k", 1, 2.0]]}]
    result = {"environment": {"gpu": "H200"}, "sides": sides}
    path, samples = summary.write(tmp_path / "made" / "model.json", result)
    assert summary.read(path) == {
        "environment": {"gpu": "H200"}, "sides": [{"name": "ours", "step_ms": 2.0, "rounds": 3, "spread": 0.15}],
    }  # fmt: skip
    assert samples.name == "model.samples.json" and json.loads(samples.read_text()) == result


def test_nothing_left_out_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    summary.write(path, {"rounds_ms": [1.0, 2.0]})
    assert (tmp_path / "model.samples.json").exists()
    assert summary.write(path, {"step_ms": 1.0, "rounds_ms": []}) == [path]
    assert [each.name for each in tmp_path.iterdir()] == ["model.json"], "the samples of an earlier run are not this one's"


def test_a_summary_of_a_summary_is_the_same() -> None:
    result = {"sides": [{"rounds_ms": [3.0, 4.0], "step_ms": 3.123456789}], "rows": [{"all_us": {"a": 1}, "us": 1}]}
    once = summary.summary(result)
    assert once == {"sides": [{"rounds": 2, "spread": 0.2857, "step_ms": 3.12346}], "rows": [{"us": 1}]}
    assert once == summary.summary(once)


def test_a_table_has_a_line_a_row(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"m": m, "choice": "stream", "widths": [m, 2]} for m in range(50)]
    rows[7] |= {"us": 3.5}
    text = summary.text({"what": "a table", "rows": rows})
    assert len(text.splitlines()) == 50 + 5
    assert '"columns": ["m", "choice", "widths", "us"]' in text and '[7, "stream", [7, 2], 3.5]' in text
    (tmp_path / "table.json").write_text(text)
    assert summary.read(tmp_path / "table.json")["rows"] == rows, "what a row lacks it still lacks"


@given(JSON)
def test_what_is_written_is_what_is_read(value: Any) -> None:
    """Every JSON survives; in tables a key whose value is null is one that a row lacks."""
    found = json.loads(summary.text(value))

    def rows(read: Any) -> Any:
        if isinstance(read, dict) and read.keys() == {"columns", "rows"}:
            return [dict(zip(read["columns"], row)) for row in read["rows"]]
        if isinstance(read, dict):
            return {key: rows(each) for key, each in read.items()}
        return [rows(each) for each in read] if isinstance(read, list) else read

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict) and isinstance(b, dict):
            return all(same(a.get(key), b.get(key)) for key in a.keys() | b.keys())
        if isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(map(same, a, b))
        return bool(a == b)

    assert same(rows(found), value)


RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*/*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_committed_result_is_a_summary_as_it_is_written_now(path: Path) -> None:
    assert summary.text(summary.summary(summary.read(path))) == path.read_text()


def test_a_command_names_no_folder_of_this_machine() -> None:
    assert summary.command_line(["inductor-ext", "bench", "--json", "/a/b/suite.json", "--rules", "a=off,b/c=on"]) == (
        "inductor-ext bench --json suite.json --rules a=off,b/c=on"
    )
    assert summary.command_line(["python", "-m", "x", "out/y.json"]) == "python -m x out/y.json"
