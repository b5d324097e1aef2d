"""Weights that are dequantised and products that are scaled in nearly the way of MXFP8: the values are those of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.nearly import BF16, E4, E5, check, reasons, refused

RULE = "mxfp8_grouped_mm"
NOT_QUANTISED, SCALES = "the weight is not quantised", "the weight's scales"

#: As many experts as rows of a weight, so that only their places tell them apart.
E, N, K, T = 16, 16, 64, 20
OFFS = torch.arange(1, E + 1, dtype=torch.int32)


def codes(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(E4)


def scales(*shape: int) -> torch.Tensor:
    """Bytes of e8m0 from 2^-9 to 1, and a NaN."""
    found = torch.randint(118, 128, shape, generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    found.view(-1)[7] = 255
    return found


def rows(k: int = K) -> torch.Tensor:
    return torch.randn(T, k, generator=torch.Generator().manual_seed(3)).bfloat16()


def shifted(s: Any) -> Any:
    return s.to(torch.int16) << 7


def power(s: Any) -> Any:
    return torch.where((s == 0) | (s == 255), (t := shifted(s)) | 64, t).view(BF16)


def weight(data: Any, powers: Any) -> Any:
    return (data.to(BF16).view(*powers.shape, -1) * powers.unsqueeze(-1)).view(data.shape)


def product(x: Any, w: Any, offs: Any) -> Any:
    """Its rows that are of an expert."""
    return torch._grouped_mm(x, w.mT, offs)[: offs.shape[0]]


# ---- the scales' bytes -------------------------------------------------------------------------------------------------

POWERS: dict[str, Callable[..., Any]] = {
    "without_edges": lambda s: shifted(s).view(BF16),
    "edges_at_once": lambda s: torch.where((s == 0) & (s == 255), (t := shifted(s)) | 64, t).view(BF16),
    "one_edge": lambda s: torch.where((s == 255) | (s == 255), (t := shifted(s)) | 64, t).view(BF16),
    "edges_of_others": lambda s: torch.where((s.flip(0) == 0) | (s == 255), (t := shifted(s)) | 64, t).view(BF16),
    "no_edges": lambda s: torch.where((s != 0) | (s == 255), (t := shifted(s)) | 64, t).view(BF16),
    "an_edge_given": lambda s: torch.where(s > 127, (t := shifted(s)) | 64, t).view(BF16),
    "without_the_bit": lambda s: torch.where((s == 0) | (s == 255), (t := shifted(s)) & 64, t).view(BF16),
    "another_bit": lambda s: torch.where((s == 0) | (s == 255), (t := shifted(s)) | 32, t).view(BF16),
    "seven_times": lambda s: torch.where((s == 0) | (s == 255), (t := s.to(torch.int16) * 7) | 64, t).view(BF16),
    "shifted_less": lambda s: torch.where((s == 0) | (s == 255), (t := s.to(torch.int16) << 6) | 64, t).view(BF16),
    "as_they_are": lambda s: torch.where((s == 0) | (s == 255), (t := shifted(s)) | 64, t),
    "converted": lambda s: torch.where((s == 0) | (s == 255), (t := shifted(s)) | 64, t).to(BF16),
    "of_long_numbers": lambda s: power(s.long()),
    "a_float": lambda s: s.to(BF16),
}


@pytest.mark.parametrize("name", list(POWERS))
def test_what_is_no_power_of_two(name: str) -> None:
    def fn(x: Any, data: Any, s: Any, offs: Any) -> Any:
        return product(x, weight(data, POWERS[name](s)), offs)

    refused(RULE, fn, rows(), codes(E, N, K), scales(E, N, K // 32), OFFS, reason=NOT_QUANTISED)


# ---- where data and scales lie -----------------------------------------------------------------------------------------


def tiles(s: Any, order: tuple[int, ...] = (0, 1, 4, 3, 2, 5), inner: tuple[int, ...] = (32, 4, 4)) -> Any:
    """[E, bytes of one tile of 128 x 4 along K, and as many as fit along N] as plain scales."""
    in_tiles = s.view(s.shape[0], -1, 1, *inner).permute(order)
    return in_tiles.reshape(s.shape[0], -1, 4)


#: x, data, scale bytes, and the weight of both.
WEIGHTS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], Callable[..., Any]]] = {
    "plain": ("", (E, N, K), (E, N, 2), lambda d, s: weight(d, power(s))),
    "scales_in_a_row": ("", (E, N, K), (E, N * 2), lambda d, s: weight(d, power(s.view(E, N, 2)))),
    "in_tiles": ("", (E, N, 128), (E, 512), lambda d, s: weight(d, power(tiles(s)[:, :N]))),
    "turned": (NOT_QUANTISED, (N, E, K), (N, E, 2), lambda d, s: weight(d, power(s)).transpose(0, 1)),
    "data_of_two_dimensions": (
        "the weight's data does not lie as [E, N, K]",
        (E * N, K),
        (E * N, 2),
        lambda d, s: weight(d, power(s)).view(E, N, K),
    ),
    "data_by_columns": (
        "the weight's data does not lie as [E, N, K]",
        (E, K, N),
        (E, N, 2),
        lambda d, s: (d.mT.to(BF16).unflatten(-1, (-1, 32)) * power(s).unsqueeze(-1)).view(E, N, K),
    ),
    "scales_by_columns": (SCALES, (E, N, K), (E, 2, N), lambda d, s: weight(d, power(s.mT))),
    "blocks_of_16": (SCALES, (E, N, K), (E, N, 4), lambda d, s: weight(d, power(s))),
    "every_second_scale": (SCALES, (E, N, K), (E, N, 2), lambda d, s: weight(d, power(s[..., ::2]))),
    "every_fourth_of_three": (SCALES, (E, N, 96), (E, N, 3), lambda d, s: weight(d, power(s[..., ::4]))),
    "every_fourth_row": (SCALES, (E, 128, 512), (E, 2048), lambda d, s: weight(d, power(tiles(s)[:, ::4]))),
    "halves_of_the_block": (
        SCALES,
        (1, N, K),
        (1, N, 2),
        lambda d, s: (d.to(BF16).view(2, N, 2, 16) * power(s).unsqueeze(-1)).view(1, N, K),
    ),
}

#: Nearly tiles: whatever their order was, what is made of them is a plain scale, if the copy lies so.
COPIED: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[..., Any]]] = {
    "in_another_order": ((E, 128, 128), (E, 512), lambda s: tiles(s, (0, 1, 3, 4, 2, 5))),
    "of_other_sizes": ((E, 128, 128), (E, 512), lambda s: tiles(s, inner=(16, 8, 4))),
    "in_other_rows": (
        (E, 128, 256),
        (E, 1024),
        lambda s: s.view(E, 2, 1, 32, 4, 4).permute(0, 1, 4, 3, 2, 5).reshape(E, 128, 8),
    ),
}


def weighed(data: tuple[int, ...], s: tuple[int, ...], fn: Callable[..., Any]) -> tuple[Any, ...]:
    def whole(x: Any, data: Any, s: Any, offs: Any) -> Any:
        return product(x, fn(data, s), offs)

    k, experts = data[-1] if fn is not WEIGHTS["data_by_columns"][-1] else K, 1 if data[0] == 1 else E
    return whole, rows(k), codes(*data), scales(*s), OFFS[:experts]


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_where_a_weight_lies(name: str) -> None:
    reason, *rest = WEIGHTS[name]
    if reason:
        refused(RULE, *weighed(*rest), reason=reason)
    else:
        check(RULE, *weighed(*rest), count=1)


@pytest.mark.parametrize("name", list(COPIED))
def test_what_is_copied_in_another_order_is_no_tile(name: str) -> None:
    data, s, fn = COPIED[name]
    found = check(RULE, *weighed(data, s, lambda d, s: weight(d, power(fn(s)))), count=1)
    assert ["plain scales" in event.detail for graph in found.graphs for event in graph.rewrites] == [True]


def test_a_weight_of_any_size_is_a_near_miss() -> None:
    found = check(RULE, lambda x, d, s, o: product(x, weight(d, power(s)), o), rows(), codes(E, N, K), scales(E, N, 2), OFFS,
                  count=0, dynamic=True)  # fmt: skip
    assert reasons(found, RULE) == ["E, N or K is symbolic"]


def test_columns_in_groups_are_a_near_miss() -> None:
    ends = torch.tensor([16, 48, K], dtype=torch.int32)
    refused(RULE, lambda x, o: torch._grouped_mm(x, x.mT, o), rows(), ends, reason="what the groups divide")


# ---- a scale of each row -----------------------------------------------------------------------------------------------

#: What is made of a product p of FP8 rows, s [T, 1] being their scales; whether the op takes both.
SCALED: dict[str, tuple[bool, Callable[..., Any]]] = {
    "in_fp32": (True, lambda p, s: (p.float() * s).bfloat16()),
    "mixed": (True, lambda p, s: (p * s).bfloat16()),
    "from_the_left": (True, lambda p, s: (s * p.float()).bfloat16()),
    "product_is_read": (False, lambda p, s: ((p * s).bfloat16(), p)),
    "convert_is_read": (False, lambda p, s: ((p.float() * s).bfloat16(), p.float() + 1)),
    "scaled_is_read": (False, lambda p, s: ((q := p.float() * s).bfloat16(), q + 1)),
    "number": (False, lambda p, s: (p.float() * 2.0).bfloat16()),
    "square": (False, lambda p, s: ((q := p.float()) * q).bfloat16()),
    "not_rounded": (False, lambda p, s: torch.sin(p.float() * s)),
    "to_fp16": (False, lambda p, s: (p.float() * s).half()),
    "by_fp64": (False, lambda p, s: (p.double() * s).bfloat16()),
    "by_bf16": (False, lambda p, s: (p.float() * s.bfloat16()).bfloat16()),
    "by_one_number": (False, lambda p, s: (p.float() * s[0, 0]).bfloat16()),
    "by_one_row": (False, lambda p, s: (p.float() * s[:1]).bfloat16()),
    "by_columns": (False, lambda p, s: (p.float() * s[:N, 0]).bfloat16()),
    "by_elements": (False, lambda p, s: (p.float() * (s + torch.arange(N))).bfloat16()),
    "divided": (False, lambda p, s: (p.float() / s).bfloat16()),
    "of_one_argument": (False, lambda p, s: torch.relu(p)),
}


def scaled(fn: Callable[..., Any], q: torch.Tensor, in_fp8: bool) -> None:
    def whole(q: Any, s: Any, data: Any, t: Any, offs: Any) -> Any:
        return fn(torch._grouped_mm(q.to(BF16), weight(data, power(t)).mT, offs), s)

    s = torch.linspace(0.5, 2.0, T)[:, None]
    offs = OFFS.clone()
    offs[-1] = T  # every row is an expert's
    found = check(RULE, whole, q, s, codes(E, N, K), scales(E, N, K // 32).clamp(max=127), offs, count=1)
    (graph,) = found.graphs
    details = [event.detail for event in graph.rewrites if event.rule == RULE]
    assert [f"x {'float8_e4m3fn' if in_fp8 else 'bfloat16'}" in each for each in details] == [True], details
    assert "aten._grouped_mm" not in graph.after, "it is computed once"


@pytest.mark.parametrize("name", list(SCALED))
def test_a_scale_of_each_row(name: str) -> None:
    in_fp8, fn = SCALED[name]
    scaled(fn, codes(T, K), in_fp8)


@pytest.mark.parametrize("dtype", [torch.float32, E5], ids=str)
def test_rows_that_are_not_e4m3_are_no_data(dtype: torch.dtype) -> None:
    scaled(SCALED["in_fp32"][1], rows().to(dtype), False)
