"""Stores into KV caches that differ in one respect from what a rule takes: refused, or the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from tests.support.compiled import run_compiled, run_copies
from tests.support.equal import assert_all_same_bytes
from tests.support.fakegpu import fake_cuda_inputs
from tests.support.nearly import (
    BF16,
    E4,
    E5,
    FEW,
    SLOTS,
    U8,
    WEIGHT,
    N,
    cache,
    check,
    heads,
    put,
    quantise,
    refused,
    rotated,
    rows,
    table,
)

# ---- K and V in one launch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_k", "of_v"),
    [
        (slice(3, 19), slice(5, 21)),  # another first row
        (slice(0, 32, 2), slice(0, 16)),  # another step
        (slice(0, 16), slice(0, 32, 2)),
        (slice(4, 20), slice(4, 52, 3)),
    ],
    ids=str,
)
def test_k_and_v_in_different_rows_are_stored_on_their_own(of_k: slice, of_v: slice) -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any) -> None:
        kc[of_k] = quantise(k)
        vc[of_v] = quantise(v)

    check("downcast_fp8", store, rows(), rows(), cache(64, 2, 64), cache(64, 2, 64), count=2)


def test_k_by_index_and_v_by_slice_are_stored_on_their_own() -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any, s: Any) -> None:
        kc[s] = quantise(k)
        vc[:16] = quantise(v)

    check("downcast_fp8", store, rows(), rows(), cache(64, 2, 64), cache(64, 2, 64), SLOTS, count=2)


def test_caches_of_two_dtypes_are_written_on_their_own() -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any, s: Any) -> None:
        kc[s] = quantise(k)
        vc[s] = quantise(v, dtype=E5)

    check("downcast_fp8", store, rows(), rows(), cache(64, 2, 64), cache(64, 2, 64, dtype=E5), SLOTS, count=2)


def test_byte_caches_of_two_dtypes_are_written_on_their_own() -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any, s: Any) -> None:
        kc[s] = quantise(k).view(U8)
        vc[s] = quantise(v, dtype=E5).view(U8)

    check("downcast_fp8", store, rows(), rows(), *(cache(64, 2, 64, dtype=U8) for _ in "kv"), SLOTS, count=2)


def test_more_rows_of_k_than_of_v_are_stored_on_their_own() -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any) -> None:
        kc[:16] = quantise(k)
        vc[:8] = quantise(v)

    check("downcast_fp8", store, rows(), rows(8), cache(64, 2, 64), cache(64, 2, 64), count=2)


@pytest.mark.parametrize("shape", [(48, 2, 64), (64, 1, 64), (64, 2, 32)], ids=str)
def test_caches_of_two_shapes_are_written_on_their_own(shape: tuple[int, int, int]) -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any, s: Any) -> None:
        kc[s] = quantise(k)
        vc[s] = quantise(v)

    check("downcast_fp8", store, rows(), rows(16, *shape[1:]), cache(64, 2, 64), cache(*shape), SLOTS, count=2)


def test_halves_with_another_store_between_them_are_written_on_their_own() -> None:
    def store(k: Any, v: Any, other: Any, kv: Any, s: Any) -> None:
        kv[0][s] = quantise(k)
        kv[2][s] = other
        kv[1][s] = quantise(v)

    check("downcast_fp8", store, rows(), rows(), cache(16, 2, 64), cache(3, 64, 2, 64), SLOTS, count=2)


def test_two_versions_of_one_buffer_do_not_have_each_others_rows() -> None:
    """Both halves begin with the same old buffer, which no in-place code would do."""

    def store(b: Any, k: Any, v: Any, s: Any) -> Any:
        halves = [torch.select_scatter(b, put(b.select(0, i), x, s), 0, i) for i, x in enumerate((k, v))]
        return [half.float() * 2 for half in halves]

    # The first of the two would be written over old rows that are still to be read.
    check("downcast_fp8", store, cache(2, 64, 2, 64), rows(), rows(), SLOTS, count=1)


@pytest.mark.parametrize("what", ["scale", "slots", "both"])
def test_scales_and_slots_that_are_made_late(what: str) -> None:
    def store(k: Any, v: Any, a: Any, kc: Any, vc: Any, s: Any) -> None:
        scale = a.exp() if what != "slots" else a
        at = s + 5 if what != "scale" else s
        kc[at] = quantise(k, scale)
        vc[at] = quantise(v, scale)

    check("downcast_fp8", store, rows(), rows(), torch.tensor(0.3), cache(64, 2, 64), cache(64, 2, 64), SLOTS, count=1)


def test_rows_of_a_symbolic_shape_that_is_made_late() -> None:
    def store(k: Any, kc: Any, s: Any) -> None:
        kc[s] = quantise(k).view(k.shape[0] * 2, 1, 64)

    slots = torch.arange(32)
    torch._dynamo.mark_dynamic(given := rows(), 0)
    check("downcast_fp8", store, given, cache(64, 1, 64), slots, count=1, dynamic=True)


def test_the_store_comes_behind_what_copies_the_old_rows() -> None:
    """Before it, Inductor would have to copy the whole cache first."""

    def store(k: Any, kc: Any, kept: Any, s: Any) -> None:
        kept.copy_(kc)
        kc.view(-1, 2, 64)[s] = quantise(k)

    given = rows(), cache(4, 16, 2, 64), cache(4, 16, 2, 64), SLOTS
    (graph,) = inductor_ext.explain(store, *given, rules={"downcast_fp8": "always"}).graphs
    lines = [line for line in graph.after.splitlines() if "aten.copy_" in line or "downcast_fp8" in line]
    assert ["downcast_fp8" in line for line in lines] == [False, True, False]


def test_scales_of_k_and_v_are_not_mixed_up() -> None:
    def store(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, s: Any) -> None:
        kc[s] = quantise(k, ks)
        vc[s] = quantise(v, vs)

    scales = torch.tensor(0.3), torch.tensor(0.7)
    check("downcast_fp8", store, rows(), rows(), *scales, cache(64, 2, 64), cache(64, 2, 64), SLOTS, count=1)


@pytest.mark.parametrize("reader", ["rows", "all", "view"])
def test_old_rows_read_between_the_stores_stay_old(reader: str) -> None:
    """V's cache is read before V is stored, after K was: one launch for both would have to come behind the reader."""

    def store(k: Any, v: Any, kc: Any, vc: Any, s: Any) -> Any:
        kc[s] = quantise(k)
        old = {"rows": lambda: vc[s], "all": lambda: vc.clone(), "view": lambda: vc.view(-1, 64)[:9]}[reader]().float() * 2
        vc[s] = quantise(v)
        return old, kc.float().amax()

    given = rows(), rows(), cache(64, 2, 64), cache(64, 2, 64), SLOTS
    found = inductor_ext.verify(store, *given, rules={"downcast_fp8": "always"}, end_to_end=False)
    assert found.differs == [] and found.checks


def test_rows_of_v_made_of_new_rows_of_k() -> None:
    def store(k: Any, kc: Any, vc: Any, s: Any) -> None:
        kc[s] = quantise(k)
        vc[s] = quantise(kc[s].float().bfloat16())

    check("downcast_fp8", store, rows(), cache(64, 2, 64), cache(64, 2, 64), SLOTS, count=2)


# ---- what is put back elsewhere than it was taken from ---------------------------------------------------------------


BUFFER = (16, 16, 2, 64)

ELSEWHERE: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    "another_item": (BUFFER, lambda b, k, s: torch.select_scatter(b, put(b.select(0, 1), k, s), 0, 0)),
    "another_dimension": (BUFFER, lambda b, k, s: torch.select_scatter(b, put(b.select(0, 1), k, s), 1, 1)),
    "an_item_of_the_new_rows": (BUFFER, lambda b, k, s: torch.select_scatter(put(b.select(0, 1), k, s), b[0, 0], 0, 1)),
    "another_of_unbind": (BUFFER, lambda b, k, s: torch.select_scatter(b, put(b.unbind(0)[1], k, s), 0, 0)),
    "another_dimension_of_unbind": (BUFFER, lambda b, k, s: torch.select_scatter(b, put(b.unbind(1)[1], k, s), 0, 1)),
    "another_slice": ((64, 2, 64), lambda b, k, s: torch.slice_scatter(b, put(b[4:20], k, s), 0, 5, 21)),
    "a_slice_of_the_new_rows": ((64, 2, 64), lambda b, k, s: torch.slice_scatter(put(b[4:40], k, s), b[:32], 0, 4, 40)),
    "another_shape": ((4, 16, 2, 64), lambda b, k, s: put(b.view(64, 2, 64), k, s).view(2, 32, 2, 64)),
    "transposed": ((32, 256), lambda b, k, s: put(b.view(256, 32), k.view(-1, 32)[:4], s).t().contiguous()),
}


@pytest.mark.parametrize("name", list(ELSEWHERE))
def test_rows_are_put_back_elsewhere(name: str) -> None:
    shape, make = ELSEWHERE[name]
    refused("downcast_fp8", lambda b, k, s: make(b, k, s), cache(*shape), rows(4), FEW, reason="the view is not written back")


@pytest.mark.parametrize("back", ["as_another_dtype", "converted"])
def test_bytes_are_put_back_in_another_dtype(back: str) -> None:
    def store(b: Any, k: Any, s: Any) -> Any:
        new = put(b.view(E4), k, s)
        return new.view(E5) if back == "as_another_dtype" else new.to(U8)

    refused("downcast_fp8", store, cache(64, 2, 64, dtype=U8), rows(4) / 99, FEW, reason="the view is not written back")


def test_new_rows_that_nobody_puts_back() -> None:
    found = check("downcast_fp8", lambda b, k, s: put(b[4:40], k, s).float() + 1, cache(64, 2, 64), rows(4), FEW, count=0)
    (refusal,) = [each for graph in found.graphs for each in graph.refusals if each.rule == "downcast_fp8"]
    assert refusal.reason == "the view is not written back" and "convert_element_type" in refusal.found


# ---- which rows ------------------------------------------------------------------------------------------------------


def test_an_index_of_two_dimensions() -> None:
    def store(k: Any, kc: Any, s: Any) -> None:
        kc[s] = quantise(k).view(4, 4, 2, 64)

    refused("downcast_fp8", store, rows(), cache(64, 2, 64), SLOTS.view(4, 4), reason="index layout")


def test_rows_of_a_cache_of_one_dimension() -> None:
    def store(k: Any, kc: Any, s: Any) -> None:
        kc[s] = quantise(k)

    refused("downcast_fp8", store, rows()[:, 0, 0].contiguous(), cache(64), SLOTS, reason="the stored rows broadcast")


BLOCKS, ROWS_OF = torch.tensor([1, 0, 3, 2] * 4), torch.arange(16)


def in_blocks(k: Any, kc: Any, b: Any, r: Any) -> None:
    kc[b, r] = quantise(k)


def test_blocks_and_rows_of_them() -> None:
    check("downcast_fp8", in_blocks, rows(), cache(4, 16, 2, 64), BLOCKS, ROWS_OF, count=1)
    check("downcast_fp8", in_blocks, rows()[:, 0].contiguous(), cache(4, 16, 64), BLOCKS, ROWS_OF, count=1)


def masked(k: Any, kc: Any, mask: Any) -> None:
    kc[mask] = quantise(k)


@pytest.mark.parametrize(
    ("block", "row"),
    [
        (BLOCKS[:, None], ROWS_OF[:, None]),
        (BLOCKS.int(), ROWS_OF),
        (BLOCKS[:1], ROWS_OF),
        (BLOCKS, ROWS_OF[:1]),
        (BLOCKS.repeat_interleave(2)[::2], ROWS_OF),
        (BLOCKS, ROWS_OF.repeat_interleave(2)[::2]),
        (BLOCKS > 1, ROWS_OF[:4]),
    ],
    ids=["two_dimensions", "two_dtypes", "one_block", "one_row", "strided_blocks", "strided_rows", "mask"],
)
def test_indices_of_blocks_and_rows_that_are_none(block: torch.Tensor, row: torch.Tensor) -> None:
    k = rows(1)[0] if block.dim() == 2 or block.dtype is torch.bool else rows()
    if block.dtype is torch.bool:
        refused("downcast_fp8", masked, k, cache(16, 2, 64), block, reason="index layout")
    else:
        refused("downcast_fp8", in_blocks, k, cache(4, 16, 2, 64), block, row, reason="index layout")


ALL = slice(None)

STORES_ELSEWHERE: dict[str, tuple[tuple[int, ...], Callable[..., Any], Callable[..., Any]]] = {
    "three_indices": ((4, 16, 2, 64), lambda b, r: (b, r, r % 2), lambda k: k[:, 0]),
    "behind_another_dimension": ((2, 4, 16, 64), lambda b, r: (ALL, b, r), lambda k: k.transpose(0, 1)),
    "on_the_last_dimensions": ((2, 64, 4, 16), lambda b, r: (ALL, ALL, b, r), lambda k: k.permute(1, 2, 0)),
    "of_five_dimensions": ((4, 16, 2, 8, 8), lambda b, r: (b, r), lambda k: k.view(16, 2, 8, 8)),
    "columns_second": ((4, 64, 2, 16), lambda b, r: (b, ALL, ALL, r), lambda k: k.transpose(1, 2)),
    "k_and_v_in_one": ((2, 64, 2, 64), lambda b, r: (ALL, r), lambda k: k.view(2, 8, 2, 64).repeat(1, 2, 1, 1)),
    "of_two_dimensions": ((2, 64), lambda b, r: (ALL, r), lambda k: k[:, :, 0].t()),
}


@pytest.mark.parametrize("name", list(STORES_ELSEWHERE))
def test_other_dimensions_that_are_indexed(name: str) -> None:
    shape, at, stored = STORES_ELSEWHERE[name]

    def store(kc: Any, k: Any, b: Any, r: Any) -> None:
        kc[at(b, r)] = quantise(stored(k))

    refused("downcast_fp8", store, cache(*shape), rows(), BLOCKS, ROWS_OF, reason="index layout")


def test_rows_that_blocks_broadcast() -> None:
    refused("downcast_fp8", in_blocks, rows(1), cache(4, 16, 2, 64), BLOCKS, ROWS_OF, reason="the stored rows broadcast")
    refused("downcast_fp8", in_blocks, rows(16, 1), cache(4, 16, 2, 64), BLOCKS, ROWS_OF, reason="the stored rows broadcast")

    def heads(k: Any, kc: Any, s: Any) -> None:
        kc[:, s] = quantise(k).transpose(0, 1)

    refused("downcast_fp8", heads, rows(16, 1), cache(2, 64, 64), SLOTS, reason="the stored rows broadcast")


def test_a_block_that_accumulates() -> None:
    def store(k: Any, kc: Any, b: Any, r: Any) -> None:
        kc.index_put_((b, r), quantise(k).view(U8), accumulate=True)

    refused("downcast_fp8", store, rows(), cache(4, 16, 2, 64, dtype=U8), BLOCKS, ROWS_OF, reason="the store accumulates")


#: Of a slot, what is not its block and its row of a cache of blocks of 16: read as the two that they are.
NOT_THE_SLOT: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "blocks_of_another_size": lambda s: (s // 32, s % 16),
    "rows_of_another_size": lambda s: (s // 16, s % 8),
    "both_of_another_size": lambda s: (s // 32, s % 32),
    "another_slot": lambda s: (s // 16, (s + 1) % 16),
    "truncated": lambda s: (torch.div(s - 16, 16, rounding_mode="trunc"), (s - 16) % 16),
    "remainder_of_the_dividend": lambda s: (torch.div(s - 16, 16, rounding_mode="floor"), torch.fmod(s - 16, 16)),
    "of_another_dtype": lambda s: (s.int() // 16, s.int() % 16),
    "strided": lambda s: (s.repeat_interleave(2)[::2] // 16, s.repeat_interleave(2)[::2] % 16),
}


@pytest.mark.parametrize("name", list(NOT_THE_SLOT))
def test_a_slot_and_what_is_not_its_block_and_row(name: str) -> None:
    def store(k: Any, kc: Any, s: Any) -> None:
        block, row = NOT_THE_SLOT[name](s)
        kc[block, row] = quantise(k)

    # Rows 0 to 31, so that blocks of 32 have them too.
    check("downcast_fp8", store, rows(), cache(4, 16, 2, 64), torch.arange(16) if "both" in name else SLOTS, count=1)


@pytest.mark.parametrize("size", [8, 16])
def test_slots_from_the_end_are_blocks_and_rows_from_the_end(size: int) -> None:
    def store(k: Any, v: Any, kv: Any, s: Any) -> None:
        kv[:, 0][s // size, s % size] = quantise(k)
        kv[:, 1][s // size, s % size] = quantise(v)

    found = check("downcast_fp8", store, rows(), rows(), cache(64 // size, 2, size, 2, 64), SLOTS - 20, count=1)
    assert ", loc=arg" in found.graphs[0].after and "at=None" in found.graphs[0].after


@pytest.mark.parametrize("shape", [(4, 2, 16, 2, 64), (4, 16, 2, 2, 64), (2, 4, 16, 2, 64)], ids=["blocks", "rows", "first"])
def test_halves_in_blocks_are_one_launch(shape: tuple[int, ...]) -> None:
    def store(k: Any, v: Any, kv: Any, b: Any, r: Any) -> None:
        kc, vc = kv.unbind(shape.index(2))
        kc[b, r] = quantise(k)
        vc[b, r] = quantise(v)

    check("downcast_fp8", store, rows(), rows(), cache(*shape), BLOCKS, ROWS_OF, count=1)


@pytest.mark.parametrize("first", [0, 2])
def test_blocks_that_overlap_are_stored_one_after_the_other(first: int) -> None:
    def store(k: Any, v: Any, kv: Any, b: Any, r: Any) -> None:
        kv[first : first + 4][b, r] = quantise(k)
        kv[3 - first : 7 - first][b, r] = quantise(v)

    check("downcast_fp8", store, rows(), rows(), cache(8, 16, 2, 64), BLOCKS, ROWS_OF, count=2)


@pytest.mark.parametrize("apart", [(slice(0, 2), slice(1, 3)), (slice(0, 2), slice(2, 4))], ids=["overlapping", "apart"])
def test_heads_of_one_cache_in_blocks(apart: tuple[slice, slice]) -> None:
    def store(k: Any, v: Any, kv: Any, b: Any, r: Any) -> None:
        kv[:, :, apart[0]][b, r] = quantise(k)
        kv[:, :, apart[1]][b, r] = quantise(v)

    count = 1 if apart[1].start == 2 else 2
    check("downcast_fp8", store, rows(), rows(), cache(4, 16, 4, 64), BLOCKS, ROWS_OF, count=count)


def test_k_in_other_blocks_or_rows_than_v_is_stored_on_its_own() -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any, b: Any, r: Any, other: Any, of_b: bool) -> None:
        kc[b, r] = quantise(k)
        vc[other if of_b else b, r if of_b else other] = quantise(v)

    caches = cache(4, 16, 2, 64), cache(4, 16, 2, 64)
    for of_b in (False, True):
        check("downcast_fp8", store, rows(), rows(), *caches, BLOCKS, ROWS_OF, BLOCKS.flip(0), of_b, count=2)


def test_heads_before_rows_of_k_alone_are_stored_on_their_own() -> None:
    """K's rows lie at one distance, V's heads apart: two kernels."""

    def store(k: Any, v: Any, kc: Any, vc: Any, s: Any) -> None:
        kc[s] = quantise(k)
        vc.transpose(0, 1)[s] = quantise(v)

    check("downcast_fp8", store, rows(), rows(), cache(64, 2, 64), cache(2, 64, 64), SLOTS, count=2)


@pytest.mark.parametrize("order", [[0, 3, 1, 2], [3, 0, 2, 1]], ids=["columns_apart", "all_apart"])
def test_blocks_whose_columns_lie_apart(order: list[int]) -> None:
    def store(k: Any, kc: Any, b: Any, r: Any) -> None:
        kc.permute(order)[b, r] = quantise(k)

    sizes = (4, 16, 2, 64)
    shape = [sizes[order.index(dim)] for dim in range(4)]
    refused("downcast_fp8", store, rows(), cache(*shape), BLOCKS, ROWS_OF, reason="cache layout")


def test_rows_that_are_put_back_permuted_otherwise() -> None:
    def store(b: Any, k: Any, s: Any) -> Any:
        return put(b.permute(1, 2, 0), k.view(4, 2, 64), s).permute(1, 0, 2).contiguous()

    refused("downcast_fp8", store, cache(64, 64, 2), rows(4), FEW, reason="the view is not written back")


# ---- a scale a head --------------------------------------------------------------------------------------------------

A_HEAD = torch.tensor([0.5, 0.75])

OF_HEADS: dict[str, Callable[[Any, Any], Any]] = {
    "rows": lambda k, a: quantise(k, a[:, None]),
    "all_dimensions": lambda k, a: quantise(k, a.view(1, 2, 1)),
    "sequences": lambda k, a: quantise(k.view(2, 8, 2, 64), a.view(1, 1, 2, 1)).view(16, 2, 64),
    "heads_first": lambda k, a: quantise(k.transpose(0, 1), a.view(2, 1, 1)).transpose(0, 1),
    "multiplied": lambda k, a: (k.float() * a[:, None]).to(E4),
    "unclamped": lambda k, a: (k / a[:, None]).to(E4),
    "strided": lambda k, a: quantise(k, a.repeat_interleave(3)[::3].view(2, 1)),
    "bf16": lambda k, a: quantise(k.bfloat16(), a.bfloat16()[:, None]),
}


@pytest.mark.parametrize("name", list(OF_HEADS))
def test_a_scale_a_head(name: str) -> None:
    def store(k: Any, a: Any, kc: Any, s: Any) -> None:
        kc[s] = OF_HEADS[name](k, a)

    check("downcast_fp8", store, rows(), A_HEAD, cache(64, 2, 64), SLOTS, count=1)


def test_a_scale_a_head_of_one_token_and_of_rows_behind_heads() -> None:
    def store(k: Any, a: Any, kc: Any, s: Any) -> None:
        kc[s] = quantise(k, a[:, None])

    def heads_first(k: Any, a: Any, kc: Any, s: Any) -> None:
        kc[:, s] = quantise(k.transpose(0, 1), a.view(2, 1, 1))

    check("downcast_fp8", store, rows(1), A_HEAD, cache(64, 2, 64), SLOTS[:1], count=1)
    check("downcast_fp8", heads_first, rows(), A_HEAD, cache(2, 64, 64), SLOTS, count=1)


NOT_OF_HEADS: dict[str, tuple[tuple[int, ...], Callable[[Any, Any], Any]]] = {
    "a_token": ((64, 2, 2), lambda k, a: quantise(k[:2, :, :2], a.view(2, 1, 1))),
    "a_column": ((64, 2, 2), lambda k, a: quantise(k[:2, :, :2], a)),
    "half_of_a_head": ((64, 2, 4), lambda k, a: quantise(k[:2, :, :4].reshape(2, 2, 2, 2), a.view(2, 1)).view(2, 2, 4)),
    "pairs_of_heads": ((64, 4, 2), lambda k, a: quantise(k[:2, :, :4].reshape(2, 2, 2, 2), a.view(2, 1, 1)).view(2, 4, 2)),
    "a_flat_row": ((64, 8), lambda k, a: quantise(k[:2, :, :4], a[:, None]).reshape(2, 8)),
    "tokens_and_heads": ((64, 2, 4), lambda k, a: quantise(k[:2, :, :4], a.view(2, 1, 1) * a.view(1, 2, 1))),
    "tokens_moved": ((64, 2, 4), lambda k, a: quantise(k[:2, :, :4], a[:, None]).transpose(0, 1)),
    "twice": ((64, 2, 4), lambda k, a: quantise(k[:2, :, :4].float() / a.sum(), a[:, None])),
}


@pytest.mark.parametrize("name", list(NOT_OF_HEADS))
def test_scales_that_are_not_one_a_head(name: str) -> None:
    shape, scaled = NOT_OF_HEADS[name]

    def store(k: Any, a: Any, kc: Any, s: Any) -> None:
        kc[s] = scaled(k, a)

    refused("downcast_fp8", store, rows(), A_HEAD, cache(*shape), SLOTS[:2], reason="scale layout")


def test_a_bound_a_head_is_no_scale() -> None:
    def store(k: Any, a: Any, kc: Any, s: Any) -> None:
        kc[s] = torch.minimum(k.float(), a[:, None]).to(E4)

    refused("downcast_fp8", store, rows(), A_HEAD, cache(64, 2, 64), SLOTS, reason="scale layout")


# ---- slices and steps ------------------------------------------------------------------------------------------------


def test_a_slice_of_the_second_dimension() -> None:
    def store(k: Any, kc: Any) -> Any:
        return torch.slice_scatter(kc, quantise(k), 1, 3, 5)

    refused("downcast_fp8", store, rows(), cache(16, 8, 64), reason="index layout")


def test_a_slice_that_begins_behind_the_end() -> None:
    def store(k: Any, kc: Any) -> Any:
        return torch.slice_scatter(kc, quantise(k), 0, -20, -4)

    refused("downcast_fp8", store, rows(), cache(64, 2, 64), reason="index layout")


@pytest.mark.parametrize("steps", [(2, 3), (1, 2), (2, 1)])
def test_slices_with_two_steps_are_stored_on_their_own(steps: tuple[int, int]) -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any) -> None:
        kc.copy_(torch.slice_scatter(kc, quantise(k), 0, 4, 4 + 16 * steps[0], steps[0]))
        vc.copy_(torch.slice_scatter(vc, quantise(v), 0, 4, 4 + 16 * steps[1], steps[1]))

    check("downcast_fp8", store, rows(), rows(), cache(64, 2, 64), cache(64, 2, 64), count=2)


def test_halves_of_one_buffer_with_rows_of_two_pitches_are_stored_one_after_the_other() -> None:
    """The first's rows are every second row of the other's memory: side by side as far as the first's pitch tells."""

    def store(k: Any, v: Any, b: Any, s: Any) -> None:
        b[:, :2][s] = quantise(k)
        b.view(128, 2, 64)[1:65][s] = quantise(v)

    check("downcast_fp8", store, rows(), rows(), cache(64, 4, 64), torch.arange(16), count=2)


# ---- scales and other readers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["a_row", "two"])
def test_a_store_has_one_scale_of_one_element(scale: str) -> None:
    def store(k: Any, a: Any, b: Any, kc: Any, s: Any) -> None:
        kc[s] = quantise(k, a) if scale == "a_row" else quantise(k.float() * b, b)

    given = torch.rand(16, 2, 1) + 0.5, torch.tensor(0.5)
    refused("downcast_fp8", store, rows(), *given, cache(64, 2, 64), SLOTS, reason="scale layout")


def test_a_scale_on_the_host_of_rows_on_the_device() -> None:
    def store(k: Any, scale: Any, kc: Any, s: Any) -> None:
        kc.view(-1, 2, 64)[s] = quantise(k, scale)

    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
        given = [torch.empty(16, 2, 64, dtype=BF16, device="cuda"), torch.empty((), device="cpu")]
        given += [torch.empty(64, 2, 64, dtype=E4, device="cuda"), torch.empty(16, dtype=torch.int64, device="cuda")]
        report = inductor_ext.explain(store, *given, rules={"downcast_fp8": "always"})
    assert [each.reason for each in report.refusals if each.rule == "downcast_fp8"] == ["scale device"]


@pytest.mark.parametrize("read", ["cast", "view"])
def test_stored_rows_that_are_read_too(read: str) -> None:
    def store(k: Any, kc: Any, s: Any) -> Any:
        q = quantise(k)
        seen = q if read == "cast" else q.view(16, 128)
        kc.view(64, *seen.shape[1:])[s] = seen
        return seen.float() * 2

    refused("downcast_fp8", store, rows(), cache(64, 2, 64), SLOTS, reason="what is stored in FP8 has a second user")


def arena(k: torch.Tensor) -> torch.Tensor:
    """A cache of 64 rows of 128 bytes, and behind it the bytes of ``k``."""
    return torch.cat([cache(64 * 128, dtype=U8), k.contiguous().view(-1).view(U8)])


def in_arena(memory: Any) -> tuple[Any, Any]:
    return memory[: 64 * 128].view(64, 2, 64), memory[64 * 128 :].view(BF16).view(16, 2, 64)


def test_rows_that_lie_in_the_buffer_that_is_written() -> None:
    def store(memory: Any, s: Any) -> None:
        kc, k = in_arena(memory)
        kc[s] = quantise(k).view(U8)

    refused("downcast_fp8", store, arena(rows()), SLOTS, reason="an input lies in the cache")


@pytest.mark.parametrize("read_by", ["first", "second"])
def test_rows_that_lie_in_the_other_cache_are_stored_on_their_own(read_by: str) -> None:
    def store(memory: Any, other: Any, cache: Any, s: Any) -> None:
        in_memory, k = in_arena(memory)
        for name in ("first", "second"):
            if name == read_by:
                cache[s] = quantise(k).view(U8)
            else:
                in_memory[s] = quantise(other).view(U8)

    check("downcast_fp8", store, arena(rows()), rows(), cache(64, 2, 64, dtype=U8), SLOTS, count=2)


@pytest.mark.parametrize("way", ["copied_to_an_input", "returned"])
def test_old_rows_that_are_kept(way: str) -> None:
    def store(k: Any, kc: Any, kept: Any, s: Any) -> Any:
        old = kept.copy_(kc) if way == "copied_to_an_input" else kc.clone()
        kc.view(-1, 2, 64)[s] = quantise(k)
        return None if way == "copied_to_an_input" else old

    given = rows(), cache(4, 16, 2, 64), cache(4, 16, 2, 64), SLOTS
    found, _ = run_compiled(store, given, rules={"downcast_fp8": "always"})
    assert_all_same_bytes(found, run_copies(store, given))


# ---- stores of each sequence's rows ------------------------------------------------------------------------------------


def positions(count: int = N) -> torch.Tensor:
    return torch.arange(count) * 2


def bf16_cache(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def a_mask() -> torch.Tensor:
    mask = torch.zeros(2 * N, dtype=torch.bool)
    mask[positions()] = True
    return mask


SEQUENCES: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "taken": (lambda c, k, at: c.index_copy_(2, at, k), positions(), ""),
    "taken_by_index": (lambda c, k, at: torch.ops.aten.index_put_(c, [None, None, at], k), positions(), ""),
    "by_a_mask": (lambda c, k, at: torch.ops.aten.index_put_(c, [None, None, at], k), a_mask(), "index layout"),
    "of_two_dimensions": (
        lambda c, k, at: torch.ops.aten.index_put_(c, [None, None, at.view(2, 4)], k.reshape(N, N, 2, 4, N)), positions(),
        "index layout",
    ),
    "added": (lambda c, k, at: torch.ops.aten.index_put_(c, [None, None, at], k, True), positions(), "the store accumulates"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SEQUENCES))
def test_rows_of_each_sequence(name: str) -> None:
    make, at, reason = SEQUENCES[name]

    def store(x: Any, y: Any, cos: Any, sin: Any, c: Any, at: Any) -> Any:
        q, k = rotated(x, cos, sin), rotated(y, cos, sin)
        make(c, k, at)
        return q

    given = heads(), heads(), table(1, 1, N, N), table(1, 1, N, N), bf16_cache(N, N, 2 * N, N), at
    if reason:
        refused("qk_norm_rope_store", store, *given, reason=reason)
    else:
        check("qk_norm_rope_store", store, *given, count=1)


@pytest.mark.parametrize("shape", [(1, N, N, N), (N, 1, N, N), (N, N, 1, N), (N, N, N)], ids=str)
def test_rows_that_would_be_repeated_in_a_cache_of_sequences(shape: tuple[int, ...]) -> None:
    y = heads(*shape) if len(shape) == 4 else heads(1, *shape)[0]
    at = positions()

    def store(x: Any, y: Any, cos: Any, sin: Any, c: Any, at: Any) -> Any:
        q, k = rotated(x, cos, sin), rotated(y, cos[0, :, : shape[-2]], sin[0, :, : shape[-2]])
        torch.ops.aten.index_put_(c, [None, None, at], k)
        return q

    given = heads(), y, table(1, 1, N, N), table(1, 1, N, N), bf16_cache(N, N, 2 * N, N), at
    refused("qk_norm_rope_store", store, *given, reason="the stored rows broadcast")


def test_rows_of_a_cache_made_in_the_graph() -> None:
    def store(x: Any, y: Any, cos: Any, sin: Any, c: Any, at: Any) -> Any:
        q, k = rotated(x, cos, sin), rotated(y, cos, sin)
        return q, torch.ops.aten.index_put(c + 1, [None, None, at], k) * 2

    given = heads(), heads(), table(1, 1, N, N), table(1, 1, N, N), bf16_cache(N, N, 2 * N, N), positions()
    refused("qk_norm_rope_store", store, *given, reason="the cache is not a graph input")


def test_rows_of_a_cache_whose_columns_are_apart() -> None:
    def store(x: Any, y: Any, cos: Any, sin: Any, c: Any, at: Any) -> Any:
        q, k = rotated(x, cos, sin), rotated(y, cos, sin)
        c.index_copy_(2, at, k)
        return q

    apart = bf16_cache(N, N, N, 2 * N).transpose(2, 3)
    given = heads(), heads(), table(1, 1, N, N), table(1, 1, N, N), apart, positions()
    refused("qk_norm_rope_store", store, *given, reason="cache layout")


def test_a_cache_whose_rows_are_not_contiguous() -> None:
    def store(k: Any, kc: Any, s: Any) -> None:
        kc[s] = quantise(k)

    refused("downcast_fp8", store, rows(), cache(64, 64, 2).transpose(1, 2), SLOTS, reason="cache layout")


@pytest.mark.parametrize("least", [-20, 0])
def test_slots_of_k_that_count_from_the_end(least: int) -> None:
    def store(x: Any, y: Any, cos: Any, sin: Any, c: Any, at: Any) -> Any:
        q, k = rotated(x, cos, sin), rotated(y, cos, sin)
        c[at + least] = k.transpose(1, 2).reshape(-1, N, N)
        return q

    tables = table(1, 1, N, N), table(1, 1, N, N)
    given = heads(2, N, N, N), heads(2, N, N, N), *tables, bf16_cache(40, N, N), torch.arange(2 * N)
    check("qk_norm_rope_store", store, *given, count=1)


@pytest.mark.parametrize("spelling", ["cast", "mul"])
def test_eps_of_a_norm_that_is_stored(spelling: str) -> None:
    """Rows so small that eps decides."""

    def store(x: Any, y: Any, cos: Any, sin: Any, w: Any, c: Any, at: Any) -> Any:
        def normed(x: Any) -> Any:
            h = x.float()
            n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-4)
            return w * n.to(x.dtype) if spelling == "cast" else (n * w.float()).to(x.dtype)

        q, k = rotated(normed(x), cos, sin), rotated(normed(y), cos, sin)
        c[at] = k.transpose(1, 2).reshape(-1, N, N)
        return q

    x, y = (heads(2, N, N, N) * 1e-3 for _ in "qk")
    given = x, y, table(1, 1, N, N), table(1, 1, N, N), WEIGHT[:N], bf16_cache(40, N, N), torch.arange(2 * N)
    check("qk_norm_rope_store", store, *given, count=1)
