"""qk_norm_rope: RMSNorm of each head, if there is one, and RoPE of q and k become one launch.

    q = norm(q) * cos + cat(-norm(q)[..., D/2:], norm(q)[..., :D/2]) * sin;  k alike
        →   q, k = inductor_ext.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, …)

However it is spelled (`support.rope`): by halves or by pairs, of whole heads or of their first columns, with tables of as many
columns or of half as many.

q and k are read where the projections left them, columns of one buffer too, and written as [B, S, H, D], of which attention
reads a permuted view. Two rotations become one call if they share their tables, norm and tokens, and nothing stands between
them that needs the first; else each is a call of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import aten, calling, calls, is_call
from inductor_ext.graph import call, describe, erase_dead, is_opaque, is_reshape, known_equal, value_of
from inductor_ext.kernels.qk_norm_rope.op import MAX_HEAD_DIM, OP
from inductor_ext.memory import readers
from inductor_ext.miss import HEAD_DIM, INPUT_LAYOUT, Miss, found_or_none, fused
from inductor_ext.patterns.support import rope
from inductor_ext.patterns.support.attention_examples import sdpa
from inductor_ext.patterns.support.columns import hoist
from inductor_ext.patterns.support.rope import COMPLEX, NO_TABLES, NOT_A_ROTATION, Rope, Table
from inductor_ext.patterns.support.same import in_order, same_elements
from inductor_ext.patterns.support.strides import refresh
from inductor_ext.rule import Call, Context, Example, Match, Rule


def guard(node: Node, context: Context) -> Match | None:
    ropes = rotations(node, context.forced)
    if ropes is None:
        return None
    found = ropes[0]
    heads = " and ".join(str(each.x.value.shape[2]) for each in ropes)
    norm = f"norm {found.norm.norm!r}" if found.norm else "no norm"
    detail = f"{heads} heads of {found.x.value.shape[3]}, {norm}{'' if found.plain else f', {found.described}'}"
    why = "forced" if context.forced else f"its input is in memory: {describe(found.x.node)}"
    tables = (found.cos.value, found.sin.value)
    arguments = rotation_arguments(ropes, [each.x.value for each in ropes], tables)
    made = Call(OP, torch.fx.map_arg(arguments, value_of))
    return Match(node, (made,), detail, why, ropes)


Fits = Callable[[Rope, Rope], bool]


def rotations(add: Node, forced: bool, fits: Fits | None = None) -> list[Rope] | None:
    """The rotation that ends in ``add`` and its partner, if there is one, in the graph's order.

    ``fits`` says whether one call can stand where all that two alike rotations need is there; `_one_place` if it is None.
    """
    found = _usable(add, forced)
    if found is None:
        return None
    partner = _partner(found, add, forced, fits or _one_place)
    return [found] if partner is None else sorted((found, partner), key=lambda each: each.end)


def _usable(add: Node, forced: bool) -> Rope | None:
    """A rotation that the kernel can take and, unless forced, should."""
    found = rope.trace(add)
    if found is None:
        return None
    x = found.x.value
    columns = x.shape[3]
    if not isinstance(columns, int) or columns % 8 or columns > MAX_HEAD_DIM:
        raise Miss(HEAD_DIM, found.end, f"a multiple of 8, at most {MAX_HEAD_DIM}", str(columns))
    for value, node in ((x, found.x.node), (found.cos.value, found.cos.node), (found.sin.value, found.sin.node)):
        apart = value.dim() == 4 and node is found.cos.node and not known_equal(value.stride(-2), 2)  # of cos and sin in one
        if apart or not known_equal(value.stride(-1), 1):
            strides = f"{describe(node)} strides {list(value.stride())}"
            raise Miss(INPUT_LAYOUT, found.end, "columns of unit stride", strides)
    reader = None if _same_strides(found.result, value_of(found.end)) else _reader_by_layout(found.end)
    if reader is not None:
        strides = f"strides {list(value_of(found.end).stride())}, read by {describe(reader)}"
        wanted = f"[B, S, H, D] in memory, strides {list(found.result.stride())}, or attention and copies as its readers"
        raise Miss("memory layout", found.end, wanted, strides)
    if not forced and not is_opaque(found.x.node):
        wanted = "a graph input, a GEMM or another opaque kernel as producer"
        raise Miss(fused("rotation", "producer"), found.end, wanted, describe(found.x.node))
    return found


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    pairs = zip(a.shape, a.stride(), b.stride())
    return all(known_equal(size, 1) or known_equal(one, two) for size, one, two in pairs)


def _reader_by_layout(end: Node) -> Node | None:
    """A reader of ``end``, through views too, for which other strides might mean a copy, or which hands them on."""
    for _, user in readers(end):
        if is_call(user, *_REARRANGES) or (calls(user, aten.clone.default) and "memory_format" in user.kwargs):
            continue
        if not isinstance(user.target, torch._ops.OpOverload) or not user.target._schema.name.startswith(_ATTENTION):
            return user
    return None


#: Views that any strides allow, and what reads whatever strides it gets.
_REARRANGES = (aten.permute.default, aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor)
_ATTENTION = ("aten::_scaled_dot_product_", "inductor_ext::varlen_attention")


#: How many rotations before and after one are looked at for its partner. All layers share their tables, so there are many.
NEAREST = 2


def _one_place(one: Rope, two: Rope) -> bool:
    place = _place(sorted((one, two), key=lambda each: each.end))
    return all(hoist(needed, place, move=False) is None for needed in (*one.inputs, *two.inputs))


def _partner(found: Rope, add: Node, forced: bool, fits: Fits) -> Rope | None:
    """The nearest other rotation that can be in one call with ``found``, which ends in ``add``: a later one if there is one."""
    others = sorted(other for other in set(_rotations_by(in_order(found.cos.node))) if other is not add)
    earlier = [other for other in others if other < add]
    for other in (*others[len(earlier) :][:NEAREST], *earlier[: -NEAREST - 1 : -1]):
        rotation = found_or_none(_usable, other, forced)
        if rotation is not None and rotation.end is not found.end and _alike(found, rotation) and fits(found, rotation):
            return rotation
    return None


def _rotations_by(table: Node) -> Iterator[Node]:
    """Anchors of rotations that may multiply something by ``table`` or a view of it."""
    for user in table.users:
        if is_reshape(user) or is_call(user, aten.select.int):  # cos of a table that has both
            yield from _rotations_by(user)
        elif is_call(user, aten.mul.Tensor):
            yield from (rope.anchor_of(add) for add in user.users if is_call(add, aten.add.Tensor))
            yield from (real for real in user.users if is_call(real, aten.view_as_real.default))


def _place(ropes: Sequence[Rope]) -> Node:
    """The node before which a call for ``ropes``, in the graph's order, has to stand: the last of them, or their first user."""
    ends = [each.end for each in ropes]
    return min([ends[-1], *(user for end in ends for user in end.users)])


def _alike(a: Rope, b: Rope) -> bool:
    """Whether one call can do both."""
    x, y = a.x.value, b.x.value
    if (x.dtype, a.dtype) != (y.dtype, b.dtype) or not all(known_equal(x.shape[dim], y.shape[dim]) for dim in (0, 1, 3)):
        return False
    if (a.norm is None) != (b.norm is None):
        return False
    if a.norm is not None and b.norm is not None:
        weights = value_of(a.norm.weight).dtype, value_of(b.norm.weight).dtype
        if (a.norm.norm, a.norm.eps) != (b.norm.norm, b.norm.eps) or weights[0] is not weights[1]:
            return False
    if (a.pairs, a.rotary) != (b.pairs, b.rotary):
        return False
    return _same_table(a.cos, b.cos) and _same_table(a.sin, b.sin)


def _same_table(a: Table, b: Table) -> bool:
    same = a.dtype is b.dtype and all(known_equal(a.value.shape[dim], b.value.shape[dim]) for dim in (0, 2))
    return same and same_elements(a.node, b.node)


def rotation_arguments(ropes: Sequence[Rope], x: list[Any], tables: tuple[Any, Any]) -> tuple[Any, ...]:
    """The op's arguments with nodes for weights; x and tables are nodes or fake tensors, as they are given."""
    norm = ropes[0].norm
    weights = [None if each.norm is None else each.norm.weight for each in ropes]
    q, k = (*x, None)[:2]
    q_weight, k_weight = (*weights, None)[:2]
    rest = (0.0, "") if norm is None else (norm.eps, norm.norm)
    return q, k, q_weight, k_weight, *tables, *rest, ropes[0].dtype, *turned(ropes[0])


def turned(rope: Rope) -> tuple[Any, ...]:
    """The op's last arguments, ``pairs`` and ``rotary``, where they are not the defaults."""
    part = rope.rotary != rope.x.value.shape[3]
    return (rope.pairs, rope.rotary if part else 0) if rope.pairs or part else ()


def replace(match: Match) -> None:
    ropes: list[Rope] = match.data
    graph, first, place = match.node.graph, ropes[0], _place(ropes)
    for needed in (needed for each in ropes for needed in each.inputs):
        hoist(needed, place, move=True)
    with graph.inserting_before(place):
        x = [each.x.put(graph, each.end) for each in ropes]
        tables = first.put_tables(graph)
        made = call(graph, OP.overload, *rotation_arguments(ropes, x, tables), like=first.end)
        results = []
        for index, each in enumerate(ropes):
            out = call(graph, operator.getitem, made, index, like=each.end)
            results.append(each.put_result(graph, out))
    for each, result in zip(ropes, results):
        each.end.replace_all_uses_with(result)
        refresh(result)
        erase_dead(each.end)


# ---- examples --------------------------------------------------------------------------------------------------------

HEADS, KV_HEADS, D = 4, 2, 16


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dim: int = 1) -> tuple[torch.Tensor, ...]:
    """Hugging Face's ``apply_rotary_pos_emb``."""
    cos, sin = cos.unsqueeze(dim), sin.unsqueeze(dim)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _llama_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _gemma_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).type_as(x)


def _heads(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, _ = qkv.split([HEADS * D, KV_HEADS * D, KV_HEADS * D], -1)
    return q.unflatten(-1, (HEADS, D)), k.unflatten(-1, (KV_HEADS, D))


def _qwen3(qkv: Any, cos: Any, sin: Any, q_weight: Any, k_weight: Any, norm: Any = _llama_norm) -> tuple[torch.Tensor, ...]:
    q, k = _heads(qkv)
    return _rope(norm(q, q_weight).transpose(1, 2), norm(k, k_weight).transpose(1, 2), cos, sin)


def _qwen2(qkv: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, ...]:
    q, k = _heads(qkv)
    return _rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)


def _heads_last(qkv: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, ...]:
    return _rope(*_heads(qkv), cos, sin, dim=2)


def _packed(qkv: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, ...]:
    """Tokens of all sequences in one row, as hand-written models have them."""
    q, k = _heads(qkv.flatten(0, 1))
    cos, sin = (each.expand(qkv.shape[0], -1, -1).reshape(-1, 1, D) for each in (cos, sin))
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _through_fp32(qkv: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, ...]:
    q, k = (each.transpose(1, 2) for each in _heads(qkv))
    return tuple(each.to(qkv.dtype) for each in _rope(q.float(), k.float(), cos.float(), sin.float()))


def _modernbert(qkv: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, ...]:
    """transformers' ModernBERT: x is cast, the tables are taken along."""
    q, k = (each.transpose(1, 2) for each in _heads(qkv))
    return tuple(each.to(qkv.dtype) for each in _rope(q.float(), k.float(), cos, sin))


def _two_products(qkv: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, ...]:
    """One in fp32, and one not, by the same tables."""
    return _modernbert(qkv, cos, sin)[0], _qwen2(qkv, cos, sin)[1]


def _chunks(qkv: Any, cos: Any, sin: Any) -> torch.Tensor:
    q = _heads(qkv)[0].transpose(1, 2)
    low, high = q.chunk(2, -1)
    return q * cos.unsqueeze(1) + torch.cat((-high, low), -1) * sin.unsqueeze(1)


def _apart(qkv: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, ...]:
    """k's tables are others than q's, and so it is two calls."""
    (q, _), (_, k) = _rope(*_heads(qkv), cos, sin, dim=2), _rope(*_heads(qkv), sin, cos, dim=2)
    return q, k


def _turned_by(turned: Callable[[torch.Tensor], torch.Tensor], flipped: bool = False) -> Callable[..., torch.Tensor]:
    def fn(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q = _heads(qkv)[0].transpose(1, 2)
        return (q.flip(-1) if flipped else q) * cos.unsqueeze(1) + turned(q) * sin.unsqueeze(1)

    return fn


def _interleaved(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _uneven(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((-x[..., 6:], x[..., :6]), dim=-1)


def _wrong_half(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((-x[..., : D // 2], x[..., D // 2 :]), dim=-1)


def _by_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """vLLM's and SGLang's ``forward_native``."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _by_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same of GPT-J's style."""
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def _native(by: Any = _by_halves, rotary: int = D, norm: Any = None) -> Callable[..., Any]:
    """q and k of packed tokens, turned by rows of one cache of cosines and sines."""

    def fn(qkv: Any, cache: Any, positions: Any, *weights: Any) -> tuple[torch.Tensor, ...]:
        heads = [x if norm is None else norm(x, weight) for x, weight in zip(_heads(qkv), weights or (None, None))]
        cos, sin = (each.to(qkv.dtype).unsqueeze(1) for each in cache.index_select(0, positions).chunk(2, -1))
        turned = [by(x[..., :rotary], cos, sin) for x in heads]
        if rotary == D:
            return tuple(turned)
        return tuple(torch.cat((each, x[..., rotary:]), -1) for each, x in zip(turned, heads))

    return fn


def _given_halves(qkv: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, ...]:
    return tuple(_by_halves(x, cos.unsqueeze(2), sin.unsqueeze(2)) for x in _heads(qkv))


def _flux(qkv: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, ...]:
    """diffusers' ``apply_rotary_emb``: in fp32, with a number of the tables for each column."""
    cos, sin = cos.float(), sin.float()

    def one(x: torch.Tensor) -> torch.Tensor:
        real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
        return (x.float() * cos + turned.float() * sin).to(x.dtype)

    q, k = (each.transpose(1, 2) for each in _heads(qkv))
    return one(q), one(k)


def _partly(qkv: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, ...]:
    """Phi: the first columns of a head are rotated by halves, the others pass."""
    cos, sin = cos[..., : D // 2].unsqueeze(2), sin[..., : D // 2].unsqueeze(2)
    each = ((x[..., : D // 2], x[..., D // 2 :]) for x in _heads(qkv))
    return tuple(torch.cat((low * cos + _rotate_half(low) * sin, high), dim=-1) for low, high in each)


def _selected(qkv: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, ...]:
    """Qwen2-VL: sections of a head are turned by the angles of time, height and width."""
    cos, sin = (torch.cat([part[i % 3] for i, part in enumerate(each.split([2, 3, 3] * 2, -1))], -1) for each in (cos, sin))
    return _qwen2(qkv, cos, sin)


def _biased(x: Any, w: Any, bias: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, ...]:
    return _qwen2(torch.nn.functional.linear(x, w, bias), cos, sin)


def _phi(qkv: Any, cos: Any, sin: Any) -> torch.Tensor:
    """Heads before positions when they are put together again: attention reads them wherever they lie."""
    x = [each.transpose(1, 2) for each in _heads(qkv)]
    cos, sin = cos[..., : D // 2].unsqueeze(1), sin[..., : D // 2].unsqueeze(1)
    parts = [(each[..., : D // 2], each[..., D // 2 :]) for each in x]
    q, k = (torch.cat((low * cos + _rotate_half(low) * sin, high), dim=-1) for low, high in parts)
    return sdpa(q, k.repeat_interleave(2, 1), x[0])[0]


def _turned_as_complex(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


def _as_complex(qkv: Any, table: Any) -> tuple[torch.Tensor, ...]:
    """Llama's reference code."""
    return tuple(_turned_as_complex(x, table.view(1, -1, 1, D // 2)) for x in _heads(qkv))


def _as_complex_with_a_norm(qkv: Any, table: Any, q_weight: Any, k_weight: Any) -> tuple[torch.Tensor, ...]:
    """transformers' Llama 4 without the text of its norm, heads before positions."""
    heads = zip(_heads(qkv), (q_weight, k_weight), strict=True)
    return tuple(_turned_as_complex(_llama_norm(x, weight), table[:, :, None, :]) for x, weight in heads)


def _as_complex_flat(qkv: Any, table: Any) -> torch.Tensor:
    """fp32 all the way, and the heads beside one another: no view of it has a head's columns."""
    q = _heads(qkv)[0]
    turned = torch.view_as_complex(q.unflatten(-1, (-1, 2))) * table.view(1, -1, 1, D // 2)
    return torch.view_as_real(turned).flatten(2)


def _as_complex_of_halves(qkv: Any, table: Any) -> torch.Tensor:
    """Columns of both halves make a number."""
    q = _heads(qkv)[0]
    pairs = torch.view_as_complex(q.float().unflatten(-1, (2, -1)).transpose(-1, -2).contiguous())
    return torch.view_as_real(pairs * table.view(1, -1, 1, D // 2)).flatten(-2).type_as(q)


def _torchtune(qkv: Any, table: Any) -> tuple[torch.Tensor, ...]:
    """One table of cosines and sines in turn, which sections of a cache are."""

    def one(x: torch.Tensor) -> torch.Tensor:
        pairs, both = x.float().reshape(*x.shape[:-1], -1, 2), table.view(-1, x.shape[1], 1, D // 2, 2)
        real = pairs[..., 0] * both[..., 0] - pairs[..., 1] * both[..., 1]
        imaginary = pairs[..., 1] * both[..., 0] + pairs[..., 0] * both[..., 1]
        return torch.stack([real, imaginary], -1).flatten(3).type_as(x)

    q, k = _heads(qkv)
    return one(q), one(k)


def _torchtune_of_halves(qkv: Any, table: Any) -> torch.Tensor:
    q, both = _heads(qkv)[0].float(), table.view(-1, qkv.shape[1], 1, D // 2, 2)
    return _by_halves(q, both[..., 0], both[..., 1]).type_as(qkv)


def _last_columns(qkv: Any, cos: Any, sin: Any) -> torch.Tensor:
    """DeepSeek: the last columns of a head are rotated."""
    q = _heads(qkv)[0]
    cos, sin = cos[..., : D // 2].unsqueeze(2), sin[..., : D // 2].unsqueeze(2)
    return torch.cat((q[..., D // 2 :], q[..., : D // 2] * cos + _rotate_half(q[..., : D // 2]) * sin), -1)


def _turned_is_read(qkv: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, ...]:
    q = _heads(qkv)[0].transpose(1, 2)
    turned = _rotate_half(q)
    return q * cos.unsqueeze(1) + turned * sin.unsqueeze(1), turned * 2


def _normalised_is_read(qkv: Any, cos: Any, sin: Any, q_weight: Any, _: Any) -> tuple[torch.Tensor, ...]:
    y = _llama_norm(_heads(qkv)[0], q_weight)
    q = y.transpose(1, 2)
    return q * cos.unsqueeze(1) + _rotate_half(q) * sin.unsqueeze(1), y * 2


def _inputs(device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    angles = torch.randn(1, 6, D, device=device) * 9
    qkv = torch.randn(3, 6, (HEADS + 2 * KV_HEADS) * D, device=device) * 3
    return qkv.to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)


def _inputs_fp16(device: str) -> tuple[torch.Tensor, ...]:
    return _inputs(device, torch.float16)


def _cached(rotary: int = D, dtype: torch.dtype = torch.bfloat16) -> Callable[[str], tuple[torch.Tensor, ...]]:
    def make(device: str) -> tuple[torch.Tensor, ...]:
        qkv, angles = _inputs(device, dtype)[0], torch.randn(40, rotary // 2, device=device) * 9
        positions = torch.arange(18, device=device) * 2
        return qkv.flatten(0, 1), torch.cat((angles.cos(), angles.sin()), -1), positions

    return make


def _cached_weighted(device: str) -> tuple[torch.Tensor, ...]:
    return *_cached()(device), *_weighted(device)[3:]


def _half_tables(device: str) -> tuple[torch.Tensor, ...]:
    qkv, cos, sin = _inputs(device)
    return qkv, cos[..., : D // 2].contiguous(), sin[..., : D // 2].contiguous()


def _three_tables(device: str) -> tuple[torch.Tensor, ...]:
    angles = torch.randn(3, 3, 6, D, device=device) * 9
    return _inputs(device)[0], angles.cos().bfloat16(), angles.sin().bfloat16()


def _one_table(device: str) -> tuple[torch.Tensor, ...]:
    angles = torch.randn(6, D // 2, device=device) * 9
    return _inputs(device)[0], torch.stack((angles.cos(), angles.sin()), -1)


def _complex_table(device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    return _inputs(device, dtype)[0], torch.view_as_complex(_one_table(device)[1])


def _complex_tables(device: str) -> tuple[torch.Tensor, ...]:
    angles = torch.randn(3, 6, D // 2, device=device) * 9
    qkv, *_, q_weight, k_weight = _weighted(device)
    return qkv, torch.complex(angles.cos(), angles.sin()), q_weight, k_weight


def _linear(device: str) -> tuple[torch.Tensor, ...]:
    qkv, cos, sin = _inputs(device)
    w, bias = (torch.randn(*shape, device=device).bfloat16() for shape in ((qkv.shape[-1], 32), (qkv.shape[-1],)))
    return qkv[..., :32].contiguous(), w, bias, cos, sin


def _batched(device: str) -> tuple[torch.Tensor, ...]:
    qkv, *_ = _inputs(device)
    angles = torch.randn(3, 6, D, device=device) * 9
    return qkv, angles.cos().bfloat16(), angles.sin().bfloat16()


def _weighted(device: str) -> tuple[torch.Tensor, ...]:
    return *_inputs(device), *(torch.rand(D, device=device).bfloat16() + 0.5 for _ in range(2))


def _one_token(device: str) -> tuple[torch.Tensor, ...]:
    return tuple(each[:1, :1] if each.dim() > 1 else each for each in _weighted(device))


def _a_table_a_head(device: str) -> tuple[torch.Tensor, ...]:
    qkv, *_ = _inputs(device)
    return qkv, *(torch.randn(1, HEADS, 6, D, device=device).bfloat16() for _ in range(2))


def _heads_first_in_memory(device: str) -> tuple[torch.Tensor, ...]:
    _, cos, sin = _inputs(device)
    return *(torch.randn(3, heads, 6, D, device=device).bfloat16() for heads in (HEADS, KV_HEADS)), cos, sin


RULE = Rule(
    name="qk_norm_rope",
    doc="RMSNorm of each head and RoPE of q and k → one launch",
    anchors=calling(*rope.ANCHORS),
    guard=guard,
    replace=replace,
    exact=False,
    cost="the norm's mean is summed in another order, a complex product rounds its fp32 after each step; else the same bytes",
    matches=(
        Example("qwen3", _qwen3, _weighted),
        Example("qwen3_dynamic_shape", _qwen3, _weighted, dynamic=True),
        Example("qwen3_one_token", _qwen3, _one_token),
        Example("gemma3", lambda qkv, c, s, q, k: _qwen3(qkv, c, s, q, k, _gemma_norm), _weighted),
        Example("llama", _qwen2, _inputs),
        Example("llama_fp16", _qwen2, _inputs_fp16),
        Example("tables_of_each_sequence", _qwen2, _batched),
        Example("heads_after_tokens", _heads_last, _inputs),
        Example("packed_tokens", _packed, _inputs),
        Example("through_fp32", _through_fp32, _inputs),
        Example("chunks_of_q_alone", _chunks, _inputs),
        Example("other_tables_for_k", _apart, _inputs, count=2),
        Example("halves_put_together", _native(), _cached()),
        Example("halves_put_together_dynamic_shape", _given_halves, _half_tables, dynamic=True),
        Example("halves_put_together_with_a_norm", _native(norm=_llama_norm), _cached_weighted),
        Example("halves_of_some_columns", _native(rotary=8), _cached(8)),
        Example("pairs", _native(_by_pairs), _cached()),
        Example("pairs_with_a_norm", _native(_by_pairs, norm=_llama_norm), _cached_weighted),
        Example("pairs_of_some_columns", _native(_by_pairs, 8), _cached(8)),
        Example("tables_taken_along", _modernbert, _inputs),
        Example("tables_taken_along_by_one_of_two", _two_products, _inputs, count=2),
        Example("pairs_in_fp32", _flux, _inputs),
        Example("half_of_a_head", _partly, _inputs),
        Example("heads_before_positions", _phi, _inputs, before=(("causal_attention", "off"),)),
        Example("selected_tables", _selected, _three_tables),
        Example("after_a_bias", _biased, _linear),
        Example("turned_in_pairs", _turned_by(_interleaved), _inputs),
        Example("one_table_of_both", _torchtune, _one_table),
        Example("complex", _as_complex, _complex_table),
        Example("complex_dynamic_shape", _as_complex, _complex_table, dynamic=True),
        Example("complex_conjugated", lambda qkv, table: _as_complex(qkv, table.conj())[0], _complex_table),
        Example("complex_with_a_norm", _as_complex_with_a_norm, _complex_tables),
    ),
    near_misses=(
        Example("not_the_middle", _turned_by(_uneven), _inputs, reason=NOT_A_ROTATION),
        Example("the_other_half_is_negated", _turned_by(_wrong_half), _inputs, reason=NOT_A_ROTATION),
        Example(
            "another_tensor_times_cos",
            _turned_by(_rotate_half, flipped=True),
            _inputs,
            reason="what is rotated is not what is multiplied by cos",
        ),
        Example("one_table_of_halves", _torchtune_of_halves, _one_table, reason="input layout"),
        Example("complex_flat", _as_complex_flat, lambda d: _complex_table(d, torch.float32), reason=COMPLEX),
        Example("complex_of_halves", _as_complex_of_halves, _complex_table, reason=COMPLEX),
        Example("last_columns", _last_columns, _inputs, reason="only part of a head is rotated"),
        Example("turned_is_read", _turned_is_read, _inputs, reason="a step of the rotation has a second user"),
        Example("normalised_is_read", _normalised_is_read, _weighted, reason="a step of the rotation has a second user"),
        Example(
            "a_table_a_head",
            lambda qkv, cos, sin: (lambda q: q * cos + _rotate_half(q) * sin)(_heads(qkv)[0].transpose(1, 2)),
            _a_table_a_head,
            reason=NO_TABLES,
        ),
        Example("other_dtypes", lambda qkv, cos, sin: _qwen2(qkv, cos.float(), sin), _inputs, reason="dtypes"),
        Example(
            "every_other_column",
            lambda x, cos, sin: (lambda q: q * cos + _rotate_half(q) * sin)(x[..., ::2].unflatten(-1, (4, 16))),
            lambda device: (_inputs(device)[0], *(torch.randn(6, 1, 16, device=device).bfloat16() for _ in range(2))),
            reason="input layout",
        ),
        Example("heads_first_in_memory", _rope, _heads_first_in_memory, reason="memory layout"),
        Example(
            "head_of_twelve",
            lambda qkv, cos, sin: (lambda q: q * cos + _rotate_half(q) * sin)(qkv[..., :48].unflatten(-1, (4, 12))),
            lambda device: (_inputs(device)[0], *(torch.randn(6, 1, 12, device=device).bfloat16() for _ in range(2))),
            reason="head dimension",
        ),
        Example(
            "after_pointwise",
            lambda qkv, cos, sin: _qwen2(qkv * 2, cos, sin),
            _inputs,
            reason="Inductor fuses this rotation into its producer for free",
        ),
    ),
)
