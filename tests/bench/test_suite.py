"""`bench model --suite`, on a CPU: one row a model, and a failure that costs no other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from inductor_ext.bench import model as models
from inductor_ext.bench import suite
from inductor_ext.cli import app
from inductor_ext.errors import SettingError

OPTIONS: dict[str, Any] = {"told": lambda line: None, "stage": contextlib.nullcontext, "replays": 1, "rounds": 1}


def test_names() -> None:
    assert suite.parse("all") == list(suite.DEFAULT)
    assert suite.parse("bert-large, tiny") == ["BERT-large", "tiny"]
    with pytest.raises(SettingError, match="--model: wanted one of"):
        suite.parse("tiny,gpt")


def test_a_model_with_positions_of_its_own_gets_about_as_many_tokens() -> None:
    assert suite.workload(models.MODELS["tiny"], 8, 512).lengths == (512,) * 8
    assert suite.workload(models.MODELS["SigLIP-so400m"], 8, 512).lengths == (729,) * 6
    assert suite.workload(models.MODELS["Whisper-large-encoder"], 1, 64).lengths == (1500,)


@pytest.mark.parametrize("together", [False, True])
def test_a_model_that_fails_costs_no_other(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """17 heads do not share 2 of K and V."""
    pytest.importorskip("transformers")
    broken = dataclasses.replace(models.MODELS["tiny"], heads=17)
    monkeypatch.setitem(models.MODELS, "broken", broken)
    result = suite.run_suite(["broken", "tiny"], 1, 1, 8, cosine_inputs=2, together=together, **OPTIONS)
    failed, good = result["suite"]
    assert failed["of_stock"] is None and failed["error"]
    assert not good["error"] and good["workload"] == "1 × 8" and good["rewrites"]["rms_norm_quantize"] == 2
    assert result["geometric_mean"] == pytest.approx(good["stock_ms"] / good["ours_ms"], rel=1e-3)
    assert good["cosine_to_bf16"]["ours"]["mean"] > 0.99
    table = suite.section(result)
    assert [row[0] for row in table.rows] == ["broken", "tiny"] and table.rows[0][5] == "–"


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "suite.json"
    options = ["--layers", "1", "--batch", "1", "--length", "8", "--replays", "1", "--rounds", "1", "--cosine-inputs", "0"]
    ran = CliRunner().invoke(app, ["bench", "model", "--suite", "tiny", "--device", "cpu", *options, "--json", str(path)])
    assert ran.exit_code == 0, ran.output
    assert "geometric mean" in ran.output and json.loads(path.read_text())["suite"][0]["model"] == "tiny"
    shown = CliRunner().invoke(app, ["bench", "model", "--from", str(path)])
    assert shown.exit_code == 0 and "tiny" in shown.output


@pytest.mark.parametrize("option", [["--pack"], ["--model", "tiny"], ["--ablate"]])
def test_options_of_one_model_are_refused(option: list[str]) -> None:
    ran = CliRunner().invoke(app, ["bench", "model", "--suite", "tiny", *option])
    assert ran.exit_code != 0 and "--suite goes with" in (ran.output + str(ran.exception))
