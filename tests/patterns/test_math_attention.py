"""Attention that PyTorch computes step by step: what causal_attention makes of its roundings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext import torch_compat
from tests.support.nearly import check

aten = torch.ops.aten
BF16 = torch.bfloat16
QKV = [(2, 4, 24, 64)] * 3


def one_value_a_row(q: torch.Tensor) -> torch.Tensor:
    shown, hidden = (torch.full((), number, dtype=BF16, device=q.device) for number in (0.0, float("-inf")))
    at = torch.arange(q.shape[2], device=q.device)
    return torch.where((at[:, None] >= 0).expand(q.shape[0], 1, q.shape[2], q.shape[2]), shown, hidden)


def test_a_rounding_that_inductor_left_out_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.12 Inductor makes a rotation in fp32, its rounding to bf16 and the cast back one fp32 value."""
    monkeypatch.setattr(torch_compat, "LEAVES_ROUNDINGS_OUT", True)

    def in_steps(round_: bool) -> Any:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k = torch.sin(q.float()), torch.cos(k.float())
            if round_:
                q, k = (each.to(BF16) for each in (q, k))
            found = aten._scaled_dot_product_attention_math(q, k, v if round_ else v.float(), one_value_a_row(q))[0]
            return found.to(BF16)

        return run

    torch.manual_seed(0)
    given = [torch.randn(shape).to(BF16) for shape in QKV]
    found = inductor_ext.explain(in_steps(False), *given)
    assert found.counts() == {"causal_attention": 1}
    assert "prims.convert_element_type.default(sin, torch.bfloat16)" in found.graphs[0].after
    compiled = torch.compile(in_steps(False), backend="inductor_ext")(*given)
    torch.testing.assert_close(compiled, in_steps(True)(*given), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("which", ["v", "all"])
@pytest.mark.parametrize("left_out", [True, False])
def test_attention_in_fp32_is_left_alone(monkeypatch: pytest.MonkeyPatch, left_out: bool, which: str) -> None:
    """Whatever becomes of its result: v, or where roundings are kept any of them, says that it was asked for in fp32."""
    monkeypatch.setattr(torch_compat, "LEAVES_ROUNDINGS_OUT", left_out)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = (torch.sin(each.float()) if which == "all" else each.float() for each in (q, k))
        return aten._scaled_dot_product_attention_math(q, k, torch.cos(v.float()), one_value_a_row(q))[0].to(BF16)

    found = inductor_ext.explain(run, *(torch.randn(shape).to(BF16) for shape in QKV))
    assert found.counts() == {} and not found.refusals


def test_q_that_is_not_rounded_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compat, "LEAVES_ROUNDINGS_OUT", False)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = torch.sin(q.float()), k.float(), v.float()
        return aten._scaled_dot_product_attention_math(*heads, one_value_a_row(q))[0].to(BF16)

    found = inductor_ext.explain(run, *(torch.randn(shape).to(BF16) for shape in QKV))
    assert found.counts() == {} and not found.refusals


def test_attention_of_two_dtypes_is_left_alone() -> None:
    """Q and K round to fp16, the result is bf16: nobody says which 16 bits the product is to be taken in."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = (each.to(torch.float16).float() for each in (q, k, v))
        return aten._scaled_dot_product_attention_math(*heads, one_value_a_row(q))[0].to(BF16)

    found = inductor_ext.explain(run, *(torch.randn(shape) for shape in QKV))
    assert found.counts() == {} and not found.refusals


# ---- what is nearly attention step by step ---------------------------------------------------------------------------

INF = float("inf")
#: As many positions as columns, so that shapes tell neither from the other.
B, H, N = 2, 4, 16
FLAT = (B * H, N, N)
Step = Callable[..., Any]

#: What `_scaled_dot_product_attention_math` is made of.
STEPS: dict[str, Step] = {
    "wide": lambda x: x.float(),
    "q": lambda q: q * 0.5,
    "k": lambda k: k.mT * 0.5,
    "rows": lambda x: x.reshape(FLAT),
    "first": torch.bmm,
    "scores": lambda s: s.view(B, H, N, N),
    "bias": lambda q: one_value_a_row(q),
    "masked": lambda s, bias: s + bias,
    "some": lambda hidden: hidden.logical_not().any(-1, keepdim=True),
    "most": lambda x: x.amax(-1, keepdim=True),
    "apart": lambda x, most: x - most,
    "power": torch.exp,
    "total": lambda e: e.sum(-1, keepdim=True),
    "share": lambda e, total: e / total,
    "fill": lambda p: torch.zeros_like(p),
    "shares": lambda p: p.reshape(FLAT),
    "values": lambda v: v.reshape(FLAT),
    "result": lambda o: o.view(B, H, N, N),
    "rounded": lambda o: o.to(BF16),
}


def in_steps(**changed: Step) -> Step:
    step = {**STEPS, **changed}

    def run(q: Any, k: Any, v: Any) -> Any:
        bias = step["bias"](q)
        q, k, v = (step["wide"](each) for each in (q, k, v))
        scores = step["scores"](step["first"](step["rows"](step["q"](q)), step["rows"](step["k"](k))))
        x = step["masked"](scores, bias)
        empty = step["some"](x == -INF).logical_not()
        e = step["power"](step["apart"](x, step["most"](x)))
        p = step["share"](e, step["total"](e))
        p = torch.where(empty, step["fill"](p), p)
        return step["rounded"](step["result"](torch.bmm(step["shares"](p), step["values"](v))))

    return run


def qkv(*shape: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape or (B, H, N, N)).to(BF16) for _ in range(3)]


def turned(x: Any, *shape: int) -> Any:
    """Rows for columns, in one step that is no reshape."""
    size = shape or (B, H, N, N)
    strides = (H * N * N, N * N, 1, N)[-len(size) :]
    return torch.as_strided(x, size, strides)


QUARTERS = (4 * B * H, N // 2, N // 2)

NEARLY: dict[str, dict[str, Step]] = {
    "maximum_of_scores_and_mask": {"masked": torch.maximum},
    "no_product": {"first": lambda a, b: a * b},
    "scores_turned": {"scores": turned},
    "probabilities_turned": {"shares": lambda p: turned(p, *FLAT)},
    "result_turned": {"result": turned},
    "scales_that_differ": {"q": lambda q: q * 0.25},
    "quarters_of_heads": {"rows": lambda x: x.reshape(QUARTERS)},
    "ones_in_empty_rows": {"fill": torch.ones_like},
    "times_the_sum": {"share": lambda e, total: e * total},
    "powers_of_two": {"power": torch.exp2},
    "plus_the_maximum": {"apart": lambda x, most: x + most},
    "empty_columns": {"some": lambda hidden: hidden.logical_not().any(-2, keepdim=True)},
    "minimum": {"most": lambda x: x.amin(-1, keepdim=True)},
    "in_fp64": {"wide": lambda x: x.double()},
    "into_fp64": {"rounded": lambda o: o.double()},
    "of_fp32_into_fp64": {"wide": lambda x: x.float().sin(), "rounded": lambda o: o.double()},
    "read_in_fp32_too": {"rounded": lambda o: (o.to(BF16), o)},
}


@pytest.mark.parametrize("what", list(NEARLY))
def test_what_is_nearly_attention_in_steps_is_left_alone(what: str) -> None:
    check("causal_attention", in_steps(**NEARLY[what]), *qkv(), count=0)


def test_attention_in_steps() -> None:
    check("causal_attention", in_steps(), *qkv(), count=1)


def test_heads_of_a_vector() -> None:
    """What is viewed as heads need not have dimensions of heads."""

    def run(q: Any, k: Any, v: Any) -> Any:
        return in_steps(k=lambda k: k.view(B, H, N, N).mT * 0.5, bias=lambda q: one_value_a_row(q.view(B, H, N, N)))(q, k, v)

    check("causal_attention", run, *qkv(B * H * N * N), count=0)


def test_a_largest_value_that_is_given_and_a_total_of_several() -> None:
    """Of two results that are taken from one node each is asked for."""
    given = torch.ones(B, H, N, 1)

    def run(q: Any, k: Any, v: Any, largest: Any) -> Any:
        return in_steps(most=lambda x: largest, total=lambda e: e.topk(1).values)(q, k, v)

    check("causal_attention", run, *qkv(), given, count=0)


@pytest.mark.parametrize("times", ["fp32", "fp64"])
def test_what_is_rounded_is_the_fp32_value_itself(monkeypatch: pytest.MonkeyPatch, times: str) -> None:
    """A product of bf16 and fp32 takes both as they are, and so stands in place of a convert; so does a convert of fp64."""
    monkeypatch.setattr(torch_compat, "LEAVES_ROUNDINGS_OUT", True)
    cos = torch.linspace(-1, 1, N).expand(B, H, N, N).clone()

    def run(q: Any, k: Any, v: Any, cos: Any) -> Any:
        q, k = (each * cos if times == "fp32" else (each.double() * cos).float() for each in (q, k))
        return in_steps(bias=lambda q: one_value_a_row(q.to(BF16)))(q, k, v)

    check("causal_attention", run, *qkv(), cos, count=1)
