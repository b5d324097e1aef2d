"""KV-cache stores as a model writes them, through torch.compile: stock Inductor against this backend, and call overhead.

    python -m benchmarks.kernels.kv_cache_compiled --out benchmarks/results/h200/kv_cache_compiled.json

K and V [T, 8, 128] bf16, e4m3 caches of 131 072 rows, in the spellings of ``patterns/downcast_fp8.py``: direct, through
``.view``, ``[2, …].unbind(0)``, uint8 viewed as e4m3, slice assignment. CUDA-graph replays of ten calls, median; T ≥ 7168 is
larger than L2 together with its cache rows, smaller T is measured as it is. The bytes that both sides leave in the caches are
compared. "forced" is this backend with ``rules={"downcast_fp8": "always"}``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

import inductor_ext
from benchmarks import timing
from benchmarks.kernels.shared import script
from inductor_ext import registry

E4 = torch.float8_e4m3fn
SLOTS = 131072
TOKENS = (1, 16, 128, 1024, 2048, 4096, 7168, 16384, 65536)


def quantise(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return (x.float() / s).clamp(-448.0, 448.0).to(E4)


def direct(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[slots] = quantise(k, ks)
    vc[slots] = quantise(v, vs)


def view(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc.view(-1, 8, 128).index_put_((slots,), quantise(k, ks))
    vc.view(-1, 8, 128).index_put_((slots,), quantise(v, vs))


def unbind(k: Any, v: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> None:
    kc, vc = kv.unbind(0)
    kc[slots] = quantise(k, ks)
    vc[slots] = quantise(v, vs)


def uint8_view(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc.view(E4)[slots] = quantise(k, ks)
    vc.view(E4)[slots] = quantise(v, vs)


def slice_assignment(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[5 : 5 + k.shape[0]] = quantise(k, ks)
    vc[5 : 5 + k.shape[0]] = quantise(v, vs)


FORMS: dict[str, tuple[Callable[..., None], list[tuple[int, ...]], torch.dtype]] = {
    "direct": (direct, [(SLOTS, 8, 128)] * 2, E4),
    "view": (view, [(SLOTS // 16, 16, 8, 128)] * 2, E4),
    "unbind": (unbind, [(2, SLOTS, 8, 128)], E4),
    "uint8_view": (uint8_view, [(SLOTS, 8, 128)] * 2, torch.uint8),
    "slice": (slice_assignment, [(SLOTS, 8, 128)] * 2, E4),
}


def run(form: str, tokens: int) -> dict[str, Any]:
    fn, shapes, dtype = FORMS[form]
    qkv = torch.randn(tokens, 32, 128, device="cuda", dtype=torch.bfloat16) * 50
    k, v = qkv[:, 16:24], qkv[:, 24:]
    scales = torch.tensor(0.37, device="cuda"), torch.tensor(0.21, device="cuda")
    slots = torch.randperm(SLOTS, device="cuda")[:tokens]
    caches: dict[str, list[torch.Tensor]] = {}
    times: dict[str, float] = {}
    sides = {
        "stock": "inductor",
        "ours": inductor_ext.backend(),
        "forced": inductor_ext.backend(rules={"downcast_fp8": "always"}),
    }
    for side, backend in sides.items():
        torch._dynamo.reset()
        caches[side] = [torch.zeros(shape, dtype=torch.uint8, device="cuda").view(dtype) for shape in shapes]
        compiled = torch.compile(fn, backend=backend, dynamic=False)
        arguments = (k, v, *scales, *caches[side], slots)
        compiled(*arguments)
        times[side] = timing.graph_us(lambda c=compiled, a=arguments: c(*a))
    bytes_of = {side: [cache.view(torch.uint8) for cache in made] for side, made in caches.items()}
    same = all(all(map(torch.equal, bytes_of["stock"], bytes_of[side])) for side in ("ours", "forced"))
    return {
        "form": form, "T": tokens, "stock_us": times["stock"], "ours_us": times["ours"], "forced_us": times["forced"],
        "ratio": times["stock"] / times["ours"], "bytes_equal": same,
    }  # fmt: skip


@functools.cache
def overhead() -> dict[str, float]:
    """Microseconds of one op call from Python, launches included, the GPU far from being the bottleneck."""
    ops = torch.ops.inductor_ext
    direct = {op.name: op._call for op in registry.ops()}  # what generated code calls
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    scale, out = torch.tensor(1.0, device="cuda"), torch.empty(1, 4096, device="cuda", dtype=E4)
    row_scale = torch.empty(1, 1, device="cuda")
    cache = torch.zeros(64, 8, 128, device="cuda", dtype=torch.uint8).view(E4)
    k = torch.randn(1, 8, 128, device="cuda", dtype=torch.bfloat16)
    loc = torch.zeros(1, dtype=torch.int64, device="cuda")
    program = "f32 div:s0 max:-448.0 min:448.0"
    calls = {
        "fp8_downcast": lambda: ops.fp8_downcast.out(x, [scale], program, E4, out=out),
        "fp8_quantize": lambda: ops.fp8_quantize.out(
            x, "row", "div:448.0 f32", "f32 div:scale max:-448.0 min:448.0", E4, out0=out, out1=row_scale
        ),
        "downcast_fp8": lambda: ops.downcast_fp8(k, k, cache, cache, scale, scale, loc, program, program, E4),
        "fp8_downcast, from generated code": lambda: direct["fp8_downcast"](x, [scale], program, E4, out=out),
        "fp8_quantize, from generated code": lambda: direct["fp8_quantize"](
            x, "row", "div:448.0 f32", "f32 div:scale max:-448.0 min:448.0", E4, out0=out, out1=row_scale
        ),
        "downcast_fp8, from generated code": lambda: direct["downcast_fp8"](
            k, k, cache, cache, scale, scale, loc, program, program, E4, 1, 0, True
        ),
        "aten.mul.out (for comparison)": lambda: torch.ops.aten.mul.out(x, x, out=x),
    }
    return {name: timing.call_time(call) * 1e6 for name, call in calls.items()}


if __name__ == "__main__":
    script(run, itertools.product(FORMS, TOKENS), payload=lambda rows: {"rows": rows, "overhead_us": overhead()})
