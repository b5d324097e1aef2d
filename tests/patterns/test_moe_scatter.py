"""Rows that are scattered otherwise than a mixture of experts does it are left alone, and keep their values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inductor_ext.patterns.moe_combine import H, K, T
from inductor_ext.patterns.moe_scatter import RULE, _inputs, _unsorted, _weighted, _zeros
from tests.support.compiled import run_compiled

N = T * K


def _perm(ids: torch.Tensor) -> torch.Tensor:
    return torch.sort(ids.reshape(-1)).indices


def _columns(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.reshape(-1, 1).expand(-1, H)


def _added_rows(y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(y).index_put((_perm(ids),), y, accumulate=True)


def _filled(y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return y.masked_fill((ids.reshape(-1) > 2).unsqueeze(-1), 1.0)


LEFT: dict[str, Any] = {
    "columns_differ": lambda y, w, ids: _zeros(y).scatter_add(0, (_columns(_perm(ids) // K) + torch.arange(H)) % T, y),
    "along_columns": lambda y, w, ids: torch.zeros(N, H, dtype=y.dtype).scatter_add(1, _columns(_perm(ids) // K)[:, :2], y),
    "columns_added": lambda y, w, ids: torch.zeros(H, T, dtype=y.dtype).index_add(1, _perm(ids) // K, y.t()),
    "not_divided": lambda y, w, ids: torch.zeros(N, H, dtype=y.dtype).index_add(0, _perm(ids), y),
    "another_remainder": lambda y, w, ids: _zeros(y).index_add(0, _perm(ids) % T, y),
    "rounded_up": lambda y, w, ids: torch.zeros(T + 1, H, dtype=y.dtype).index_add(
        0, torch.div(_perm(ids) + K - 1, K, rounding_mode="floor"), y
    ),
    "no_permutation": lambda y, w, ids: _zeros(y).index_add(0, ids.reshape(-1) // K, y),
    "alpha": lambda y, w, ids: _zeros(y).index_add(0, _perm(ids) // K, y, alpha=2),
    "written_not_added": lambda y, w, ids: _zeros(y).index_put((_perm(ids) // K,), y, accumulate=False),
    "two_indices": lambda y, w, ids: torch.zeros(T, N, H, dtype=y.dtype).index_put(
        (_perm(ids) // K, torch.arange(N)), y, accumulate=True
    ),
    "one_row": lambda y, w, ids: _zeros(y).index_put((_perm(ids) // K,), y[:1], accumulate=True),
    "a_vector": lambda y, w, ids: torch.zeros(T, dtype=y.dtype).index_add(0, _perm(ids) // K, y[:, 0]),
    "sum_of_columns": lambda y, w, ids: _unsorted(y, ids).sum(2),
    "sum_of_both": lambda y, w, ids: _unsorted(y, ids).sum((1, 2)),
    "dimension_kept": lambda y, w, ids: _unsorted(y, ids).sum(1, keepdim=True),
    "two_weightings": lambda y, w, ids: torch.bmm(w.view(T, 1, K).expand(T, 2, K), _unsorted(y, ids).float()),
    "columns_split": lambda y, w, ids: _unsorted(y, ids).view(T, 2 * K, H // 2).sum(1),
    "transposed": lambda y, w, ids: _unsorted(y, ids).transpose(0, 1).sum(1),
    "written_along_columns": lambda y, w, ids: (
        torch.zeros(N, N, dtype=y.dtype).scatter(1, _perm(ids).expand(N, N), y[:, :N]).view(T, K, N).sum(1)
    ),
    "added_rows_then_sum": lambda y, w, ids: (
        torch.ones_like(y).index_put((_perm(ids),), y, accumulate=True).view(T, K, H).sum(1)
    ),
    "weights_a_column": lambda y, w, ids: (_unsorted(y, ids) * w.new_ones(1, 1, H)).sum(1),
    "weighted_twice": lambda y, w, ids: ((_unsorted(y, ids) * w.view(T, K, 1)) * w.view(T, K, 1)).sum(1),
    "other_fill": lambda y, w, ids: _zeros(y).index_add(
        0, _perm(ids) // K, y.masked_fill((ids.reshape(-1) > 2).unsqueeze(-1), 1.0)
    ),
}

MISSED: dict[str, tuple[Any, str]] = {
    "another_count": (
        lambda y, w, ids: (
            torch.zeros(N // 3, H, dtype=y.dtype).index_add(0, _perm(ids) // 3, y)[:1]
            + torch.zeros(T, H, dtype=y.dtype).index_add(0, _perm(ids) // 4, y)
        ),
        "the rows are not those of all tokens",
    ),
    "a_larger_buffer": (
        lambda y, w, ids: torch.zeros(2 * N, H, dtype=y.dtype).index_put((_perm(ids),), y).view(2 * T, K, H).sum(1),
        "the rows are not those of all tokens",
    ),
    "one_row_everywhere": (
        lambda y, w, ids: torch.zeros(N, H, dtype=y.dtype).index_put((_perm(ids),), y[:1]).view(T, K, H).sum(1),
        "the rows are not those of all tokens",
    ),
    "another_half": (
        lambda y, w, ids: _zeros(y).half().index_add(0, _perm(ids) // K, y.half()),
        "a value is rounded between the rows and their sum",
    ),
}


def _run(fn: Any) -> Any:
    torch.manual_seed(0)
    inputs = _inputs("cpu")
    found, recorder = run_compiled(fn, inputs, rules={RULE.name: "always", "moe_combine": "off"})
    torch.testing.assert_close(found[0], fn(*inputs), rtol=2e-2, atol=2e-2)
    return recorder


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    recorder = _run(LEFT[name])
    if name in ("weights_a_column", "weighted_twice", "other_fill"):  # taken up to there: the rows are computed
        return
    assert recorder.counts().get(RULE.name, 0) == 0


@pytest.mark.parametrize("name", MISSED)
def test_near_miss(name: str) -> None:
    fn, reason = MISSED[name]
    recorder = _run(fn)
    assert reason in {refusal.reason for refusal in recorder.refusals(RULE.name)}


def test_three_rows_of_a_token_are_three() -> None:
    """perm // 3 of 12 rows are four tokens."""
    recorder = _run(lambda y, w, ids: torch.zeros(N // 3, H, dtype=y.dtype).index_add(0, _perm(ids) // 3, y))
    assert recorder.counts() == {RULE.name: 1}


def test_weights_of_the_tokens_order_are_taken_as_they_are() -> None:
    """No second gather: they were gathered by the permutation itself. Nor is anything added to zeros."""

    def fn(y: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        perm = _perm(ids)
        return _zeros(y).index_add(0, perm // K, _weighted(y, w, perm))

    (report,) = _run(fn).reports
    assert report.counts() == {RULE.name: 1}
    assert "aten.index.Tensor" not in report.after and "aten.add.Tensor" not in report.after
