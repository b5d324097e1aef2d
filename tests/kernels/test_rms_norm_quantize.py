"""rms_norm_quantize: its reference against the models' own modules, its arguments' errors, and the kernel against both."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from inductor_ext import jit
from inductor_ext.kernels.rms_norm_quantize.op import NORMS, OP, TORCHAO_PROGRAM, TORCHAO_SCALE, normalise
from inductor_ext.moe import mx
from tests.support.equal import assert_same_bytes

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def call(
    x: Any,
    residual: Any,
    weight: Any,
    norm: str = "cast mul",
    eps: float = 1e-6,
    dtype: Any = E4,
    scales: Any = (),
    **programs: str,
) -> Any:
    programs = {"granularity": "row", "scale_program": TORCHAO_SCALE, "program": TORCHAO_PROGRAM, **programs}
    return torch.ops.inductor_ext.rms_norm_quantize(x, residual, weight, eps, norm, *programs.values(), dtype, scales)


def operands(shape: Any, dtype: Any = BF16, weight: Any = None, device: str = "cpu") -> list[torch.Tensor]:
    made = torch.Generator(device).manual_seed(3)
    x, residual = (torch.randn(shape, device=device, generator=made).to(dtype) * 3 for _ in range(2))
    return [x, residual, (torch.rand(shape[-1], device=device, generator=made) + 0.5).to(weight or dtype)]


# ---- the reference ---------------------------------------------------------------------------------------------------


def _module(kind: str, weight: torch.Tensor, eps: float) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    from transformers.models.gemma import modeling_gemma
    from transformers.models.llama import modeling_llama
    from transformers.models.olmo2 import modeling_olmo2
    from transformers.models.qwen3 import modeling_qwen3

    assert transformers
    made = {
        "llama": modeling_llama.LlamaRMSNorm,
        "qwen3": modeling_qwen3.Qwen3RMSNorm,
        "gemma": modeling_gemma.GemmaRMSNorm,
        "olmo2": modeling_olmo2.Olmo2RMSNorm,
    }[kind](weight.shape[0], eps=eps)
    made.weight.data = weight.clone()
    return made


@pytest.mark.parametrize(
    ("kind", "norm"), [("llama", "cast mul"), ("qwen3", "cast mul"), ("gemma", "mul+1 cast"), ("olmo2", "mul cast")]
)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_the_reference_is_the_models_norm(kind: str, norm: str, granularity: str) -> None:
    x, residual, weight = operands((5, 7, 96))
    out, scale, total = call(x, residual, weight, norm, granularity=granularity)
    assert_same_bytes(total, x + residual)
    y = _module(kind, weight, 1e-6)(x + residual)
    wanted, wanted_scale = torch.ops.inductor_ext.fp8_quantize(y, granularity, TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
    assert_same_bytes(out, wanted)
    assert_same_bytes(scale, wanted_scale)


@pytest.mark.parametrize("rounding", mx.ROUNDINGS)
def test_the_reference_of_mxfp8_is_the_models_norm(rounding: str) -> None:
    x, residual, weight = operands((5, 7, 96))
    out, scale, total = call(x, residual, weight, granularity="mx", scale_program=rounding, program="")
    assert_same_bytes(total, x + residual)
    y = _module("llama", weight, 1e-6)(x + residual)
    wanted, wanted_scale = torch.ops.inductor_ext.mxfp8_quantize(y, None, rounding, False)
    assert scale.shape == (5, 7, 3)
    assert_same_bytes(out, wanted)
    assert_same_bytes(scale, wanted_scale)


def test_the_reference_is_torch_rms_norm() -> None:
    x, _, weight = operands((4, 64))
    out, scale, total = call(x, None, weight, "mul cast")
    y = torch.nn.functional.rms_norm(x, (64,), weight, 1e-6)
    assert total.shape == (0,) and scale.shape == (4, 1)
    near = torch.nn.functional.cosine_similarity(out.float() * scale, y.float(), dim=-1)
    assert (near > 0.999).all()


MX = {"granularity": lambda _: "mx", "scale_program": lambda _: "rceil", "program": lambda _: ""}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": lambda x: x.double()}, TypeError, "x: wanted bfloat16, float16 or float32"),
        ({"weight": lambda w: w[:3]}, ValueError, "weight: wanted the length of a row of x"),
        ({"residual": lambda r: r.float()}, ValueError, "residual: wanted torch.bfloat16"),
        ({"residual": lambda r: r[:1]}, ValueError, "residual: wanted torch.bfloat16 of shape"),
        ({"norm": lambda _: "layer"}, ValueError, "norm: wanted one of"),
        ({"granularity": lambda _: "group"}, ValueError, "granularity: wanted row or tensor"),
        ({"dtype": lambda _: torch.int8}, TypeError, "dtype: wanted float8_e4m3fn"),
        ({"program": lambda _: "f32 div:s0"}, ValueError, "s0"),
        ({"granularity": lambda _: "mx"}, ValueError, "scale_program and program: wanted rceil or floor and nothing for mx"),
        ({**MX, "dtype": lambda _: E5}, TypeError, "dtype: wanted float8_e4m3fn for mx, found torch.float8_e5m2"),
        (
            {**MX, "x": lambda x: x[..., :48], "residual": lambda _: None, "weight": lambda w: w[:48]},
            ValueError,
            r"wanted rows of a multiple of 32 elements for mx, found shape \(4, 48\)",
        ),
        ({"x": lambda x: x[..., :0], "residual": lambda _: None, "weight": lambda w: w[:0]}, ValueError, "at least one column"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    values: dict[str, Any] = dict(zip(("x", "residual", "weight"), operands((4, 64))))
    values |= {"norm": "cast mul", "dtype": E4, "granularity": "row"}
    values |= {"scale_program": TORCHAO_SCALE, "program": TORCHAO_PROGRAM}
    values.update({name: make(values[name]) for name, make in change.items()})
    tensors = [values.pop(name) for name in ("x", "residual", "weight")]
    with pytest.raises(error, match=message):
        call(*tensors, **values)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        *(((3, 64), "row"), ((2, 3, 64), "row"), ((0, 64), "row"), ((64,), "row"), ((2, 3, 64), "tensor")),
        *(((2, 3, 64), "mx"), ((0, 64), "mx")),
    ],
)
def test_fake_agrees(shape: Any, granularity: str, residual: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    programs = {"scale_program": "rceil", "program": ""} if granularity == "mx" else {}
    x, other, weight = operands(shape)
    real = call(x, other if residual else None, weight, granularity=granularity, **programs)
    with FakeTensorMode() as mode:
        x, other, weight = map(mode.from_tensor, (x, other, weight))
        fake = call(x, other if residual else None, weight, granularity=granularity, **programs)
    for one, two in zip(real, fake):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert one.numel() == 0 or one.stride() == two.stride()


# ---- the kernel ------------------------------------------------------------------------------------------------------

COLUMNS = (8, 64, 100, 128, 520, 1024, 1032, 3072, 4096, 8192, 16384)


def kernels(arch: str) -> list[jit.JitSpec]:
    every = itertools.product((BF16, FP16, FP32), (True, False), NORMS)
    keys = [(d, r, w, n, "row", TORCHAO_SCALE, TORCHAO_PROGRAM, E4) for d, r, n in every for w in dict.fromkeys((d, FP32))]
    keys += [(BF16, r, BF16, "cast mul", "tensor", TORCHAO_SCALE, TORCHAO_PROGRAM, E4) for r in (True, False)]
    return [OP.spec_of_key(key, arch) for key in keys]


gpu = pytest.mark.gpu(kernels=kernels)


def check(x: Any, residual: Any, weight: Any, norm: str, granularity: str = "row") -> None:
    """total byte for byte; the scale within one unit in its last place; out within one FP8 step of eager."""
    out, scale, total = call(x, residual, weight, norm, granularity=granularity)
    rest = (1e-6, norm, granularity, TORCHAO_SCALE, TORCHAO_PROGRAM, E4, [])
    want_out, want_scale, want_total = OP.reference(x, residual, weight, *rest)
    assert_same_bytes(total, want_total)
    torch.testing.assert_close(scale, want_scale, rtol=2.0**-7 if x.dtype is BF16 else 2.0**-9, atol=0, equal_nan=True)
    codes, want = out.view(torch.uint8).int(), want_out.view(torch.uint8).int()
    apart = (codes - want).abs()
    assert ((apart <= 1) | ((codes & 127) + (want & 127) <= 1)).all(), "further from eager than one FP8 step"
    assert (apart != 0).float().mean() < 0.05


@gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("residual", [True, False])
def test_every_width(residual: bool, dtype: Any, norm: str) -> None:
    for columns in COLUMNS:
        for weight in dict.fromkeys((dtype, FP32)):
            for rows in (37, 700):  # enough rows are given fewer threads each
                x, other, w = operands((rows, columns), dtype, weight, "cuda")
                check(x, other if residual else None, w, norm)


@gpu
@pytest.mark.parametrize("residual", [True, False])
def test_one_scale_for_all(residual: bool) -> None:
    for rows, columns in itertools.product((1, 37, 700, 5000), (8, 100, 128, 1024, 4096, 8192)):
        x, other, w = operands((rows, columns), BF16, None, "cuda")
        check(x, other if residual else None, w, "cast mul", "tensor")


@gpu
def test_given_the_factor_every_byte_is_eagers() -> None:
    """Rows whose squares have an exact mean: no order of summation can tell."""
    x = torch.tensor([1.0, -1.0, 2.0, -2.0], device="cuda").repeat(64, 256).bfloat16()
    weight = torch.linspace(0.1, 3, 1024, device="cuda").bfloat16()
    out, scale, _ = call(x, None, weight)
    y = normalise(x, weight, 1e-6, "cast mul")
    want_out, want_scale = torch.ops.inductor_ext.fp8_quantize(y, "row", TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
    assert_same_bytes(out, want_out)
    assert_same_bytes(scale, want_scale)


@gpu
def test_layouts_extremes_and_empty_input() -> None:
    x, other, weight = operands((40, 1024), BF16, None, "cuda")
    wide = torch.randn(40, 3 * 1024, device="cuda").bfloat16()
    check(wide[:, 1024:2048], other, weight, "cast mul")
    check(x, wide[:, 2048:], weight, "cast mul")
    check(x.view(5, 8, 1024), other.view(5, 8, 1024), weight, "mul cast")
    check(wide[:, 1:1025], None, weight, "cast mul")
    for value in (float("nan"), float("inf"), 0.0, 1e-40, 3e38):
        bad = x.clone()
        bad[3] = value
        bad[5, 7] = value
        out, scale, _ = call(bad, None, weight)
        rest = (1e-6, "cast mul", "row", TORCHAO_SCALE, TORCHAO_PROGRAM, E4, [])
        want_out, want_scale, _ = OP.reference(bad, None, weight, *rest)
        assert torch.equal(scale.isnan(), want_scale.isnan()) and torch.equal(out.float().isnan(), want_out.float().isnan())
    empty, scale, _ = call(x[:0], None, weight)
    assert empty.shape == (0, 1024) and scale.shape == (0, 1)


# ---- MXFP8 -----------------------------------------------------------------------------------------------------------


def mx_kernels(arch: str) -> list[jit.JitSpec]:
    kinds = itertools.product((BF16, FP16, FP32), (True, False), ("cast mul", "mul+1 cast"))
    keys = [(d, r, d, n, "mx", rounding, "", E4) for (d, r, n), rounding in zip(kinds, itertools.cycle(mx.ROUNDINGS))]
    return [OP.spec_of_key(key, arch) for key in keys]


@pytest.mark.gpu(kernels=mx_kernels)
def test_mxfp8_given_the_factor_every_byte_is_eagers() -> None:
    """Rows whose squares have an exact mean, of every width: no order of summation can tell."""
    kinds = itertools.product((BF16, FP16, FP32), (True, False), ("cast mul", "mul+1 cast"))
    for (dtype, residual, norm), rounding in zip(kinds, itertools.cycle(mx.ROUNDINGS)):
        for rows, columns in itertools.product((1, 37, 700), (32, 64, 128, 512, 1024, 4096, 16384)):
            signs = torch.randint(0, 2, (rows, columns), device="cuda") * 2 - 1
            x = (signs * 4 ** torch.arange(rows, device="cuda").remainder(5)[:, None]).to(dtype)
            weight = torch.exp2(torch.linspace(-9, 9, columns, device="cuda")).to(dtype)
            other = x if residual else None
            wide = torch.cat([x, x], 1)
            for given in (x, wide[:, columns:], wide[:, 1 : columns + 1].copy_(x)):
                found = call(given, other, weight, norm, granularity="mx", scale_program=rounding, program="")
                wanted = OP.reference(given, other, weight, 1e-6, norm, "mx", rounding, "", E4, [])
                for one, two in zip(found, wanted, strict=True):
                    assert_same_bytes(one, two, f"{dtype} {norm} {rows} x {columns}")


@pytest.mark.gpu(kernels=mx_kernels)
def test_mxfp8_of_any_rows_extremes_and_none() -> None:
    for columns in (96, 160, 1056, 2880, 3072, 12320):
        x, other, weight = operands((700, columns), BF16, None, "cuda")
        x[3], x[4, 5], x[6, 7], x[8] = 0.0, float("nan"), float("inf"), 3e38
        other[3] = 0.0
        out, scale, total = call(x, other, weight, granularity="mx", scale_program="rceil", program="")
        want_out, want_scale, want_total = OP.reference(x, other, weight, 1e-6, "cast mul", "mx", "rceil", "", E4, [])
        assert_same_bytes(total, want_total)
        assert torch.equal(out.float().isnan(), want_out.float().isnan())
        same = scale.view(torch.uint8) == want_scale.view(torch.uint8)
        assert same.float().mean() > 0.999
        codes, want = (each.view(torch.uint8).int().view(700, -1, 32)[same] for each in (out, want_out))
        apart = (codes - want).abs()
        assert bool(((apart <= 1) | ((codes & 127) + (want & 127) <= 1) | ((codes & 127) == 127)).all())
        assert (apart != 0).float().mean() < 0.05
    x, weight = torch.randn(4, 2880, device="cuda").bfloat16(), torch.ones(2880, device="cuda").bfloat16()
    empty, scale, _ = call(x[:0], None, weight, granularity="mx", scale_program="floor", program="")
    assert empty.shape == (0, 2880) and scale.shape == (0, 90)
