"""Calls of the ops that store K and V in caches, and of the rotation before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.trust.operands import BF16, E4, FP16, FP32, I32, I64, ROUNDED, U8, Args, Call, Maker
from inductor_ext.kernels.downcast_fp8.op import PROGRAM_F32 as STATIC


def _downcast_fp8() -> Iterator[Call]:
    def store(
        tokens: int, slots: int, heads: int, dim: int, *, dtype: torch.dtype = BF16, index: torch.dtype = I64,
        one: bool = False, cache: torch.dtype = E4, locs: Callable[[Maker], Any] | None = None, v_program: str = STATIC,
        **options: Any,
    ) -> Callable[[Maker], Args]:  # fmt: skip
        def make(m: Maker) -> Args:
            loc = m.slots(tokens, slots, index) if locs is None else locs(m)
            x = [m.randn(tokens, heads, dim, dtype=dtype, size=90) for _ in range(1 if one else 2)]
            caches = [m.cache(slots, heads, dim, dtype=cache) for _ in x]
            scales, missing = [m.rand() for _ in x], [None] * (2 - len(x))
            given = [each for pair in (x, caches, scales) for each in (*pair, *missing)]
            return (*given, loc, STATIC, v_program, E4, *_store_options(**options))

        return make

    for tokens in (1, 5, 127, 1025, 5000):  # a block a token; eight tokens a block; claims
        for heads, dim in ((8, 128), (3, 5)):
            yield Call("downcast_fp8", f"{tokens} tokens of [{heads}, {dim}]", store(tokens, tokens + 50, heads, dim))
    yield Call("downcast_fp8", "no token", store(0, 5, 8, 128))
    wide = STATIC.replace("448.0", "57344.0")  # what is past 448 becomes NaN before torch 2.13, of V alone
    yield Call("downcast_fp8", "V clamped past the range", store(40, 64, 8, 128, v_program=wide))
    yield Call("downcast_fp8", "one tensor, int32", store(300, 512, 1, 576, one=True, index=I32))
    yield Call("downcast_fp8", "one tensor, 5 000 tokens", store(5000, 6000, 2, 17, one=True, index=I32))
    yield Call("downcast_fp8", "fp16, caches of bytes", store(33, 64, 2, 80, dtype=FP16, cache=U8))
    yield Call("downcast_fp8", "fp32", store(33, 64, 2, 80, dtype=FP32))
    yield Call("downcast_fp8", "no loc", store(9, 64, 8, 128, locs=lambda m: None, offset=7))
    yield Call("downcast_fp8", "mult and offset", store(9, 64, 8, 128, locs=lambda m: m.slots(9, 31), mult=2, offset=1))
    from_the_end = lambda m: m.slots(40, 64, holes=False) - 32  # noqa: E731
    yield Call("downcast_fp8", "negative rows count from the end", store(40, 64, 2, 32, locs=from_the_end, wrap=True))
    far = lambda m: torch.tensor([64, -65, 2**40, 63, 0, -64, 72, 2**62]).to(m.device)  # noqa: E731
    yield Call("downcast_fp8", "rows far outside", store(8, 64, 2, 16, locs=far))
    yield Call("downcast_fp8", "rows far outside, wrap", store(8, 65, 2, 16, locs=far, wrap=True))
    for tokens in (40, 1500, 9000):
        again = lambda m, t=tokens: m.integers(-2, 13, t)  # noqa: E731
        made = store(tokens, 20, 8, 128, locs=again)
        yield Call("downcast_fp8", f"{tokens} tokens for 13 rows", made, compared=tokens <= 1500)

    def slices(m: Maker) -> Args:
        qkv, both = m.randn(100, 24, 128, size=90), m.cache(300, 2, 8, 128)
        return (
            qkv[:, 8:16], qkv[:, 16:], both[:, 0], both[:, 1], m.rand(), m.rand(), m.slots(100, 300), STATIC, STATIC, E4,
            1, 0, False,
        )  # fmt: skip

    def odd_slices(m: Maker) -> Args:
        odd = m.randn(100, 3 * 131 + 1, size=90)
        caches, scales = (m.cache(128, 131), m.cache(128, 131)), (m.rand(), m.rand())
        return odd[:, 1:132], odd[:, 132:263], *caches, *scales, m.slots(100, 128), STATIC, STATIC, E4, 1, 0, False

    def in_blocks(
        tokens: int, heads: int, dim: int, *, heads_first: bool = False, told: bool = True, a_head: bool = False,
        index: torch.dtype = I64, wrap: bool = False,
    ) -> Callable[[Maker], Args]:  # fmt: skip
        def make(m: Maker) -> Args:
            blocks = tokens // 16 + 3
            sizes = (blocks, 2, heads, 16, dim) if heads_first else (blocks, 2, 16, heads, dim)
            both = m.cache(*sizes)
            caches = [each.transpose(1, 2) if heads_first else each for each in both.unbind(1)]
            slots = m.slots(tokens, blocks * 16, index)
            loc, at = (slots // 16, slots % 16) if told else (slots, None)
            x = [m.randn(tokens, heads, dim, size=90) for _ in "kv"]
            scales = [m.rand(heads) if a_head else m.rand() for _ in "kv"]
            return (*x, *caches, *scales, loc, STATIC, STATIC, E4, 1, 0, wrap, False, at)

        return make

    for tokens in (1, 127, 1025, 5000):
        yield Call("downcast_fp8", f"{tokens} tokens into [blocks, 2, 16, 8, 128]", in_blocks(tokens, 8, 128))
        yield Call("downcast_fp8", f"{tokens} tokens, heads first", in_blocks(tokens, 8, 128, heads_first=True))
    yield Call("downcast_fp8", "slots of blocks, int32", in_blocks(300, 3, 5, told=False, index=I32))
    yield Call("downcast_fp8", "blocks from the end", in_blocks(300, 2, 64, heads_first=True, wrap=True))
    for tokens in (5, 1025, 5000):
        yield Call("downcast_fp8", f"{tokens} tokens, a scale a head, in blocks", in_blocks(tokens, 8, 128, a_head=True))

    def a_head(m: Maker) -> Args:
        x, caches, scales = ([make() for _ in "kv"] for make in (
            lambda: m.randn(90, 4, 24, size=90), lambda: m.cache(128, 4, 24), lambda: m.rand(4),
        ))  # fmt: skip
        return *x, *caches, scales[0], m.rand(), m.slots(90, 128), STATIC, STATIC, E4, *_store_options()

    yield Call("downcast_fp8", "K's scale one a head", a_head)
    yield Call("downcast_fp8", "slices of qkv into one buffer", slices)
    yield Call("downcast_fp8", "odd slices", odd_slices)


def _store_options(mult: int = 1, offset: int = 0, wrap: bool = False) -> Args:
    return mult, offset, wrap, False


def _qk_norm_rope() -> Iterator[Call]:
    def turned(
        batch: int, tokens: int, dim: int, norm: str = "cast mul", *, tables: torch.dtype = BF16, k: bool = True,
        dtype: torch.dtype = BF16, one_table: bool = True, pairs: bool = False, rotary: int = 0, halved: bool = False,
        joined: bool = False,
    ) -> Callable[[Maker], Args]:  # fmt: skip
        def make(m: Maker) -> Args:
            keys, queries = m.randn(batch, tokens, 9 * dim, dtype=dtype).unflatten(-1, (9, dim)).split([2, 7], 2)
            weights = [m.rand(dim, dtype=dtype) if norm else None for _ in range(2 if k else 1)]
            columns = (rotary or dim) // (2 if halved else 1)
            cos, sin = (m.randn(1 if one_table else batch, tokens, columns, *[2] * joined, dtype=tables) for _ in range(2))
            return queries, keys if k else None, *(*weights, None)[:2], cos, sin, 1e-6, norm, dtype, pairs, rotary

        return make

    for dim in (2, 30, 64, 100, 128, 136, 256):
        yield Call("qk_norm_rope", f"heads of {dim}, columns of one buffer", turned(1, 37, dim), ROUNDED)
    yield Call("qk_norm_rope", "no norm", turned(2, 33, 128, ""))
    yield Call("qk_norm_rope", "no norm, no k, one token", turned(1, 1, 72, "", k=False))
    yield Call("qk_norm_rope", "1 + weight, a table a sequence", turned(3, 5, 128, "mul+1 cast", one_table=False), ROUNDED)
    yield Call("qk_norm_rope", "fp32 tables, fp16 heads", turned(2, 9, 64, "mul cast", tables=FP32, dtype=FP16), ROUNDED)
    yield Call("qk_norm_rope", "1 200 tokens", turned(1, 1200, 128), ROUNDED)
    yield Call("qk_norm_rope", "no token", turned(1, 0, 128), ROUNDED)
    yield Call("qk_norm_rope", "halves, tables of half a head", turned(2, 33, 128, "", halved=True))
    yield Call("qk_norm_rope", "pairs", turned(2, 33, 64, "", pairs=True))
    yield Call("qk_norm_rope", "pairs, half tables in fp32", turned(1, 37, 80, "", pairs=True, halved=True, tables=FP32))
    yield Call("qk_norm_rope", "pairs, complex table", turned(2, 37, 80, "", pairs=True, halved=True, tables=FP32, joined=True))
    yield Call("qk_norm_rope", "32 of 80 columns", turned(1, 37, 80, rotary=32, halved=True), ROUNDED)
    yield Call("qk_norm_rope", "pairs of 64 of 128 columns", turned(1, 37, 128, "", pairs=True, rotary=64, halved=True))
    yield Call("qk_norm_rope", "12 of 18 columns, not aligned", turned(1, 37, 18, "", pairs=True, rotary=12))


def _qk_norm_rope_store() -> Iterator[Call]:
    def stored(
        batch: int, tokens: int, dim: int, norm: str = "cast mul", *, cache: torch.dtype = E4, q: bool = True, v: bool = True,
        keep_k: bool = False, index: torch.dtype = I64, per_sequence: bool = False, locs: Any = ..., **options: Any,
    ) -> Callable[[Maker], Args]:  # fmt: skip
        def make(m: Maker) -> Args:
            parts = m.randn(batch, tokens, 11 * dim).unflatten(-1, (11, dim)).split([2, 2, 7], 2)
            count = tokens if per_sequence else batch * tokens
            slots = count + 20
            if per_sequence:  # [B, Hkv, S', D], permuted
                caches = [m.cache(batch, 2, slots, dim).permute(0, 2, 1, 3) for _ in range(2)]
            else:
                caches = [m.cache(1, slots, 2, dim) for _ in range(2)]
            if cache is BF16:
                caches = [each.view(U8).to(BF16) for each in caches]
            fp8 = cache is not BF16
            weights = [m.rand(dim, dtype=BF16) if norm and there else None for there in (True, q)]
            cos, sin = (m.randn(1, tokens, dim) for _ in range(2))
            scales = [m.rand() if fp8 and there else None for there in (True, v)]
            loc = m.slots(count, slots, index) if locs is ... else locs
            program = STATIC if fp8 else ""
            return (
                parts[0], parts[2] if q else None, parts[1] if v else None, *weights, cos, sin, caches[0],
                caches[1] if v else None, *scales, loc, 1e-6, norm, BF16, program, program if v else "", cache, keep_k,
                *_store_options(**options),
            )  # fmt: skip

        return make

    for dim in (30, 64, 128, 256):
        yield Call("qk_norm_rope_store", f"heads of {dim}", stored(1, 37, dim), ROUNDED)
    yield Call("qk_norm_rope_store", "no norm", stored(2, 19, 128, ""))
    yield Call("qk_norm_rope_store", "bf16 caches", stored(2, 19, 128, cache=BF16, keep_k=True), ROUNDED)
    yield Call("qk_norm_rope_store", "bf16 caches, no norm", stored(1, 7, 72, "", cache=BF16))
    yield Call("qk_norm_rope_store", "k alone, int32", stored(1, 33, 128, q=False, v=False, index=I32, keep_k=True), ROUNDED)
    yield Call("qk_norm_rope_store", "a cache a sequence", stored(3, 9, 128, per_sequence=True), ROUNDED)
    yield Call("qk_norm_rope_store", "no loc", stored(1, 9, 64, "", locs=None, offset=3))
    yield Call("qk_norm_rope_store", "1 200 tokens", stored(2, 600, 128), ROUNDED)
    yield Call("qk_norm_rope_store", "no token", stored(1, 0, 128), ROUNDED)


def calls() -> Iterator[Call]:
    yield from _downcast_fp8()
    yield from _qk_norm_rope()
    yield from _qk_norm_rope_store()
