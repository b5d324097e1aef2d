"""Graphs that differ from what a rule knows in one argument or dtype of one node: refused, or the bytes of its nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import inductor_ext

E4 = torch.float8_e4m3fn


def _rows(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = (y.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=1e-12)
    return (y.float() / s).clamp(-448.0, 448.0).to(E4), s


def _norm(x: torch.Tensor, weight: torch.Tensor, **mean: Any) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True, **mean) + 1e-6) * weight).to(x.dtype)


def _mean_in_bf16(x: Any, w: Any) -> Any:
    return _rows(_norm(x, w, dtype=torch.bfloat16))


def _integers_between(x: Any, w: Any) -> Any:
    h = x.float()
    return _rows((w.float() * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * 9).to(torch.int8)).to(x.dtype))


def _weight_and_half(x: Any, w: Any) -> Any:
    return _rows(_norm(x, torch.add(w.float(), 1.0, alpha=0.5)))


def _eps_twice(x: Any, w: Any) -> Any:
    h = x.float()
    return _rows((h * torch.rsqrt(torch.add(h.pow(2).mean(-1, keepdim=True), 0.5, alpha=2)) * w).to(x.dtype))


def _residual_twice(x: Any, w: Any) -> Any:
    total = torch.add(x, x * 3, alpha=2)
    return (*_rows(_norm(total, w)), total)


def _mean_of_rows(x: Any, w: Any) -> Any:
    h = x.float()
    return _rows((h * torch.rsqrt(h.pow(2).mean(-2, keepdim=True) + 1e-6) * w).to(x.dtype))


def _one_plus_w_in_bf16(x: Any, w: Any) -> Any:
    return _rows(_norm(x, 1.0 + w))


def _integer_scale(x: Any, w: Any) -> Any:
    scale = (w.float().sum() * 0 + 900).to(torch.int64)
    return ((x * torch.nn.functional.silu(x)).float() * (1.0 / scale)).clamp(-448.0, 448.0).to(E4)


@pytest.mark.parametrize(
    ("fn", "refused"),
    [
        (_mean_in_bf16, True),
        (_integers_between, True),
        (_weight_and_half, False),  # a weight that Inductor computes
        (_eps_twice, True),
        (_residual_twice, False),  # the norm of a sum that Inductor computes
        (_mean_of_rows, True),
        (_one_plus_w_in_bf16, False),
        (_integer_scale, False),
    ],
    ids=lambda each: each.__name__ if callable(each) else "",
)
def test_a_node_is_read_whole(fn: Callable[..., Any], refused: bool) -> None:
    x, w = torch.randn(16, 64).bfloat16() * 5, torch.rand(64).bfloat16() + 0.5
    found = inductor_ext.verify(fn, x, w, end_to_end=False)
    fused = {"rms_norm_quantize", "act_mul_quantize"} & {event.rule for graph in found.graphs for event in graph.rewrites}
    assert not fused if refused else fused
    assert found.ok
    assert all(check.differing == 0 for check in found.checks), "on a CPU every rewrite gives the nodes' own bytes"
