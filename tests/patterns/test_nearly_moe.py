"""Rows of experts that are weighted, hidden and summed in nearly the way the kernel does: the values are those of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.nearly import N, check, reasons, refused

# ---- a mixture's rows, back in the tokens' order -----------------------------------------------------------------------


#: Tokens, rows of each and columns are equally many: 8 of each, so that shapes do not tell them apart.
ROWS = N * N

EXPERTS = 3


def routed() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    ids, other = (torch.randint(0, 5, (N, N), generator=generator) for _ in range(2))
    y, weights = torch.randn(ROWS, N, generator=generator), torch.rand(N, N, generator=generator) + 0.5
    return y.bfloat16(), weights.bfloat16(), ids, other


def order(ids: Any) -> tuple[Any, Any, Any]:
    sorted_ids, perm = torch.sort(ids.reshape(-1))
    return sorted_ids, perm, placed(perm, torch.arange(ROWS))


def placed(perm: Any, values: Any, accumulate: bool = False) -> Any:
    return torch.zeros(ROWS, dtype=torch.int64).index_put((perm,), values, accumulate)


def scattered(perm: Any) -> Any:
    return torch.zeros_like(perm).scatter(0, perm, torch.arange(ROWS))


def backwards(ids: Any) -> Any:
    return torch.sort(ids.view(-1), descending=True)


def summed(rows: Any) -> Any:
    return rows.view(N, N, N).sum(1)


def weighted(y: Any, w: Any, perm: Any, inverse: Any, columns: int = N) -> Any:
    return (y * w.view(-1)[perm].unsqueeze(-1))[inverse].view(N, N, columns).sum(1)


def hidden(y: Any, mask: Any, fill: float = 0.0) -> Any:
    return torch.where(mask.unsqueeze(-1), torch.full((), fill, dtype=y.dtype), y)


COMBINED: dict[str, Callable[..., Any]] = {
    "weights": lambda y, w, i, j: weighted(y, w, *order(i)[1:]),
    "places_from_the_end": lambda y, w, i, j: weighted(y, w, p := order(i)[1], placed(p, torch.arange(-1, ROWS - 1))),
    "places_backwards": lambda y, w, i, j: weighted(y, w, p := order(i)[1], placed(p, torch.arange(0, -ROWS, -1))),
    "all_places_the_first": lambda y, w, i, j: weighted(y, w, p := order(i)[1], placed(p, torch.arange(1))),
    "places_added_up": lambda y, w, i, j: weighted(
        y, w, p := order(i)[1], placed(p // 2, torch.arange(ROWS), accumulate=True) % ROWS
    ),
    "places_added_to_others": lambda y, w, i, j: weighted(
        y, w, p := order(i)[1], torch.full((ROWS,), -1).index_put((p,), torch.arange(ROWS), accumulate=True)
    ),
    "places_by_scatter": lambda y, w, i, j: weighted(y, w, p := order(i)[1], scattered(p)),
    "places_by_sorting": lambda y, w, i, j: weighted(y, w, p := order(i)[1], torch.argsort(p)),
    "places_of_pairs": lambda y, w, i, j: weighted(y, w, p := order(i)[1] // 2, placed(p, torch.arange(ROWS))),
    "places_of_others": lambda y, w, i, j: weighted(y, w, p := order(i)[1], placed(p, order(j)[1])),
    "places_of_what_is_sorted": lambda y, w, i, j: summed(
        hidden(y, (s := torch.sort(order(i)[1])[0]) >= EXPERTS)[placed(s, torch.arange(ROWS))]
    ),
    "places_that_no_sort_gives": lambda y, w, i, j: summed(
        hidden(y, order(i)[0] >= EXPERTS)[placed((order(i)[1] + 1) % ROWS, torch.arange(ROWS))]
    ),
    "the_permutation_itself": lambda y, w, i, j: weighted(y, w, order(i)[1], order(i)[1]),
    "another_permutation": lambda y, w, i, j: weighted(y, w, order(j)[1], order(i)[2]),
    "twice_permuted": lambda y, w, i, j: weighted(y, w.view(-1)[order(j)[1]], *order(i)[1:]),
    "sorted_backwards": lambda y, w, i, j: weighted(y, w, p := backwards(i)[1], torch.argsort(p)),
    "more_places_than_rows": lambda y, w, i, j: weighted(
        y[: ROWS // 2], w.view(-1)[: ROWS // 2], p := torch.sort(i.view(-1)[: ROWS // 2])[1], placed(p, torch.arange(ROWS // 2))
    ),
    "weights_of_columns": lambda y, w, i, j: summed((y * w[:1])[order(i)[2]]),
    "weights_of_tokens": lambda y, w, i, j: (y[order(i)[2]].view(N, N, N) * w[:, :1, None]).sum(1),
    "weights_of_places": lambda y, w, i, j: (y[order(i)[2]].view(N, N, N) * w[:1, :, None]).sum(1),
    "a_weight_for_all": lambda y, w, i, j: weighted(y * 2.0, w, *order(i)[1:]),
    "a_number": lambda y, w, i, j: summed((y * 2.0)[order(i)[2]]),
    "a_weight_for_one_column": lambda y, w, i, j: weighted(y[:, :1] * 2.0, w, *order(i)[1:], columns=1),
    "one_column": lambda y, w, i, j: weighted(y[:, :1], w, *order(i)[1:], columns=1),
    "weights_of_columns_alone": lambda y, w, i, j: summed((y * w[0])[order(i)[2]]),
    "weights_that_are_integers": lambda y, w, i, j: weighted(y, j, *order(i)[1:]),
    "weights_in_fp64": lambda y, w, i, j: weighted(y, w.double(), *order(i)[1:]),
    "weights_of_one_row": lambda y, w, i, j: weighted(y[:1], w, *order(i)[1:]),
    "weights_twice": lambda y, w, i, j: (y[order(i)[2]].view(N, N, N) * w[..., None] * w.t()[..., None]).sum(1),
    "divided_by_weights": lambda y, w, i, j: (y[order(i)[2]].view(N, N, N) / w[..., None]).sum(1),
    "plus_weights": lambda y, w, i, j: (y[order(i)[2]].view(N, N, N) + w[..., None]).sum(1),
    "hidden": lambda y, w, i, j: summed(hidden(y, order(i)[0] >= EXPERTS)[order(i)[2]]),
    "hidden_above": lambda y, w, i, j: summed(hidden(y, order(i)[0] > EXPERTS)[order(i)[2]]),
    "hidden_below": lambda y, w, i, j: summed(hidden(y, order(i)[0] < EXPERTS)[order(i)[2]]),
    "hidden_up_to": lambda y, w, i, j: summed(hidden(y, order(i)[0] <= EXPERTS)[order(i)[2]]),
    "hidden_where_not_below": lambda y, w, i, j: summed(hidden(y, ~(order(i)[0] < EXPERTS))[order(i)[2]]),
    "hidden_where_not_above": lambda y, w, i, j: summed(hidden(y, ~(order(i)[0] >= EXPERTS))[order(i)[2]]),
    "hidden_where_equal": lambda y, w, i, j: summed(hidden(y, order(i)[0] == EXPERTS)[order(i)[2]]),
    "hidden_by_a_tensor": lambda y, w, i, j: summed(hidden(y, order(i)[0] >= j.view(-1))[order(i)[2]]),
    "hidden_by_floats": lambda y, w, i, j: summed(hidden(y, order(i)[0].float() >= EXPERTS)[order(i)[2]]),
    "hidden_by_the_permutation": lambda y, w, i, j: summed(hidden(y, order(i)[1] >= EXPERTS)[order(i)[2]]),
    "hidden_by_the_largest_first": lambda y, w, i, j: summed(
        hidden(y, (found := torch.topk(i.view(-1), ROWS))[0] >= EXPERTS)[placed(found[1], torch.arange(ROWS))]
    ),
    "hidden_by_sorts_of_tokens": lambda y, w, i, j: summed(hidden(y, torch.sort(i, -1)[0].view(-1) >= EXPERTS)[order(i)[2]]),
    "hidden_all_by_the_first": lambda y, w, i, j: summed(hidden(y, order(i)[0][:1] >= 1)[order(i)[2]]),
    "hidden_where_one_row_is_for_all": lambda y, w, i, j: summed(hidden(y[:1], order(i)[0] >= EXPERTS)[order(i)[2]]),
    "hidden_by_elements": lambda y, w, i, j: summed(
        torch.where(order(i)[0][:, None] + torch.arange(N) >= EXPERTS, y.new_zeros(()), y)[order(i)[2]]
    ),
    "hidden_by_a_fraction": lambda y, w, i, j: summed(hidden(y, order(i)[0].float() >= 2.5)[order(i)[2]]),
    "hidden_by_another_sort": lambda y, w, i, j: summed(hidden(y, order(j)[0] >= EXPERTS)[order(i)[2]]),
    "hidden_in_the_tokens_order": lambda y, w, i, j: summed(hidden(y[order(i)[2]], i.view(-1) >= EXPERTS)),
    "hidden_by_unsorted": lambda y, w, i, j: summed(hidden(y, i.view(-1) >= EXPERTS)[order(i)[2]]),
    "hidden_columns": lambda y, w, i, j: summed(torch.where(i[:1] >= EXPERTS, y.new_zeros(()), y)[order(i)[2]]),
    "filled_with_ones": lambda y, w, i, j: summed(hidden(y, order(i)[0] >= EXPERTS, 1.0)[order(i)[2]]),
    "hidden_twice": lambda y, w, i, j: summed(hidden(hidden(y, order(i)[0] >= EXPERTS)[order(i)[2]], j.view(-1) >= EXPERTS)),
    "hidden_descending": lambda y, w, i, j: summed(hidden(y, backwards(i)[0] >= EXPERTS)[torch.argsort(backwards(i)[1])]),
    "columns_gathered": lambda y, w, i, j: summed(y.view(N, ROWS)[:, order(i)[2]]),
    "selected": lambda y, w, i, j: summed(torch.index_select(y, 0, order(i)[2])),
    "columns_selected": lambda y, w, i, j: summed(torch.index_select(y.view(N, ROWS), 1, order(i)[2])),
    "gathered_by_rows_and_columns": lambda y, w, i, j: y[i[0], j].view(2, N // 2, N).sum(1),
    "gathered_from_a_vector": lambda y, w, i, j: summed(y.view(-1)[order(i)[2].view(ROWS, 1) + torch.arange(N)]),
    "some_columns_gathered": lambda y, w, i, j: y[:N, i[0]].view(2, N // 2, N).sum(1),
    "in_four_dimensions": lambda y, w, i, j: y[order(i)[2]].view(4, 2, N, N).sum(1),
    "gathered_by_two": lambda y, w, i, j: y.view(N, N, N)[i, j].sum(1),
    "turned": lambda y, w, i, j: y[order(i)[2]].view(N, N, N).transpose(0, 1).sum(1),
    "halves_of_rows": lambda y, w, i, j: y[order(i)[2]].view(N, 2 * N, N // 2).sum(1),
    "over_tokens": lambda y, w, i, j: y[order(i)[2]].view(N, N, N).sum(0),
    "over_all": lambda y, w, i, j: y[order(i)[2]].view(N, N, N).sum((0, 1)),
    "kept_dimension": lambda y, w, i, j: y[order(i)[2]].view(N, N, N).sum(1, keepdim=True),
    "in_fp32": lambda y, w, i, j: y[order(i)[2]].view(N, N, N).sum(1, dtype=torch.float32),
    "in_fp64": lambda y, w, i, j: summed(y.float()[order(i)[2]]).double(),
    "as_integers": lambda y, w, i, j: summed(y[order(i)[2]].int()),
    "from_integers": lambda y, w, i, j: summed(i.view(ROWS, 1).expand(-1, N).contiguous().float()[order(i)[2]]),
    "in_fp32_and_bf16": lambda y, w, i, j: ((found := summed(y.float()[order(i)[2]])).bfloat16(), found * 2),
    "mean": lambda y, w, i, j: y[order(i)[2]].view(N, N, N).mean(1),
    "largest": lambda y, w, i, j: y[order(i)[2]].view(N, N, N).amax(1),
}


#: What is no weighted sum of rows that were gathered. All others are, though what is nearly a weight may be part of the rows.
NOT_COMBINED = {
    *("weights_of_tokens", "weights_of_places", "weights_in_fp64", "weights_twice", "divided_by_weights", "plus_weights"),
    *("columns_gathered", "columns_selected", "some_columns_gathered", "gathered_by_rows_and_columns", "gathered_by_two"),
    *("gathered_from_a_vector", "in_four_dimensions", "turned", "halves_of_rows", "over_tokens", "over_all", "kept_dimension"),
    *("in_fp32", "as_integers", "from_integers", "mean", "largest"),
}


@pytest.mark.parametrize("name", list(COMBINED))
def test_rows_of_experts_are_combined_as_eager_does(name: str) -> None:
    check("moe_combine", COMBINED[name], *routed(), count=name not in NOT_COMBINED)


def test_a_sum_that_is_rounded_before_it_is_converted_stays_rounded() -> None:
    """Of whole numbers, which fp32 adds up as they are, whatever the order."""
    y, _, ids, _ = routed()
    found = check("moe_combine", lambda y, i: summed(y[order(i)[2]]).float(), (y * 100).round(), ids, count=1)
    assert [each.differing for each in found.checks if each.rule == "moe_combine"] == [0]


def test_a_row_for_each_place_that_is_true() -> None:
    def chosen(y: Any, here: Any) -> Any:
        return y[here].view(-1, 2, N).sum(1)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check("moe_combine", chosen, routed()[0], torch.arange(ROWS) % 2 == 0, count=0)


def test_as_many_rows_of_a_token_as_there_happen_to_be_are_a_near_miss() -> None:
    def of_any_number(y: Any, places: Any) -> Any:
        return y[places.view(-1)].view(*places.shape, y.shape[1]).sum(1)

    y, _, ids, _ = routed()
    found = check("moe_combine", of_any_number, y, ids[:4], count=0, dynamic=True)
    assert reasons(found, "moe_combine") == ["rows of a token"]


# ---- rows that are hidden from grouped products ------------------------------------------------------------------------


#: As many rows as columns, of which 6 are of the 4 experts here: fewer than half, so that half the rows could hold them.
SQUARE, HERE, LOCAL = 16, 6, 4
IDS = torch.tensor([5, 0, 4, 1, 4, 3, 5, 1, 4, 4, 0, 4, 5, 3, 4, 5])


def ends(ids: Any, experts: int = LOCAL) -> Any:
    return torch.cumsum(torch.histc(ids.float(), experts, 0, experts - 1), 0, dtype=torch.int32)


def times(rows: Any, w: Any, s: Any) -> Any:
    """The product's rows that are written: those of experts here."""
    return torch._grouped_mm(rows, w, offs=ends(s))[:HERE]


def masked(x: Any, s: Any) -> Any:
    return torch.where((s >= LOCAL).unsqueeze(-1), x.new_zeros(()), x)


def combined(rows: Any, ids: Any, perm: Any, experts: int = LOCAL, weights: Any = None) -> Any:
    given = (None if each is None else each.view(-1, 1) for each in (weights, torch.argsort(perm), ids))
    return torch.ops.inductor_ext.moe_combine(rows, *given, experts, torch.bfloat16)


def parts(rows: Any) -> Any:
    return rows.view(SQUARE, 4, 4)


#: What is made of masked rows m (x where they are of experts here), of sorted ids s and their permutation p.
UNREAD: dict[str, Callable[..., Any]] = {
    "as_they_are": lambda m, w, s, p, ids, x: times(m, w, s),
    "columns_turned": lambda m, w, s, p, ids, x: times(parts(m).transpose(1, 2).reshape(SQUARE, SQUARE), w, s),
    "by_their_own_largest": lambda m, w, s, p, ids, x: times(m / m.abs().amax(-1, keepdim=True), w, s),
    "in_fp32_for_a_while": lambda m, w, s, p, ids, x: times((m.float() / 3).bfloat16(), w, s),
    "rounded_to_mxfp8": lambda m, w, s, p, ids, x: times(
        torch.ops.inductor_ext.mxfp8_round((m[:, None] * x.new_ones(2, 1)).view(SQUARE, 32), "rceil")[:, 8:24], w, s
    ),
    "ends_of_ids_not_sorted": lambda m, w, s, p, ids, x: times(m, w, ids),
    "combined": lambda m, w, s, p, ids, x: combined(m, ids, p),
    "combined_and_multiplied": lambda m, w, s, p, ids, x: (combined(m, ids, p), times(m, w, s)),
    "combined_of_fewer_experts": lambda m, w, s, p, ids, x: combined(m, ids, p, LOCAL - 1),
}

A_ROW_IS_READ, NOT_SORTED = "a masked row is read", "the ids of the mask are not sorted"
READ: dict[str, tuple[str, Callable[..., Any]]] = {
    "combined_of_more_experts": (A_ROW_IS_READ, lambda m, w, s, p, ids, x: combined(m, ids, p, LOCAL + 1)),
    "combined_of_other_ids": (A_ROW_IS_READ, lambda m, w, s, p, ids, x: combined(m, ids.flip(0), p)),
    "combined_whole": (
        A_ROW_IS_READ,
        lambda m, w, s, p, ids, x: torch.ops.inductor_ext.moe_combine(m, None, p.view(-1, 1), None, 0, torch.bfloat16),
    ),
    "ends_of_columns": (A_ROW_IS_READ, lambda m, w, s, p, ids, x: (times(m, w, s), torch._grouped_mm(m, x, offs=ends(s)))),
    "later_rows": (A_ROW_IS_READ, lambda m, w, s, p, ids, x: (times(m, w, s), times(m[HERE - 2 :], w, s))),
    "rows_backwards": (A_ROW_IS_READ, lambda m, w, s, p, ids, x: (times(m, w, s), times(m.flip(0), w, s))),
    "rows_in_pairs": (A_ROW_IS_READ, lambda m, w, s, p, ids, x: (times(m, w, s), times(m.view(8, 32)[:, 8:24], w, s))),
    "sorted_rows": (A_ROW_IS_READ, lambda m, w, s, p, ids, x: (times(m, w, s), torch.sort(m, 0)[0])),
    "returned": (A_ROW_IS_READ, lambda m, w, s, p, ids, x: (times(m, w, s), m)),
    "turned": (A_ROW_IS_READ, lambda m, w, s, p, ids, x: (times(m, w, s), times(m.t().contiguous(), w, s))),
    "sorted_backwards": (NOT_SORTED, lambda m, w, s, p, ids, x: times(masked(x, backwards(ids)[0]), w, ids)),
    "sorted_in_parts": (
        NOT_SORTED,
        lambda m, w, s, p, ids, x: times(masked(x, torch.sort(ids.view(4, 4))[0].view(-1)), w, ids),
    ),
    "by_the_permutation": (NOT_SORTED, lambda m, w, s, p, ids, x: times(masked(x, p), w, ids)),
    "by_the_largest_of_all": (A_ROW_IS_READ, lambda m, w, s, p, ids, x: (times(m, w, s), times(m / m.amax(), w, s))),
    "by_the_largest_of_columns": (
        A_ROW_IS_READ,
        lambda m, w, s, p, ids, x: (times(m, w, s), times(m - m.amin(0).unsqueeze(-1), w, s)),
    ),
    "the_last_row_in_all": (
        A_ROW_IS_READ,
        lambda m, w, s, p, ids, x: (times(m, w, s), times((m + x[:, :1, None])[:, -1], w, s)),
    ),
}


def with_masked(fn: Callable[..., Any]) -> Callable[..., Any]:
    def whole(x: Any, w: Any, ids: Any) -> Any:
        s, p = torch.sort(ids)
        return fn(masked(x, s), w, s, p, ids, x)

    return whole


def rows_and_weights() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    x, w = (torch.randn(shape, generator=generator) for shape in ((SQUARE, SQUARE), (LOCAL, SQUARE, SQUARE)))
    return x.bfloat16(), w.bfloat16(), IDS


@pytest.mark.parametrize("name", list(UNREAD))
def test_a_mask_that_nothing_reads_goes(name: str) -> None:
    check("moe_masks", with_masked(UNREAD[name]), *rows_and_weights(), count=1)


@pytest.mark.parametrize("name", list(READ))
def test_a_mask_that_something_reads_stays(name: str) -> None:
    reason, fn = READ[name]
    refused("moe_masks", with_masked(fn), *rows_and_weights(), reason=reason)


def test_a_mask_of_anything_else_is_no_near_miss() -> None:
    found = check("moe_masks", with_masked(lambda m, w, s, p, ids, x: m * 2), *rows_and_weights(), count=0)
    assert reasons(found, "moe_masks") == []


def test_one_row_of_a_sum_over_everything_is_not_looked_into() -> None:
    def by_their_sum(x: Any, w: Any, ids: Any) -> Any:
        s = torch.sort(ids)[0]
        m = masked(x, s)
        return torch._grouped_mm(m / m.sum(None, keepdim=True), w, offs=ends(s))

    x, w, ids = rows_and_weights()
    refused("moe_masks", by_their_sum, x[:1], w, ids[1:2], reason=A_ROW_IS_READ)


def test_a_weight_of_the_combined_may_be_a_masked_row() -> None:
    """Weights are in the tokens' order, and so a token that is here may be weighted by a row that is not."""

    def by_themselves(x: Any, ids: Any) -> Any:
        s, p = torch.sort(ids)
        m = masked(x, s)
        return combined(m, ids, p), combined(m, ids, p, weights=m)

    refused("moe_masks", by_themselves, rows_and_weights()[0][:, :1], IDS, reason=A_ROW_IS_READ)


def test_a_mask_of_rows_in_two_dimensions_stays() -> None:
    """The first of each pair of rows: the product reads 6 of those, and the ends count pairs' other rows too."""

    def pairs(x: Any, w: Any, ids: Any) -> Any:
        s = torch.sort(ids)[0]
        return times(masked(x.view(8, 2, 16), s.view(8, 2))[:, 0], w, s)

    check("moe_masks", pairs, *rows_and_weights(), count=0)
