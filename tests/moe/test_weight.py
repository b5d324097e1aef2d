"""MXFP8Weight: what it stands for, what it may be used for, and how it is moved, copied, saved and loaded."""

from __future__ import annotations

import copy
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext import MXFP8Weight
from inductor_ext.moe import weight as weights
from tests.support.equal import assert_same_bytes

BF16, E4 = torch.bfloat16, torch.float8_e4m3fn
OFFS = torch.tensor([4, 4, 15, 20], dtype=torch.int32)
SWIZZLED = pytest.mark.parametrize("swizzled", [False, True], ids=["plain", "swizzled"])


def bf16(e: int = 4, n: int = 64, k: int = 96) -> torch.Tensor:
    return (torch.randn(e, n, k) * 0.1).bfloat16()


def x_of(weight: torch.Tensor) -> torch.Tensor:
    return torch.randn(20, weight.shape[-1]).bfloat16()


class Experts(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x, self.weight.transpose(-2, -1), offs)


@SWIZZLED
@pytest.mark.parametrize("shape", [(4, 64, 96), (2, 200, 160), (1, 8, 32)])
def test_it_stands_for_the_quantised_numbers(shape: tuple[int, ...], swizzled: bool) -> None:
    w = bf16(*shape)
    made = MXFP8Weight.quantize(w, swizzled=swizzled)
    data, scale = torch.ops.inductor_ext.mxfp8_quantize(w, None, "rceil", False)
    exponents = scale.view(torch.uint8).double() - 127
    wanted = data.double() * torch.exp2(exponents).repeat_interleave(32, -1)
    found = made.dequantize()
    assert (made.shape, made.dtype, made.stride(), made.requires_grad) == (w.shape, BF16, w.stride(), False)
    assert found.dtype is BF16 and torch.equal(found.double(), wanted), "bf16 holds every one of them"
    assert float((found - w).float().norm() / w.float().norm()) < 0.03
    assert torch.equal(torch.stack(list(made.experts())), found)


def test_every_scale_and_every_number() -> None:
    """All 256 bytes of e4m3 by all of e8m0, in bf16: what float64 gives, rounded once."""
    data = torch.arange(256, dtype=torch.uint8).view(E4).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 8).contiguous()
    found = weights.dequantize(data, scale)
    power = torch.exp2(scale[:, :1].double() - 127)
    power[255] = float("nan")
    assert_same_bytes(found, (data.double() * power).float().bfloat16())
    finite = found[1:254].isfinite()
    inside = finite & (found[1:254].abs() >= torch.finfo(BF16).tiny)
    assert torch.equal(found[1:254].double()[inside], (data.double() * power)[1:254][inside]), "exact in bf16's range"


@pytest.mark.parametrize("activations", ["bf16", "fp8", "mxfp8"])
def test_grouped_mm_computes_with_what_it_stands_for(activations: str) -> None:
    w = bf16()
    x, made = x_of(w), MXFP8Weight.quantize(w, activations=activations)
    left = x
    if activations == "mxfp8":
        data, scale = torch.ops.inductor_ext.mxfp8_quantize(x, None, "rceil", False)
        left = weights.dequantize(data, scale.view(torch.uint8))
        assert not torch.equal(left, x)
    if activations == "fp8":
        left, scale = weights.by_rows(x)
        assert left.dtype is torch.float8_e4m3fn and torch.equal(left.float().abs().amax(1), torch.full((len(x),), 448.0))
        left = left.to(BF16)
    wanted = torch._grouped_mm(left, made.dequantize().transpose(-2, -1), OFFS)
    if activations == "fp8":
        wanted = (wanted * scale).to(BF16)
    for call in (torch._grouped_mm, torch.nn.functional.grouped_mm):
        assert_same_bytes(call(x, made.transpose(-2, -1), offs=OFFS), wanted)
    assert_same_bytes(torch._grouped_mm(x, made.mT, OFFS), wanted)
    assert_same_bytes(torch._grouped_mm(x, made.permute(0, 2, 1), OFFS), wanted)


def test_transposed_weights() -> None:
    """[E, K, N] in memory, as gpt-oss keeps them: quantised along K, and read without a transposition."""
    w = bf16().transpose(-2, -1).contiguous()
    made = MXFP8Weight.quantize(w, transposed=True)
    assert made.shape == w.shape and made.transpose(1, 2).is_contiguous()
    assert_same_bytes(made.dequantize(), MXFP8Weight.quantize(w.mT.contiguous()).dequantize().mT)
    x = torch.randn(20, 96).bfloat16()
    assert_same_bytes(torch._grouped_mm(x, made, OFFS), torch._grouped_mm(x, made.dequantize(), OFFS))


def test_gradients_reach_x_and_stop_at_the_weight() -> None:
    w = MXFP8Weight.quantize(bf16())
    x = x_of(w).requires_grad_()
    upstream = torch.randn(20, 64).bfloat16()
    torch._grouped_mm(x, w.transpose(-2, -1), OFFS).backward(upstream)
    plain = x.detach().clone().requires_grad_()
    torch._grouped_mm(plain, w.dequantize().transpose(-2, -1), OFFS).backward(upstream)
    assert x.grad is not None and plain.grad is not None
    assert_same_bytes(x.grad, plain.grad)


def test_memory_is_halved() -> None:
    w = bf16(8, 128, 256)
    made = MXFP8Weight.quantize(w)
    assert made.quantized_nbytes == w.nbytes // 2 + w.numel() // 32
    assert {inner.untyped_storage().nbytes() for inner in (made._data, made._scale)} == {w.numel(), w.numel() // 32}


@SWIZZLED
def test_deepcopy(swizzled: bool) -> None:
    first = Experts(MXFP8Weight.quantize(bf16(), swizzled=swizzled))
    second = copy.deepcopy(first)
    assert isinstance(second.weight, MXFP8Weight) and isinstance(second.weight, torch.nn.Parameter)
    assert_same_bytes(second.weight.dequantize(), first.weight.dequantize())
    second.weight._data.zero_()
    assert bool(first.weight.dequantize().any())


@SWIZZLED
@pytest.mark.parametrize("weights_only", [True, False])
def test_state_dict(tmp_path: Path, swizzled: bool, weights_only: bool) -> None:
    w = bf16()
    first = Experts(MXFP8Weight.quantize(w, swizzled=swizzled))
    torch.save(first.state_dict(), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 0.7 * w.nbytes
    loaded = torch.load(tmp_path / "model.pt", weights_only=weights_only)
    second = Experts(MXFP8Weight.quantize(torch.zeros_like(w) + 1, swizzled=swizzled))
    second.load_state_dict(loaded)
    assert_same_bytes(second.weight.dequantize(), first.weight.dequantize())
    third = Experts(torch.zeros_like(w))
    third.load_state_dict(loaded, assign=True)
    assert isinstance(third.weight, MXFP8Weight)
    x = x_of(w)
    assert_same_bytes(third(x, OFFS), first(x, OFFS))


def test_a_whole_module_is_saved() -> None:
    first, file = Experts(MXFP8Weight.quantize(bf16())), io.BytesIO()
    torch.save(first, file)
    file.seek(0)
    second = torch.load(file, weights_only=False)
    assert isinstance(second.weight, torch.nn.Parameter)
    assert_same_bytes(second.weight.dequantize(), first.weight.dequantize())


def test_a_bf16_checkpoint_is_not_quantised_silently() -> None:
    experts = Experts(MXFP8Weight.quantize(bf16()))
    with pytest.raises(RuntimeError, match=r"wanted quantised weights to copy from, found .*; load the checkpoint"):
        experts.load_state_dict({"weight": bf16()})
    with pytest.raises(RuntimeError, match="wanted swizzled=False, as the weight that is written has, found True"):
        experts.load_state_dict({"weight": MXFP8Weight.quantize(bf16(), swizzled=True)})


def test_it_moves() -> None:
    experts = Experts(MXFP8Weight.quantize(bf16()))
    assert isinstance(experts.to("meta").weight, MXFP8Weight) and experts.weight.device.type == "meta"
    assert experts.weight._data.is_meta and experts.weight._scale.is_meta
    made = experts.to_empty(device="cpu").weight
    assert isinstance(made, MXFP8Weight) and made.device.type == "cpu"


def test_a_cast_to_bf16_is_none_and_to_anything_else_an_error() -> None:
    experts = Experts(MXFP8Weight.quantize(bf16()))
    assert isinstance(experts.bfloat16().weight, MXFP8Weight)
    for cast in (experts.half, experts.float, experts.weight.double, lambda: experts.weight.to(torch.float16)):
        with pytest.raises(TypeError, match=r"dtype: wanted bfloat16, which quantised weights stand for, found torch\.float"):
            cast()
    assert isinstance(experts.weight, MXFP8Weight) and experts.weight.dtype is BF16


def test_other_operators_take_the_bf16_weight_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    made = MXFP8Weight.quantize(bf16())
    weights._warned.clear()
    with caplog.at_level(logging.WARNING, "inductor_ext"):
        for _ in range(2):
            assert_same_bytes(made[1], made.dequantize()[1])
            assert_same_bytes(made + 1, made.dequantize() + 1)
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and all("the weight is dequantised to bf16" in line for line in said)
    assert "aten.select.int" in said[0] and "aten.add.Tensor" in said[1]


def test_nothing_writes_to_it() -> None:
    made = MXFP8Weight.quantize(bf16())
    before = made.dequantize()
    for write in (lambda: made.zero_(), lambda: made.mul_(2), lambda: made.copy_(before), lambda: torch.add(made, 1, out=made)):
        with pytest.raises(TypeError, match="MXFP8Weight"):
            write()
    assert_same_bytes(made.dequantize(), before)


ERRORS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (torch.zeros(2, 8, 32), {}, TypeError, "weight: wanted bfloat16, found torch.float32"),
    (torch.zeros(8, 32, dtype=BF16), {}, ValueError, r"weight: wanted \[E, N, K\], found shape \[8, 32\]"),
    (torch.zeros(2, 32, 40, dtype=BF16), {}, ValueError, "K a multiple of 32, found"),
    (torch.zeros(2, 40, 32, dtype=BF16), {"transposed": True}, ValueError, r"\[E, K, N\], K a multiple of 32"),
    (torch.zeros(2, 0, 32, dtype=BF16), {}, ValueError, r"found shape \[2, 0, 32\]"),
    (torch.zeros(2, 8, 32, dtype=BF16), {"activations": "int8"}, ValueError, "activations: wanted bf16, fp8, mxfp8, found"),
    (torch.zeros(2, 8, 32, dtype=BF16), {"rounding": "even"}, ValueError, "rounding: wanted rceil or floor, found 'even'"),
]


@pytest.mark.parametrize(("weight", "options", "error", "message"), ERRORS)
def test_errors(weight: torch.Tensor, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MXFP8Weight.quantize(weight, **options)


@SWIZZLED
@pytest.mark.parametrize("activations", ["bf16", "fp8", "mxfp8"])
def test_stock_inductor_compiles_it_too(activations: str, swizzled: bool) -> None:
    experts = Experts(MXFP8Weight.quantize(bf16(), activations=activations, swizzled=swizzled))
    x = x_of(experts.weight)
    with torch.no_grad():
        assert_same_bytes(torch.compile(experts, fullgraph=True)(x, OFFS), experts(x, OFFS))


def test_it_is_public() -> None:
    assert {"MXFP8Weight", "quantize_moe_"} <= set(inductor_ext.__all__)


@pytest.mark.parametrize("outliers", [0.0, 1.0], ids=["normal", "channels of all sizes"])
def test_one_scale_for_128_costs_no_accuracy(outliers: float) -> None:
    """e4m3 has an exponent of its own: only numbers below 2^-14 of the largest are rounded otherwise."""
    w = (torch.randn(2, 48, 512) * torch.exp(torch.randn(512) * outliers)).bfloat16()
    errors = []
    for activations in ("bf16", "fp8"):
        found = MXFP8Weight.quantize(w, activations=activations).dequantize()
        errors.append(float((found - w).double().norm() / w.double().norm()))
    assert MXFP8Weight.quantize(w, activations="fp8")._block == 128 and 0.02 < errors[0] < 0.03
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_what_128_elements_share_is_still_mxfp8() -> None:
    weight = MXFP8Weight.quantize(torch.randn(2, 48, 256).bfloat16(), activations="fp8")
    runs = weight.plain_scale.unflatten(-1, (-1, 4))
    assert bool((runs == runs[..., :1]).all()) and "block=128" in repr(weight)
    assert torch.equal(weight.dequantize(), weights.dequantize(weight._data, weight.plain_scale))
    assert copy.deepcopy(weight)._block == 128 and weight.transpose(-2, -1)._block == 128
    assert MXFP8Weight.quantize(torch.randn(2, 48, 96).bfloat16(), activations="fp8")._block == 32
