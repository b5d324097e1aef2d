"""Programs that differ in one respect from what a rule looks for: refused, or rewritten to the same bytes.

Each is here because a mutant of a guard (``./run mutate``) once lived through all other tests. They are verified graph against
graph, without compiling anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext.report.verify import Verification
from tests.support.compiled import run_compiled, run_copies
from tests.support.equal import assert_all_same_bytes
from tests.support.fakegpu import fake_cuda_inputs

E4, E5, U8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8
BF16 = torch.bfloat16


def check(rule: str, fn: Callable[..., Any], *inputs: Any, count: int, dynamic: bool = False) -> Verification:
    """``rule`` rewrites ``fn`` as often as that, and what it leaves gives the same bytes, or values as near as it promises."""
    found = inductor_ext.verify(fn, *inputs, rules={rule: "always"}, dynamic=dynamic, end_to_end=False)
    rewrites = [event for graph in found.graphs for event in graph.rewrites if event.rule == rule]
    assert len(rewrites) == count, reasons(found, rule)
    assert found.differs == []
    return found


def reasons(found: Verification, rule: str) -> list[str]:
    return [refusal.reason for graph in found.graphs for refusal in graph.refusals if refusal.rule == rule]


def refused(rule: str, fn: Callable[..., Any], *inputs: Any, reason: str) -> None:
    found = check(rule, fn, *inputs, count=0)
    assert reason in reasons(found, rule)


def quantise(x: Any, scale: Any = 0.5, dtype: torch.dtype = E4) -> Any:
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)


def rows(tokens: int = 16, heads: int = 2, dim: int = 64) -> torch.Tensor:
    return (torch.randn(tokens, heads, dim) * 30).bfloat16()


def cache(*shape: int, dtype: torch.dtype = E4) -> torch.Tensor:
    return torch.randint(0, 120, shape, dtype=U8).view(dtype)


SLOTS = torch.arange(16) * 3


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


def put(view: Any, k: Any, s: Any) -> Any:
    return view.index_put((s,), quantise(k))


FEW = torch.tensor([3, 0, 7, 9])

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

    refused("downcast_fp8", store, rows(), cache(64, 2, 64), SLOTS, reason="the stored FP8 rows have a second user")


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


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------


def quantise_rows(y: Any) -> Any:
    s = (y.abs().amax(-1, keepdim=True) / 448.0).float()
    return (y.float() / s).clamp(-448.0, 448.0).to(E4), s


def norm(x: Any, w: Any, mean: Callable[[Any], Any], eps: float = 1e-6) -> Any:
    h = x.float()
    return w * (h * torch.rsqrt(mean(h) + eps)).to(x.dtype)


def square(seed: int = 0, size: int = 32) -> torch.Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).bfloat16()


WEIGHT = torch.linspace(0.5, 1.5, 32).bfloat16()

#: What is nearly the mean of a row's squares; of a square x, so that shapes tell nothing.
MEANS: dict[str, Callable[[Any], Any]] = {
    "of_columns": lambda h: h.pow(2).mean(0, keepdim=True),
    "without_keepdim": lambda h: h.pow(2).mean(-1),
    "of_all": lambda h: h.pow(2).mean((0, 1), keepdim=True),
    "of_cubes": lambda h: h.pow(3).mean(-1, keepdim=True),
    "of_another": lambda h: (h + 1).pow(2).mean(-1, keepdim=True),
    "of_products": lambda h: (h * h.t()).mean(-1, keepdim=True),
    "of_products_with_another": lambda h: (h.t() * h).mean(-1, keepdim=True),
    "of_absolute_values": lambda h: h.abs().mean(-1, keepdim=True),
    "sum": lambda h: h.pow(2).sum(-1, keepdim=True),
}


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("mean", list(MEANS))
def test_what_is_nearly_a_mean_of_squares_is_no_norm(mean: str, dtype: torch.dtype) -> None:
    given = square().abs().to(dtype), WEIGHT.to(dtype)
    check("rms_norm_quantize", lambda x, w: quantise_rows(norm(x, w, MEANS[mean])), *given, count=0)


def test_means_of_squares() -> None:
    for spelled in (lambda h: h.pow(2).mean(-1, keepdim=True), lambda h: (h * h).mean(1, keepdim=True)):
        check("rms_norm_quantize", lambda x, w, spelled=spelled: quantise_rows(norm(x, w, spelled)), square(), WEIGHT, count=1)


def test_a_norm_of_something_else_times_x_is_no_norm() -> None:
    def other(x: Any, y: Any, w: Any) -> Any:
        h = x.float()
        return quantise_rows(w * (y.float() * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16))

    check("rms_norm_quantize", other, square(), square(1), WEIGHT, count=0)


@pytest.mark.parametrize("end", ["bf16", "fp32", "gemma"])
@pytest.mark.parametrize("what", ["sum", "difference", "quotient"])
def test_what_is_not_times_rsqrt_is_no_norm(what: str, end: str) -> None:
    def other(x: Any, w: Any) -> Any:
        h = x.float()
        factor = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        n = {"sum": lambda: h + factor, "difference": lambda: h - factor, "quotient": lambda: h / factor}[what]()
        return quantise_rows(w * n.to(x.dtype) if end != "gemma" else (n * (1 + w.float())).to(x.dtype))

    x, w = (square().float(), WEIGHT.float()) if end == "fp32" else (square(), WEIGHT)
    check("rms_norm_quantize", other, x, w, count=0)


@pytest.mark.parametrize("end", ["bf16", "fp32", "gemma"])
@pytest.mark.parametrize("what", ["sum", "quotient", "negated", "magnitude"])
def test_what_is_not_times_a_weight_is_no_norm(what: str, end: str) -> None:
    def other(x: Any, w: Any) -> Any:
        h = x.float()
        n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        n = n if end == "gemma" else n.to(x.dtype)
        y = {"sum": lambda: n + w, "quotient": lambda: n / w, "negated": lambda: w * -n, "magnitude": lambda: w * n.abs()}
        return quantise_rows(y[what]().to(x.dtype))

    x, w = (square().float(), WEIGHT.float()) if end == "fp32" else (square(), WEIGHT)
    check("rms_norm_quantize", other, x, w, count=0)


@pytest.mark.parametrize("between", [torch.float16, torch.bfloat16])
def test_a_norm_that_is_rounded_in_another_way(between: torch.dtype) -> None:
    def other(x: Any, w: Any) -> Any:
        h = x.float()
        n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return quantise_rows(w * n.to(between).float())

    check("rms_norm_quantize", other, square().float(), WEIGHT.float(), count=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_into_another_dtype_is_not_the_kernels(dtype: torch.dtype) -> None:
    def other(x: Any, w: Any) -> Any:
        h = x.float()
        return quantise_rows((h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * w.float()).to(dtype))

    found = check("rms_norm_quantize", other, square(), WEIGHT, count=0)
    assert dtype is torch.float32 or "norm dtype" in reasons(found, "rms_norm_quantize")


@pytest.mark.parametrize("weight", [WEIGHT[:1], WEIGHT.double()], ids=["of_one_element", "float64"])
def test_a_weight_that_the_kernel_does_not_take(weight: torch.Tensor) -> None:
    def other(x: Any, w: Any) -> Any:
        return quantise_rows(norm(x, w, MEANS_OF_SQUARES).to(BF16))

    check("rms_norm_quantize", other, square(), weight, count=0)


def test_a_normalised_value_that_is_read_too() -> None:
    def other(x: Any, w: Any) -> Any:
        h = x.float()
        n = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return *quantise_rows(w * n), n * 2

    refused("rms_norm_quantize", other, square(), WEIGHT, reason="a step of the norm has a second user")


def test_square_roots_and_reciprocals_are_no_rsqrt() -> None:
    for root in (torch.sqrt, torch.reciprocal):

        def other(x: Any, w: Any, root: Any = root) -> Any:
            h = x.float()
            return quantise_rows(w * (h * root(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16))

        check("rms_norm_quantize", other, square(), WEIGHT, count=0)


def test_rsqrt_of_a_product_is_no_norm() -> None:
    def other(x: Any, w: Any) -> Any:
        h = x.float()
        return quantise_rows(w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) * 1.5)).to(BF16))

    check("rms_norm_quantize", other, square(), WEIGHT, count=0)


@pytest.mark.parametrize("alpha", [2, 0.5, -1])
def test_a_residual_times_a_number_is_not_the_kernels(alpha: float) -> None:
    """The sum is made before the kernel then, and read by it."""

    def scaled(x: Any, r: Any, w: Any) -> Any:
        total = torch.add(x, r, alpha=alpha)
        return *quantise_rows(norm(total, w, MEANS_OF_SQUARES)), total * 2

    check("rms_norm_quantize", scaled, square(), square(1), WEIGHT, count=1)


MEANS_OF_SQUARES = lambda h: h.pow(2).mean(-1, keepdim=True)  # noqa: E731


@pytest.mark.parametrize("other", ["row", "column", "fp32", "number"])
def test_a_residual_unlike_x_is_not_the_kernels(other: str) -> None:
    added = {"row": square(1)[:1], "column": square(1)[:, :1].contiguous(), "fp32": square(1).float(), "number": 3}[other]

    def scaled(x: Any, w: Any, r: Any) -> Any:
        total = (x + r).to(x.dtype) if other != "fp32" else (x.float() + r).bfloat16()
        return *quantise_rows(norm(total, w, MEANS_OF_SQUARES)), total * 2

    check("rms_norm_quantize", scaled, square(), WEIGHT, added, count=1)


@pytest.mark.parametrize("weight", ["per_row", "fp32", "square", "number"])
def test_a_weight_that_is_not_one_number_a_column(weight: str) -> None:
    given = {"per_row": WEIGHT[:, None], "fp32": WEIGHT.float(), "square": square(1), "number": 1.5}[weight]
    found = inductor_ext.verify(
        lambda x, w: quantise_rows(norm(x, w, MEANS_OF_SQUARES).bfloat16()),
        square(), given, rules={"rms_norm_quantize": "always"}, end_to_end=False,
    )  # fmt: skip
    assert found.differs == []


@pytest.mark.parametrize("one", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("where", ["fp32", "bf16", "subtracted"])
def test_what_is_added_to_a_weight(one: float, where: str) -> None:
    def gemma(x: Any, w: Any) -> Any:
        h = x.float()
        made = {"fp32": lambda: one + w.float(), "bf16": lambda: (one + w).float(), "subtracted": lambda: w.float() - one}
        shifted = made[where]()
        return quantise_rows((h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * shifted).to(BF16))

    found = inductor_ext.verify(gemma, square(), WEIGHT / 7, rules={"rms_norm_quantize": "always"}, end_to_end=False)
    assert found.differs == [] and len(found.checks) >= (one == 1.0 and where == "fp32")


# ---- rotations -------------------------------------------------------------------------------------------------------

#: Everything is as long as everything else, so that only the dimension itself tells positions, heads and columns apart.
N = 8
HALF = N // 2


def heads(batch: int = N, count: int = N, positions: int = N, columns: int = N, dtype: torch.dtype = BF16) -> torch.Tensor:
    """[B, H, S, D] as a view of [B, S, H, D]: the layout that the op writes."""
    return (torch.randn(batch, positions, count, columns) * 3).to(dtype).transpose(1, 2)


def table(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def rotated(x: Any, cos: Any, sin: Any) -> Any:
    return x * cos + torch.cat((-x[..., HALF:], x[..., :HALF]), -1) * sin


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


# ---- scales that are made here ---------------------------------------------------------------------------------------


def scaled(x: Any, s: Any) -> Any:
    return (x.float() / s).clamp(-448.0, 448.0).to(E4), s


NEARLY_AMAX: dict[str, Callable[..., Any]] = {
    "smallest": lambda x, y: x.abs().amin(-1, keepdim=True).float(),
    "signed": lambda x, y: x.amax(-1, keepdim=True).float().abs(),
    "of_another": lambda x, y: y.abs().amax(-1, keepdim=True).float(),
    "of_a_sum": lambda x, y: (x + 1).abs().amax(-1, keepdim=True).float(),
    "of_columns": lambda x, y: x.abs().amax(0, keepdim=True).float(),
    "of_two_of_three": lambda x, y: x.view(32, 2, 16).abs().amax((0, 1), keepdim=True).view(1, 16).float().repeat(1, 2),
    "of_rows_of_the_transposed": lambda x, y: x.t().abs().amax(-1, keepdim=True).float(),
    "plus_a_number": lambda x, y: x.abs().amax(-1, keepdim=True).float() + 0.5,
    "times_a_tensor": lambda x, y: x.abs().amax(-1, keepdim=True).float() * y[:, :1].float().abs().add(0.5),
    "rounded_to_integers": lambda x, y: x.abs().amax(-1, keepdim=True).int().float() + 0.0,
    "truncated": lambda x, y: x.abs().amax(-1, keepdim=True).float().int().float(),
    "of_halves": lambda x, y: x.view(32, 2, 16).abs().amax(-1, keepdim=True).expand(32, 2, 16).reshape(32, 32).float(),
    "of_pairs_of_rows": lambda x, y: x.view(16, 64).abs().amax(-1, keepdim=True).float().repeat_interleave(2, 0),
    "mean": lambda x, y: x.abs().mean(-1, keepdim=True).float(),
    "constant_tensor_over_it": lambda x, y: torch.full((), 4.0) / x.abs().amax(-1, keepdim=True).float(),
}


@pytest.mark.parametrize("name", list(NEARLY_AMAX))
def test_what_is_nearly_the_maximum_of_a_row_is_no_dynamic_scale(name: str) -> None:
    make = NEARLY_AMAX[name]
    check("fp8_quantize", lambda x, y: scaled(x, make(x, y)), square() * 9 + 3, square(1) * 5, count=0)


@pytest.mark.parametrize("read", ["amax", "step"])
def test_steps_of_a_dynamic_scale_that_are_read_too(read: str) -> None:
    def other(x: Any) -> Any:
        amax = x.abs().amax(-1, keepdim=True)
        step = amax.float() / 448.0
        return *scaled(x, step.clamp(min=1e-6)), (amax if read == "amax" else step) * 2

    refused("fp8_quantize", other, square(), reason="a step of the scale has a second user")


SPELLED_AMAX: dict[str, Callable[..., Any]] = {
    "reshaped": lambda x: (x.abs().amax(-1).float() / 448.0).unsqueeze(-1),
    "of_fp32": lambda x: x.float().abs().amax(-1, keepdim=True) / 448.0,
    "by_max": lambda x: x.abs().max(-1, keepdim=True)[0].float() / 448.0,
    "clamped_both_ways": lambda x: (x.abs().amax(-1, keepdim=True).float() / 448.0).clamp(1e-3, 0.01),
    "in_bf16": lambda x: (x.abs().amax(-1, keepdim=True) * 0.003).float(),
    "number_over_it": lambda x: (448.0 / x.abs().amax(-1, keepdim=True).float()).reciprocal(),
    "of_all": lambda x: x.abs().amax().float() / 448.0,
    "of_all_by_max": lambda x: x.abs().max().float() / 448.0,
    "of_both_dimensions": lambda x: x.abs().amax((0, 1)).float() / 448.0,
}


@pytest.mark.parametrize("name", list(SPELLED_AMAX))
def test_maxima_of_rows_and_of_all(name: str) -> None:
    check("fp8_quantize", lambda x: scaled(x, SPELLED_AMAX[name](x)), square() * 9, count=1)


def test_maxima_of_the_rows_of_a_transposed_tensor() -> None:
    def turned(x: Any) -> Any:
        y = x.t()
        return scaled(y, y.abs().amax(-1, keepdim=True).float() / 448.0)

    check("fp8_quantize", turned, square().t(), count=1)


# ---- the same chain twice --------------------------------------------------------------------------------------------


def by_rows(x: Any, least: float = 1e-12, limit: float = 448.0, dtype: torch.dtype = E4) -> Any:
    s = x.abs().amax(-1, keepdim=True).float().clamp(min=least) / limit
    return ((x.float() / s).clamp(-limit, limit).to(dtype).float() * 2, s * 2)


TWICE: dict[str, Callable[..., Any]] = {
    "other_limit": lambda x, y: (by_rows(x), by_rows(x, limit=240.0)),
    "other_least": lambda x, y: (by_rows(x), by_rows(x, least=3.0)),
    "other_dtype": lambda x, y: (by_rows(x), by_rows(x, dtype=E5)),
    "other_tensor": lambda x, y: (by_rows(x), by_rows(y)),
    "other_operator": lambda x, y: (((x.float() * 0.5).to(E4).float(), (x.float() / 0.5).to(E4).float())),
    "other_bound": lambda x, y: tuple((x.float() / 0.5).clamp(**{end: 3.0}).to(E4).float() for end in ("min", "max")),
    "other_dimension": lambda x, y: (by_rows(x), tuple(each.t() for each in by_rows(x.t()))),
    "other_scale": lambda x, y: (quantise(x, y[:1, :1]).float(), quantise(x, y[1:2, :1]).float()),
}


@pytest.mark.parametrize("name", list(TWICE))
def test_chains_that_differ_are_not_merged(name: str) -> None:
    check("quantize_once", TWICE[name], square() * 9, square(1).abs() * 5 + 1, count=0)


# ---- activations -----------------------------------------------------------------------------------------------------

F = torch.nn.functional

NEARLY_GATED: dict[str, Callable[..., Any]] = {
    "quick_gelu": lambda g, u: g * torch.sigmoid(1.702 * g) * u,
    "sigmoid_of_another": lambda g, u: (g.float() * torch.sigmoid(u.float())).to(BF16) * u,
    "sigmoid": lambda g, u: torch.sigmoid(g) * u,
    "relu": lambda g, u: F.relu(g) * u,
    "tanh": lambda g, u: torch.tanh(g) * u,
    "mish": lambda g, u: F.mish(g) * u,
    "squared": lambda g, u: F.silu(g) * F.silu(g) + u,
    "sum": lambda g, u: F.silu(g) + u,
    "quotient": lambda g, u: F.silu(g) / u,
    "softplus": lambda g, u: F.softplus(g) * u,
    "silu_of_twice": lambda g, u: (g.float() / (1 + torch.exp(-2 * g.float()))).to(BF16) * u,
    "silu_plus_two": lambda g, u: (g.float() / (2 + torch.exp(-g.float()))).to(BF16) * u,
    "not_rounded": lambda g, u: (g.float() * torch.sigmoid(g.float()) * u.float()).to(BF16),
    "gelu_of_another_number": lambda g, u: (g.float() * 0.5 * (1 + torch.erf(g.float() * 0.7))).to(BF16) * u,
    "up_a_row": lambda g, u: F.silu(g) * u[:1],
    "up_a_column": lambda g, u: F.silu(g) * u[:, :1],
    "up_a_number": lambda g, u: F.silu(g) * 1.5,
    "up_in_fp32": lambda g, u: F.silu(g) * u.float(),
}


@pytest.mark.parametrize("name", list(NEARLY_GATED))
def test_what_is_nearly_a_gated_activation_is_none(name: str) -> None:
    check("act_mul_quantize", lambda g, u: quantise_rows(NEARLY_GATED[name](g, u)), square() * 3, square(1) * 3, count=0)


def test_an_activation_that_is_read_too() -> None:
    def other(g: Any, u: Any) -> Any:
        activated = F.silu(g)
        return *quantise_rows(activated * u), activated * 2

    refused("act_mul_quantize", other, square(), square(1), reason="a step of the activation has a second user")


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


# ---- chains ----------------------------------------------------------------------------------------------------------

SCALE, DOUBLE = torch.tensor([[0.37]]), torch.tensor([[0.37]], dtype=torch.float64)

CHAINS: dict[str, tuple[Callable[..., Any], int]] = {
    "through_float64": (lambda x, s: (x.double() * 0.3).to(E4), 0),
    "promoted_to_float64": (lambda x, s: (x * s.double()).to(E4), 0),
    "rounded_from_float64": (lambda x, s: ((x.double() * 0.3).float() * s).to(E4), 1),
    "through_integers": (lambda x, s: (x.float() * s).int().float().to(E4), 0),
    "of_integers": (lambda x, s: (x.int().float() * s).to(E4), 1),
    "scale_over_x": (lambda x, s: (s / x.float()).to(E4), 0),
    "scale_over_a_column": (lambda x, s: (s / x[:, :1].float()).to(E4), 0),
    "scale_over_columns": (lambda x, s: (x[:1].float() / x[:, :1].float()).to(E4), 0),
    "number_over_x": (lambda x, s: (0.3 / x.float()).to(E4), 1),
    "five_scales": (lambda x, s: (x.float() * s / (s + 1) * (s + 2) / (s + 3) * (s + 4)).to(E4), 1),
    "plus_a_number": (lambda x, s: (x.float() * s + 1.0).to(E4), 0),
    "scale_of_columns": (lambda x, s: (x.float() * x[:1].float()).to(E4), 0),
    "scale_of_elements": (lambda x, s: (x.float() * x.float()).to(E4), 0),
    "bound_in_a_tensor": (lambda x, s: torch.minimum(x.float() * s, s * 9).to(E4), 1),
    "narrowed_twice": (lambda x, s: ((x.float() * s).bfloat16().float() * 3).to(E4), 1),
}


@pytest.mark.parametrize("name", list(CHAINS))
def test_chains_in_other_dtypes_and_orders(name: str) -> None:
    fn, count = CHAINS[name]
    check("fp8_downcast", fn, square() * 9 + 0.5, SCALE, count=count)


@pytest.mark.parametrize("end", ["scaled", "viewed", "converted"])
def test_values_of_a_chain_that_are_read_too(end: str) -> None:
    def other(x: Any, s: Any) -> Any:
        y = x.float() * s
        y = {"scaled": lambda: y, "viewed": lambda: y.view(-1), "converted": lambda: y.bfloat16()}[end]()
        return y.to(E4), y

    found = check("fp8_downcast", other, square(), SCALE, count=0)
    assert any("has a second user" in reason for reason in reasons(found, "fp8_downcast"))


def test_a_narrowed_input_that_is_read_too() -> None:
    def other(x: Any, s: Any) -> Any:
        narrow = x.bfloat16()
        return (narrow.float() * s).to(E4), narrow

    check("fp8_downcast", other, torch.randn(32, 32), SCALE, count=1)


def test_a_bound_that_is_nan() -> None:
    fn = lambda x, s: (x.float() * s).clamp(max=float("nan")).to(E4)  # noqa: E731
    refused("fp8_downcast", fn, square(), SCALE, reason="a bound or scale is NaN")


def test_a_scale_that_is_a_symbolic_number() -> None:
    found = check("fp8_downcast", lambda x: (x.float() * x.shape[0]).to(E4), square(), count=0, dynamic=True)
    assert "scale is a symbolic number" in reasons(found, "fp8_downcast")


@pytest.mark.parametrize("way", ["columns", "other_rows", "float64"])
def test_maxima_that_have_the_shape_of_a_row_scale(way: str) -> None:
    """Of a square x: a number a row, but not of that row; or of the row, in another way than the kernel's."""

    def other(x: Any) -> Any:
        s = {
            "columns": lambda: x.abs().amax(0).unsqueeze(-1).float() / 448.0,
            "other_rows": lambda: x.view(8, 4, 32).abs().amax(-1, keepdim=True).view(32, 1).float() / 448.0,
            "float64": lambda: (x.abs().amax(-1, keepdim=True).double() / 448.0).float(),
        }[way]()
        return scaled(x, s)

    found = check("fp8_quantize", other, square() * 9, count=0)
    kernels = "a step of the scale is not one the kernel computes"
    assert (kernels if way == "float64" else "amax granularity") in reasons(found, "fp8_quantize")


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


# ---- more norms and rotations ------------------------------------------------------------------------------------------


def test_a_weight_of_integers() -> None:
    refused(
        "rms_norm_quantize", lambda x, w: quantise_rows(norm(x, w, MEANS_OF_SQUARES)), square().float(), torch.arange(32),
        reason="norm weight",
    )  # fmt: skip


def test_a_norm_of_a_vector() -> None:
    check("rms_norm_quantize", lambda x, w: quantise_rows(norm(x, w, MEANS_OF_SQUARES)), square()[0], WEIGHT, count=0)


def test_a_residual_in_bf16_of_what_is_fp32() -> None:
    def other(x: Any, r: Any, w: Any) -> Any:
        total = x + r
        return *quantise_rows(norm(total, w, MEANS_OF_SQUARES)), total * 2

    check("rms_norm_quantize", other, square().float(), square(1), WEIGHT.float(), count=1)


def test_one_and_a_weight_added_in_bf16() -> None:
    def gemma(x: Any, w: Any) -> Any:
        h = x.float()
        return quantise_rows((h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + w)).to(BF16))

    found = inductor_ext.verify(gemma, square(), WEIGHT / 700, rules={"rms_norm_quantize": "always"}, end_to_end=False)
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
