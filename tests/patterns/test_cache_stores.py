"""Stores into FP8 caches: the same bytes as eager in every cache, and nothing rewritten that could differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from tests.support.compiled import Recorder, run_compiled, run_copies
from tests.support.equal import assert_all_same_bytes
from tests.support.fakegpu import fake_cuda_inputs

E4, E5, U8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8


def quantise(x: Any, scale: Any = 0.5, dtype: torch.dtype = E4) -> Any:
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)


def rows(tokens: int = 16, heads: int = 8, dim: int = 64) -> torch.Tensor:
    return (torch.randn(tokens, heads, dim) * 30).bfloat16()


def cache(*shape: int, dtype: torch.dtype = E4) -> torch.Tensor:
    size = dtype.itemsize
    return torch.randint(0, 120, (*shape[:-1], shape[-1] * size), dtype=U8).view(dtype)


def slots(tokens: int = 16) -> torch.Tensor:
    return torch.arange(tokens) * 3 % 61


def check(fn: Callable[..., Any], *inputs: Any, count: int = 1, dynamic: bool = False) -> Recorder:
    found, recorder = run_compiled(fn, inputs, dynamic=dynamic)
    assert recorder.counts().get("downcast_fp8", 0) == count, recorder.refusals("downcast_fp8")
    assert_all_same_bytes(found, run_copies(fn, inputs))
    return recorder


def check_refused(fn: Callable[..., Any], *inputs: Any, reason: str) -> None:
    recorder = check(fn, *inputs, count=0)
    assert reason in [refusal.reason for refusal in recorder.refusals("downcast_fp8")]


# ---- shapes, indices, scales -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_negative_indices_count_from_the_end(index: torch.dtype, dynamic: bool) -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any, s: Any) -> None:
        kc[s - 10] = quantise(k)
        vc[s - 10] = quantise(v)

    at = torch.arange(16, dtype=index)
    check(store, rows(), rows(), cache(64, 8, 64), cache(64, 8, 64), at, count=2, dynamic=dynamic)


def test_shared_negative_indices_make_one_pair() -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any, s: Any) -> None:
        at = s - 10
        kc[at] = quantise(k)
        vc[at] = quantise(v)

    check(store, rows(), rows(), cache(64, 8, 64), cache(64, 8, 64), torch.arange(16))


@pytest.mark.parametrize(("heads", "dim"), [(1, 1), (3, 5), (8, 64), (1, 127)])
def test_odd_row_sizes(heads: int, dim: int) -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any, s: Any) -> None:
        kc[s] = quantise(k)
        vc[s] = quantise(v, 0.25)

    given = (rows(16, heads, dim), rows(16, heads, dim), cache(64, heads, dim), cache(64, heads, dim), slots())
    check(store, *given)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_tokens(tokens: int) -> None:
    def store(k: Any, kc: Any, s: Any) -> None:
        kc.view(-1, 8, 64)[s] = quantise(k)

    found, _ = run_compiled(store, given := (rows(tokens), cache(4, 16, 8, 64), slots(tokens)))
    assert_all_same_bytes(found, run_copies(store, given))


def test_two_dimensional_rows() -> None:
    def store(k: Any, kc: Any, s: Any) -> None:
        kc[s] = quantise(k)

    check(store, rows().view(16, 512), cache(64, 512), slots())


def test_e5m2_and_own_scales() -> None:
    def store(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, s: Any) -> None:
        kc[s] = quantise(k, ks, E5)
        vc[s] = quantise(v, vs, E5)

    scales = torch.tensor(0.3), torch.tensor([0.7])
    check(store, rows() * 1e4, rows() * 1e4, *scales, cache(64, 8, 64, dtype=E5), cache(64, 8, 64, dtype=E5), slots())


def test_programs_with_more_numbers_than_one_kernel_takes_are_stored_on_their_own() -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any, s: Any) -> None:
        kc[s] = quantise(k.float() * 0.5 * 0.75 * 1.25)
        vc[s] = quantise(v.float() * 0.5 * 0.75 * 1.25)

    check(store, rows(), rows(), cache(64, 8, 64), cache(64, 8, 64), slots(), count=2)


def test_k_and_v_of_different_dtypes_are_stored_on_their_own() -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any, s: Any) -> None:
        kc[s] = quantise(k)
        vc[s] = quantise(v)

    check(store, rows(), rows().float(), cache(64, 8, 64), cache(64, 8, 64), slots(), count=2)


@pytest.mark.parametrize("start", [0, 5, 48])
@pytest.mark.parametrize("dynamic", [False, True])
def test_slices(start: int, dynamic: bool) -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any) -> None:
        kc[start : start + 16] = quantise(k)
        vc[start : start + 16] = quantise(v)

    check(store, rows(), rows(), cache(64, 8, 64), cache(64, 8, 64), dynamic=dynamic)


def test_slice_with_a_symbolic_start() -> None:
    def store(k: Any, kc: Any, start: int) -> None:
        kc[start : start + k.shape[0]] = quantise(k)

    recorder = Recorder()
    compiled = torch.compile(store, backend=recorder, dynamic=True)
    for start, tokens in ((3, 16), (20, 7), (40, 24)):
        given = (rows(tokens), cache(64, 8, 64), start)
        assert_all_same_bytes(run_copies(compiled, given), run_copies(store, given))


# ---- views of one buffer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_interleaved_halves_are_one_launch(dynamic: bool) -> None:
    def store(k: Any, v: Any, kv: Any, s: Any) -> None:
        kv[:, 0][s] = quantise(k)
        kv[:, 1][s] = quantise(v)

    # With dynamic=True the 2 is a symbol too, and rows side by side cannot be told from rows on top of each other.
    check(store, rows(), rows(), cache(64, 2, 8, 64), slots(), dynamic=dynamic, count=2 if dynamic else 1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_unbound_halves_are_one_launch(dynamic: bool) -> None:
    def store(k: Any, v: Any, kv: Any, s: Any) -> None:
        kc, vc = kv.unbind(0)
        kc[s] = quantise(k)
        vc[s] = quantise(v)

    check(store, rows(), rows(), cache(2, 64, 8, 64), slots(), dynamic=dynamic)


def test_overlapping_views_are_stored_one_after_the_other() -> None:
    def store(k: Any, v: Any, kv: Any, s: Any) -> None:
        kv[:-1][s] = quantise(k)
        kv[1:][s] = quantise(v)

    check(store, rows(), rows(), cache(64, 8, 64), torch.arange(16), count=2)


def test_two_stores_into_one_cache() -> None:
    def store(k: Any, v: Any, kc: Any, s: Any) -> None:
        kc[s] = quantise(k)
        kc[s] = quantise(v)

    check(store, rows(), rows(), cache(64, 8, 64), slots(), count=2)


def test_layers_of_one_cache() -> None:
    def store(k: Any, v: Any, kv: Any, s: Any) -> None:
        for layer in range(2):
            kv[layer, 0][s] = quantise(k * (layer + 1))
            kv[layer, 1][s] = quantise(v * (layer + 1))

    given = (rows(), rows(), cache(2, 2, 64, 8, 64), slots())
    found, _ = run_compiled(store, given, rules={"downcast_fp8": "always"})
    assert_all_same_bytes(found, run_copies(store, given))


# ---- blocks ------------------------------------------------------------------------------------------------------------


def told(k: Any, v: Any, kv: Any, b: Any, r: Any) -> None:
    kv[b, 0, r] = quantise(k)
    kv[b, 1, r] = quantise(v, 0.25)


@pytest.mark.parametrize("tokens", [0, 1, 16])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_blocks_and_rows_count_from_their_own_ends(tokens: int, index: torch.dtype) -> None:
    block, row = torch.arange(tokens, dtype=index) % 8 - 4, torch.arange(tokens, dtype=index) % 16 - 8
    check(told, rows(tokens), rows(tokens), cache(4, 2, 16, 8, 64), block, row)


@pytest.mark.parametrize(("block", "row"), [(4, 0), (0, 16), (-5, 0), (0, -17)])
def test_a_block_or_row_out_of_range_is_an_error_as_in_eager_mode(block: int, row: int) -> None:
    given = rows(1), rows(1), cache(4, 2, 16, 8, 64), torch.tensor([block]), torch.tensor([row])
    with pytest.raises((IndexError, RuntimeError)):
        run_copies(told, given)
    with pytest.raises(IndexError, match="downcast_fp8: loc, at: wanted blocks"):
        run_compiled(told, given)


@pytest.mark.parametrize("slot", [64, -65])
def test_a_slot_of_blocks_out_of_range_is_an_error_as_in_eager_mode(slot: int) -> None:
    def store(k: Any, kv: Any, s: Any) -> None:
        kv[:, 0][s // 16, s % 16] = quantise(k)

    given = rows(1), cache(4, 2, 16, 8, 64), torch.tensor([slot])
    with pytest.raises((IndexError, RuntimeError)):
        run_copies(store, given)
    with pytest.raises(IndexError, match="downcast_fp8: loc: wanted rows in"):
        run_compiled(store, given)


def test_blocks_with_symbolic_sizes() -> None:
    def store(k: Any, kv: Any, b: Any, r: Any) -> Any:
        kc, vc = kv.unbind(1)
        kc[b, r] = quantise(k)
        vc.transpose(1, 2)[b, :, r] = quantise(k, 2.0)
        return kv.float().amax()

    recorder = Recorder()
    compiled = torch.compile(store, backend=recorder, dynamic=True)
    for tokens, blocks, size in ((16, 4, 16), (7, 5, 16), (24, 3, 8)):
        block, row = torch.arange(tokens) % blocks, torch.arange(tokens) % size
        given = (rows(tokens), cache(blocks, 2, size, 8, 64), block, row)
        assert_all_same_bytes(run_copies(compiled, given), run_copies(store, given))
    assert recorder.counts()["downcast_fp8"] >= 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_slots_of_blocks_of_a_symbolic_size(dynamic: bool) -> None:
    def store(k: Any, kv: Any, s: Any) -> None:
        kv[:, 0][s // kv.shape[2], s % kv.shape[2]] = quantise(k)

    check(store, rows(), cache(4, 2, 16, 8, 64), slots() - 20, dynamic=dynamic)


def test_heads_first_is_read_after_the_store() -> None:
    """Attention reads the new rows through its own view of the cache."""

    def store(k: Any, v: Any, kc: Any, vc: Any, b: Any, r: Any) -> Any:
        before = kc.float().amax()
        by_rows = kc.transpose(1, 2)
        by_rows[b, r] = quantise(k)
        vc[b, :, r] = quantise(v)
        return before, by_rows.float().amax((0, 1)), kc[1].float(), vc.transpose(2, 3).float().amax()

    given = rows(), rows(), cache(4, 8, 16, 64), cache(4, 8, 16, 64), torch.arange(16) % 4, torch.arange(16)
    found, recorder = run_compiled(store, given, rules={"downcast_fp8": "always"})
    assert recorder.counts()["downcast_fp8"] >= 1
    assert_all_same_bytes(found, run_copies(store, given))


# ---- reads around the store ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["read_before_k_is_made", "read_after_k_is_made"])
@pytest.mark.parametrize("through", ["direct", "view"])
def test_old_rows_read_before_the_store(through: str, late: bool) -> None:
    def store(a: Any, b: Any, kc: Any, s: Any) -> Any:
        target = kc if through == "direct" else kc.view(-1, 8, 64)
        k = (a @ b).view(16, 8, 64) if late else None
        old = target[s]
        k = (a @ b).view(16, 8, 64) if k is None else k
        target[s] = quantise(k)
        return old.float() + 1

    shape = (64, 8, 64) if through == "direct" else (4, 16, 8, 64)
    check(store, torch.randn(16, 32).bfloat16(), torch.randn(32, 512).bfloat16(), cache(*shape), slots())


def test_whole_cache_read_before_and_after() -> None:
    def store(k: Any, kc: Any, s: Any) -> Any:
        before = kc.float().amax(dim=(1, 2))
        kc.view(-1, 8, 64)[s] = quantise(k)
        return before, kc.float().amax(dim=(1, 2))

    check(store, rows(), cache(64, 8, 64), slots())


def test_attention_reads_k_between_the_two_stores() -> None:
    def store(k: Any, v: Any, kc: Any, vc: Any, s: Any) -> Any:
        kc.view(-1, 8, 64)[s] = quantise(k)
        read = kc.view(-1, 8, 64)[s].float().amax(0)
        vc.view(-1, 8, 64)[s] = quantise(v + read.bfloat16())
        return read

    given = (rows(), rows(), cache(4, 16, 8, 64), cache(4, 16, 8, 64), slots())
    found, recorder = run_compiled(store, given, rules={"downcast_fp8": "always"})
    assert recorder.counts()["downcast_fp8"] == 2
    assert_all_same_bytes(found, run_copies(store, given))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2])
def test_numbers_copied_into_a_byte_cache_are_not_bytes(step: int) -> None:
    def store(k: Any, kc: Any) -> None:
        kc[2 : 2 + 16 * step : step].copy_(quantise(k))

    check_refused(store, rows() * 0 + 5, cache(64, 8, 64, dtype=U8), reason="the store converts")


@pytest.mark.parametrize("step", [1, 2])
def test_bytes_copied_into_an_fp8_cache_are_numbers(step: int) -> None:
    def store(k: Any, kc: Any) -> None:
        kc[2 : 2 + 16 * step : step].copy_(quantise(k).view(U8))

    check_refused(store, rows() * 0 + 5, cache(64, 8, 64), reason="the store converts")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, E5], ids=str)
def test_caches_of_another_dtype(dtype: torch.dtype) -> None:
    def store(k: Any, kc: Any, s: Any) -> None:
        kc.view(U8)[s] = quantise(k).view(U8)

    check_refused(store, rows(16, 8, 64), cache(64, 8, 64 // dtype.itemsize, dtype=dtype), slots(), reason="cache dtype")


def test_mask_index() -> None:
    def store(k: Any, kc: Any, mask: Any) -> None:
        kc[mask] = quantise(k)

    mask = torch.zeros(64, dtype=torch.bool)
    mask[:16] = True
    check_refused(store, rows(), cache(64, 8, 64), mask, reason="index layout")


def test_one_row_for_all_slots() -> None:
    def store(k: Any, kc: Any, s: Any) -> None:
        kc[s] = quantise(k)

    check_refused(store, rows(1), cache(64, 8, 64), slots(), reason="the stored rows broadcast")


def test_transposed_rows() -> None:
    def store(k: Any, kc: Any, s: Any) -> None:
        kc[s] = quantise(k.transpose(1, 2))

    check_refused(store, rows(16, 64, 8), cache(64, 8, 64), slots(), reason="input layout")


@pytest.mark.parametrize("where", ["indices", "rows"])
def test_cpu_rows_and_indices_of_a_cuda_cache(where: str) -> None:
    def by_index(k: Any, kc: Any, s: Any) -> None:
        kc.view(-1, 8, 64)[s] = quantise(k)

    def by_slice(k: Any, kc: Any, s: Any) -> None:
        kc[3:19].copy_(quantise(k))

    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
        k = torch.empty(16, 8, 64, dtype=torch.bfloat16, device="cpu" if where == "rows" else "cuda")
        kc = torch.empty(64, 8, 64, dtype=E4, device="cuda")
        at = torch.empty(16, dtype=torch.int64, device="cpu")
        report = inductor_ext.explain(by_slice if where == "rows" else by_index, k, kc, at)
    assert "downcast_fp8" not in report.counts()
    (refusal,) = [refusal for refusal in report.refusals if refusal.rule == "downcast_fp8"]
    assert (refusal.reason, refusal.found.split(", ")[-1]) == ("device", "cpu")


# ---- dynamic numbers of tokens -----------------------------------------------------------------------------------------


def test_rows_and_indices_with_symbols_of_their_own() -> None:
    """As vLLM and SGLang compile it: the number of tokens changes, and only a guard says that there are as many indices."""

    def store(k: Any, v: Any, kc: Any, vc: Any, s: Any) -> None:
        kc.view(-1, 8, 64)[s] = quantise(k)
        vc.view(-1, 8, 64)[s] = quantise(v)

    def given(tokens: int, indices: int) -> tuple[Any, ...]:
        return rows(tokens), rows(tokens), cache(4, 16, 8, 64), cache(4, 16, 8, 64), slots(indices)

    recorder = Recorder()
    compiled = torch.compile(store, backend=recorder)
    for tokens in (16, 17, 33, 2, 60):
        inputs = given(tokens, tokens)
        assert_all_same_bytes(run_copies(compiled, inputs), run_copies(store, inputs))
    assert [report.counts() for report in recorder.reports] == [{"downcast_fp8": 1}] * 2, "static, then dynamic; no more"

    inputs = given(1, 16)  # eager stores the one row in all slots
    assert_all_same_bytes(run_copies(compiled, inputs), run_copies(store, inputs))
