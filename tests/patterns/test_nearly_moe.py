"""Rows of experts that are weighted, hidden and summed in nearly the way the kernel does: the values are those of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import inductor_ext
from tests.support.nearly import N

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


def weighted(y: Any, w: Any, perm: Any, inverse: Any) -> Any:
    return summed((y * w.view(-1)[perm].unsqueeze(-1))[inverse])


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
    "places_by_scatter": lambda y, w, i, j: weighted(y, w, p := order(i)[1], scattered(p)),
    "places_by_sorting": lambda y, w, i, j: weighted(y, w, p := order(i)[1], torch.argsort(p)),
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
    "gathered_by_two": lambda y, w, i, j: y.view(N, N, N)[i, j].sum(1),
    "turned": lambda y, w, i, j: y[order(i)[2]].view(N, N, N).transpose(0, 1).sum(1),
    "halves_of_rows": lambda y, w, i, j: y[order(i)[2]].view(N, 2 * N, N // 2).sum(1),
    "over_tokens": lambda y, w, i, j: y[order(i)[2]].view(N, N, N).sum(0),
    "over_all": lambda y, w, i, j: y[order(i)[2]].view(N, N, N).sum((0, 1)),
    "kept_dimension": lambda y, w, i, j: y[order(i)[2]].view(N, N, N).sum(1, keepdim=True),
    "in_fp32": lambda y, w, i, j: y[order(i)[2]].view(N, N, N).sum(1, dtype=torch.float32),
    "mean": lambda y, w, i, j: y[order(i)[2]].view(N, N, N).mean(1),
    "largest": lambda y, w, i, j: y[order(i)[2]].view(N, N, N).amax(1),
}


@pytest.mark.parametrize("name", list(COMBINED))
def test_rows_of_experts_are_combined_as_eager_does(name: str) -> None:
    """Taken or refused: the values are eager's in either case."""
    found = inductor_ext.verify(COMBINED[name], *routed(), rules={"moe_combine": "always"}, end_to_end=False)
    assert found.differs == []
    counts = [graph.counts().get("moe_combine", 0) for graph in found.graphs]
    assert sum(counts) or name not in ("weights", "hidden", "selected", "places_by_scatter", "places_by_sorting")
