"""Rows that are scattered otherwise than a mixture of experts does it are left alone, and keep their values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext.patterns.moe_combine import H, K, T
from inductor_ext.patterns.moe_scatter import RULE, _inputs, _unsorted, _weighted, _zeros
from tests.support.compiled import run_compiled
from tests.support.nearly import check, reasons, refused

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


# ---- each guard by itself --------------------------------------------------------------------------------------------


def _square(y: torch.Tensor) -> torch.Tensor:
    return y[:, :N]


def _buffer(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def _some(ids: torch.Tensor) -> torch.Tensor:
    """The permutation of fewer rows than there are."""
    return _perm(ids.reshape(-1)[:-K])


NEARLY: dict[str, Any] = {
    "columns_of_one_row_a_token": lambda y, w, ids: _buffer(N, N).index_add(
        1, torch.div(_perm(ids), 1, rounding_mode="floor"), _square(y)
    ),
    "written_over": lambda y, w, ids: _zeros(y).index_put((_perm(ids) // K,), y, accumulate=False),
    "tokens_of_some_columns": lambda y, w, ids: _zeros(y).scatter_add(0, (_perm(ids) // K)[:, None] * (torch.arange(H) % 2), y),
    "tokens_of_columns": lambda y, w, ids: _buffer(T, N).scatter_add(0, (_perm(ids) // K).expand(N, N), _square(y)),
    "rows_of_nothing_scattered": lambda y, w, ids: w.view(T, K, 1).sum(1) + torch.cat((w, w)).view(2, T, K).sum(1).sum(),
    "columns_split": lambda y, w, ids: _unsorted(y, ids).view(T, 2 * K, H // 2).sum(1),
    "places_that_no_sort_gives": lambda y, w, ids: (
        torch.zeros_like(y).index_put(((torch.arange(N) * 5) % N,), y).view(T, K, H).sum(1)
    ),
    "along_columns": lambda y, w, ids: (
        _buffer(N, N)
        .scatter(1, _perm(ids)[:, None].expand(N, N), y[:, :1] * w.sign().bfloat16().view(1, N))
        .view(T, K, N)
        .sum(1)
    ),
}

NOT_WHOLE: dict[str, Any] = {
    "some_rows_added": lambda y, w, ids: _zeros(y).scatter_add(0, _columns(_some(ids) // K), y),
    "some_rows_written": lambda y, w, ids: torch.zeros_like(y).scatter(0, _columns(_some(ids)), y).view(T, K, H).sum(1),
}


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_nearly_a_sum_of_scattered_rows(name: str) -> None:
    torch.manual_seed(0)
    found = check(RULE.name, NEARLY[name], *_inputs("cpu"), count=0)
    assert reasons(found, RULE.name) == []


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_rows_that_are_not_all(name: str) -> None:
    refused(RULE.name, NOT_WHOLE[name], *_inputs("cpu"), reason="the rows are not those of all tokens")


def test_a_sum_of_three_dimensions_that_are_given() -> None:
    check(RULE.name, lambda x: x.sum(1), torch.randn(T, K, H), count=0)


def test_rows_in_fp64_are_no_input_of_the_kernel() -> None:
    def added(y: Any, w: Any, ids: Any) -> Any:
        return _zeros(y).double().index_add(0, _perm(ids) // K, y.double())

    refused(RULE.name, added, *_inputs("cpu"), reason="input dtype")


def test_the_convert_behind_a_sum_goes_unless_something_else_is_in_it() -> None:
    def added(base: Any, y: Any, ids: Any) -> Any:
        return base.index_add(0, _perm(ids) // K, y.float()).to(torch.bfloat16)

    y, _, ids = _inputs("cpu")
    shared = torch.randn(T, H)
    for fn, left in ((lambda y, i: added(torch.zeros(T, H), y, i), False), (lambda y, i: added(shared, y, i), True)):
        check(RULE.name, fn, y, ids, count=1)
        found = inductor_ext.explain(fn, y, ids, rules={RULE.name: "always"})
        assert ("convert_element_type.default" in found.graphs[0].after) is left
