"""The references against FP8 in float64, and their arguments' errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inductor_ext import registry
from tests.support.equal import assert_same_bytes
from tests.support.fp8 import FORMATS, rounded

E4, E5, U8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8
ops = torch.ops.inductor_ext
STATIC = "f32 div:s0 max:-{0} min:{0}"
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def adversarial(dtype: torch.dtype) -> torch.Tensor:
    """Every FP8 number of both formats, the ties between neighbours, their neighbours, and the edges of the ranges."""
    codes = torch.arange(256, dtype=torch.uint8)
    points = torch.cat([codes.view(fp8).float() for fp8 in FORMATS])
    points = points[points.isfinite()].unique()
    ties = (points[1:] + points[:-1]) / 2
    near = torch.cat([torch.nextafter(ties, torch.full_like(ties, way)) for way in (1e30, -1e30)])
    edges = torch.tensor([464.0, 480.0, 61440.0, 65536.0, 3e38, 1e-45, float("inf"), float("nan"), 0.0])
    return torch.cat([points, ties, near, edges, -edges]).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fp8", list(FORMATS), ids=str)
def test_fp8_downcast_rounds_to_nearest_even(fp8: torch.dtype, dtype: torch.dtype) -> None:
    x = adversarial(dtype)
    found = ops.fp8_downcast(x, [], "", fp8)
    assert found.dtype is fp8 and found.shape == x.shape
    wanted = rounded(x.double(), fp8)
    assert_same_bytes(found, wanted.float().to(fp8))  # wanted holds FP8 numbers only: this cast is exact
    assert torch.equal(found.double().nan_to_num(7e9), wanted.nan_to_num(7e9))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fp8", list(FORMATS), ids=str)
def test_fp8_downcast_divides_and_clamps(fp8: torch.dtype, dtype: torch.dtype) -> None:
    limit = FORMATS[fp8].largest
    x, s = adversarial(dtype), torch.tensor(0.37)
    found = ops.fp8_downcast(x, [s], STATIC.format(limit), fp8)
    quotient = (x.double() / s.double()).float().double()  # float64 is wide enough that rounding twice rounds once
    wanted = rounded(quotient.clamp(-limit, limit), fp8)
    assert torch.equal(found.double().nan_to_num(7e9), wanted.nan_to_num(7e9))


def test_fp8_downcast_scales_rows() -> None:
    x, s = torch.randn(5, 7, 16), torch.rand(5, 7, 1) + 0.1
    found = ops.fp8_downcast(x, [s], "mul:r0", E4)
    assert torch.equal(found.double(), rounded((x.double() * s.double()).float().double(), E4))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_fp8_quantize(granularity: str, dtype: torch.dtype) -> None:
    x = (torch.randn(9, 40) * 13).to(dtype)
    q, s = ops.fp8_quantize(x, granularity, "f32 max:1e-12 div:448.0", "f32 div:scale max:-448.0 min:448.0", E4)
    amax = x.double().abs().amax(-1, keepdim=True) if granularity == "row" else x.double().abs().amax()
    scale = (amax.clamp(min=1e-12) / 448.0).float()
    assert_same_bytes(s, scale)
    assert s.shape == ((9, 1) if granularity == "row" else ())
    quotient = (x.double() / scale.double()).float().double()
    assert torch.equal(q.double(), rounded(quotient.clamp(-448, 448), E4))
    assert bool((q.float().abs().amax(-1) >= 416).all()) or granularity == "tensor", "the scale uses the whole range"


def test_fp8_quantize_passes_nan_on_to_its_row_only() -> None:
    x = torch.randn(4, 8)
    x[2, 5] = float("nan")
    q, s = ops.fp8_quantize(x, "row", "div:448.0", "div:scale max:-448.0 min:448.0", E4)
    assert s.isnan().flatten().tolist() == [False, False, True, False]
    assert bool(q[2].float().isnan().all()) and not q[[0, 1, 3]].float().isnan().any()
    q, s = ops.fp8_quantize(x, "tensor", "div:448.0", "div:scale max:-448.0 min:448.0", E4)
    assert bool(s.isnan()) and bool(q.float().isnan().all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_fp8_quantize_within_a_bound(shape: Any, granularity: str, dtype: torch.dtype) -> None:
    x, bound = (torch.randn(9, 40) * 13).to(dtype), torch.full(shape, 19.3)
    q, s = ops.fp8_quantize(x, granularity, "min:s0 f32 div:448.0", "f32 div:scale max:-448.0 min:448.0", E4, bound)
    amax = x.double().abs().amax(-1, keepdim=True) if granularity == "row" else x.double().abs().amax()
    scale = (amax.clamp(max=bound.to(dtype).item()) / 448.0).float()
    assert_same_bytes(s, scale)
    assert s.shape == ((9, 1) if granularity == "row" else ()) and bool((amax > 19.3).any())
    quotient = (x.double() / scale.double()).float().double()
    assert torch.equal(q.double(), rounded(quotient.clamp(-448, 448), E4))


def test_fp8_quantize_of_zero_and_infinite_rows() -> None:
    x = torch.zeros(3, 8)
    x[1, 0] = float("inf")
    q, s = ops.fp8_quantize(x, "row", "max:1e-12 div:448.0", "div:scale max:-448.0 min:448.0", E4)
    assert s.flatten()[0] == torch.tensor(1e-12) / 448.0 and bool(s[1].isinf())
    assert not q[0].float().any() and bool(q[1, 0].float().isnan()) and not q[1, 1:].float().any()


# ---- errors: argument, wanted, found --------------------------------------------------------------------------------------

X = torch.zeros(4, 8)
K, CACHE = torch.zeros(4, 2, 8), torch.full((16, 2, 8), 7, dtype=U8).view(E4)
S, LOC = torch.tensor(0.5), torch.tensor([0, 1, 2, 3])


def _store(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "k": K, "v": K, "k_cache": CACHE.clone(), "v_cache": CACHE.clone(), "k_scale": S, "v_scale": S, "loc": LOC,
        "k_program": "div:s0", "v_program": "div:s0", "dtype": E4, **changes,
    }  # fmt: skip
    return values


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.double(), [], "", E4), TypeError, "x: wanted bfloat16, float16 or float32, found torch.float64"),
        ((X.int(), [], "", E4), TypeError, "x: wanted bfloat16, float16 or float32, found torch.int32"),
        ((X, [], "", torch.bfloat16), TypeError, "dtype: wanted float8_e4m3fn or float8_e5m2, found torch.bfloat16"),
        ((X, [], "div:s0", E4), ValueError, "'div:s0' names s0, but 0 operands were given"),
        ((X, [S] * 5, "", E4), ValueError, "wanted at most 4 operands, found 5"),
        ((X, [], "sqrt", E4), ValueError, "'sqrt' is none of"),
        ((X, [], "div:scale", E4), ValueError, "names a dynamic scale"),
    ],
)
def test_fp8_downcast_errors(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.fp8_downcast(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.long(), "row", "", "div:scale", E4), TypeError, "x: wanted bfloat16, float16 or float32, found torch.int64"),
        ((X, "row", "", "div:scale", U8), TypeError, "dtype: wanted float8_e4m3fn or float8_e5m2, found torch.uint8"),
        ((X, "column", "", "div:scale", E4), ValueError, "granularity: wanted row .* or tensor, found 'column'"),
        ((X[0, 0], "row", "", "div:scale", E4), ValueError, "granularity: wanted row"),
        ((X[:0], "tensor", "", "div:scale", E4), ValueError, "wanted at least one element in what is reduced"),
        ((X[:, :0], "row", "", "div:scale", E4), ValueError, "wanted at least one element in what is reduced"),
        ((X, "row", "mul:s0", "div:scale", E4), ValueError, "names s0, but 0 operands"),
        ((X, "row", "mul:scale", "div:scale", E4), ValueError, "names a dynamic scale"),
        ((X, "row", "", "div:scale", E4, S), ValueError, "bound: wanted one tensor if .* name s0, else none, found 1 for none"),
        ((X, "row", "min:r0", "div:scale", E4, S), ValueError, "bound: wanted one tensor .* found 1 for r0"),
        ((X, "row", "min:s0", "div:scale", E4, S.half()), TypeError, "bound: wanted a float32 bound, found torch.float16"),
        ((X, "row", "min:s0", "div:scale", E4, X), ValueError, r"bound: wanted a bound of one element, found shape \(4, 8\)"),
        ((X, "row", "mul:1.0 " * 5, "mul:1.0 " * 5, E4), ValueError, "at most 8 numbers in both programs together"),
    ],
)
def test_fp8_quantize_errors(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.fp8_quantize(*arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"v": None}, ValueError, "wanted both v and v_cache or neither"),
        ({"v_cache": None}, ValueError, "wanted both v and v_cache or neither"),
        ({"k": K.double()}, TypeError, "k: wanted bfloat16, float16 or float32, found torch.float64"),
        ({"v": K.half()}, TypeError, "v: wanted k's dtype torch.float32, found torch.float16"),
        ({"k_cache": CACHE.float()}, TypeError, "k_cache: wanted torch.float8_e4m3fn or uint8, found torch.float32"),
        ({"v_cache": CACHE.view(E5)}, TypeError, "v_cache: wanted torch.float8_e4m3fn or uint8, found torch.float8_e5m2"),
        ({"k_cache": CACHE[:, :1]}, ValueError, r"k_cache: wanted \[S, …\] with k's trailing sizes \(2, 8\), found shape"),
        ({"v": K[:3]}, ValueError, "v: wanted k's 4 rows, found 3"),
        ({"k_scale": torch.ones(3)}, ValueError, r"k_scale: wanted one element, or shape \(2,\): one for each head, found"),
        ({"loc": LOC.float()}, ValueError, "loc: wanted a 1-d int32 or int64 tensor, found torch.float32"),
        ({"loc": LOC[None]}, ValueError, "loc: wanted a 1-d int32 or int64 tensor"),
        ({"loc": LOC[:3]}, ValueError, "loc: wanted one index for each of k's 4 rows, found 3"),
        ({"dtype": U8}, TypeError, "dtype: wanted float8_e4m3fn or float8_e5m2, found torch.uint8"),
        ({"k_program": "div:s1"}, ValueError, "k_program: 'div:s1' names s1, but 1 operands were given"),
        ({"k_program": "mul:1.0 " * 5, "v_program": "mul:1.0 " * 5}, ValueError, "at most 8 numbers in both programs"),
    ],
)
def test_downcast_fp8_errors_and_nothing_is_written(changes: Any, error: type[Exception], message: str) -> None:
    arguments = _store(**changes)
    before = {name: arguments[name].clone() for name in ("k_cache", "v_cache") if arguments[name] is not None}
    with pytest.raises(error, match=message):
        ops.downcast_fp8(**arguments)
    for name, cache in before.items():
        assert_same_bytes(arguments[name], cache, name)


def test_the_registry_holds_these_ops() -> None:
    assert {"fp8_downcast", "fp8_quantize", "downcast_fp8"} <= {op.name for op in registry.ops()}
