"""q and k normalised and rotated, K and V stored into their caches: in one launch, in our two, and as stock Inductor does it.

    python -m benchmarks.kernels.qk_norm_rope_store --out benchmarks/results/h200/qk_norm_rope_store.json       (a minute)

    stock     torch.compile of the eager lines: slots by index_put, into caches used as they are
    two       qk_norm_rope, then downcast_fp8; into a bf16 cache qk_norm_rope, then stock's two copies
    together  qk_norm_rope_store

q, k and v are columns of one buffer [T, (H + 2 Hkv) * 128] bf16, tokens in sequences of 512 where there are that many, slots of
a cache of 131 072 rows without a repeated one. Qwen3-0.6B has norms, Llama-3.1-8B none. CUDA-graph replays in turn, three
rounds, over enough buffers to find L2 cold. First, one launch and two are compared byte for byte, and stock by its distance:
Inductor rounds less on the way.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import timing
from benchmarks.kernels.shared import built, script
from inductor_ext.kernels.downcast_fp8.op import OP as DOWNCAST_FP8
from inductor_ext.kernels.downcast_fp8.op import PROGRAM_F32 as PROGRAM
from inductor_ext.kernels.qk_norm_rope.op import OP as QK_NORM_ROPE
from inductor_ext.kernels.qk_norm_rope.op import rotate_half
from inductor_ext.kernels.qk_norm_rope_store.op import OP
from inductor_ext.kernels.rms_norm_quantize.op import normalise

E4, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
D, SLOTS, LONGEST = 128, 131072, 512
TOKENS, FEWER = (1, 16, 64, 7168), (16, 7168)  # into FP8 caches; into bf16 caches, of the first model


@dataclasses.dataclass(frozen=True)
class Layer:
    model: str
    heads: int
    kv_heads: int
    norm: str


LAYERS = (Layer("Qwen3-0.6B", 16, 8, "cast mul"), Layer("Llama-3.1-8B", 32, 8, ""))


def eager(qkv: Any, cos: Any, sin: Any, weights: Any, caches: Any, scales: Any, slots: Any, norm: str) -> torch.Tensor:
    """What a model says; q is returned, K and V are stored."""
    kv = caches[0].shape[1]
    q, k, v = (part.unflatten(-1, (-1, D)) for part in qkv.split([qkv.shape[-1] - 2 * kv * D, kv * D, kv * D], -1))
    turned = []
    for x, weight in zip((q, k), weights):
        y = normalise(x, weight, 1e-6, norm) if norm else x
        turned.append(y * cos.unsqueeze(2) + rotate_half(y) * sin.unsqueeze(2))
    for x, cache, scale in zip((turned[1], v), caches, scales):
        rows = x.flatten(0, 1)
        cache[slots] = rows if scale is None else (rows.float() / scale).clamp(-448.0, 448.0).to(E4)
    return turned[0]


class Case:
    """One set of buffers. Its caches are as long as a set needs for its slots to be cold: all sets store into one pair."""

    def __init__(self, layer: Layer, tokens: int, caches: list[torch.Tensor]) -> None:
        self.layer, self.caches = layer, caches
        sequence = min(tokens, LONGEST) if tokens > 64 else 1  # one token of many sequences is a decoding step
        batch, fp8 = tokens // sequence, caches[0].dtype is E4
        self.qkv = torch.randn(batch, sequence, (layer.heads + 2 * layer.kv_heads) * D, device="cuda").to(BF16)
        angles = torch.randn(1, sequence, D, device="cuda") * 9
        self.cos, self.sin = angles.cos().to(BF16), angles.sin().to(BF16)
        weights = [(torch.rand(D, device="cuda") + 0.5).to(BF16) for _ in range(2)]
        self.weights: list[Any] = weights if layer.norm else [None, None]
        self.scales: list[Any] = [torch.tensor(x, device="cuda") if fp8 else None for x in (0.02, 0.03)]
        self.slots = torch.randperm(caches[0].shape[0], device="cuda")[:tokens]
        split = self.qkv.split([layer.heads * D, layer.kv_heads * D, layer.kv_heads * D], -1)
        self.q, self.k, self.v = (part.unflatten(-1, (-1, D)) for part in split)
        self.q_out, self.k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (self.q, self.k))
        self.none = torch.empty(0, device="cuda", dtype=BF16)

    def stock(self, compiled: Callable[..., torch.Tensor]) -> torch.Tensor:
        return compiled(self.qkv, self.cos, self.sin, self.weights, self.caches, self.scales, self.slots, self.layer.norm)

    def two(self, copy: Callable[..., None]) -> torch.Tensor:
        rotation = (*self.weights, self.cos, self.sin, 1e-6, self.layer.norm, BF16)
        QK_NORM_ROPE._call(self.q, self.k, *rotation, out0=self.q_out, out1=self.k_out)
        k, v = self.k_out.flatten(0, 1), self.v.flatten(0, 1)
        if self.scales[0] is None:
            copy(k, v, *self.caches, self.slots)
        else:
            DOWNCAST_FP8._call(k, v, *self.caches, *self.scales, self.slots, PROGRAM, PROGRAM, E4, 1, 0, True)
        return self.q_out

    def together(self) -> torch.Tensor:
        fp8 = self.scales[0] is not None
        program, caches = PROGRAM if fp8 else "", [cache.unsqueeze(0) for cache in self.caches]
        tensors = (self.k, self.q, self.v, *self.weights[::-1], self.cos, self.sin, *caches, *self.scales, self.slots)
        options = (1e-6, self.layer.norm, BF16, program, program, E4 if fp8 else BF16, False, 1, 0, True, False)
        OP._call(*tensors, *options, out0=self.q_out, out1=self.none)
        return self.q_out


def stored_copy(k: Any, v: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[slots] = k
    vc[slots] = v


def check(case: Case, sides: dict[str, Callable[[], torch.Tensor]]) -> None:
    """Ours leave the same bytes; stock rounds less, and so some elements of FP8 caches are a step apart."""
    left: dict[str, list[torch.Tensor]] = {}
    for name, side in sides.items():
        for cache in case.caches:
            cache.zero_()
        q = side().float().clone()
        left[name] = [q, *(cache[case.slots].float() for cache in case.caches)]
    what = f"{case.layer.model}, {case.slots.shape[0]} tokens, {case.caches[0].dtype}"
    for one, two, stock in zip(left["together"], left["two"], left["stock"], strict=True):
        if not torch.equal(one, two):
            raise RuntimeError(f"{what}: {int((one != two).sum())} of {one.numel()} elements differ from two launches'")
        distance = float((one - stock).norm() / stock.norm().clamp_min(1e-9))
        if distance > (5e-2 if case.scales[0] is not None else 1e-2):
            raise RuntimeError(f"{what}: distance {distance:.1e} from stock")


def measure(layer: Layer, tokens: int, cache_dtype: torch.dtype) -> dict[str, Any]:
    torch._dynamo.reset()
    caches = [torch.zeros(SLOTS, layer.kv_heads, D, device="cuda", dtype=torch.uint8).to(cache_dtype) for _ in range(2)]
    moved = tokens * D * (2 * (2 * layer.heads + 2 * layer.kv_heads) + 2 * layer.kv_heads * cache_dtype.itemsize)
    cases = [Case(layer, tokens, caches) for _ in range(timing.sets_for(moved, 32))]
    compiled, copy = torch.compile(eager, dynamic=False), torch.compile(stored_copy, dynamic=False)
    sides: dict[str, list[Callable[[], Any]]] = {
        "stock": [lambda c=c: c.stock(compiled) for c in cases],
        "two": [lambda c=c: c.two(copy) for c in cases],
        "together": [c.together for c in cases],
    }
    check(cases[0], {name: calls[0] for name, calls in sides.items()})
    found = timing.in_turn(sides, replays=7)
    ratios = {f"to_{name}": timing.ratio(found[name], found["together"]) for name in ("stock", "two")}
    return {
        "model": layer.model, "tokens": tokens, "cache": str(cache_dtype)[6:], **timing.medians(found), **ratios,
        "of_copy": timing.of_copy(moved, found["together"]),
    }  # fmt: skip


def build(_: Any) -> None:
    """Every kernel that is compared, in parallel. RuntimeError with the first failure."""
    specs = []
    for layer in LAYERS:
        rotation = (BF16, BF16 if layer.norm else None, BF16, layer.norm, BF16)
        specs.append(QK_NORM_ROPE.spec_of_key(rotation, "sm_90a"))
        specs.append(OP.spec_of_key((*rotation, E4, PROGRAM, PROGRAM, FP32, FP32, torch.int64), "sm_90a"))
    specs.append(OP.spec_of_key((BF16, BF16, BF16, LAYERS[0].norm, BF16, BF16, "", "", None, None, torch.int64), "sm_90a"))
    specs.append(DOWNCAST_FP8.spec_of_key((BF16, E4, PROGRAM, PROGRAM, FP32, FP32, torch.int64), "sm_90a"))
    built(specs)


CASES = (*itertools.product(LAYERS, TOKENS, (E4,)), *itertools.product(LAYERS[:1], FEWER, (BF16,)))

if __name__ == "__main__":
    script(measure, CASES, build=build)
