"""The CUDA kernels against PyTorch's own operators on the same GPU: bytes, streams, graphs, layouts, ranges.

pytest tests/kernels -m gpu
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from inductor_ext import jit, registry
from tests.support.compiled import run_compiled, run_copies
from tests.support.equal import assert_all_same_bytes, assert_same_bytes
from tests.support.fakegpu import fake_cuda_inputs
from tests.support.kernels import called_by

E4, E5, U8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8
ops = torch.ops.inductor_ext
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
STATIC = "f32 div:s0 max:-{0} min:{0}"
STORE = STATIC.format(448.0)
TORCHAO = "div:448.0 f32", "f32 div:scale max:-448.0 min:448.0"
CLAMPED = "max:1e-12 div:448.0"
MIXED = "f32 mul:s0 div:s1 mul:r2 max:-448.0 min:448.0"
PROGRAMS = ["", "div:s0", "f32 div:s0 max:-448.0 min:448.0", "mul:s0 f32 max:-448 min:448 bf16", "f16 mul:3.0 max:0.0", "recip"]
#: Steps know nothing of the cast behind them: of E5M2 only their last dtype and whether they clamp is to be tried.
CASTS = [*((program, E4) for program in PROGRAMS), ("", E5), (STORE, E5), ("f16 mul:3.0 max:0.0", E5)]


def op_named(name: str) -> Any:
    return next(op for op in registry.ops() if op.name == name)


def kernels(arch: str) -> list[jit.JitSpec]:
    with fake_cuda_inputs(), FakeTensorMode():
        calls = [call for dtype in FLOATS for call in _calls(dtype)] + list(_special_calls())
        return [spec for op, *arguments in calls for spec in op_named(op).specs(arguments, arch)]


def _calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Those of every dtype below."""
    x, s = torch.empty(4, 8, device="cuda", dtype=dtype), torch.empty((), device="cuda")
    k, cache = x.view(2, 2, 8), torch.empty(4, 2, 8, dtype=E4, device="cuda")
    for program, fp8 in CASTS:
        yield "fp8_downcast", x, [s], program, fp8
    for granularity in ("row", "tensor"):
        yield "fp8_quantize", x, granularity, *TORCHAO, E4
    for index in (torch.int32, torch.int64):
        at = torch.empty(2, dtype=index, device="cuda")
        yield "downcast_fp8", k, k, cache, cache, s, s, at, STORE, STORE, E4, 1, 0, False
        yield "downcast_fp8", k, None, cache, None, s, None, at, STORE, STORE, E4, 1, 0, False


def _special_calls() -> Iterator[tuple[Any, ...]]:
    """Those of one test each."""
    x, s = torch.empty(4, 8, device="cuda", dtype=torch.bfloat16), torch.empty((), device="cuda")
    by_row, on_host = torch.empty(4, 1, device="cuda"), torch.empty(())
    k, cache = x.view(2, 2, 8), torch.empty(4, 2, 8, dtype=E4, device="cuda")
    at = torch.empty(2, dtype=torch.int64, device="cuda")
    yield "fp8_downcast", x, [s, on_host, by_row], MIXED, E4
    yield "downcast_fp8", k.float(), None, cache, None, None, None, at, "mul:2.0", "", E4, 1, 0, False
    for dtype in (torch.bfloat16, torch.float16):
        yield "fp8_downcast", x, [s.to(dtype)], "div:s0", E4
    for granularity in ("row", "tensor"):
        yield "fp8_quantize", x.float(), granularity, CLAMPED, TORCHAO[1], E4
    yield "downcast_fp8", k, k, cache, cache, s, s, at, STORE, STATIC.format(57344.0), E4, 1, 0, False
    yield "downcast_fp8", k, None, cache, None, s, None, None, STORE, STORE, E4, 3, 2, False
    yield "downcast_fp8", k, k, cache, cache, None, None, at, "max:0.0", "max:0.0", E4, 1, 0, False
    blocks, a_head = cache.view(2, 2, 2, 8), torch.empty(2, device="cuda")
    for scales in ((s, s), (a_head, a_head)):
        yield "downcast_fp8", k, k, blocks, blocks, *scales, at, STORE, STORE, E4, 1, 0, True, False, at
    yield "downcast_fp8", k, k, cache, cache, a_head, s, at, STORE, STORE, E4, 1, 0, False


pytestmark = pytest.mark.gpu(kernels=kernels)


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of a 16-bit dtype; of fp32 those of bf16 and their neighbours."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").to(torch.int16)
    if dtype is not torch.float32:
        return bits.view(dtype)
    upper = bits.view(torch.bfloat16).float()
    return torch.cat([torch.nextafter(upper, torch.full_like(upper, way)) for way in (1e38, -1e38)] + [upper])


# ---- fp8_downcast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("program", "fp8"), CASTS, ids=str)
def test_every_bit_pattern(program: str, fp8: torch.dtype, dtype: torch.dtype) -> None:
    x, s = patterns(dtype), torch.tensor(0.37, device="cuda")
    found = ops.fp8_downcast(x, [s], program, fp8)
    assert_same_bytes(found, op_named("fp8_downcast").reference(x, [s], program, fp8), program)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 64), (1, 1), (1, 4096), (7, 13), (3, 5, 7), (64, 1024), (129, 8191), (1000003,), ()], ids=str
)
def test_downcast_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, s = (torch.randn(shape, device="cuda") * 300).to(dtype), torch.tensor(0.37, device="cuda")
    found = ops.fp8_downcast(x, [s], STORE, E4)
    assert_same_bytes(found, (x.float() / s).clamp(-448, 448).to(E4))


def test_downcast_layouts() -> None:
    base = torch.randn(16, 24, 40, device="cuda").bfloat16() * 99
    s = torch.tensor(0.37, device="cuda")
    whole = base.permute(2, 0, 1), base.flatten()[1:]
    for x in (*whole, base[:, :, 8:24], base[:, :, 3:16], base.view(16, -1)[:, 1:], base[:, :, ::2]):
        found = ops.fp8_downcast(x, [s], STORE, E4)
        assert_same_bytes(found, (x.float() / s).clamp(-448, 448).to(E4), str(x.stride()))
    with pytest.raises((ValueError, RuntimeError)):
        ops.fp8_downcast(base[::2, :, ::2], [s], STORE, E4)


def test_downcast_operands_on_host_and_device_and_by_row() -> None:
    x = torch.randn(33, 72, device="cuda").bfloat16() * 99
    device, host, row = torch.tensor(0.37, device="cuda"), torch.tensor(1.7), torch.rand(33, 1, device="cuda") + 0.1
    found = ops.fp8_downcast(x, [device, host, row], MIXED, E4)
    assert_same_bytes(found, (x.float() * device / host * row).clamp(-448, 448).to(E4))
    for scale in (torch.float32, torch.bfloat16, torch.float16):
        s = device.to(scale)
        assert_same_bytes(ops.fp8_downcast(x, [s], "div:s0", E4), (x / s).to(E4), str(scale))


# ---- fp8_quantize ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 4096), (7, 13), (3, 5, 40), (64, 1024), (33, 16384), (5, 20000), (512, 128)], ids=str
)
def test_quantize(shape: tuple[int, ...], granularity: str, dtype: torch.dtype) -> None:
    x = (torch.randn(shape, device="cuda") * 9).to(dtype)
    found = ops.fp8_quantize(x, granularity, *TORCHAO, E4)
    assert_all_same_bytes(found, op_named("fp8_quantize").reference(x, granularity, *TORCHAO, E4))


@pytest.mark.parametrize("bound", [0.0, 3.5, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("shape", [(7, 13), (64, 1024), (5, 20000)], ids=str)
def test_quantize_within_a_bound(shape: tuple[int, ...], granularity: str, bound: float) -> None:
    x, given = (torch.randn(shape, device="cuda") * 9).bfloat16(), torch.full((1,), bound, device="cuda")
    programs = "min:s0 div:448.0 f32", "f32 mul:amax|f32|min:s0|recip|mul:448.0 max:-448.0 min:448.0"
    found = ops.fp8_quantize(x, granularity, *programs, E4, given)
    assert_all_same_bytes(found, op_named("fp8_quantize").reference(x, granularity, *programs, E4, given))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 0.0, 1e-40])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_quantize_specials(granularity: str, special: float) -> None:
    x = torch.randn(9, 260, device="cuda")
    x[3] = 0.0
    x[5, 259] = special
    x[7] = special
    found = ops.fp8_quantize(x, granularity, CLAMPED, TORCHAO[1], E4)
    wanted = op_named("fp8_quantize").reference(x, granularity, CLAMPED, TORCHAO[1], E4)
    assert_all_same_bytes(found, wanted)


# ---- downcast_fp8 ---------------------------------------------------------------------------------------------------------


def _rows(tokens: int, heads: int = 8, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(tokens, heads, dim, device="cuda") * 90).to(dtype)


def _cache(slots: int, heads: int = 8, dim: int = 128) -> torch.Tensor:
    return torch.randint(1, 120, (slots, heads, dim), dtype=U8, device="cuda").view(E4)


def _check_store(locs: torch.Tensor | None, k: Any, v: Any, kc: Any, vc: Any, v_program: str = "", **more: Any) -> None:
    scales = torch.tensor(0.5, device="cuda"), torch.tensor([0.25], device="cuda")
    copies = kc.clone(), None if vc is None else vc.clone()
    program = STORE
    args = (*scales, locs, program, v_program or program, E4)
    ops.downcast_fp8(k, v, kc, vc, *args, **more)
    defaults = {"mult": 1, "offset": 0, "wrap": False, **more}
    op_named("downcast_fp8").reference(k, v, *copies, *args, *defaults.values())
    assert_same_bytes(kc, copies[0], "k_cache")
    if vc is not None:
        assert_same_bytes(vc, copies[1], "v_cache")


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(8, 128), (1, 1), (3, 5), (2, 17), (1, 576)])
@pytest.mark.parametrize("tokens", [0, 1, 5, 300])
def test_store(tokens: int, heads: int, dim: int, dtype: torch.dtype, index: torch.dtype) -> None:
    slots = 512
    locs = torch.randperm(slots, device="cuda")[:tokens].to(index)
    locs[::7] = -1
    k, v = _rows(tokens, heads, dim, dtype), _rows(tokens, heads, dim, dtype)
    _check_store(locs, k, v, _cache(slots, heads, dim), _cache(slots, heads, dim))
    _check_store(locs, k, None, _cache(slots, heads, dim), None, wrap=True)


def test_store_of_v_that_is_clamped_past_the_range() -> None:
    """Before torch 2.13 what is past 448 becomes NaN, of V alone: one cast serves both, and K is clamped before it."""
    locs, k, v = torch.arange(40, device="cuda"), _rows(40, 8, 128) * 1e4, _rows(40, 8, 128) * 1e4
    _check_store(locs, k, v, _cache(64, 8, 128), _cache(64, 8, 128), STATIC.format(57344.0))


def test_store_never_writes_outside() -> None:
    guard = _cache(80, 2, 16)
    kc, locs = guard[8:72], torch.tensor([64, -65, 2**40, 63, 0, -64, 72, 2**62], device="cuda")
    before = guard.clone()
    for wrap in (False, True):
        _check_store(locs, _rows(8, 2, 16), None, kc, None, wrap=wrap)
    assert_same_bytes(guard[:8], before[:8])
    assert_same_bytes(guard[72:], before[72:])


def test_store_options_and_strides() -> None:
    _check_store(None, _rows(9), None, _cache(64), None, mult=3, offset=2)
    _check_store(torch.arange(9, device="cuda"), _rows(9), _rows(9), _cache(64), _cache(64), mult=2, offset=1)
    qkv = torch.randn(9, 64 * 3, device="cuda").bfloat16()
    k, v = (qkv[:, start : start + 64].view(9, 2, 32) for start in (64, 128))
    both = _cache(64, 4, 32)
    _check_store(torch.arange(9, device="cuda") * 5, k, v, both[:, :2], both[:, 2:])
    odd = torch.randn(9, 65, device="cuda").bfloat16()[:, 1:].view(9, 2, 32)
    _check_store(torch.arange(9, device="cuda"), odd, None, _cache(64, 2, 32), None)


@pytest.mark.parametrize("tokens", [1, 300, 1100, 5000])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("a_head", [False, True])
def test_store_in_blocks(tokens: int, heads_first: bool, a_head: bool) -> None:
    """[blocks, 2, block, H, D] and [blocks, 2, H, block, D], told blocks and rows of them."""
    blocks, block, heads, dim = tokens // 16 + 3, 16, 8, 128
    sizes = (2, heads, block) if heads_first else (2, block, heads)
    both = torch.randint(1, 120, (blocks, *sizes, dim), dtype=U8, device="cuda").view(E4)
    copy = both.clone()
    slots = torch.randperm(blocks * block, device="cuda")[:tokens]
    loc, at = slots // block, slots % block
    loc[::7] -= blocks
    at[3::7] -= block
    loc[5::11], at[6::11] = blocks, block
    k, v, program = _rows(tokens), _rows(tokens), STORE
    scales = [torch.rand(heads, device="cuda") + 0.3 if a_head else torch.tensor(0.5, device="cuda") for _ in "kv"]
    for run, into in ((ops.downcast_fp8, both), (op_named("downcast_fp8").reference, copy)):
        caches = [each.transpose(1, 2) if heads_first else each for each in into.unbind(1)]
        run(k, v, *caches, *scales, loc, program, program, E4, 1, 0, True, False, at)
    assert_same_bytes(both, copy)


def test_store_of_a_scale_a_head() -> None:
    k, v, kc, vc, copies = _rows(40), _rows(40), _cache(64), _cache(64), (_cache(64), _cache(64))
    scales = torch.rand(16, device="cuda")[::2] + 0.3, torch.tensor(0.5, device="cuda")
    for copy, cache in zip(copies, (kc, vc)):
        copy.copy_(cache)
    args = (*scales, torch.arange(40, device="cuda") * 7 % 61, STORE, STORE, E4, 1, 0, False)
    ops.downcast_fp8(k, v, kc, vc, *args)
    op_named("downcast_fp8").reference(k, v, *copies, *args)
    assert_same_bytes(kc, copies[0], "k_cache")
    assert_same_bytes(vc, copies[1], "v_cache")


@pytest.mark.parametrize("tokens", [64, 5000])
def test_of_repeated_indices_one_token_wins_whole(tokens: int) -> None:
    k, v = (torch.arange(tokens, device="cuda")[:, None, None].expand(tokens, 8, 128) for _ in range(2))
    k, v = (k % 240).bfloat16().contiguous(), (v % 240).bfloat16().contiguous()
    kc, vc = _cache(4), _cache(4)
    locs = torch.randint(0, 4, (tokens,), device="cuda")
    ops.downcast_fp8(k, v, kc, vc, None, None, locs, "max:0.0", "max:0.0", E4)
    for cache in (kc, vc):
        assert bool((cache.view(U8) == cache.view(U8)[:, :1, :1]).all()), "a mixture of rows"
    assert_same_bytes(kc, vc, "K and V of one token")


def test_checks_raise() -> None:
    program = """
import torch, inductor_ext
k = torch.randn(3, 2, 16, device="cuda")
cache = torch.zeros(16, 2, 16, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
loc = torch.tensor([3, -1, 16], device="cuda")
try:
    torch.ops.inductor_ext.downcast_fp8(k, None, cache, None, None, None, loc, "mul:2.0", "", torch.float8_e4m3fn)
except IndexError as error:
    assert "16" in str(error), error
else:
    raise SystemExit("nothing was raised")
assert not cache[0].float().any()
"""
    environment = {**os.environ, "INDUCTOR_EXT_CHECKS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- streams, graphs, generated code ----------------------------------------------------------------------------------------


def test_another_stream() -> None:
    x, s = torch.randn(4096, 4096, device="cuda").bfloat16(), torch.tensor(0.37, device="cuda")
    ops.fp8_downcast(x, [s], STORE, E4)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.mul_(2)
        found = ops.fp8_downcast(x, [s], STORE, E4)
        q, scale = ops.fp8_quantize(x, "tensor", *TORCHAO, E4)
    stream.synchronize()
    assert_same_bytes(found, (x.float() / s).clamp(-448, 448).to(E4))
    assert_all_same_bytes((q, scale), op_named("fp8_quantize").reference(x, "tensor", *TORCHAO, E4))


def test_cuda_graph_capture() -> None:
    x, s = torch.randn(256, 1024, device="cuda").bfloat16(), torch.tensor(0.37, device="cuda")
    k, kc = _rows(16), _cache(64)
    loc = torch.arange(16, device="cuda")
    program = STORE

    def step() -> Any:
        ops.downcast_fp8(k, None, kc, None, s, None, loc, program, program, E4)
        return (
            ops.fp8_downcast(x, [s], program, E4),
            *ops.fp8_quantize(x, "row", *TORCHAO, E4),
            *ops.fp8_quantize(x, "tensor", *TORCHAO, E4),
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(256, 1024, device="cuda").bfloat16() * 50)
        s.fill_(0.1 + seed)
        k.copy_(_rows(16))
        loc.copy_(torch.randperm(64, device="cuda")[:16])
        wanted_cache = kc.clone()
        op_named("downcast_fp8").reference(k, None, wanted_cache, None, s, None, loc, program, program, E4)
        graph.replay()
        torch.cuda.synchronize()
        row = op_named("fp8_quantize").reference(x, "row", *TORCHAO, E4)
        tensor = op_named("fp8_quantize").reference(x, "tensor", *TORCHAO, E4)
        assert_all_same_bytes(captured, ((x.float() / s).clamp(-448, 448).to(E4), *row, *tensor))
        assert_same_bytes(kc, wanted_cache)


def layer(x: Any, s: Any, k: Any, kc: Any, at: Any) -> Any:
    kc.view(-1, 8, 128)[at] = (k.float() / s).clamp(-448, 448).to(E4)
    scale = (x.abs().amax(-1, keepdim=True) / 448.0).float()
    return (x.float() / s).clamp(-448, 448).to(E4), (x.float() / scale).clamp(-448, 448).to(E4)


def inputs_of_layer() -> tuple[Any, ...]:
    x, s = torch.randn(64, 512, device="cuda").bfloat16(), torch.full((), 0.37, device="cuda")
    return x, s, _rows(16), _cache(64), torch.arange(16, device="cuda")


@pytest.mark.gpu(kernels=lambda arch: called_by(layer, inputs_of_layer, arch))
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_layer_on_the_gpu(mode: str | None) -> None:
    given = inputs_of_layer()
    found, recorder = run_compiled(layer, given, mode=mode)
    assert recorder.counts() == {"downcast_fp8": 1, "fp8_downcast": 1, "fp8_quantize": 1}, recorder.refusals()
    assert_all_same_bytes(found, run_copies(layer, given))


def kernels_of_example(arch: str, rule: Any, example: Any) -> list[jit.JitSpec]:
    options = {**dict(example.options), "rules": example.modes(rule.name)}
    return called_by(example.fn, lambda: example.inputs("cuda"), arch, example.dynamic, **options)


@pytest.mark.gpu(kernels=kernels_of_example)
@pytest.mark.parametrize(
    ("rule", "example"),
    [pytest.param(rule, example, id=f"{rule.name}-{example.name}") for rule in registry.rules() for example in rule.matches],
)
def test_examples_on_the_gpu(rule: Any, example: Any) -> None:
    import inductor_ext

    options = {"rules": example.modes(rule.name), "options": dict(example.options), "dynamic": example.dynamic}
    found = inductor_ext.verify(example.fn, *example.inputs("cuda"), **options, end_to_end=False)
    refused = [(each.reason, each.found) for graph in found.graphs for each in graph.refusals if each.rule == rule.name]
    assert found.graphs and sum(graph.counts().get(rule.name, 0) for graph in found.graphs) == example.count, refused
    assert found.differs == [] and all(check.differing == 0 for check in found.checks if check.exact)
