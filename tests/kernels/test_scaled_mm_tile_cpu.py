"""scaled_mm's tile kernels without a GPU: their source run on the CPU, where what is asynchronous happens as late as it may
(``tests/support/hopper_on_cpu``). NaNs lie around every operand, and around the output bytes that must not change."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_ext.kernels.qk_norm_rope import op as qk_norm_rope
from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm.config import parse
from inductor_ext.kernels.scaled_mm_act_mul import op as scaled_mm_act_mul
from inductor_ext.kernels.scaled_mm_add import op as scaled_mm_add
from inductor_ext.kernels.scaled_mm_rope import op as scaled_mm_rope
from tests.support.cuda_on_cpu import KERNELS
from tests.support.equal import assert_same_bytes
from tests.support.hopper_on_cpu import TileKernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
HEAD = scaled_mm_rope.HEAD_DIM

# name, dtype of a, of the output, and whether accumulation is fast
TILES = {
    "pingpong": ("tile:128x128p", E4, BF16, True),
    "pingpong 64": ("tile:64x128p", E4, BF16, True),
    "cooperative exact": ("tile:128x128c", E4, BF16, False),
    "pingpong exact": ("tile:128x128p", E4, BF16, False),
    "boxes of 64 bytes": ("tile:128x160p", E4, FP16, True),
    "fp32 out, e5m2": ("tile:128x64p", E5, FP32, True),
}
#: More of them, for gate and up.
PAIRS = {
    "pingpong of 256": ("tile:64x256p", E5, FP16, True),
    "cluster": ("tile:128x128p@2x1", E4, BF16, True),
    "cluster along n": ("tile:128x128c@1x2", E4, BF16, True),
}


class Built:
    """Kernels by what `exports` of their op says, each compiled once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernels: dict[str, TileKernel] = {}

    def __call__(self, op: Any, *key: Any) -> TileKernel:
        cpp = op.OP.spec_of_key(key, "sm_90a").exports[0][1].rpartition("::")[0].replace("::Silu>", "::PlusAbs>")
        if cpp not in self.kernels:
            folder = self.folder / str(len(self.kernels))
            folder.mkdir()
            self.kernels[cpp] = TileKernel(cpp, folder)
        return self.kernels[cpp]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("tile"))


@pytest.fixture(params=list(TILES))
def tile(request: pytest.FixtureRequest, built: Built) -> Any:
    """Kernel, rows and columns of its tile, dtypes of a and the output."""
    name, a_dtype, out_dtype, fast = TILES[request.param]
    config = parse(name)
    return built(scaled_mm, name, a_dtype, E4, out_dtype, fast), config.m, config.n, a_dtype, out_dtype


def within(shape: Sequence[int], value: torch.Tensor) -> torch.Tensor:
    """``value`` in a buffer of NaNs of its dtype, with rows and columns around it."""
    buffer = torch.full([size + 2 * 16 for size in shape], torch.nan).to(value.dtype)
    view = buffer[tuple(slice(16, 16 + size) for size in shape)]
    view.copy_(value)
    return view


def scales(size: int, rowwise: bool, dim: int) -> torch.Tensor:
    """Some are nine times others, so that the scale of another row shows."""
    count = size if rowwise else 1
    scale = within((count,), torch.rand(count) + torch.randint(1, 9, (count,)))
    return scale.unsqueeze(dim) if rowwise else scale[0]


def operand(rows: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return within((rows, k), torch.randn(rows, k).to(dtype))


def problem(m: int, n: int, k: int, a_dtype: torch.dtype, out_dtype: torch.dtype, rowwise: bool, bias: bool) -> list[Any]:
    added = within((n,), (torch.randn(n) * 20).to(out_dtype)) if bias else None
    return [operand(m, k, a_dtype), operand(n, k, E4).t(), scales(m, rowwise, 1), scales(n, rowwise, 0), added]


def into(m: int, n: int, dtype: torch.dtype, call: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """What the call writes into columns of a buffer, all of them and nothing else."""
    buffer = torch.full((m + 2, n + 32), torch.nan, dtype=dtype)
    out = buffer[1:-1, 16:-16]
    call(out)
    found = out.clone()
    out.fill_(torch.nan)
    assert buffer.isnan().all(), "written outside of out"
    return found


def close(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale_a: Any, scale_b: Any, bias: Any) -> None:
    """Rounded once, from a sum in fp32."""
    scale = scale_a.double() * scale_b.double()
    added = 0.0 if bias is None else bias.double()
    wanted = a.double() @ b.double() * scale + added
    size = a.double().abs() @ b.double().abs() * scale + (0.0 if bias is None else bias.double().abs())
    error = (found.double() - wanted).abs()
    assert (error <= torch.finfo(found.dtype).eps / 2 * wanted.abs() + 2.0**-20 * size).all()


def check(tile: Any, m: int, n: int, k: int, rowwise: bool = True, bias: bool = False, **options: int) -> None:
    kernel, _, _, a_dtype, out_dtype = tile
    torch.manual_seed(m + n + k)
    given = problem(m, n, k, a_dtype, out_dtype, rowwise, bias)
    close(into(m, n, out_dtype, lambda out: kernel.run(*given, out, **options)), *given)


# ---- one product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [16, 128, 400])
@pytest.mark.parametrize(("rowwise", "bias"), [(True, True), (False, False)], ids=["rows, bias", "one scale"])
def test_against_double(tile: Any, k: int, rowwise: bool, bias: bool) -> None:
    """M and N that are no multiples of a tile; K of less than a stage, of one, and of several and a part."""
    check(tile, tile[1] + 72, tile[2] + 48, k, rowwise, bias)


@pytest.mark.parametrize(("m", "n"), [(1, 16), (7, 32), (63, 48), (65, 400)])
def test_sizes_of_less_than_a_tile(tile: Any, m: int, n: int) -> None:
    check(tile, m, n, 144, bias=True)


@pytest.mark.parametrize(("static_b", "seed"), [(False, 1), (True, 2)], ids=["", "static b"])
def test_more_rounds_than_stages_over_several_tiles(tile: Any, static_b: bool, seed: int) -> None:
    """One CTA has all tiles, and a tile's first stage is any of the ring. A tile goes round more than twice: who waited for the
    next tile's stages before this one is done would find the phase that it waits for."""
    check(tile, 2 * tile[1] + 8, 2 * tile[2] + 16, 20 * 128 + 16, bias=True, sms=1, static_b=static_b, seed=seed)


@pytest.mark.parametrize("k", [128, 256])
def test_many_tiles_of_few_stages(tile: Any, k: int) -> None:
    """Consumers take over from each other, and staging is used again, as fast as they can. 3 CTAs: an uneven share."""
    check(tile, 5 * tile[1], 3 * tile[2], k, sms=3, static_b=True)


def test_no_row(tile: Any) -> None:
    check(tile, 0, 32, 64)


# ---- several products ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["one a", "an a each"])
def test_several_products(tile: Any, shared: bool) -> None:
    """Side by side in one buffer, last tiles cut off where the next one begins; without a shared a, each has a K of its own."""
    kernel, rows, columns, a_dtype, out_dtype = tile
    torch.manual_seed(3)
    m, ns, ks = rows + 24, [columns + 16, 16, 2 * columns, columns - 16], [272] * 4 if shared else [272, 128, 16, 400]
    given = [problem(m, n, k, a_dtype, out_dtype, i % 2 == 0, i > 1) for i, (n, k) in enumerate(zip(ns, ks, strict=True))]
    a, b, scale_a, scale_b, bias = (list(each) for each in zip(*given, strict=True))
    if shared:
        a, scale_a = a[:1], scale_a[:1]
    out = into(m, sum(ns), out_dtype, lambda out: kernel.run_group(a, b, scale_a, scale_b, bias, out, sms=2, static_b=shared))
    for i, part in enumerate(out.split(ns, 1)):
        at = 0 if shared else i
        close(part, a[at], b[i], scale_a[at], scale_b[i], bias[i])


# ---- a residual ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pingpong", "cooperative exact", "boxes of 64 bytes"])
def test_a_residual_is_added_to_the_rounded_product(built: Built, name: str) -> None:
    """By the bytes: as eager adds it to what the plain kernel gives."""
    config, a_dtype, out_dtype, fast = TILES[name]
    key = config, a_dtype, E4, out_dtype, fast
    plain, adding = built(scaled_mm, *key), built(scaled_mm_add, *key)
    rows, columns = parse(config).m, parse(config).n
    for m, n, k, sms in ((rows + 9, columns + 48, 400, 2), (3 * rows, 2 * columns, 128, 1), (5, 16, 16, 1)):
        torch.manual_seed(m)
        given = problem(m, n, k, a_dtype, out_dtype, True, k == 400)
        residual = within((m, n), (torch.randn(m, n) * 100).to(out_dtype))
        product = into(m, n, out_dtype, functools.partial(plain.run, *given, sms=sms))
        close(product, *given)
        found = into(m, n, out_dtype, functools.partial(adding.run, *given, residual=residual, sms=sms))
        assert_same_bytes(found, product + residual)


# ---- gate and up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("up_first", [False, True], ids=["gate before up", "up before gate"])
@pytest.mark.parametrize("name", ["pingpong", "pingpong 64", "cooperative exact", *PAIRS])
def test_gate_and_up(built: Built, name: str, up_first: bool) -> None:
    """By the bytes: the activation, rounded, of what the plain kernel gives for gate, times what it gives for up."""
    config, a_dtype, out_dtype, fast = (TILES | PAIRS)[name]
    key = config, a_dtype, E4, out_dtype, fast
    plain, gated = built(scaled_mm, *key), built(scaled_mm_act_mul, *key, "silu")
    tile = parse(config)
    rows, columns = tile.m * tile.cluster[0], tile.n // 2 * tile.cluster[1]
    for m, n, k, sms, biased in ((rows + 9, columns + 48, 400, 2, 2), (3 * rows, 2 * columns, 128, 1, 1), (5, 16, 16, 1, 0)):
        torch.manual_seed(m)
        weights = sorted((operand(n, k, E4) for _ in range(2)), key=torch.Tensor.data_ptr, reverse=up_first)
        gate, up = (each.t() for each in weights)
        a, scale_a = operand(m, k, a_dtype), scales(m, True, 1)
        scale_b = [scales(n, True, 0), scales(n, k != 400, 0)]
        bias = [within((n,), (torch.randn(n) * 20).to(out_dtype)) if i < biased else None for i in range(2)]
        options = {"sms": sms * tile.cluster[0] * tile.cluster[1], "static_b": k == 400}
        call = functools.partial(plain.run_group, [a], [gate, up], [scale_a], scale_b, bias, sms=1)
        g, u = into(m, 2 * n, out_dtype, call).chunk(2, 1)
        close(g, a, gate, scale_a, scale_b[0], bias[0])
        inputs = a, [gate, up], scale_a, scale_b, bias
        found = into(m, n, out_dtype, functools.partial(gated.run_act_mul, *inputs, cluster=tile.cluster, **options))
        assert_same_bytes(found, (g.float() + g.float().abs()).to(out_dtype) * u)


def test_gate_and_up_are_two(built: Built) -> None:
    gated = built(scaled_mm_act_mul, "tile:128x128p", E4, E4, BF16, True, "silu")
    a, b, scale_a, scale_b, _ = problem(8, 16, 16, E4, BF16, True, False)
    out = torch.empty(8, 16, dtype=BF16)
    with pytest.raises(RuntimeError, match="up: wanted another tensor than gate"):
        gated.run_act_mul(a, [b, b], scale_a, [scale_b] * 2, [None] * 2, out)
    with pytest.raises(RuntimeError, match="cluster: wanted at most 8"):
        gated.run_act_mul(a, [b, b], scale_a, [scale_b] * 2, [None] * 2, out, cluster=(4, 1))


# ---- heads, normalised and rotated -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "norm"),
    [("pingpong", ""), ("pingpong", "cast mul"), ("pingpong 64", "mul cast"), ("cooperative exact", "mul+1 cast")],
)
def test_heads(built: Built, name: str, norm: str) -> None:
    rows = parse(TILES[name][0]).m
    check_heads(built, name, norm, 2, rows // 2 + 5, [3 * HEAD, HEAD, HEAD], 2, tables=2)
    check_heads(built, name, norm, 1, 2 * rows + 8, [HEAD], 1, sms=2)
    check_heads(built, name, norm, 3, 11, [HEAD, 2 * HEAD], 1)
    check_heads(built, name, norm, 5, 1, [HEAD, HEAD], 2, tables=5)


def check_heads(
    built: Built,
    name: str,
    norm: str,
    sequences: int,
    length: int,
    ns: list[int],
    rotated: int,
    *,
    tables: int = 1,
    sms: int = 1,
) -> None:
    """q and k as qk_norm_rope has them of what the plain kernel gives, v as it is: by the bytes but for the norm's sum."""
    config, a_dtype, out_dtype, fast = TILES[name]
    key = config, a_dtype, E4, out_dtype, fast
    plain, heads = built(scaled_mm, *key), built(scaled_mm_rope, *key, norm)
    torch.manual_seed(length)
    m, k = sequences * length, 272
    given = [problem(m, n, k, a_dtype, out_dtype, True, False) for n in ns]
    a, _, scale_a, _, _ = given[0]
    b, scale_b = [each[1] for each in given], [each[3] for each in given]
    table = (tables, length, HEAD)
    cos, sin = (within(table, torch.randn(table).to(out_dtype)) for _ in range(2))
    weights = [within((HEAD,), torch.randn(HEAD).to(out_dtype)) if norm and i < rotated else None for i in range(2)]
    rope = *weights, cos, sin, rotated, 1e-6

    none = [None] * len(ns)
    product = into(m, sum(ns), out_dtype, lambda out: plain.run_group([a], b, [scale_a], scale_b, none, out))
    found = into(m, sum(ns), out_dtype, lambda out: heads.run_rope(a, b, scale_a, scale_b, *rope, out, sms=sms))
    parts = product.split(ns, 1)
    q, k_heads = [*(part.unflatten(1, (-1, HEAD)).unflatten(0, (sequences, length)) for part in parts[:rotated]), None][:2]
    wanted = qk_norm_rope.reference(q, k_heads, *weights, cos, sin, 1e-6, norm, out_dtype)
    for i, part in enumerate(found.split(ns, 1)):
        whole = wanted[i].flatten(2).flatten(0, 1) if i < rotated else parts[i]
        if i >= rotated or not norm:
            assert_same_bytes(part, whole)
        else:
            assert (part != whole).float().mean() < 0.01
            torch.testing.assert_close(part, whole, rtol=2**-6, atol=2**-5)


# ---- the machine -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("without", "instead", "seen"),
    [
        ("cute::tma_store_wait<Shared::kChunks - 1>();", ";", "changed while the copy engine read it"),
        ("cute::tma_store_fence();", "", "written without a fence"),
        ("cute::warpgroup_wait<1>();", "cute::warpgroup_wait<2>();", "operand of a wgmma that changed"),
        ("if (Pingpong && consumer == 1)", "if (false)", "every thread waits for another"),
        ("EmptyBarrier::wait(empty + slot.index, slot.phase);", "", "more arrive than it was made for|operand of a wgmma"),
    ],
    ids=["staging used again too soon", "no fence", "stage released too soon", "no first turn", "stage filled too soon"],
)
def test_what_is_wrong_is_seen(tmp_path: Path, without: str, instead: str, seen: str) -> None:
    """The same source with one thing wrong in it."""
    kernels = tmp_path / "kernels"
    shutil.copytree(KERNELS / "include", kernels / "include")
    shutil.copytree(KERNELS / "scaled_mm", kernels / "scaled_mm")
    config = parse("tile:128x128p")
    source = kernels / config.source
    text = source.read_text()
    assert without in text, f"{config.source} has no {without} to leave out: name here what took its place"
    source.write_text(text.replace(without, instead))
    kernel = TileKernel(config.cpp(E4, E4, BF16, False), tmp_path, kernels)
    with pytest.raises(RuntimeError, match=seen):
        check((kernel, config.m, config.n, E4, BF16), 2 * config.m, 2 * config.n, 20 * 128, sms=1)
