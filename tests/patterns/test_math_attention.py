"""Attention that PyTorch computes step by step: what causal_attention makes of its roundings."""

from __future__ import annotations

from typing import Any

import torch

import inductor_ext

aten = torch.ops.aten
BF16 = torch.bfloat16
QKV = [(2, 4, 24, 64)] * 3


def one_value_a_row(q: torch.Tensor) -> torch.Tensor:
    shown, hidden = (torch.full((), number, dtype=BF16, device=q.device) for number in (0.0, float("-inf")))
    at = torch.arange(q.shape[2], device=q.device)
    return torch.where((at[:, None] >= 0).expand(q.shape[0], 1, q.shape[2], q.shape[2]), shown, hidden)


def test_a_rounding_that_inductor_left_out_is_made_again() -> None:
    """Before torch 2.12 Inductor makes a rotation in fp32, its rounding to bf16 and the cast back one fp32 value."""

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


def test_attention_of_two_dtypes_is_left_alone() -> None:
    """Q and K round to fp16, the result is bf16: nobody says which 16 bits the product is to be taken in."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = (each.to(torch.float16).float() for each in (q, k, v))
        return aten._scaled_dot_product_attention_math(*heads, one_value_a_row(q))[0].to(BF16)

    found = inductor_ext.explain(run, *(torch.randn(shape) for shape in QKV))
    assert found.counts() == {} and not found.refusals
