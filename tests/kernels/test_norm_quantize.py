"""norm_quantize: its reference against PyTorch's own modules, its arguments' errors, and the kernel on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_ext import jit
from inductor_ext.kernels import norms
from inductor_ext.kernels.norm_quantize.op import OP, WIDE
from inductor_ext.kernels.quantized import TORCHAO_PROGRAM, TORCHAO_SCALE, WORKSPACE_FLOATS
from tests.support import cuda_on_cpu
from tests.support.equal import assert_same_bytes

E4, U8 = torch.float8_e4m3fn, torch.uint8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
F = torch.nn.functional


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kernel: of x's dtype, of weight and bias, of factor and shift."""

    kind: str
    norm: str
    residual: bool = False
    keep: bool = False
    dtype: torch.dtype = BF16
    weight: torch.dtype = BF16
    factor: torch.dtype = BF16

    @property
    def reads(self) -> tuple[str, ...]:
        return norms.operands_of(self.norm.removeprefix(f"{WIDE} "))

    def key(self, *quantisation: Any) -> tuple[Any, ...]:
        weight = self.weight if {"weight", "bias"} & set(self.reads) else None
        factor = self.factor if {"factor", "shift"} & set(self.reads) else None
        return self.dtype, self.residual, weight, factor, self.kind, self.norm, self.keep, *quantisation


#: By the names of tests/support/cuda_on_cpu/norm_quantize.cpp.
KINDS = {
    "layer_bf16": Kind("layer", "mul add cast"),
    "layer_fp16": Kind("layer", "mul add cast", residual=True, keep=True, dtype=FP16, weight=FP32),
    "layer_fp32": Kind("layer", "cast", residual=True, dtype=FP32),
    "layer_wide": Kind("layer", "wide cast mul cast add", residual=True, keep=True, weight=FP32),
    "modulated": Kind("layer", "cast factor+1r cast shift"),
    "modulated_fp32": Kind("layer", "factor+1 shift cast", keep=True, factor=FP32),
    "rms_wide": Kind("rms", "wide cast mul", residual=True),
    "rms_wide_gemma": Kind("rms", "wide mul+1r cast", residual=True, keep=True),
    "rms_kept": Kind("rms", "cast mul", residual=True, keep=True),
    "rms_alone": Kind("rms", "cast", dtype=FP16),
    "rms_biased": Kind("rms", "mul add factor cast", keep=True),
}
PROGRAMS = {"mx": ("rceil", ""), "static": ("", TORCHAO_PROGRAM)}  # torchao's else
OF_ALL = pytest.mark.parametrize("name", KINDS)


def operands(kind: Kind, rows: int, columns: int, device: str = "cpu", samples: int = 1) -> list[torch.Tensor | None]:
    """x, residual, weight, bias, factor and shift; those that the norm does not read are None."""
    made = torch.Generator(device).manual_seed(rows * 31 + columns)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=made)

    vectors = {each: normal(columns).to(kind.weight) for each in ("weight", "bias")}
    modulation = normal(samples, 6 * columns).to(kind.factor).chunk(6, -1)  # rows of a wider buffer, as adaLN has them
    vectors |= {"factor": modulation[1], "shift": modulation[4]}
    given = [vectors[each] if each in kind.reads else None for each in ("weight", "bias", "factor", "shift")]
    x = (normal(rows, columns) * 3 + 1).to(kind.dtype)
    return [x, normal(rows, columns).to(kind.dtype) if kind.residual else None, *given]


def call(kind: Kind, tensors: Any, granularity: str = "row", scales: Any = (), eps: float = 1e-5) -> Any:
    programs = PROGRAMS.get(granularity, (TORCHAO_SCALE, TORCHAO_PROGRAM))
    arguments = (*tensors, eps, kind.kind, kind.norm, kind.keep, granularity, *programs, E4, list(scales))
    return torch.ops.inductor_ext.norm_quantize(*arguments)


# ---- the reference ---------------------------------------------------------------------------------------------------


def _layer_norm(x: Any, w: Any = None, b: Any = None) -> Any:
    return F.layer_norm(x, x.shape[-1:], w, b, 1e-5)


def _rms_norm(x: Any) -> Any:
    return F.rms_norm(x, x.shape[-1:], None, 1e-5)


def _wide(norm: Any, x: Any, r: Any) -> Any:
    return norm(x.float() + r.float())


EAGER: dict[str, Callable[..., Any]] = {
    "layer_bf16": lambda x, r, w, b, f, s: _layer_norm(x, w, b),
    "layer_fp32": lambda x, r, w, b, f, s: _layer_norm(x + r),
    "layer_wide": lambda x, r, w, b, f, s: ((_wide(_layer_norm, x, r).bfloat16() * w).bfloat16() + b).bfloat16(),
    "modulated": lambda x, r, w, b, f, s: _layer_norm(x) * (1 + f) + s,
    "modulated_fp32": lambda x, r, w, b, f, s: (_layer_norm(x.float()) * (1 + f) + s).to(x.dtype),
    "rms_wide_gemma": lambda x, r, w, b, f, s: (_wide(_rms_norm, x, r) * (1 + w)).to(x.dtype),
    "rms_alone": lambda x, r, w, b, f, s: _rms_norm(x),
}


@pytest.mark.parametrize("name", EAGER)
def test_the_reference_is_what_models_write(name: str) -> None:
    kind = dataclasses.replace(KINDS[name], keep=True)
    tensors = operands(kind, 6, 96, samples=1)
    out, scale, total, y = call(kind, tensors)
    wanted = EAGER[name](*tensors)
    torch.testing.assert_close(y, wanted, rtol={BF16: 2.0**-7, FP16: 2.0**-9, FP32: 1e-5}[kind.dtype], atol=1e-6)
    assert kind.dtype is FP32 or (y != wanted).float().mean() < 0.01, "another rounding than eager's"
    again, scale_again = torch.ops.inductor_ext.fp8_quantize(y, "row", TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
    assert_same_bytes(out, again)
    assert_same_bytes(scale, scale_again)
    if kind.residual:
        assert_same_bytes(total, tensors[0] + tensors[1])  # type: ignore[operator]


def test_a_sample_has_its_own_factor_and_shift() -> None:
    kind = dataclasses.replace(KINDS["modulated"], keep=True)
    x, *_, factor, shift = operands(kind, 12, 64, samples=3)
    assert x is not None and factor is not None and shift is not None
    *_, y = call(kind, (x.view(3, 4, 64), None, None, None, factor[:, None], shift[:, None]))
    assert_same_bytes(y, _layer_norm(x.view(3, 4, 64)) * (1 + factor[:, None]) + shift[:, None])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": lambda x: x.double()}, TypeError, "x: wanted bfloat16, float16 or float32"),
        ({"residual": lambda r: r.float()}, ValueError, "residual: wanted torch.bfloat16"),
        ({"residual": lambda _: None, "norm": lambda _: "wide mul add cast"}, ValueError, "norm: wanted a residual for wide"),
        ({"weight": lambda w: w[:3]}, ValueError, "weight: wanted a row of 64 columns, as x has"),
        ({"weight": lambda w: None}, ValueError, "weight: wanted a tensor for 'mul add cast', found None"),
        ({"weight": lambda w: w.double()}, TypeError, "weight: wanted bfloat16, float16 or float32"),
        ({"bias": lambda b: b.float()}, TypeError, "bias: wanted torch.bfloat16, as weight, found torch.float32"),
        ({"factor": lambda _: torch.ones(1, 64)}, ValueError, "factor: wanted None for 'mul add cast', found torch.float32"),
        ({"kind": lambda _: "group"}, ValueError, "kind: wanted one of rms, layer, found 'group'"),
        ({"norm": lambda _: "mul plus"}, ValueError, "norm: wanted cast, mul, .*found 'plus'"),
        ({"x": lambda x: x[:, :0], "weight": lambda w: w[:0], "bias": lambda w: w[:0], "residual": lambda _: None}, ValueError,
         "x: wanted at least one column"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    kind = Kind("layer", "mul add cast", residual=True)
    values: dict[str, Any] = dict(zip(("x", "residual", "weight", "bias", "factor", "shift"), operands(kind, 4, 64)))
    values |= {"kind": "layer", "norm": "mul add cast"}
    values.update({name: make(values[name]) for name, make in change.items()})
    tensors = [values[name] for name in ("x", "residual", "weight", "bias", "factor", "shift")]
    with pytest.raises(error, match=f"norm_quantize: {message}"):
        call(dataclasses.replace(kind, kind=values["kind"], norm=values["norm"]), tensors)


def test_modulations_that_are_not_of_samples() -> None:
    kind = KINDS["modulated"]
    x, *_, factor, shift = operands(kind, 12, 64, samples=5)
    with pytest.raises(ValueError, match="factor: wanted a row for as many of the 12 rows of x each"):
        call(kind, (x, None, None, None, factor, shift))
    with pytest.raises(ValueError, match="shift: wanted as many rows as factor"):
        call(kind, (x, None, None, None, factor[:4], shift[:3]))  # type: ignore[index]


@OF_ALL
@pytest.mark.parametrize("granularity", ["row", "tensor", "mx", "static"])
@pytest.mark.parametrize("shape", [(6, 64), (2, 3, 64), (0, 64)], ids=str)
def test_fakes_agree(shape: Any, granularity: str, name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if shape[0] == 0 and granularity == "tensor":
        pytest.skip("no element has no maximum")
    kind, scales = KINDS[name], [torch.tensor(0.1), torch.tensor(0.2)] if granularity == "static" else []
    x, residual, *rest = operands(kind, 6, 64)
    rows = shape[0]
    both = [None if each is None else (each[:rows] if rows == 0 else each).reshape(shape) for each in (x, residual)]
    real = call(kind, (*both, *rest), granularity, scales)
    with FakeTensorMode() as mode:
        given = [None if each is None else mode.from_tensor(each) for each in (*both, *rest)]
        fake = call(kind, given, granularity, [mode.from_tensor(each) for each in scales])
    for one, two in zip(real, fake, strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert one.numel() == 0 or one.stride() == two.stride()


# ---- the kernel's source on the CPU ----------------------------------------------------------------------------------

#: Rows and columns of every shape of threads, with so few multiprocessors that nine rows are many.
SIZES = ((1, 1024), (5, 8), (9, 128), (10, 100), (9, 264), (3, 1), (9, 1024), (3, 1032), (2, 5000), (9, 1536), (1, 16392))
POWERS = ((1, 1024), (5, 8), (9, 128), (16, 512), (2, 4096))
LAUNCHES = "INDUCTOR_EXT_TENSOR_LAUNCHES"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    made = cuda_on_cpu.compiled("norm_quantize", Path(tmp_path_factory.mktemp("norm_quantize")))
    made.set_device(4, 2, 64 << 10)
    return made


def run(library: ctypes.CDLL, name: str, mode: str, tensors: Any, eps: float, y: Any = None, scale: Any = None) -> Any:
    """out, scale, total and y of the C function, of which no byte is left as it was; and its code."""
    x, kind = tensors[0], KINDS[name]
    rows = x.shape[0]
    out = torch.full(x.shape, 0x55, dtype=U8)
    scale = torch.full((rows,) if mode == "r" else (1,), -1.0) if scale is None else scale
    total, kept = torch.full(x.shape, 7.0, dtype=x.dtype), torch.full(x.shape, 7.0, dtype=x.dtype)
    partial = torch.full((WORKSPACE_FLOATS,), torch.nan) if mode == "t" else None
    error = ctypes.create_string_buffer(500)
    outputs = out, scale, total if kind.residual else None, kept if kind.keep else None
    given = [*tensors, ctypes.c_double(eps), *outputs, y, partial]
    pointers = [ctypes.byref(cuda_on_cpu.Given.of(each)) if isinstance(each, torch.Tensor) else each for each in given]
    code = getattr(library, name)(ord(mode), *pointers, error, 500)
    assert code != 1, error.value.decode()
    return code, out.view(E4), scale, total, kept


def wanted_of(kind: Kind, tensors: Any, eps: float, mode: str, scale: Any = None) -> Any:
    kept = dataclasses.replace(kind, keep=True)
    _, _, total, y = call(kept, tensors, eps=eps)
    if mode != "s":
        amax = y.float().abs().amax(-1) if mode == "r" else y.float().abs().amax().reshape(1)
        scale = torch.where(amax == 0, 1.0, amax / 448)
    return (y.float() / (scale[:, None] if mode == "r" else scale)).clamp(-448, 448).to(E4), scale, total, y


def near(found: torch.Tensor, wanted: torch.Tensor, steps: int = 1, share: float = 0.03) -> None:
    """Apart by at most so many numbers of the dtype, and mostly the same: the means were summed in another order."""
    assert torch.equal(found.float().isnan(), wanted.float().isnan())
    number = ~wanted.float().isnan()
    view = {1: torch.int8, 2: torch.int16, 4: torch.int32}[found.element_size()]
    sign = 1 << (8 * found.element_size() - 1)
    one, two = (each[number].view(view).long() for each in (found, wanted))
    apart = (torch.where(one < 0, -(one + sign), one) - torch.where(two < 0, -(two + sign), two)).abs()
    assert (apart <= steps).all(), f"{int(apart.max())} numbers apart"
    assert apart.numel() == 0 or (apart != 0).float().mean() < share


@OF_ALL
@pytest.mark.parametrize("mode", ["r", "s"])
def test_rows_on_the_cpu(library: ctypes.CDLL, mode: str, name: str) -> None:
    kind = KINDS[name]
    given = torch.tensor([0.02]) if mode == "s" else None
    for rows, columns in SIZES:
        tensors = operands(kind, rows, columns, samples=3 if rows % 3 == 0 else 1)
        for first in (0, 8, 1):  # aligned rows of a wider buffer, and rows that are not
            wide = torch.zeros(rows, 2 * columns + 8, dtype=kind.dtype)
            tensors[0] = wide[:, first : first + columns].copy_(tensors[0])
            code, out, scale, total, kept = run(library, name, mode, tensors, 1e-5, scale=given)
            assert code == 0 and library.launches_of_last_call() == 1
            want, want_scale, want_total, y = wanted_of(kind, tensors, 1e-5, mode, given)
            if kind.residual:
                assert_same_bytes(total, want_total)
            else:
                assert_same_bytes(total, torch.full_like(total, 7.0))
            torch.testing.assert_close(scale, want_scale, rtol=2.0**-7, atol=0)
            near(out, want)
            if not kind.keep:
                assert_same_bytes(kept, torch.full_like(kept, 7.0))
            elif kind.dtype is not FP32:
                torch.testing.assert_close(kept, y, rtol=2.0**-7 if kind.dtype is BF16 else 2.0**-9, atol=2.0**-9)
                assert (kept != y).float().mean() < 0.02 or columns < 64


def exact(kind: Kind, rows: int, columns: int) -> list[torch.Tensor | None]:
    """Rows of which half the columns are two more than the mean and half two less: with eps 0 the factor is 0.5."""
    tensors = operands(kind, rows, columns)
    made = torch.Generator().manual_seed(columns)
    signs = torch.tensor([1, -1]).repeat(columns // 2)
    x = torch.stack([2 * signs[torch.randperm(columns, generator=made)] for _ in range(rows)])
    if kind.kind == "layer":
        x = x + torch.randint(-9, 9, (rows, 1), generator=made)
    if kind.residual:
        addend = torch.randint(-3, 4, (rows, columns), generator=made)
        tensors[1], x = addend.to(kind.dtype), x - addend
    tensors[0] = x.to(kind.dtype)
    return tensors


@OF_ALL
def test_given_the_means_every_byte_is_eagers(library: ctypes.CDLL, name: str) -> None:
    kind = KINDS[name]
    for rows, columns in POWERS:
        tensors = exact(kind, rows, columns)
        _, out, scale, total, kept = run(library, name, "r", tensors, 0.0)
        want, want_scale, want_total, y = wanted_of(kind, tensors, 0.0, "r")
        assert_same_bytes(out, want, f"{rows} x {columns}")
        assert_same_bytes(scale, want_scale)
        if kind.residual:
            assert_same_bytes(total, want_total)
        if kind.keep:
            assert_same_bytes(kept, y)


#: More rows than blocks of one multiprocessor hold at once, in blocks of four and of one; and rows that are not all vectors.
MANY = ((27, 1024), (24, 2048), (24, 1536))


@OF_ALL
def test_more_rows_than_the_gpu_holds_at_once(library: ctypes.CDLL, name: str) -> None:
    """A block then takes several rows, of one sample or of the next, and what it keeps must be that row's."""
    kind = KINDS[name]
    library.set_device(1, 2, 64 << 10)
    try:
        for rows, columns in MANY:
            tensors = operands(kind, rows, columns, samples=3)
            code, out, scale, total, kept = run(library, name, "r", tensors, 1e-5)
            assert code == 0 and library.launches_of_last_call() == 1
            want, want_scale, want_total, y = wanted_of(kind, tensors, 1e-5, "r")
            torch.testing.assert_close(scale, want_scale, rtol=2.0**-7, atol=0)
            near(out, want)
            if kind.residual:
                assert_same_bytes(total, want_total)
            if kind.keep and kind.dtype is not FP32:
                torch.testing.assert_close(kept, y, rtol=2.0**-7 if kind.dtype is BF16 else 2.0**-9, atol=2.0**-9)
            exactly = exact(kind, rows, columns)
            _, out, scale, *_ = run(library, name, "r", exactly, 0.0)
            if columns & (columns - 1) == 0:
                want, want_scale, *_ = wanted_of(kind, exactly, 0.0, "r")
                assert_same_bytes(out, want, f"{rows} x {columns}")
                assert_same_bytes(scale, want_scale)
    finally:
        library.set_device(4, 2, 64 << 10)


@OF_ALL
@pytest.mark.parametrize(("rows", "columns"), [(1, 1024), (5, 8), (37, 128), (30, 96), (40, 256), (3, 1032), (4, 4096)])
def test_one_scale_for_all(monkeypatch: Any, library: ctypes.CDLL, rows: int, columns: int, name: str) -> None:
    kind, tensors = KINDS[name], operands(KINDS[name], rows, columns)
    monkeypatch.setenv(LAUNCHES, "1")
    code, *one = run(library, name, "t", tensors, 1e-5)
    assert (code, library.launches_of_last_call()) == (0, 1)
    monkeypatch.setenv(LAUNCHES, "2")
    code, *_ = run(library, name, "t", tensors, 1e-5)
    assert (code, library.launches_of_last_call()) == (2, 0)
    code, *two = run(library, name, "t", tensors, 1e-5, y=torch.empty(rows, columns, dtype=kind.dtype))
    assert (code, library.launches_of_last_call()) == (0, 2)
    for a, b in zip(one, two, strict=True):
        assert_same_bytes(a, b)
    want, want_scale, want_total, _ = wanted_of(kind, tensors, 1e-5, "t")
    torch.testing.assert_close(one[1], want_scale, rtol=2.0**-7, atol=0)
    near(one[0], want, share=0.2)  # another scale moves more of them
    if kind.residual:
        assert_same_bytes(one[2], want_total)


@OF_ALL
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-40, 6e4])
def test_extremes_on_the_cpu(library: ctypes.CDLL, value: float, name: str) -> None:
    kind = KINDS[name]
    tensors = operands(kind, 6, 264)
    x, residual = tensors[:2]
    assert x is not None
    x[1], x[2, 7] = value, value
    if residual is not None:
        residual[1:3] = 0.0
    _, out, scale, total, _ = run(library, name, "r", tensors, 1e-5)
    want, want_scale, want_total, _ = wanted_of(kind, tensors, 1e-5, "r")
    if residual is not None:
        assert_same_bytes(total, want_total)
    torch.testing.assert_close(scale, want_scale, rtol=2.0**-7, atol=1e-9, equal_nan=True)
    near(out, want, steps=2, share=0.1)


@OF_ALL
def test_rows_that_lie_beside_a_launch_add_nothing_to_its_maximum(library: ctypes.CDLL, name: str) -> None:
    """With eps 0 a row of zeros, as threads without a row have, is zero times infinity."""
    tensors = exact(KINDS[name], 3, 128)
    for mode in ("r", "t"):
        _, _, scale, *_ = run(library, name, mode, tensors, 0.0)
        assert torch.isfinite(scale).all()


def test_no_rows_are_no_launch(library: ctypes.CDLL) -> None:
    tensors = operands(KINDS["layer_bf16"], 4, 64)
    tensors[0] = tensors[0][:0]  # type: ignore[index]
    run(library, "layer_bf16", "r", tensors, 1e-5)
    assert library.launches_of_last_call() == 0


@pytest.mark.parametrize(("name", "index", "message"), [("layer_bf16", 2, "weight: wanted a tensor, found None"),
                                                        ("modulated", 5, "shift: wanted a tensor, found None"),
                                                        ("rms_wide", 1, "residual: wanted a tensor, found None")])  # fmt: skip
def test_what_is_missing_is_named(library: ctypes.CDLL, name: str, index: int, message: str) -> None:
    tensors = operands(KINDS[name], 4, 64)
    tensors[index] = None
    with pytest.raises(AssertionError, match=message):
        run(library, name, "r", tensors, 1e-5)


def test_types_are_those_that_the_cpu_runs() -> None:
    source = (cuda_on_cpu.HERE / "norm_quantize.cpp").read_text()
    short = {"__nv_bfloat16": "B", "__half": "H", "float": "F"}
    for name, kind in KINDS.items():
        (exports,) = (OP.spec_of_key(kind.key("row", TORCHAO_SCALE, TORCHAO_PROGRAM, E4), "sm_90a").exports[0][1],)
        row = exports.partition("NormRow<")[2].partition(">, true, __nv_fp8")[0].replace("inductor_ext::", "")
        for long, letter in short.items():
            row = row.replace(long, letter)
        assert f"VARIANT({name}, NormRow<{row}>)" in source, row


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def kernels(arch: str) -> list[jit.JitSpec]:
    torchao = (TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
    rest = {"row": torchao, "tensor": torchao, "mx": ("rceil", "", E4)}
    keys = [kind.key(each, *programs) for kind in KINDS.values() for each, programs in rest.items()]
    keys += [kind.key("static", "", TORCHAO_PROGRAM, E4, (2, FP32)) for kind in KINDS.values()]
    return [OP.spec_of_key(key, arch) for key in keys]


@pytest.mark.gpu(kernels=kernels)
@OF_ALL
@pytest.mark.parametrize("granularity", ["row", "tensor", "mx", "static"])
def test_on_the_gpu(granularity: str, name: str) -> None:
    kind = KINDS[name]
    scales = [torch.tensor(each, device="cuda") for each in (0.02, 0.05)] if granularity == "static" else []
    for rows in (1, 36, 700, 7168):
        for columns in (64, 96, 128, 1024, 1152, 3072, 4096, 8192, 16384):
            tensors = operands(kind, rows, columns, "cuda", samples=4 if rows % 4 == 0 else 1)
            out, scale, total, y = call(kind, tensors, granularity, scales)
            programs = PROGRAMS.get(granularity, (TORCHAO_SCALE, TORCHAO_PROGRAM))
            rest = (1e-5, kind.kind, kind.norm, kind.keep, granularity, *programs, E4, scales)
            want, want_scale, want_total, want_y = OP.reference(*tensors, *rest)
            assert_same_bytes(total, want_total)
            if granularity in ("row", "static"):
                near(out, want)
            elif granularity == "tensor":
                near(out, want, share=1.0)
            else:
                assert (scale.view(U8) == want_scale.view(U8)).float().mean() > 0.99
            torch.testing.assert_close(y, want_y, rtol=2.0**-6, atol=2.0**-7)
