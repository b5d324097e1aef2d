"""mxfp8_grouped_mm's reference against float64, its fake, its errors, and rows that belong to no group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from inductor_ext.moe import mx
from tests.support.equal import assert_same_bytes

ops = torch.ops.inductor_ext
BF16, E4, E8 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu
GROUPS = {
    "even": [4, 8, 12],
    "empty_experts": [0, 5, 5],
    "all_on_the_last": [0, 0, 12],
    "one_row": [0, 1, 1],
    "no_rows": [0, 0, 0],
    "rows_of_no_group": [3, 4, 9],
    "more_than_a_tile": [130, 131, 290],
}


def problem(ends: list[int], n: int = 40, k: int = 96, tokens: int = 0, x_dtype: torch.dtype = BF16) -> tuple[Any, ...]:
    """x, w and offs; the values of x and w in float64 as MXFP8 holds them; scales plain."""
    tokens = tokens or max(12, ends[-1])
    x, w = torch.randn(tokens, k).to(x_dtype), (torch.randn(len(ends), n, k) * 0.1).bfloat16()
    w[0, 0, :32] = 0  # a block of zeros
    q, s = ops.mxfp8_quantize(w, None, "rceil", False)
    return x, q, s, torch.tensor(ends, dtype=torch.int32)


def values(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What MXFP8 stands for, from its definition."""
    exponents = scales.view(torch.uint8).double() - 127
    return data.double() * torch.exp2(exponents).repeat_interleave(32, -1)


def wanted(x: torch.Tensor, w: torch.Tensor, ends: list[int], dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float64)
    for expert, (start, end) in enumerate(zip([0, *ends], ends)):
        out[start:end] = x[start:end] @ w[expert].t()
    return out.to(dtype)


@pytest.mark.parametrize("out_dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("swizzled", [False, True], ids=["plain", "swizzled"])
@pytest.mark.parametrize("ends", list(GROUPS.values()), ids=list(GROUPS))
@pytest.mark.parametrize("x_dtype", [BF16, torch.float16, E4], ids=str)
def test_reference(x_dtype: torch.dtype, ends: list[int], swizzled: bool, out_dtype: torch.dtype) -> None:
    x, w, w_scale, offs = problem(ends, x_dtype=BF16 if x_dtype is E4 else x_dtype)
    left, x_scale = x.double(), None
    if x_dtype is E4:
        x, plain = ops.mxfp8_quantize(x, None, "rceil", False)
        left = values(x, plain)
        x_scale = mx.swizzle(plain, offs) if swizzled else plain
    scales = mx.swizzle(w_scale) if swizzled else w_scale
    found = ops.mxfp8_grouped_mm(x, x_scale, w, scales, offs, out_dtype, swizzled, 32)
    right = wanted(left, values(w, w_scale), ends, out_dtype)
    assert found.dtype is out_dtype and found.shape == (x.shape[0], w.shape[1])
    assert_same_bytes(found[: ends[-1]], right[: ends[-1]])


@pytest.mark.parametrize("out_dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("ends", list(GROUPS.values()), ids=list(GROUPS))
def test_reference_of_fp8_rows(ends: list[int], out_dtype: torch.dtype) -> None:
    x, w, w_scale, offs = problem(ends)
    scale = torch.rand(x.shape[0], 1) + 0.5
    found = ops.mxfp8_grouped_mm(x.to(E4), scale, w, w_scale, offs, out_dtype, False, 32)
    right = wanted(x.to(E4).double() * scale.double(), values(w, w_scale), ends, out_dtype)
    assert_same_bytes(found[: ends[-1]], right[: ends[-1]])
    swizzled = ops.mxfp8_grouped_mm(x.to(E4), scale, w, mx.swizzle(w_scale), offs, out_dtype, True, 32)
    assert_same_bytes(swizzled[: ends[-1]], found[: ends[-1]])


@pytest.mark.parametrize("ends", list(GROUPS.values()), ids=list(GROUPS))
def test_rows_of_no_group_are_not_written(ends: list[int]) -> None:
    x, w, w_scale, offs = problem(ends)
    out = torch.full((x.shape[0], w.shape[1]), 7.0, dtype=BF16)
    ops.mxfp8_grouped_mm.out(x, None, w, w_scale, offs, BF16, False, 32, out=out)
    assert bool((out[ends[-1] :] == 7).all())
    assert_same_bytes(out[: ends[-1]], ops.mxfp8_grouped_mm(x, None, w, w_scale, offs, BF16, False, 32)[: ends[-1]])


def test_nothing_to_do() -> None:
    _, w, w_scale, offs = problem([0, 0])
    assert ops.mxfp8_grouped_mm(torch.empty(0, 96, dtype=BF16), None, w, w_scale, offs, BF16, False, 32).shape == (0, 40)


def test_rows_of_a_wider_buffer() -> None:
    x, w, w_scale, offs = problem([4, 9])
    wide = torch.zeros(x.shape[0], 128, dtype=BF16)
    wide[:, :96] = x
    found = ops.mxfp8_grouped_mm(wide[:, :96], None, w, w_scale, offs, BF16, False, 32)
    assert_same_bytes(found, ops.mxfp8_grouped_mm(x, None, w, w_scale, offs, BF16, False, 32))


def test_scales_at_the_edges() -> None:
    """Byte 0 is 2^-127 and 255 is NaN, which torch's own cast makes of them too."""
    scales = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8).view(E8)
    found = mx.power_of_two(scales)
    assert found[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127] and bool(found[4].isnan())


@pytest.mark.parametrize("swizzled", [False, True], ids=["plain", "swizzled"])
def test_fake_agrees_with_real(swizzled: bool) -> None:
    x, w, w_scale, offs = problem([4, 9, 12])
    scales = mx.swizzle(w_scale) if swizzled else w_scale
    real = ops.mxfp8_grouped_mm(x, None, w, scales, offs, BF16, swizzled, 32)
    with FakeTensorMode() as mode:
        a, b, b_scale, ends = map(mode.from_tensor, (x, w, scales, offs))
        fake = ops.mxfp8_grouped_mm(a, None, b, b_scale, ends, BF16, swizzled, 32)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_opcheck() -> None:
    x, w, w_scale, offs = problem([4, 9, 12])
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.mxfp8_grouped_mm.default, (x, None, w, w_scale, offs, BF16, False, 32), test_utils=tests)


X, W = torch.zeros(4, 64, dtype=BF16), torch.zeros(2, 16, 64).to(E4)
S, OFFS = torch.full((2, 16, 2), 127, dtype=torch.uint8).view(E8), torch.tensor([2, 4], dtype=torch.int32)
ERRORS = [
    ({"x": X.float()}, TypeError, "x: wanted bfloat16, float16 or float8_e4m3fn, found torch.float32"),
    ({"x": X[None]}, ValueError, r"x: wanted \[T, K\], found shape \[1, 4, 64\]"),
    ({"x": torch.zeros(64, 4, dtype=BF16).t()}, ValueError, "x: wanted unit stride along K"),
    ({"x": torch.zeros(4, 65, dtype=BF16)[:, :64]}, ValueError, "rows at multiples of 16 bytes"),
    ({"x": X.to(E4)}, TypeError, "x_scale: wanted scales for float8_e4m3fn x, found None"),
    ({"x_scale": S[0, :4]}, TypeError, "x_scale: wanted None for torch.bfloat16 x"),
    ({"x": X.to(E4), "x_scale": S[0, :3]}, ValueError, r"x_scale: wanted shape \[T, 2\], found \[3, 2\]"),
    ({"x": X.to(E4), "x_scale": torch.ones(4, 2).half()}, TypeError, "x_scale: wanted float8_e8m0fnu, found torch.float16"),
    ({"x": X.to(E4), "x_scale": torch.ones(4, 2)}, ValueError, r"x_scale: wanted shape \[T, 1\], found \[4, 2\]"),
    ({"x": X.to(E4), "x_scale": torch.ones(4)}, ValueError, r"x_scale: wanted shape \[T, 1\], found \[4\]"),
    ({"w": W.to(BF16)}, TypeError, "w: wanted float8_e4m3fn, found torch.bfloat16"),
    ({"w": W[..., :32]}, ValueError, r"w: wanted \[E, N, 64\], K as x has and a multiple of 32, found shape \[2, 16, 32\]"),
    ({"x": X[:, :48], "w": W[..., :48]}, ValueError, "a multiple of 32"),
    ({"w": W.transpose(0, 1).contiguous().transpose(0, 1)}, ValueError, "w: wanted a contiguous tensor"),
    ({"w_scale": S[:, :8]}, ValueError, r"w_scale: wanted shape \[2, 16, 2\], found \[2, 8, 2\]"),
    ({"w_scale": S, "swizzled": True}, ValueError, r"w_scale: wanted shape \[2, 512\], found \[2, 16, 2\]"),
    ({"w_block": 64}, ValueError, "w_block: wanted 32 or 128, a divisor of K, found 64 for K = 64"),
    ({"w_block": 128}, ValueError, "w_block: wanted 32 or 128, a divisor of K, found 128 for K = 64"),
    ({"offs": OFFS.long()}, ValueError, r"offs: wanted int32 \[2\], one end a group, on cpu, found torch.int64"),
    ({"offs": OFFS[:1]}, ValueError, r"offs: wanted int32 \[2\]"),
    ({"out_dtype": E4}, TypeError, "out_dtype: wanted bfloat16, float16 or float32"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"x": X, "x_scale": None, "w": W, "w_scale": S, "offs": OFFS, "out_dtype": BF16, "swizzled": False, "w_block": 32}
    given |= changes
    with pytest.raises(error, match=message):
        ops.mxfp8_grouped_mm(*given.values())
    out = torch.full((4, 16), 7.0, dtype=given["out_dtype"] if given["out_dtype"] is BF16 else BF16)
    with pytest.raises(error, match=message):
        ops.mxfp8_grouped_mm.out(*given.values(), out=out)
    assert bool((out == 7).all()), "nothing is written"


@pytest.mark.parametrize("ends", [[3, 2], [2, 5], [-1, 4]])
def test_ends_that_are_none(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="offs: wanted ascending ends from 0 to at most 4"):
        ops.mxfp8_grouped_mm(X, None, W, S, torch.tensor(ends, dtype=torch.int32), BF16, False, 32)


def test_a_scale_buffer_that_is_too_short() -> None:
    x, w, w_scale, offs = problem([130, 131, 290])
    q, plain = ops.mxfp8_quantize(x, None, "rceil", False)
    scales = mx.swizzle(plain, offs)[:640]
    ops.mxfp8_grouped_mm(q, scales, w, mx.swizzle(w_scale), offs, BF16, True, 32)
    with pytest.raises(ValueError, match="x_scale: wanted at least 640 rows for the groups of offs"):
        ops.mxfp8_grouped_mm(q, scales[:512], w, mx.swizzle(w_scale), offs, BF16, True, 32)


def test_out_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"out: wanted torch.bfloat16 \[4, 16\] on cpu, found torch.bfloat16 \[4, 8\]"):
        ops.mxfp8_grouped_mm.out(X, None, W, S, OFFS, BF16, False, 32, out=torch.zeros(4, 8, dtype=BF16))


def test_scales_that_128_elements_share() -> None:
    x, (w, w_scale) = torch.randn(6, 256).bfloat16(), mx.quantize(torch.randn(2, 16, 256), "rceil", 128)
    offs = torch.tensor([2, 6], dtype=torch.int32)
    found = ops.mxfp8_grouped_mm(x, None, w, w_scale, offs, BF16, False, 128)
    assert_same_bytes(found, ops.mxfp8_grouped_mm(x, None, w, w_scale, offs, BF16, False, 32))
    assert_same_bytes(found, ops.mxfp8_grouped_mm(x, None, w, mx.swizzle(w_scale), offs, BF16, True, 128))
    w_scale.view(torch.uint8)[1, 3, 6] += 1
    with pytest.raises(ValueError, match=r"w_scale: wanted equal scales for each 128 elements of K, .* in row 3 of 1"):
        ops.mxfp8_grouped_mm(x, None, w, w_scale, offs, BF16, False, 128)
