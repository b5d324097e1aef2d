"""One scale for a tensor, in one launch and in two: the same bytes, whatever the chip keeps of y.

The kernels' own source runs on the CPU, blocks as threads of the host with a barrier between them, on GPUs so small that little
input fills them; on a GPU both ways run there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_ext import jit
from inductor_ext.kernels.act_mul_quantize.op import OP as ACT_MUL
from inductor_ext.kernels.fp8_quantize.op import OP as QUANTIZE
from inductor_ext.kernels.fp8_quantize.op import TORCHAO_PROGRAM, TORCHAO_SCALE, WORKSPACE_FLOATS
from inductor_ext.kernels.rms_norm_quantize.op import OP as RMS_NORM
from inductor_ext.kernels.rms_norm_quantize.op import normalise
from tests.support import cuda_on_cpu
from tests.support.equal import assert_same_bytes

E4, U8 = torch.float8_e4m3fn, torch.uint8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAUNCHES = "INDUCTOR_EXT_TENSOR_LAUNCHES"
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}

# ---- on the CPU ------------------------------------------------------------------------------------------------------

#: Multiprocessors, blocks of one, bytes of shared memory of one: all, some or none of y fits; more blocks than a cluster has.
DEVICES = ((1, 2, 228 << 10), (1, 1, 100 << 10), (2, 1, 8 << 10), (12, 1, 40 << 10))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda_on_cpu.compiled("quantize_once", Path(tmp_path_factory.mktemp("quantize_once")))


@pytest.fixture(scope="module", params=DEVICES, ids=str)
def library(request: Any, tmp_path_factory: pytest.TempPathFactory, made: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """A library of its own a device: a kernel's plan is made once a process."""
    copy = tmp_path_factory.mktemp("device") / "library.so"
    copy.write_bytes(Path(made._name).read_bytes())
    found = ctypes.CDLL(str(copy))
    found.set_device(*request.param)
    yield found


def called(function: Any, *arguments: Any) -> int:
    error = ctypes.create_string_buffer(500)
    given = [ctypes.byref(cuda_on_cpu.Given.of(each)) if isinstance(each, torch.Tensor) else each for each in arguments]
    code: int = function(*given, error, 500)
    assert code != 1, error.value.decode()
    return code


def results(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, scale and the maxima, none of which may be left as it is."""
    return torch.full(x.shape, 0x55, dtype=U8), torch.full((1,), -1.0), torch.full((WORKSPACE_FLOATS,), torch.nan)


def quantised(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (y.abs().amax().float() / 448.0).to(y.dtype).float()
    return (y.float() / scale).clamp(-448.0, 448.0).to(E4), scale


def both_ways(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL, run: Any) -> Any:
    """What `run(y)` leaves, in one launch; checked to be what it leaves in two, for which it is given y's memory."""
    monkeypatch.setenv(LAUNCHES, "1")
    code, *one = run(None)
    assert (code, library.launches_of_last_call()) == (0, 1)
    monkeypatch.setenv(LAUNCHES, "2")
    code, *_ = run(None)
    assert code == 2 and library.launches_of_last_call() == 0
    code, *two = run(True)
    assert (code, library.launches_of_last_call()) == (0, 2)
    for a, b in zip(one, two, strict=True):
        assert_same_bytes(a, b)
    return one


def spoilt(x: torch.Tensor, value: float | None) -> torch.Tensor:
    if value is not None:
        x[x.shape[0] // 2, x.shape[1] // 3] = value
    return x


@pytest.mark.parametrize(("dtype", "residual"), [(BF16, True), (BF16, False), (FP16, False), (FP32, True)], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1024), (5, 8), (37, 128), (300, 96), (40, 256), (90, 1024), (3, 1032), (20, 1536), (4, 16384)]
)
def test_norm(monkeypatch: Any, library: Any, rows: int, columns: int, residual: bool, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(rows)
    x, other = (torch.randn(rows, columns, generator=random).to(dtype) for _ in range(2))
    weight = torch.rand(columns, generator=random).to(dtype if dtype is BF16 else FP32)

    def run(y: Any) -> Any:
        out, scale, partial = results(x)
        total = torch.full_like(x, 7.0)
        arguments = (x, other if residual else None, weight, ctypes.c_double(1e-6), out, scale, total)
        code = called(getattr(library, f"norm_{NAMES[dtype]}"), *arguments, torch.empty_like(x) if y else None, partial)
        return code, out, scale, total

    out, scale, total = both_ways(monkeypatch, library, run)
    summed = x + other if residual else x
    assert_same_bytes(total, summed if residual else torch.full_like(x, 7.0))
    want, want_scale = quantised(normalise(summed, weight, 1e-6, "cast mul"))
    torch.testing.assert_close(scale[0], want_scale, rtol=2.0**-7, atol=0)
    apart = (out.int() - want.view(U8).int()).abs()
    assert ((apart <= 1) | ((out.int() & 127) + (want.view(U8).int() & 127) <= 1)).all()


@pytest.mark.parametrize("bound", [2.0, 1e30, float("nan")])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 96), (9, 264), (3, 13), (2, 4096)])
def test_a_bound_of_the_scale(library: Any, rows: int, columns: int, granularity: str, bound: float) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)).to(BF16)
    out, scale, partial = results(x)
    scale = torch.full((rows if granularity == "row" else 1,), -1.0)
    run, given = getattr(library, f"bounded_{granularity}"), torch.tensor([bound])
    assert called(run, x, out, scale, given, partial) == 0
    amax = x.float().abs().amax(-1, keepdim=True) if granularity == "row" else x.float().abs().amax()
    want = torch.minimum(amax, given) / 448.0
    assert_same_bytes(scale, want.reshape(-1))
    assert_same_bytes(out.view(E4), (x.float() / want).clamp(-448.0, 448.0).to(E4))


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        (None, "bound: wanted a tensor, which the programs name, found none"),
        (torch.ones(2), "bound: wanted one element, found shape"),
    ],
)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_a_bound_that_is_none(library: Any, granularity: str, bound: torch.Tensor | None, message: str) -> None:
    x = torch.ones(1, 8).to(BF16)
    out, scale, partial = results(x)
    with pytest.raises(AssertionError, match=message):
        called(getattr(library, f"bounded_{granularity}"), x, out, scale, bound, partial)
    assert bool((out == 0x55).all()) and scale.item() == -1.0


@pytest.mark.parametrize(
    ("dtype", "special"), [(BF16, None), (BF16, float("nan")), (FP16, float("inf")), (FP32, None)], ids=str
)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (1, 3072), (7, 24), (61, 1000), (3, 16384)])
def test_gated_activation(
    monkeypatch: Any, library: Any, rows: int, columns: int, special: float | None, dtype: torch.dtype
) -> None:
    wide = torch.randn(rows, 2 * columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    gate, up = spoilt(wide, special).chunk(2, -1)

    def run(y: Any) -> Any:
        out, scale, partial = results(gate)
        arguments = (gate, up, out, scale, torch.empty(rows, columns, dtype=dtype) if y else None, partial)
        return called(getattr(library, f"act_mul_{NAMES[dtype]}"), *arguments), out, scale

    out, scale = both_ways(monkeypatch, library, run)
    want, want_scale = quantised((gate.float() + gate.float().abs()).to(dtype) * up)
    assert_same_bytes(out.view(E4), want)
    assert_same_bytes(scale[0], want_scale)


@pytest.mark.parametrize(
    ("dtype", "special"), [(BF16, None), (BF16, float("nan")), (FP16, -float("inf")), (FP32, -0.0)], ids=str
)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (1, 8), (3, 5), (33, 129), (111, 1003)])
def test_alone(monkeypatch: Any, library: Any, rows: int, columns: int, special: float | None, dtype: torch.dtype) -> None:
    x = spoilt(torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)).to(dtype), special)
    found = {}
    for launches in (1, 2):
        monkeypatch.setenv(LAUNCHES, str(launches))
        out, scale, partial = results(x)
        called(getattr(library, f"alone_{NAMES[dtype]}"), x, out, scale, partial)
        assert library.launches_of_last_call() == launches
        found[launches] = out.view(E4), scale[0]
    for each in found.values():
        for one, two in zip(each, quantised(x), strict=True):
            assert_same_bytes(one, two)


def test_one_launch_whatever_is_kept(monkeypatch: Any, made: ctypes.CDLL, tmp_path: Path) -> None:
    """Measured so: y's memory is not asked for, even where next to nothing of it stays on the chip."""
    monkeypatch.delenv(LAUNCHES, raising=False)
    copy = tmp_path / "library.so"
    copy.write_bytes(Path(made._name).read_bytes())
    library = ctypes.CDLL(str(copy))
    library.set_device(1, 1, 4 << 10)  # the turn in registers, and no other
    for rows in (8, 64):
        gate, up = torch.randn(2, rows, 2048).to(BF16)
        out, scale, partial = results(gate)
        assert called(library.act_mul_bf16, gate, up, out, scale, None, partial) == 0
        assert library.launches_of_last_call() == 1


def test_the_division_of_vectors_into_rows(made: ctypes.CDLL) -> None:
    left = ctypes.c_uint32()
    made.divided.restype = ctypes.c_uint32
    edges = [*range(1, 40), 127, 128, 129, 384, 1791, 2048, 4095, 4096, 2**20 + 7, 2**30 - 1, 2**30, 2**31 - 1]
    for divisor in edges:
        near = (0, divisor, 3 * divisor, 2**31 - divisor, 2**31 // divisor * divisor, 2**31)
        for i in {each + step for each in near for step in (-1, 0, 1)}:
            if 0 <= i < 2**31:
                assert (made.divided(i, ctypes.c_int64(divisor), ctypes.byref(left)), left.value) == divmod(i, divisor)


# ---- on a GPU --------------------------------------------------------------------------------------------------------

PROGRAMS = (TORCHAO_SCALE, TORCHAO_PROGRAM)
NORM_ROWS = ((1, 8), (1, 1024), (7, 3072), (33, 128), (300, 1032), (700, 8), (1000, 16384), (1024, 1024), (7168, 1024))
BIG_ROWS = ((7168, 3072), (30011, 1024), (5000, 8192))  # half of y is kept, or less


def kernels(arch: str) -> list[jit.JitSpec]:
    specs = [RMS_NORM.spec_of_key((d, r, d, "cast mul", "tensor", *PROGRAMS, E4), arch) for d in NAMES for r in (True, False)]
    specs += [ACT_MUL.spec_of_key((d, "silu", "tensor", *PROGRAMS, E4), arch) for d in NAMES]
    specs += [QUANTIZE.spec_of_key((d, "tensor", *PROGRAMS, E4), arch) for d in NAMES]
    return specs


def norm(x: Any, residual: Any, weight: Any) -> Any:
    return torch.ops.inductor_ext.rms_norm_quantize(x, residual, weight, 1e-6, "cast mul", "tensor", *PROGRAMS, E4, [])


def act_mul(gate: Any, up: Any) -> Any:
    return torch.ops.inductor_ext.act_mul_quantize(gate, up, "silu", "tensor", *PROGRAMS, E4, [])


def alone(x: Any) -> Any:
    return torch.ops.inductor_ext.fp8_quantize(x, "tensor", *PROGRAMS, E4)


def same_both_ways(monkeypatch: pytest.MonkeyPatch, call: Any, *operands: Any) -> Any:
    found = []
    for launches in ("1", "2"):
        monkeypatch.setenv(LAUNCHES, launches)
        found.append(call(*operands))
    for one, two in zip(*found, strict=True):
        assert_same_bytes(one, two)
    return found[0]


class TestOnTheGpu:
    pytestmark = pytest.mark.gpu(kernels=kernels)

    @pytest.mark.parametrize("dtype", NAMES, ids=str)
    @pytest.mark.parametrize("residual", [True, False])
    def test_norm(self, monkeypatch: Any, residual: bool, dtype: torch.dtype) -> None:
        for rows, columns in (*NORM_ROWS, *BIG_ROWS):
            x, other = (torch.randn(rows, columns, device="cuda").to(dtype) for _ in range(2))
            x[rows // 2] = 0.0
            weight = torch.rand(columns, device="cuda").to(dtype)
            wide = torch.cat([other, x], 1)[:, columns:]
            for given in (x, wide):
                *_, total = same_both_ways(monkeypatch, norm, given, other if residual else None, weight)
            if residual:
                assert_same_bytes(total, x + other)

    @pytest.mark.parametrize("special", [None, float("nan"), float("inf")])
    @pytest.mark.parametrize("dtype", NAMES, ids=str)
    def test_gated_activation(self, monkeypatch: Any, dtype: torch.dtype, special: float | None) -> None:
        for rows, columns in ((1, 8), (1, 3072), (37, 1000), (300, 128), (1024, 3072), *BIG_ROWS):
            gate, up = spoilt(torch.randn(rows, 2 * columns, device="cuda").to(dtype), special).chunk(2, -1)
            out, scale = same_both_ways(monkeypatch, act_mul, gate, up)
            want, want_scale = ACT_MUL.reference(gate, up, "silu", "tensor", *PROGRAMS, E4, [])
            assert_same_bytes(scale, want_scale)
            assert_same_bytes(out, want)

    @pytest.mark.parametrize("special", [None, float("nan"), -float("inf"), -0.0])
    @pytest.mark.parametrize("dtype", NAMES, ids=str)
    def test_alone(self, monkeypatch: Any, dtype: torch.dtype, special: float | None) -> None:
        for rows, columns in ((1, 1), (1, 7), (3, 5), (33, 129), (1, 16384), (7168, 2048), (5003, 8191)):
            x = spoilt(torch.randn(rows, columns, device="cuda").to(dtype), special)
            out, scale = same_both_ways(monkeypatch, alone, x)
            want, want_scale = QUANTIZE.reference(x, "tensor", *PROGRAMS, E4)
            assert_same_bytes(scale, want_scale)
            assert_same_bytes(out, want)

    @pytest.mark.parametrize("rows", [1, 16, 200, 7168])
    def test_in_a_graph_whose_input_changes(self, monkeypatch: Any, rows: int) -> None:
        monkeypatch.setenv(LAUNCHES, "1")
        x, weight = torch.randn(rows, 1024, device="cuda").to(BF16), torch.rand(1024, device="cuda").to(BF16)

        def chain() -> Any:
            out, scale, total = norm(x, x, weight)
            return out, scale, *alone(total), *act_mul(total[:, :512], total[:, 512:])

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the kernels load
            chain()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = chain()
        for factor in (1.0, 9.0, 0.125):
            x.copy_(torch.randn_like(x) * factor)
            for _ in range(20):
                graph.replay()
            torch.cuda.synchronize()
            monkeypatch.setenv(LAUNCHES, "2")
            for one, two in zip(found, chain(), strict=True):
                assert_same_bytes(one, two)
            monkeypatch.setenv(LAUNCHES, "1")

    def test_two_streams_at_once(self, monkeypatch: Any) -> None:
        """Grids that fill the GPU, of which each waits for all its blocks: the two must not hold each other's room."""
        operands = [torch.randn(7168, 2048, device="cuda").to(BF16) for _ in range(2)]
        monkeypatch.setenv(LAUNCHES, "2")
        wanted = [alone(x) for x in operands]
        monkeypatch.setenv(LAUNCHES, "1")
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in operands]
        found: list[list[Any]] = [[], []]
        for _ in range(100):
            for stream, x, each in zip(streams, operands, found):
                with torch.cuda.stream(stream):
                    each.append(alone(x))
        torch.cuda.synchronize()
        for each, (out, scale) in zip(found, wanted):
            for one in each:
                assert_same_bytes(one[0], out)
                assert_same_bytes(one[1], scale)
