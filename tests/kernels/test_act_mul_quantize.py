"""act_mul_quantize: its reference against model libraries' eager lines, its arguments' errors, and the kernel against it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from inductor_ext import jit
from inductor_ext.kernels.act_mul_quantize.op import ACTIVATIONS, OP, TORCHAO_PROGRAM, TORCHAO_SCALE
from inductor_ext.moe import mx
from tests.support.equal import assert_same_bytes

E4 = torch.float8_e4m3fn
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


GRANULARITIES = pytest.mark.parametrize("granularity", ["row", "tensor"])


def call(
    gate: Any, up: Any, act: str = "silu", dtype: Any = E4, program: str = TORCHAO_PROGRAM, granularity: str = "row"
) -> Any:
    return torch.ops.inductor_ext.act_mul_quantize(gate, up, act, granularity, TORCHAO_SCALE, program, dtype, [])


def operands(shape: Any, dtype: Any = BF16, device: str = "cpu") -> list[torch.Tensor]:
    made = torch.Generator(device).manual_seed(5)
    return [(torch.randn(shape, device=device, generator=made) * 3).to(dtype) for _ in range(2)]


@GRANULARITIES
@pytest.mark.parametrize(("act", "hidden_act"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_the_reference_is_the_models_mlp(act: str, hidden_act: str, granularity: str) -> None:
    activations = pytest.importorskip("transformers.activations")
    gate, up = operands((5, 96))
    y = activations.ACT2FN[hidden_act](gate) * up
    out, scale = call(gate, up, act, granularity=granularity)
    wanted, wanted_scale = torch.ops.inductor_ext.fp8_quantize(y, granularity, TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
    assert_same_bytes(out, wanted)
    assert_same_bytes(scale, wanted_scale)


def call_mx(gate: Any, up: Any, rounding: str = "rceil") -> Any:
    return torch.ops.inductor_ext.act_mul_quantize(gate, up, "silu", "mx", rounding, "", E4, [])


@pytest.mark.parametrize("rounding", mx.ROUNDINGS)
@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 64), (0, 64)], ids=str)
def test_the_reference_of_mxfp8(shape: Any, rounding: str) -> None:
    gate, up = operands(shape)
    out, scale = call_mx(gate, up, rounding)
    wanted, wanted_scale = mx.quantize(torch.nn.functional.silu(gate) * up, rounding)
    assert_same_bytes(out, wanted)
    assert_same_bytes(scale, wanted_scale)
    fakes = OP.fake(gate, up, "silu", "mx", rounding, "", E4, [])
    assert [(t.dtype, t.shape) for t in fakes] == [(t.dtype, t.shape) for t in (out, scale)]


def test_bad_arguments_of_mxfp8() -> None:
    gate, up = operands((4, 64))
    with pytest.raises(ValueError, match="scale_program and program: wanted rceil or floor and nothing for mx, found 'even'"):
        call_mx(gate, up, "even")
    with pytest.raises(ValueError, match=r"wanted rows of a multiple of 32 elements for mx, found shape \(4, 48\)"):
        call_mx(gate[:, :48], up[:, :48])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": lambda x: x.double()}, TypeError, "gate: wanted bfloat16"),
        ({"up": lambda x: x[:1]}, ValueError, "up: wanted torch.bfloat16 of shape"),
        ({"up": lambda x: x.float()}, ValueError, "up: wanted torch.bfloat16"),
        ({"act": lambda _: "tanh"}, ValueError, "act: wanted one of silu"),
        ({"granularity": lambda _: "group"}, ValueError, "granularity: wanted row or tensor"),
        ({"dtype": lambda _: torch.int8}, TypeError, "dtype: wanted float8_e4m3fn"),
        ({"program": lambda _: "f32 div:s0"}, ValueError, "s0"),
        ({"gate": lambda x: x[:, :0], "up": lambda x: x[:, :0]}, ValueError, "at least one column"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    values: dict[str, Any] = dict(zip(("gate", "up"), operands((4, 64))))
    values |= {"act": "silu", "dtype": E4, "program": TORCHAO_PROGRAM, "granularity": "row"}
    values.update({name: make(values[name]) for name, make in change.items()})
    with pytest.raises(error, match=message):
        call(**values)


def test_no_element_has_no_maximum() -> None:
    with pytest.raises(ValueError, match="gate: wanted at least one element"):
        call(*operands((0, 64)), granularity="tensor")


@pytest.mark.parametrize(
    ("shape", "granularity"), [((3, 64), "row"), ((2, 3, 64), "row"), ((0, 64), "row"), ((64,), "row"), ((2, 3, 64), "tensor")]
)
def test_fake_agrees(shape: Any, granularity: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = call(*operands(shape), granularity=granularity)
    with FakeTensorMode() as mode:
        fake = call(*map(mode.from_tensor, operands(shape)), granularity=granularity)
    for one, two in zip(real, fake):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert one.numel() == 0 or one.stride() == two.stride()


# ---- the kernel ------------------------------------------------------------------------------------------------------


def kernels(arch: str) -> list[jit.JitSpec]:
    kinds = itertools.product((BF16, FP16, FP32), ACTIVATIONS, ("row", "tensor"))
    keys = [(*kind, TORCHAO_SCALE, TORCHAO_PROGRAM, E4) for kind in kinds]
    keys += [(dtype, "silu", "row", "f32", TORCHAO_PROGRAM, E4) for dtype in (BF16, FP16)]
    return [OP.spec_of_key(key, arch) for key in keys]


def check(gate: Any, up: Any, act: str) -> None:
    """Byte for byte: every step is element-wise or a maximum, and PyTorch's own formula."""
    for granularity in ("row", "tensor"):
        out, scale = call(gate, up, act, granularity=granularity)
        want_out, want_scale = OP.reference(gate, up, act, granularity, TORCHAO_SCALE, TORCHAO_PROGRAM, E4, [])
        assert_same_bytes(scale, want_scale)
        assert_same_bytes(out, want_out)


@pytest.mark.gpu(kernels=kernels)
@pytest.mark.parametrize("act", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_every_width_and_bit_pattern(dtype: Any, act: str) -> None:
    for columns in (8, 64, 100, 128, 520, 1024, 3072, 4096, 8192, 14336, 16384):
        check(*operands((37, columns), dtype, "cuda"), act)
        check(*operands((700, columns), dtype, "cuda"), act)  # enough rows to be given fewer threads each
    if dtype is not FP32:
        gate = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").to(torch.int16).view(dtype).view(64, 1024)
        gate = gate.nan_to_num(0.0, posinf=3.0, neginf=-3.0)
        check(gate, torch.ones_like(gate), act)


@pytest.mark.gpu(kernels=kernels)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_silu_of_every_16_bit_value(dtype: Any) -> None:
    """A scale that is the row's maximum shows |y| as it is, where FP8 would hide the last bits."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").to(torch.int16).view(dtype).view(-1, 1).repeat(1, 8)
    programs = ("row", "f32", TORCHAO_PROGRAM, E4, [])
    _, scale = torch.ops.inductor_ext.act_mul_quantize(gate, torch.ones_like(gate), "silu", *programs)
    wanted = torch.nn.functional.silu(gate)[:, :1].abs().float()
    assert bool(((scale == wanted) | (scale.isnan() & wanted.isnan())).all())


@pytest.mark.gpu(kernels=kernels)
def test_layouts_extremes_and_empty_input() -> None:
    both = torch.randn(40, 2 * 3072, device="cuda").bfloat16()
    gate, up = both.chunk(2, 1)
    check(gate, up, "silu")
    check(both[:, 1:1025], up[:, :1024], "gelu")
    check(gate.reshape(5, 8, 3072), up.reshape(5, 8, 3072), "gelu_tanh")
    for value in (float("nan"), float("inf"), -float("inf"), 0.0, 1e-40, 3e38):
        bad = gate.clone()
        bad[3, 5] = value
        check(bad, up, "silu")
    out, scale = call(gate[:0], up[:0])
    assert out.shape == (0, 3072) and scale.shape == (0, 1)


MX = list(itertools.product((BF16, FP16, FP32), mx.ROUNDINGS))


@pytest.mark.gpu(kernels=lambda arch: [OP.spec_of_key((dtype, "silu", "mx", mode, "", E4), arch) for dtype, mode in MX])
def test_mxfp8_on_the_gpu() -> None:
    """Bytes of the reference: SiLU's are eager's, and all that follows is exact."""
    for (dtype, rounding), columns, rows in itertools.product(MX, (32, 96, 128, 768, 2880, 14336), (0, 1, 37, 700)):
        both = operands((rows, 2 * columns + 8), dtype, "cuda")[0]
        both[: rows // 3] *= 100
        for gate, up in (both[:, : 2 * columns].chunk(2, -1), (both[:, 1 : columns + 1], both[:, columns : 2 * columns])):
            found = call_mx(gate, up, rounding)
            wanted = OP.reference(gate, up, "silu", "mx", rounding, "", E4, [])
            for one, two in zip(found, wanted, strict=True):
                assert_same_bytes(one, two, f"{dtype} {rounding} {rows} x {columns}")
