"""Programs that differ in one respect from what a rule looks for: refused, or rewritten to the same bytes.

Each is here because a mutant of a guard (``./run mutate``) once lived through all other tests. They are verified graph against
graph, without compiling anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext.report.verify import Verification

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
    "of_cubes": lambda h: h.pow(3).mean(-1, keepdim=True).abs(),
    "of_another": lambda h: (h + 1).pow(2).mean(-1, keepdim=True),
    "of_products": lambda h: (h * h.t()).mean(-1, keepdim=True).abs(),
    "of_products_with_another": lambda h: (h.t() * h).mean(-1, keepdim=True).abs(),
    "of_absolute_values": lambda h: h.abs().mean(-1, keepdim=True),
    "sum": lambda h: h.pow(2).sum(-1, keepdim=True),
}


@pytest.mark.parametrize("mean", list(MEANS))
def test_what_is_nearly_a_mean_of_squares_is_no_norm(mean: str) -> None:
    check("rms_norm_quantize", lambda x, w: quantise_rows(norm(x, w, MEANS[mean])), square(), WEIGHT, count=0)


def test_means_of_squares() -> None:
    for spelled in (lambda h: h.pow(2).mean(-1, keepdim=True), lambda h: (h * h).mean(1, keepdim=True)):
        check("rms_norm_quantize", lambda x, w, spelled=spelled: quantise_rows(norm(x, w, spelled)), square(), WEIGHT, count=1)


def test_a_norm_of_something_else_times_x_is_no_norm() -> None:
    def other(x: Any, y: Any, w: Any) -> Any:
        h = x.float()
        return quantise_rows(w * (y.float() * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16))

    check("rms_norm_quantize", other, square(), square(1), WEIGHT, count=0)


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
@pytest.mark.parametrize("where", ["fp32", "bf16"])
def test_what_is_added_to_a_weight(one: float, where: str) -> None:
    def gemma(x: Any, w: Any) -> Any:
        h = x.float()
        shifted = one + w.float() if where == "fp32" else (one + w).float()
        return quantise_rows((h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * shifted).to(BF16))

    found = inductor_ext.verify(gemma, square(), WEIGHT / 7, rules={"rms_norm_quantize": "always"}, end_to_end=False)
    assert found.differs == [] and len(found.checks) >= (one == 1.0)
