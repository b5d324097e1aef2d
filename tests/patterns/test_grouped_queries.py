"""grouped_queries where it is chosen by itself, and attention that is nearly of grouped queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from inductor_ext.calls import aten
from inductor_ext.miss import DROPOUT
from inductor_ext.patterns import grouped_queries as rule
from inductor_ext.patterns.support.attention_examples import heads, repeated, sdpa
from tests.support import perturbed
from tests.support.nearly import check, reasons, refused
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


# ---- nearly grouped ----------------------------------------------------------------------------------------------------

ALIKE = "K and V before they are repeated"


def times(x: torch.Tensor, n: int) -> torch.Tensor:
    b, count, tokens, width = x.shape
    return x[:, :, None].expand(b, count, n, tokens, width).reshape(b, count * n, tokens, width)


def columns_apart(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous().mT


def twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any = None) -> torch.Tensor:
    return sdpa(q, k, v, bias)[0] * 2


NEAR: dict[str, tuple[str, Callable[..., Any]]] = {
    "k_alone_is_repeated": (ALIKE, lambda q, k, v: twice(q, times(k, 2), torch.cat((v, v), 1))),
    "v_alone_is_repeated": (ALIKE, lambda q, k, v: twice(q, torch.cat((k, k), 1), times(v, 2))),
    "v_of_fewer_heads": (ALIKE, lambda q, k, v: twice(q, times(k, 2), times(v[:, :1], 4))),
    "columns_of_k_apart": (ALIKE, lambda q, k, v: twice(q, times(columns_apart(k), 2), times(v, 2))),
    "columns_of_v_apart": (ALIKE, lambda q, k, v: twice(q, times(k, 2), times(columns_apart(v), 2))),
    "log_sum_exp_alone": ("log-sum-exp is used", lambda q, k, v: sdpa(q, times(k, 2), times(v, 2))[1] * 2),
}


def few() -> tuple[torch.Tensor, ...]:
    return heads("cpu", 4, tokens=1), heads("cpu", 2), heads("cpu", 2)


@pytest.mark.parametrize("name", list(NEAR))
def test_near_misses(name: str) -> None:
    reason, fn = NEAR[name]
    refused("grouped_queries", fn, *few(), reason=reason)


def test_heads_of_their_own_are_no_near_miss() -> None:
    q, k, v = few()
    found = check("grouped_queries", twice, q, *(torch.cat((each, each), 1) for each in (k, v)), count=0)
    assert reasons(found, "grouped_queries") == []


def test_a_mask_of_two_dimensions_is_every_heads() -> None:
    keys = few()[1].shape[2]
    bias = torch.where(torch.arange(keys) < keys // 2, 0.0, -65536.0)[None]
    check("grouped_queries", lambda q, k, v, b: twice(q, times(k, 2), times(v, 2), b), *few(), bias, count=1)


def test_any_number_of_heads() -> None:
    check("grouped_queries", lambda q, k, v: twice(q, times(k, 2), times(v, 2)), *few(), count=1, dynamic=True)


def test_dropout_is_a_near_miss() -> None:
    def dropped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return aten._scaled_dot_product_cudnn_attention(q, repeated(k), repeated(v), None, False, 0.5, False)[0]

    assert refusals(explained(dropped, inputs, grouped_queries="always"), "grouped_queries") == [DROPOUT]


def test_attention_that_nothing_uses_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """It may stay in a graph, since it counts as impure for its dropout."""
    (captured,) = perturbed.capture(lambda q, k, v: twice(q, times(k, 2), times(v, 2)), few())
    graph = captured.graph
    (attention,) = graph.find_nodes(op="call_function", target=aten._scaled_dot_product_flash_attention_for_cpu.default)
    (out,) = attention.users
    (used,) = out.users
    graph.output_node().args = ((attention.args[0],),)
    graph.erase_node(used)
    graph.erase_node(out)
    _, counts = perturbed.rewritten(graph, {"grouped_queries": "always"})
    assert counts == {} and "the rule failed" not in caplog.text
