"""What is nearly RMSNorm before a quantisation: refused, or values as near as the rule promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import inductor_ext
from tests.support.nearly import BF16, WEIGHT, check, quantise_rows, reasons, refused, square

# ---- RMSNorm ---------------------------------------------------------------------------------------------------------


def norm(x: Any, w: Any, mean: Callable[[Any], Any], eps: float = 1e-6) -> Any:
    h = x.float()
    return w * (h * torch.rsqrt(mean(h) + eps)).to(x.dtype)


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
    check("rms_norm_quantize", other, x, w, count=int(what == "sum"))  # a norm with a bias alone


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


@pytest.mark.parametrize(
    "root",
    [
        lambda h, v: h / torch.sqrt(v),
        lambda h, v: h * (1 / torch.sqrt(v)),
        lambda h, v: h * torch.sqrt(v).reciprocal(),
        lambda h, v: h * v**-0.5,
    ],
)
@pytest.mark.parametrize("mean", [lambda h: h.pow(2).mean(-1, keepdim=True), lambda h: (h * h).sum(-1, keepdim=True) / 32])
def test_roots_and_means_in_other_words(mean: Any, root: Any) -> None:
    def other(x: Any, w: Any) -> Any:
        h = x.float()
        return quantise_rows(w * root(h, mean(h) + 1e-6).to(BF16))

    check("rms_norm_quantize", other, square(), WEIGHT, count=1)


@pytest.mark.parametrize("columns", [31, 33, 32.5])
def test_a_sum_over_another_number_of_columns_is_no_mean(columns: float) -> None:
    check("rms_norm_quantize", lambda x, w: quantise_rows(norm(x, w, lambda h: h.pow(2).sum(-1, keepdim=True) / columns)),
          square(), WEIGHT, count=0)  # fmt: skip


@pytest.mark.parametrize(
    "root", [lambda h, v: h * torch.sqrt(v), lambda h, v: torch.sqrt(v) / h, lambda h, v: h * v**-0.25, lambda h, v: h / v]
)
def test_other_powers_of_the_mean_are_no_root(root: Any) -> None:
    def other(x: Any, w: Any) -> Any:
        h = x.float()
        return quantise_rows(w * root(h, h.pow(2).mean(-1, keepdim=True) + 1e-6).to(BF16))

    check("rms_norm_quantize", other, square(), WEIGHT, count=0)


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


# ---- the fp32 sum and what is handed on ------------------------------------------------------------------------------


def _summed(x: Any, r: Any, w: Any, total: Any) -> Any:
    n = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)
    return quantise_rows(n.to(BF16) * w)


def test_a_sum_in_fp32_is_normalised_before_it_is_rounded() -> None:
    def native(x: Any, r: Any, w: Any) -> Any:
        total = x.float() + r.float()
        return *_summed(x, r, w, total), total.to(BF16), total.to(BF16) * 2

    check("rms_norm_quantize", native, square(), square(1) * 7, WEIGHT, count=1)


@pytest.mark.parametrize("other", ["fp16", "row", "scaled", "three", "difference"])
def test_sums_in_fp32_that_are_not_the_kernels(other: str) -> None:
    """Another dtype, a row for all, a factor, a third addend: x is then the fp32 sum, and y is not in its dtype."""

    def summed(x: Any, r: Any, w: Any) -> Any:
        made = {
            "fp16": lambda: x.float() + r.half().float(),
            "row": lambda: x.float() + r[:1].float(),
            "scaled": lambda: torch.add(x.float(), r.float(), alpha=2),
            "three": lambda: x.float() + r.float() + 1.5,
            "difference": lambda: x.float() - r.float(),
        }
        total = made[other]()
        return *_summed(x, r, w, total), total.to(BF16)

    refused("rms_norm_quantize", summed, square(), square(1), WEIGHT, reason="norm dtype")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_sum_in_fp32_that_is_handed_on_in_another_dtype(dtype: torch.dtype) -> None:
    def native(x: Any, r: Any, w: Any) -> Any:
        total = x.float() + r.float()
        return *_summed(x, r, w, total), total.to(dtype) if dtype is torch.float16 else total

    refused("rms_norm_quantize", native, square(), square(1), WEIGHT, reason="the fp32 sum has a second user")


def test_a_sum_in_fp32_that_is_rounded_first_is_a_sum() -> None:
    def rounded(x: Any, r: Any, w: Any) -> Any:
        total = (x.float() + r.float()).to(BF16)
        return *_summed(x, r, w, total.float()), total * 2

    check("rms_norm_quantize", rounded, square(), square(1) * 7, WEIGHT, count=1)


@pytest.mark.parametrize("reader", ["returned", "product", "view_of_it", "after_the_quantisation"])
def test_a_normalised_value_that_has_to_be_in_memory(reader: str) -> None:
    def other(x: Any, w: Any, v: Any) -> Any:
        y = norm(x, w, MEANS_OF_SQUARES)
        q, s = quantise_rows(y)
        made = {
            "returned": lambda: y,
            "product": lambda: y @ v,
            "view_of_it": lambda: y.view(-1, 16)[:, None],
            "after_the_quantisation": lambda: (y + s) @ v.float(),
        }
        return q, s, made[reader]()

    check("rms_norm_quantize", other, square(), WEIGHT, square(2), count=1)
    found = inductor_ext.explain(other, square(), WEIGHT, square(2))
    taken = found.counts().get("rms_norm_quantize", 0)
    assert taken == (reader != "after_the_quantisation"), "what Inductor can fuse is no reason to write y"


def test_a_normalised_value_of_another_layout_is_not_written() -> None:
    def other(x: Any, w: Any) -> Any:
        y = norm(x.t(), w, MEANS_OF_SQUARES)
        return *quantise_rows(y), y

    check("rms_norm_quantize", other, square(), WEIGHT, count=0)


# ---- LayerNorm -------------------------------------------------------------------------------------------------------


def layer(x: Any, w: Any, b: Any, mean: Any = None, variance: Any = None, eps: float = 1e-5) -> Any:
    h = x.float()
    m = mean(h) if mean else h.mean(-1, keepdim=True)
    v = variance(h) if variance else h.var(-1, keepdim=True, correction=0)
    return quantise_rows(((h - m) * torch.rsqrt(v + eps) * w + b).to(BF16))


NEARLY_LAYERS: dict[str, Any] = {
    "sample_variance": {"variance": lambda h: h.var(-1, keepdim=True)},
    "variance_of_columns": {"variance": lambda h: h.var(0, keepdim=True, correction=0)},
    "variance_of_all": {"variance": lambda h: h.var(correction=0)},
    "deviation": {"variance": lambda h: h.std(-1, keepdim=True, correction=0)},
    "variance_of_another": {"variance": lambda h: (2 * h).var(-1, keepdim=True, correction=0)},
    "squares": {"variance": lambda h: h.pow(2).mean(-1, keepdim=True)},
    "mean_of_columns": {"mean": lambda h: h.mean(0, keepdim=True)},
    "mean_of_another": {"mean": lambda h: (2 * h).mean(-1, keepdim=True)},
    "maximum": {"mean": lambda h: h.amax(-1, keepdim=True)},
    "no_keepdim": {"mean": lambda h: h.mean(-1)},
}


@pytest.mark.parametrize("what", list(NEARLY_LAYERS))
def test_what_is_nearly_a_layer_norm_is_none(what: str) -> None:
    changed = NEARLY_LAYERS[what]
    check("layer_norm_quantize", lambda x, w, b: layer(x, w, b, **changed), square(), WEIGHT, WEIGHT - 1, count=0)


def test_a_layer_norm() -> None:
    check("layer_norm_quantize", layer, square(), WEIGHT, WEIGHT - 1, count=1)


@pytest.mark.parametrize("alpha", [2, 0.5])
def test_a_bias_times_a_number_is_no_bias(alpha: float) -> None:
    """The graph adds it then, and what it adds is read."""

    def scaled(x: Any, w: Any, b: Any) -> Any:
        n = torch.nn.functional.layer_norm(x.float(), (32,), w.float(), None, 1e-5)
        return quantise_rows(torch.add(n, b, alpha=alpha).to(BF16))

    check("layer_norm_quantize", scaled, square(), WEIGHT, WEIGHT - 1, count=0)


@pytest.mark.parametrize("one", [1.0, 2.0, -1.0])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_what_is_added_to_a_modulation(dtype: torch.dtype, one: float) -> None:
    def modulated(x: Any, scale: Any, shift: Any) -> Any:
        n = torch.nn.functional.layer_norm(x, (32,), None, None, 1e-5)
        return quantise_rows((n * (one + scale) + shift).to(BF16))

    rows = [square(seed)[:4, None].to(dtype) for seed in (3, 4)]
    check("layer_norm_quantize", modulated, square().view(4, 8, 32), *rows, count=1)


def test_a_static_scale_that_is_made_of_what_it_scales() -> None:
    """Through integers, so that it is no dynamic scale either; the norm's value is written for it."""

    def fn(x: Any, w: Any, b: Any) -> Any:
        y = torch.nn.functional.layer_norm(x, (64,), w, b)
        s = y.abs().to(torch.int8).to(torch.bfloat16).amax()
        return (y.float() / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), y

    x = torch.randn(6, 64).bfloat16() * 3
    found = check("layer_norm_quantize", fn, x, *(torch.rand(64).bfloat16() + 0.5 for _ in range(2)), count=0)
    assert "the scale is computed too late" in reasons(found, "layer_norm_quantize")


# ---- what is read, and when it is made -------------------------------------------------------------------------------


def rms(h: Any) -> Any:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


#: What no reason is given for: there is no norm in it whose kernel lacks something.
NO_NORMS: dict[str, Callable[..., Any]] = {
    "times_one_number": lambda x, w: rms(x.float()) * w.float().amax(),
    "times_integers_of_rows": lambda x, w: rms(x.float()) * torch.arange(32 * 32).view(32, 32),
    "times_fp64": lambda x, w: rms(x.float()) * w.double(),
    "in_bf16": lambda x, w: rms(x) * w,
    "in_fp64": lambda x, w: rms(x.double()) * w,
}


@pytest.mark.parametrize("what", list(NO_NORMS))
def test_what_is_no_norm_is_no_near_miss_of_one(what: str) -> None:
    found = check("rms_norm_quantize", lambda x, w: quantise_rows(NO_NORMS[what](x, w).to(BF16)), square(), WEIGHT, count=0)
    assert reasons(found, "rms_norm_quantize") == []


def test_a_weight_of_fp64_is_read_as_the_fp32_that_it_is_made() -> None:
    for shift in (0, 1):

        def weighted(x: Any, w: Any, shift: int = shift) -> Any:
            return quantise_rows((rms(x.float()) * (shift + w.float() if shift else w.float())).to(BF16))

        check("rms_norm_quantize", weighted, square(), WEIGHT.double(), count=1)


def test_one_that_is_added_to_a_bias_is_added() -> None:
    def biased(x: Any, b: Any) -> Any:
        return quantise_rows((rms(x.float()) + (1 + b.float())).to(BF16))

    check("rms_norm_quantize", biased, square(), WEIGHT - 1, count=1)


def test_a_row_for_all_is_no_residual_on_either_side() -> None:
    def summed(r: Any, x: Any, w: Any) -> Any:
        total = r + x
        return *quantise_rows(w * rms(total.float()).to(BF16)), total * 2

    check("rms_norm_quantize", summed, square(1)[:1], square(), WEIGHT, count=1)


def test_a_weight_that_is_made_behind_the_sum() -> None:
    """The kernel is called behind both, and before whatever reads the sum: what is returned first comes first."""

    def late(x: Any, r: Any, w: Any, first: bool) -> Any:
        total = x + r
        made = quantise_rows(rms(total.float()).to(BF16) * w.sin())
        return (total * 2, *made) if first else (*made, total * 2)

    check("rms_norm_quantize", lambda *given: late(*given, False), square(), square(1), WEIGHT, count=1)
    late_weight = "the weight is computed too late"
    refused("rms_norm_quantize", lambda *given: late(*given, True), square(), square(1), WEIGHT, reason=late_weight)


def modulated(x: Any, scale: Any, shift: Any) -> Any:
    return quantise_rows((torch.nn.functional.layer_norm(x, (32,), None, None, 1e-5) * (1 + scale) + shift).to(BF16))


def test_layouts_that_are_not_the_kernels() -> None:
    def summed(r: Any, x: Any, w: Any) -> Any:
        total = r + x.t()
        return *quantise_rows(w * rms(total.float()).to(BF16)), total * 2

    refused("rms_norm_quantize", summed, square(1), square(), WEIGHT, reason="input layout")
    columns = [square(seed).t()[:4, None] for seed in (3, 4)]
    refused("layer_norm_quantize", modulated, square().view(4, 8, 32), *columns, reason="input layout")


def test_operands_that_are_not_read_alike() -> None:
    """Weight and bias of two dtypes; a factor of each sample's and a shift for all."""
    layers = layer, square(), WEIGHT, WEIGHT.float() - 1
    refused("layer_norm_quantize", *layers, reason="norm operands")
    rows = square(3)[:4, None], square(4)[:1, None]
    refused("layer_norm_quantize", modulated, square().view(4, 8, 32), *rows, reason="norm operands")


def test_a_weight_of_one_number_is_none_of_each_column() -> None:
    given = square(), WEIGHT[:1].clone()
    refused("rms_norm_quantize", lambda x, w: quantise_rows(w * rms(x.float()).to(BF16)), *given, reason="norm weight")


def test_a_normalised_value_in_channels_last_is_not_written() -> None:
    def other(x: Any, w: Any) -> Any:
        y = (w * rms(x.float()).to(BF16)).contiguous(memory_format=torch.channels_last)
        return *quantise_rows(y), y

    reason = "what is quantised has a second user"
    refused("rms_norm_quantize", other, square().view(2, 4, 4, 32), WEIGHT, reason=reason)


@pytest.mark.parametrize("product", ["of_others", "of_what_is_dequantised"])
def test_a_sum_that_waits_for_a_product(product: str) -> None:
    """Only one that is made of what is quantised keeps Inductor from adding y where it is made."""

    def other(x: Any, w: Any, v: Any) -> Any:
        y = norm(x, w, MEANS_OF_SQUARES)
        q, s = quantise_rows(y)
        made = v if product == "of_others" else (q.float() * s).to(BF16)
        return q, s, y + (made @ v).sin()  # without the sine the sum would be the product's own, which reads y

    found = inductor_ext.explain(other, square(), WEIGHT, square(2))
    assert found.counts().get("rms_norm_quantize", 0) == (product != "of_others")


def test_few_rows() -> None:
    """With a scale for each row they gain; with one for all only who asks gets the kernel."""
    given = square()[:4], WEIGHT
    found = inductor_ext.explain(lambda x, w: quantise_rows(norm(x, w, MEANS_OF_SQUARES)), *given)
    assert found.counts() == {"rms_norm_quantize": 1}

    def one_scale(x: Any, w: Any) -> Any:
        y = norm(x, w, MEANS_OF_SQUARES)
        s = (y.abs().amax() / 448.0).float()
        return (y.float() / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), s

    check("rms_norm_quantize", one_scale, *given, count=1)
    assert inductor_ext.explain(one_scale, *given).counts() == {}
