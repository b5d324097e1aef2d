"""prefill_only: attention through a KV cache that the same graph fills → attention on K and V; the cache is not written.

    cache_k[:, :, length + iota(S)] = k;  cache_v[…] = v;  length += S
    sdpa(q, repeat_kv(cache_k), repeat_kv(cache_v), where(key <= length + query, 0, -inf))
        →   causal attention of q, k and v by the fastest library that knows GQA

Embedding, scoring and classification run every sequence once, from its first token, and never read the cache again. That is for
the user to say (option ``prefill_only``): lengths that are arguments or buffers of the model then count as 0 and positions as
0, 1, …; lengths are not advanced, so that the next call finds an empty cache as well. ``INDUCTOR_EXT_CHECKS=1`` asserts it on
the device. What is stored is read as it is stored: K that is rounded to FP8 for the cache is rounded still.

The mask must hide all of the cache behind the last token (`attention_mask.read`). One token is left alone: it is what decoding
looks like.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.calls import aten, prims
from inductor_ext.graph import call, describe, erase_dead, known_equal, value_of
from inductor_ext.kernels.varlen_attention import implementations
from inductor_ext.miss import Miss
from inductor_ext.patterns.support import attention, attention_mask, attention_plan, kv_cache
from inductor_ext.patterns.support.attention import Attention
from inductor_ext.patterns.support.attention_examples import HKV, D, S, projected, qkv, repeated, sdpa, split
from inductor_ext.patterns.support.attention_mask import Affine, Band
from inductor_ext.patterns.support.attention_plan import Source
from inductor_ext.patterns.support.kv_cache import Read
from inductor_ext.rule import ACCUMULATED, Context, Example, Match, Rule

#: Marks a graph input that a rewritten store took for the length of an empty cache: the masks of later layers read it too.
_LENGTH = "inductor_ext_prefill_only"

MESSAGE = "inductor_ext: prefill_only is set, but the KV cache is not empty, or positions do not start at 0"


@dataclasses.dataclass(frozen=True)
class _Data:
    attention: Match  # for `attention_plan.replace`
    reads: tuple[Read, Read]
    inputs: _Inputs
    checks: bool


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """Graph inputs that say where the cache is written: lengths, which count as 0, and positions, which count as 0, 1, …"""

    lengths: tuple[Node, ...]
    positions: tuple[Node, ...]

    def assumed(self) -> dict[Node, Affine]:
        return {each: Affine((0,) * value_of(each).dim()) for each in self.lengths} | {
            each: Affine((1,)) for each in self.positions
        }


def guard(node: Node, context: Context) -> Match | None:
    found = attention.parse(node)
    traced = [_traced(attention.before_repeat(each)) for each in (found.k, found.v)]
    if all(each is None for each in traced):
        return None
    if not context.options.prefill_only:
        wanted = "prefill_only=True: every sequence starts with an empty cache that nothing reads afterwards"
        raise Miss("prefill-only work is not declared", node, wanted, "prefill_only=False")
    for each in traced:
        if isinstance(each, Miss):
            raise each.at(node)
    if None in traced:
        k, v = describe(found.k), describe(found.v)
        raise Miss("one of K and V is not cached", node, "both, or neither", f"{k}, {v}")
    reads = traced[0], traced[1]
    sources = reads[0].source, reads[1].source  # type: ignore[union-attr]
    attention_plan.check(found, sources)
    if known_equal(value_of(found.q).shape[2], 1):
        raise Miss("one token", node, "a prompt; one token is what decoding looks like", "S = 1")
    return _match(found, reads, sources, context)  # type: ignore[arg-type]


def _traced(node: Node) -> Read | Miss | None:
    """A miss is told of only once prefill-only work is declared."""
    try:
        return kv_cache.trace(node)
    except Miss as miss:
        return miss


def _match(found: Attention, reads: tuple[Read, Read], sources: tuple[Source, Source], context: Context) -> Match:
    node = found.node
    inputs = _inputs(reads, value_of(found.q).shape[2])
    band = _band(found, reads, inputs)
    others = [other for each in reads for other in kv_cache.other_readers(each, node)]
    if others:
        wanted, readers = "a cache that this attention alone reads", ", ".join(map(describe, others))
        raise Miss("the cache is read elsewhere", node, wanted, readers)
    used = [user for each in inputs.lengths for write in _writes(each) for user in (*write.args[1].users, *write.users)]
    used = [user for user in used if not any(kv_cache.writes_back(user, each) for each in inputs.lengths)]
    if used:
        wanted = "a length that is advanced for the next call and not used in this one"
        raise Miss("the cache's new length is used", node, wanted, ", ".join(map(describe, used)))
    matched = attention_plan.match(found, *sources, band, "K and V as they are, no cache")
    return dataclasses.replace(matched, data=_Data(matched, reads, inputs, context.options.checks))


def _inputs(reads: tuple[Read, Read], tokens: Any) -> _Inputs:
    """Of these stores; and lengths that other layers' stores have been rewritten with, which this mask may read too."""
    given = dict.fromkeys(each for read in reads for each in kv_cache.integer_inputs(read.at))
    single = [each for each in given if known_equal(value_of(each).numel(), 1)]
    graph = reads[0].store.graph
    known = [each for each in graph.find_nodes(op="placeholder") if _LENGTH in each.meta]
    several = [each for each in given if each not in single and _is_row_of(each, tokens)]
    return _Inputs(tuple(dict.fromkeys((*single, *known))), tuple(several))


def _is_row_of(node: Node, tokens: Any) -> bool:
    return value_of(node).dim() == 1 and known_equal(value_of(node).shape[0], tokens)


def _band(found: Attention, reads: tuple[Read, Read], inputs: _Inputs) -> Band:
    """What queries see of the keys of their own call, if it is nothing else."""
    node, assumed = found.node, inputs.assumed()
    band = Band(right=0) if found.causal else Band()
    if found.bias is not None:
        try:
            band = band.and_(attention_mask.read(found.bias, assumed))
        except Miss as miss:
            raise miss.at(node) from None
    for read in reads:
        if not read.whole:
            continue  # the rows stored are the rows read, wherever they are
        at = read.at if isinstance(read.at, Node) else None
        where = attention_mask.positions(at, assumed) if at is not None else Affine((1,), read.at)
        if where != Affine((1,)):
            found_at = describe(at) if at is not None else f"a slice from {read.at}"
            raise Miss("where the cache is written", node, "rows 0, 1, … of an empty cache", found_at)
        cached, tokens = value_of(read.cache).numel(), value_of(read.source.node).numel()
        if band.right != 0 and not known_equal(cached, tokens):
            wanted = "a mask that hides what is behind the last token, as a causal one does"
            raise Miss("rows that are not written are seen", node, wanted, str(band))
    return band


def _writes(length: Node) -> list[Node]:
    return [user for user in length.users if kv_cache.writes_back(user, length)]


def replace(match: Match) -> None:
    data: _Data = match.data
    graph = match.node.graph
    if data.checks:
        _assert_empty(graph, match.node, data)
    attention_plan.replace(data.attention)
    for read in data.reads:
        _erase_with_users(read.store)  # the way to the write back into the cache: nothing else is left
    for each in data.inputs.lengths:
        each.meta[_LENGTH] = True
        for write in _writes(each):
            advanced = write.args[1]
            graph.erase_node(write)
            erase_dead(advanced)  # type: ignore[arg-type]


def _erase_with_users(node: Node) -> None:
    for user in list(node.users):
        _erase_with_users(user)
    if not node._erased:  # with the last of its users
        above = node.all_input_nodes
        node.graph.erase_node(node)
        for each in above:
            erase_dead(each)


def _assert_empty(graph: Graph, before: Node, data: _Data) -> None:
    """Stop on the device where a length is not 0, or positions are not 0, 1, …; without a host sync."""
    with graph.inserting_before(before):
        for each in (*data.inputs.lengths, *data.inputs.positions):
            if _LENGTH in each.meta:
                continue  # by another layer
            wanted: Any = 0
            if each in data.inputs.positions:
                value = value_of(each)
                made = {"start": 0, "step": 1, "dtype": value.dtype, "device": value.device, "requires_grad": False}
                wanted = graph.call_function(prims.iota.default, (value.shape[0],), made)
                with value.fake_mode:
                    wanted.meta["val"] = prims.iota.default(value.shape[0], **made)
            other = call(graph, aten.ne.Tensor if isinstance(wanted, Node) else aten.ne.Scalar, each, wanted, like=before)
            empty = call(graph, aten.logical_not.default, call(graph, aten.any.default, other, like=before), like=before)
            call(graph, aten._assert_async.msg, empty, f"{MESSAGE}: {each.name}", like=before)


# ---- examples --------------------------------------------------------------------------------------------------------

DECLARED = (("prefill_only", True),)
LENGTH = 2 * S


def _mask(q: torch.Tensor, first: Any, keys: int) -> torch.Tensor:
    at = torch.arange(q.shape[2], device=q.device) + first
    allowed = torch.arange(keys, device=q.device)[None, None, None, :] <= at[None, None, :, None]
    return torch.where(allowed, 0.0, -65536.0).to(q.dtype).expand(q.shape[0], 1, q.shape[2], keys)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return sdpa(q, repeated(k), repeated(v), mask)[0].transpose(1, 2).flatten(2)


def _cache(device: str, tokens: int = LENGTH, dtype: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.zeros(2, HKV, tokens, D, device=device, dtype=dtype or (torch.float32 if device == "cpu" else torch.bfloat16))
    return made, made.clone()


def _static(device: str) -> tuple[torch.Tensor, ...]:
    """transformers' StaticCache: K and V, and how many tokens are in it."""
    return *projected(device), *_cache(device), torch.zeros((), dtype=torch.int64, device=device)


def _static_cache(q: Any, k: Any, v: Any, keys: Any, values: Any, length: Any) -> Any:
    q, k, v = split(q, k, v)
    at = torch.arange(q.shape[2], device=q.device) + length
    mask = _mask(q, length, keys.shape[2])
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    length.add_(q.shape[2])
    return _attend(q, keys, values, mask)


def _positions(device: str) -> tuple[torch.Tensor, ...]:
    return *projected(device), *_cache(device), torch.arange(S, device=device)


def _given_positions(q: Any, k: Any, v: Any, keys: Any, values: Any, at: Any) -> Any:
    q, k, v = split(q, k, v)
    keys[:, :, at] = k
    values[:, :, at] = v
    allowed = torch.arange(keys.shape[2], device=q.device)[None, None, None, :] <= at[None, None, :, None]
    mask = torch.where(allowed, 0.0, -65536.0).to(q.dtype).expand(q.shape[0], 1, -1, -1)
    return _attend(q, keys, values, mask)


def _slices(q: Any, k: Any, v: Any, keys: Any, values: Any) -> Any:
    """Only what was stored is read: where it is stored does not matter."""
    q, k, v = split(q, k, v)
    keys[:, :, : q.shape[2]] = k
    values[:, :, : q.shape[2]] = v
    return _attend(q, keys[:, :, : q.shape[2]], values[:, :, : q.shape[2]], _mask(q, 0, q.shape[2]))


def _flat(device: str) -> tuple[torch.Tensor, ...]:
    """A pool of rows [slots, H, D] that all sequences share."""
    x = [each.transpose(1, 2) for each in qkv(device)]
    pool = torch.zeros(8 * S, HKV, D, device=device, dtype=x[0].dtype)
    return *x, pool, pool.clone(), torch.randperm(8 * S, device=device)[: 2 * S]


def _pool(q: Any, k: Any, v: Any, keys: Any, values: Any, slots: Any) -> Any:
    b, tokens, _, width = q.shape
    keys[slots] = k.flatten(0, 1)
    values[slots] = v.flatten(0, 1)
    k, v = (each[slots].view(b, tokens, HKV, width).transpose(1, 2) for each in (keys, values))
    return _attend(q.transpose(1, 2), k, v, _mask(q.transpose(1, 2), 0, tokens))


def _eight_bits(device: str) -> tuple[torch.Tensor, ...]:
    length = torch.zeros((), dtype=torch.int64, device=device)
    return *projected(device), *_cache(device, dtype=torch.float8_e4m3fn), length


def _eight_bit_cache(q: Any, k: Any, v: Any, keys: Any, values: Any, length: Any) -> Any:
    q, k, v = split(q, k, v)
    at = torch.arange(q.shape[2], device=q.device) + length
    keys[:, :, at] = (k * 2.0).clamp(-448.0, 448.0).to(keys.dtype)
    values[:, :, at] = (v * 2.0).clamp(-448.0, 448.0).to(values.dtype)
    return _attend(q, keys.to(q.dtype) * 0.5, values.to(q.dtype) * 0.5, _mask(q, length, keys.shape[2]))


def _all_seen(q: Any, k: Any, v: Any, keys: Any, values: Any, length: Any) -> Any:
    q, k, v = split(q, k, v)
    at = torch.arange(q.shape[2], device=q.device) + length
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    return sdpa(q, repeated(keys), repeated(values))[0] * 2


def _and_sum(run: Any) -> Any:
    return lambda q, k, v, keys, values, *rest: (run(q, k, v, keys, values, *rest), keys.sum())


def _after_four(q: Any, k: Any, v: Any, keys: Any, values: Any, length: Any) -> Any:
    return _static_cache(q, k, v, keys, values, length + 4)


def _length_used(q: Any, k: Any, v: Any, keys: Any, values: Any, length: Any) -> Any:
    return _static_cache(q, k, v, keys, values, length) * length


def _k_alone(q: Any, k: Any, v: Any, keys: Any, values: Any) -> Any:
    q, k, v = split(q, k, v)
    keys[:, :, : q.shape[2]] = k
    return _attend(q, keys[:, :, : q.shape[2]], v, _mask(q, 0, q.shape[2]))


def _one_token(device: str) -> tuple[torch.Tensor, ...]:
    return *(each[:, :1] for each in projected(device)), *_static(device)[3:]


def _part(q: Any, k: Any, v: Any, keys: Any, values: Any) -> Any:
    return _slices(q, k, v, keys[:, 1:], values[:, 1:])


def _wider(device: str) -> tuple[torch.Tensor, ...]:
    made = torch.zeros(2, HKV + 1, LENGTH, D, device=device, dtype=qkv(device)[0].dtype)
    return *projected(device), made, made.clone()


def _without_length(inputs: Any) -> Any:
    return lambda device: inputs(device)[:-1]


RULE = Rule(
    name="prefill_only",
    doc="option prefill_only: attention through a KV cache that the graph fills → on K and V as they are; no cache is written",
    anchors=attention.calls,
    guard=guard,
    replace=replace,
    exact=False,
    cost="caches are left as they were, empty; attention is another kernel: softmax and its sums are taken in another order",
    tolerance=ACCUMULATED,
    environment=implementations.versions,
    drops_writes=True,
    matches=(
        Example("static_cache", _static_cache, _static, options=DECLARED),
        Example("static_cache_dynamic_shape", _static_cache, _static, options=DECLARED, dynamic=True),
        Example("given_positions", _given_positions, _positions, options=DECLARED),
        Example("slices", _slices, _without_length(_static), options=DECLARED),
        Example("pool_of_rows", _pool, _flat, options=DECLARED),
        Example("eight_bits", _eight_bit_cache, _eight_bits, options=DECLARED),
        Example("checked", _static_cache, _static, options=(*DECLARED, ("checks", True))),
    ),
    near_misses=(
        Example("not_declared", _static_cache, _static, reason="prefill-only work is not declared"),
        Example("one_token", _static_cache, _one_token, options=DECLARED, reason="one token"),
        Example("no_mask", _all_seen, _static, options=DECLARED, reason="rows that are not written are seen"),
        Example("cache_used_again", _and_sum(_static_cache), _static, options=DECLARED, reason="the cache is read elsewhere"),
        Example("not_from_the_start", _after_four, _static, options=DECLARED, reason="where the cache is written"),
        Example("length_used", _length_used, _static, options=DECLARED, reason="the cache's new length is used"),
        Example("k_alone", _k_alone, _without_length(_static), options=DECLARED, reason="one of K and V is not cached"),
        Example("part_of_a_cache", _part, _wider, options=DECLARED, reason="the cache is a view"),
    ),
)
