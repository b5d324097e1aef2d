"""CUDA graphs replayed thousands of times, with other operands before every replay; each replay's bytes are compared.

Operands come from a pool: they are copied to where the graph reads them from, without a host sync, and so is what an eager call
made of them. In the graph a kernel of PyTorch's poisons the outputs and another one writes the operands right before the op:
a kernel that starts early (programmatic dependent launch) and reads or writes before it may is found out. What differs, how
many replays were compared, and a sum of all bytes found are counted on the device, and read at the end.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.trust import running
from benchmarks.trust.calls import CALLS, op_named
from benchmarks.trust.operands import E4, Args, Call, Maker
from inductor_ext.kernels.downcast_fp8.op import PROGRAM_F32
from inductor_ext.kernels.fp8_quantize.op import TORCHAO_PROGRAM, TORCHAO_SCALE

POOL, FEW = 8, 500

#: Which calls thousands of times: of every op with a kernel one, of those whose blocks wait for one another each way they do
#: it. The others are replayed `FEW` times, with two sets of operands.
REPLAYED = (
    "fp8_downcast: slice of qkv",
    "fp8_quantize: row, tails",
    "fp8_quantize: tensor, tails",
    "downcast_fp8: slices of qkv into one buffer",
    "downcast_fp8: 5 tokens of [8, 128]",
    "downcast_fp8: 5000 tokens of [3, 5]",
    "rms_norm_quantize: row, 1024 columns",
    "rms_norm_quantize: tensor, [9, 4096]",
    "rms_norm_quantize: static, 3 scales",
    "norm_quantize: layer, 1024 columns",
    "act_quantize: row, gelu",
    "act_cat_quantize: row, heads before positions",
    "act_mul_quantize: row, 3072 columns, halves of a buffer",
    "act_mul_quantize: tensor",
    "qk_norm_rope: heads of 128, columns of one buffer",
    "qk_norm_rope_store: heads of 128",
    "mxfp8_quantize: groups",
    "moe_combine: 8 rows of 2048",
    "mxfp8_grouped_mm: bf16, 255 tokens",
    "mxfp8_grouped_mm: fp8_128, 719 tokens",
    "mxfp8_grouped_mm: mxfp8, 719 tokens",
    "scaled_mm: stream:16x64/8 [5, 80, 144]",
    "scaled_mm: tile:128x128p [130, 272, 528]",
    "scaled_mm: tile:256x128c@2x1 [300, 1040, 1040]",
    "scaled_mm_add: tile:128x128p [130, 272, 528]",
    "scaled_mm_act_mul: tile:128x128p silu [130, 272, 528]",
    "scaled_mm_rope: pingpong, norm",
    "varlen_attention: 128 wide, packed, padded",
    "varlen_attention: 64 wide, batch, full",
)

#: Makes operands; runs on them and gives what it wrote, as bytes.
Make = Callable[[Maker], Args]
Run = Callable[[Args, Sequence[torch.Tensor]], list[torch.Tensor]]


def run(device: str, times: int, few: int, emit: running.Emit) -> None:
    """`REPLAYED` and three ops one after the other ``times`` times, the other calls ``few`` times."""
    by_name = {call.name: call for call in CALLS}
    run_calls([by_name[name] for name in REPLAYED], device, times, emit)
    chain = functools.partial(replayed, _layer, lambda args: [], _run_layer, device, times)
    _emit(emit, "rms_norm_quantize", "then scaled_mm, then downcast_fp8", chain, running.Fallbacks())
    others = [call for call in CALLS if call.compared and call.name not in REPLAYED]
    run_calls(others, device, few, emit, pool=2)


def run_calls(calls: Sequence[Call], device: str, times: int, emit: running.Emit, pool: int = POOL) -> None:
    fallbacks = running.Fallbacks()
    for call in calls:
        op = op_named(call.op)

        def launch(args: Args, outs: Sequence[torch.Tensor], op: Any = op) -> list[torch.Tensor]:
            running.launch(op, args, outs)
            return running.results(op, args, outs)

        made = functools.partial(running.outputs, op)
        _emit(emit, call.op, call.what, functools.partial(replayed, call.make, made, launch, device, times, pool), fallbacks)


def _emit(emit: running.Emit, op: str, what: str, go: Callable[[], str | None], fallbacks: running.Fallbacks) -> None:
    start = time.perf_counter()
    try:
        said = go()
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:400]}"
    emit(op, what, fallbacks.taken() or said, time.perf_counter() - start)


def replayed(
    make: Make, make_outputs: Callable[[Args], list[torch.Tensor]], run: Run, device: str, times: int, pool: int = POOL
) -> str | None:
    """What differed in ``times`` replays: "" nothing, None where nothing is written."""
    sets = [make(Maker(device, seed)) for seed in range(pool)]
    expected = []
    for args in sets:
        given = running.copied(args)
        expected.append([each.clone() for each in run(given, make_outputs(given))])
    if not any(each.numel() for each in expected[0]):
        return None
    if all(torch.equal(a, b) for a, b in zip(expected[0], expected[1])):
        return "two sets of operands give the same bytes: a replay of the wrong one would not show"

    static = running.copied(sets[0])
    outs = make_outputs(static)
    memory = running.storages_of(running.tensors_of(static))
    sources = [running.storages_of(running.tensors_of(args)) for args in sets]
    staged, wanted = [each.clone() for each in memory], [each.clone() for each in expected[0]]
    zero = torch.zeros((), dtype=torch.uint8, device=device)
    wrong, compared, total = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(3))

    def step() -> None:
        for out in outs:
            running.bytes_of(out).fill_(running.POISON)
        for here, there in zip(memory, staged):
            torch.bitwise_xor(there, zero, out=here)  # a kernel, where a copy would be none
        found = run(static, outs)
        differ = torch.stack([(f != w).any() for f, w in zip(found, wanted, strict=True)])
        wrong.add_(differ.any())
        compared.add_(1)
        total.add_(sum((f.sum(dtype=torch.int64) for f in found), torch.zeros((), dtype=torch.int64, device=device)))

    replay = captured(step, device)
    for counter in (wrong, compared, total):
        counter.zero_()
    for i in range(times):
        for to, source in ((staged, sources[i % pool]), (wanted, expected[i % pool])):
            for a, b in zip(to, source, strict=True):
                a.copy_(b)
        replay()
    sums = [sum(int(each.sum(dtype=torch.int64)) for each in found) for found in expected]
    if int(wrong):
        return f"{int(wrong)} of {times} replays differ"
    if int(compared) != times or int(total) != sum(sums[i % pool] for i in range(times)):
        return f"{int(compared)} of {times} replays were compared, and the sum of all bytes is {int(total)}"
    return ""


def captured(step: Callable[[], None], device: str) -> Callable[[], None]:
    """The step as a CUDA graph; on a CPU the step itself."""
    if device == "cpu":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # modules load and libraries take their memory outside of the capture
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize()
    replay: Callable[[], None] = graph.replay
    return replay


# ---- three ops, each reading what the one before it wrote ------------------------------------------------------------


def _layer(m: Maker) -> Args:
    """x, residual, weight; the product's b and its scales; caches, their scales, loc."""
    norm = m.randn(33, 1024), m.randn(33, 1024), m.rand(1024, dtype=torch.bfloat16)
    product = m.column_major(512, 1024), m.rand(1, 512)
    return *norm, *product, m.cache(64, 2, 128), m.cache(64, 2, 128), m.rand(), m.rand(), m.slots(33, 64)


def _run_layer(args: Args, outs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    x, residual, weight, b, scale_b, k_cache, v_cache, k_scale, v_scale, loc = args
    ops = torch.ops.inductor_ext
    programs = TORCHAO_SCALE, TORCHAO_PROGRAM
    q, scale, total = ops.rms_norm_quantize(x, residual, weight, 1e-6, "cast mul", "row", *programs, E4, [])
    config = "tile:128x128p"
    kv = ops.scaled_mm([q], [b], [scale], [scale_b], [None], torch.bfloat16, True, True, config).unflatten(1, (4, 128))
    programs = PROGRAM_F32, PROGRAM_F32
    ops.downcast_fp8(kv[:, :2], kv[:, 2:], k_cache, v_cache, k_scale, v_scale, loc, *programs, E4)
    return [running.bytes_of(each) for each in (q, scale, total, k_cache, v_cache)]
