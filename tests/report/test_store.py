"""Reports in the keys that Inductor's caches keep: replayed when they are what was kept, else a warning; never an exception."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._dynamo.utils import counters

from inductor_ext.report import store
from inductor_ext.report.events import GraphReport, Refusal, Rewrite

KERNEL = {"name": "a", "source": "a.cuh", "exports": [["run", "f"]], "arch": "sm_90a", "flags": []}


@pytest.fixture(autouse=True)
def _nothing_counted() -> Iterator[None]:
    """As in a process that has compiled nothing."""
    kept = counters["inductor"].copy()
    counters["inductor"].clear()
    yield
    counters["inductor"].update(kept)


def report() -> GraphReport:
    rewrites = [Rewrite("rule", "node", "line", "kernel")]
    return GraphReport("graph 0", rewrites, [Refusal("rule", "node", "line", "why", "this", "that")], kernels=[KERNEL])


def hit(change: Counter[str]) -> list[GraphReport]:
    """What a hit in Inductor's cache replays: the change of the counters, as it comes out of a file."""
    before = store.snapshot()
    counters["inductor"] += pickle.loads(pickle.dumps(change))
    return [report for _, report in store.replayed(before)]


def published() -> Counter[str]:
    """How the counters change while a graph is compiled, in a process of its own."""
    store.publish(report())
    change = counters["inductor"].copy()
    counters["inductor"].clear()
    return change


def test_a_report_is_replayed_as_it_was() -> None:
    (found,) = hit(published())
    assert found.cached and {**found.to_dict(), "cached": False} == report().to_dict()


def test_two_graphs_with_one_report_are_two() -> None:
    change = published()
    assert len(hit(change + change)) == 2


def test_a_key_is_its_text_to_everybody_else() -> None:
    (key,) = (key for key in published() if key.startswith(store._PREFIX))
    plain = str(key)
    assert type(plain) is str and len(plain) < 60
    assert key == plain and {plain: 1}[key] == 1 and f"{key}" == plain and json.dumps([key]) == f'["{plain}"]'
    assert copy.deepcopy(key).packed == key.packed  # type: ignore[attr-defined]


def test_a_key_without_its_report_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "inductor_ext"):
        assert hit(Counter({f"{store._PREFIX}0123": 1})) == []
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("shape", ["empty", "cut", "edited", "no_zip", "deep"])
def test_a_report_of_any_shape_is_a_warning(shape: str, caplog: pytest.LogCaptureFixture) -> None:
    text = json.dumps(report().to_dict(), sort_keys=True).encode()
    if shape == "deep":
        text = b"[" * 1_000_000
    packed = zlib.compress(text.replace(b"kernel", b"planted") if shape == "edited" else text)
    packed = {"empty": b"", "cut": packed[:-5], "no_zip": text}.get(shape, packed)
    with caplog.at_level(logging.WARNING, "inductor_ext"):
        assert hit(Counter({store._key(store._PREFIX + store._digest(text), packed): 1})) == []
    assert "cannot be read" in caplog.text


def test_a_report_that_grows_past_the_limit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    change = published()
    monkeypatch.setattr(store, "_LIMIT", 100)
    with caplog.at_level(logging.WARNING, "inductor_ext"):
        assert hit(change) == []
    assert "more than 100 bytes" in caplog.text


CHANGES = ({"rewrites": [{}]}, {"rewrites": 3}, {"new": 1}, {"kernels": [{"name": 1}]}, {"kernels": [[]]})


@pytest.mark.parametrize("change", CHANGES)
def test_a_report_of_another_version_is_a_warning(change: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    """Whole, under its own digest, but with fields that this version does not know."""
    text = json.dumps({**report().to_dict(), **change}, sort_keys=True).encode()
    with caplog.at_level(logging.WARNING, "inductor_ext"):
        assert hit(Counter({store._key(store._PREFIX + store._digest(text), zlib.compress(text)): 1})) == []
    assert "cannot be read" in caplog.text


ELSEWHERE = """
import sys, torch
E4 = torch.float8_e4m3fn
def linear(x, w, sw):
    sx = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
    return torch._scaled_mm((x.float() / sx).clamp(-448, 448).to(E4), w.t(), scale_a=sx, scale_b=sw, out_dtype=x.dtype)
args = torch.ones(64, 256, dtype=torch.bfloat16), torch.ones(512, 256).to(E4), torch.full((1, 512), 0.1)
step, path = sys.argv[1:]
if step == "load":
    torch.compiler.load_cache_artifacts(open(path, "rb").read())
import inductor_ext
found = inductor_ext.backend(rules={"scaled_mm": "always"}, strict=True)
print(float(torch.compile(linear, backend=found)(*args)[0, 0]))
if step == "save":
    open(path, "wb").write(torch.compiler.save_cache_artifacts()[0])
from torch._dynamo.utils import counters
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["inductor_ext.scaled_mm"])
"""


@pytest.mark.slow
def test_a_report_travels_with_saved_artifacts(tmp_path: Path) -> None:
    """To a machine with no cache of its own: ``strict`` is content there, and the rules have not run."""
    said = []
    for step in ("save", "load"):
        folder = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / step)}
        command = [sys.executable, "-c", ELSEWHERE, step, str(tmp_path / "artifacts")]
        ran = subprocess.run(command, env={**os.environ, **folder}, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        assert "cannot be read" not in ran.stderr
        said.append(ran.stdout.split())
    (value, _, counted), (again, hits, replayed) = said
    assert value == again and counted == replayed == "1" and hits == "1"
