"""The demo, small, and the arithmetic of its FP8 linear layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from inductor_ext import demo
from inductor_ext.cli import app


def test_fp8_linear_is_torchaos_arithmetic() -> None:
    """amax / 448 is taken in bf16; both roads of the product agree but for the order of its sums."""
    linear = torch.nn.Linear(64, 32).bfloat16().requires_grad_(False)
    x = torch.randn(2, 3, 64).bfloat16()
    layer = demo.Fp8Linear(linear)
    scale = (x.abs().amax(-1, keepdim=True) / 448.0).float()
    q = (x.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    assert torch.equal(demo.quantise_rows(x)[0].view(torch.uint8), q.view(torch.uint8))
    layer.scaled_mm = False
    wanted = (q.float() * scale) @ (layer.weight.float() * layer.scale).t()
    torch.testing.assert_close(layer(x), wanted.bfloat16() + linear.bias, rtol=0, atol=0)
    if demo.scaled_mm_works(x.device):
        layer.scaled_mm = True
        torch.testing.assert_close(layer(x), wanted.bfloat16() + linear.bias, rtol=2e-2, atol=2e-2)
    assert float((layer(x) - linear(x)).norm() / linear(x).norm()) < 0.1


def test_distance() -> None:
    a = torch.tensor([3.0, 4.0])
    assert demo.distance(a, a) == demo.Distance(0.0, pytest.approx(1.0), 0.0)
    assert demo.distance(2 * a, a) == demo.Distance(4.0, pytest.approx(1.0), pytest.approx(1.0))


def test_timed_takes_turns() -> None:
    order: list[str] = []
    how, times = demo.timed({name: lambda name=name: order.append(name) for name in "ab"}, "cpu", rounds=2)
    assert order == list("ababab") and set(times) == {"a", "b"} and "2 wall-clock times" in how


def test_unknown_device() -> None:
    result = CliRunner().invoke(app, ["demo", "--device", "tpu"])
    assert result.exit_code == 1 and "--device: wanted cpu" in result.stderr


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    report, data = tmp_path / "demo.html", tmp_path / "demo.json"
    words = ["demo", "--device", "cpu", "--layers", "1", "--html", str(report), "--json", str(data)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads(data.read_text())
    assert found["ok"] and found["verify"]["ok"]
    assert found["counts"]["quantize_once"] == 3  # q, k and v share one quantisation; gate and up another
    assert found["counts"]["fp8_quantize"] >= 1
    assert all(check["differing"] == 0 for check in found["verify"]["checks"] if check["exact"])
    assert found["outputs"]["inductor_ext to stock"]["cosine"] > 0.99
    assert "no speed-up is to be" in result.stdout and "quantize_once" in result.stdout
    page = report.read_text(encoding="utf-8")
    assert "Each rewrite against what it replaced" in page and "Times" in page
