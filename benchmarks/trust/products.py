"""Calls of the ops that multiply matrices: FP8 products and their ends, grouped products, attention; and of moe_combine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.trust.operands import ATTENTION, BF16, E4, E5, FP16, FP32, I32, I64, PRODUCT, ROUNDED, Args, Call, Maker
from inductor_ext.moe import mx

# ---- products --------------------------------------------------------------------------------------------------------

STREAMS = ("stream:8x64/1", "stream:8x128/4", "stream:16x64/8", "stream:32x128/2", "stream:64x64/4", "stream:128x128/2")
TILES = (
    *("tile:64x128p", "tile:64x256p", "tile:128x128p", "tile:128x160p", "tile:128x192p", "tile:128x128c", "tile:128x256c"),
    *("tile:256x128c@2x1", "tile:128x128p@2x1", "tile:128x128p@1x2"),
)


def _scaled_mm() -> Iterator[Call]:
    def product(
        config: str, m_n_k: tuple[int, int, int], *, fast: bool = True, rowwise: bool = True, bias: bool = True,
        types: tuple[torch.dtype, torch.dtype, torch.dtype] = (E4, E4, BF16), pitched: bool = False,
    ) -> Callable[[Maker], Args]:  # fmt: skip
        def make(m: Maker) -> Args:
            rows, n, k = m_n_k
            extra = 32 if pitched else 0
            a = m.randn(rows, k + extra, dtype=types[0])[:, extra // 2 : extra // 2 + k]
            b = m.column_major(n, k + extra, types[1])[:k]
            scales = (m.rand(rows, 1), m.rand(1, n)) if rowwise else (m.rand(), m.rand())
            added = m.randn(n, dtype=types[2]) if bias else None
            return [a], [b], [scales[0]], [scales[1]], [added], types[2], fast, True, config

        return make

    def group(config: str, shared: bool, ns: Sequence[int]) -> Callable[[Maker], Args]:
        def make(m: Maker) -> Args:
            count = 1 if shared else len(ns)
            a, scale_a = [m.randn(70, 144, dtype=E4) for _ in range(count)], [m.rand(70, 1) for _ in range(count)]
            b, scale_b = [m.column_major(n, 144) for n in ns], [m.rand(1, n) for n in ns]
            return a, b, scale_a, scale_b, [None] * len(ns), BF16, True, False, config

        return make

    for config in (*STREAMS, *TILES):
        for shape in ((5, 80, 144), (130, 272, 528), (300, 1040, 1040)):
            yield Call("scaled_mm", f"{config} {list(shape)}", product(config, shape), PRODUCT)
    for config in ("stream:64x64/4", "stream:16x64/8", "tile:128x128c", "tile:128x128p"):
        what = f"{config}, exact accumulation"
        yield Call("scaled_mm", what, product(config, (130, 272, 528), fast=False, rowwise=False, bias=False), PRODUCT)
        yield Call("scaled_mm", f"{config}, pitched operands", product(config, (70, 208, 272), pitched=True), PRODUCT)
    yield Call("scaled_mm", "e4m3 by e5m2, fp32", product("stream:64x128/2", (77, 144, 528), types=(E4, E5, FP32)), PRODUCT)
    yield Call("scaled_mm", "e5m2 by e4m3, fp16", product("tile:128x160p", (77, 144, 528), types=(E5, E4, FP16)), PRODUCT)
    for config in ("stream:16x64/8", "tile:128x128p"):
        yield Call("scaled_mm", f"{config}, one row", product(config, (1, 16, 16)), PRODUCT)
        yield Call("scaled_mm", f"{config}, no row", product(config, (0, 16, 32)), PRODUCT)
        yield Call("scaled_mm", f"{config}, three side by side", group(config, True, (32, 128, 208)), PRODUCT)
        yield Call("scaled_mm", f"{config}, six in two launches", group(config, False, (16, 64, 48, 80, 96, 16)), PRODUCT)


def _scaled_mm_add() -> Iterator[Call]:
    def added(config: str, rows: int, n: int, k: int, pitch: int = 0) -> Callable[[Maker], Args]:
        def make(m: Maker) -> Args:
            residual = m.randn(rows, n + pitch)[:, pitch // 2 : pitch // 2 + n]
            operands = m.randn(rows, k, dtype=E4), m.column_major(n, k), m.rand(rows, 1), m.rand(1, n)
            return *operands, m.randn(n), residual, BF16, True, True, config

        return make

    for config in ("tile:128x128p", "tile:64x128p", "tile:128x160p"):
        for rows, n, k in ((5, 80, 144), (130, 272, 528)):
            yield Call("scaled_mm_add", f"{config} {[rows, n, k]}", added(config, rows, n, k, 16), PRODUCT)
    yield Call("scaled_mm_add", "one row", added("tile:128x128p", 1, 16, 16), PRODUCT)
    yield Call("scaled_mm_add", "no row", added("tile:128x128p", 0, 16, 16), PRODUCT)


def _scaled_mm_act_mul() -> Iterator[Call]:
    def gated(config: str, act: str, rows: int, n: int, k: int, fast: bool = True) -> Callable[[Maker], Args]:
        def make(m: Maker) -> Args:
            operands = m.randn(rows, k, dtype=E4), m.column_major(n, k), m.column_major(n, k)
            scales = m.rand(rows, 1) * 0.1, m.rand(1, n), m.rand(1, n)
            return *operands, *scales, m.randn(n), m.randn(n), act, BF16, fast, True, config

        return make

    kinds = (("tile:128x128p", "silu", True), ("tile:64x256p", "gelu_tanh", True), ("tile:128x128c", "gelu", False))
    for config, act, fast in kinds:
        for rows, n, k in ((5, 80, 144), (130, 272, 528)):
            made = gated(config, act, rows, n, k, fast)
            yield Call("scaled_mm_act_mul", f"{config} {act} {[rows, n, k]}", made, ROUNDED)
    yield Call("scaled_mm_act_mul", "one row", gated("tile:128x128p", "silu", 1, 16, 16), ROUNDED)


def _scaled_mm_rope() -> Iterator[Call]:
    def turned(
        config: str, norm: str, batch: int, tokens: int, ns: Sequence[int], rotated: int = 2, fast: bool = True
    ) -> Callable[[Maker], Args]:
        def make(m: Maker) -> Args:
            b, scale_b = [m.column_major(n, 272) for n in ns], [m.rand(1, n) for n in ns]
            weights = [m.rand(128, dtype=BF16) if norm and i < rotated else None for i in range(2)]
            cos, sin = (m.randn(1, tokens, 128) for _ in range(2))
            first = m.randn(batch * tokens, 272, dtype=E4), b, m.rand(batch * tokens, 1), scale_b
            return *first, *weights, cos, sin, rotated, 1e-6, norm, BF16, fast, True, config

        return make

    qkv = (256, 128, 128)
    yield Call("scaled_mm_rope", "pingpong, norm", turned("tile:128x128p", "cast mul", 2, 65, qkv), ROUNDED)
    yield Call("scaled_mm_rope", "pingpong, no norm", turned("tile:128x128p", "", 1, 130, qkv), ROUNDED)
    yield Call("scaled_mm_rope", "64 rows", turned("tile:64x128p", "cast mul", 3, 11, qkv), ROUNDED)
    yield Call("scaled_mm_rope", "exact, 1 + weight", turned("tile:128x128c", "mul+1 cast", 1, 130, qkv, fast=False), ROUNDED)
    yield Call("scaled_mm_rope", "one token, q alone", turned("tile:128x128p", "", 1, 1, (128,), 1), ROUNDED)


def _mxfp8_grouped_mm() -> Iterator[Call]:
    def grouped(
        tokens: int, n: int, k: int, kind: str = "bf16", out: torch.dtype = BF16, left: int = 0, pitch: int = 0
    ) -> Callable[[Maker], Args]:
        """The last ``left`` tokens are of no expert."""

        def make(m: Maker) -> Args:
            block = 128 if kind == "fp8_128" else 32
            w, w_scale = mx.quantize(m.randn(4, n, k, dtype=FP32), "rceil", block)
            x, scale = m.randn(tokens, k + pitch)[:, :k], None
            if kind == "mxfp8":
                x, scale = mx.quantize(x.float(), "rceil")
            elif kind != "bf16":
                x, scale = x.to(E4), m.rand(tokens, 1)
            return x, scale, w, w_scale, m.ends(tokens - left, 4), out, False, block

        return make

    # Four experts, so that each line takes another tile of hopper.py's TILES, which go by tokens an expert.
    counts = (3, 19, 47, 95, 255, 719, 2047, 2051)
    for tokens in counts:
        yield Call("mxfp8_grouped_mm", f"bf16, {tokens} tokens", grouped(tokens, 136, 96, left=tokens % 3), PRODUCT)
    for kind, k in (("fp8", 96), ("fp8_128", 256)):
        for tokens in (3, 47, 95, 255, 719):
            yield Call("mxfp8_grouped_mm", f"{kind}, {tokens} tokens", grouped(tokens, 264, k, kind), PRODUCT)
    for tokens in (47, 719):
        yield Call("mxfp8_grouped_mm", f"mxfp8, {tokens} tokens", grouped(tokens, 72, 160, "mxfp8"), PRODUCT)
    yield Call("mxfp8_grouped_mm", "fp32 out, pitched tokens", grouped(95, 72, 96, out=FP32, pitch=32), PRODUCT)
    yield Call("mxfp8_grouped_mm", "one token, 8 channels", grouped(1, 8, 32), PRODUCT)
    yield Call("mxfp8_grouped_mm", "no token", grouped(0, 8, 32), PRODUCT)


def _moe_combine() -> Iterator[Call]:
    def combined(
        tokens: int, top_k: int, hidden: int, *, weights: torch.dtype | None = BF16, index: torch.dtype = I64,
        masked: torch.dtype | None = None, pitch: int = 0, low: int | None = None, high: int | None = None,
    ) -> Callable[[Maker], Args]:  # fmt: skip
        def make(m: Maker) -> Args:
            rows = max(tokens * top_k, 1)
            y = m.randn(rows, hidden + pitch)[:, pitch // 2 : pitch // 2 + hidden]
            given = m.rand(tokens, top_k, dtype=weights) if weights is not None else None
            inverse = m.integers(0 if low is None else low, rows if high is None else high, tokens, top_k, dtype=index)
            experts = m.integers(0, 8, tokens, top_k, dtype=masked) if masked is not None else None
            return y, given, inverse, experts, 6, BF16

        return make

    for top_k, hidden in ((1, 7), (2, 72), (3, 100), (8, 2048), (64, 136)):
        yield Call("moe_combine", f"{top_k} rows of {hidden}", combined(33, top_k, hidden), PRODUCT)
    yield Call("moe_combine", "fp32 weights, masked, pitched", combined(33, 8, 72, weights=FP32, masked=I64, pitch=16), PRODUCT)
    yield Call("moe_combine", "no weights, int32, odd pitch", combined(9, 4, 33, weights=None, index=I32, pitch=3), PRODUCT)
    yield Call("moe_combine", "indices from the end", combined(9, 4, 64, low=-36, high=0), PRODUCT)
    yield Call("moe_combine", "indices far outside", combined(9, 4, 64, low=-(2**40), high=2**40), compared=False)
    yield Call("moe_combine", "no token", combined(0, 2, 64), PRODUCT)


# ---- attention -------------------------------------------------------------------------------------------------------

def _varlen_attention() -> Iterator[Call]:
    def packed(
        width: int, heads: int, kv_heads: int, tokens: int, sequences: int, left: int = -1, right: int = 0, *,
        dtype: torch.dtype = BF16, pad: int = 0, odd: int = 0,
    ) -> Callable[[Maker], Args]:  # fmt: skip
        """Columns of one qkv buffer, ``odd`` elements past an address of 16 bytes; ``pad`` tokens of no sequence."""

        def make(m: Maker) -> Args:
            columns = (heads + 2 * kv_heads) * width
            qkv = m.randn(tokens + pad, columns + 8, dtype=dtype)[:, odd : odd + columns]
            q, k, v = qkv.unflatten(1, (-1, width)).split([heads, kv_heads, kv_heads], 1)
            ends = torch.cat([torch.zeros(1, dtype=I32, device=m.device), m.ends(tokens, sequences)])
            return q, k, v, ends, tokens, width**-0.5, left, right, 0.0, pad > 0, "hopper"

        return make

    def batch(width: int, heads: int, kv_heads: int, size: int, length: int, right: int) -> Callable[[Maker], Args]:
        def make(m: Maker) -> Args:
            q, k, v = (m.randn(size, length, each, width) for each in (heads, kv_heads, kv_heads))
            return q, k, v, None, 0, width**-0.5, -1, right, 0.0, False, "hopper"

        return make

    yield Call("varlen_attention", "128 wide, packed, padded", packed(128, 2, 1, 499, 6, pad=9), ATTENTION)
    yield Call("varlen_attention", "128 wide, two heads a tile", packed(128, 32, 16, 110, 5, pad=9), ATTENTION)
    yield Call("varlen_attention", "128 wide, full, one head", packed(128, 1, 1, 653, 2, right=-1), ATTENTION)
    yield Call("varlen_attention", "64 wide, window", packed(64, 3, 3, 322, 3, 40, 10, pad=5), ATTENTION)
    yield Call("varlen_attention", "64 wide, causal, GQA", packed(64, 8, 2, 257, 4), ATTENTION)
    yield Call("varlen_attention", "64 wide, one token", packed(64, 2, 1, 1, 1), ATTENTION)
    yield Call("varlen_attention", "128 wide, batch, causal", batch(128, 4, 2, 2, 131, 0), ATTENTION)
    yield Call("varlen_attention", "64 wide, batch, full", batch(64, 2, 2, 3, 77, -1), ATTENTION)
    yield Call("varlen_attention", "128 wide, fp16", packed(128, 2, 2, 200, 3, dtype=FP16), ATTENTION)
    yield Call("varlen_attention", "an address that no copy engine reads", packed(128, 2, 1, 70, 2, odd=1), ATTENTION)


def calls() -> Iterator[Call]:
    yield from _scaled_mm()
    yield from _scaled_mm_add()
    yield from _scaled_mm_act_mul()
    yield from _scaled_mm_rope()
    yield from _mxfp8_grouped_mm()
    yield from _moe_combine()
    yield from _varlen_attention()
