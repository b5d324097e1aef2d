"""act_quantize: its reference against model libraries' lines, its arguments' errors, and the kernel on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_ext import jit
from inductor_ext.kernels.act_quantize.op import FORMS, OP
from inductor_ext.kernels.quantized import TORCHAO_PROGRAM, TORCHAO_SCALE, WORKSPACE_FLOATS
from tests.support import cuda_on_cpu
from tests.support.activations import Kind, in_fp32, plus_abs
from tests.support.equal import assert_same_bytes

E4, U8 = torch.float8_e4m3fn, torch.uint8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
F = torch.nn.functional
PROGRAMS = {"mx": ("rceil", ""), "static": ("", TORCHAO_PROGRAM)}  # torchao's else


def call(gate: Any, up: Any, form: str, pairs: bool = False, granularity: str = "row", scales: Any = ()) -> Any:
    programs = PROGRAMS.get(granularity, (TORCHAO_SCALE, TORCHAO_PROGRAM))
    return torch.ops.inductor_ext.act_quantize(gate, up, form, pairs, granularity, *programs, E4, list(scales))


def rows(shape: Any, dtype: torch.dtype = BF16, device: str = "cpu") -> torch.Tensor:
    return (torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(5)) * 4).to(dtype)


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "name"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("quick_gelu",) * 2, ("relu_squared", "relu2")],
)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_the_reference_is_the_models_activation(dtype: torch.dtype, form: str, name: str) -> None:
    activation = pytest.importorskip("transformers.activations").ACT2FN[name]
    x, up = rows((5, 96), dtype), rows((5, 96), dtype) * 2
    for y, given in ((activation(x), None), (activation(x) * up, up)):
        out, scale = call(x, given, form if given is None else f"{form} mul")
        want, want_scale = torch.ops.inductor_ext.fp8_quantize(y, "row", TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
        assert_same_bytes(out, want)
        assert_same_bytes(scale, want_scale)


def test_the_reference_is_that_of_gpt_oss() -> None:
    experts = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss").GptOssExperts
    both = rows((5, 192))
    both[0, :4] = torch.tensor([9.0, -9.0, -9.0, 9.0])
    made = object.__new__(experts)
    torch.nn.Module.__init__(made)
    made.alpha, made.limit = 1.702, 7.0
    if not hasattr(made, "_apply_gate"):
        pytest.skip("transformers has these lines elsewhere")
    y = made._apply_gate(both)
    want, want_scale = torch.ops.inductor_ext.fp8_quantize(y, "row", TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
    for out, scale in (call(both, None, "clamped_swiglu", True), call(both[:, ::2], both[:, 1::2], "clamped_swiglu")):
        assert_same_bytes(out, want)
        assert_same_bytes(scale, want_scale)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": lambda x: x.double()}, TypeError, "gate: wanted bfloat16, float16 or float32"),
        ({"up": lambda _: None}, ValueError, "up: wanted a tensor for 'fp32 silu mul', found None"),
        ({"up": lambda x: x[:1]}, ValueError, r"up: wanted torch.bfloat16 of shape \(4, 64\), as gate"),
        ({"form": lambda _: "gelu"}, ValueError, "up: wanted None for 'gelu', found a tensor"),
        ({"form": lambda _: "tanh"}, ValueError, "form: wanted one of silu, "),
        ({"pairs": lambda _: True}, ValueError, "up: wanted None for 'fp32 silu mul', found a tensor"),
        ({"pairs": lambda _: True, "form": lambda _: "gelu"}, ValueError, "pairs: wanted a form of gate and up, found 'gelu'"),
        ({"gate": lambda x: x[:, :63], "pairs": lambda _: True}, ValueError, "gate: wanted pairs of columns"),
        ({"gate": lambda x: x[:, :0], "up": lambda x: x[:, :0]}, ValueError, "gate: wanted at least one column"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    values: dict[str, Any] = {"gate": rows((4, 64)), "up": rows((4, 64)), "form": "fp32 silu mul", "pairs": False}
    values.update({name: make(values[name]) for name, make in change.items()})
    with pytest.raises(error, match=f"act_quantize: {message}"):
        call(**values)


@pytest.mark.parametrize("granularity", ["row", "tensor", "mx", "static"])
@pytest.mark.parametrize(("form", "pairs"), [("gelu", False), ("fp32 silu mul", False), ("clamped_swiglu", True)])
@pytest.mark.parametrize("shape", [(6, 64), (2, 3, 64), (0, 64)], ids=str)
def test_fakes_agree(shape: Any, form: str, pairs: bool, granularity: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if shape[0] == 0 and granularity == "tensor":
        pytest.skip("no element has no maximum")
    given = [rows(shape), rows(shape) if FORMS[form].inputs == 2 and not pairs else None]
    scales = [torch.tensor(0.1), torch.tensor(0.2)] if granularity == "static" else []
    real = call(*given, form, pairs, granularity, scales)
    with FakeTensorMode() as mode:
        fakes = [None if each is None else mode.from_tensor(each) for each in given]
        fake = call(*fakes, form, pairs, granularity, [mode.from_tensor(each) for each in scales])
    for one, two in zip(real, fake, strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert one.numel() == 0 or one.stride() == two.stride()


# ---- the kernel's source on the CPU ----------------------------------------------------------------------------------


#: Functions of tests/support/cuda_on_cpu/act_quantize.cpp.
KINDS = {
    "alone_bf16": Kind(plus_abs, 1),
    "alone_fp32": Kind(plus_abs, 1, FP32),
    "gelu": Kind(FORMS["gelu"].fn, 1, exact=False),
    "gelu_tanh": Kind(FORMS["gelu_tanh"].fn, 1, FP16, exact=False),
    "gelu_mul": Kind(FORMS["gelu mul"].fn, 2, exact=False),
    "quick_gelu": Kind(FORMS["quick_gelu"].fn, 1, exact=False),
    "quick_gelu_fp16": Kind(FORMS["quick_gelu"].fn, 1, FP16, exact=False),
    "relu_squared": Kind(FORMS["relu_squared"].fn, 1),
    "relu_squared_mul": Kind(FORMS["relu_squared mul"].fn, 2, FP16),
    "fp32_mul": Kind(in_fp32, 2),
    "fp32_silu_mul": Kind(FORMS["fp32 silu mul"].fn, 2, exact=False),
    "fp32_mul_pairs": Kind(in_fp32, 2, pairs=True),
    "pairs_fp32": Kind(lambda gate, up: plus_abs(gate) * up, 2, FP32, pairs=True),
    "clamped": Kind(FORMS["clamped_swiglu"].fn, 2, exact=False),
    "clamped_pairs": Kind(FORMS["clamped_swiglu"].fn, 2, pairs=True, exact=False),
    "clamped_fp16": Kind(FORMS["clamped_swiglu"].fn, 2, FP16, exact=False),
}
OF_ALL = pytest.mark.parametrize("name", KINDS)
SIZES = ((1, 1024), (5, 8), (9, 128), (10, 100), (9, 264), (3, 1), (9, 1024), (3, 1032), (2, 5000), (1, 16392))
LAUNCHES = "INDUCTOR_EXT_TENSOR_LAUNCHES"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    made = cuda_on_cpu.compiled("act_quantize", Path(tmp_path_factory.mktemp("act_quantize")))
    made.set_device(4, 2, 64 << 10)
    return made


def operands(kind: Kind, height: int, columns: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """gate and up, slices of one buffer that begins at column ``first``; or pairs."""
    wide = rows((height, 2 * columns + 8), kind.dtype)
    if kind.pairs:
        return wide[:, first : first + 2 * columns], None
    return wide[:, first : first + columns], wide[:, columns + first : 2 * columns + first] if kind.inputs == 2 else None


def run(library: ctypes.CDLL, name: str, mode: str, gate: Any, up: Any, y: Any = None, scale: Any = None) -> Any:
    height, columns = gate.shape[0], gate.shape[1] // (2 if KINDS[name].pairs else 1)
    out = torch.full((height, columns), 0x55, dtype=U8)
    scale = torch.full((height,) if mode == "r" else (1,), -1.0) if scale is None else scale
    partial = torch.full((WORKSPACE_FLOATS,), torch.nan) if mode == "t" else None
    error = ctypes.create_string_buffer(500)
    given = [gate, up, out, scale, y, partial]
    pointers = [ctypes.byref(cuda_on_cpu.Given.of(each)) if isinstance(each, torch.Tensor) else each for each in given]
    code = getattr(library, name)(ord(mode), *pointers, error, 500)
    assert code != 1, error.value.decode()
    return code, out.view(E4), scale


def check(kind: Kind, mode: str, gate: Any, up: Any, out: torch.Tensor, scale: torch.Tensor, where: str) -> None:
    """Every byte where nothing is approximated, else within one FP8 step and mostly the same."""
    inputs = (gate[:, ::2], gate[:, 1::2]) if kind.pairs else (gate,) if up is None else (gate, up)
    y = kind.fn(*inputs)
    if mode != "s":
        amax = y.float().abs().amax(-1) if mode == "r" else y.float().abs().amax().reshape(1)
        want_scale = torch.where(amax == 0, 1.0, amax / 448)
        if kind.exact:
            assert_same_bytes(scale, want_scale, where)
        torch.testing.assert_close(scale, want_scale, rtol=2.0**-7, atol=0, equal_nan=True)
    want = (y.float() / (scale[:, None] if mode == "r" else scale)).clamp(-448, 448).to(E4)
    if kind.exact:
        return assert_same_bytes(out, want, where)
    number = ~want.float().isnan()
    assert torch.equal(~out.float().isnan(), number)
    codes, wanted = out.view(U8).int()[number], want.view(U8).int()[number]
    apart = (codes - wanted).abs()
    assert ((apart <= 1) | ((codes & 127) + (wanted & 127) <= 1)).all(), where
    assert apart.numel() == 0 or (apart != 0).float().mean() < 0.02, where


@OF_ALL
@pytest.mark.parametrize("mode", ["r", "s"])
def test_rows_on_the_cpu(library: ctypes.CDLL, mode: str, name: str) -> None:
    kind, given = KINDS[name], torch.tensor([0.07]) if mode == "s" else None
    for height, columns in SIZES:
        for first in (0, 8, 1):
            gate, up = operands(kind, height, columns, first)
            code, out, scale = run(library, name, mode, gate, up, scale=given)
            assert code == 0 and library.launches_of_last_call() == 1
            check(kind, mode, gate, up, out, scale, f"{height} x {columns} from {first}")


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick_gelu", "gelu_mul", "clamped"])
def test_a_table_gives_every_value_to_the_last_bit(library: ctypes.CDLL, name: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    for given in (every, every[torch.randperm(2**16, generator=torch.Generator().manual_seed(1))]):
        read, computed = torch.empty_like(given), torch.empty_like(given)
        error = ctypes.create_string_buffer(500)
        pointers = (ctypes.c_void_p(each.data_ptr()) for each in (given, read, computed))
        assert getattr(library, f"table_of_{name}")(*pointers, error, 500) == 0, error.value.decode()
        assert_same_bytes(read, computed)


@pytest.mark.parametrize("name", ["gelu", "gelu_mul", "quick_gelu", "clamped", "clamped_pairs"])
@pytest.mark.parametrize(("height", "columns"), [(132, 1000), (70, 1024), (71, 3000), (9, 16392), (5, 32768)])
def test_many_rows_read_a_table(library: ctypes.CDLL, height: int, columns: int, name: str) -> None:
    """Four SMs, each with blocks that have several rows, one, or some without any."""
    gate, up = operands(KINDS[name], height, columns)
    gate[3, 5], gate[2, 6] = float("inf"), float("nan")
    _, *many = run(library, name, "r", gate, up)
    check(KINDS[name], "r", gate, up, *many, f"{height} x {columns}")
    fewer = (4 * 16384 - 1) // columns
    _, *few = run(library, name, "r", gate[:fewer], None if up is None else up[:fewer])  # which are computed
    for one, other in zip(many, few, strict=True):
        assert_same_bytes(one[:fewer], other)


@OF_ALL
@pytest.mark.parametrize(("height", "columns"), [(1, 8), (1, 3072), (7, 24), (61, 1000), (3, 16384)])
def test_one_scale_for_all(monkeypatch: Any, library: ctypes.CDLL, height: int, columns: int, name: str) -> None:
    kind = KINDS[name]
    gate, up = operands(kind, height, columns)
    monkeypatch.setenv(LAUNCHES, "1")
    code, *one = run(library, name, "t", gate, up)
    assert (code, library.launches_of_last_call()) == (0, 1)
    monkeypatch.setenv(LAUNCHES, "2")
    code, *_ = run(library, name, "t", gate, up)
    assert (code, library.launches_of_last_call()) == (2, 0)
    code, *two = run(library, name, "t", gate, up, y=torch.empty(height, columns, dtype=kind.dtype))
    assert (code, library.launches_of_last_call()) == (0, 2)
    for a, b in zip(one, two, strict=True):
        assert_same_bytes(a, b)
    check(kind, "t", gate, up, *one, f"{height} x {columns}")


@OF_ALL
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 7.0, -7.03])
def test_extremes_on_the_cpu(library: ctypes.CDLL, value: float, name: str) -> None:
    kind = KINDS[name]
    gate, up = operands(kind, 6, 264)
    gate[1], gate[2, 6] = value, value
    if up is not None:
        up[3, 5] = value
    _, out, scale = run(library, name, "r", gate, up)
    check(kind, "r", gate, up, out, scale, str(value))


def test_no_rows_are_no_launch(library: ctypes.CDLL) -> None:
    run(library, "gelu", "r", rows((0, 64)), None)
    assert library.launches_of_last_call() == 0


def test_what_is_missing_is_named(library: ctypes.CDLL) -> None:
    with pytest.raises(AssertionError, match="up: wanted a tensor, found None"):
        run(library, "fp32_mul", "r", rows((4, 64)), None)
    with pytest.raises(AssertionError, match="gate: wanted pairs of columns"):
        run(library, "clamped_pairs", "r", rows((4, 63)), None)


# ---- on a GPU --------------------------------------------------------------------------------------------------------

ON_GPU = [(form, False) for form in FORMS] + [(form, True) for form in ("silu mul", "fp32 silu mul", "clamped_swiglu")]


def kernels(arch: str) -> list[jit.JitSpec]:
    torchao = (TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
    keys: list[Any] = [(BF16, *each, "row", *torchao) for each in ON_GPU]
    keys += [(dtype, form, False, "row", *torchao) for dtype in (FP16, FP32) for form in FORMS]
    for each in ON_GPU[:2] + ON_GPU[-1:]:
        keys += [(BF16, *each, "tensor", *torchao), (BF16, *each, "mx", "rceil", "", E4)]
        keys += [(BF16, *each, "static", "", TORCHAO_PROGRAM, E4, (2, FP32))]
    every = "quick_gelu", "fp32 silu mul", "clamped_swiglu"
    keys += [(dtype, form, False, "row", "f32", TORCHAO_PROGRAM, E4) for dtype in (BF16, FP16) for form in every]
    keys += [(BF16, form, False, "row", "f32", TORCHAO_PROGRAM, E4) for form in ("gelu", "gelu_tanh", "gelu mul")]
    return [OP.spec_of_key(key, arch) for key in keys]


@pytest.mark.gpu(kernels=kernels)
class TestOnTheGpu:
    def check(self, gate: Any, up: Any, form: str, pairs: bool, granularity: str = "row") -> None:
        scales = [torch.tensor(each, device="cuda") for each in (0.02, 0.05)] if granularity == "static" else []
        programs = PROGRAMS.get(granularity, (TORCHAO_SCALE, TORCHAO_PROGRAM))
        out, scale = call(gate, up, form, pairs, granularity, scales)
        want, want_scale = OP.reference(gate, up, form, pairs, granularity, *programs, E4, scales)
        assert (scale.view(U8) == want_scale.view(U8)).float().mean() > 0.98
        codes, wanted = out.view(U8).int(), want.view(U8).int()
        apart = (codes - wanted).abs()
        assert (apart != 0).float().mean() < 0.02
        assert granularity == "mx" or bool(((apart <= 1) | ((codes & 127) + (wanted & 127) <= 1)).all())

    @pytest.mark.parametrize(("form", "pairs"), ON_GPU)
    @pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
    def test_every_width(self, dtype: torch.dtype, form: str, pairs: bool) -> None:
        if pairs and dtype is not BF16:
            pytest.skip("bf16 shows it")
        for columns in (8, 64, 100, 128, 520, 1024, 3072, 4096, 14336):
            for height in (37, 700):
                both = rows((height, 2 * columns), dtype, "cuda")
                gate, up = (both, None) if pairs else (both[:, :columns], both[:, columns:])
                self.check(gate, up if FORMS[form].inputs == 2 else None, form, pairs)

    @pytest.mark.parametrize("form", ["quick_gelu", "fp32 silu mul", "clamped_swiglu"])
    @pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
    def test_every_16_bit_value(self, dtype: torch.dtype, form: str) -> None:
        """A scale that is the row's maximum shows |y| as it is, where FP8 would hide the last bits."""
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").to(torch.int16).view(dtype)
        gate = every.view(-1, 1).repeat(1, 8)
        for factor in (1.0, -0.9375, 5.5) if FORMS[form].inputs == 2 else (None,):
            up = None if factor is None else torch.full_like(gate, factor)
            _, scale = torch.ops.inductor_ext.act_quantize(gate, up, form, False, "row", "f32", TORCHAO_PROGRAM, E4, [])
            wanted = FORMS[form].fn(gate, *(() if up is None else (up,)))[:, :1].abs().float()
            assert bool(((scale == wanted) | (scale.isnan() & wanted.isnan())).all())

    @pytest.mark.parametrize("form", ["gelu", "gelu_tanh", "quick_gelu", "gelu mul", "clamped_swiglu"])
    def test_every_value_off_the_table(self, form: str) -> None:
        """Rows of 8 columns are computed, as many of 1024 are not. The scale shows |y|, and FP8 its sign."""
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").to(torch.int16).view(BF16).view(-1, 1)
        made = []
        for columns in (8, 1024):
            gate = every.repeat(1, columns)
            up = torch.full_like(gate, 0.9375) if FORMS[form].inputs == 2 else None
            made.append(torch.ops.inductor_ext.act_quantize(gate, up, form, False, "row", "f32", TORCHAO_PROGRAM, E4, []))
        for one, other in zip(*made, strict=True):
            assert_same_bytes(one.view(2**16, -1)[:, 0], other.view(2**16, -1)[:, 0])

    @pytest.mark.parametrize("granularity", ["tensor", "mx", "static"])
    @pytest.mark.parametrize(("form", "pairs"), ON_GPU[:2] + ON_GPU[-1:])
    def test_every_scale(self, form: str, pairs: bool, granularity: str) -> None:
        for columns, height in ((64, 1), (1024, 37), (3072, 7168)):
            both = rows((height, 2 * columns), BF16, "cuda")
            self.check(both if pairs else both[:, :columns], None, form, pairs, granularity)
