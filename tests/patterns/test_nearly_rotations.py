"""What is nearly a rotation by halves of heads: refused, or the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import inductor_ext
from tests.support.nearly import BF16, HALF, N, check, heads, refused, rotated, table

# ---- rotations -------------------------------------------------------------------------------------------------------


def turned(turn: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda x, cos, sin: x * cos + turn(x) * sin


def split_at(x: Any, low: int, dim: int = -1) -> Any:
    return x.split([low, N - low], dim)


NEARLY_ROTATED: dict[str, Callable[..., Any]] = {
    "sine_twice": lambda x, cos, sin: torch.add(x * cos, turn_half(x) * sin, alpha=2),
    "difference": lambda x, cos, sin: x * cos - turn_half(x) * sin,
    "divided_by_cos": lambda x, cos, sin: x / cos + turn_half(x) * sin,
    "divided_by_sin": lambda x, cos, sin: x * cos + turn_half(x) / sin,
    "cos_of_another": lambda x, cos, sin: x.flip(-1) * cos + turn_half(x) * sin,
    "three_parts": turned(lambda x: torch.cat((-x[..., HALF:], x[..., :2], x[..., 2:HALF]), -1)),
    "high_of_another": turned(lambda x: torch.cat((-x.flip(0)[..., HALF:], x[..., :HALF]), -1)),
    "low_of_another": turned(lambda x: torch.cat((-x[..., HALF:], x.flip(0)[..., :HALF]), -1)),
    "high_from_the_middle": turned(lambda x: torch.cat((-x[..., 2:6], x[..., :HALF]), -1)),
    "low_from_the_middle": turned(lambda x: torch.cat((-x[..., HALF:], x[..., 2:6]), -1)),
    "high_twice": turned(lambda x: torch.cat((-x[..., HALF:], x[..., HALF:]), -1)),
    "low_twice": turned(lambda x: torch.cat((-x[..., :HALF], x[..., :HALF]), -1)),
    "nothing_turned": turned(lambda x: torch.cat((-x[..., :HALF], x[..., HALF:]), -1)),
    "other_sign": turned(lambda x: torch.cat((x[..., HALF:], -x[..., :HALF]), -1)),
    "both_signs": turned(lambda x: torch.cat((-x[..., HALF:], -x[..., :HALF]), -1)),
    "positions": turned(lambda x: torch.cat((-x[..., HALF:, :], x[..., :HALF, :]), -2)),
    "joined_along_positions": turned(lambda x: torch.cat((-x[..., HALF:], x[..., :HALF]), -2).reshape(x.shape)),
    "halves_of_positions": turned(lambda x: torch.cat((-x[..., HALF:, :], x[..., :HALF, :]), -1).reshape(x.shape)),
    "uneven_split": turned(lambda x: (lambda low, high: torch.cat((-high, low), -1))(*split_at(x, 3))),
    "split_not_turned": turned(lambda x: (lambda low, high: torch.cat((-low, high), -1))(*split_at(x, HALF))),
    "split_of_positions": turned(lambda x: (lambda low, high: torch.cat((-high, low), -2))(*split_at(x, HALF, -2))),
    "interleaved": turned(lambda x: torch.cat((-x[..., 1::2], x[..., ::2]), -1)),
}


def turn_half(x: Any) -> Any:
    return torch.cat((-x[..., HALF:], x[..., :HALF]), -1)


@pytest.mark.parametrize("name", list(NEARLY_ROTATED))
def test_what_is_nearly_a_rotation_is_none(name: str) -> None:
    check("qk_norm_rope", NEARLY_ROTATED[name], heads(), table(1, 1, N, N), table(1, 1, N, N).abs() + 0.5, count=0)


#: Shapes of x, cos and sin, and how many rotations the op takes of it.
TABLES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]] = {
    "of_all": ((N, N, N, N), (1, 1, N, N), (1, 1, N, N), 1),
    "of_each_sequence": ((N, N, N, N), (N, 1, N, N), (N, 1, N, N), 1),
    "heads_last": ((N, N, N, N), (1, N, 1, N), (1, N, 1, N), 1),
    "of_tokens": ((N, N, N), (N, 1, N), (N, 1, N), 1),
    "of_every_head": ((N, N, N, N), (1, N, N, N), (1, N, N, N), 0),
    "sin_of_every_head": ((N, N, N, N), (1, 1, N, N), (1, N, N, N), 0),
    "cos_of_every_head": ((N, N, N, N), (1, N, N, N), (1, 1, N, N), 0),
    "of_two_layouts": ((N, N, N, N), (1, 1, N, N), (1, N, 1, N), 0),
    "sin_of_each_sequence": ((N, N, N, N), (1, 1, N, N), (N, 1, N, N), 0),
    "of_no_column": ((N, N, N, N), (1, 1, N, 1), (1, 1, N, 1), 0),
    "of_no_position": ((N, N, N, N), (1, 1, 1, N), (1, 1, 1, N), 0),
    "of_more_sequences": ((1, N, N, N), (N, 1, N, N), (N, 1, N, N), 0),
    "of_more_positions": ((N, N, 1, N), (1, 1, N, N), (1, 1, N, N), 0),
    "of_more_heads": ((N, 1, N, N), (1, N, N, N), (1, N, N, N), 0),
    "of_more_dimensions": ((N, N, N), (1, N, N, N), (1, N, N, N), 0),
    "of_rows": ((N, N), (N, N), (N, N), 0),
    "of_five_dimensions": ((2, 2, N, N, N), (1, 1, 1, N, N), (1, 1, 1, N, N), 0),
}


@pytest.mark.parametrize("name", list(TABLES))
def test_tables_of_positions_for_all_heads(name: str) -> None:
    x, cos, sin, count = TABLES[name]
    heads_first = len(x) == 4 and name != "heads_last"
    given = heads(*x) if heads_first else table(*x).transpose(0, 1) if name == "of_more_dimensions" else table(*x)
    check("qk_norm_rope", rotated, given, table(*cos), table(*sin), count=count)


@pytest.mark.parametrize(("shape", "at"), [((1, N, N), 1), ((N, 1, N), 0), ((1, N, N), 0), ((N, N, N), 2)])
def test_tables_that_are_given_a_dimension(shape: tuple[int, ...], at: int) -> None:
    fn = lambda x, cos, sin: rotated(x, cos.unsqueeze(at), sin.unsqueeze(at))  # noqa: E731
    heads_first = (shape, at) not in (((N, 1, N), 0), ((N, N, N), 2))
    x = heads() if heads_first else heads().transpose(1, 2)
    check("qk_norm_rope", fn, x, table(*shape), table(*shape), count=1)


@pytest.mark.parametrize("columns", [7, 9])
def test_heads_of_an_odd_number_of_columns(columns: int) -> None:
    def other(x: Any, cos: Any, sin: Any) -> Any:
        half = columns // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    tables = (table(1, 1, N, columns) for _ in range(2))
    check("qk_norm_rope", other, heads(2, 3, N, columns), *tables, count=0)


@pytest.mark.parametrize(
    ("x", "cos", "sin"),
    [
        (BF16, torch.float32, BF16),
        (BF16, BF16, torch.float32),
        (BF16, torch.float16, torch.float16),
        (torch.float32, BF16, BF16),
        (torch.float32, torch.float64, torch.float64),
        (BF16, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_rotations_in_mixed_dtypes(x: torch.dtype, cos: torch.dtype, sin: torch.dtype) -> None:
    given = heads(2, 3, dtype=x), table(1, 1, N, N, dtype=cos), table(1, 1, N, N, dtype=sin)
    refused("qk_norm_rope", rotated, *given, reason="dtypes")


@pytest.mark.parametrize("end", ["read_wide_too", "of_another_dtype", "narrow"])
def test_rotations_in_fp32(end: str) -> None:
    def other(x: Any, cos: Any, sin: Any) -> Any:
        wide = rotated(x.float(), cos, sin)
        narrow = wide.to(torch.float16 if end == "of_another_dtype" else x.dtype)
        return (narrow, wide * 2) if end == "read_wide_too" else narrow

    given = heads(2, 3), table(1, 1, N, N, dtype=torch.float32), table(1, 1, N, N, dtype=torch.float32)
    check("qk_norm_rope", other, *given, count=1)


def test_a_rotation_behind_what_is_nearly_a_norm() -> None:
    def other(x: Any, cos: Any, sin: Any, w: Any, eps: Any) -> Any:
        h = x.float()
        return rotated(w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype), cos, sin)

    given = heads(), table(1, 1, N, N), table(1, 1, N, N), torch.rand(N).bfloat16(), torch.tensor(1e-6)
    refused("qk_norm_rope", other, *given, reason="eps is not a constant of the graph")


@pytest.mark.parametrize("permuted", ["heads", "columns", "positions"])
def test_rotations_of_permuted_rows(permuted: str) -> None:
    dims = {"heads": (0, 2, 1, 3), "columns": (0, 1, 3, 2), "positions": (2, 1, 0, 3)}[permuted]
    fn = lambda x, cos, sin: rotated(x.permute(dims), cos, sin)  # noqa: E731
    found = inductor_ext.verify(
        fn, heads(), table(1, 1, N, N), table(1, 1, N, N), rules={"qk_norm_rope": "always"}, end_to_end=False
    )
    assert found.differs == []


def test_a_rotation_of_what_was_rounded() -> None:
    fn = lambda x, cos, sin: rotated(x.bfloat16(), cos, sin)  # noqa: E731
    check("qk_norm_rope", fn, heads(dtype=torch.float32), table(1, 1, N, N), table(1, 1, N, N), count=1)


def test_a_rotation_by_one_number() -> None:
    check("qk_norm_rope", lambda x, cos: x * cos + turn_half(x) * 0.5, heads(), table(1, 1, N, N), count=0)


def test_heads_of_a_symbolic_number_of_columns() -> None:
    def other(x: Any, cos: Any, sin: Any) -> Any:
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    given = heads(2, 3, 5, 16), table(1, 1, 5, 16), table(1, 1, 5, 16)
    check("qk_norm_rope", other, *given, count=0, dynamic=True)
