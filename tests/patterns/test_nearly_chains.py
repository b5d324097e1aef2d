"""What is nearly a chain of scale, clamp and cast, a dynamic scale, or a gated activation: refused, or the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.nearly import BF16, E4, E5, check, quantise, quantise_rows, reasons, refused, square

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
    "times_a_tensor": lambda x, y: x.abs().amax(-1, keepdim=True).float() * y[:, :1].float().abs().add(0.5),
    "rounded_to_integers": lambda x, y: x.abs().amax(-1, keepdim=True).int().float() + 0.0,
    "truncated": lambda x, y: x.abs().amax(-1, keepdim=True).float().int().float(),
    "of_halves": lambda x, y: x.view(32, 2, 16).abs().amax(-1, keepdim=True).expand(32, 2, 16).reshape(32, 32).float(),
    "of_pairs_of_rows": lambda x, y: x.view(16, 64).abs().amax(-1, keepdim=True).float().repeat_interleave(2, 0),
    "mean": lambda x, y: x.abs().mean(-1, keepdim=True).float(),
    "bounded_by_a_row": lambda x, y: x.abs().amax(-1, keepdim=True).float().clamp(max=y[:, :1].float().abs()),
    "bounded_by_a_maximum_of_maxima": lambda x, y: (lambda a: torch.minimum(a, a.amax() * 0.5))(
        x.abs().amax(-1, keepdim=True).float()
    ),
    "bounded_by_two": lambda x, y: torch.minimum(
        torch.minimum(x.abs().amax(-1, keepdim=True).float(), y[0, 0].float().abs()), y[1, 1].float().abs()
    ),
    "bounded_in_bf16": lambda x, y: torch.minimum(x.abs().amax(-1, keepdim=True), y[0, 0].abs()).float(),
    "bounded_in_double": lambda x, y: torch.minimum(x.abs().amax(-1, keepdim=True).double(), y[0, 0].double().abs()).float(),
    "constant_tensor_over_it": lambda x, y: torch.full((), 4.0) / x.abs().amax(-1, keepdim=True).float(),
}


@pytest.mark.parametrize("name", list(NEARLY_AMAX))
def test_what_is_nearly_the_maximum_of_a_row_is_no_dynamic_scale(name: str) -> None:
    make = NEARLY_AMAX[name]
    check("fp8_quantize", lambda x, y: scaled(x, make(x, y)), square() * 9 + 3, square(1) * 5, count=0)


SPELLED_AMAX: dict[str, Callable[..., Any]] = {
    "reshaped": lambda x: (x.abs().amax(-1).float() / 448.0).unsqueeze(-1),
    "of_fp32": lambda x: x.float().abs().amax(-1, keepdim=True) / 448.0,
    "by_max": lambda x: x.abs().max(-1, keepdim=True)[0].float() / 448.0,
    "clamped_both_ways": lambda x: (x.abs().amax(-1, keepdim=True).float() / 448.0).clamp(1e-3, 0.01),
    "in_bf16": lambda x: (x.abs().amax(-1, keepdim=True) * 0.003).float(),
    "number_over_it": lambda x: (448.0 / x.abs().amax(-1, keepdim=True).float()).reciprocal(),
    "of_all": lambda x: x.abs().amax().float() / 448.0,
    "of_all_by_max": lambda x: x.abs().max().float() / 448.0,
    "of_rows_that_are_split": lambda x: x.view(8, 4, 32).abs().amax(-1, keepdim=True).view(32, 1).float() / 448.0,
    "in_double": lambda x: (x.abs().amax(-1, keepdim=True).double() / 448.0).float(),
    "bounded": lambda x: (x.abs().amax(-1, keepdim=True).float() / 448.0).clamp(max=torch.tensor(0.01)),
    "of_both_dimensions": lambda x: x.abs().amax((0, 1)).float() / 448.0,
}


@pytest.mark.parametrize("name", list(SPELLED_AMAX))
def test_maxima_of_rows_and_of_all(name: str) -> None:
    check("fp8_quantize", lambda x: scaled(x, SPELLED_AMAX[name](x)), square() * 9, count=1)


BOUNDED: dict[str, Callable[..., Any]] = {
    "from_above": lambda a, b: torch.minimum(a.float(), b) / 448.0,
    "from_below": lambda a, b: torch.maximum(b, a.float()) / 448.0,
    "bound_first": lambda a, b: torch.minimum(b, a.float() / 448.0),
    "widened_by_it": lambda a, b: torch.minimum(a, b.view(1)) / 448.0,
    "in_bf16": lambda a, b: torch.minimum(a, b.view(())).float() / 448.0,
    "twice_by_one": lambda a, b: torch.minimum(torch.minimum(a.float(), b) / 448.0, b),
    "with_a_dimension_more": lambda a, b: (torch.minimum(a.view(32), b.view(1, 1)) / 448.0).view(32, 1),
}


@pytest.mark.parametrize("name", list(BOUNDED))
def test_a_tensor_that_bounds_the_scale(name: str) -> None:
    def bounded(x: Any, b: Any) -> Any:
        return scaled(x, BOUNDED[name](x.abs().amax(-1, keepdim=True), b))

    for size in (15.0, 1e30, 0.0):
        check("fp8_quantize", bounded, square() * 9, torch.full((1,), size), count=1)


@pytest.mark.parametrize("moved", [True, False])
def test_a_bound_that_is_computed_behind_what_is_written(moved: bool) -> None:
    """What makes a scale is moved before the kernel; anything else, as a sum, is not."""

    def late(x: Any, b: Any) -> Any:
        amax = x.abs().amax(-1, keepdim=True).float()
        return *scaled(x, torch.minimum(amax, (b * 3).amax() if moved else (b * 3).sum())), amax  # type: ignore[misc]

    if moved:
        check("fp8_quantize", late, square() * 9, torch.ones(5), count=1)
    else:
        refused("fp8_quantize", late, square() * 9, torch.ones(5), reason="the scale is computed too late")


def test_a_bound_that_is_made_of_what_is_written() -> None:
    def made(x: Any, b: Any) -> Any:
        amax = x.abs().amax(-1, keepdim=True).float()
        far = amax.sum()
        for _ in range(60):  # past what is searched
            far = (far * b).sin()
        return *scaled(x, torch.minimum(far.abs(), amax)), amax  # type: ignore[misc]

    refused("fp8_quantize", made, square() * 9, torch.full((), 0.9), reason="the scale is computed too late")


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


@pytest.mark.parametrize("way", ["columns", "rows_in_another_order"])
def test_maxima_that_have_the_shape_of_a_row_scale(way: str) -> None:
    """Of a square x: a number a row, but not of that row."""

    def other(x: Any) -> Any:
        s = {
            "columns": lambda: x.abs().amax(0).unsqueeze(-1).float() / 448.0,
            "rows_in_another_order": lambda: (
                x.view(8, 4, 32).transpose(0, 1).abs().amax(-1, keepdim=True).reshape(32, 1).float() / 448.0
            ),
        }[way]()
        return scaled(x, s)

    found = check("fp8_quantize", other, square() * 9, count=0)
    assert reasons(found, "fp8_quantize") == ["amax granularity"]
