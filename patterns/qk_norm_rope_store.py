"""qk_norm_rope_store: the launch that turns q and k stores k, and v with it, into the KV cache.

    k = norm(k) * cos + turned(norm(k)) * sin;  q alike;  k_cache = index_put(k_cache, [slots], cast(k));  v_cache = … cast(v)
        →  q, _ = inductor_ext.qk_norm_rope_store(k, q, v, …, k_cache!, v_cache!, …)

Stores that `downcast_fp8` takes, but for slots that lie in blocks and a scale a head, and the same of rows in the cache's own
dtype; also along the third dimension of a cache [B, H, S, D], as Hugging Face's ``StaticCache`` stores its rows. k is written
as a tensor only where something else reads it. v comes along if it goes to the same rows and is in memory in the dtype that k
has before its rotation.

On an H200 one launch is faster than two, and than stock, for one token into FP8 caches (1.11 to 1.17 times two) and for 16
and 7168 into caches of k's dtype (1.30, 1.03); not for 16 and 64 into FP8 caches (0.71 to 0.89), and at 7168 for one of two
models (benchmarks/results/h200/qk_norm_rope_store.json). Elsewhere, and on a GPU on which it was not measured (``MEASURED``),
the rule waits for ``always``: two launches do then what it does in one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from inductor_ext import torch_compat
from inductor_ext.calls import CONVERT, aten, calling, is_call
from inductor_ext.graph import call, describe, erase_dead, is_opaque, is_reshape, known_equal, value_of
from inductor_ext.kernels.qk_norm_rope_store.op import MEASURED, OP
from inductor_ext.miss import OLD_ROWS_READ_LATE, SCALE_LAYOUT, Miss, found_or_none
from inductor_ext.patterns.downcast_fp8 import E4, _cache, _quantise
from inductor_ext.patterns.qk_norm_rope import (
    _by_halves,
    _by_pairs,
    _llama_norm,
    _rope,
    _turned_as_complex,
    rotation_arguments,
    rotations,
    turned,
)
from inductor_ext.patterns.support import cache_store, columns, has_run, kv_store
from inductor_ext.patterns.support.kv_store import Half
from inductor_ext.patterns.support.rope import ANCHORS, Rope
from inductor_ext.rule import Call, Context, Example, Match, Rule

#: What a search for k's store follows: the steps of an FP8 cast, and copies.
_STEPS = (
    CONVERT,
    aten.clone.default,
    aten.view.dtype,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.clamp_min.default,
    aten.clamp_min.Tensor,
    aten.clamp_max.default,
    aten.clamp_max.Tensor,
    aten.maximum.default,
    aten.minimum.default,
)


@dataclasses.dataclass(frozen=True)
class _Plan:
    ropes: tuple[Rope, ...]
    index: int  # of k among them
    k: Half
    v: Half | None
    why_not_v: str
    place: Node  # the call stands behind it
    waiting: tuple[Node, ...]  # views of q, k and the new rows that are before it
    keep_k: bool
    check: bool = False  # whether an index past the cache is an error

    @property
    def halves(self) -> list[Half]:
        return [self.k] if self.v is None else [self.k, self.v]

    @property
    def end(self) -> Node:
        """k, turned."""
        return self.ropes[self.index].end

    def sizes(self) -> tuple[Any, ...]:
        """[B, S, Hkv, D]."""
        return tuple(self.ropes[self.index].x.value.shape)

    def view(self, half: Half, base: torch.Tensor) -> torch.Tensor:
        """The cache as [N, S, Hkv, D]."""
        rows = half.destination(base)
        if half.by_sequence:
            return rows.permute(0, 2, 1, 3)
        if half.blocks:  # one
            return rows
        *_, heads, columns = self.sizes()
        slots, pitch = rows.shape[0], rows.stride(0)
        with base.fake_mode:
            return rows.as_strided((1, slots, heads, columns), (slots * pitch, pitch, columns, 1), rows.storage_offset())

    def v_value(self) -> torch.Tensor | None:
        if self.v is None:
            return None
        rows = self.v.input_value()
        with rows.fake_mode:
            return rows.permute(0, 2, 1, 3) if self.v.by_sequence else rows.reshape(self.sizes())

    def insert_v(self, graph: Graph) -> Node | None:
        if self.v is None:
            return None
        rows = self.v.insert_input(graph)
        if self.v.by_sequence:
            return call(graph, aten.permute.default, rows, [0, 2, 1, 3], like=self.end)
        return call(graph, aten.reshape.default, rows, torch_compat.symbolic(graph, list(self.sizes())), like=self.end)

    def arguments(self, x: list[Any], tables: tuple[Any, Any], v: Any, caches: Sequence[Any]) -> dict[str, Any]:
        """The op's arguments by name, nodes for tensors but for what is given."""
        one, two, weight, other_weight, cos, sin, eps, norm, dtype, *_ = rotation_arguments(self.ropes, x, tables)
        k, q, k_weight, q_weight = (one, two, weight, other_weight) if self.index == 0 else (two, one, other_weight, weight)
        k_cache, v_cache = (*caches, None, None)[:2]
        return {
            "k": k,
            "q": q,
            "v": v,
            "k_weight": k_weight,
            "q_weight": q_weight,
            "cos": cos,
            "sin": sin,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "k_scale": self.k.scale,
            "v_scale": self.v and self.v.scale,
            "loc": self.k.store.loc,
            "eps": eps,
            "norm": norm,
            "dtype": dtype,
            "k_program": self.k.program,
            "v_program": self.v.program if self.v else self.k.program,
            "cache_dtype": self.k.dtype,
            "keep_k": self.keep_k,
            "mult": self.k.store.mult,
            "offset": self.k.store.offset,
            "wrap": True,
            "check": self.check,
            **dict(zip(("pairs", "rotary"), turned(self.ropes[0]))),
        }

    def insert_arguments(self, graph: Graph) -> dict[str, Any]:
        """`arguments` of nodes, but for the caches."""
        first = self.ropes[0]
        x = [rope.x.put(graph, rope.end) for rope in self.ropes]
        tables = first.put_tables(graph)
        named = self.arguments(x, tables, self.insert_v(graph), ())
        return {name: value for name, value in named.items() if name not in kv_store.NAMES}

    def fake_arguments(self) -> tuple[Any, ...]:
        """The op's arguments in schema order, fakes for tensors."""
        caches = [self.view(half, value_of(half.store.root)) for half in self.halves]
        first = self.ropes[0]
        named = self.arguments([r.x.value for r in self.ropes], (first.cos.value, first.sin.value), self.v_value(), caches)
        return tuple(map(value_of, named.values()))

    def outputs(self) -> tuple[torch.Tensor, ...]:
        with value_of(self.end).fake_mode:
            return OP.fake(*self.fake_arguments())


def guard(node: Node, context: Context) -> Match | None:
    ropes = found_or_none(rotations, node, context.forced)
    if ropes is None or (node is not ropes[0].end and node not in ropes[0].inner):
        return None  # qk_norm_rope says why; or a pair, which is looked at where the first of the two ends
    found = _plan(tuple(ropes), context.forced)
    if found is None:
        return None
    found = dataclasses.replace(found, check=kv_store.checked(found.k, context))
    has_run.check(found.end, context, value_of(found.k.x).device, MEASURED, has_run.NOT_MEASURED)
    _check_gain(found, context)
    stored = "K and V" if found.v else f"K alone ({found.why_not_v})"
    program = "copied" if found.k.chain is None else found.k.program or "cast"
    detail = f"{stored}: {program} → {found.k.dtype}{', k is read too' if found.keep_k else ''}"
    why = "forced" if context.forced else "k is stored while it is in registers"
    return Match(found.end, (Call(OP, found.fake_arguments()),), detail, why, found)


#: Tokens from which storing rows as they are was faster in one launch.
LEAST_COPIED = 16


def _check_gain(found: _Plan, context: Context) -> None:
    """Miss where one launch was not measured to be faster than two."""
    sequences, positions, *_ = found.sizes()
    tokens, copied = sequences * positions, found.k.chain is None
    if context.forced or value_of(found.k.x).device.type != "cuda":
        return
    if statically_known_true(tokens >= LEAST_COPIED) if copied else known_equal(tokens, 1):
        return
    sizes = f"one token into an FP8 cache, {LEAST_COPIED} or more into one of k's dtype"
    wanted = f'{sizes}, or rules={{"{context.rule}": "always"}}'
    raise Miss("two launches measured faster", found.end, wanted, f"{tokens} into {found.k.dtype}")


def _plan(ropes: tuple[Rope, ...], forced: bool) -> _Plan | None:
    """How k's store, and v's, go into the launch; the first Miss where there is a store and they do not."""
    missed = None
    for index, rope in enumerate(ropes):
        for scatter in _stores_of(rope.end):
            try:
                k = _stored(rope, scatter)
                if k is not None:
                    return _with_v(ropes, index, k, forced)
            except Miss as miss:
                missed = missed or miss
    if missed is not None:
        raise missed
    return None


def _stored(rope: Rope, scatter: Node) -> Half | None:
    """The store of ``rope``'s end: a rounding that ends the rotation is not the first step of the cast."""
    k = kv_store.trace_any(scatter)
    if k is None or k.chain is None or k.x is rope.end:
        return k
    shorter = k.chain.behind_convert()
    if shorter is None or shorter.x is not rope.end:
        return k
    views = [view for view in k.input_views if view not in k.chain.pre_views]
    return dataclasses.replace(k, chain=shorter, x=shorter.x, input_views=views)


def _stores_of(result: Node) -> Iterator[Node]:
    """Scatters of what is made of ``result`` by views and steps."""
    pending, seen = [result], {result}
    while pending:
        node = pending.pop()
        for user in node.users:
            if is_call(user, *cache_store.SCATTERS):
                if kv_store.stored_value(user) is node:
                    yield user
            elif (is_reshape(user) or is_call(user, *_STEPS)) and user not in seen:
                seen.add(user)
                pending.append(user)


def _with_v(ropes: tuple[Rope, ...], index: int, k: Half, forced: bool) -> _Plan:
    _check_k(ropes[index], k)
    v = kv_store.partner(k, kv_store.trace_any, sink=True) or kv_store.follower(k, kv_store.trace_any, sink=True)
    why_not = "v does not go to the same rows, in k's dtype" if v is None else _why_not_v(ropes, k, v, forced)
    if v is not None and not why_not:
        try:
            return _placed(ropes, index, k, v)
        except Miss as miss:
            why_not = f"{miss.reason}: {miss.found}"
    return _placed(ropes, index, k, None, why_not)


def _in_blocks(half: Half) -> bool:
    """Whether a cache's slots are not at one distance: those of one block, as [H, S, D] has them, are."""
    return half.store.at is not None or (half.blocks and not known_equal(half.destination().shape[0], 1))


def _check_k(rope: Rope, k: Half) -> None:
    if k.x is not rope.end:
        wanted = "k through views and the steps of an FP8 cast"
        raise Miss("k is changed on its way to the cache", k.scatter, wanted, describe(k.x))
    if _in_blocks(k):
        found = f"{list(k.destination().shape)} with strides {list(k.destination().stride())}"
        raise Miss("the cache lies in blocks", k.scatter, "slots that lie at one distance, told by one index", found)
    if k.scale_a_head:
        raise Miss(SCALE_LAYOUT, k.scatter, "one scale of one element", describe(k.scale))
    turned, rows = rope.turned, k.input_value()
    batch, sequence, heads, columns = turned.shape
    same = turned.untyped_storage()._cdata == rows.untyped_storage()._cdata
    if k.by_sequence:
        with turned.fake_mode:
            expected = turned.permute(0, 2, 1, 3)
        # Of one sequence there is one row of the cache for each position too, whatever the dimension is called.
        same = same and _same_layout(rows, expected) and known_equal(value_of(k.store.root).shape[0], batch)
    else:
        same = same and known_equal(rows.shape[0], batch * sequence) and known_equal(rows.numel(), turned.numel())
        same = same and (known_equal(rows.shape[0], 1) or known_equal(rows.stride(0), heads * columns))
    if not same:
        wanted = f"a view of [B, S, {heads}, {columns}] as rows of tokens"
        found = f"{list(rows.shape)} with strides {list(rows.stride())}"
        raise Miss("the stored rows are not k's tokens", k.scatter, wanted, found)


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    sizes = zip(a.shape, b.shape, a.stride(), b.stride())
    return a.dim() == b.dim() and all(known_equal(x, y) and (known_equal(x, 1) or known_equal(s, t)) for x, y, s, t in sizes)


def _why_not_v(ropes: tuple[Rope, ...], k: Half, v: Half, forced: bool) -> str:
    """Why ``v``, which goes to k's rows, is not stored with it; "" where it is."""
    before = ropes[0].x.value.dtype
    if value_of(v.x).dtype != before:
        return f"v is {value_of(v.x).dtype}, k was {before}"
    if k.by_sequence != v.by_sequence or any(v.x is rope.end for rope in ropes):
        return "v is another result of the rotation"
    if v.scale_a_head:
        return "v has a scale a head"
    if not forced and not is_opaque(v.x):
        return f"Inductor fuses v's store into {describe(v.x)} for free"
    return ""


def _placed(ropes: tuple[Rope, ...], index: int, k: Half, v: Half | None, why_not_v: str = "") -> _Plan:
    """The plan, if there is a place where all that the stores need is there and nothing that they make is needed yet."""
    halves = sorted([k] if v is None else [k, v], key=lambda half: half.scatter)
    kv_store.check_inputs(halves, [node for rope in ropes for node in rope.inputs])
    waiting: list[Node] = []
    ends = [rope.end for rope in ropes]
    inputs = [columns.floor(node) for rope in ropes for node in rope.inputs]
    place = kv_store.insertion_point(halves, waiting, ends, inputs)
    if place is None:
        raise Miss(OLD_ROWS_READ_LATE, k.scatter, kv_store.OLD_ROWS_FIRST, describe(k.store.root))
    dying = _dying(k)
    early = kv_store.early_reader(ends, dying, place, waiting)
    if early is not None:
        wanted, found = "readers behind everything that the stores need", f"{describe(early)} before {describe(place)}"
        raise Miss("q or k is read before k can be stored", early, wanted, found)
    keep_k = any(user not in dying for user in ends[index].users)
    return _Plan(ropes, index, k, v, why_not_v, place, tuple(sorted(waiting)), keep_k)


def _dying(k: Half) -> set[Node]:
    """What of k's way into the cache goes with the store, nothing else reading it."""
    inner = [] if k.chain is None else [*k.chain.inner, k.chain.cast]
    value, path = kv_store.stored_value(k.scatter), {*inner, *k.input_views}
    while value is not (k.x if k.chain is None else k.chain.cast):  # views as bytes, too
        path.add(value)
        value = value.args[0]
    dead = {k.scatter}
    for node in sorted(path, reverse=True):
        if all(user in dead for user in node.users):
            dead.add(node)
    return dead


def replace(match: Match) -> None:
    plan: _Plan = match.data
    graph, ends, outputs = match.node.graph, [rope.end for rope in plan.ropes], plan.outputs()
    for view in reversed(plan.waiting):
        plan.place.append(view)
    place = plan.place
    for needed in columns.behind((node for rope in plan.ropes for node in rope.inputs), place):
        place.append(needed)
        place = needed
    with kv_store.after(graph, place):
        arguments = plan.insert_arguments(graph)
        q, k = kv_store.put(graph, OP.overload, arguments, plan.halves, plan.end, plan.view, outputs)
    made = [k if index == plan.index else q for index in range(len(ends))]
    read = [not end._erased and len(end.users) > 0 for end in ends]  # k may have been read by its store alone
    with graph.inserting_before(k.next):  # what stood behind the place may have gone with the stores
        results = [rope.put_result(graph, each) if live else None for rope, each, live in zip(plan.ropes, made, read)]
    for end, result in zip(ends, results):
        if result is not None:
            end.replace_all_uses_with(result)
        erase_dead(end)
    for each in (q, k):
        erase_dead(each)


# ---- examples --------------------------------------------------------------------------------------------------------

HEADS, KV_HEADS, D = 4, 2, 16
B, S, SLOTS = 3, 6, 40


def _qkv(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    parts = qkv.split([HEADS * D, KV_HEADS * D, KV_HEADS * D], -1)
    return tuple(part.unflatten(-1, (-1, D)) for part in parts)


def _turned(qkv: Any, cos: Any, sin: Any, weights: Any = None) -> tuple[torch.Tensor, ...]:
    """q and k as [B, S, H, D], v alike."""
    q, k, v = _qkv(qkv)
    if weights is not None:
        q, k = _llama_norm(q, weights[0]), _llama_norm(k, weights[1])
    return *_rope(q, k, cos, sin, dim=2), v


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, *x.shape[-2:])


def _fp8(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any, *weights: Any) -> torch.Tensor:
    q, k, v = _turned(qkv, cos, sin, weights or None)
    kc.view(-1, KV_HEADS, D)[slots] = _quantise(_rows(k), ks)
    vc.view(-1, KV_HEADS, D)[slots] = _quantise(_rows(v), vs)
    return q


def _heads_before_slots(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    """Caches [H, S, D]."""
    q, k, v = _turned(qkv, cos, sin)
    kc.transpose(0, 1)[slots] = _quantise(_rows(k), ks)
    vc[:, slots] = _quantise(_rows(v), vs).transpose(0, 1)
    return q


def _slots_of_blocks(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> torch.Tensor:
    """[2, blocks, block, H, D]: the block of a slot, and its row in there."""
    q, k, v = _turned(qkv, cos, sin)
    kv[0, slots // 10, slots % 10] = _quantise(_rows(k), ks)
    kv[1, slots // 10, slots % 10] = _quantise(_rows(v), vs)
    return q


def _in_order(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    """Hugging Face's layout: heads before positions, and rows made of them again."""
    q, k, v = (each.transpose(1, 2) for each in _qkv(qkv))
    q, k = _rope(q, k, cos, sin)
    kc[slots] = _quantise(_rows(k.transpose(1, 2)), ks)
    vc[slots] = _quantise(_rows(v.transpose(1, 2)), vs)
    return q


def _packed(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    """vLLM's: tokens of all sequences in one row, their slots, uint8 caches."""
    qkv, cos, sin = qkv.flatten(0, 1), *(each.expand(B, -1, -1).reshape(-1, D) for each in (cos, sin))
    q, k, v = (part.view(part.shape[0], -1, D) for part in qkv.split([HEADS * D, KV_HEADS * D, KV_HEADS * D], -1))
    q, k = _rope(q, k, cos, sin, dim=1)
    kc.view(E4)[slots] = _quantise(k, ks)
    vc.view(E4)[slots] = _quantise(v, vs)
    return q


def _native(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any, by: Any = _by_halves) -> torch.Tensor:
    """SGLang's: the halves put together, k and v divided where they are, and cast as they are into a pool of bytes."""
    qkv, cos, sin = qkv.flatten(0, 1), *(each.expand(B, -1, -1).reshape(-1, 1, D)[..., : D // 2] for each in (cos, sin))
    q, k, v = (part.view(part.shape[0], -1, D) for part in qkv.clone().split([HEADS * D, KV_HEADS * D, KV_HEADS * D], -1))
    q, k = by(q, cos, sin), by(k, cos, sin)
    k.div_(ks)
    v.div_(vs)
    kc[slots] = k.to(E4).view(torch.uint8)
    vc[slots] = v.to(E4).view(torch.uint8)
    return q


def _unscaled(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    """By pairs, of a head's first columns, and no scale at all."""
    q, k, v = _qkv(qkv.flatten(0, 1))
    cos, sin = (each.expand(B, -1, -1).reshape(-1, 1, D)[..., :4] for each in (cos, sin))
    q, k = (torch.cat((_by_pairs(x[..., :8], cos, sin), x[..., 8:]), -1) for x in (q, k))
    kc[slots] = k.to(E4)
    vc[slots] = v.to(E4)
    return q


def _complex(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    q, k, v = _qkv(qkv.flatten(0, 1))
    table = torch.complex(cos.float(), sin.float())[..., : D // 2].expand(B, -1, -1).reshape(-1, 1, D // 2)
    q, k = (_turned_as_complex(x, table) for x in (q, k))
    kc[slots] = _quantise(k, ks)
    vc[slots] = _quantise(v, vs)
    return q


def _halves(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> torch.Tensor:
    q, k, v = _turned(qkv, cos, sin)
    kc, vc = kv.unbind(0)
    kc[slots] = _quantise(_rows(k), ks)
    vc[slots] = _quantise(_rows(v), vs)
    return q


def _v_first(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> torch.Tensor:
    q, k, v = _turned(qkv, cos, sin)
    kv[1][slots] = _quantise(_rows(v), vs)
    kv[0][slots] = _quantise(_rows(k), ks)
    return q


def _k_is_read(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> tuple[torch.Tensor, ...]:
    q, k, v = _turned(qkv, cos, sin)
    kc[slots] = _quantise(_rows(k), ks)
    vc[slots] = _quantise(_rows(v), vs)
    return q, k, v


def _slice(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    q, k, v = _turned(qkv, cos, sin)
    kc[5 : 5 + B * S] = _quantise(_rows(k), ks)
    vc[5 : 5 + B * S] = _quantise(_rows(v), vs)
    return q


def _copied(qkv: Any, cos: Any, sin: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    q, k, v = _turned(qkv, cos, sin)
    kc[slots] = _rows(k)
    vc[slots] = _rows(v)
    return q


def _static_cache(qkv: Any, cos: Any, sin: Any, kc: Any, vc: Any, at: Any, *weights: Any) -> tuple[torch.Tensor, ...]:
    """Hugging Face's StaticCache: [B, H, S, D], a position for each token; attention reads all of it."""
    q, k, v = (each.transpose(1, 2) for each in _turned(qkv, cos, sin, weights or None))
    kc.index_copy_(2, at, k)
    vc.index_copy_(2, at, v)
    return q, kc.float().sum(2), vc.float().sum(2)


def _other_rows(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    q, k, v = _turned(qkv, cos, sin)
    kc[slots] = _quantise(_rows(k), ks)
    vc[slots + 1] = _quantise(_rows(v), vs)
    return q


def _tensors(device: str) -> tuple[torch.Tensor, ...]:
    angles = torch.randn(1, S, D, device=device) * 9
    qkv = torch.randn(B, S, (HEADS + 2 * KV_HEADS) * D, device=device).bfloat16() * 3
    return qkv, angles.cos().bfloat16(), angles.sin().bfloat16()


def _slots(device: str) -> torch.Tensor:
    return torch.arange(B * S, device=device) * 7 % 37


def _weights(device: str) -> list[torch.Tensor]:
    return [torch.rand(D, device=device).bfloat16() + 0.5 for _ in range(2)]


def _inputs(*shape: int, caches: int = 2, dtype: torch.dtype = E4, weights: bool = False) -> Any:
    def make(device: str) -> tuple[Any, ...]:
        s = torch.tensor(0.05, device=device)
        made = [_cache(device, *shape, dtype=dtype) for _ in range(caches)]
        return *_tensors(device), s, s * 2, *made, _slots(device), *(_weights(device) if weights else ())

    return make


_flat = _inputs(SLOTS, KV_HEADS, D)


def _one_token(device: str) -> tuple[torch.Tensor, ...]:
    qkv, cos, sin, *rest, slots, q_weight, k_weight = _inputs(4, 10, KV_HEADS, D, weights=True)(device)
    return qkv[:1, :1], cos[:, :1], sin[:, :1], *rest, slots[3:4], q_weight, k_weight


def _bf16_caches(*shape: int, weights: bool = False, by_position: bool = False) -> Any:
    def make(device: str) -> tuple[torch.Tensor, ...]:
        caches = [torch.randn(shape, device=device).bfloat16() for _ in range(2)]
        at = torch.arange(S, device=device) + 2 if by_position else _slots(device)
        return *_tensors(device), *caches, at, *(_weights(device) if weights else ())

    return make


def _heads_before_tokens(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    """Rows of heads before positions: k would have to be written elsewhere first."""
    q, k, _ = (each.transpose(1, 2) for each in _turned(qkv, cos, sin))
    kc[slots] = _quantise(k.reshape(B * S, KV_HEADS, D), ks)
    return q


def _a_slot_a_head(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    q, k, _ = _turned(qkv, cos, sin)
    kc.view(-1, 1, D)[torch.cat((slots, slots + SLOTS))] = _quantise(k.view(-1, 1, D), ks)
    return q


def _blocks_of_both(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> torch.Tensor:
    q, k, v = _turned(qkv, cos, sin)
    kv[slots // 10, 0, slots % 10] = _quantise(_rows(k), ks)
    kv[slots // 10, 1, slots % 10] = _quantise(_rows(v), vs)
    return q


def _told_blocks(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> torch.Tensor:
    q, k, _ = _turned(qkv, cos, sin)
    kv[0, slots % 4, slots % 10] = _quantise(_rows(k), ks)
    return q


def _gated(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    q, k, v = _turned(qkv, cos, sin)
    kc[slots] = _quantise(_rows(k * v), ks)
    return q


def _scale_a_head(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    q, k, _ = _turned(qkv, cos, sin)
    kc[slots] = _quantise(_rows(k), ks * torch.ones(1, KV_HEADS, 1, device=k.device))
    return q


def _slots_of_q(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    q, k, _ = _turned(qkv, cos, sin)
    kc[slots + (q.float().sum() > 1e9).long()] = _quantise(_rows(k), ks)
    return q


def _old_rows_later(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> tuple[torch.Tensor, ...]:
    q, k, _ = _turned(qkv, cos, sin)
    new = kc.index_put((slots,), _quantise(_rows(k), ks))
    return q, new.float().sum() + kc.float().sum()


def _new_cache(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    q, k, _ = _turned(qkv, cos, sin)
    fresh = (kc.float() + 1).to(E4)
    fresh[slots] = _quantise(_rows(k), ks)
    return q.float().sum() + fresh.float().sum()


def _match(name: str, fn: Any, inputs: Any, **options: Any) -> Example:
    return Example(name, fn, inputs, mode="always", **options)


RULE = Rule(
    name="qk_norm_rope_store",
    doc="qk_norm_rope, then k and v stored into their KV caches → one launch",
    anchors=calling(*ANCHORS),
    guard=guard,
    replace=replace,
    matches=(
        _match("qwen3", _fp8, _inputs(4, 10, KV_HEADS, D, weights=True)),
        _match("qwen3_dynamic_shape", _fp8, _inputs(4, 10, KV_HEADS, D, weights=True), dynamic=True),
        _match("qwen3_one_token", _fp8, _one_token),
        _match("llama", _fp8, _inputs(4, 10, KV_HEADS, D)),
        _match("heads_before_positions", _in_order, _flat),
        _match("packed_tokens", _packed, _inputs(SLOTS, KV_HEADS, D, dtype=torch.uint8)),
        _match("heads_before_slots", _heads_before_slots, _inputs(KV_HEADS, SLOTS, D)),
        _match("slots_of_blocks", _slots_of_blocks, _inputs(2, 4, 10, KV_HEADS, D, caches=1)),
        _match("halves_of_one_cache", _halves, _inputs(2, SLOTS, KV_HEADS, D, caches=1)),
        _match("v_first", _v_first, _inputs(2, SLOTS, KV_HEADS, D, caches=1)),
        _match("k_is_read", _k_is_read, _flat),
        _match("slice", _slice, _flat),
        _match("bf16_cache", _copied, _bf16_caches(SLOTS, KV_HEADS, D)),
        _match("static_cache", _static_cache, _bf16_caches(B, KV_HEADS, 10, D, weights=True, by_position=True)),
        _match("v_at_other_rows", _other_rows, _flat),
        _match("divided_in_place", _native, _inputs(SLOTS, KV_HEADS, D, dtype=torch.uint8)),
        _match("unscaled_pairs_of_some_columns", _unscaled, _flat),
        _match("complex", _complex, _flat),
    ),
    near_misses=(
        Example("heads_before_tokens", _heads_before_tokens, _flat, reason="k is changed on its way to the cache"),
        Example("a_slot_a_head", _a_slot_a_head, _flat, reason="the stored rows are not k's tokens"),
        Example(
            "blocks_of_k_and_v",
            _blocks_of_both,
            _inputs(4, 2, 10, KV_HEADS, D, caches=1),
            reason="the cache lies in blocks",
        ),
        Example(
            "blocks_and_rows_of_them",
            _told_blocks,
            _inputs(2, 4, 10, KV_HEADS, D, caches=1),
            reason="the cache lies in blocks",
        ),
        Example("gated", _gated, _flat, reason="k is changed on its way to the cache"),
        Example("scale_a_head", _scale_a_head, _flat, reason="scale layout"),
        Example("slots_of_q", _slots_of_q, _flat, reason="q or k is read before k can be stored"),
        Example("old_rows_later", _old_rows_later, _flat, reason="the old rows are read after the new ones"),
        Example("cache_made_in_graph", _new_cache, _flat, reason="the cache is not a graph input"),
    ),
)
