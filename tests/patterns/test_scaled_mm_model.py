"""Two layers of a Qwen3 quantised the way torchao does it: what the scaled_mm rules make of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inductor_ext
from tests.support import scaled_tables as tables
from tests.support.compiled import run_compiled
from tests.support.products import BF16, E4

forgotten = pytest.fixture(autouse=True)(tables.forgetting)
HIDDEN, MIDDLE, HEADS = 64, 128, 4


class Linear(nn.Module):
    """torchao's dynamic FP8 linear layer: it quantises its own input, by row (-1) or as a whole, and calls `_scaled_mm`."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, inputs: int, outputs: int, rows: bool) -> None:
        super().__init__()
        self.rows = rows
        weight = torch.randn(outputs, inputs) / inputs**0.5
        amax = weight.abs().amax(1, keepdim=True) if rows else weight.abs().amax().reshape(1, 1)
        self.register_buffer("scale", amax / 448.0)
        self.register_buffer("weight", (weight / self.scale).to(E4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dims = -1 if self.rows else tuple(range(x.dim()))
        s = (x.abs().amax(dims, keepdim=True) / 448.0).float()
        q = (x.float() / s).clamp(-448.0, 448.0).to(E4)
        row = s.unsqueeze(-1).reshape(-1, 1) if self.rows else s.reshape(1, 1)
        out = torch._scaled_mm(
            q.reshape(-1, q.shape[-1]), self.weight.t(), row, self.scale.t(), out_dtype=BF16, use_fast_accum=True
        )
        return out.reshape(*x.shape[:-1], -1)


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=BF16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = x.float()
        return self.weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()


class Layer(nn.Module):
    """Qwen3's: norm; q, k (each normalised) and v; attention; o; norm; gate, up, down."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Linear(HIDDEN, HIDDEN, rows) for _ in range(4))
        self.gate, self.up = (Linear(HIDDEN, MIDDLE, rows) for _ in range(2))
        self.down = Linear(MIDDLE, HIDDEN, rows)
        self.norm1, self.norm2, self.q_norm, self.k_norm = (Norm(n) for n in (HIDDEN, HIDDEN, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (p(y).view(*x.shape[:-1], -1, HIDDEN // HEADS) for p in (self.q, self.k, self.v))
        q, k, v = (each.transpose(1, 2) for each in (self.q_norm(q), self.k_norm(k), v))
        mixed = torch.softmax((q @ k.transpose(-1, -2)).float(), -1).bfloat16() @ v
        x = x + self.o(mixed.transpose(1, 2).flatten(-2))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def model(rows: bool, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(rows) for _ in range(layers)))


ALWAYS = {"scaled_mm": "always", "scaled_mm_siblings": "always"}
ROWS = pytest.mark.parametrize("rows", [True, False], ids=["rowwise", "tensorwise"])


def needs_rowwise(rows: bool) -> None:
    one = torch.ones(16, 1)
    try:
        torch._scaled_mm(one.expand(16, 16).to(E4), one.expand(16, 16).to(E4).t(), one, one.t(), out_dtype=BF16)
    except (RuntimeError, NotImplementedError):
        if rows:
            pytest.skip("this torch has no row-wise _scaled_mm on a CPU")


@ROWS
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_two_layers_of_a_model(rows: bool, dynamic: bool) -> None:
    """A layer: q, k, v are one launch, gate and up another, o and down one each; four quantisations.

    A norm with one scale for the tensor is taken only where its rows are known (16 or more): not in the dynamic graph.
    """
    needs_rowwise(rows)
    x = torch.randn(2, 24, HIDDEN).bfloat16()
    found = inductor_ext.explain(model(rows), x, rules=ALWAYS, dynamic=dynamic)
    norms = {"rms_norm_quantize": 4} if rows or not dynamic else {}
    producers = {**norms, "act_mul_quantize": 2}
    expected = {"quantize_once": 6, "scaled_mm_siblings": 4, "scaled_mm": 4, **producers, "fp8_quantize": 2}
    assert found.counts() == expected
    (graph,) = found.graphs
    assert graph.before.count("aten._scaled_mm.default(") == 14 and "aten._scaled_mm" not in graph.after
    assert graph.after.count("inductor_ext.scaled_mm.default(") == 8
    casts = [line for line in graph.after.splitlines() if "torch.float8_e4m3fn" in line]
    assert len(casts) == 8
    assert graph.after.count("192]") and graph.after.count("256]"), "q k v and gate up side by side"


@ROWS
def test_residuals_are_added_by_the_products(rows: bool) -> None:
    """o and down add theirs, so that norms read one tensor: on request, until it is measured."""
    needs_rowwise(rows)
    made, x = model(rows), torch.randn(2, 24, HIDDEN).bfloat16()
    rules = {**ALWAYS, "scaled_mm_add": "always"}
    found = inductor_ext.explain(made, x, rules=rules).counts()
    assert (found["scaled_mm_add"], found["rms_norm_quantize"], "scaled_mm" in found) == (4, 4, False)
    assert inductor_ext.verify(model(rows, layers=1), x, rules=rules).ok


@ROWS
def test_gate_and_up_store_their_activation(rows: bool) -> None:
    """On request: one launch for both and SiLU, and what is left of the MLP is a quantisation of what it stores."""
    needs_rowwise(rows)
    made, x = model(rows), torch.randn(2, 24, HIDDEN).bfloat16()
    rules = {**ALWAYS, "scaled_mm_act_mul": "always"}
    found = inductor_ext.explain(made, x, rules=rules).counts()
    assert (found["scaled_mm_act_mul"], found["scaled_mm_siblings"], found["fp8_quantize"]) == (2, 2, 4)
    assert "act_mul_quantize" not in found
    assert inductor_ext.verify(model(rows, layers=1), x, rules=rules).ok


@ROWS
def test_the_model_computes_what_it_did(rows: bool) -> None:
    needs_rowwise(rows)
    x = torch.randn(2, 24, HIDDEN).bfloat16()
    found = inductor_ext.verify(model(rows, layers=1), x, rules=ALWAYS)
    checks = {check.rule: check for check in found.checks}
    assert checks["scaled_mm_siblings"].rewrites == 2 and not checks["scaled_mm_siblings"].exact
    assert found.ok and all(check.distance < 1e-2 for check in found.checks)


def test_the_model_compiles_and_runs() -> None:
    made, x = model(False, layers=1), torch.randn(2, 24, HIDDEN).bfloat16()
    (found, _), recorder = run_compiled(made, (x,), rules=ALWAYS)
    assert recorder.counts()["scaled_mm_siblings"] == 2
    (stock, _), _ = run_compiled(made, (x,), rules=dict.fromkeys(ALWAYS, "off"))
    assert float((found - stock).float().norm() / stock.float().norm()) < 0.01
    (apart, _), _ = run_compiled(made, (x,), rules={"scaled_mm": "always", "scaled_mm_siblings": "off"})
    assert torch.equal(found, apart), "on a CPU a product is the same side by side with others"
