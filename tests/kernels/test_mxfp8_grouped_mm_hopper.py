"""mxfp8_grouped_mm's kernels for compute capability 9.0 without a GPU: their source run on the CPU, their arithmetic, their
machine code, and which tile is chosen."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

from inductor_ext import jit
from inductor_ext.kernels.mxfp8_grouped_mm import hopper
from inductor_ext.kernels.mxfp8_grouped_mm import op as grouped
from inductor_ext.kernels.mxfp8_grouped_mm.op import OP
from inductor_ext.moe import mx
from inductor_ext.moe import weight as weights
from tests.support.equal import assert_same_bytes
from tests.support.hopper_on_cpu import Kernel
from tests.support.machine_code import Built

BF16, FP16, FP32, E4, E8 = torch.bfloat16, torch.float16, torch.float32, mx.DATA, mx.SCALE
TILES = {
    "64x8": ("hopper:64x8", "bf16", BF16),
    "128x32": ("hopper:128x32", "bf16", FP32),
    "256x128": ("hopper:256x128", "bf16", BF16),
    "fp16 out": ("hopper:128x64", "bf16", FP16),
    "fp8 64x8": ("hopper:64x8", "fp8", FP32),
    "fp8 128x128": ("hopper:128x128", "fp8", BF16),  # two products beside the sums
    "fp8 256x128": ("hopper:256x128", "fp8", BF16),  # one
    "fp8 by 128": ("hopper:128x32", "fp8_128", FP32),
    "cluster of 256 tokens": ("hopper:128x256@2", "bf16", BF16),
    "fp8 by 128 cluster": ("hopper:256x128@2", "fp8_128", BF16),
    "cluster along tokens": ("hopper:256x128@1x2", "fp8_128", BF16),
}


@pytest.fixture(scope="module", params=list(TILES))
def tile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(key, kernel, output channels and tokens of a cluster's tile)"""
    key = TILES[request.param]
    channels, tokens, cluster = hopper.sizes(key[0])
    of_cluster = (channels, tokens * cluster) if key[0].endswith("@1x2") else (channels * cluster, tokens)
    return key, Kernel(key, tmp_path_factory.mktemp("hopper")), *of_cluster


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    return Kernel(("hopper:64x8", "bf16", FP32), tmp_path_factory.mktemp("narrow"))


def operands(counts: list[int], tokens: int, n: int, k: int, kind: str, seed: int = 0) -> list[Any]:
    """x, x_scale, w, w_scale, offs; blocks differ in size, so that a scale of the wrong block shows."""
    torch.manual_seed(seed)
    spread = lambda shape, most: torch.exp2(torch.randint(-most, most, shape).float())  # noqa: E731
    blocks = len(counts), n, k // mx.BLOCK, 1
    w, w_scale = mx.quantize((torch.randn(*blocks[:3], mx.BLOCK) * spread(blocks, 6)).flatten(-2), "rceil")
    if kind == "fp8_128":
        w_scale = w_scale.view(torch.uint8)[..., ::4].repeat_interleave(4, -1).view(E8)
    x = (torch.randn(tokens, k // mx.BLOCK, mx.BLOCK) * spread((tokens, k // mx.BLOCK, 1), 3)).flatten(-2)
    offs = torch.tensor(counts, dtype=torch.int32).cumsum(0).int()
    return [*quantised(x, kind), w, w_scale, offs]


def quantised(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    if kind == "bf16":
        return x.bfloat16(), None
    scale = x.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448.0
    return (x / scale).to(E4), scale


def k_of(key: Any, k: int) -> int:
    """K that the kernel takes: one that reads a scale for 128 elements has no use for less."""
    return -(-k // 128) * 128 if key[1] == "fp8_128" else k


def run(kernel: Kernel, given: list[Any], out_dtype: torch.dtype, **options: Any) -> torch.Tensor:
    """Between two rows that must not be written; rows of no group are NaN before and after."""
    tokens, n = given[0].shape[0], given[2].shape[1]
    buffer = torch.full((tokens + 2, n), torch.nan, dtype=out_dtype)
    kernel(*given, buffer[1:-1], **options)
    assert buffer[[0, -1]].isnan().all(), "written outside of out"
    return buffer[1:-1]


def check(key: Any, kernel: Kernel, given: list[Any], **options: Any) -> None:
    x, x_scale, w, w_scale, offs = given
    found = run(kernel, given, key[2], **options)
    wanted = torch.full_like(found, torch.nan)
    grouped.reference_into(x, x_scale, w, w_scale, offs, key[2], False, 128 if key[1] == "fp8_128" else 32, wanted)
    rows = int(offs[-1])
    assert found[rows:].isnan().all(), "rows of no group were written"
    error = (found[:rows].double() - wanted[:rows].double()).norm() / wanted[:rows].double().norm().clamp_min(1e-30)
    assert error < {BF16: 5e-4, FP16: 1e-4, FP32: 2e-6}[key[2]]


# ---- the source, on the CPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k", [32, 96, 128, 352, 768], ids=["one block", "less than a stage", "a stage", "odd rows of scales", "six stages"]
)
def test_against_the_reference(tile: Any, k: int) -> None:
    """Groups that are empty, of one token, of a quarter, half and all of a tile, and more; N that is no multiple of a tile."""
    key, kernel, channels, tokens = tile
    counts = [1, 0, tokens + 1, tokens // 4, 0, 0, tokens // 2, tokens // 2 + 1, tokens]
    check(key, kernel, operands(counts, sum(counts), channels + 40, k_of(key, k), key[1]))


def test_rows_of_no_group_stay_as_they_are(tile: Any) -> None:
    key, kernel, _, tokens = tile
    check(key, kernel, operands([3, 2], tokens + 9, 64, k_of(key, 64), key[1]))
    check(key, kernel, operands([0, 0, 0], 4, 64, k_of(key, 64), key[1]))


def test_all_tokens_on_one_expert(tile: Any) -> None:
    key, kernel, _, tokens = tile
    check(key, kernel, operands([0] * 40 + [3 * tokens + 2] + [0] * 87, 3 * tokens + 2, 8, k_of(key, 64), key[1]), clusters=1)


def test_more_rounds_than_stages(tile: Any) -> None:
    """The ring goes round many times, over several tiles and with all SMs in turn."""
    key, kernel, channels, tokens = tile
    check(key, kernel, operands([tokens, tokens], 2 * tokens, 2 * channels, 1280, key[1]), clusters=1)


def test_a_cluster_whose_last_cta_has_no_channels_or_tokens(tile: Any) -> None:
    """It brings its share of what both need nevertheless."""
    key, kernel, channels, tokens = tile
    check(key, kernel, operands([tokens, 3], tokens + 3, channels + 8, 640, key[1]))
    check(key, kernel, operands([0, tokens // 2 + 1], tokens, 8, 256, key[1]))


def test_no_token(tile: Any) -> None:
    key, kernel, _, _ = tile
    given = operands([0, 0], 0, 16, k_of(key, 64), key[1])
    assert run(kernel, given, key[2]).shape == (0, 16)


def test_rows_with_a_pitch(tile: Any) -> None:
    key, kernel, _, tokens = tile
    k = k_of(key, 64)
    given = operands([tokens // 2, 3], tokens, 24, k, key[1])
    wide = torch.zeros(tokens, k + 32).to(given[0].dtype)
    wide[:, 16:-16] = given[0]
    given[0] = wide[:, 16:-16]
    check(key, kernel, given)


def test_the_scales_of_the_next_row_do_not_count(tile: Any) -> None:
    """K = 96: a row has three scales, and what is copied for its stage ends with the next row's first one, here a NaN."""
    key, kernel, _, _ = tile
    if key[1] == "fp8_128":
        return
    given = operands([4, 5], 9, 16, 96, key[1])
    _, x_scale, _, w_scale, _ = given
    w_scale.view(torch.uint8)[:, 3, 0] = 255
    if x_scale is not None:
        x_scale[6] = torch.nan
    wanted = torch.zeros(9, 16, dtype=torch.bool)
    wanted[:, 3] = True
    wanted[6] = x_scale is not None
    wanted[6, 3] = True
    assert torch.equal(run(kernel, given, key[2]).isnan(), wanted)


def test_a_scale_for_128_elements_wants_whole_ones_and_reads_the_first_of_four(tile: Any) -> None:
    key, kernel, _, _ = tile
    if key[1] != "fp8_128":
        return
    with pytest.raises(RuntimeError, match="w: wanted K to be a multiple of 128, which share a scale, found K = 96"):
        run(kernel, operands([4, 5], 9, 16, 96, "fp8"), key[2])
    given = operands([4, 5], 9, 16, 256, key[1])
    wanted = run(kernel, given, key[2])
    given[3].view(torch.uint8).unflatten(-1, (-1, 4))[..., 1:] = 255  # the other three
    assert_same_bytes(run(kernel, given, key[2]), wanted)


@pytest.mark.parametrize("ends", [[-4, 3, 9], [5, 2, 9], [2, 40, 50]], ids=["negative", "descending", "past the last row"])
def test_a_wrong_offs_writes_nothing_outside(narrow: Kernel, ends: list[int]) -> None:
    """What is in the rows is not defined; that memory outside is left alone is."""
    given = operands([3, 3, 3], 9, 16, 64, "bf16")
    given[4] = torch.tensor(ends, dtype=torch.int32)
    run(narrow, given, FP32)


def test_1024_experts(narrow: Kernel) -> None:
    counts = [0] * 1024
    counts[0], counts[31], counts[32], counts[1023] = 1, 9, 2, 3
    check(("", "bf16", FP32), narrow, operands(counts, 15, 8, 32, "bf16"), clusters=1)


# ---- FP8 to bf16 -----------------------------------------------------------------------------------------------------

EVERY = torch.arange(256, dtype=torch.uint8)


def products() -> tuple[torch.Tensor, torch.Tensor]:
    """All 256 scales by all 256 e4m3, as the kernel's four steps make them (in PyTorch), and in double."""
    value, scale = EVERY.view(E4), mx.power_of_two(EVERY.view(E8))
    steps = value.half().float().bfloat16() * scale.bfloat16()[:, None]
    return steps, value.double() * scale.double()[:, None]


def test_the_steps_give_the_product_rounded_once() -> None:
    steps, exact = products()
    assert_same_bytes(steps, exact.float().bfloat16())  # fp32 holds every one but those that are 2^128 and more: infinite


def test_the_product_is_a_bf16_for_every_scale_of_the_range_that_the_kernel_states() -> None:
    steps, exact = products()
    stated = (EVERY.int() >= 127 - 124) & (EVERY.int() <= 127 + 119)
    numbers = ~exact[stated].isnan()
    assert numbers.any() and torch.equal(steps[stated].double()[numbers], exact[stated][numbers])
    assert steps[255].isnan().all(), "a NaN scale"
    assert steps[:, 0x7F].isnan().all() and steps[:, 0xFF].isnan().all(), "a NaN element"
    assert not steps[stated][:, (EVERY & 0x7F) != 0x7F].isnan().any()


def test_every_scale_and_element_through_the_kernel(narrow: Kernel) -> None:
    """One token that is 1 in each place of K in turn takes the weights out one by one. N = 256 rows have a scale each."""
    wanted = products()[1].float().bfloat16().float()
    for first in range(0, 256, 32):
        w = torch.zeros(1, 256, 32, dtype=torch.uint8)
        w[0] = EVERY[first : first + 32]
        x = torch.eye(32, dtype=BF16)
        given = [x, None, w.view(E4), EVERY.reshape(1, 256, 1).view(E8), torch.tensor([32], dtype=torch.int32)]
        found = run(narrow, given, FP32).t()
        part = wanted[:, first : first + 32]
        # 0 · NaN and 0 · infinity: a row with either is NaN wherever it is not that element alone.
        finite = part.isfinite().all(1)
        assert torch.equal(found[finite], part[finite])
        assert found[part.isnan().any(1)].isnan().all()


def test_nan_and_infinity_of_tokens(narrow: Kernel) -> None:
    given = operands([4, 4], 8, 16, 64, "bf16")
    given[0][1, 5], given[0][2, 6], given[0][6, 40] = torch.nan, torch.inf, -torch.inf
    found = run(narrow, given, FP32)
    assert found[1].isnan().all() and not found[2].isfinite().any() and not found[6].isfinite().any()
    assert found[[0, 3, 4, 5, 7]].isfinite().all(), "a token reached another one's row"


# ---- tokens in MXFP8 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "k", "pitch"), [(1, 32, 32), (3, 96, 112), (67, 288, 288), (0, 64, 64)])
def test_tokens_in_mxfp8_become_bf16(narrow: Kernel, tokens: int, k: int, pitch: int) -> None:
    """Every byte for every scale comes by; both ends of the scales are among them."""
    torch.manual_seed(k)
    x = torch.randint(0, 256, (tokens, pitch), dtype=torch.uint8).view(E4)[:, :k]
    scale = torch.randint(0, 256, (tokens, k // mx.BLOCK), dtype=torch.uint8)
    if tokens > 1:
        scale[0, 0], scale[1, 0] = 0, 255
    out = torch.empty(tokens, k, dtype=BF16)
    narrow.to_bf16(x, scale.view(E8), out)
    assert_same_bytes(out, weights.dequantize(x.contiguous(), scale))


# ---- which tile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tokens", "experts", "name"),
    [
        ("bf16", 8, 128, "64x8"),
        ("bf16", 128, 128, "64x8"),
        ("bf16", 129, 128, "128x8"),
        ("bf16", 128, 8, "128x32"),
        ("bf16", 4096, 128, "256x64"),
        ("bf16", 16384, 128, "128x128@2"),
        ("bf16", 32768, 128, "256x128@2"),
        ("bf16", 131072, 128, "128x256@2"),
        ("mxfp8", 32768, 128, "256x128@2"),
        ("fp8", 64, 128, "64x8"),
        ("fp8", 32768, 128, "256x128@2"),
        ("fp8_128", 64, 128, "64x8"),
        ("fp8_128", 4096, 128, "64x64"),
        ("fp8_128", 32768, 128, "256x128@2"),
        ("bf16", 0, 0, "64x8"),
    ],
)
def test_the_tile_follows_the_tokens_a_group(kind: str, tokens: int, experts: int, name: str) -> None:
    assert hopper.tile(kind, tokens, experts) == f"hopper:{name}"


def test_a_key_for_any_number_of_tokens_is_among_the_keys() -> None:
    for kind in hopper.KINDS:
        names = {hopper.tile(kind, tokens, 8) for tokens in (0, 20, 60, 150, 300, 1000, 3000, 10_000)}
        assert names == {name for _, name in hopper.TILES[kind]} <= set(hopper.ALL_TILES["bf16" if kind == "mxfp8" else kind])


def test_what_has_no_kernel() -> None:
    x, x_scale, w, *_ = operands([4, 4], 8, 16, 64, "bf16")
    assert hopper.unsupported(x, x_scale, w, BF16, False) is None
    wide = torch.empty(1025, 8, 32, device="meta")
    for call, wanted in (
        ((x, x_scale, w, BF16, True), "plain scales"),
        ((x.half(), x_scale, w, BF16, False), "x in bfloat16, FP8 or MXFP8"),
        ((x, x_scale, w[:, :12], BF16, False), "N to be a multiple of 8"),
        ((x, x_scale, wide, BF16, False), "at most 1024 experts"),
    ):
        refused = hopper.unsupported(*call)
        assert refused is not None and refused[0].startswith(wanted)


# ---- machine code ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=hopper.examples(), ids=lambda key: f"{key[1]}-{key[0][7:]}")
def kind_and_built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Built]:
    """All that there is an example of: tests/kernels/test_builds.py leaves them to this one."""
    spec: jit.JitSpec = OP.spec_of_key((hopper.TARGET, request.param), hopper.TARGET)
    return request.param[1], Built(spec, tmp_path_factory.mktemp("code") / "kernel")


@pytest.fixture
def built(kind_and_built: tuple[str, Built]) -> Built:
    return kind_and_built[1]


@pytest.mark.nvcc
@pytest.mark.slow
def test_fp8_is_multiplied_as_it_is(kind_and_built: tuple[str, Built]) -> None:
    kind, built = kind_and_built
    if not kind.startswith("fp8"):
        return
    found = set(re.findall(r"wgmma\.mma_async\S*", built.ptx))
    assert found and all(".f32.e4m3.e4m3" in each and "k32" in each for each in found)
    if built.sass:
        assert built.instructions("QGMMA") and not built.instructions("HGMMA")
        assert not re.search(r"F2FP\.F16\.E4M3", built.sass), "a weight is converted"


@pytest.mark.nvcc
@pytest.mark.slow
def test_weights_go_from_registers_to_the_tensor_cores(kind_and_built: tuple[str, Built]) -> None:
    kind, built = kind_and_built
    if kind.startswith("fp8"):
        return
    found = set(re.findall(r"wgmma\.mma_async\S*", built.ptx))
    assert found and all(".bf16.bf16" in each and ".m64n" in each for each in found)
    # A register list as the A operand, and a descriptor as B: not two descriptors.
    assert re.search(r"wgmma\.mma_async[^;]*\}\s*,\s*\{\s*%r\d+(?:,\s*%r\d+){3}\s*\}\s*,\s*%rd\d+", built.ptx)
    if built.sass:
        assert built.instructions("HGMMA") and not built.instructions("HMMA|IGMMA|QGMMA")
        assert built.instructions("UTMALDG.3D") and built.instructions("LDGSTS")
        assert re.search(r"F2FP\.F16\.E4M3\.UNPACK_B", built.sass)


@pytest.mark.nvcc
@pytest.mark.slow
def test_nothing_spills_and_nothing_waits_too_long(kind_and_built: tuple[str, Built]) -> None:
    kind, built = kind_and_built
    assert ".local" not in built.ptx
    assert built.instructions("STL|LDL") == []
    if built.sass and not kind.startswith("fp8"):  # every wgmma but the last may run on while the next weights are converted
        assert len(re.findall(r"DEPBAR\.LE gsb0, 0x1", built.sass)) >= len(re.findall(r"DEPBAR\.LE gsb0, 0x0", built.sass))


@pytest.mark.nvcc
@pytest.mark.slow
def test_a_cluster_brings_tokens_to_both(request: pytest.FixtureRequest, kind_and_built: tuple[str, Built]) -> None:
    built = kind_and_built[1]
    clusters = "@2" in request.node.callspec.id
    assert (".multicast::cluster" in built.ptx) == clusters
    assert len(re.findall(r"barrier\.cluster\.wait", built.ptx)) == (2 if clusters else 0)
    assert ("mapa.shared::cluster" in built.ptx) == clusters


@pytest.mark.nvcc
@pytest.mark.slow
def test_offs_is_read_after_the_kernel_ahead_has_ended(built: Built) -> None:
    assert "griddepcontrol.launch_dependents" in built.ptx
    before = built.ptx.partition("griddepcontrol.wait")[0]
    assert not re.search(r"ld\.global|cp\.async", before)


@pytest.mark.nvcc
@pytest.mark.slow
def test_errors_name_the_argument(kind_and_built: tuple[str, Built]) -> None:
    """The host function, as far as it gets with tensors of a CPU."""
    import tvm_ffi

    module = tvm_ffi.load_module(str(kind_and_built[1].binary))
    kind = "bf16" if kind_and_built[0] == "mxfp8" else kind_and_built[0]
    given = operands([4, 4], 8, 16, 128, kind)
    out = torch.empty(8, 16, dtype=BF16)
    with pytest.raises(ValueError, match="x: wanted a CUDA tensor"):
        module.run(*given, out)
    with pytest.raises(TypeError, match=f"x: wanted {'bfloat16' if kind == 'bf16' else 'float8_e4m3fn'}, found float32"):
        module.run(given[0].float(), *given[1:], out)


def test_the_source_says_that_it_has_not_run() -> None:
    """Goes when it has: with the target in `HAS_RUN`."""
    said = "NOT RUN ON HARDWARE" in (jit.kernels_root() / hopper.SOURCE).read_text()
    assert said != (hopper.TARGET in grouped.HAS_RUN)


def test_tiles_that_compile_are_all_named() -> None:
    for kind in ("bf16", "fp8", "fp8_128"):
        sizes = {hopper.sizes(name) for name in hopper.ALL_TILES[kind]}
        alone = set(itertools.product((64, 128, 256), (8, 16, 32, 64, 128), (1,))) - {(64, 128, 1)}
        wide = {(128, 256, 1), (128, 256, 2)} if kind == "bf16" else set()
        assert sizes == alone | {(128, 128, 2), (256, 128, 2)} | wide
        assert len(hopper.ALL_TILES[kind]) == len(sizes) + 1  # clusters along tokens have the same
