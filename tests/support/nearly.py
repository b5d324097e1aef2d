"""Programs that differ in one respect from what a rule looks for, checked without compiling anything.

The graph before a rule and the graph behind it run on the same inputs. Such tests kill mutants (``./run mutate``): each guard
has a program that it alone refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import inductor_ext
from inductor_ext.report.verify import Verification

E4, E5, U8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8

BF16 = torch.bfloat16


def check(rule: str, fn: Callable[..., Any], *inputs: Any, count: int, dynamic: bool = False) -> Verification:
    """``rule`` rewrites ``fn`` as often as that, and what it leaves gives the same bytes, or values as near as it promises."""
    found = inductor_ext.verify(fn, *inputs, rules={rule: "always"}, dynamic=dynamic, end_to_end=False)
    rewrites = [event for graph in found.graphs for event in graph.rewrites if event.rule == rule]
    assert len(rewrites) == count, reasons(found, rule)
    assert found.differs == []
    assert "the rule failed" not in reasons(found, rule)
    return found


def reasons(found: Verification, rule: str) -> list[str]:
    return [refusal.reason for graph in found.graphs for refusal in graph.refusals if refusal.rule == rule]


def refused(rule: str, fn: Callable[..., Any], *inputs: Any, reason: str) -> None:
    found = check(rule, fn, *inputs, count=0)
    assert reason in reasons(found, rule)


def quantise(x: Any, scale: Any = 0.5, dtype: torch.dtype = E4) -> Any:
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)


def rows(tokens: int = 16, heads: int = 2, dim: int = 64) -> torch.Tensor:
    return (torch.randn(tokens, heads, dim) * 30).bfloat16()


def cache(*shape: int, dtype: torch.dtype = E4) -> torch.Tensor:
    return torch.randint(0, 120, shape, dtype=U8).view(dtype)


SLOTS = torch.arange(16) * 3


def put(view: Any, k: Any, s: Any) -> Any:
    return view.index_put((s,), quantise(k))


FEW = torch.tensor([3, 0, 7, 9])


def quantise_rows(y: Any) -> Any:
    s = (y.abs().amax(-1, keepdim=True) / 448.0).float()
    return (y.float() / s).clamp(-448.0, 448.0).to(E4), s


def square(seed: int = 0, size: int = 32) -> torch.Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).bfloat16()


WEIGHT = torch.linspace(0.5, 1.5, 32).bfloat16()

#: Everything is as long as everything else, so that only the dimension itself tells positions, heads and columns apart.
N = 8

HALF = N // 2


def heads(batch: int = N, count: int = N, positions: int = N, columns: int = N, dtype: torch.dtype = BF16) -> torch.Tensor:
    """[B, H, S, D] as a view of [B, S, H, D]: the layout that the op writes."""
    return (torch.randn(batch, positions, count, columns) * 3).to(dtype).transpose(1, 2)


def table(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def rotated(x: Any, cos: Any, sin: Any) -> Any:
    return x * cos + torch.cat((-x[..., HALF:], x[..., :HALF]), -1) * sin
