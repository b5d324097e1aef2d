"""grouped_queries where it is chosen by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inductor_ext.patterns import grouped_queries as rule
from inductor_ext.patterns.support.attention_examples import repeated, sdpa
from tests.support.products import explained, refusals

B, H, HKV, S, D = rule.LEAST_HEADS // 2, 4, 2, 40, 64


def decoded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return sdpa(q, repeated(k), repeated(v))[0]


def inputs() -> tuple[torch.Tensor, ...]:
    kept = [torch.empty(B, HKV, S, D, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    return torch.empty(B, H, 1, D, device="cuda", dtype=torch.bfloat16), *kept


def test_a_gpu_waits_until_it_is_measured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = explained(decoded, inputs)
    assert found.counts() == {"grouped_queries": 1} and refusals(found, "grouped_queries") == []
    monkeypatch.setattr(rule, "MEASURED", frozenset({"sm_100a"}))
    torch._dynamo.reset()
    assert refusals(explained(decoded, inputs), "grouped_queries") == ["the rewrite has not been measured on this GPU yet"]
    assert explained(decoded, inputs, grouped_queries="always").counts() == {"grouped_queries": 1}


def test_few_heads_are_repeated() -> None:
    make = lambda: tuple(each[: B - 1] for each in inputs())  # noqa: E731
    torch._dynamo.reset()
    found = explained(decoded, make)
    assert refusals(found, "grouped_queries") == ["few heads are faster repeated"] and found.counts() == {}
    torch._dynamo.reset()
    assert explained(decoded, make, grouped_queries="always").counts() == {"grouped_queries": 1}
