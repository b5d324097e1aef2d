"""Chains on the edge: values and dtypes where a rewrite could differ from eager by a byte, views, shapes, second users."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import inductor_ext
from inductor_ext.patterns.support import fp8_chain
from tests.support.compiled import run_compiled, run_copies
from tests.support.equal import assert_all_same_bytes
from tests.support.fakegpu import fake_cuda_inputs

E4, E5, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16


def extremes(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """NaN, infinities, zeros of both signs, subnormals, ties, and the first values past the finite range of both formats."""
    inf = float("inf")
    special = [0.0, -0.0, float("nan"), inf, -inf, 1e-45, -1e-38, 2.0**-9, 2.0**-10, 3 * 2.0**-11, 2.0**-16, 2.0**-17]
    special += [448, -448, 464, 464.0001, 480, 57344, 61440, -61440, 61441, 65504, 1.0625, 1.1875, 1.125, 17, 19, 3e38]
    values = torch.tensor(special, dtype=torch.float32)
    return torch.cat([values, torch.randn(4096 - len(special)) * 300]).reshape(64, 64).to(dtype)


SCALE = torch.tensor(0.75)


def _check(
    fn: Any, *inputs: Any, count: int = 1, rule: str = "fp8_downcast", dynamic: bool = False, forced: bool = False
) -> Any:
    found, recorder = run_compiled(fn, inputs, dynamic=dynamic, rules={rule: "always" if forced else "auto"})
    assert recorder.counts().get(rule, 0) == count, recorder.refusals()
    assert_all_same_bytes(found, run_copies(fn, inputs))
    return recorder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("fp8", "limit"), [(E4, 448.0), (E5, 57344.0), (E4, None), (E5, None), (E4, 464.0), (E5, 61440.0), (E5, 448.0)]
)
def test_extremes(dtype: torch.dtype, fp8: torch.dtype, limit: float | None) -> None:
    def chain(x: Any, s: Any) -> Any:
        y, z = x.float() / s, x * s
        if limit is not None:
            y, z = y.clamp(-limit, limit), z.clamp(-limit, limit)
        return y.to(fp8), z.to(fp8), x.float().mul(0.5).to(fp8)

    _check(chain, extremes(dtype), SCALE, count=3)


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (1, 128), (1, 1), (7, 13), (3, 5, 7), (129,), ()], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    _check(lambda x, s: (x.float() / s).clamp(-448.0, 448.0).to(E4), torch.randn(shape).bfloat16() * 99, SCALE)


@pytest.mark.parametrize("bound", ["clamp", "maximum_first", "maximum_last"])
def test_a_bound_of_zero_keeps_the_sign_that_eager_gives(bound: str) -> None:
    def chain(x: Any, s: Any) -> Any:
        y, zero = x / s, torch.full((), 0.0)
        if bound == "clamp":
            return y.clamp(0.0, 448.0).to(E4)
        y = torch.maximum(y, zero) if bound == "maximum_last" else torch.maximum(zero, y)
        return y.clamp(max=448.0).to(E4)

    recorder = _check(chain, extremes(), SCALE, count=int(bound == "clamp"))
    assert [r.reason for r in recorder.refusals("fp8_downcast")] == ["a bound of zero in a tensor"] * (bound != "clamp")


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("widen", [False, True])
def test_a_scale_in_a_full_tensor_is_what_that_dtype_holds(dtype: torch.dtype, widen: bool) -> None:
    number = 3 if dtype is torch.int64 else 0.3

    def chain(x: Any) -> Any:
        x = x.float() if widen else x
        return (x * torch.full((), number, dtype=dtype)).clamp(-448, 448).to(E4)

    _check(chain, extremes(BF16), forced=True)


def test_a_bound_in_a_full_tensor_is_what_that_dtype_holds() -> None:
    def chain(x: Any, s: Any) -> Any:
        return torch.minimum(x / s, torch.full((), 447.3, dtype=BF16)).clamp_min(-448).to(E4)

    _check(chain, extremes(BF16), SCALE, forced=True)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("scale", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_type_promotion_by_the_scale(dtype: torch.dtype, scale: torch.dtype, shape: tuple[int, ...]) -> None:
    _check(lambda x, s: (x / s).clamp(-448, 448).to(E4), extremes(dtype), torch.full(shape, 0.3).to(scale))


def test_row_scale_then_transpose() -> None:
    scale = torch.rand(64, 1) + 0.1
    _check(lambda x, s: (x.float() / s).t().clamp(-448, 448).to(E4), extremes(BF16), scale)


def test_row_bound_and_row_scale() -> None:
    def chain(x: Any, s: Any, low: Any) -> Any:
        return torch.maximum(x.float() / s, low).clamp(-448, 448).to(E4)

    _check(chain, extremes(BF16), torch.rand(64, 1) + 0.1, torch.rand(64, 1))


def test_rows_of_two_different_views_are_refused() -> None:
    def chain(x: Any, s: Any, low: Any) -> Any:
        return torch.maximum((x.float() / s).view(128, 32), low).clamp(-448, 448).to(E4)

    recorder = _check(chain, extremes(BF16), torch.rand(64, 1) + 0.1, torch.rand(128, 1), count=0)
    assert recorder.refusals("fp8_downcast")[0].reason == "scale layout"


def test_a_strided_slice_with_dense_rows_is_read_in_place() -> None:
    x = extremes(BF16)
    recorder = _check(lambda x, s: (x[:, 16:48].float() / s).clamp(-448, 448).to(E4), x, SCALE)
    assert "aten.slice.Tensor(arg0_1, 1, 16, 48)" in recorder.reports[0].after


def test_transposed_input_is_dense() -> None:
    _check(lambda x, s: (x.float() / s).clamp(-448, 448).to(E4), extremes(BF16).t(), SCALE)


@pytest.mark.parametrize("dynamic", [False, True])
def test_two_chains_on_one_input(dynamic: bool) -> None:
    def chains(x: Any, s: Any) -> Any:
        return (x.float() / s).clamp(-448, 448).to(E4), (x.float() * s).clamp(-57344, 57344).to(E5)

    _check(chains, extremes(BF16), SCALE, count=2, dynamic=dynamic)


def test_second_user_of_the_scaled_value() -> None:
    def chain(x: Any, s: Any) -> Any:
        y = x.float() / s
        return y.clamp(-448, 448).to(E4), y

    report = inductor_ext.explain(chain, extremes(BF16), SCALE)
    (refusal,) = report.refusals
    assert (refusal.rule, refusal.reason) == ("fp8_downcast", "the scaled value has a second user")
    assert refusal.found.startswith(("graph output", "output")) and refusal.source.endswith("y = x.float() / s")


def test_more_numbers_than_a_kernel_takes_stay_outside() -> None:
    def chain(x: Any) -> Any:
        y = x.float()
        for i in range(12):
            y = y * (1.0 + i / 64)
        return y.clamp(-448, 448).to(E4)

    x = extremes(BF16)
    found, recorder = run_compiled(chain, (x,), rules={"fp8_downcast": "always"})
    assert recorder.counts() == {"fp8_downcast": 1}
    assert_all_same_bytes(found, run_copies(chain, (x,)))


# ---- dynamic scales ----------------------------------------------------------------------------------------------------


def _rowwise(x: Any) -> Any:
    s = (x.abs().amax(-1, keepdim=True) / 448.0).float()
    return (x.float() / s).clamp(-448.0, 448.0).to(E4), s


def _tensorwise(x: Any) -> Any:
    s = (x.abs().max() / 448.0).float()
    return (x.float() / s).clamp(-448.0, 448.0).to(E4), s


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("fn", [_rowwise, _tensorwise])
def test_dynamic_scale_of_extremes(fn: Any, dtype: torch.dtype) -> None:
    x = extremes(dtype)
    rows = [x, torch.zeros_like(x), x[8:], torch.full_like(x, 1e-30)]
    for value in rows:
        _check(fn, value, rule="fp8_quantize")


@pytest.mark.parametrize("shape", [(1, 64), (5, 1), (7, 13), (2, 3, 40), (64,)], ids=str)
@pytest.mark.parametrize("fn", [_rowwise, _tensorwise])
def test_dynamic_scale_shapes(fn: Any, shape: tuple[int, ...]) -> None:
    _check(fn, torch.randn(shape).bfloat16(), rule="fp8_quantize")


def test_dynamic_scale_of_no_rows() -> None:
    _check(_rowwise, torch.randn(0, 64).bfloat16(), rule="fp8_quantize")


def test_maximum_by_max_dim() -> None:
    def chain(x: Any) -> Any:
        s = (x.abs().max(-1, keepdim=True).values / 448.0).float()
        return (x.float() / s).clamp(-448.0, 448.0).to(E4), s

    _check(chain, torch.randn(32, 64).bfloat16(), rule="fp8_quantize")


@pytest.mark.parametrize("strides", ["contiguous", "transposed"])
def test_amax_rows_of_a_transposed_square_are_other_rows(strides: str) -> None:
    def chain(x: Any) -> Any:
        s = x.abs().amax(-1, keepdim=True).float()
        return (x.t().float() / s).clamp(-448.0, 448.0).to(E4)

    x = torch.randn(64, 64).bfloat16()
    recorder = _check(chain, x if strides == "contiguous" else x.t(), count=0, rule="fp8_quantize")
    assert "permuted view" in recorder.refusals("fp8_quantize")[0].found


# ---- what a kernel takes -----------------------------------------------------------------------------------------------


def test_numbers_and_host_scales_fit_the_kernels_constants() -> None:
    """A scale on the CPU goes to the kernel as a number: with eight numbers it would be the ninth."""

    def make(count: int) -> Any:
        def chain(x: Any, s: Any) -> Any:
            y = x.float() * s
            for i in range(count):
                y = y * (1.0 + i / 64)
            return y.to(E4)

        return chain

    for count, numbers in ((7, 7), (8, 8), (10, 8)):
        with fake_cuda_inputs(), FakeTensorMode():
            x, s = torch.empty(8, 8, dtype=BF16, device="cuda"), torch.empty(())
            report = inductor_ext.explain(make(count), x, s, rules={"fp8_downcast": "always"})
        assert report.counts() == {"fp8_downcast": 1}
        after = report.graphs[0].after
        assert after.count("mul:") - after.count("mul:s0") == numbers
        assert ("mul:s0" in after) is (count == 7)


@pytest.mark.parametrize(
    ("shape", "strides", "rows"),
    [
        ((3, 5, 8), (40, 8, 1), True),
        ((3, 5, 8), (80, 16, 1), True),  # columns of a wider buffer
        ((3, 1, 8), (32, 8, 1), True),  # one token a sequence: the stride of its only index leads nowhere
        ((3, 1, 8), (32, 999, 1), True),
        ((1, 5, 8), (7, 16, 1), True),
        ((3, 1, 5, 8), (80, 3, 16, 1), True),
        ((3, 1, 5, 8), (96, 3, 16, 1), False),
        ((3, 5, 8), (96, 16, 1), False),
        ((3, 8), (1, 3), False),
        ((8,), (1,), True),
        ((), (), False),
    ],
)
def test_what_collapses_to_rows(shape: tuple[int, ...], strides: tuple[int, ...], rows: bool) -> None:
    assert fp8_chain.collapses_to_rows(torch.empty(2000).as_strided(shape, strides)) is rows
