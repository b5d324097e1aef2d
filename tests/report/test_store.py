"""Reports on disk: replayed when they are what was written, else a warning; never an exception, never a wait."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from torch._dynamo.utils import counters

from inductor_ext.report import store
from inductor_ext.report.events import GraphReport, Refusal, Rewrite

KERNEL = {"name": "a", "source": "a.cuh", "exports": [["run", "f"]], "arch": "sm_90a", "flags": []}


def report() -> GraphReport:
    rewrites = [Rewrite("rule", "node", "line", "kernel")]
    return GraphReport("graph 0", rewrites, [Refusal("rule", "node", "line", "why", "this", "that")], kernels=[KERNEL])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "inductor_ext" / "reports"


def published() -> list[GraphReport]:
    """What a hit in Inductor's cache would replay of one report."""
    before = store.snapshot()
    store.publish(report())
    return [report for _, report in store.replayed(before)]


def test_a_report_is_replayed_as_it_was(folder: Path) -> None:
    (found,) = published()
    assert found.cached and {**found.to_dict(), "cached": False} == report().to_dict()
    assert folder.stat().st_mode & 0o777 == 0o700


SHAPES = ("gone", "empty", "other", "edited", "deep", "binary", "fifo", "link", "folder", "huge")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_report_of_any_shape_is_a_warning_and_is_written_again(
    folder: Path, shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = store.snapshot()
    store.publish(report())
    (path,) = folder.iterdir()
    text = path.read_text()
    path.unlink()
    if shape == "fifo":
        os.mkfifo(path)
    elif shape == "link":
        (folder / "elsewhere").write_text(text)
        path.symlink_to("elsewhere")
    elif shape == "folder":
        path.mkdir()
    elif shape == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif shape != "gone":
        edited = text.replace("kernel", "planted")
        contents = {"empty": "", "other": "[1]", "edited": edited, "deep": "[" * 1_000_000}
        path.write_bytes(contents[shape].encode() if shape in contents else bytes(range(256)))
    with caplog.at_level(logging.WARNING, "inductor_ext"):
        assert store.replayed(before) == []
    assert "cannot be read" in caplog.text
    if shape == "folder":
        path.rmdir()
    (found,) = published()
    assert found.rewrites == report().rewrites


CHANGES = ({"rewrites": [{}]}, {"rewrites": 3}, {"new": 1}, {"kernels": [{"name": 1}]}, {"kernels": [[]]})


@pytest.mark.parametrize("change", CHANGES)
def test_a_report_of_another_version_is_a_warning(
    folder: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """Whole, under its own digest, but with fields that this version does not know."""
    text = json.dumps({**report().to_dict(), **change}, sort_keys=True)
    before = store.snapshot()
    digest = store._digest(text)
    folder.mkdir(parents=True)
    (folder / f"{digest}.json").write_text(text)
    counters["inductor"][f"inductor_ext.report.{digest}"] += 1
    with caplog.at_level(logging.WARNING, "inductor_ext"):
        assert store.replayed(before) == []
    assert "cannot be read" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.parent.parent.joinpath("inductor_ext").write_text("a file")
    with caplog.at_level(logging.WARNING, "inductor_ext"):
        store.publish(report())
    assert "is not kept" in caplog.text
