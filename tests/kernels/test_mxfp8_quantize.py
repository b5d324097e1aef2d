"""mxfp8_quantize: its reference against torchao and against integers, its kernel's source on a CPU, and the kernel."""

from __future__ import annotations

import ctypes
import itertools
import math
from typing import Any

import pytest
import torch

from inductor_ext import jit, registry
from inductor_ext.kernels.mxfp8_quantize.op import OP
from inductor_ext.moe import mx
from tests.support import cuda_on_cpu
from tests.support.equal import assert_all_same_bytes, assert_same_bytes
from tests.support.fp8 import rounded

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

registry.ops()
E4, E8, U8 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FLOATS = [BF16, FP16, FP32]
quantize = torch.ops.inductor_ext.mxfp8_quantize


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """Every 16-bit pattern; of fp32 those of bf16, and others with the same exponents around 1.75 and 1."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    if dtype is not FP32:
        return bits.to(torch.int16).view(dtype)
    near = [0x600000 + step for step in (-2, -1, 0, 1, 2, 7)] + [1, 0x7FFFFF, 0x1234]
    exponents = torch.arange(256, dtype=torch.int32) << 23
    return torch.cat([bits << 16, *(exponents + mantissa for mantissa in near)]).view(FP32)


def blocks(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Blocks [·, 32]: each number as the largest of its block, and numbers of all sizes thrown together."""
    made = torch.Generator().manual_seed(seed)
    numbers = every_number(dtype)
    below = numbers[:, None].float() * (torch.rand(len(numbers), 31, generator=made) * 2 - 1)
    mixed = numbers[torch.randperm(len(numbers), generator=made)]
    special = torch.zeros(6, 32)
    special[1, 3], special[2, 5], special[3, 7], special[3, 9] = math.nan, math.inf, math.inf, math.nan
    special[2, 6], special[4], special[5, 31] = -3e38, 1e-45, -1e-40
    largest = torch.cat([numbers[:, None], below.to(dtype)], 1)
    return torch.cat([largest, mixed[: len(mixed) // 32 * 32].view(-1, 32), special.to(dtype)])


# ---- the reference: torchao ------------------------------------------------------------------------------------------


def _torchao(x: torch.Tensor, rounding: str) -> tuple[torch.Tensor, torch.Tensor]:
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    x = x.float() if x.dtype is FP16 else x  # which it does not take
    scales, data = to_mx(x, E4, 32, ScaleCalculationMode[rounding.upper()])
    return data, scales


@pytest.mark.parametrize("rounding", mx.ROUNDINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_reference_is_torchaos_to_mx(dtype: torch.dtype, rounding: str) -> None:
    x = blocks(dtype)
    data, scales = quantize(x, None, rounding, False)
    want_data, want_scales = _torchao(x, rounding)
    differ = (scales.view(U8) != want_scales.view(U8)).flatten()
    if dtype is FP32 and rounding == "rceil":
        # torchao's fp32 logarithm hides what is a little above a power of two; there the scale is one more.
        quotient = (x[differ].abs().amax(-1) / 448.0).double()
        hidden = quotient / 2.0 ** torch.floor(torch.log2(quotient)) - 1
        assert differ.any() and bool(((hidden > 0) & (hidden < 2.0**-16)).all())
        assert torch.equal(scales.view(U8)[differ].int(), want_scales.view(U8)[differ].int() + 1)
    else:
        assert not differ.any()
    assert_same_bytes(data[~differ], want_data[~differ])


# ---- the reference: integers and fp64 --------------------------------------------------------------------------------


def by_definition(x: torch.Tensor, rounding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite blocks [n, 32], written down from the definition: fractions of Python's integers, FP8 in float64."""
    bytes_ = []
    for row in x.double().abs().amax(-1).tolist():
        if row == 0:
            bytes_.append(0)
        elif rounding == "floor":
            bytes_.append(max(math.frexp(row)[1] - 1 - 8 + 127, 0))
        else:
            quotient = (torch.tensor(row, dtype=FP32) / torch.tensor(448.0)).item()
            mantissa, exponent = math.frexp(quotient)  # quotient = mantissa 2^exponent, mantissa from 1/2 to 1
            bytes_.append(max((exponent - 1 if mantissa == 0.5 else exponent) + 127, 0) if quotient else 0)
    scales = torch.tensor(bytes_, dtype=torch.int64)
    exponents = 127 - scales
    exponents[scales == 0] = 0 if rounding == "rceil" else 126
    scaled = x.double() * (2.0 ** exponents.double())[:, None]
    return rounded(scaled.clamp(-448, 448), E4).float().to(E4), scales.to(U8).view(E8)


@pytest.mark.parametrize("rounding", mx.ROUNDINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_reference_is_the_definition(dtype: torch.dtype, rounding: str) -> None:
    x = blocks(dtype, 1)
    x = x[x.float().isfinite().all(-1)]
    data, scales = quantize(x, None, rounding, False)
    want_data, want_scales = by_definition(x, rounding)
    assert_same_bytes(scales[:, 0], want_scales)
    assert_same_bytes(data, want_data)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@limits(max_examples=200, deadline=None)
@given(st.lists(finite, min_size=32, max_size=32), st.sampled_from(mx.ROUNDINGS))
def test_any_finite_block(numbers: list[float], rounding: str) -> None:
    x = torch.tensor([numbers])
    data, scales = quantize(x, None, rounding, False)
    want_data, want_scales = by_definition(x, rounding)
    assert_same_bytes(scales[0], want_scales)
    assert_same_bytes(data, want_data)


@pytest.mark.parametrize("k", [-126, -100, -1, 0, 1, 7, 100, 119])
def test_448_times_a_power_of_two_is_the_edge(k: int) -> None:
    edge = torch.tensor(448.0 * 2.0**k, dtype=torch.float64).float()
    above, below = torch.nextafter(edge, torch.tensor(math.inf)), torch.nextafter(edge, torch.tensor(0.0))
    x = torch.stack([edge, above, below])[:, None].expand(3, 32)
    data, scales = quantize(x, None, "rceil", False)
    assert scales.view(U8).flatten().tolist() == [127 + k, 128 + k, 127 + k]
    assert data.float()[:, 0].tolist() == [448.0, 224.0, 448.0]
    assert mx.quantize(x, "floor")[1].view(U8).flatten().tolist() == [127 + k] * 3


def test_special_blocks() -> None:
    """Zeros, NaN, infinity beside finite numbers, both, and subnormals."""
    x = torch.zeros(6, 32)
    x[1, 3], x[2, 5], x[2, 6], x[3, 0], x[3, 1] = math.nan, -math.inf, 3e38, math.inf, math.nan
    x[4], x[5] = 2.0**-149, 2.0**-127
    data, scales = quantize(x, None, "rceil", False)
    assert scales.view(U8).flatten().tolist() == [0, 255, 254, 255, 0, 0]
    assert bool(data[1].isnan().all()) and bool(data[3].isnan().all()) and not data[[0, 4, 5]].float().any()
    assert data[2, 5].float() == -448 and data[2, 6].float() == 1.75 and not data[2, 7:].float().any()
    data, scales = quantize(x, None, "floor", False)
    assert scales.view(U8).flatten().tolist() == [0, 255, 247, 255, 0, 0]
    assert data[1].isnan().sum() == 1 and data[3].isnan().sum() == 2 and data[2, 5].float() == -448
    assert data[5].float().unique().tolist() == [0.5], "2^-127 over the least scale that torchao divides by, 2^-126"


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (128, 4), (127, 5), (300, 8), (129, 3), (0, 4), (256, 64)])
def test_one_group_is_torchaos_to_blocked(rows: int, cols: int) -> None:
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.utils import to_blocked

    scales = torch.randint(0, 255, (rows, cols), dtype=U8)
    found = mx.swizzle(scales.view(E8))
    assert found.shape == mx.swizzled_shape(rows, cols)
    assert torch.equal(found.view(U8).flatten(), to_blocked(scales).flatten())
    assert torch.equal(mx.unswizzle(found, rows, cols).view(U8), scales)


ENDS = [[300], [0, 0, 300], [1, 129, 129, 300], [128, 256, 300], list(range(20, 301, 20)), [10, 20], [0], []]


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("cols", [4, 8])
def test_groups_are_torchaos(ends: list[int], cols: int) -> None:
    pytest.importorskip("torchao")
    from torchao.prototype.moe_training.kernels.mxfp8 import quant

    scales, offs = torch.randint(0, 255, (300, cols), dtype=U8), torch.tensor(ends, dtype=torch.int32)
    found = mx.swizzle(scales.view(E8), offs)
    wanted, starts = quant.torch_to_blocked_2d_M_groups(scales, offs)
    assert torch.equal(found.view(U8), wanted) and torch.equal(mx.group_starts(offs), starts)
    back = mx.unswizzle(found, 300, cols, offs).view(U8)
    last = ends[-1] if ends else 0
    assert torch.equal(back[:last], scales[:last]) and not back[last:].any()
    for begin, end, start in zip([0, *ends], ends, starts.tolist()):  # a group is what it is alone
        alone = mx.swizzle(scales[begin:end].view(E8))
        assert torch.equal(found.view(U8)[start : start + len(alone)], alone.view(U8))


def test_weights_are_torchaos_groups() -> None:
    pytest.importorskip("torchao")
    from torchao.prototype.moe_training.kernels.mxfp8 import quant

    scales = torch.randint(0, 255, (3, 200, 6), dtype=U8)
    found = mx.swizzle(scales.view(E8))
    assert torch.equal(found.view(U8), quant.torch_to_blocked_per_group_3d(scales))
    assert mx.swizzle(torch.empty(0, 200, 6, dtype=U8).view(E8)).shape == (0, 256 * 8)


# ---- the op ----------------------------------------------------------------------------------------------------------

X = torch.zeros(4, 64)
OFFS = torch.tensor([2, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.double(), None, "rceil", False), TypeError, "x: wanted bfloat16, float16 or float32, found torch.float64"),
        ((X[0], None, "rceil", False), ValueError, r"x: wanted \[T, K\] or \[E, N, K\], found shape \(64,\)"),
        ((X[:, :33], None, "rceil", False), ValueError, r"wanted rows of a multiple of 32 elements, found shape \(4, 33\)"),
        ((X, None, "even", False), ValueError, "rounding: wanted rceil or floor, found 'even'"),
        ((X[None], OFFS, "rceil", True), ValueError, "offs: wanted None for weights"),
        ((X, OFFS.long(), "rceil", True), ValueError, "offs: wanted int32 .* found torch.int64"),
        ((X, OFFS[None], "rceil", True), ValueError, r"offs: wanted int32 .* of shape \(1, 2\)"),
        ((X, OFFS + 1, "rceil", True), ValueError, r"offs: wanted cumulative ends from 0 to 4, .* found \[3, 5\]"),
        ((X, OFFS.flip(0), "rceil", True), ValueError, r"offs: wanted cumulative ends .* found \[4, 2\]"),
    ],
)
def test_errors(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(*arguments)


CASES = [
    ((5, 64), None, False),
    ((5, 64), None, True),
    ((300, 160), [0, 7, 300], True),
    ((300, 160), [0, 7, 300], False),
    ((3, 40, 96), None, False),
    ((3, 40, 96), None, True),
    ((0, 64), [0, 0], True),
    ((7, 0), None, True),
]


@pytest.mark.parametrize(("shape", "ends", "swizzled"), CASES, ids=str)
def test_fake_and_out_agree(shape: Any, ends: Any, swizzled: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.randn(shape).to(BF16)
    offs = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    real = quantize(x, offs, "rceil", swizzled)
    with FakeTensorMode() as mode:
        fake = quantize(mode.from_tensor(x), None if offs is None else mode.from_tensor(offs), "rceil", swizzled)
    outs = [torch.empty_like(each) for each in real]
    quantize.out(x, offs, "rceil", swizzled, out0=outs[0], out1=outs[1])
    for one, two, out in zip(real, fake, outs, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (two.dtype, two.shape, two.stride())
        assert torch.equal(one.view(U8), out.view(U8))


@pytest.mark.parametrize("swizzled", [False, True])
def test_opcheck(swizzled: bool) -> None:
    everything = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # see test_fakes.py
    x = torch.randn(6, 64).to(BF16)
    for offs in (None, torch.tensor([2, 6], dtype=torch.int32)):
        torch.library.opcheck(quantize.default, (x, offs, "rceil", swizzled), test_utils=everything)


def test_compiled_with_any_number_of_rows() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(lambda x, offs: quantize(x, offs, "rceil", True), backend=counter, dynamic=True)
    for rows in (4, 130, 300):
        x, offs = torch.randn(rows, 64), torch.tensor([1, rows], dtype=torch.int32)
        assert_all_same_bytes(compiled(x, offs), quantize(x, offs, "rceil", True))
    assert counter.frame_count == 1


# ---- the kernel's source on the CPU ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda_on_cpu.compiled("mxfp8_quantize", tmp_path_factory.mktemp("mxfp8"))


@pytest.mark.parametrize("rounding", mx.ROUNDINGS)
def test_scales_of_the_header(on_cpu: ctypes.CDLL, rounding: str) -> None:
    edges = torch.tensor([0x04600000, 0x04600001, 0x04600002, 0x7F800000, 0x7FC00000, 0x7F7FFFFF, 1, 0], dtype=torch.int32)
    amax = torch.cat([every_number(dtype).float().abs() for dtype in FLOATS] + [edges.view(FP32)]).contiguous()
    found, factors = torch.empty(len(amax), dtype=U8), torch.empty(len(amax))
    on_cpu.mx_scales(*(ctypes.c_void_p(t.data_ptr()) for t in (amax,)), ctypes.c_int64(len(amax)), rounding == "floor",
                     *(ctypes.c_void_p(t.data_ptr()) for t in (found, factors)))  # fmt: skip
    wanted, want_factors = mx.block_scale(amax, rounding)
    assert_same_bytes(found, wanted)
    assert_same_bytes(factors, want_factors)


def test_values_and_places_of_the_header(on_cpu: ctypes.CDLL) -> None:
    on_cpu.mx_value.restype, on_cpu.mx_swizzled_offset.restype = ctypes.c_float, ctypes.c_int64
    values = torch.tensor([on_cpu.mx_value(byte) for byte in range(256)])
    assert_same_bytes(values, torch.arange(256, dtype=U8).view(E8).float())
    for rows, cols in ((130, 3), (128, 8)):
        at = [[on_cpu.mx_swizzled_offset(*map(ctypes.c_int64, (row, col, cols))) for col in range(cols)] for row in range(rows)]
        wanted = mx.swizzled_offset(torch.arange(rows)[:, None], torch.arange(cols), cols)
        assert torch.equal(torch.tensor(at), wanted)
        numbers = torch.randint(0, 255, (rows, cols), dtype=U8)
        assert torch.equal(mx.swizzle(numbers.view(E8)).view(U8).flatten()[wanted], numbers)


GUARD = 64  # bytes before and behind an output that must stay


def run_on_cpu(library: ctypes.CDLL, x: torch.Tensor, offs: Any, rounding: str, swizzled: bool, sms: int = 132) -> Any:
    """The kernel's results, from a buffer of other bytes with some around it."""
    wanted = OP.fake(x, offs, rounding, swizzled)
    buffers = [torch.full((each.numel() + 2 * GUARD,), 0x5A, dtype=U8) for each in wanted]
    outs = [buffer[GUARD : len(buffer) - GUARD].view(each.dtype).view(each.shape) for buffer, each in zip(buffers, wanted)]
    error = ctypes.create_string_buffer(200)
    made = [cuda_on_cpu.Given.of(each) if each is not None else None for each in (x, offs, *outs)]
    pointers = [ctypes.byref(each) if each is not None else None for each in made]
    bits = {BF16: -16, FP16: 16, FP32: 32}[x.dtype]
    failed = library.mxfp8_quantize(bits, *pointers, swizzled, rounding == "floor", sms, error, 200)
    assert not failed, error.value.decode()
    for buffer in buffers:
        assert bool((buffer[:GUARD] == 0x5A).all()) and bool((buffer[len(buffer) - GUARD :] == 0x5A).all()), "written outside"
    return outs


@pytest.mark.parametrize("rounding", mx.ROUNDINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_source_gives_plain_scales(on_cpu: ctypes.CDLL, dtype: torch.dtype, rounding: str) -> None:
    numbers = blocks(dtype)[-3000:].flatten()
    for rows, cols in ((1, 32), (3, 96), (70, 1024), (5, 1056), (0, 64), (4, 0)):
        x = numbers[: rows * cols].view(rows, cols)
        assert_all_same_bytes(run_on_cpu(on_cpu, x, None, rounding, False), mx.quantize(x, rounding))
    wide = numbers[: 40 * 512].view(40, 512)
    cubes = numbers[: 3 * 20 * 192].view(3, 20, 192)
    for x in (wide[:, 64:160], wide[:, 1:97], wide[::2, :512], wide[:1, 8:72], cubes, cubes[:, :10], cubes[:, 3:4, 32:64]):
        assert_all_same_bytes(run_on_cpu(on_cpu, x, None, rounding, False), mx.quantize(x, rounding))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_source_gives_swizzled_scales(on_cpu: ctypes.CDLL, dtype: torch.dtype) -> None:
    numbers = blocks(dtype)[-3000:].flatten()
    shapes: list[Any] = [(1, 32), (130, 160), (128, 128), (0, 64), (4, 0), (2, 130, 96), (2, 128, 128), (3, 1, 32)]
    for shape in shapes:
        x = numbers[: math.prod(shape)].view(shape)
        assert_all_same_bytes(run_on_cpu(on_cpu, x, None, "rceil", True), OP.reference(x, None, "rceil", True))
    wide = numbers[: 150 * 256].view(150, 256)
    for x in (wide[:, 32:192], wide[:, 1:129], wide[::2]):
        wanted = OP.reference(x, None, "floor", True)
        assert_all_same_bytes(run_on_cpu(on_cpu, x, None, "floor", True), wanted)
    long = numbers[: 2 * 17280].view(2, 17280)  # 135 tiles: nine blocks of threads for what pads
    assert_all_same_bytes(run_on_cpu(on_cpu, long, None, "rceil", True), OP.reference(long, None, "rceil", True))


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_source_swizzles_groups(on_cpu: ctypes.CDLL, ends: list[int]) -> None:
    x, offs = blocks(BF16)[-3000:].flatten()[: 300 * 64].view(300, 64), torch.tensor(ends, dtype=torch.int32)
    assert_all_same_bytes(run_on_cpu(on_cpu, x, offs, "rceil", True), OP.reference(x, offs, "rceil", True))
    empty = x[:0], torch.zeros_like(offs)
    assert_all_same_bytes(run_on_cpu(on_cpu, *empty, "rceil", True), OP.reference(*empty, "rceil", True))


@pytest.mark.parametrize("groups", [0, 1, 128, 255, 256, 257, 1600])
def test_source_finds_the_groups_of_rows(on_cpu: ctypes.CDLL, groups: int) -> None:
    made = torch.Generator().manual_seed(groups)
    sizes = torch.randint(0, 300, (groups,), generator=made) * (torch.rand(groups, generator=made) < 0.7)
    offs, rows = sizes.cumsum(0).int(), int(sizes.sum()) + 130
    places = torch.full((rows + 256, 2), 0)
    places[:, 0] = -1  # rows of no group
    for begin, end, start in zip([0, *offs.tolist()], offs.tolist(), mx.group_starts(offs).tolist()):
        row = start + torch.arange(end - begin)
        places[begin:end] = torch.stack([row // 128, row % 128], 1)
    found = torch.empty(256, 2, dtype=torch.int64)
    for first in (0, 1, rows // 2, max(rows - 386, 0), rows - 256 if rows > 256 else 0):
        pointers = ctypes.c_void_p(offs.data_ptr()), ctypes.c_void_p(found.data_ptr())
        on_cpu.mx_tile_rows(pointers[0], groups, ctypes.c_int64(rows), ctypes.c_int64(first), pointers[1])
        assert torch.equal(found, places[first : first + 256])


@pytest.mark.parametrize("groups", [7, 300])
@pytest.mark.parametrize("cols", [32, 96, 2048, 17280])
def test_source_takes_several_steps(on_cpu: ctypes.CDLL, cols: int, groups: int) -> None:
    """On one multiprocessor four steps a block of threads: rows many a step, some, and one in several."""
    rows = (4 * 16 * 256 + 300) * 32 // cols
    x = blocks(BF16).flatten()[: rows * cols].view(rows, cols)
    offs = (torch.rand(groups, generator=torch.Generator().manual_seed(cols)).sort().values * rows).int()
    for rows_of, ends in ((x, offs), (x, None), (x[:, 32:] if cols > 32 else x[::2], offs.clamp(max=rows // 2))):
        assert_all_same_bytes(run_on_cpu(on_cpu, rows_of, ends, "rceil", True, 1), OP.reference(rows_of, ends, "rceil", True))


@pytest.mark.parametrize("sms", [1, 3, 132])
@pytest.mark.parametrize(("groups", "cols"), [(128, 2048), (257, 96), (40, 4224), (3, 36 * 32)])
def test_source_pads_few_rows_of_many_groups(on_cpu: ctypes.CDLL, groups: int, cols: int, sms: int) -> None:
    """Most of the buffer is padding, for one block of threads or for many; its end is no multiple of a tile."""
    made = torch.Generator().manual_seed(groups)
    x = blocks(BF16)[-3000:].flatten()[: 21 * cols].view(21, cols)
    for ends in (torch.randint(0, 22, (groups,), generator=made).sort().values, torch.zeros(groups)):
        offs = ends.int()
        assert_all_same_bytes(run_on_cpu(on_cpu, x, offs, "rceil", True, sms), OP.reference(x, offs, "rceil", True))


def test_source_asks_for_aligned_swizzled_scales(on_cpu: ctypes.CDLL) -> None:
    x = blocks(BF16)[:4].view(4, 32)
    data, wide = OP.fake(x, None, "rceil", True)[0], torch.empty(128 * 4 + 8, dtype=U8)
    error = ctypes.create_string_buffer(200)
    made = [ctypes.byref(cuda_on_cpu.Given.of(each)) for each in (x, data, wide[8:].view(E8).view(128, 4))]
    assert on_cpu.mxfp8_quantize(-16, made[0], None, made[1], made[2], True, False, 132, error, 200)
    assert "scales: wanted an address of a multiple of 16 bytes" in error.value.decode()


@pytest.mark.parametrize("ends", [[500, 300], [-5, 300], [300, 0, 300, 0, 300], [200, 100, 2**31 - 1]], ids=str)
def test_ends_that_are_none_touch_no_other_memory(on_cpu: ctypes.CDLL, ends: list[int]) -> None:
    run_on_cpu(on_cpu, blocks(BF16)[:600].view(300, 64), torch.tensor(ends, dtype=torch.int32), "rceil", True)


@pytest.mark.parametrize(("threads", "cols"), [(8, 64), (8, 192), (32, 704), (64, 1536), (96, 416)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_in_registers(on_cpu: ctypes.CDLL, dtype: torch.dtype, threads: int, cols: int) -> None:
    """quantize_blocks.cuh, which ends the kernels that compute what they quantise."""
    x = blocks(dtype)[-3000:].flatten()[: 11 * cols].view(11, cols)
    data, scales = torch.empty(x.shape, dtype=E4), torch.empty(11, cols // 32, dtype=E8)
    places = (ctypes.c_void_p(each.data_ptr()) for each in (x, data, scales))
    bits = {BF16: -16, FP16: 16, FP32: 32}[dtype]
    on_cpu.mx_rows(bits, *places, ctypes.c_int64(11), ctypes.c_int64(cols), threads)
    assert_all_same_bytes((data, scales), mx.quantize(x, "rceil"))


# ---- the kernel ------------------------------------------------------------------------------------------------------


def kernels(arch: str) -> list[jit.JitSpec]:
    return [OP.spec_of_key(key, arch) for key in itertools.product(FLOATS, mx.ROUNDINGS, (False, True))]


gpu = pytest.mark.gpu(kernels=kernels)


def check(x: torch.Tensor, offs: Any = None, rounding: str = "rceil", swizzled: bool = False) -> None:
    """Every byte, those that pad too, whatever was there before."""
    wanted = OP.reference(x, offs, rounding, swizzled)
    for filled in (0x5A, 0xFF):
        outs = [torch.full_like(each.view(U8), filled).view(each.dtype) for each in wanted]
        quantize.out(x, offs, rounding, swizzled, out0=outs[0], out1=outs[1])
        assert_all_same_bytes(outs, wanted)


def on_gpu(shape: Any, dtype: torch.dtype = BF16) -> torch.Tensor:
    made = torch.Generator("cuda").manual_seed(3)
    size = torch.randn(*shape[:-1], 1, device="cuda", generator=made) * 4
    return (torch.randn(shape, device="cuda", generator=made) * torch.exp(size)).to(dtype)


def ends_of(*ends: int) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32, device="cuda")


@gpu
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("rounding", mx.ROUNDINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_number(dtype: torch.dtype, rounding: str, swizzled: bool) -> None:
    x = blocks(dtype).cuda()
    check(x, None, rounding, swizzled)
    check(x[: len(x) // 8 * 8].view(-1, 256), None, rounding, swizzled)
    data, scales = quantize(x, None, rounding, False)  # the CPU's own bytes, not only this GPU's operators'
    assert_all_same_bytes((data, scales), mx.quantize(x.cpu(), rounding))


@gpu
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shapes_and_strides(dtype: torch.dtype, swizzled: bool) -> None:
    for rows, cols in itertools.product((0, 1, 2, 127, 128, 129, 1000), (0, 32, 64, 96, 160, 768, 2048, 2880, 7168)):
        check(on_gpu((rows, cols), dtype), None, "rceil", swizzled)
    wide = on_gpu((500, 4096), dtype)
    for x in (wide[:, 1024:2048], wide[:, 8:1000], wide[:, 1:993], wide[::3], wide[:1, 32:64], wide[:, :32].expand(500, 32)):
        check(x, None, "floor", swizzled)
    for shape in ((0, 64, 64), (3, 0, 64), (5, 130, 96), (8, 768, 2048), (128, 16, 256)):
        check(on_gpu(shape, dtype), None, "rceil", swizzled)
    weights = on_gpu((6, 256, 512), dtype)
    for w in (weights[:, :200], weights[::2, 1:, 64:], weights[:, :, 3:35], weights.transpose(0, 1)):
        check(w, None, "rceil", swizzled)


@gpu
def test_groups() -> None:
    for rows, cols in ((300, 64), (300, 2048), (1, 96), (0, 128)):
        x = on_gpu((rows, cols))
        for ends in (*([min(end, rows) for end in each] for each in ENDS), [rows] * 1500, [0] * 1023 + [rows // 2, rows]):
            check(x, ends_of(*ends), "rceil", True)
            check(x, ends_of(*ends), "rceil", False)
    sizes = torch.randint(0, 400, (1024,))
    x = on_gpu((int(sizes.sum()) + 77, 256))
    check(x, sizes.cumsum(0).int().cuda(), "rceil", True)


@gpu
def test_ends_that_are_none_do_no_harm() -> None:
    x = on_gpu((300, 256))
    for ends in ((500, 300), (-5, 300), (300, 0, 300, 0), (200, 100, 2**31 - 1)):
        quantize(x, ends_of(*ends), "rceil", True)
    torch.cuda.synchronize()
    check(x, None, "rceil", True)


@gpu
def test_offsets_of_64_bits() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB")
    x = torch.zeros(2**20 + 3, 4096, dtype=BF16, device="cuda")  # 8 GiB and a little
    x[-5:] = on_gpu((5, 4096))
    for swizzled in (False, True):
        data, scales = quantize(x, None, "rceil", swizzled)
        want_data, want_scales = mx.quantize(x[-5:], "rceil")
        assert_same_bytes(data[-5:], want_data)
        assert not data[:-5].view(torch.int64).any()
        if not swizzled:
            assert_same_bytes(scales[-5:], want_scales)
            assert not scales[:-5].view(torch.int64).any()
        else:  # the last rows of tiles: three rows of them, and the two of the row of tiles before
            assert_same_bytes(scales[-128:], mx.swizzle(want_scales[-3:]))
            tail = torch.cat([torch.zeros(126, 128, dtype=U8, device="cuda"), want_scales[:2].view(U8)]).view(E8)
            assert_same_bytes(scales[-256:-128], mx.swizzle(tail))


@gpu
@pytest.mark.parametrize("swizzled", [False, True])
def test_another_stream_and_a_graph(swizzled: bool) -> None:
    x, offs = on_gpu((700, 2048)), ends_of(100, 100, 600)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        filled = x * 2
        found = quantize(filled, offs, "rceil", swizzled)
    side.synchronize()
    assert_all_same_bytes(found, OP.reference(x * 2, offs, "rceil", swizzled))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = quantize(x, offs, "rceil", swizzled)
    x.copy_(on_gpu((700, 2048)) * 3), offs.copy_(ends_of(5, 300, 700))
    graph.replay()
    assert_all_same_bytes(found, OP.reference(x, offs, "rceil", swizzled))


@gpu
def test_checks_look_at_offs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_CHECKS", "1")
    OP._loaded.clear()
    with pytest.raises(ValueError, match="offs: wanted cumulative ends from 0 to 300"):
        quantize(on_gpu((300, 64)), ends_of(10, 301), "rceil", True)
    OP._loaded.clear()
