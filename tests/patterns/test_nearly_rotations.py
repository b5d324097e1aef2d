"""What is nearly a rotation of heads: refused, or the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext.miss import Miss
from inductor_ext.patterns.support import rope
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


# ---- spellings of one rotation: of x [B, S, H, D], with tables of a number for each column, or for two of them -----------


def by_halves(x: Any, cos: Any, sin: Any) -> Any:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def by_pairs(x: Any, cos: Any, sin: Any) -> Any:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def halves(put: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, cos, sin: put(*x.chunk(2, -1), cos, sin)


def pairs(put: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, cos, sin: put(x[..., ::2], x[..., 1::2], cos, sin)


def cat(*parts: Any) -> Any:
    return torch.cat(parts, -1)


def woven(a: Any, b: Any) -> Any:
    return torch.stack((a, b), -1).flatten(-2)


#: And of how many columns the tables are.
SPELLED: dict[str, tuple[Callable[..., Any], int]] = {
    "halves": (by_halves, HALF),
    "operands_exchanged": (halves(lambda a, b, c, s: cat(c * a - s * b, s * a + c * b)), HALF),
    "negated_sum": (halves(lambda a, b, c, s: cat(-b * s + a * c, b * c + a * s)), HALF),
    "negated_sines": (halves(lambda a, b, c, s: cat(a * c + b * -s, b * c + a * s)), HALF),
    "tables_by_halves": (
        halves(lambda a, b, c, s: cat(a * c[..., :HALF] - b * s[..., :HALF], b * c[..., HALF:] + a * s[..., HALF:])),
        N,
    ),
    "three_parts": (turned(lambda x: torch.cat((-x[..., HALF:], x[..., :2], x[..., 2:HALF]), -1)), N),
    "negated_twice": (turned(lambda x: -torch.cat((x[..., HALF:], -x[..., :HALF]), -1)), N),
    "pairs": (by_pairs, HALF),
    "pairs_by_slices": (pairs(lambda a, b, c, s: woven(a * c - b * s, b * c + a * s)), HALF),
    "pairs_in_fours": (
        lambda x, c, s: by_pairs(x.unflatten(-1, (2, HALF)).flatten(-2), c, s),
        HALF,
    ),
    "pairs_turned": (turned(lambda x: woven(-x[..., 1::2], x[..., ::2])), N),
    "some_columns": (lambda x, c, s: cat(by_halves(x[..., :HALF], c, s), x[..., HALF:]), HALF // 2),
    "some_columns_in_one": (
        lambda x, c, s: (lambda a, b, rest: cat(a * c - b * s, b * c + a * s, rest))(*x.split([2, 2, HALF], -1)),
        HALF // 2,
    ),
    "some_pairs": (lambda x, c, s: cat(by_pairs(x[..., :HALF], c, s), x[..., HALF:]), HALF // 2),
    "some_columns_by_whole_tables": (lambda x, c, s: cat(rotated_halves(x[..., :HALF], c, s), x[..., HALF:]), HALF),
}


def rotated_halves(x: Any, cos: Any, sin: Any) -> Any:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def apart(columns: int, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, ...]:
    """x [B, S, H, D] and tables of so many columns."""
    return torch.randn(2, N, 3, N).to(BF16), *(table(1, N, 1, columns, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("name", list(SPELLED))
def test_spellings_of_a_rotation(name: str) -> None:
    fn, columns = SPELLED[name]
    found = check("qk_norm_rope", fn, *apart(columns), count=1)
    assert [each.differing for each in found.checks] == [0]


@pytest.mark.parametrize("cast", ["each_part", "the_whole", "not_at_all"])
@pytest.mark.parametrize("way", ["halves", "pairs", "some_columns"])
def test_spellings_in_fp32(way: str, cast: str) -> None:
    def fn(x: Any, cos: Any, sin: Any) -> Any:
        turning = x[..., :HALF] if way == "some_columns" else x
        a, b = turning.float().chunk(2, -1) if way != "pairs" else (x[..., ::2].float(), x[..., 1::2].float())
        parts = [a * cos - b * sin, b * cos + a * sin]
        if cast == "each_part":
            parts = [each.to(x.dtype) for each in parts]
        if way == "some_columns":
            parts.append(x[..., HALF:].to(parts[0].dtype))
        whole = woven(*parts) if way == "pairs" else cat(*parts)
        return whole.to(x.dtype) if cast == "the_whole" else whole

    found = check("qk_norm_rope", fn, *apart(HALF // 2 if way == "some_columns" else HALF, torch.float32), count=1)
    assert [each.differing for each in found.checks] == [0]


NEARLY_SPELLED: dict[str, tuple[Callable[..., Any], int]] = {
    "sum_in_the_low_half": (halves(lambda a, b, c, s: cat(a * c + b * s, b * c + a * s)), HALF),
    "difference_in_the_high_half": (halves(lambda a, b, c, s: cat(a * c - b * s, b * c - a * s)), HALF),
    "difference_exchanged": (halves(lambda a, b, c, s: cat(b * s - a * c, b * c + a * s)), HALF),
    "halves_exchanged": (halves(lambda a, b, c, s: cat(b * c + a * s, a * c - b * s)), HALF),
    "tables_exchanged_in_the_high_half": (halves(lambda a, b, c, s: cat(a * c - b * s, b * s + a * c)), HALF),
    "tables_exchanged_in_the_low_half": (halves(lambda a, b, c, s: cat(a * s - b * c, b * c + a * s)), HALF),
    "negated_cosines": (halves(lambda a, b, c, s: cat(a * -c - b * s, b * -c + a * s)), HALF),
    "negated_result": (halves(lambda a, b, c, s: cat(-(a * c - b * s), b * c + a * s)), HALF),
    "half_of_another": (
        lambda x, c, s: (lambda a, b: cat(a * c - b * s, b * c + a * s))(x[..., :HALF], x.flip(0)[..., HALF:]),
        HALF,
    ),
    "pairs_put_as_halves": (pairs(lambda a, b, c, s: cat(a * c - b * s, b * c + a * s)), HALF),
    "halves_put_as_pairs": (halves(lambda a, b, c, s: woven(a * c - b * s, b * c + a * s)), HALF),
    "tables_of_pairs_for_halves": (
        halves(lambda a, b, c, s: cat(a * c[..., ::2] - b * s[..., ::2], b * c[..., 1::2] + a * s[..., 1::2])),
        N,
    ),
    "cosines_of_the_low_half": (
        halves(lambda a, b, c, s: cat(a * c[..., :HALF] - b * s[..., :HALF], b * c[..., :HALF] + a * s[..., HALF:])),
        N,
    ),
    "the_last_columns": (lambda x, c, s: cat(x[..., HALF:], by_halves(x[..., :HALF], c, s)), HALF // 2),
    "the_others_exchanged": (lambda x, c, s: cat(by_halves(x[..., :HALF], c, s), x[..., 6:], x[..., HALF:6]), HALF // 2),
    "the_others_negated": (lambda x, c, s: cat(by_halves(x[..., :HALF], c, s), -x[..., HALF:]), HALF // 2),
    "the_others_of_another": (lambda x, c, s: cat(by_halves(x[..., :HALF], c, s), x.flip(0)[..., HALF:]), HALF // 2),
    "one_column_twice": (lambda x, c, s: cat(by_halves(x[..., :HALF], c, s), x[..., 3:7]), HALF // 2),
    "scaled": (halves(lambda a, b, c, s: cat(a * c - b * s, torch.add(b * c, a * s, alpha=2))), HALF),
    "divided": (halves(lambda a, b, c, s: cat(a * c - b / s, b * c + a * s)), HALF),
    "joined_along_heads": (halves(lambda a, b, c, s: torch.cat((a * c - b * s, b * c + a * s), -2).reshape(2, N, 3, N)), HALF),
}


@pytest.mark.parametrize("name", list(NEARLY_SPELLED))
def test_what_is_nearly_such_a_rotation(name: str) -> None:
    fn, columns = NEARLY_SPELLED[name]
    check("qk_norm_rope", fn, *apart(columns), count=0)


def test_sums_that_are_rounded_and_widened_again() -> None:
    """What is joined is fp32, but bf16 numbers: other ones than a rotation in fp32 has."""

    def fn(x: Any, cos: Any, sin: Any) -> Any:
        a, b = x.float().chunk(2, -1)
        return cat(*(each.bfloat16().float() for each in (a * cos - b * sin, b * cos + a * sin)))

    refused("qk_norm_rope", fn, *apart(HALF, torch.float32), reason="dtypes")


def test_products_of_two_dtypes() -> None:
    def fn(x: Any, cos: Any, sin: Any) -> Any:
        a, b = x.chunk(2, -1)
        return cat(a * cos - b * sin.float(), b * cos + a * sin.float())

    refused("qk_norm_rope", fn, *apart(HALF), reason="dtypes")


def test_rows_that_are_regrouped_between() -> None:
    """Tables broadcast over other rows than x has: what is one dimension's there may be another's here."""

    def fn(x: Any, cos: Any, sin: Any) -> Any:
        a, b = x.reshape(N, 2, 3, HALF, 2).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).reshape(x.shape)

    check("qk_norm_rope", fn, torch.randn(2, N, 3, N).to(BF16), *(table(1, 2, 1, HALF) for _ in range(2)), count=0)


@pytest.mark.parametrize("read", ["part", "sum", "product"])
def test_a_step_that_is_read_too(read: str) -> None:
    def fn(x: Any, cos: Any, sin: Any) -> Any:
        a, b = x.chunk(2, -1)
        product = a * cos
        low = product - b * sin
        return cat(low, b * cos + a * sin), {"part": b, "sum": low, "product": product}[read] * 2

    refused("qk_norm_rope", fn, *apart(HALF), reason="a step of the rotation has a second user")


def test_heads_first_are_refused_where_a_reader_would_copy_them() -> None:
    def fn(*given: Any) -> Any:
        return by_halves(*(each.transpose(1, 2) for each in given)).flatten(0, 1) @ given[0][0, 0].t()

    refused("qk_norm_rope", fn, *apart(HALF), reason="memory layout")


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
        (torch.float32, torch.float64, torch.float64),
        (BF16, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_rotations_in_mixed_dtypes(x: torch.dtype, cos: torch.dtype, sin: torch.dtype) -> None:
    given = heads(2, 3, dtype=x), table(1, 1, N, N, dtype=cos), table(1, 1, N, N, dtype=sin)
    refused("qk_norm_rope", rotated, *given, reason="dtypes")


@pytest.mark.parametrize(
    ("x", "tables"), [(BF16, torch.float16), (torch.float32, BF16), (torch.float16, torch.float32)], ids=str
)
def test_rotations_that_make_all_of_it_fp32(x: torch.dtype, tables: torch.dtype) -> None:
    given = heads(2, 3, dtype=x), table(1, 1, N, N, dtype=tables), table(1, 1, N, N, dtype=tables)
    check("qk_norm_rope", rotated, *given, count=1)


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


# ---- complex products ------------------------------------------------------------------------------------------------


def numbers(x: Any) -> Any:
    return torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))


def columns(number: Any, x: Any) -> Any:
    return torch.view_as_real(number).flatten(-2).type_as(x)


NEARLY_COMPLEX: dict[str, Callable[..., Any]] = {
    "quotient": lambda x, t: columns(numbers(x) / t, x),
    "sum": lambda x, t: columns(numbers(x) + t, x),
    "by_a_number": lambda x, t: columns(numbers(x) * 1j, x),
    "in_double": lambda x, t: torch.view_as_real(
        torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * t.to(torch.complex128)
    ).flatten(-2).type_as(x),
    "one_number_for_a_head": lambda x, t: columns(numbers(x) * t[..., :1], x),
    "numbers_of_each_head": lambda x, t: columns(numbers(x) * (t + torch.ones(N, N, N, HALF)), x),
    "of_two": lambda x, t: columns(
        torch.view_as_complex(torch.stack((x[..., ::2].float(), x.flip(0)[..., 1::2].float()), -1)) * t, x
    ),
    "columns_in_another_order": lambda x, t: columns(
        torch.view_as_complex(torch.stack((x[..., 1::2].float(), x[..., ::2].float()), -1)) * t, x
    ),
    "pairs_put_together_first": lambda x, t: columns(
        torch.view_as_complex(torch.stack((x[..., ::2].float(), x[..., 1::2].float()), -1)) * t, x
    ),
    "product_is_read": lambda x, t: (lambda p: (columns(p, x), p.real * 2))(numbers(x) * t),
    "numbers_are_read": lambda x, t: (lambda p: (columns(p * t, x), p.imag * 2))(numbers(x)),
    "real_is_read": lambda x, t: (lambda r: (r.flatten(-2).type_as(x), r[..., 0] * 2))(torch.view_as_real(numbers(x) * t)),
    "joined_beside_x": lambda x, t: torch.cat((columns(numbers(x) * t, x), x), -1),
    "flattened_with_heads": lambda x, t: torch.view_as_real(numbers(x.float()) * t).flatten(-3),
}


@pytest.mark.parametrize("name", list(NEARLY_COMPLEX))
def test_what_is_nearly_a_complex_rotation(name: str) -> None:
    angles = torch.randn(1, N, 1, HALF)
    check("qk_norm_rope", NEARLY_COMPLEX[name], heads().transpose(1, 2), torch.complex(angles.cos(), angles.sin()), count=0)


SPELLED_COMPLEX: dict[str, Callable[..., Any]] = {
    "table_first": lambda x, t: columns(t * numbers(x), x),
    "cast_before_it_is_flat": lambda x, t: torch.view_as_real(numbers(x) * t).type_as(x).flatten(-2),
    "left_in_fp32": lambda x, t: torch.view_as_real(numbers(x) * t).flatten(-2),
    "of_fp32": lambda x, t: torch.view_as_real(numbers(x.float() * 2) * t).flatten(-2),
    "heads_first": lambda x, t: columns(numbers(x.transpose(1, 2)) * t.transpose(1, 2), x).transpose(1, 2),
    "rounded_twice": lambda x, t: torch.view_as_real(numbers(x) * t).flatten(-2).half().type_as(x),
}


@pytest.mark.parametrize("name", list(SPELLED_COMPLEX))
def test_complex_rotations(name: str) -> None:
    angles = torch.randn(1, N, 1, HALF)
    check("qk_norm_rope", SPELLED_COMPLEX[name], heads().transpose(1, 2), torch.complex(angles.cos(), angles.sin()), count=1)


def test_a_conjugate_in_memory_is_no_table() -> None:
    """Inductor's graphs have copies of such; another pass may have left a view."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x, angles = heads(), torch.randn(1, N, 1, HALF)
    traced = make_fx(lambda x, t: columns(numbers(x) * t, x), tracing_mode="fake")(x, torch.complex(angles.cos(), angles.sin()))
    product = next(node for node in traced.graph.nodes if node.target is torch.ops.aten.mul.Tensor)
    with traced.graph.inserting_before(product):
        turned = traced.graph.call_function(torch.ops.aten._conj.default, (product.args[1],))
    turned.meta["val"] = product.args[1].meta["val"]
    product.args = product.args[0], turned
    (real,) = (node for node in traced.graph.nodes if node.target is torch.ops.aten.view_as_real.default)
    with pytest.raises(Miss, match="dtypes"):
        rope.trace(real)
