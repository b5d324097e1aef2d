"""Static scales of rms_norm_quantize and act_mul_quantize: references, errors, and the kernels on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_ext import jit
from inductor_ext.kernels import static_scale
from inductor_ext.kernels.act_mul_quantize.op import ACTIVATIONS, TORCHAO_PROGRAM
from inductor_ext.kernels.act_mul_quantize.op import OP as ACT_MUL
from inductor_ext.kernels.rms_norm_quantize.op import NORMS, normalise
from inductor_ext.kernels.rms_norm_quantize.op import OP as RMS_NORM
from tests.support import cuda_on_cpu
from tests.support.equal import assert_same_bytes

E4, E5, U8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}

Recipe = tuple[str, str, torch.dtype]  # scale program, program, FP8
TORCHAO: Recipe = ("", TORCHAO_PROGRAM, E4)
RECIPROCAL: Recipe = ("recip", "mul:scale", E5)  # not clamped: what is too large becomes infinite
NUMBER: Recipe = ("", "f32 mul:37.5", E4)


def norm(
    x: Any, residual: Any, weight: Any, scales: Any, recipe: Recipe = TORCHAO, kind: str = "cast mul", eps: float = 1e-6
) -> Any:
    scale_program, program, dtype = recipe
    call = torch.ops.inductor_ext.rms_norm_quantize
    return call(x, residual, weight, eps, kind, "static", scale_program, program, dtype, scales)


def act_mul(gate: Any, up: Any, scales: Any, recipe: Recipe = TORCHAO, act: str = "silu") -> Any:
    scale_program, program, dtype = recipe
    return torch.ops.inductor_ext.act_mul_quantize(gate, up, act, "static", scale_program, program, dtype, scales)


def numbers(count: int, dtype: torch.dtype = FP32, device: str = "cpu") -> list[torch.Tensor]:
    """Scales of one element each, in all the shapes that such a tensor has."""
    shapes = ((), (1,), (1, 1), (1, 1, 1))
    return [torch.full(shapes[i], 0.004 * 3**i, dtype=dtype, device=device) for i in range(count)]


def rows(shape: Any, dtype: torch.dtype = BF16, device: str = "cpu") -> list[torch.Tensor]:
    made = torch.Generator(device).manual_seed(7)
    return [(torch.randn(shape, device=device, generator=made) * 3).to(dtype) for _ in range(2)]


def weight_of(columns: int, dtype: torch.dtype = BF16, device: str = "cpu") -> torch.Tensor:
    return torch.linspace(0.3, 2, columns, device=device).to(dtype)


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within one FP8 step, and mostly the same: the mean was summed in another order."""
    number = ~wanted.float().isnan()
    assert torch.equal(~found.float().isnan(), number)
    codes, want = found.view(U8).int()[number], wanted.view(U8).int()[number]
    apart = (codes - want).abs()
    assert ((apart <= 1) | ((codes & 127) + (want & 127) <= 1)).all(), "further from eager than one FP8 step"
    assert (apart != 0).float().mean() < 0.05


# ---- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("residual", [True, False])
def test_the_norm_is_quantised_as_torchao_does(residual: bool, count: int) -> None:
    x, other = rows((5, 7, 96))
    weight, scales = weight_of(96), numbers(count)
    out, scale, total = norm(x, other if residual else None, weight, scales)
    summed = x + other if residual else x
    y = normalise(summed, weight, 1e-6, "cast mul")
    wanted = [(y.float() / each.reshape(1, 1, 1)).clamp(-448.0, 448.0).to(E4) for each in scales]
    assert out.shape == ((5, 7, 96) if count == 1 else (count, 5, 7, 96)) and scale.shape == (0,)
    for one, two in zip(out.view(count, 5, 7, 96), wanted, strict=True):
        assert_same_bytes(one, two)
    assert_same_bytes(total, summed if residual else x.new_empty(0))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_reciprocal_is_rounded_as_the_graph_would(act: str) -> None:
    """bf16 all along: x * (1 / s), each step rounded."""
    gate, up = rows((6, 80))
    up = up * 50
    (scale,) = numbers(1, BF16)
    out, _ = act_mul(gate, up, [scale], RECIPROCAL, act)
    assert_same_bytes(out, (ACTIVATIONS[act](gate) * up * scale.reciprocal()).to(E5))
    assert out.float().isinf().any(), "the scale was to make some overflow"


def test_a_number_needs_no_scale() -> None:
    gate, up = rows((6, 80))
    out, scale = act_mul(gate, up, [], NUMBER)
    assert_same_bytes(out, ((torch.nn.functional.silu(gate) * up).float() * 37.5).to(E4))
    assert scale.shape == (0,)


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("shape", [(0, 64), (3, 64), (2, 3, 64), (64,)], ids=str)
def test_fakes_agree(shape: Any, count: int) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    recipe = TORCHAO if count else NUMBER
    given = [*rows(shape), weight_of(64), *numbers(count)]

    def both(x: Any, other: Any, weight: Any, *scales: Any) -> Any:
        return *norm(x, other, weight, list(scales), recipe), *act_mul(x, other, list(scales), recipe)

    real = both(*given)
    with FakeTensorMode() as mode:
        fake = both(*map(mode.from_tensor, given))
    for one, two in zip(real, fake, strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert one.numel() == 0 or one.stride() == two.stride()


def test_out_overloads_write_what_the_functions_return() -> None:
    x, other = rows((3, 64))
    scales = numbers(3)
    wanted = norm(x, other, weight_of(64), scales)
    outs = [torch.empty_like(each) for each in wanted]
    arguments = (x, other, weight_of(64), 1e-6, "cast mul", "static", *TORCHAO, scales)
    torch.ops.inductor_ext.rms_norm_quantize.out(*arguments, **{f"out{i}": out for i, out in enumerate(outs)})
    for one, two in zip(outs, wanted, strict=True):
        assert_same_bytes(one, two)


@pytest.mark.parametrize(
    ("scales", "recipe", "error", "message"),
    [
        (numbers(4) + numbers(1), TORCHAO, ValueError, "scales: wanted at most 4, found 5"),
        ([torch.ones(2)], TORCHAO, ValueError, r"scales: wanted one element each, found shape \(2,\)"),
        ([torch.tensor(2)], TORCHAO, TypeError, "scales: wanted bfloat16, float16 or float32, found torch.int64"),
        (numbers(1) + numbers(1, BF16), TORCHAO, TypeError, "wanted one dtype, found torch.float32 and torch.bfloat16"),
        ([torch.ones((), device="meta")], TORCHAO, ValueError, "scales: wanted tensors on cpu, found one on meta"),
        ([], TORCHAO, ValueError, "scales: wanted one for 'f32 div:scale max:-448.0 min:448.0' and '', found none"),
        ([], ("recip", "f32 mul:2.0", E4), ValueError, "scales: wanted one for 'f32 mul:2.0' and 'recip', found none"),
        (numbers(1), ("recip", "f32 mul:s0", E4), ValueError, "names s0, but 0 operands were given"),
        (numbers(1), ("mul:scale", "f32 mul:scale", E4), ValueError, "names a dynamic scale"),
    ],
)
def test_bad_scales(scales: Any, recipe: Recipe, error: type[Exception], message: str) -> None:
    x, other = rows((4, 64))
    with pytest.raises(error, match=f"rms_norm_quantize: .*{message}"):
        norm(x, other, weight_of(64), scales, recipe)
    with pytest.raises(error, match=f"act_mul_quantize: .*{message}"):
        act_mul(x, other, scales, recipe)


def test_a_dynamic_scale_is_not_given() -> None:
    x, other = rows((4, 64))
    for granularity, programs in (("row", ("div:448.0 f32", TORCHAO_PROGRAM)), ("mx", ("rceil", ""))):
        wanted = "one tensor if the programs name s0, else" if granularity == "row" else "none where the scale is that of 'mx',"
        with pytest.raises(ValueError, match=f"scales: wanted {wanted}.* found 1"):
            torch.ops.inductor_ext.act_mul_quantize(x, other, "silu", granularity, *programs, E4, numbers(1))


def test_columns_are_needed() -> None:
    x, other = rows((4, 0))
    with pytest.raises(ValueError, match="x: wanted at least one column"):
        norm(x, other, weight_of(0), numbers(1))
    with pytest.raises(ValueError, match="gate: wanted at least one column"):
        act_mul(x, other, numbers(1))


# ---- the kernels' source on the CPU ----------------------------------------------------------------------------------

#: (scales' letter of static_scale.cpp, how many, and the same as programs)
RECIPES = {
    "one": ("d", 1, TORCHAO),
    "three": ("d", 3, TORCHAO),
    "four": ("d", 4, TORCHAO),
    "reciprocal": ("r", 1, ("recip", "mul:scale max:-448.0 min:448.0", E4)),
    "number": ("n", 0, ("", "mul:37.5 max:-448.0 min:448.0", E4)),
}
#: Of weight and scales, for each dtype that static_scale.cpp has.
DTYPES = {BF16: (BF16, FP32), FP16: (FP32, FP16), FP32: (FP32, BF16)}
#: Rows and columns of every shape of threads, with so few multiprocessors that nine rows are many.
SIZES = ((1, 1024), (5, 8), (9, 128), (10, 100), (9, 264), (3, 1), (9, 1024), (3, 1032), (2, 5000), (9, 1536), (1, 16392))
MULTIPROCESSORS = 4
EVERY = pytest.mark.parametrize("recipe", RECIPES)
OF_ALL = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    made = cuda_on_cpu.compiled("static_scale", Path(tmp_path_factory.mktemp("static_scale")))
    made.set_multiprocessors(MULTIPROCESSORS)
    return made


def run(library: ctypes.CDLL, name: str, recipe: str, tensors: Any, outputs: Any, scales: Any, eps: Any = ()) -> None:
    """Calls the C function, whose pointers are tensors, outputs and four scales, some of which may be None."""
    letter, count, _ = RECIPES[recipe]
    error = ctypes.create_string_buffer(500)
    given = [*tensors, *eps, *outputs, *scales, *[None] * (static_scale.MAX_SCALES - len(scales))]
    pointers = [ctypes.byref(cuda_on_cpu.Given.of(each)) if isinstance(each, torch.Tensor) else each for each in given]
    assert getattr(library, name)(ord(letter), count, *pointers, ctypes.c_double(37.5), error, 500) == 0, error.value.decode()


def filled(count: int, x: torch.Tensor) -> torch.Tensor:
    """Where results go; no byte may be left as it is."""
    return torch.full((max(count, 1), *x.shape), 0x55, dtype=U8)


def exact(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """±2: with eps 0 the factor is 0.5, in whatever order squares are summed."""
    return ((torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(shape[1])) * 4) - 2).to(dtype)


@OF_ALL
@EVERY
@pytest.mark.parametrize("residual", [True, False])
def test_norm_on_the_cpu(library: ctypes.CDLL, residual: bool, recipe: str, dtype: torch.dtype) -> None:
    """Given the factor every byte is eager's."""
    _, count, programs = RECIPES[recipe]
    weight_dtype, scale_dtype = DTYPES[dtype]
    for shape in SIZES:
        summed, weight, scales = exact(shape, dtype), weight_of(shape[1], weight_dtype), numbers(count, scale_dtype)
        addend = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        wide = torch.zeros(shape[0], 2 * shape[1] + 8, dtype=dtype)
        for first in (0, 8, 1):  # aligned rows of a wider buffer, and rows that are not
            x = wide[:, first : first + shape[1]].copy_(summed - addend if residual else summed)
            out, total = filled(count, x), torch.full(shape, 7.0, dtype=dtype)
            tensors = (x, addend if residual else None, weight)
            run(library, f"norm_{NAMES[dtype]}", recipe, tensors, (out, total), scales, (ctypes.c_double(0.0),))
            assert library.launches_of_last_call() == 1
            want, _, want_total = RMS_NORM.reference(*tensors, 0.0, "cast mul", "static", *programs, scales)
            assert_same_bytes(out.view(E4).view(want.shape), want, f"{shape} from {first}")
            assert_same_bytes(total, want_total if residual else torch.full(shape, 7.0, dtype=dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-40])
def test_norm_of_extremes_on_the_cpu(library: ctypes.CDLL, value: float) -> None:
    x, other = rows((6, 264))
    x[1], x[2, 7], other[1] = value, value, 0.0
    weight, scales = weight_of(264), numbers(3)
    out, total = filled(3, x), torch.empty_like(x)
    run(library, "norm_bf16", "three", (x, other, weight), (out, total), scales, (ctypes.c_double(1e-6),))
    want, _, want_total = norm(x, other, weight, scales)
    assert_same_bytes(total, want_total)
    near(out.view(E4), want)


@OF_ALL
@EVERY
def test_gated_activation_on_the_cpu(library: ctypes.CDLL, recipe: str, dtype: torch.dtype) -> None:
    _, count, (scale_program, program, fp8) = RECIPES[recipe]
    scales = numbers(count, DTYPES[dtype][1])
    for shape in SIZES:
        both = rows((shape[0], 2 * shape[1] + 8), dtype)[0]
        for special in (None, float("nan"), -float("inf"), 1e-40):
            if special is not None:
                both[shape[0] // 2, shape[1] // 3] = special
            gate, up = both[:, : shape[1]], both[:, shape[1] + 8 * (special is None) :][:, : shape[1]]
            out = filled(count, gate)
            run(library, f"act_mul_{NAMES[dtype]}", recipe, (gate, up), (out,), scales)
            assert library.launches_of_last_call() == 1
            y = (gate.float() + gate.float().abs()).to(dtype) * up
            want, _ = static_scale.quantize(y, scale_program, program, fp8, scales)
            assert_same_bytes(out.view(E4).view(want.shape), want, f"{shape} with {special}")


def test_no_rows_are_no_launch(library: ctypes.CDLL) -> None:
    x, other = rows((0, 64))
    run(library, "norm_bf16", "three", (x, other, weight_of(64)), (filled(3, x), x), numbers(3), (ctypes.c_double(1e-6),))
    assert library.launches_of_last_call() == 0
    run(library, "act_mul_bf16", "one", (x, other), (filled(1, x),), numbers(1))
    assert library.launches_of_last_call() == 0


# ---- the kernels on a GPU --------------------------------------------------------------------------------------------

ON_GPU: dict[str, tuple[int, torch.dtype, Recipe]] = {
    "one": (1, FP32, TORCHAO),
    "three": (3, FP32, TORCHAO),
    "four in bf16": (4, BF16, TORCHAO),
    "reciprocal": (2, BF16, RECIPROCAL),
    "not clamped": (1, FP32, ("", "f32 div:scale", E4)),
    "number": (0, FP32, NUMBER),
}
WIDTHS = (8, 64, 100, 128, 520, 1024, 1032, 3072, 4096, 14336, 16384)


def with_residual(case: str) -> tuple[bool, ...]:
    """What is quantised knows nothing of the sum: without one is tried with the first recipe only."""
    return (True, False) if case == "one" else (True,)


def kernels(arch: str) -> list[jit.JitSpec]:
    specs = []
    for dtype, (case, (count, scale_dtype, recipe)) in itertools.product(NAMES, ON_GPU.items()):
        rest = ("static", *recipe, (count, scale_dtype if count else FP32))
        specs += [RMS_NORM.spec_of_key((dtype, residual, dtype, "cast mul", *rest), arch) for residual in with_residual(case)]
        specs += [ACT_MUL.spec_of_key((dtype, "silu", *rest), arch)]
    torchao = ("static", *TORCHAO, (1, FP32))
    specs += [RMS_NORM.spec_of_key((BF16, True, weight, kind, *torchao), arch) for kind in NORMS for weight in (BF16, FP32)]
    specs += [ACT_MUL.spec_of_key((dtype, act, *torchao), arch) for dtype in NAMES for act in ACTIVATIONS]
    return specs


@pytest.mark.gpu(kernels=kernels)
class TestOnTheGpu:
    @pytest.mark.parametrize("case", ON_GPU)
    @pytest.mark.parametrize("dtype", NAMES, ids=str)
    def test_given_the_factor_every_byte_of_a_norm_is_eagers(self, dtype: torch.dtype, case: str) -> None:
        count, scale_dtype, recipe = ON_GPU[case]
        scales = numbers(count, scale_dtype, "cuda")
        for columns, height, residual in itertools.product(WIDTHS, (1, 37, 700), with_residual(case)):
            summed, weight = exact((height, columns), dtype).cuda(), weight_of(columns, dtype, "cuda")
            addend = torch.randint(-3, 4, (height, columns), device="cuda").to(dtype)
            wide = torch.zeros(height, 2 * columns, dtype=dtype, device="cuda")
            for first in (0, columns, 1):
                x = wide[:, first : first + columns].copy_(summed - addend if residual else summed)
                other = addend if residual else None
                found = norm(x, other, weight, scales, recipe, eps=0.0)
                scale_program, program, fp8 = recipe
                wanted = RMS_NORM.reference(x, other, weight, 0.0, "cast mul", "static", scale_program, program, fp8, scales)
                for one, two in zip(found, wanted, strict=True):
                    assert_same_bytes(one, two, f"{dtype} {case} {height} x {columns} from {first}")

    @pytest.mark.parametrize("weight_dtype", [BF16, FP32], ids=str)
    @pytest.mark.parametrize("kind", NORMS)
    def test_every_norm(self, kind: str, weight_dtype: torch.dtype) -> None:
        (scale,) = numbers(1, FP32, "cuda")
        for columns, height in itertools.product(WIDTHS, (37, 700)):
            (x, other), weight = rows((height, columns), BF16, "cuda"), weight_of(columns, weight_dtype, "cuda")
            out, _, total = norm(x, other, weight, [scale], kind=kind)
            want, _, want_total = RMS_NORM.reference(x, other, weight, 1e-6, kind, "static", *TORCHAO, [scale])
            assert_same_bytes(total, want_total)
            near(out, want)

    @pytest.mark.parametrize("case", ON_GPU)
    @pytest.mark.parametrize("dtype", NAMES, ids=str)
    def test_gated_activations(self, dtype: torch.dtype, case: str) -> None:
        count, scale_dtype, recipe = ON_GPU[case]
        scales = numbers(count, scale_dtype, "cuda")
        for columns, height in itertools.product(WIDTHS, (1, 37, 700)):
            both = rows((height, 2 * columns + 1), dtype, "cuda")[0]
            for gate, up in (both[:, : 2 * columns].chunk(2, 1), (both[:, 1 : columns + 1], both[:, columns + 1 :])):
                for act in ACTIVATIONS if case == "one" else ("silu",):
                    out, _ = act_mul(gate, up, scales, recipe, act)
                    want, _ = ACT_MUL.reference(gate, up, act, "static", *recipe, scales)
                    assert_same_bytes(out, want, f"{dtype} {case} {act} {height} x {columns}")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 3e38])
    def test_extremes(self, value: float) -> None:
        scales = numbers(3, FP32, "cuda")
        for columns in (100, 1024, 4096):
            (x, other), weight = rows((40, columns), BF16, "cuda"), weight_of(columns, BF16, "cuda")
            x[3], x[5, 7], other[3] = value, value, 0.0
            out, _ = act_mul(x, other, scales)
            assert_same_bytes(out, ACT_MUL.reference(x, other, "silu", "static", *TORCHAO, scales)[0])
            out, _, total = norm(x, other, weight, scales)
            want, _, want_total = RMS_NORM.reference(x, other, weight, 1e-6, "cast mul", "static", *TORCHAO, scales)
            assert_same_bytes(total, want_total)
            near(out, want)

    @pytest.mark.parametrize("value", [0.0, -0.5, 1e-38, 3e38, float("nan"), float("inf")])
    def test_extreme_scales(self, value: float) -> None:
        gate, up = rows((40, 1024), BF16, "cuda")
        gate[3] = 0.0
        scales = [torch.tensor(value, device="cuda"), *numbers(1, FP32, "cuda"), torch.tensor(-value, device="cuda")]
        for given in (scales, scales[:1]):
            out, _ = act_mul(gate, up, given)
            assert_same_bytes(out, ACT_MUL.reference(gate, up, "silu", "static", *TORCHAO, given)[0])

    def test_a_replayed_graph_reads_its_scales_again(self) -> None:
        (x, other), weight = rows((128, 1024), BF16, "cuda"), weight_of(1024, BF16, "cuda")
        scales = numbers(3, FP32, "cuda")

        def both() -> Any:
            out, _, total = norm(x, other, weight, scales)
            return out, total, act_mul(total, other, scales[:1])[0]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the kernels load
            both()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = both()
        for factor in (1.0, 0.25, 8.0):
            for scale in scales:
                scale.mul_(factor)
            graph.replay()
            torch.cuda.synchronize()
            for one, two in zip(found, both(), strict=True):
                assert_same_bytes(one, two)

    def test_no_rows(self) -> None:
        x, other = rows((0, 1024), BF16, "cuda")
        out, scale, total = norm(x, other, weight_of(1024, BF16, "cuda"), numbers(3, FP32, "cuda"))
        assert (out.shape, scale.shape, total.shape) == ((3, 0, 1024), (0,), (0, 1024))
        assert act_mul(x, other, numbers(1, FP32, "cuda"))[0].shape == (0, 1024)
