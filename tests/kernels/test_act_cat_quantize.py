"""act_cat_quantize: its reference, its arguments' errors, its fake, and the kernel on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_ext import jit
from inductor_ext.kernels.act_cat_quantize.op import OP
from inductor_ext.kernels.act_quantize.op import FORMS
from inductor_ext.kernels.quantized import TORCHAO_PROGRAM, TORCHAO_SCALE
from tests.support import cuda_on_cpu
from tests.support.activations import Kind, in_fp32, plus_abs
from tests.support.equal import assert_same_bytes

E4, U8 = torch.float8_e4m3fn, torch.uint8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
F = torch.nn.functional
PROGRAMS = {"row": (TORCHAO_SCALE, TORCHAO_PROGRAM), "mx": ("rceil", "")}


def call(x: Any, gate: Any, up: Any, form: str, *, pairs: bool = False, x_first: bool = True, granularity: str = "row") -> Any:
    programs = PROGRAMS.get(granularity, PROGRAMS["row"])
    return torch.ops.inductor_ext.act_cat_quantize(x, gate, up, form, pairs, x_first, granularity, *programs, E4, [])


def rows(shape: Any, dtype: torch.dtype = BF16, device: str = "cpu", seed: int = 5) -> torch.Tensor:
    return (torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed)) * 4).to(dtype)


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_first", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_the_reference_is_what_flux_writes(dtype: torch.dtype, x_first: bool) -> None:
    attention, h = rows((2, 3, 5, 16), dtype), rows((2, 5, 96), dtype, seed=6)
    columns = attention.transpose(1, 2).flatten(2, 3)
    parts = [columns, F.gelu(h, approximate="tanh")]
    y = torch.cat(parts if x_first else parts[::-1], dim=2)
    want, want_scale = torch.ops.inductor_ext.fp8_quantize(y, "row", TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
    for x in (columns, attention.transpose(1, 2)):
        out, scale = call(x, h, None, "gelu_tanh", x_first=x_first)
        assert_same_bytes(out, want)
        assert_same_bytes(scale, want_scale)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": lambda x: x.float()}, ValueError, r"x: wanted torch.bfloat16 of the rows of gate, \[4\], and columns or heads"),
        ({"x": lambda x: x[:1]}, ValueError, "x: wanted torch.bfloat16 of the rows of gate"),
        ({"x": lambda x: x[0]}, ValueError, "x: wanted torch.bfloat16 of the rows of gate"),
        ({"x": lambda x: x.view(4, 2, 4, 4)}, ValueError, "x: wanted torch.bfloat16 of the rows of gate"),
        ({"x": lambda x: x[:, :0]}, ValueError, "x: wanted at least one column"),
        ({"gate": lambda x: x[:, :0], "up": lambda x: x[:, :0]}, ValueError, "gate: wanted at least one column"),
        ({"gate": lambda x: x[0, 0], "up": lambda _: None}, ValueError, "gate: wanted at least one dimension"),
        (dict.fromkeys(("x", "gate", "up"), torch.Tensor.double), TypeError, "x and gate: wanted bfloat16, float16 or float32"),
        ({"up": lambda _: None}, ValueError, "up: wanted a tensor for 'fp32 silu mul', found None"),
        ({"form": lambda _: "tanh"}, ValueError, "form: wanted one of silu, "),
        ({"granularity": lambda _: "tensor"}, ValueError, "granularity: wanted row or mx, found 'tensor'"),
        ({"granularity": lambda _: "mx", "x": lambda x: x[:, :16]}, ValueError, "x and gate: wanted rows of a multiple of 32"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    values: dict[str, Any] = {"x": rows((4, 32)), "gate": rows((4, 64)), "up": rows((4, 64))}
    values |= {"form": "fp32 silu mul", "granularity": "row"}
    values.update({name: make(values[name]) for name, make in change.items()})
    with pytest.raises(error, match=f"act_cat_quantize: {message}"):
        call(**values)


@pytest.mark.parametrize("granularity", ["row", "mx"])
@pytest.mark.parametrize(("form", "pairs"), [("gelu", False), ("fp32 silu mul", False), ("clamped_swiglu", True)])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("shape", [(6, 64), (2, 3, 64), (0, 64)], ids=str)
def test_fakes_agree(shape: Any, heads: bool, form: str, pairs: bool, granularity: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = rows((*shape[:-1], 2, 16)) if heads else rows((*shape[:-1], 32))
    given = [x, rows(shape), rows(shape) if FORMS[form].inputs == 2 and not pairs else None]
    real = call(*given, form, pairs=pairs, granularity=granularity)
    with FakeTensorMode() as mode:
        fakes = [None if each is None else mode.from_tensor(each) for each in given]
        fake = call(*fakes, form, pairs=pairs, granularity=granularity)
    for one, two in zip(real, fake, strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert one.numel() == 0 or one.stride() == two.stride()


# ---- the kernel's source on the CPU ----------------------------------------------------------------------------------


#: Functions of tests/support/cuda_on_cpu/act_cat_quantize.cpp.
KINDS = {
    "alone_bf16": Kind(plus_abs, 1),
    "alone_fp32": Kind(plus_abs, 1, FP32),
    "relu_squared": Kind(FORMS["relu_squared"].fn, 1, FP16),
    "gelu_tanh": Kind(FORMS["gelu_tanh"].fn, 1, exact=False),
    "gelu_mul": Kind(FORMS["gelu mul"].fn, 2, exact=False),
    "fp32_mul": Kind(in_fp32, 2),
    "fp32_mul_pairs": Kind(in_fp32, 2, pairs=True),
}
#: Rows, columns of x, columns of the activation.
SIZES = (
    *((5, 8, 16), (9, 96, 32), (10, 40, 60), (9, 8, 520), (9, 512, 1024), (3, 1, 2), (3, 5, 128)),
    *((2, 3072, 1032), (1, 16392, 8)),
)
OF_ALL = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    made = cuda_on_cpu.compiled("act_cat_quantize", Path(tmp_path_factory.mktemp("act_cat_quantize")))
    made.set_multiprocessors(4)
    return made


def run(library: ctypes.CDLL, name: str, x: Any, gate: Any, up: Any, x_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    kind = KINDS[name]
    columns = x.shape[-1] * (x.shape[-2] if x.dim() > gate.dim() else 1) + gate.shape[-1] // (2 if kind.pairs else 1)
    out, scale = torch.full((*gate.shape[:-1], columns), 0x55, dtype=U8), torch.full((*gate.shape[:-1], 1), -1.0)
    error = ctypes.create_string_buffer(500)
    tensors = [None if each is None else ctypes.byref(cuda_on_cpu.Given.of(each)) for each in (x, gate, up, out, scale)]
    given = *tensors[:3], int(x_first), *tensors[3:]
    assert getattr(library, name)(*given, error, 500) == 0, error.value.decode()
    return out.view(E4), scale


def check(name: str, x: Any, gate: Any, up: Any, x_first: bool, out: torch.Tensor, scale: torch.Tensor) -> None:
    """Every byte where nothing is approximated. Else those of x, given the scale, and the others within one FP8 step."""
    kind = KINDS[name]
    columns = x.flatten(-2) if x.dim() > gate.dim() else x
    inputs = (gate[..., ::2], gate[..., 1::2]) if kind.pairs else (gate,) if up is None else (gate, up)
    activated = kind.fn(*inputs)
    y = torch.cat([columns, activated] if x_first else [activated, columns], -1)
    amax = y.float().abs().amax(-1, keepdim=True)
    want_scale = torch.where(amax == 0, 1.0, amax / 448)
    torch.testing.assert_close(scale, want_scale, rtol=0 if kind.exact else 2.0**-7, atol=0, equal_nan=True)
    want = (y.float() / scale).clamp(-448, 448).to(E4)
    if kind.exact:
        return assert_same_bytes(out, want)
    split = columns.shape[-1] if x_first else activated.shape[-1]
    copied, others = ((out[..., :split], want[..., :split]), (out[..., split:], want[..., split:]))[:: 1 if x_first else -1]
    assert_same_bytes(copied[0].contiguous(), copied[1].contiguous())
    number = ~others[1].float().isnan()
    assert torch.equal(~others[0].float().isnan(), number)
    codes, wanted = (each.contiguous().view(U8).int()[number] for each in others)
    apart = (codes - wanted).abs()
    assert ((apart <= 1) | ((codes & 127) + (wanted & 127) <= 1)).all()
    assert apart.numel() == 0 or (apart != 0).float().mean() < 0.02


def operands(kind: Kind, leading: tuple[int, ...], columns: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """gate and up, slices of one buffer that begins at column ``first``; or pairs."""
    wide = rows((*leading, 2 * columns + 8), kind.dtype)
    if kind.pairs:
        return wide[..., first : first + 2 * columns], None
    return wide[..., first : first + columns], wide[..., columns + first : 2 * columns + first] if kind.inputs == 2 else None


@OF_ALL
@pytest.mark.parametrize("x_first", [True, False])
def test_columns_on_the_cpu(library: ctypes.CDLL, x_first: bool, name: str) -> None:
    kind = KINDS[name]
    for height, copied, columns in SIZES:
        for first in (0, 8, 1):
            gate, up = operands(kind, (height,), columns, first)
            x = rows((height, copied + 16), kind.dtype, seed=7)[:, first : first + copied]
            out, scale = run(library, name, x, gate, up, x_first)
            assert library.launches_of_last_call() == 1
            check(name, x, gate, up, x_first, out, scale)


def test_a_bound_of_the_scale_on_the_cpu(library: ctypes.CDLL) -> None:
    x, gate, bound = rows((5, 24)), rows((5, 64), seed=6), torch.tensor([7.0])
    out, scale = torch.full((5, 88), 0x55, dtype=U8), torch.full((5,), -1.0)
    error = ctypes.create_string_buffer(500)

    def bounded(given: Any) -> int:
        pointers = [ctypes.byref(cuda_on_cpu.Given.of(each)) for each in (x, gate, out, scale)]
        return int(library.bounded(*pointers[:2], given, *pointers[2:], error, 500))

    assert bounded(None) == 1 and "bound: wanted a tensor, which the programs name" in error.value.decode()
    assert bounded(ctypes.byref(cuda_on_cpu.Given.of(bound))) == 0, error.value.decode()
    y = torch.cat((x, plus_abs(gate)), -1).float()
    want = y.abs().amax(-1, keepdim=True).clamp(max=7.0) / 448.0
    assert bool((y.abs().amax(-1) > 7.0).any())
    assert_same_bytes(scale, want.view(-1))
    assert_same_bytes(out.view(E4), (y / want).clamp(-448.0, 448.0).to(E4))


@pytest.mark.parametrize("name", ["gelu_tanh", "gelu_mul"])
@pytest.mark.parametrize("x_first", [True, False])
@pytest.mark.parametrize(("height", "copied", "columns"), [(132, 40, 960), (71, 512, 1024), (41, 264, 3000), (6, 8192, 16384)])
def test_many_rows_read_a_table(library: ctypes.CDLL, height: int, copied: int, columns: int, x_first: bool, name: str) -> None:
    """Four SMs, each with blocks that have several rows, one, or some without any: as few rows, which are computed."""
    gate, up = operands(KINDS[name], (2, height), columns)
    x = rows((2, height, 2, copied // 2), seed=7)
    gate[0, 3, 5], gate[0, 2, 6] = float("inf"), float("nan")
    many = run(library, name, x, gate.contiguous(), None if up is None else up.contiguous(), x_first)
    check(name, x, gate, up, x_first, *many)
    few = (4 * 16384 - 1) // (copied + columns)
    alone = [None if each is None else each[:1, :few].contiguous() for each in (x, gate, up)]
    for one, other in zip(many, run(library, name, *alone, x_first), strict=True):
        assert_same_bytes(one[:1, :few], other)


LAYOUTS: dict[str, Callable[[Callable[..., torch.Tensor]], torch.Tensor]] = {
    "heads_before_positions": lambda make: make(3, 2, 5, 16).transpose(1, 2),
    "heads_after_positions": lambda make: make(3, 5, 2, 16),
    "heads_that_are_no_vectors": lambda make: make(3, 2, 5, 12).transpose(1, 2),
    "heads_of_one_column": lambda make: make(3, 24, 5, 1).transpose(1, 2),
    "one_head": lambda make: make(3, 1, 5, 16).transpose(1, 2),
    "heads_of_a_wider_buffer": lambda make: make(3, 5, 3, 2, 16)[:, :, 1],
    "two_pitches": lambda make: make(3, 9, 32)[:, :5],
    "positions_first": lambda make: make(5, 3, 32).transpose(0, 1),
    "at_an_odd_address": lambda make: make(3, 2, 5, 17).transpose(1, 2)[..., 1:],
    "pitches_that_are_no_vectors": lambda make: make(3, 5, 36)[..., :32],
}


@OF_ALL
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_x_lies(library: ctypes.CDLL, layout: str, name: str) -> None:
    kind = KINDS[name]
    x = LAYOUTS[layout](lambda *shape: rows(shape, kind.dtype, seed=7))
    for columns in (64, 36):
        gate, up = operands(kind, (3, 5), columns)
        out, scale = run(library, name, x, gate.contiguous(), None if up is None else up.contiguous(), True)
        check(name, x, gate, up, True, out, scale)


@OF_ALL
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -7.03])
def test_extremes_on_the_cpu(library: ctypes.CDLL, value: float, name: str) -> None:
    kind = KINDS[name]
    gate, up = operands(kind, (6,), 264)
    x = rows((6, 40), kind.dtype, seed=7)
    gate[1], gate[2, 6], x[1], x[3, 5] = value, value, value, value
    out, scale = run(library, name, x, gate, up, True)
    check(name, x, gate, up, True, out, scale)


@pytest.mark.parametrize("side", ["x", "gate"])
def test_the_largest_value_may_be_on_either_side(library: ctypes.CDLL, side: str) -> None:
    x, gate = rows((3, 40)), rows((3, 64))
    {"x": x, "gate": gate}[side][:, -1] = 999.0
    for x_first in (True, False):
        out, scale = run(library, "alone_bf16", x, gate, None, x_first)
        check("alone_bf16", x, gate, None, x_first, out, scale)
        assert torch.equal(scale, torch.full((3, 1), (999.0 if side == "x" else 1998.0)).bfloat16().float() / 448)


def test_no_rows_are_no_launch(library: ctypes.CDLL) -> None:
    run(library, "alone_bf16", rows((0, 32)), rows((0, 64)), None, True)
    assert library.launches_of_last_call() == 0


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (lambda: rows((4, 64))[:, ::2], "x: wanted rows with unit stride and at most two strides between them, found strides"),
        (lambda: rows((5, 32)), "x: wanted the rows of gate, "),
        (lambda: rows((4, 0)), "x: wanted at least one column"),
        (lambda: rows((4, 32768)), "x, gate: wanted at most 32768 columns in all, found 32832"),
    ],
)
def test_what_the_kernel_does_not_read_is_named(library: ctypes.CDLL, x: Callable[[], torch.Tensor], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run(library, "alone_bf16", x(), rows((4, 64)), None, True)


def test_three_pitches_are_refused(library: ctypes.CDLL) -> None:
    x = rows((2, 3, 9, 32))[:, :, :5].transpose(0, 1)
    with pytest.raises(AssertionError, match="at most two strides between them"):
        run(library, "alone_bf16", x, rows((3, 2, 5, 64)), None, True)


# ---- on a GPU --------------------------------------------------------------------------------------------------------

ON_GPU = [(form, False) for form in FORMS] + [("clamped_swiglu", True)]


def kernels(arch: str) -> list[jit.JitSpec]:
    torchao = (*PROGRAMS["row"], E4)
    keys: list[Any] = [(BF16, *each, "row", *torchao) for each in ON_GPU]
    keys += [(dtype, "gelu_tanh", False, "row", *torchao) for dtype in (FP16, FP32)]
    keys.append((BF16, "gelu_tanh", False, "mx", *PROGRAMS["mx"], E4))
    return [OP.spec_of_key(key, arch) for key in keys]


@pytest.mark.gpu(kernels=kernels)
class TestOnTheGpu:
    def check(self, x: Any, gate: Any, up: Any, form: str, pairs: bool, x_first: bool, granularity: str = "row") -> None:
        out, scale = call(x, gate, up, form, pairs=pairs, x_first=x_first, granularity=granularity)
        given = x, gate, up, form, pairs, x_first, granularity, *PROGRAMS[granularity], E4, []
        want, want_scale = OP.reference(*given)
        assert (scale.view(U8) == want_scale.view(U8)).float().mean() > 0.98
        apart = (out.view(U8).int() - want.view(U8).int()).abs()
        assert (apart != 0).float().mean() < 0.02
        magnitude = (out.view(U8).int() & 127) + (want.view(U8).int() & 127)
        assert granularity == "mx" or bool(((apart <= 1) | (magnitude <= 1)).all())

    @pytest.mark.parametrize(("form", "pairs"), ON_GPU)
    @pytest.mark.parametrize("x_first", [True, False])
    def test_every_width(self, x_first: bool, form: str, pairs: bool) -> None:
        for copied, columns in ((8, 16), (32, 96), (40, 60), (384, 1536), (1152, 4304), (3072, 12288)):
            for height in (37, 700):
                x, both = rows((height, copied), BF16, "cuda"), rows((height, 2 * columns), BF16, "cuda", 6)
                gate, up = (both, None) if pairs else (both[:, :columns], both[:, columns:])
                self.check(x, gate, up if FORMS[form].inputs == 2 else None, form, pairs, x_first)

    @pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_where_x_lies(self, layout: str, dtype: torch.dtype) -> None:
        x = LAYOUTS[layout](lambda *shape: rows(shape, dtype, "cuda", 7))
        for columns in (64, 36):
            self.check(x, rows((3, 5, columns), dtype, "cuda"), None, "gelu_tanh", False, True)

    def test_mxfp8(self) -> None:
        for height in (1, 37, 7168):
            x, gate = rows((height, 1024), BF16, "cuda"), rows((height, 4096), BF16, "cuda", 6)
            self.check(x, gate, None, "gelu_tanh", False, True, "mx")
