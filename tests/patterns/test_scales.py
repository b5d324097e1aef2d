"""Dynamic scales as people write them: what leaves the chain where, what makes the maximum, and eager's bytes for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.nearly import BF16, E4, check, refused, square


def x(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Rows of zeros, of one value, of tiny, NaN and infinite ones among the others."""
    made = torch.randn(*(shape or (16, 256)), generator=torch.Generator().manual_seed(3)) * 7
    made.view(-1, made.shape[-1])[0] = 0.0
    made.view(-1, made.shape[-1])[1] = -3.0
    made.view(-1, made.shape[-1])[2] *= 1e-12
    made.view(-1, made.shape[-1])[3, 5] = float("inf")
    made.view(-1, made.shape[-1])[4, 6] = float("nan")
    return made.to(dtype)


def amax(x: Any) -> Any:
    return x.abs().amax(-1, keepdim=True).float()


def over(x: Any, s: Any) -> Any:
    return (x.float() / s).clamp(-448.0, 448.0).to(E4)


def times(x: Any, s: Any) -> Any:
    return (x.float() * s).clamp(-448.0, 448.0).to(E4)


def read(fn: Callable[..., Any], given: Any = None, dynamic: bool = False) -> None:
    """One kernel does all of it: nothing else takes a maximum."""
    (graph,) = check("fp8_quantize", fn, x() if given is None else given, count=1, dynamic=dynamic).graphs
    left = ("aten.amax", "aten.amin", "aten.max.", "aten.abs", "aten.where", "aten.log2")
    assert not any(name in graph.after for name in left)


# ---- where it leaves -------------------------------------------------------------------------------------------------


def scale_of(x: Any) -> Any:
    return (amax(x) / 448.0).clamp(min=1e-6)


def nothing(x: Any) -> Any:
    return times(x, scale_of(x).reciprocal())


def maximum_and_scale(x: Any) -> Any:
    a = x.abs().amax(-1, keepdim=True)
    s = (a.float() / 448.0).clamp(min=1e-6)
    return over(x, s), s, a


def beside_the_way(x: Any) -> Any:
    a = amax(x).clamp(1e-4)
    return times(x, 448.0 / a), a / 448.0


def after_a_convert(x: Any) -> Any:
    s = x.abs().amax(-1, keepdim=True) / 448.0
    return over(x, s.float().clamp(min=1e-6)), s


def several_forms(x: Any) -> Any:
    s = scale_of(x)
    return times(x, s.reciprocal()), s, s.reciprocal(), s.squeeze(-1), s * 2, torch.exp(s)


def in_double(x: Any) -> Any:
    s = (amax(x).double() / 448.0).clamp(min=1e-6)
    return over(x, s.float()), s


def mask_of_it(x: Any) -> Any:
    a = amax(x)
    empty = a > 0
    return over(x, torch.where(empty, a, 1.0) / 448.0), empty


def row_of_numbers(x: Any) -> Any:
    s = x.abs().amax(-1).float() / 448.0
    return over(x, s[:, None]), s


def more_than_there_is_room_for(x: Any) -> Any:
    a = amax(x).clamp(1e-4, 1e4) * 0.5 * 3.0
    return times(x, (a * 0.25 * 7.0).reciprocal()), (a * 0.3).clamp(1e-3, 1e3)


@pytest.mark.parametrize(
    "fn",
    [
        nothing,
        maximum_and_scale,
        beside_the_way,
        after_a_convert,
        several_forms,
        in_double,
        mask_of_it,
        row_of_numbers,
        more_than_there_is_room_for,
    ],
)
def test_a_scale_leaves_its_chain_at_any_node(fn: Any) -> None:
    read(fn)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_reciprocal_of_what_is_returned_in_other_dtypes(dtype: torch.dtype) -> None:
    read(several_forms, x(dtype=dtype))


def test_a_reciprocal_rounds_otherwise_than_a_division() -> None:
    """Else nothing here would tell one from the other."""
    y = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    s = scale_of(y)
    assert not torch.equal((y.float() / s).clamp(-448.0, 448.0), (y.float() * s.reciprocal()).clamp(-448.0, 448.0))


# ---- what makes it ---------------------------------------------------------------------------------------------------


def ends(x: Any, **of: Any) -> Any:
    low, high = x.aminmax(**of)
    return torch.maximum(low.abs(), high.abs()).float()


MAXIMA: dict[str, Callable[..., Any]] = {
    "aminmax": lambda x: ends(x, dim=-1, keepdim=True) / 448.0,
    "aminmax_of_all": lambda x: ends(x) / 448.0,
    "signed": lambda x: torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).float().clamp(1e-9) / 448.0,
    "signed_plus_eps": lambda x: (torch.maximum(-x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)).float() + 1e-9) / 448.0,
    "signed_of_all": lambda x: torch.maximum(x.max(), -x.min()).float().clamp(1e-9) / 448.0,
    "norm": lambda x: torch.linalg.vector_norm(x, ord=float("inf"), dim=-1, keepdim=True).float() / 448.0,
    "max_of_dim": lambda x: x.abs().max(dim=-1)[0].unsqueeze(-1).float() / 448.0,
    "plus_eps": lambda x: (amax(x) + 1e-6) / 448.0,
    "bounded_above": lambda x: amax(x).clamp(1e-12, 3.0) / 448.0,
    "where_positive": lambda x: torch.where(amax(x) > 0, amax(x), 1.0) / 448.0,
    "where_zero": lambda x: (lambda s: torch.where(s == 0, torch.ones_like(s), s))(amax(x) / 448.0),
    "where_not_zero": lambda x: (lambda s: torch.where(s != 0, s, torch.full_like(s, 0.25)))(amax(x) / 448.0),
    "where_of_the_maximum": lambda x: (lambda a: torch.where(a > 0, a.float(), 1.0) / 448.0)(x.abs().amax(-1, keepdim=True)),
    "up_to_a_power": lambda x: torch.exp2(torch.ceil(torch.log2((amax(x) / 448.0).clamp(1e-9)))),
    "power_of_two": lambda x: torch.pow(2.0, torch.ceil(torch.log2((amax(x) / 448.0).abs().clamp(1e-9)))),
    "double": lambda x: (448.0 / amax(x).double().clamp(1e-12)).float().reciprocal(),
    "down_to_a_power_in_double": lambda x: torch.exp2(
        torch.floor(torch.log2((448.0 / amax(x).to(torch.float64).clamp(min=1e-12)).float()))
    ).reciprocal(),
    "by_bits": lambda x: by_bits(amax(x) / 448.0),
    "by_bits_bounded": lambda x: by_bits(amax(x) / 448.0, 1, 254),
}


def by_bits(s: Any, *bounds: int) -> Any:
    bits = s.view(torch.int32)
    exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()
    return ((exponent.clamp(*bounds) if bounds else exponent) << 23).view(torch.float32)


@pytest.mark.parametrize("name", list(MAXIMA))
def test_what_makes_a_scale(name: str) -> None:
    def quantised(x: Any) -> Any:
        s = MAXIMA[name](x)
        return over(x, s), s

    read(quantised)


NEARLY: dict[str, Callable[..., Any]] = {
    "ends_of_other_dimensions": lambda x: torch.maximum(x.amin(0, keepdim=True).abs().t(), x.amax(-1, keepdim=True).abs()),
    "ends_of_other_tensors": lambda x: torch.maximum((x + 1).amin(-1, keepdim=True).abs(), x.amax(-1, keepdim=True).abs()),
    "both_the_largest": lambda x: torch.maximum(x.amax(-1, keepdim=True).abs(), x.amax(-1, keepdim=True)).abs(),
    "least_not_turned": lambda x: torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)),
    "largest_turned": lambda x: torch.maximum(-x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)),
    "minimum_of_both": lambda x: torch.minimum(x.amax(-1, keepdim=True).abs(), x.amin(-1, keepdim=True).abs()),
    "index_of_it": lambda x: x.abs().max(-1, keepdim=True)[1].clamp(1),
    "no_power_of_two": lambda x: torch.pow(3.0, torch.ceil(torch.log2(amax(x).clamp(1e-9)))),
    "no_whole_power": lambda x: torch.pow(2.0, torch.log2(amax(x).clamp(1e-9))),
    "where_of_another": lambda x: torch.where(x[:, :1] > 0, amax(x), 1.0),
    "where_other_bound": lambda x: torch.where(amax(x) > 1, amax(x), 1.0),
    "where_at_most": lambda x: torch.where(amax(x) <= 0, 1.0, amax(x)),
    "where_turned": lambda x: torch.where(amax(x) > 0, 1.0, amax(x)),
    "where_tensor": lambda x: torch.where(amax(x) > 0, amax(x), x[:, :1].float()),
    "bits_of_another_shift": lambda x: ((amax(x).view(torch.int32) >> 22) << 22).view(torch.float32),
    "plus_eps_in_bf16": lambda x: x.abs().amax(-1, keepdim=True) + 0.01,
    "logarithm_in_bf16": lambda x: torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True)))),
    "alpha": lambda x: torch.add(amax(x), 1e-3, alpha=2),
    "rows_in_another_order": lambda x: amax(x.view(4, 4, -1)).transpose(0, 1).reshape(-1, 1),
}


@pytest.mark.parametrize("name", list(NEARLY))
def test_what_is_nearly_such_a_scale_keeps_eagers_bytes(name: str) -> None:
    check("fp8_quantize", lambda x: over(x, NEARLY[name](x)), x(16, 16), count=0)


def test_a_maximum_that_may_be_minus_zero() -> None:
    def signed(x: Any) -> Any:
        s = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).float() / 448.0
        return over(x, s), s

    def seen(x: Any) -> Any:
        a = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
        return over(x, a.float().clamp(min=1e-6) / 448.0), a

    for fn in (signed, seen):
        refused("fp8_quantize", fn, square(), reason="a maximum of zeros may be -0")


# ---- shapes ----------------------------------------------------------------------------------------------------------


def flattened(x: Any) -> Any:
    return over(x.reshape(-1, 256), scale_of(x.reshape(-1, 256)))


def flattened_between(x: Any) -> Any:
    s = scale_of(x)
    return over(x.reshape(-1, 256), s.reshape(-1, 1)), s


def flattened_after(x: Any) -> Any:
    s = scale_of(x)
    return over(x, s).reshape(-1, 256), s.reshape(-1)


def split_after(x: Any) -> Any:
    y = x.reshape(-1, 256)
    s = scale_of(y)
    return over(y, s).view(x.shape), s.view(*x.shape[:-1], 1)


def turned_between(x: Any) -> Any:
    """The maximum is taken of rows in another order than they are scaled in."""
    return over(x.transpose(0, 1).reshape(-1, 256), scale_of(x).reshape(-1, 1))


def turned_before(x: Any) -> Any:
    y = x.transpose(0, 1).contiguous().reshape(-1, 256)
    return over(y, scale_of(y))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fn", [flattened, flattened_between, flattened_after, split_after, turned_before])
def test_rows_that_are_flattened_or_split(fn: Any, dynamic: bool) -> None:
    read(fn, x(4, 4, 256), dynamic=dynamic)


def test_rows_that_are_scaled_in_another_order() -> None:
    check("fp8_quantize", turned_between, x(4, 4, 256), count=0)
