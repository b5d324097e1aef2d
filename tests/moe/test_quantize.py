"""quantize_moe_: which weights it takes, what it says that costs, and what it leaves alone, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext import MXFP8Weight
from inductor_ext.errors import SettingError
from inductor_ext.moe import quantize as quantizing
from tests.support.equal import assert_same_bytes
from tests.support.moe import mixtral, qwen3_moe

NK, KN = "[E, N, K]", "[E, K, N]"


class Experts(torch.nn.Module):
    """No model library's: code of one's own that calls grouped_mm."""

    def __init__(self, k: int = 64, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.w1 = torch.nn.Parameter((torch.randn(4, 32, k) * 0.1).to(dtype))
        self.w2 = torch.nn.Parameter((torch.randn(4, 32, 48) * 0.1).to(dtype))

    def forward(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(torch._grouped_mm(x, self.w1.transpose(-2, -1), offs), self.w2, offs)


def quantised(model: torch.nn.Module, **options: Any) -> Any:
    return inductor_ext.quantize_moe_(model, show=False, **options)


@pytest.mark.parametrize("make", [qwen3_moe, mixtral])
def test_a_hugging_face_model(make: Any) -> None:
    model = make()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    report = quantised(model)
    names = [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")]
    assert [weight.name for weight in report.weights] == names and not report.skipped
    for name, value in model.named_parameters():
        assert isinstance(value, MXFP8Weight) == (name in names)
        assert isinstance(value, torch.nn.Parameter)
        if name not in names:
            assert torch.equal(value, weights[name])
    for row in report.weights:
        before, after = weights[row.name].double(), model.get_parameter(row.name).dequantize().double()
        assert row.error == pytest.approx(float((after - before).norm() / before.norm()))
        assert row.max_error == pytest.approx(float((after - before).abs().max()))
        assert row.max_weight == float(before.abs().max())
        assert 0.01 < row.error < 0.04
        assert row.bytes_before == before.numel() * 2 and row.bytes_after == before.numel() * 33 // 32
    assert 0.01 < report.error < 0.04
    assert report.bytes_after * 64 == report.bytes_before * 33


def test_the_report_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    report = inductor_ext.quantize_moe_(qwen3_moe())
    shown = capsys.readouterr().out
    assert "quantize_moe_: 4 weights to MXFP8, activations bf16, scales rceil; relative error 2." in shown
    assert "model.layers.1.mlp.experts.down_proj" in shown and "largest error" in shown
    assert str(report).splitlines()[0] == shown.splitlines()[0].rstrip()
    assert report.to_dict()["error"] == report.error and len(report.to_dict()["weights"]) == 4


def test_weights_of_one_s_own_are_named() -> None:
    experts = Experts()
    x, offs = torch.randn(9, 64).bfloat16(), torch.tensor([2, 2, 8, 9], dtype=torch.int32)
    plain = experts(x, offs)
    report = quantised(experts)
    assert not report.weights and [each.reason for each in report.skipped] == ["not known to be read by grouped_mm"] * 2
    assert report.skipped[0].wanted == 'an entry in weights={…} that says how it lies, such as {"w1": "[E, N, K]"}'
    assert_same_bytes(experts(x, offs), plain)
    report = quantised(experts, weights={"w1": NK, "w*": KN})
    assert [weight.name for weight in report.weights] == ["w1", "w2"]
    assert experts.w1.shape == (4, 32, 64) and experts.w2.shape == (4, 32, 48)
    assert experts.w2._data.shape == (4, 48, 32), "along K, which is its second dimension"
    found = experts(x, offs)
    assert 0 < float((found - plain).float().norm() / plain.float().norm()) < 0.06


def _with(change: Any) -> Any:
    experts = Experts()
    with torch.no_grad():
        change(experts)
    return experts


SKIPPED = {
    "dtype": (lambda: Experts(dtype=torch.float16), "dtype", "float16"),
    "k": (lambda: Experts(k=40), "K is not a multiple of 32", "K 40 of [4, 32, 40]"),
    "nan": (lambda: _with(lambda e: e.w1[1, 2, 3].fill_(float("nan"))), "not finite", "NaN or infinity"),
    "meta": (lambda: Experts().to("meta"), "device", "meta"),
}


@pytest.mark.parametrize(("make", "reason", "found"), list(SKIPPED.values()), ids=list(SKIPPED))
def test_unsuitable_weights_are_left_alone(make: Any, reason: str, found: str) -> None:
    experts = make()
    report = quantised(experts, weights={"w1": NK})
    (skipped,) = [each for each in report.skipped if each.name == "w1"]
    assert (skipped.reason, skipped.found) == (reason, found) and skipped.wanted
    assert not isinstance(experts.w1, MXFP8Weight) and "Left alone" in str(report)


def test_twice_is_once() -> None:
    model = qwen3_moe()
    quantised(model)
    report = quantised(model)
    assert not report.weights and {each.reason for each in report.skipped} == {"already quantised"}


def test_a_model_that_does_not_call_grouped_mm_is_left_alone() -> None:
    model = qwen3_moe(experts="eager")
    report = quantised(model)
    assert not report.weights and report.skipped[0].found == "'eager'"
    assert report.skipped[0].wanted.startswith('experts_implementation="grouped_mm"')


def test_shared_weights_stay_shared() -> None:
    both = torch.nn.ModuleList([Experts(), Experts()])
    both[1].w1 = both[0].w1
    report = quantised(both, weights={"*.w1": NK})
    assert len(report.weights) == 1 and both[0].w1 is both[1].w1


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_activations_are_quantised_where_there_is_an_mx_tensor_core(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    mx = capability >= (10, 0)
    assert quantizing._activations("auto", torch.device("cuda")) == ("mxfp8" if mx else "fp8")
    assert quantizing._activations("mxfp8", torch.device("cuda")) == "mxfp8"
    assert quantizing._activations("auto", torch.device("cpu")) == "bf16"
    assert quantizing._has_mx(torch.device("cuda")) == mx


@pytest.mark.parametrize("rounding", ["rceil", "floor"])
def test_activations_and_rounding(rounding: str) -> None:
    model = qwen3_moe()
    report = quantised(model, activations="mxfp8", rounding=rounding)
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    assert (report.activations, report.rounding) == ("mxfp8", rounding)
    assert (weight._activations, weight._rounding, weight._swizzled) == ("mxfp8", rounding, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "int8"}, "activations: wanted auto, bf16, fp8, mxfp8, found 'int8'"),
        ({"rounding": "even"}, "rounding: wanted rceil or floor, found 'even'"),
        ({"weights": {"w1": "[E, H]"}}, r"weights: w1: wanted \[E, N, K\] or \[E, K, N\], found '\[E, H\]'"),
        ({"weights": {"w7": NK}}, "wanted a pattern of 3-D parameters, found 'w7', which none is called; there is w1, w2"),
    ],
)
def test_errors(options: Any, message: str) -> None:
    experts = Experts()
    with pytest.raises(SettingError, match=message):
        quantised(experts, **options)
    assert not isinstance(experts.w1, MXFP8Weight)


def test_a_kernel_that_goes_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MXFP8Weight.quantize

    def wrong(weight: torch.Tensor, **options: Any) -> MXFP8Weight:
        made = right(weight, **options)
        made._scale += 1
        return made

    monkeypatch.setattr(MXFP8Weight, "quantize", wrong)
    with pytest.raises(RuntimeError, match=r"w1: wanted a relative error of at most 0\.1, found"):
        quantised(Experts(), weights={"w1": NK})
