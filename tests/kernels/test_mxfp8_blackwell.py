"""mxfp8_grouped_mm's SM100 kernels: no GPU has run them. What CUTLASS is given, and what it makes of it, are looked at instead.

Where groups lie is worked out by a kernel of ours, which runs on the CPU here, and on any GPU. What it writes for CUTLASS, and
where CUTLASS's own layouts expect a scale, the compiled module tells on the host. The product itself is PTX and machine code.
"""

from __future__ import annotations

import ctypes
import os
import re
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext import jit, settings
from inductor_ext.kernels.mxfp8_grouped_mm import blackwell
from inductor_ext.kernels.mxfp8_grouped_mm import op as grouped
from inductor_ext.moe import mx
from tests.support import cuda_on_cpu
from tests.support.fakegpu import H200, fake_gpu
from tests.support.machine_code import Built

ops = torch.ops.inductor_ext
E4, E8, BF16 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16
GROUPS = {
    "one": [7],
    "even": [128, 256, 384],
    "ragged": [1, 130, 131, 390],
    "empty_experts": [0, 5, 5, 5, 200, 200],
    "all_on_one": [0, 0, 1000, 1000],
    "no_tokens": [0, 0, 0],
    "rows_of_no_group": [3, 4, 9],
    "more_than_a_warp": [13 * i for i in range(1, 41)],
    "more_than_a_block": [17 * (i // 2) for i in range(1, 301)],
}


def places(ends: list[int], n: int, k: int, out_size: int) -> list[list[int]]:
    """Tokens, and bytes from the start of x, x_scale, w, w_scale and out, of every group."""
    scale_rows = mx.group_starts(torch.tensor(ends, dtype=torch.int32)).tolist()
    rows, columns = mx.swizzled_shape(n, k // mx.BLOCK)
    found = []
    for group, (start, end) in enumerate(zip([0, *ends], ends)):
        x, out, x_scale = (start * k, start * n * out_size, scale_rows[group] * columns) if end > start else (0, 0, 0)
        found.append([end - start, x, x_scale, group * n * k, group * rows * columns, out])
    return found


# ---- where groups lie ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group_table(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = cuda_on_cpu.compiled("group_table", tmp_path_factory.mktemp("groups"))

    def run(ends: list[int], tokens: int, n: int, k: int, out_size: int, scale_rows: int, in_order: bool = False) -> Any:
        offs, table = torch.tensor(ends, dtype=torch.int32), torch.full((len(ends), 6), -1)
        sizes = map(ctypes.c_int64, (tokens, len(ends), n, k, out_size, scale_rows))
        pointers = ctypes.c_void_p(offs.data_ptr()), ctypes.c_void_p(table.data_ptr())
        library.group_table(pointers[0], *sizes, ctypes.c_bool(in_order), pointers[1])
        return table.tolist()

    return run


@pytest.mark.parametrize("in_order", [False, True], ids=["kernel", "in_order"])
@pytest.mark.parametrize("ends", GROUPS.values(), ids=GROUPS)
def test_where_groups_lie(group_table: Any, ends: list[int], in_order: bool) -> None:
    tokens = ends[-1] + 11
    scale_rows = mx.grouped_shape(tokens, 1, len(ends))[0]
    for n, k, out_size in ((128, 128, 2), (200, 160, 2), (2048, 7168, 4)):
        assert group_table(ends, tokens, n, k, out_size, scale_rows, in_order) == places(ends, n, k, out_size)


@pytest.mark.parametrize("in_order", [False, True], ids=["kernel", "in_order"])
def test_offsets_beyond_32_bits(group_table: Any, in_order: bool) -> None:
    ends = [600_000, 600_001, 1_200_000]
    scale_rows = mx.grouped_shape(ends[-1], 1, 3)[0]
    assert group_table(ends, ends[-1], 8192, 16384, 4, scale_rows, in_order) == places(ends, 8192, 16384, 4)


@pytest.mark.parametrize(
    "ends", [[-5, 3, 10], [50, 20, 10], [100, 300, 90], [2**31 - 1] * 3, [-(2**31), 2**31 - 1, 0] * 100, [0, 256] * 64]
)
def test_no_offs_reaches_past_a_tensor(group_table: Any, ends: list[int]) -> None:
    tokens, n, k = 256, 64, 96
    scale_rows = mx.grouped_shape(tokens, 1, len(ends))[0]
    for in_order in (False, True):
        for count, x, x_scale, _, _, out in group_table(ends, tokens, n, k, 2, scale_rows, in_order):
            assert 0 <= x <= (tokens - count) * k and 0 <= out <= (tokens - count) * n * 2
            assert x_scale >= 0 and x_scale // 4 + mx.round_up(count, 128) <= scale_rows


def test_too_few_rows_of_scales_leave_groups_out(group_table: Any) -> None:
    tokens = [row[0] for row in group_table([100, 200, 300], 300, 64, 128, 2, 256)]
    assert tokens == [100, 100, 0]


@pytest.mark.gpu
def test_where_groups_lie_on_a_gpu(tmp_path: Any) -> None:
    """The set-up kernel needs no Blackwell."""
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
    source, exported = "mxfp8_grouped_mm/group_table.cuh", (("run", "inductor_ext::GroupTable::run"),)
    import tvm_ffi

    module = tvm_ffi.load_module(str(Built(jit.JitSpec("group_table", source, exported, arch), tmp_path / "built").binary))
    for ends in GROUPS.values():
        tokens, table = ends[-1] + 11, torch.full((len(ends), 6), -1, device="cuda")
        scale_rows = mx.grouped_shape(tokens, 1, len(ends))[0]
        module.run(torch.tensor(ends, dtype=torch.int32, device="cuda"), tokens, 200, 160, 2, scale_rows, table)
        assert table.tolist() == places(ends, 200, 160, 2)


# ---- the compiled kernels --------------------------------------------------------------------------------------------

#: Each takes a minute: CI compiles one.
COMPILED = ["blackwell:256x128@2x1"] if os.environ.get("CI") else list(blackwell.ARGUMENTS)


@pytest.fixture(scope="module", params=COMPILED)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    key = request.param, BF16
    extra = tuple((name, f"{blackwell.made(key)}::{name}") for name in ("set_up", "scale_bytes", "scratch_bytes"))
    spec = jit.JitSpec("mxfp8_grouped_mm", blackwell.SOURCE, blackwell.exports(key) + extra, blackwell.TARGET)
    return request.param, Built(spec, tmp_path_factory.mktemp("blackwell") / "built")


@pytest.fixture(scope="module")
def module(built: Any) -> Any:
    import tvm_ffi

    return tvm_ffi.load_module(str(built[1].binary))


@pytest.mark.nvcc
@pytest.mark.slow
def test_tensor_cores_apply_the_scales(built: Any) -> None:
    """kind::mxf8f6f4.block_scale, by one SM or two; scales go from shared to tensor memory; weights and tokens come by TMA."""
    tile, code = built
    pair = tile.endswith("@2x1")
    used = set(re.findall(r"tcgen05\.mma\.cta_group::(\d)\.kind::(\w+(?:\.\w+)?)", code.ptx))
    assert used == {("2" if pair else "1", "mxf8f6f4.block_scale")}
    assert "wgmma" not in code.ptx and "mma.sync" not in code.ptx
    assert set(re.findall(r"tcgen05\.cp\.cta_group::(\d)", code.ptx)) == {"2" if pair else "1"}
    if code.sass:
        assert set(code.instructions("UTC[A-Z]*MMA")) == {"UTCQMMA.2CTA" if pair else "UTCQMMA"}
        assert {name.endswith("2CTA") for name in code.instructions("UTMALDG")} == {pair}
        assert {"2CTA" in name for name in code.instructions("UTCCP")} == {pair}
        assert code.instructions("UTMASTG")


@pytest.mark.nvcc
@pytest.mark.slow
def test_nothing_is_read_before_the_kernel_ahead_has_ended(built: Any) -> None:
    """CUTLASS reads groups' shapes before it waits; the set-up kernel ahead would still be writing them."""
    _, code = built
    kernels = code.ptx.split(".entry ")[1:]
    assert sorted("set_up_groups" in body.splitlines()[0] for body in kernels) == [False, True]
    for body in kernels:
        touched = re.findall(r"griddepcontrol\.\w+|(?:ld|st)\.(?:volatile\.)?global|cp\.async\.bulk", body)
        assert touched[0] == "griddepcontrol.wait"
        assert "griddepcontrol.launch_dependents" in touched


@pytest.mark.nvcc
@pytest.mark.slow
def test_nothing_spills(built: Any) -> None:
    _, code = built
    assert ".local" not in code.ptx
    assert code.instructions("STL|LDL") == []


@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.parametrize("rows, k", [(1, 32), (33, 64), (128, 128), (200, 160), (640, 1056), (129, 7168)])
def test_cutlass_expects_scales_where_they_are(module: Any, rows: int, k: int) -> None:
    """Its layouts of both operands, against moe/mx.py and against the formula itself."""
    row, block = torch.arange(rows)[:, None], torch.arange(k // mx.BLOCK)[None]
    tile = row // 128 * ((k + 127) // 128) + block // 4
    wanted = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
    assert torch.equal(wanted, mx.swizzled_offset(row, block, k // mx.BLOCK).expand(wanted.shape))
    for of_x in (False, True):
        found = torch.full((rows, k // mx.BLOCK), -1)
        module.scale_bytes(k, of_x, found)
        assert torch.equal(found, wanted), f"of_x={of_x}"


@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.parametrize("ends", GROUPS.values(), ids=GROUPS)
def test_what_cutlass_is_given(module: Any, ends: list[int]) -> None:
    """Shapes, pointers, strides and layouts of every group, in the arrays that it reads them from."""
    experts, tokens, n, k, sms = len(ends), ends[-1] + 11, 200, 160, 148
    size = blackwell.scratch_bytes(experts, sms)
    assert module.scratch_bytes(experts, sms) == size
    scratch = torch.zeros(size, dtype=torch.uint8)
    offs = torch.tensor(ends, dtype=torch.int32)
    module.set_up(offs, tokens, n, k, mx.grouped_shape(tokens, 1, experts)[0], sms, scratch)
    start = -scratch.data_ptr() % 128
    at = start + 5 * 128 * sms
    assert not scratch[:at].any(), "TMA descriptors are CUTLASS's to write"

    def take(columns: int, dtype: torch.dtype) -> Any:
        nonlocal at
        used = experts * columns * dtype.itemsize
        found = scratch[at : at + used].view(dtype).view(experts, columns).tolist()
        at += mx.round_up(used, 64)
        return found

    shapes = take(3, torch.int32)
    w, x, w_scale, x_scale, out = (take(1, torch.int64) for _ in range(5))
    w_stride, x_stride, out_stride = (take(1, torch.int64) for _ in range(3))
    w_layout, x_layout = (take(5, torch.int32) for _ in range(2))
    assert at == start + size - 128
    tiles = 2  # along K
    for group, place in enumerate(places(ends, n, k, 2)):
        assert shapes[group] == [n, place[0], k]
        assert [x[group], x_scale[group], w[group], w_scale[group], out[group]] == [[each] for each in place[1:]]
        assert (w_stride[group], x_stride[group], out_stride[group]) == ([k], [k], [n])
        # tiles along rows and along K, batches; bytes from one tile to the next along rows, from a batch to the next
        assert w_layout[group][:4] == [2, tiles, 1, 512 * tiles]
        assert x_layout[group][:4] == [mx.ceil_div(place[0], 128), tiles, 1, 512 * tiles]


@pytest.mark.nvcc
@pytest.mark.slow
def test_errors_name_the_argument(module: Any) -> None:
    """The host function, without a GPU: as far as it gets with tensors of a CPU."""
    x, w = torch.zeros(4, 128).to(E4), torch.zeros(2, 64, 128).to(E4)
    scales, offs = torch.zeros(260, 4, dtype=torch.uint8).view(E8), torch.tensor([1, 4], dtype=torch.int32)
    out, scratch = torch.empty(4, 64, dtype=BF16), torch.empty(0, dtype=torch.uint8)
    with pytest.raises(TypeError, match="x: wanted float8_e4m3fn, found bfloat16"):
        module.run(x.to(BF16), scales, w, scales, offs, out, scratch)
    with pytest.raises(ValueError, match="x: wanted a CUDA tensor"):
        module.run(x, scales, w, scales, offs, out, scratch)
    with pytest.raises(ValueError, match=r"scratch: wanted shape \[\d+\], found \[0\]"):
        module.set_up(offs, 4, 64, 128, 260, 148, scratch)


# ---- on a GPU, which none has been so far ----------------------------------------------------------------------------


def kernels(arch: str, tile: str, out_dtype: torch.dtype) -> list[jit.JitSpec]:
    return [grouped.OP.spec_of_key((arch, (tile, out_dtype)), arch)]


def problem(ends: list[int], n: int, k: int, seed: int = 0) -> tuple[list[Any], torch.Tensor]:
    """Arguments up to ``offs``, on a CPU, and the product."""
    generator = torch.Generator().manual_seed(seed)
    tokens, offs = ends[-1] + 11, torch.tensor(ends, dtype=torch.int32)
    x = torch.randn(tokens, k, generator=generator).bfloat16()
    w = torch.randn(len(ends), n, k, generator=generator).bfloat16()
    given = [*ops.mxfp8_quantize(x, offs, "rceil", True), *ops.mxfp8_quantize(w, None, "rceil", True), offs]
    return given, ops.mxfp8_grouped_mm(*given, torch.float32, True, 32)


def assert_is_product(out: torch.Tensor, wanted: torch.Tensor, rows: int) -> None:
    """fp32 sums in another order, rounded to out's dtype; rows of no group as they were, which was 7."""
    torch.testing.assert_close(out[:rows].float().cpu(), wanted[:rows], rtol=2**-7, atol=2**-7)
    assert (out[rows:] == 7).all()


@pytest.mark.gpu(kernels=kernels, arch=blackwell.TARGET)
@pytest.mark.parametrize("out_dtype", list(blackwell.OUT_TYPES), ids=str)
@pytest.mark.parametrize("tile", list(blackwell.ARGUMENTS))
def test_products_of_every_tile(tile: str, out_dtype: torch.dtype) -> None:
    key = blackwell.TARGET, (tile, out_dtype)
    run = grouped.OP.kernel.bind(jit.load(grouped.OP.spec_of_key(key, blackwell.TARGET), settings.current()), key)
    for ends in GROUPS.values():
        for n, k in ((264, 160), (512, 1024)):
            given, wanted = problem(ends, n, k)
            out = torch.full(wanted.shape, 7, dtype=out_dtype, device="cuda")
            run(*(each.cuda() for each in given), out_dtype, True, 32, out)
            assert_is_product(out, wanted, ends[-1])


@pytest.mark.gpu(arch=blackwell.TARGET)
def test_streams_and_graphs_share_no_scratch() -> None:
    """Each of four streams has a graph of the op and calls of its own, all at once."""
    cases = [problem(ends, 512, 1024, seed) for seed, ends in enumerate(([64, 128], [0, 300], [5, 5], [200, 1000]))]
    given = [[each.cuda() for each in arguments] for arguments, _ in cases]
    graphs, eager = [], []
    call = lambda arguments, out: ops.mxfp8_grouped_mm.out(*arguments, BF16, True, 32, out=out)  # noqa: E731
    outs = [[torch.full(wanted.shape, 7, dtype=BF16, device="cuda") for _ in range(2)] for _, wanted in cases]
    for arguments, (one, _) in zip(given, outs):
        call(arguments, one)  # loads the kernel
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            call(arguments, one)
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, arguments, (_, two) in zip(graphs, given, outs):
            eager.append(torch.cuda.Stream())
            with torch.cuda.stream(eager[-1]):
                graph.replay()
                call(arguments, two)
    torch.cuda.synchronize()
    for (arguments, wanted), pair in zip(cases, outs):
        for out in pair:
            assert_is_product(out, wanted, int(arguments[-1][-1]))


# ---- which kernel ----------------------------------------------------------------------------------------------------


def call(tokens: int = 64, experts: int = 8, n: int = 256, **changed: Any) -> dict[str, Any]:
    given = {"x": torch.empty(tokens, 128, dtype=E4), "x_scale": torch.empty(tokens + 128 * experts, 4, dtype=E8)}
    given |= {"w": torch.empty(experts, n, 128, dtype=E4), "out_dtype": BF16, "swizzled": True, "w_block": 32}
    return given | changed


@pytest.fixture
def blackwell_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as those of a GPU of compute capability 10.0."""
    monkeypatch.setattr(grouped, "target_of", lambda device: blackwell.TARGET)


@pytest.mark.parametrize(
    "tokens, name",
    [(0, "128x64"), (512, "128x64"), (513, "128x128"), (1024, "128x128"), (4096, "256x128@2x1"), (4097, "256x256@2x1")],
)
def test_the_tile_follows_the_tokens_an_expert_has(blackwell_here: None, tokens: int, name: str) -> None:
    assert grouped.key(**call(tokens)) == (blackwell.TARGET, (f"blackwell:{name}", BF16))


def test_what_no_kernel_serves(blackwell_here: None) -> None:
    """Plain scales run PyTorch's operators: weights are swizzled once, when they are quantised, and not at every call."""
    assert grouped.key(**call(swizzled=False)) is None and grouped.keys(**call(swizzled=False)) == []
    assert grouped.key(**call(x_scale=None, x=torch.empty(64, 128, dtype=BF16))) is None
    assert grouped.key(**call(n=252)) is None
    assert grouped.key(**call(n=252, out_dtype=torch.float32)) is not None
    given = call(n=252)
    reason = blackwell.unsupported(given["x"], given["x_scale"], given["w"], BF16, True)
    assert reason == ("N to be a multiple of 8: rows of out start at multiples of 16 bytes", "N = 252")


def test_a_symbolic_number_of_tokens_needs_every_tile(blackwell_here: None) -> None:
    given, environment = call(), ShapeEnv()
    with FakeTensorMode(shape_env=environment):
        x = torch.empty(environment.create_unbacked_symint(), 128, dtype=E4)
    assert [name for _, (name, _) in grouped.keys(**{**given, "x": x})] == list(blackwell.ARGUMENTS)
    assert grouped.keys(**given) == [grouped.key(**given)]


def test_generated_code_plans_the_scratch() -> None:
    """A buffer of Inductor's beside the output's, given to the kernel and to nothing else; on Hopper there is none."""

    def fn(x: Any, x_scale: Any, w: Any, w_scale: Any, offs: Any) -> Any:
        return torch.ops.inductor_ext.mxfp8_grouped_mm(x, x_scale, w, w_scale, offs, BF16, True, 32).relu()

    def inputs() -> Any:
        def empty(*shape: int, dtype: torch.dtype) -> Any:
            return torch.empty(shape, dtype=dtype, device="cuda")

        scales = empty(64 + 128 * 8, 4, dtype=torch.uint8), empty(8, 256 * 4, dtype=torch.uint8)
        return empty(64, 128, dtype=E4), scales[0], empty(8, 256, 128, dtype=E4), scales[1], empty(8, dtype=torch.int32)

    for capability in ((10, 0), (9, 0)):
        for dynamic in (False, True):
            with fake_gpu(capability) as gpu:
                source = gpu.source(fn, inputs, backend=inductor_ext.backend(build="defer"), dynamic=dynamic)
            (call,) = re.findall(r"extern_kernels\.inductor_ext_mxfp8_grouped_mm\(.*\)", source)
            if capability == (9, 0):
                assert "scratch" not in call
                continue
            (name,) = re.findall(r"scratch=(buf\d+)", call)
            size = str(blackwell.scratch_bytes(8, H200.multi_processor_count))
            (planned,) = re.findall(rf"{name} = empty_strided_cuda\(\((.*), \), \(1, \), torch\.uint8\)", source)
            assert planned == size or (dynamic and "//" in planned)  # the number of experts may be symbolic too
            assert f"out={name}" not in call and source.count(f"={name}") == 1


def test_the_source_says_that_it_has_not_run() -> None:
    assert "NOT RUN ON HARDWARE" in (jit.kernels_root() / blackwell.SOURCE).read_text()
