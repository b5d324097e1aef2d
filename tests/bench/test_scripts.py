"""The scripts of benchmarks/kernels without a GPU: a case of each is made, checked and written; only the times are none.

Tensors for a GPU are made on the CPU, where every op runs its reference, ``torch.compile`` compiles nothing, and a call that
would be timed is made once.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from benchmarks import timing
from benchmarks.kernels import shared
from inductor_ext import registry

ROOT = Path(__file__).parents[2]


class OnCpu(TorchFunctionMode):
    """What asks for CUDA gets the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return args[0] if func is torch.Tensor.cuda else func(*args, **kwargs)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def once(calls: Sequence[Callable[[], Any]], **_: Any) -> float:
        calls[0]()
        return 1e-6

    monkeypatch.setattr(timing, "graph_time", once)
    monkeypatch.setattr(timing, "call_time", lambda call, **_: once([call]))
    monkeypatch.setattr(timing, "copy_time", lambda nbytes: 1e-6)
    monkeypatch.setattr(timing, "sets_for", lambda nbytes, limit=64: 1)
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    registry.ops()
    with OnCpu():
        yield


def first(module: Any) -> list[Any]:
    cases = module.works if hasattr(module, "works") else module.PROBLEMS if hasattr(module, "PROBLEMS") else module.CASES
    return list(cases() if callable(cases) else cases)


#: Script → a case of it, or how to make one.
CASES: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "attention": lambda m: (m.Shape(1, 8),),
    "mlp_chunks": lambda m: ("tiny", 8),
    "moe_combine": lambda m: (16, 8, 64, 128, True),
    "mxfp8_quantize": lambda m: ((4, 64), torch.bfloat16, 0, False),
    "one_scale": lambda m: first(m)[0],
    "qk_norm_rope_store": lambda m: (m.LAYERS[0], 16, m.E4),
    "scaled_mm_act_mul": lambda m: (m.cases.Problem(8, 64, 32, True, True),),
    "scaled_mm_add": lambda m: (m.cases.Problem(8, 64, 32, False, True),),
    "scaled_mm_rope": lambda m: (dataclasses.replace(m.LAYERS[0], heads=(2, 1, 1), k=32), True, 16),
}


SMALLER: dict[str, dict[str, Any]] = {
    "mlp_chunks": {"MODELS": {"tiny": (16, 32)}, "CHUNKS": (1, 3)},
    "qk_norm_rope_store": {"SLOTS": 64},
    "scaled_mm_rope": {"SEQUENCE": 8},
}


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"benchmarks.kernels.{name}")
    for attribute, value in SMALLER.get(name, {}).items():
        monkeypatch.setattr(module, attribute, value)
    if name == "attention":  # compute capability 9.0, where this package's kernel is, and no library
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setattr(module.implementations, "missing", lambda each, _: "" if each.name == "hopper" else "none")
    found = module.measure(*CASES[name](module))
    rows = found if isinstance(found, list) else [found]
    assert json.dumps(rows)
    assert all(any(str(key).endswith("us") for key in row) for row in rows)


def test_producers_of_every_kind_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.kernels import producers

    for name in ("SHAPES", "TENSOR_SHAPES", "ACT_MUL_SHAPES", "ANY_SHAPES", "ANY_ACT_SHAPES"):
        monkeypatch.setattr(producers, name, ((3, 64),))
    monkeypatch.setattr(producers, "CAT_SHAPES", ((3, 128, 64),))
    monkeypatch.setattr(producers, "ROPE_TOKENS", (4,))
    works = list(producers.works())
    assert len(works) == 3 * 4 + 3 + 2 * (7 + 7) + 2 + 4
    for work, rows, columns, (moved, make) in works:
        stock, ours = make()
        assert moved > rows * columns and stock() is not None, work
        ours()
    assert producers.measure(*works[0])["ratio"] == 1.0


def test_products_are_written_a_row_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.kernels import scaled_mm

    few = [scaled_mm.Problem(m, 1024, 2048, row, True) for m in (1, 16) for row in (True, False)]
    monkeypatch.setattr(scaled_mm, "problems", lambda kinds: few)
    rows = scaled_mm.time_grid((), {("cutlass tile", True): lambda *_: None})
    shapes = scaled_mm.by_shape(rows)
    assert [(shape["kind"].split(",")[0], shape["m"]) for shape in shapes] == [("row-wise", [1, 16]), ("tensor-wise", [1, 16])]
    assert ["collectives_us" in shape for shape in shapes] == [True, False]
    assert scaled_mm.summary(rows)[shapes[0]["kind"]]["lowest"] == 1.0
    assert scaled_mm.time_siblings((64, 32), 64, 8, True)["ratio_to_stock"] == 1.0
    assert scaled_mm.accuracy(64, True, False)["stock"] < 1e-2


def test_stores_leave_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.kernels import kv_cache_compiled as stores

    small = {stores.SLOTS: 64, stores.SLOTS // 16: 4}
    for name, (store, shapes, dtype) in stores.FORMS.items():
        shapes = [tuple(small.get(size, size) for size in shape) for shape in shapes]
        monkeypatch.setitem(stores.FORMS, name, (store, shapes, dtype))
    monkeypatch.setattr(stores, "SLOTS", 64)
    for form in stores.FORMS:
        assert stores.run(form, 5)["bytes_equal"], form


def test_grouped_products_are_right_and_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.kernels import mxfp8_grouped_mm as grouped

    monkeypatch.setattr(grouped, "MODELS", {"tiny": (4, 128, 64, 2)})
    monkeypatch.setattr(grouped, "rowwise", grouped.stock)  # which PyTorch has for a GPU alone
    row = grouped.measure(grouped.weights("tiny", "first"), 8)
    assert "WRONG" not in str(grouped.shown(row)) and row["ours_ratio"] == 1.0
    assert grouped.summary([row])["ours_fp8, bound by weights, ratio"] == {"mean": 1.0, "least": 1.0}
    us = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}
    assert grouped.fastest(us) == {"fastest": ["b", "c", "a"], "fastest_us": [1.0, 2.0, 3.0], "all_us": us}


def run(script: Callable[[], None], *options: str) -> Any:
    """A script's command, as `shared.script` makes it."""
    with pytest.MonkeyPatch.context() as patch:
        apps: list[Any] = []
        patch.setattr(typer, "run", apps.append)
        script()
    app = typer.Typer()
    app.command()(apps[0])
    return CliRunner().invoke(app, list(options))


def test_the_command_measures_the_cases_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "environment", lambda: {"gpu": "none"})
    built: list[Any] = []

    def script() -> None:
        cases = [("norm", 1, torch.bfloat16), ("norm", 16, torch.bfloat16), ("act", 16, torch.float32)]
        shared.script(lambda *case: {"case": case[0], "rows": case[1]}, lambda: cases, quick=cases[:1], build=built.extend)

    out = tmp_path / "made" / "rows.json"
    done = run(script, "--only", "norm, 1", "--out", str(out))
    assert done.exit_code == 0 and len(built) == 2, done.output
    columns = {"columns": ["case", "rows"], "rows": [["norm", 1], ["norm", 16]]}
    assert json.loads(out.read_text()) == {"environment": {"gpu": "none"}, "how_timed": timing.HOW, "rows": columns}
    assert run(script, "--quick").output.count("norm") == 1
    assert run(script, "--only", "^act").output.count("norm") == 0


@pytest.mark.parametrize("op", ["scaled_mm_act_mul", "scaled_mm_add", "scaled_mm_rope"])
def test_the_committed_tables_are_made_of_the_committed_results(op: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"benchmarks.kernels.{op}")
    committed = ROOT / "kernels" / op / "table_sm_90a.json"
    folder = tmp_path / op
    folder.mkdir()
    fused = dataclasses.replace(module.FUSED, table=dataclasses.replace(module.FUSED.table, folder=folder))
    fused.write_table(ROOT / "benchmarks" / "results" / "h200" / f"{op}.json")
    assert (folder / committed.name).read_text() == committed.read_text()


SCRIPTS = [path for path in sorted((ROOT / "benchmarks").glob("*/*.py")) if '__name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_is_imported_from_the_root(path: Path) -> None:
    """As ``python -m`` finds it, and without a GPU."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name)
    assert module.__doc__ and (f"-m {name.removesuffix('.__main__')}" in module.__doc__), "says how it is run"
    assert name in sys.modules
