"""mxfp8_grouped_mm on a GPU of compute capability 9.0: every tile against fp64, edges, and the ways a kernel is really called.

    pytest -m gpu tests/kernels/test_mxfp8_grouped_mm_gpu.py
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from inductor_ext import jit
from inductor_ext.kernels.mxfp8_grouped_mm import hopper
from inductor_ext.kernels.mxfp8_grouped_mm.op import OP, _numbers, dequantize
from inductor_ext.moe import mx
from tests.support.kernels import build

BF16, FP16, FP32, E4, U8 = torch.bfloat16, torch.float16, torch.float32, mx.DATA, torch.uint8
LIMIT = {BF16: 3e-3, FP16: 5e-4, FP32: 5e-5}  # ‖out - fp64‖ / ‖fp64‖
FP8_LIMIT = {BF16: 3e-3, FP16: 7e-4, FP32: 5e-4}  # FP8 tensor cores keep 14 bits of 32 products' sum, or of 128's
KEYS = [(name, kind, BF16) for kind, names in hopper.ALL_TILES.items() for name in names]
KEYS += [("hopper:64x8", "bf16", FP32), ("hopper:128x32", "bf16", FP16), ("hopper:256x128", "bf16", FP32)]
KEYS += [(name, "mxfp8", BF16) for _, name in hopper.TILES["mxfp8"]]
KEYS += [("hopper:128x128", "mxfp8", FP32), ("hopper:128x128", "fp8", FP32), ("hopper:64x8", "fp8", FP16)]


def kernels(arch: str) -> list[jit.JitSpec]:
    return [OP.spec_of_key((arch, key), arch) for key in KEYS]


pytestmark = pytest.mark.gpu(kernels=kernels, arch=hopper.TARGET)


@pytest.fixture
def modules() -> dict[Any, Any]:
    return dict(zip(KEYS, build(kernels(hopper.TARGET)).values(), strict=True))


def counts_of(kind: str, tokens: int, experts: int) -> list[int]:
    """How many tokens each expert has."""
    if kind == "one":
        return [tokens if e == experts // 2 else 0 for e in range(experts)]
    if kind == "short":  # the last third belongs to no expert
        tokens -= tokens // 3
    made = torch.Generator().manual_seed(tokens + experts)
    picks = torch.randint(0, experts, (tokens,), generator=made)
    if kind == "sparse":
        picks = picks // 16 * 16
    return torch.bincount(picks, minlength=experts).tolist()


def operands(counts: list[int], tokens: int, n: int, k: int, kind: str) -> list[Any]:
    """x, x_scale, w, w_scale, offs; blocks differ in size, so that a scale of the wrong block shows."""
    made = torch.Generator("cuda").manual_seed(n * k + tokens)
    blocks = len(counts), n, k // mx.BLOCK

    def random(*shape: int, most: int) -> torch.Tensor:
        sizes = torch.exp2(torch.randint(-most, most, (*shape, 1), device="cuda", generator=made).float())
        return (torch.randn(*shape, mx.BLOCK, device="cuda", generator=made) * sizes).flatten(-2)

    w, w_scale = mx.quantize(random(*blocks, most=6), "rceil")
    if kind == "fp8_128":  # by contract
        w_scale = w_scale.view(U8)[..., ::4].repeat_interleave(4, -1).view(mx.SCALE)
    x = random(tokens, k // mx.BLOCK, most=3)
    offs = torch.tensor(counts, dtype=torch.int32).cumsum(0).int().cuda()
    return [*quantised(x, kind), w, w_scale, offs]


def quantised(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    if kind == "bf16":
        return x.bfloat16(), None
    if kind == "mxfp8":
        return mx.quantize(x, "rceil")
    scale = x.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448.0 if x.numel() else x.new_ones(x.shape[0], 1)
    return (x / scale).to(E4), scale


def exact(x: Any, x_scale: Any, w: Any, w_scale: Any, offs: Any) -> torch.Tensor:
    """NaN in rows of no group."""
    left = x.double() if x_scale is None else _numbers(x, x_scale, torch.float64)
    wanted = torch.full((x.shape[0], w.shape[1]), torch.nan, device="cuda", dtype=torch.float64)
    ends = offs.tolist()
    for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends)):
        if start < end:
            wanted[start:end] = left[start:end] @ dequantize(w[e], w_scale[e], torch.float64).t()
    return wanted


def run(module: Any, key: Any, given: list[Any]) -> torch.Tensor:
    """Into the middle of a buffer of NaN: what is not written shows, and what is written outside."""
    tokens, n = given[0].shape[0], given[2].shape[1]
    buffer = torch.full((tokens + 2, n), torch.nan, device="cuda", dtype=key[2])
    hopper.bind(module, key)(*given, buffer[1:-1])
    assert buffer[0].isnan().all() and buffer[-1].isnan().all(), "written outside of out"
    return buffer[1:-1]


def check(module: Any, key: Any, given: list[Any], what: Any = "") -> None:
    found, wanted, rows = run(module, key, given).double(), exact(*given), int(given[4][-1])
    assert found[rows:].isnan().all(), f"rows of no group were written: {what}"
    error = (found[:rows] - wanted[:rows]).norm() / wanted[:rows].norm().clamp_min(1e-30)
    limit = (FP8_LIMIT if key[1].startswith("fp8") else LIMIT)[key[2]]
    assert rows == 0 or error < limit, (what, float(error))


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key[0]}-{key[1]}-{key[2]}".replace("torch.", ""))
def test_every_tile_against_fp64(modules: dict[Any, Any], key: Any) -> None:
    """Around the tile's edges; K of less than a stage, with odd rows of scales, and of more stages than the ring has."""
    channels, tokens, cluster = hopper.sizes(key[0])
    counts = [1, 0, tokens + 1, tokens // 4, 0, tokens // 2, tokens // 2 + 1, tokens]
    for n, k in itertools.product((8, 64, channels * cluster + 40), (32, 96, 768, 2048)):
        if key[1] == "fp8_128" and k % 128:
            continue
        check(modules[key], key, operands(counts, sum(counts) + 3, n, k, key[1]), (n, k))


@pytest.mark.parametrize("x_kind", list(hopper.KINDS))
@pytest.mark.parametrize("kind", ["uniform", "one", "sparse", "short"])
def test_distributions(modules: dict[Any, Any], kind: str, x_kind: str) -> None:
    """With the tile that a call takes."""
    shapes = (64, 128 if x_kind == "fp8_128" else 96), (1536, 768)
    for tokens, experts, (n, k) in itertools.product((0, 1, 7, 64, 513, 4096), (1, 8, 128), shapes):
        key = hopper.tile(x_kind, tokens, experts), x_kind, BF16
        given = operands(counts_of(kind, tokens, experts), tokens, n, k, x_kind)
        check(modules[key], key, given, (tokens, experts, n, k))


def test_the_models_that_are_measured(modules: dict[Any, Any]) -> None:
    for experts, n, k, tokens in ((128, 1536, 2048, 512), (128, 2048, 768, 8), (8, 28672, 4096, 128), (8, 4096, 14336, 16)):
        key = hopper.tile("bf16", tokens, experts), "bf16", BF16
        check(modules[key], key, operands(counts_of("uniform", tokens, experts), tokens, n, k, "bf16"), (n, k, tokens))


def test_every_scale_and_element(modules: dict[Any, Any]) -> None:
    """The instructions that convert, where the CPU has only their definitions: 256 scales by 256 elements, one by one."""
    every = torch.arange(256, dtype=U8, device="cuda")
    values, scales = every.view(E4).double(), mx.power_of_two(every.view(mx.SCALE)).double()
    key = "hopper:64x8", "bf16", FP32
    one = torch.tensor([1], dtype=torch.int32, device="cuda")
    x = torch.zeros(1, 32, device="cuda", dtype=BF16)
    x[0, 5] = 1.0
    for element in range(256):
        w = torch.zeros(1, 256, 32, dtype=U8, device="cuda")
        w[:, :, 5] = element
        found = run(modules[key], key, [x, None, w.view(E4), every.reshape(1, 256, 1).view(mx.SCALE), one])[0]
        wanted = (values[element] * scales).float().bfloat16().float()
        same = (found == wanted) | (found.isnan() & wanted.isnan())
        assert same.all(), (element, every[~same].tolist()[:8], found[~same][:8].tolist(), wanted[~same][:8].tolist())


def test_nan_and_infinity_stay_in_their_rows(modules: dict[Any, Any]) -> None:
    for key in (("hopper:64x8", "bf16", BF16), ("hopper:256x128", "bf16", BF16)):
        given = operands([4, 0, 5], 9, 72, 96, key[1])
        given[0][1, 5], given[0][2, 6] = torch.nan, torch.inf
        given[3].view(U8)[2, 3, 0] = 255
        found = run(modules[key], key, given)
        assert found[1].isnan().all() and not found[2].isfinite().any()
        assert found[4:, 3].isnan().all()
        found[1:3], found[4:, 3] = 0, 0
        assert found.isfinite().all()


def test_rows_with_a_pitch(modules: dict[Any, Any]) -> None:
    key = "hopper:64x8", "bf16", BF16
    given = operands([3, 2], 6, 64, 96, "bf16")
    wide = torch.zeros(6, 160, device="cuda", dtype=BF16)
    wide[:, 32:128] = given[0]
    check(modules[key], key, [wide[:, 32:128], *given[1:]])


def test_offs_out_of_order_or_range_writes_nothing_outside(modules: dict[Any, Any]) -> None:
    wrong = [-4, 3, 9], [5, 2, 9], [2, 4000, 2**31 - 1]
    for key, ends in itertools.product((KEYS[0], ("hopper:256x128", "bf16", BF16)), wrong):
        given = operands([3, 3, 3], 9, 64, 96, "bf16")
        given[4] = torch.tensor(ends, dtype=torch.int32, device="cuda")
        run(modules[key], key, given)
    torch.cuda.synchronize()


# ---- through the op --------------------------------------------------------------------------------------------------


def through_the_op(given: list[Any], out: torch.Tensor) -> None:
    torch.ops.inductor_ext.mxfp8_grouped_mm.out(*given, BF16, False, 32, out=out)


def near(found: torch.Tensor, given: list[Any]) -> bool:
    wanted, rows = exact(*given), int(given[4][-1])
    return bool((found[:rows].double() - wanted[:rows]).norm() < LIMIT[BF16] * wanted[:rows].norm())


def test_the_op_takes_these_kernels(modules: dict[Any, Any]) -> None:
    given = operands(counts_of("uniform", 64, 8), 64, 64, 768, "bf16")
    expected = (hopper.TARGET, ("hopper:128x16", "bf16", BF16))
    assert OP.kernel is not None and OP.kernel.key(*given, BF16, False, 32) == expected
    assert near(torch.ops.inductor_ext.mxfp8_grouped_mm(*given, BF16, False, 32), given)
    bytes_for_scales = [*given[:3], given[3].view(U8), given[4]]
    assert near(torch.ops.inductor_ext.mxfp8_grouped_mm(*bytes_for_scales, BF16, False, 32), given)


def test_another_stream(modules: dict[Any, Any]) -> None:
    """The kernel waits for what is ahead of it in its own stream, also where it starts before that has ended."""
    given = operands(counts_of("uniform", 64, 8), 64, 64, 768, "bf16")
    x, out = given[0].clone(), torch.empty(64, 64, device="cuda", dtype=BF16)
    stream = torch.cuda.Stream()
    for _ in range(20):
        x.zero_()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000)
            x.copy_(given[0])
            through_the_op([x, *given[1:]], out)
        stream.synchronize()
        assert near(out, given)


def test_a_cuda_graph_with_offs_that_change(modules: dict[Any, Any]) -> None:
    given = operands(counts_of("uniform", 64, 8), 64, 64, 768, "bf16")
    out = torch.empty(64, 64, device="cuda", dtype=BF16)
    through_the_op(given, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        through_the_op(given, out)
    for kind in ("one", "short", "uniform", "sparse"):
        given[4].copy_(torch.tensor(counts_of(kind, 64, 8), dtype=torch.int32).cumsum(0))
        out.fill_(torch.nan)
        graph.replay()
        assert near(out, given) and out[int(given[4][-1]) :].isnan().all(), kind


def test_the_same_bytes_every_time(modules: dict[Any, Any]) -> None:
    given = operands(counts_of("uniform", 4096, 128), 4096, 1536, 768, "bf16")
    first, again = (torch.zeros(4096, 1536, device="cuda", dtype=BF16) for _ in range(2))
    through_the_op(given, first)
    for _ in range(10):
        through_the_op(given, again)
        assert torch.equal(first, again)


def test_errors_name_the_argument(modules: dict[Any, Any]) -> None:
    x, _, w, w_scale, offs = operands([4, 4], 8, 16, 64, "bf16")
    out = torch.empty(8, 16, device="cuda", dtype=BF16)
    launch = modules[KEYS[0]].run
    for given, message in (
        ((x, None, w[:, :12].contiguous(), w_scale, offs, out), "w: wanted .* N a multiple of 8"),
        ((x, None, w, w_scale[:, :, :1].contiguous(), offs, out), r"w_scale: wanted shape \[E = 2"),
        ((x, w_scale[0], w, w_scale, offs, out), "x_scale: wanted None for bfloat16 x, found a tensor"),
        ((x, None, w, w_scale, offs[:1], out), r"offs: wanted shape \[E = 2"),
        ((x, None, w, w_scale, offs.long(), out), "offs: wanted int32, found int64"),
        ((x, None, w, w_scale, offs, out[:4]), r"out: wanted shape \[T = 8"),
        ((x.t().contiguous().t(), None, w, w_scale, offs, out), "x: wanted strides"),
        ((x, None, w, w_scale, offs, torch.empty(8, 17, device="cuda", dtype=BF16)[:, :16]), "out: wanted rows that start"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            launch(*given)
