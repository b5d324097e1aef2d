"""downcast_fp8: K and V, cast to FP8 and stored into their caches at the same rows, become one launch.

    k_cache = index_put(k_cache, [slots], cast(k));  v_cache = index_put(v_cache, [slots], cast(v))
        →  inductor_ext.downcast_fp8(k, v, k_cache!, v_cache!, …)

The cast may have a scale before it, of the tensor or one a head, a clamp, both or neither. Stores through ``index_put``,
``index_copy``, slice assignment and ``copy_``; caches used directly, through ``.view``, as uint8, or as halves of one
``[2, …]`` or ``[blocks, 2, …]`` buffer; rows told by a slot or by a block and a row of it; heads behind rows or before them.
The op mutates the graph input itself, so no copy of the cache is made. A store without a partner is rewritten on its own.
Negative indices count from the end, as they do in ``index_put``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import calling
from inductor_ext.graph import describe, is_opaque, value_of
from inductor_ext.kernels.downcast_fp8.op import OP
from inductor_ext.miss import OLD_ROWS_READ_LATE, Miss, fused
from inductor_ext.patterns.support import cache_store, kv_store
from inductor_ext.patterns.support.kv_store import Half
from inductor_ext.rule import Call, Context, Example, Match, Rule

E4 = torch.float8_e4m3fn

#: Rows (exclusive) between which Inductor's one kernel for a direct, indexed store beats ours, which makes sure that a repeated
#: index stores one row whole: 4.0 against 5.2 µs at 2048 rows of 8 × 128 on an H200, 28.6 against 29.4 at 16 384, but 108
#: against 102 at 65 536 (benchmarks/results/h200/kv_cache_compiled.json).
STOCK_WINS = (256, 32768)


def _stock_wins(tokens: int) -> bool:
    return STOCK_WINS[0] < tokens < STOCK_WINS[1]


def _hint(size: Any) -> int:
    """A size as the graph was traced with; no guard is added."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def guard(node: Node, context: Context) -> Match | None:
    half = kv_store.trace(node)
    if half is None:
        return None
    partner = kv_store.partner(half)
    halves = [half] if partner is None else [partner, half]
    if partner is None and kv_store.follower(half) is not None:
        return None  # the pair is matched at its second store
    if kv_store.insertion_point(halves) is None:
        raise Miss(OLD_ROWS_READ_LATE, node, kv_store.OLD_ROWS_FIRST, describe(half.store.root))
    if not context.forced and all(h.store.direct for h in halves) and not all(is_opaque(h.x) for h in halves):
        fusible = next(h for h in halves if not is_opaque(h.x))
        wanted = "a graph input, a GEMM, attention or another opaque kernel as producer, or a cache behind a view"
        raise Miss(fused("store", "producer"), node, wanted, describe(fusible.x))
    tokens = _hint(half.input_value().shape[0])
    if not context.forced and half.store.loc is not None and all(h.store.direct for h in halves) and _stock_wins(tokens):
        wanted = f"at most {STOCK_WINS[0]} or at least {STOCK_WINS[1]} rows, or a cache behind a view"
        raise Miss("stock stores this many rows faster", node, wanted, f"{tokens} rows")
    why = "forced" if context.forced else "stock copies caches that are behind a view"
    if not context.forced and all(h.store.direct for h in halves):
        why = f"its input comes from {describe(halves[0].x)}"
    detail = f"{'K and V' if len(halves) == 2 else 'one tensor'}: {halves[0].program or 'cast'} → {halves[0].dtype}"
    check = kv_store.checked(half, context)
    return Match(node, (Call(OP, _arguments(halves, check)),), detail, why, (halves, check))


def _arguments(halves: list[Half], check: bool) -> tuple[Any, ...]:
    """Fake arguments of the op, in schema order."""
    k, v = halves[0], halves[1] if len(halves) == 2 else None
    return (
        k.input_value(),
        v and v.input_value(),
        k.destination(),
        v and v.destination(),
        k.scale_value(),
        v and v.scale_value(),
        k.store.loc and value_of(k.store.loc),
        k.program,
        v.program if v else k.program,
        k.dtype,
        value_of(k.store.mult),
        value_of(k.store.offset),
        True,
        check,
        k.store.at and value_of(k.store.at),
    )


def replace(match: Match) -> None:
    halves: list[Half]
    halves, check = match.data
    graph = match.node.graph
    last = halves[-1].store
    point = kv_store.insertion_point(halves)
    assert point is not None
    with kv_store.after(graph, point):
        inputs = [half.insert_input(graph) for half in halves]
        arguments: dict[str, Any] = {
            "k": inputs[0],
            "v": inputs[1] if len(halves) == 2 else None,
            "k_scale": halves[0].insert_scale(graph),
            "v_scale": halves[-1].insert_scale(graph) if len(halves) == 2 else None,
            "loc": last.loc,
            "k_program": halves[0].program,
            "v_program": halves[-1].program,
            "dtype": halves[0].dtype,
            "mult": last.mult,
            "offset": last.offset,
            "wrap": True,
            "check": check,
            "at": last.at,
        }
        kv_store.put(graph, OP.overload, arguments, halves, match.node)


# ---- examples --------------------------------------------------------------------------------------------------------


def _quantise(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return (x.float() / s).clamp(-448.0, 448.0).to(E4)


def _x(device: str) -> torch.Tensor:
    return torch.randn(16, 8, 64, device=device).bfloat16() * 30


def _cache(device: str, *shape: int, dtype: torch.dtype = E4) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8, device=device).view(dtype)


def _single(device: str) -> tuple[Any, ...]:
    k, v, ks, vs, cache, slots = _inputs(2, 64, 8, 64, caches=1)(device)
    return k[:1], v[:1], ks, vs, cache, slots[3:4]


def _slots(device: str) -> torch.Tensor:
    return torch.arange(16, device=device) * 3 % 61


def _inputs(*shape: int, caches: int = 2, dtype: torch.dtype = E4) -> Any:
    def make(device: str) -> tuple[Any, ...]:
        s = torch.tensor(0.5, device=device)
        return (
            _x(device),
            _x(device),
            s,
            s * 2,
            *(_cache(device, *shape, dtype=dtype) for _ in range(caches)),
            _slots(device),
        )

    return make


def _direct(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[slots] = _quantise(k, ks)
    vc[slots] = _quantise(v, vs)


def _view(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc.view(-1, 8, 64).index_put_((slots,), _quantise(k, ks))
    vc.view(-1, 8, 64).index_put_((slots,), _quantise(v, vs))


def _unbind(k: Any, v: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> None:
    kc, vc = kv.unbind(0)
    kc[slots] = _quantise(k, ks)
    vc[slots] = _quantise(v, vs)


def _bytes(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc.view(E4)[slots] = _quantise(k, ks)
    vc.view(E4)[slots] = _quantise(v, vs)


def _index_copy(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc.view(-1, 8, 64).index_copy_(0, slots, _quantise(k, ks).view(torch.uint8))
    vc.view(-1, 8, 64).index_copy_(0, slots, _quantise(v, vs).view(torch.uint8))


def _slice(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[3:19] = _quantise(k, ks)
    vc[3:19] = _quantise(v, vs)


def _strided_slice(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[2:34:2].copy_(_quantise(k, ks))
    vc[2:34:2].copy_(_quantise(v, vs))


def _halves_slice(k: Any, v: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> None:
    kv[0, 3:19] = _quantise(k, ks)
    kv[1, 3:19] = _quantise(v, vs)


def _one(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc.view(-1, 8, 64)[slots] = _quantise(k, ks)


def _clamped(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    """No scale: what a deployment without calibrated scales stores."""
    kc[slots] = k.clamp(-448.0, 448.0).to(E4)
    vc[slots] = v.clamp(-448.0, 448.0).to(E4)


def _cast(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc.view(-1, 8, 64)[slots] = k.to(E4).view(torch.uint8)
    vc.view(-1, 8, 64)[slots] = v.to(E4).view(torch.uint8)


def _cast_and_scaled(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[slots] = k.to(E4)
    vc[slots] = _quantise(v, vs)


def _cast_of_what_is_read(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    """Attention reads k too; a view of it more or less is no other tensor."""
    k, v = k.view(-1, 8, 64), v.view(-1, 8, 64)
    _clamped(k, v, ks, vs, kc, vc, slots)
    return k * 2


def _latent(k: Any, v: Any, ks: Any, vs: Any, cache: Any, slots: Any) -> None:
    """MLA's one cache: the latent row, and the rotated columns behind it."""
    cache[slots] = torch.cat((k.reshape(16, 1, 512), v.reshape(16, 1, 512)), -1).to(E4)


def _read_after(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    _view(k, v, ks, vs, kc, vc, slots)
    return kc.float().sum() + vc.view(-1, 8, 64)[slots].float().sum()


def _other_slots(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[slots] = _quantise(k, ks)
    vc[slots + 1] = _quantise(v, vs)


def _qkv(qkv: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    _, k, v = qkv.split([1024, 512, 512], dim=-1)
    _direct(k.view(-1, 8, 64), v.view(-1, 8, 64), ks, vs, kc, vc, slots)


def _qkv_inputs(device: str) -> tuple[Any, ...]:
    s = torch.tensor(0.5, device=device)
    qkv = torch.randn(16, 2048, device=device).bfloat16()
    return (qkv, s, s * 2, _cache(device, 64, 8, 64), _cache(device, 64, 8, 64), _slots(device))


def _blocks_of_both(k: Any, v: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> None:
    """A cache [blocks, 2, block, H, D], as FlashInfer and vLLM's backends have it: a slot's block, and its row in there."""
    kc, vc = kv.unbind(1)
    kc[slots // 16, slots % 16] = _quantise(k, ks)
    vc[slots // 16, slots % 16] = _quantise(v, vs)


def _slots_in_two(k: Any, v: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> None:
    """[2, blocks, block, H, D], where the two say again what the slot said."""
    block, row = torch.div(slots, 16, rounding_mode="floor"), slots % 16
    kv[0].index_put_((block, row), _quantise(k, ks))
    kv[1].index_put_((block, row), _quantise(v, vs))


def _told_blocks(k: Any, v: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> None:
    """Blocks of a block table."""
    block, row = slots % 4, (slots + 1) % 16
    kv[block, 0, row] = _quantise(k, ks)
    kv[block, 1, row] = _quantise(v, vs)


def _heads_of_blocks(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    """[blocks, H, block, D], written through a view and with an index on either side of H."""
    block, row = slots // 16, slots % 16
    kc.transpose(1, 2)[block, row] = _quantise(k, ks)
    vc[block, :, row] = _quantise(v, vs)


def _heads_of_both(k: Any, v: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> None:
    """[blocks, 2, H, block, D], blocks of a block table."""
    block, row = slots % 4, (slots + 1) % 16
    kv[block, 0, :, row] = _quantise(k, ks)
    kv[block, 1, :, row] = _quantise(v, vs)


def _heads_before_slots(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    """[H, S, D]."""
    kc.transpose(0, 1)[slots] = _quantise(k, ks)
    vc[:, slots] = _quantise(v, vs).transpose(0, 1)


def _scales_a_head(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[slots] = _quantise(k, ks[:, None])
    vc[slots] = _quantise(v, vs.view(1, -1, 1))


def _scale_a_head_before_rows(k: Any, v: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> None:
    """k of one sequence as [1, H, T, D], scaled there; v with one scale."""
    scaled = _quantise(k.transpose(0, 1)[None], ks.view(1, -1, 1, 1))
    kv[:, 0][slots // 16, slots % 16] = scaled.squeeze(0).transpose(0, 1)
    kv[:, 1][slots // 16, slots % 16] = _quantise(v, vs.sum())


def _head_scales(*shape: int, caches: int = 2) -> Any:
    def make(device: str) -> tuple[Any, ...]:
        k, v, _, _, *rest = _inputs(*shape, caches=caches)(device)
        scale = torch.linspace(0.3, 0.9, 8, device=device)
        return k, v, scale, scale * 2, *rest

    return make


MATCHES = (
    Example("direct", _direct, _inputs(64, 8, 64)),
    Example("view", _view, _inputs(4, 16, 8, 64)),
    Example("view_dynamic_shape", _view, _inputs(4, 16, 8, 64), dynamic=True),
    Example("unbind", _unbind, _inputs(2, 64, 8, 64, caches=1)),
    Example("unbind_one_token", _unbind, _single),
    Example("uint8_view", _bytes, _inputs(64, 8, 64, dtype=torch.uint8)),
    Example("uint8_index_copy", _index_copy, _inputs(4, 16, 8, 64, dtype=torch.uint8)),
    Example("slice", _slice, _inputs(64, 8, 64)),
    Example("strided_slice", _strided_slice, _inputs(64, 8, 64)),
    Example("slice_of_half", _halves_slice, _inputs(2, 64, 8, 64, caches=1)),
    Example("one_tensor", _one, _inputs(4, 16, 8, 64)),
    Example("read_after_store", _read_after, _inputs(4, 16, 8, 64)),
    Example("two_indices_two_stores", _other_slots, _inputs(64, 8, 64), count=2),
    Example("slices_of_qkv", _qkv, _qkv_inputs),
    Example("latent_and_rotated_keys", _latent, _inputs(64, 1, 1024, caches=1), mode="always"),
    Example("clamped", _clamped, _inputs(64, 8, 64)),
    Example("cast_into_bytes", _cast, _inputs(4, 16, 8, 64, dtype=torch.uint8)),
    Example("k_cast_and_v_scaled", _cast_and_scaled, _inputs(64, 8, 64)),
    Example("cast_of_what_is_read", _cast_of_what_is_read, _inputs(64, 8, 64)),
    Example("blocks_of_k_and_v", _blocks_of_both, _inputs(4, 2, 16, 8, 64, caches=1)),
    Example("slots_told_in_two", _slots_in_two, _inputs(2, 4, 16, 8, 64, caches=1)),
    Example("blocks_and_rows_of_them", _told_blocks, _inputs(4, 2, 16, 8, 64, caches=1)),
    Example("blocks_and_rows_dynamic_shape", _told_blocks, _inputs(4, 2, 16, 8, 64, caches=1), dynamic=True, count=2),
    Example("heads_before_rows_of_blocks", _heads_of_blocks, _inputs(4, 8, 16, 64)),
    Example("heads_before_rows_of_both", _heads_of_both, _inputs(4, 2, 8, 16, 64, caches=1)),
    Example("heads_before_slots", _heads_before_slots, _inputs(8, 64, 64)),
    Example("scales_a_head", _scales_a_head, _head_scales(64, 8, 64)),
    Example("scale_a_head_before_rows", _scale_a_head_before_rows, _head_scales(4, 2, 16, 8, 64, caches=1)),
)


def _sin(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    _direct(torch.sin(k), torch.sin(v), ks, vs, kc, vc, slots)


def _many(device: str) -> tuple[Any, ...]:
    s = torch.tensor(0.5, device=device)
    kv = [torch.randn(4096, 1, 16, device=device).bfloat16() for _ in range(2)]
    return (*kv, s, s * 2, _cache(device, 8192, 1, 16), _cache(device, 8192, 1, 16), torch.arange(4096, device=device))


def _accumulate(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc.index_put_((slots,), _quantise(k, ks).view(torch.uint8), accumulate=True)


def _strided_slots(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[slots[::2]] = _quantise(k[:8], ks)


def _token_scale(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[slots] = _quantise(k, ks * torch.ones(16, 1, 1, device=k.device))


def _block_of_two(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    """Two tokens a block and offset: indices of two dimensions."""
    at = slots.view(8, 2)
    kc[at // 16, at % 16] = _quantise(k, ks).view(8, 2, 8, 64)


def _used_again(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    q = _quantise(k, ks)
    kc[slots] = q
    return q


def _new_cache(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    fresh = (kc.float() + 1).to(E4)
    fresh[slots] = _quantise(k, ks)
    return fresh


def _columns_apart(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    """A cache [blocks, H, D, block], whose rows have no run of memory at all."""
    kc.permute(0, 3, 1, 2)[slots // 16, slots % 16] = _quantise(k, ks)


NEAR_MISSES = (
    Example("producer_is_pointwise", _sin, _inputs(64, 8, 64), reason="Inductor fuses this store into its producer for free"),
    Example("rows_that_stock_stores_faster", _direct, _many, reason="stock stores this many rows faster"),
    Example("accumulate", _accumulate, _inputs(64, 8, 64, dtype=torch.uint8), reason="the store accumulates"),
    Example("strided_slots", _strided_slots, _inputs(64, 8, 64), reason="index layout"),
    Example("indices_of_two_dimensions", _block_of_two, _inputs(4, 16, 8, 64), reason="index layout"),
    Example("columns_apart", _columns_apart, _inputs(4, 8, 64, 16), reason="cache layout"),
    Example("scale_a_token", _token_scale, _inputs(64, 8, 64), reason="scale layout"),
    Example("rows_used_again", _used_again, _inputs(64, 8, 64), reason="what is stored in FP8 has a second user"),
    Example("cache_made_in_graph", _new_cache, _inputs(64, 8, 64), reason="the cache is not a graph input"),
)

RULE = Rule(
    name="downcast_fp8",
    doc="K and V scaled, clamped, cast to FP8 and stored into their caches → one launch",
    anchors=calling(*cache_store.SCATTERS),
    guard=guard,
    replace=replace,
    matches=MATCHES,
    near_misses=NEAR_MISSES,
)
