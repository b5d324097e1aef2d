"""downcast_fp8, the KV-cache store: rows, padding, ranges, layouts; against a loop over tokens."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import cuda_on_cpu
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


# ---- caches in blocks, and a scale a head -----------------------------------------------------------------------------------


def vllm(blocks: int, block: int, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[blocks, 2, block, H, D]: K's and V's blocks side by side."""
    both = cache(blocks * 2 * block, heads, dim).view(blocks, 2, block, heads, dim)
    return both[:, 0], both[:, 1]


def heads_first(blocks: int, block: int, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[blocks, H, block, D] each: rows of a head lie together."""
    k, v = (cache(blocks * heads, block, dim).view(blocks, heads, block, dim).transpose(1, 2) for _ in "kv")
    return k, v


def both_heads_first(blocks: int, block: int, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[blocks, 2, H, block, D]."""
    both = cache(blocks * 2 * heads, block, dim).view(blocks, 2, heads, block, dim).transpose(2, 3)
    return both[:, 0], both[:, 1]


def in_order(blocks: int, block: int, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[2, blocks, block, H, D]."""
    both = cache(2 * blocks * block, heads, dim).view(2, blocks, block, heads, dim)
    return both[0], both[1]


IN_BLOCKS = {"vllm": vllm, "heads_first": heads_first, "both_heads_first": both_heads_first, "in_order": in_order}
LAYOUTS = pytest.mark.parametrize("layout", list(IN_BLOCKS))


def expected_in_blocks(x: Any, into: Any, scale: Any, told: Any, wrap: bool) -> Any:
    """Token by token; ``told``: (block, row of it) of each, or its row. Of repeated rows the last one wins."""
    result = into.view(U8).clone()
    blocks, block = into.shape[:2]
    for token, each in enumerate(told):
        one = each if isinstance(each, int) else min(each)
        if one < 0 and not wrap:
            continue
        if isinstance(each, int):
            each = each + blocks * block if each < 0 else each
            each = (each // block, each % block) if 0 <= each < blocks * block else (blocks, 0)
        b, r = (index + size if index < 0 else index for index, size in zip(each, (blocks, block)))
        if 0 <= b < blocks and 0 <= r < block:
            result[b, r] = quantised(x[token], scale).view(U8)
    return result


def store_in_blocks(k: Any, v: Any, caches: Any, scales: Any, told: Any, index: torch.dtype, **more: Any) -> None:
    pairs = bool(told) and not isinstance(told[0], int)
    loc = torch.tensor([each[0] for each in told] if pairs else told, dtype=index)
    at = torch.tensor([each[1] for each in told], dtype=index) if pairs else None
    store(k, v, *caches, *scales, loc, at=at, **more)


TOLD: dict[str, list[Any]] = {
    "rows": [5, 0, 11, -1, 12, 7, -12, -13, 2**31, 40],
    "blocks": [(1, 2), (0, 0), (2, 3), (-1, 1), (1, -1), (3, 0), (0, 4), (-3, -4), (-4, 0), (0, -5), (2**31 - 1, 1)],
}


@LAYOUTS
@INDICES
@pytest.mark.parametrize("told", list(TOLD))
@pytest.mark.parametrize("wrap", [False, True])
def test_rows_go_to_their_blocks(layout: str, index: torch.dtype, told: str, wrap: bool) -> None:
    given = [each for each in TOLD[told] if index is torch.int64 or each != 2**31]
    caches, scales = IN_BLOCKS[layout](3, 4, 2, 8), (torch.tensor(0.5), torch.tensor([0.25]))
    x = rows(len(given)), rows(len(given))
    wanted = [expected_in_blocks(*each, given, wrap) for each in zip(x, caches, scales)]
    store_in_blocks(*x, caches, scales, given, index, wrap=wrap)
    for name, found, bytes_wanted in zip(("k_cache", "v_cache"), caches, wanted, strict=True):
        assert_same_bytes(found.view(U8), bytes_wanted, name)


def test_rows_in_blocks_are_loc_times_mult_plus_offset() -> None:
    caches, x = vllm(3, 4, 2, 8), rows(5)
    wanted = expected_in_blocks(x, caches[0], 0.5, [1, 3, 5, 7, 9], False)
    store(x, None, caches[0], None, torch.tensor(0.5), None, None, mult=2, offset=1)
    assert_same_bytes(caches[0].view(U8), wanted)


def test_two_dimensional_rows_in_blocks() -> None:
    x, into = rows(3).view(3, 16), cache(24, 1, 16).view(3, 2, 4, 16)[:, 1]
    wanted = expected_in_blocks(x, into, 0.5, [(2, 3), (0, 1), (1, 1)], False)
    store_in_blocks(x, None, (into, None), (torch.tensor(0.5), None), [(2, 3), (0, 1), (1, 1)], torch.int64)
    assert_same_bytes(into.view(U8), wanted)


@pytest.mark.parametrize("which", ["k", "v", "both"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_scale_a_head(which: str, dtype: torch.dtype) -> None:
    x = rows(4, 3, dtype=dtype), rows(4, 3, dtype=dtype)
    of_heads, one = torch.tensor([0.5, 0.25, 0.125]), torch.tensor(0.75)
    scales = of_heads if which != "v" else one, of_heads * 3 if which != "k" else one
    for caches in ((cache(16, 3), cache(16, 3)), vllm(4, 4, 3, 8)):
        wanted = [
            torch.stack([quantised(row, s.view(-1, 1)).view(U8) for row in each]) for each, s in zip(x, scales, strict=True)
        ]
        store(*x, *caches, *scales, torch.tensor([5, 0, 15, 7]))
        for into, values in zip(caches, wanted, strict=True):
            flat = into.view(U8).reshape(16, 3, 8)
            assert_same_bytes(flat[[5, 0, 15, 7]], values)


@pytest.mark.parametrize("wrap", [False, True])
def test_with_checks_a_row_outside_its_block_raises_and_names_it(monkeypatch: pytest.MonkeyPatch, wrap: bool) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_CHECKS", "1")
    caches, x = vllm(3, 4, 2, 8), rows(2)
    before = caches[0].clone()
    for told, found in (((0, 4), "block 0 and row 4"), ((3, 0), "block 3 and row 0")):
        wanted = r"loc, at: wanted blocks in \[0, 3\) and rows of them in \[0, 4\), found "
        with pytest.raises(IndexError, match=f"{wanted}{found} for token 1"):
            scales = torch.tensor(0.5), None
            store_in_blocks(x, None, (caches[0], None), scales, [(1, 1), told], torch.int64, wrap=wrap)
    assert_same_bytes(caches[0], before, "nothing is written")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"at": torch.zeros(3, dtype=torch.int64)}, r"at: wanted one index for each of k's 2 rows, found 3"),
    ({"at": torch.zeros(2, dtype=torch.int32)}, r"at: wanted a loc of its dtype torch.int32, found loc of torch.int64"),
    ({"at": torch.zeros(2, 1, dtype=torch.int64)}, r"at: wanted a 1-d int32 or int64 tensor, found torch.int64 \(2, 1\)"),
    ({"at": torch.zeros(4, dtype=torch.int64)[::2]}, r"at: wanted a contiguous tensor, found strides \(2,\)"),
    ({"loc": None}, r"at: wanted a loc of its dtype torch.int64, found no loc"),
    ({"mult": 2}, r"mult, offset: wanted 1 and 0 with at, found 2 and 0"),
    ({"offset": 3}, r"mult, offset: wanted 1 and 0 with at, found 1 and 3"),
    ({"k_cache": cache(12)}, r"at: wanted None for caches that are not in blocks, found shape \(2,\)"),
    ({"k_cache": cache(12).view(3, 4, 4, 4)}, r"k_cache: wanted \[blocks, block, …\] with k's .* trailing sizes \(2, 8\)"),
    ({"k_cache": cache(12, 4, 16).view(3, 4, 4, 16)[:, :, ::2, ::2]}, r"k_cache: wanted a last dimension of unit stride"),
    ({"k_scale": torch.ones(3)}, r"k_scale: wanted one element, or shape \(2,\): one for each head, found shape \(3,\)"),
    ({"k_scale": torch.ones(2, 1)}, r"k_scale: wanted one element, or shape \(2,\): one for each head, found shape \(2, 1\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_of_caches_in_blocks(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "k_cache": vllm(3, 4, 2, 8)[0], "k_scale": torch.tensor(0.5), "loc": torch.tensor([0, 1]), "at": torch.tensor([0, 1]),
        "mult": 1, "offset": 0,
    }  # fmt: skip
    given |= change
    before = given["k_cache"].clone()
    with pytest.raises((ValueError, TypeError), match=message):
        x, options = rows(2), {name: given[name] for name in ("at", "mult", "offset")}
        store(x, None, given["k_cache"], None, given["k_scale"], None, given["loc"], **options)
    assert_same_bytes(given["k_cache"].view(U8), before.view(U8), "nothing is written")


def test_v_in_other_blocks_than_k_is_an_error() -> None:
    message = r"v_cache: wanted k_cache's \(3, 4\) first sizes, found shape \(4, 3, 2, 8\)"
    with pytest.raises(ValueError, match=message):
        store(rows(1), rows(1), vllm(3, 4, 2, 8)[0], vllm(4, 3, 2, 8)[1], None, None, torch.tensor([0]))


# ---- the source, on the CPU ---------------------------------------------------------------------------------------------


class _Call(ctypes.Structure):
    _tensors = ("k", "v", "k_cache", "v_cache", "k_scale", "v_scale", "loc", "at")
    _fields_ = (
        *((name, ctypes.POINTER(cuda_on_cpu.Given)) for name in _tensors),
        *((name, ctypes.c_int64) for name in ("mult", "offset", "wrap", "check")),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda_on_cpu.compiled("downcast_fp8", Path(tmp_path_factory.mktemp("downcast_fp8")))


def on_cpu(library: ctypes.CDLL, tensors: dict[str, Any], **options: int) -> None:
    """The source's own store, compiled for what the tensors are; it writes the caches."""
    k, v = tensors["k"], tensors["v"]
    scales = [tensors[name] for name in ("k_scale", "v_scale")]
    variant = [tensors["k_cache"].dim() > k.dim(), *(scale is not None and scale.dim() > 0 for scale in scales)]
    entry = f"{'bf16' if k.dtype is torch.bfloat16 else 'fp32'}_{''.join(str(int(each)) for each in variant)}"
    if v is None:
        tensors = tensors | {"v_cache": None, "v_scale": None}
    given = {name: None if x is None else ctypes.pointer(cuda_on_cpu.Given.of(x)) for name, x in tensors.items()}
    error = ctypes.create_string_buffer(500)
    call = _Call(**given, **({"mult": 1, "offset": 0, "wrap": 0, "check": 0} | options))
    if getattr(library, entry)(ctypes.byref(call), error, 500) != 0:
        raise RuntimeError(error.value.decode())


def check_source(library: ctypes.CDLL, tensors: dict[str, Any], **options: int) -> None:
    """Byte for byte what the op's reference writes."""
    pair = {name: _like(tensors[name]) for name in ("k_cache", "v_cache") if tensors[name] is not None}
    on_cpu(library, tensors | pair, **options)
    given = tensors if tensors["v"] is not None else tensors | {"v_cache": None, "v_scale": None}
    order = ("k", "v", "k_cache", "v_cache", "k_scale", "v_scale", "loc")
    named = {name: bool(each) if name in ("wrap", "check") else each for name, each in options.items()}
    store(*(given[name] for name in order), at=given["at"], **named)
    for name, found in pair.items():
        if given[name] is not None:
            assert_same_bytes(found.view(U8), given[name].view(U8), name)


def _like(x: torch.Tensor) -> torch.Tensor:
    """A copy of the same strides, in memory of its own."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1
    return torch.as_strided(torch.as_strided(x, (last,), (1,)).view(U8).clone().view(x.dtype), x.shape, x.stride())


#: Tokens for which the kernels differ: a block a token; several a block, compared; claimed.
MANY = {"few": 9, "many": 1100, "claims": 4200}


def _made(
    layout: str, tokens: int, heads: int, dim: int, dtype: torch.dtype, scales: str = "", at: bool = True
) -> dict[str, Any]:
    """Every row once, in an order of its own, but for some rows that are no rows."""
    x = rows(tokens, heads, dim, dtype), rows(tokens, heads, dim, dtype)
    block = 16
    blocks = -(-tokens // block) + 1
    flat = [cache(blocks * block, heads, dim) for _ in "kv"]
    caches = IN_BLOCKS[layout](blocks, block, heads, dim) if layout else flat
    index = torch.int64 if dtype is torch.bfloat16 else torch.int32
    slots = torch.randperm(blocks * block)[:tokens]
    loc, within = (slots // block, slots % block) if layout and at else (slots, None)
    loc[tokens // 2], loc[tokens // 3] = -1, blocks * block
    if within is not None:
        within[tokens // 4] = block
    made = [torch.rand(heads) + 0.5 if name in scales else torch.tensor(0.5) for name in "kv"]
    names = ("k", "v", "k_cache", "v_cache", "k_scale", "v_scale", "loc", "at")
    return dict(zip(names, (*x, *caches, *made, loc.to(index), within if within is None else within.to(index)), strict=True))


@pytest.mark.parametrize("many", list(MANY))
@pytest.mark.parametrize("layout", ["", *IN_BLOCKS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_source_stores_what_the_reference_does(library: Any, many: str, layout: str, dtype: torch.dtype) -> None:
    shapes = ((2, 16), (1, 8), (3, 5)) if many == "few" else ((2, 8),)
    for heads, dim in shapes:
        for at in (False, True) if layout else (False,):
            for wrap in (0, 1) if many != "claims" else (int(at),):
                check_source(library, _made(layout, MANY[many], heads, dim, dtype, at=at), wrap=wrap)
        one = _made(layout, MANY[many], heads, dim, dtype) | {"v": None}
        check_source(library, one)


@pytest.mark.parametrize("many", list(MANY))
@pytest.mark.parametrize(("layout", "scales"), [("", "kv"), ("vllm", "kv"), ("heads_first", "kv"), ("both_heads_first", "k")])
def test_source_with_a_scale_a_head(library: Any, many: str, layout: str, scales: str) -> None:
    for heads, dim in ((3, 16), (2, 5), (1, 8)) if many != "claims" else ((3, 8),):
        check_source(library, _made(layout, MANY[many], heads, dim, torch.bfloat16, scales))
    strided = _made(layout, MANY[many], 3, 16, torch.float32, scales)
    check_source(library, strided | {"k_scale": (torch.rand(3, 4) + 0.5)[:, 1]})


@pytest.mark.parametrize(("heads", "dim"), [(40, 64), (7, 129)])
@pytest.mark.parametrize(("layout", "tokens"), [("heads_first", 5), ("vllm", 1025)])
def test_source_of_rows_of_many_pieces(library: Any, layout: str, tokens: int, heads: int, dim: int) -> None:
    given = _made(layout, tokens, heads, dim, torch.bfloat16, "kv") | ({"v": None} if tokens > 1000 else {})
    check_source(library, given)


@pytest.mark.parametrize("tokens", [40, 1100, 4200])
@pytest.mark.parametrize("wrap", [0, 1])
def test_source_of_repeated_rows_in_blocks(library: Any, tokens: int, wrap: int) -> None:
    """A block and a row of it are told in two ways, from the front and from the end; one token is stored whole."""
    given = _made("vllm", tokens, 2, 8, torch.bfloat16)
    given["k_cache"], given["v_cache"] = vllm(3, 4, 2, 8)
    given["loc"], given["at"] = torch.randint(-3, 3, (tokens,)), torch.randint(-4, 4, (tokens,))
    if tokens <= 4096:  # the last of them
        return check_source(library, given, wrap=wrap)
    on_cpu(library, given, wrap=wrap)
    kept = [t for t in range(tokens) if wrap or (given["loc"][t] >= 0 and given["at"][t] >= 0)]
    stored = {name: quantised(given[name], 0.5).view(U8) for name in "kv"}
    for block in range(3):
        for row in range(4):
            of_row = [t for t in kept if given["loc"][t] % 3 == block and given["at"][t] % 4 == row]
            found = [given[f"{name}_cache"][block, row].view(U8) for name in "kv"]
            assert any(all(torch.equal(f, stored[name][t]) for f, name in zip(found, "kv")) for t in of_row)


@pytest.mark.parametrize("wrap", [0, 1])
def test_source_with_checks_names_the_block_and_the_row(library: Any, wrap: int) -> None:
    given = _made("vllm", 9, 2, 8, torch.bfloat16)
    given["loc"], given["at"] = torch.arange(9) % 2, torch.arange(9) % 16
    on_cpu(library, given, wrap=wrap, check=1)
    given["at"][5] = 16
    low = (-2, -16) if wrap else (0, 0)
    wanted = rf"wanted blocks in \[{low[0]}, 2\) and rows of them in \[{low[1]}, 16\), found block 1 and row 16 for token 5"
    with pytest.raises(RuntimeError, match=wanted):
        on_cpu(library, given, wrap=wrap, check=1)


def test_source_refuses_what_it_cannot_address(library: Any) -> None:
    given = _made("vllm", 9, 2, 8, torch.bfloat16)
    for change, message in (
        ({"loc": None}, "at: wanted it with a loc, mult 1 and offset 0, found no loc"),
        (
            {"k_cache": given["k_cache"][..., ::2], "k": given["k"][..., :4].contiguous()},
            "k_cache: wanted a last dimension of unit stride",
        ),
        ({"k_cache": given["k_cache"][:, :, :1]}, "k_cache: wanted rows of 16 elements as in k"),
    ):
        with pytest.raises(RuntimeError, match=message):
            on_cpu(library, given | change)
    with pytest.raises(RuntimeError, match="k_scale: wanted one element for each head of"):
        on_cpu(library, _made("vllm", 9, 2, 8, torch.bfloat16, "kv") | {"k_scale": torch.rand(3)})
