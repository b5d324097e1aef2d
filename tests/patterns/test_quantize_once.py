"""Quantise-once: on its own, and in a model quantised layer by layer the way torchao does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import inductor_ext
from tests.support.compiled import run_compiled, run_copies
from tests.support.equal import assert_all_same_bytes

E4 = torch.float8_e4m3fn
#: They take the casts with their input.
PRODUCERS_OFF = dict.fromkeys(("rms_norm_quantize", "layer_norm_quantize", "act_mul_quantize", "act_quantize"), "off")
HIDDEN, MIDDLE, HEADS = 64, 128, 4


class QuantisedLinear(nn.Module):
    """A linear layer with FP8 weights that quantises its own input, row by row or as a whole: torchao's arithmetic.

    ``torch.mm`` in fp32 stands for ``_scaled_mm``, which the CPU does not have for rows before torch 2.13.
    """

    def __init__(self, inputs: int, outputs: int, dims: Any) -> None:
        super().__init__()
        self.dims = dims
        weight = torch.randn(outputs, inputs) / inputs**0.5
        scale = weight.abs().amax(1, keepdim=True) / 448.0
        self.register_buffer("weight", (weight / scale).to(E4))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = (x.abs().amax(self.dims, keepdim=True) / 448.0).float()
        q = (x.float() / s).clamp(-448.0, 448.0).to(E4)
        product = torch.mm(q.view(-1, q.shape[-1]).float(), self.weight.float().t()).view(*x.shape[:-1], -1)
        return (product * s * self.scale.squeeze(1)).bfloat16()


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = x.float()
        return self.weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()


class Layer(nn.Module):
    """Qwen3's shape: norm, q k v, attention, o; norm, gate up, down."""

    def __init__(self, dims: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (QuantisedLinear(HIDDEN, HIDDEN, dims) for _ in range(4))
        self.gate, self.up = (QuantisedLinear(HIDDEN, MIDDLE, dims) for _ in range(2))
        self.down = QuantisedLinear(MIDDLE, HIDDEN, dims)
        self.norm1, self.norm2 = Norm(), Norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = torch.softmax((q @ k.transpose(-1, -2)).float(), -1).bfloat16() @ v
        x = x + self.o(mixed.transpose(1, 2).flatten(-2))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def _model(dims: Any, layers: int = 2) -> nn.Module:
    return nn.Sequential(*(Layer(dims) for _ in range(layers)))


def _casts(text: str) -> int:
    return sum("torch.float8_e4m3fn" in line and "input()" not in line for line in text.splitlines())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dims", [-1, (0, 1, 2)], ids=["rowwise", "tensorwise"])
def test_two_layers_of_a_model(dims: Any, dynamic: bool) -> None:
    """7 quantisations a layer, of which k and v repeat q's and up repeats gate's: 3 go, 4 stay."""
    x = torch.randn(2, 16, HIDDEN).bfloat16()
    rules = {"fp8_quantize": "off", "fp8_downcast": "off", **PRODUCERS_OFF}
    report = inductor_ext.explain(_model(dims), x, dynamic=dynamic, rules=rules)
    assert report.counts() == {"quantize_once": 6}
    (graph,) = report.graphs
    assert _casts(graph.before) == 14
    assert _casts(graph.after) == 8
    assert graph.before.count("aten.abs.default") == 14
    assert graph.after.count("aten.abs.default") == 8
    assert [refusal for refusal in report.refusals if refusal.rule == "quantize_once"] == []


@pytest.mark.parametrize("dims", [-1, (0, 1, 2)], ids=["rowwise", "tensorwise"])
def test_the_model_is_the_same_byte_for_byte(dims: Any) -> None:
    x = torch.randn(2, 16, HIDDEN).bfloat16()
    found = inductor_ext.verify(_model(dims, layers=1), x, end_to_end=False, rules={"fp8_quantize": "always", **PRODUCERS_OFF})
    assert {check.rule: check.rewrites for check in found.checks} == {"quantize_once": 3, "fp8_quantize": 4}
    assert all(check.differing == 0 and check.elements for check in found.checks)
    assert found.ok


def test_the_model_compiles_and_runs() -> None:
    model, x = _model(-1, layers=1), torch.randn(2, 16, HIDDEN).bfloat16()
    (found, _), recorder = run_compiled(model, (x,))
    assert recorder.counts() == {"quantize_once": 3, "rms_norm_quantize": 2, "act_mul_quantize": 1}
    wanted = model(x)
    assert float((found - wanted).float().norm() / wanted.float().norm()) < 0.05


def _quantise(x: Any) -> Any:
    s = (x.abs().amax(-1, keepdim=True) / 448.0).float()
    return (x.float() / s).clamp(-448.0, 448.0).to(E4), s


def test_two_outputs_stay_two_tensors() -> None:
    def twice(x: Any) -> Any:
        return *_quantise(x), *_quantise(x)

    x = torch.randn(32, 64).bfloat16()
    found, recorder = run_compiled(twice, (x,))
    assert "quantize_once" not in recorder.counts()
    assert len({tensor.data_ptr() for tensor in found[:4]}) == 4
    assert_all_same_bytes(found, run_copies(twice, (x,)))


def test_one_output_and_one_used_inside_share() -> None:
    def twice(x: Any, w: Any) -> Any:
        q, s = _quantise(x)
        p, t = _quantise(x)
        return q, s, torch.mm(p.float(), w) * t

    x, w = torch.randn(32, 64).bfloat16(), torch.randn(64, 8)
    found = inductor_ext.verify(twice, x, w, end_to_end=False)
    assert {check.rule: check.rewrites for check in found.checks} == {"quantize_once": 1, "fp8_quantize": 1}
    assert found.ok


def test_e4m3_and_e5m2_are_not_shared() -> None:
    def both(x: Any) -> Any:
        return x.mul(0.5).to(E4).float() + x.mul(0.5).to(torch.float8_e5m2).float()

    assert "quantize_once" not in inductor_ext.explain(both, torch.randn(32, 64).bfloat16()).counts()
