"""downcast_fp8, the KV-cache store: rows, padding, ranges, layouts; against a loop over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.equal import assert_same_bytes

E4, E5, U8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8
PROGRAM = "f32 div:s0 max:-448.0 min:448.0"
INDICES = pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)


def rows(tokens: int, heads: int = 2, dim: int = 8, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(tokens, heads, dim) * 90).to(dtype)


def cache(slots: int, heads: int = 2, dim: int = 8, dtype: torch.dtype = E4) -> torch.Tensor:
    return torch.randint(1, 120, (slots, heads, dim), dtype=U8).view(dtype)


def quantised(row: torch.Tensor, scale: Any, dtype: torch.dtype = E4) -> torch.Tensor:
    limit = torch.finfo(dtype).max
    return (row.float() / scale).clamp(-limit, limit).to(dtype)


def expected(x: Any, into: Any, scale: Any, locs: list[int], mult: int = 1, offset: int = 0, wrap: bool = False) -> Any:
    """Token by token. Of repeated rows the last one wins."""
    result = into.view(U8).clone()
    for token, loc in enumerate(locs):
        row = loc * mult + offset
        if wrap:
            row = row + into.shape[0] if row < 0 else row
        elif loc < 0:
            continue
        if 0 <= row < into.shape[0]:
            result[row] = quantised(x[token], scale).view(U8)
    return result


def store(k: Any, v: Any, kc: Any, vc: Any, ks: Any, vs: Any, loc: Any, **more: Any) -> None:
    torch.ops.inductor_ext.downcast_fp8(k, v, kc, vc, ks, vs, loc, PROGRAM, PROGRAM, E4, **more)


def check(locs: list[int], *, slots: int = 16, index: torch.dtype = torch.int64, **more: Any) -> None:
    k, v = rows(len(locs)), rows(len(locs))
    kc, vc, ks, vs = cache(slots), cache(slots), torch.tensor(0.5), torch.tensor([0.25])
    wanted = [expected(x, c, s, locs, **more) for x, c, s in ((k, kc, ks), (v, vc, vs))]
    store(k, v, kc, vc, ks, vs, torch.tensor(locs, dtype=index), **more)
    assert_same_bytes(kc.view(U8), wanted[0], "k_cache")
    assert_same_bytes(vc.view(U8), wanted[1], "v_cache")


@INDICES
def test_each_row_goes_to_its_slot_with_its_own_scale(index: torch.dtype) -> None:
    check([5, 0, 15, 7], index=index)


@INDICES
def test_negative_indices_are_padding(index: torch.dtype) -> None:
    check([-1, 3, -1, 0, -7], index=index)
    check([-1, -1], index=index)


def test_negative_indices_count_from_the_end_when_asked() -> None:
    check([-1, 3, -16, 0], wrap=True)
    check([-17, -100], wrap=True)


@INDICES
@pytest.mark.parametrize("wrap", [False, True])
def test_rows_past_the_end_are_never_written(index: torch.dtype, wrap: bool) -> None:
    check([16, 3, 2**31 - 1, 15, 1000], index=index, wrap=wrap)


def test_offsets_are_64_bit() -> None:
    check([2**40, 1, 2**62])
    check([2**33, 1], mult=2**20)


@pytest.mark.parametrize(("mult", "offset"), [(2, 0), (2, 1), (1, 4), (3, -2), (1, -3)])
def test_row_is_loc_times_mult_plus_offset(mult: int, offset: int) -> None:
    check([0, 1, 2, 3, 5, 9, -1], mult=mult, offset=offset)


def test_of_repeated_indices_one_row_wins_whole() -> None:
    k, kc = rows(4), cache(16)
    store(k, None, kc, None, torch.tensor(1.0), None, torch.tensor([3, 3, 3, 5]))
    candidates = [quantised(k[token], 1.0).view(U8) for token in range(3)]
    assert any(torch.equal(kc[3].view(U8), row) for row in candidates)
    assert torch.equal(kc[5].view(U8), quantised(k[3], 1.0).view(U8))


def test_consecutive_rows_without_indices() -> None:
    k, kc = rows(4), cache(16)
    wanted = expected(k, kc, 0.5, [0, 1, 2, 3], mult=3, offset=2)
    store(k, None, kc, None, torch.tensor(0.5), None, None, mult=3, offset=2)
    assert_same_bytes(kc.view(U8), wanted)


def test_k_alone_leaves_nothing_else_touched() -> None:
    k, kc = rows(2), cache(16)
    wanted = expected(k, kc, 0.5, [4, 9])
    store(k, None, kc, None, torch.tensor(0.5), None, torch.tensor([4, 9]))
    assert_same_bytes(kc.view(U8), wanted)


def test_no_tokens() -> None:
    check([])
    k, kc = rows(0), cache(0)
    store(k, None, kc, None, torch.tensor(0.5), None, torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(1, 1), (3, 5), (2, 128), (1, 17)])
def test_dtypes_and_tails(heads: int, dim: int, dtype: torch.dtype) -> None:
    k, kc = rows(5, heads, dim, dtype), cache(11, heads, dim)
    wanted = expected(k, kc, 0.5, [0, 10, 4, 2, 7])
    store(k, None, kc, None, torch.tensor(0.5), None, torch.tensor([0, 10, 4, 2, 7]))
    assert_same_bytes(kc.view(U8), wanted)


@pytest.mark.parametrize("dtype", [E4, E5], ids=str)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_caches_of_either_format_or_bytes(dtype: torch.dtype, as_bytes: bool) -> None:
    limit = torch.finfo(dtype).max
    program = f"f32 div:s0 max:-{limit} min:{limit}"
    k, kc = rows(3) * 1e4, cache(8)
    given = kc.view(U8) if as_bytes else kc.view(dtype)
    at = torch.tensor([1, 6, 2])
    torch.ops.inductor_ext.downcast_fp8(k, None, given, None, torch.tensor(0.5), None, at, program, "", dtype)
    for token, row in enumerate(at.tolist()):
        assert_same_bytes(kc[row].view(U8), quantised(k[token], 0.5, dtype).view(U8))


def test_slices_of_one_qkv_buffer_are_read_in_place() -> None:
    qkv = torch.randn(4, 64).bfloat16() * 50
    _, k, v = qkv.split([32, 16, 16], dim=-1)
    k, v = k.view(4, 2, 8), v.view(4, 2, 8)
    assert k.stride(0) == v.stride(0) == 64
    kc, vc = cache(16), cache(16)
    wanted = expected(k, kc, 0.5, [9, 3, 1, 0]), expected(v, vc, 0.5, [9, 3, 1, 0])
    store(k, v, kc, vc, torch.tensor(0.5), torch.tensor(0.5), torch.tensor([9, 3, 1, 0]))
    assert_same_bytes(kc.view(U8), wanted[0])
    assert_same_bytes(vc.view(U8), wanted[1])


def test_caches_that_are_interleaved_halves_of_one_buffer() -> None:
    both = cache(16, 4, 8)
    kc, vc = both[:, :2], both[:, 2:]
    k, v = rows(3), rows(3)
    wanted = expected(k, kc, 0.5, [9, 3, 1]), expected(v, vc, 0.5, [9, 3, 1])
    store(k, v, kc, vc, torch.tensor(0.5), torch.tensor(0.5), torch.tensor([9, 3, 1]))
    assert_same_bytes(both[:, :2].view(U8), wanted[0])
    assert_same_bytes(both[:, 2:].view(U8), wanted[1])


def test_two_dimensional_rows() -> None:
    k, kc = rows(3).view(3, 16), cache(8).view(8, 16)
    wanted = expected(k, kc, 0.5, [7, 0, 2])
    store(k, None, kc, None, torch.tensor(0.5), None, torch.tensor([7, 0, 2]))
    assert_same_bytes(kc.view(U8), wanted)


# ---- checks on ------------------------------------------------------------------------------------------------------------


@INDICES
def test_with_checks_a_row_past_the_end_raises_and_names_it(monkeypatch: pytest.MonkeyPatch, index: torch.dtype) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_CHECKS", "1")
    k, kc = rows(3), cache(16)
    before = kc.clone()
    with pytest.raises(IndexError, match=r"loc: wanted rows in \[0, 16\), found 16 for token 2"):
        store(k, None, kc, None, torch.tensor(0.5), None, torch.tensor([-1, 3, 16], dtype=index))
    assert_same_bytes(kc, before, "nothing is written")


def test_with_checks_padding_is_fine_and_wrapping_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_CHECKS", "1")
    check([-1, 3, -5])
    check([-16, 15], wrap=True)
    with pytest.raises(IndexError, match="found -1 for token 0"):
        check([-17], wrap=True)


def test_with_checks_in_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_CHECKS", "1")

    def fn(k: Any, kc: Any, at: Any) -> None:
        torch.ops.inductor_ext.downcast_fp8(k, None, kc, None, None, None, at, "div:2.0", "", E4)

    with pytest.raises(IndexError, match="found 16 for token 1"):
        torch.compile(fn, backend="inductor_ext")(rows(2), cache(16), torch.tensor([0, 16]))
