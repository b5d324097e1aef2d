"""scaled_mm_rope: q and k are normalised and rotated by the launch that projects them.

    q = a·b0; k = a·b1; v = a·b2;  q = norm(q) * cos + turned(norm(q)) * sin;  k alike
        →   qkv = inductor_ext.scaled_mm_rope(a, [b0, b1, b2], …);  q, k, v = columns of qkv

Each element is rounded as `scaled_mm_siblings` and `qk_norm_rope` round it, which do the same in two launches where this one
does not pay. Attention reads q, k and v where they lie: with Qwen3-0.6B's 7168 tokens that saves 88 MB of memory traffic and
one launch per layer. What was measured (``kernels/scaled_mm_rope/table_<target>.json``) decides: on an H200 1.2 to 1.5 times as
fast at 512 rows, and 0.97 to 1.12 above, where products need shared memory's bandwidth themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from inductor_ext import miss, torch_compat
from inductor_ext.calls import aten, calling, is_call
from inductor_ext.graph import call, describe, erase_dead, known_equal, value_of
from inductor_ext.kernels.scaled_mm.ready import static_b
from inductor_ext.kernels.scaled_mm_rope import op as scaled_mm_rope
from inductor_ext.kernels.scaled_mm_rope.op import HEAD_DIM, MAX_PRODUCTS, OUT_DTYPE
from inductor_ext.memory import is_view, readers
from inductor_ext.miss import Miss, found_or_none
from inductor_ext.patterns import scaled_mm_cat, scaled_mm_siblings
from inductor_ext.patterns.qk_norm_rope import _gemma_norm, _llama_norm, _rope, rotations
from inductor_ext.patterns.scaled_mm import fixed, product, rowwise, tensorwise, with_bias
from inductor_ext.patterns.support import columns, scaled_plan, scaled_product, strides
from inductor_ext.patterns.support.attention_examples import sdpa
from inductor_ext.patterns.support.rope import Rope
from inductor_ext.patterns.support.same import same_elements, same_tensor
from inductor_ext.patterns.support.scaled_product import Product
from inductor_ext.rule import ACCUMULATED, Call, Context, Example, Match, Rule
from inductor_ext.settings import RuleMode

_READ_BEFORE = "q or k is read before the rotation too"
_NOT_SIBLINGS = "q and k are not products of one input"


@dataclasses.dataclass(frozen=True)
class _Head:
    """q or k: its rotation, the product that it is of, and the views between them, the product's end first."""

    rope: Rope
    product: Node
    path: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class _Plan:
    ropes: tuple[Rope, ...]
    products: tuple[Product, ...]  # the ropes' own first
    joined: Node | None  # the products concatenated, if they are
    place: Node  # the call stands before it
    config: str

    @property
    def needed(self) -> list[Node]:
        """What the call reads besides a and its scale."""
        tables = [table.node for table in (self.ropes[0].cos, self.ropes[0].sin)]
        weights = [rope.norm.weight for rope in self.ropes if rope.norm is not None]
        return [*tables, *weights, *(node for each in self.products for node in (each.b, each.scale_b))]

    def arguments(self, tables: tuple[Any, Any]) -> tuple[Any, ...]:
        """The op's arguments, nodes for tensors."""
        first, norm = min(self.products, key=lambda each: each.node), self.ropes[0].norm  # whose a is there first
        weights = [None if rope.norm is None else rope.norm.weight for rope in self.ropes]
        q_weight, k_weight = (*weights, None)[:2]
        rotation = (q_weight, k_weight, *tables, len(self.ropes), norm.eps if norm else 0.0, norm.norm if norm else "")
        b, scales = ([getattr(each, name) for each in self.products] for name in ("b", "scale_b"))
        ready = all(static_b(each.a, each.b) for each in self.products)
        return first.a, b, first.scale_a, scales, *rotation, OUT_DTYPE, first.fast, ready, self.config


def guard(node: Node, context: Context) -> Match | None:
    ropes = found_or_none(rotations, node, True, _siblings)
    if ropes is None or not any(map(_head, ropes)):
        return None  # qk_norm_rope says why
    if len(ropes) == 1:  # or two that are rotated together, and are not siblings
        ropes = found_or_none(rotations, node, True) or ropes
    if node is not ropes[0].end and node not in ropes[0].inner:
        return None  # the pair is looked at where the first of the two ends
    heads = [_head(rope) for rope in ropes]
    try:
        plan = _plan(node, ropes, heads, context.forced)
    except Miss as found:
        raise found.at(node) from None  # tables and weights are graph inputs, which have no line
    ns, first = [each.n for each in plan.products], plan.products[0]
    problem = sum(ns), first.k, any(each.rowwise for each in plan.products), first.fast
    table = scaled_mm_rope.table(ropes[0].norm.norm if ropes[0].norm else "")
    run = scaled_plan.ended(table, node, first, problem, context, "heads are rotated before they are stored")
    plan = dataclasses.replace(plan, config=run.config)
    arguments = plan.arguments((ropes[0].cos.value, ropes[0].sin.value))
    turned = " and ".join(str(n // HEAD_DIM) for n in ns[: len(ropes)])
    detail = f"{turned} heads, N = {' + '.join(map(str, ns))}: {run.detail}"
    return Match(node, (Call(scaled_mm_rope.OP, torch.fx.map_arg(arguments, value_of)),), detail, run.why, plan)


def _plan(node: Node, ropes: Sequence[Rope], heads: Sequence[_Head | None], forced: bool) -> _Plan:
    whole: list[_Head] = []
    for rope, head in zip(ropes, heads):
        if head is None:
            raise Miss(_NOT_SIBLINGS, node, "two FP8 products of one input", describe(rope.x.node))
        whole.append(head)
    products, joined = _products(whole, forced)
    for rope, each in zip(ropes, products):
        _check_rotation(rope, each)
    for head, own in zip(whole, products):
        _check_readers(head)
        # What comes of a permuted view is copied or not as it was: its rows are merged otherwise.
        plain = head.rope.dims == tuple(sorted(head.rope.dims))
        columns.check(head.rope.end, forced, own.n if plain else head.rope.x.value.shape[-1])
    plan = _Plan(tuple(ropes), tuple(products), joined, node, "")
    return dataclasses.replace(plan, place=_place(node, plan))


# ---- the products ------------------------------------------------------------------------------------------------------


def _head(rope: Rope) -> _Head | None:
    """The product whose columns, all of them, ``rope`` turns, in the order in which they lie; None where there is none."""
    if rope.x.dims != tuple(sorted(rope.x.dims)):
        return None
    path, at = list[Node](), rope.x.node
    while True:
        at, steps = scaled_product.way(at)
        path.extend(steps)
        if scaled_product.is_product(at):
            return _Head(rope, at, tuple(reversed(path)))
        inside = columns.taken(at)
        if inside is None or not columns.is_cat_of_columns(at.args[0]):
            return None
        path.append(at)
        part = _part(at.args[0], inside)  # type: ignore[arg-type]
        if part is None:
            return None
        at = part


def _siblings(one: Rope, two: Rope) -> bool:
    """Whether two rotations are of products of one input: wherever the second product stands, it is computed with the first."""
    heads = _head(one), _head(two)
    products = [found_or_none(scaled_product.parse, head.product) for head in heads if head is not None]
    return len(products) == 2 and None not in products and found_or_none(_alike, products) is True


def _part(joined: Node, inside: range) -> Node | None:
    """The operand of a concatenation that is these columns of it."""
    low = 0
    for part in joined.args[0]:  # type: ignore[union-attr]
        width: Any = value_of(part).shape[-1]  # type: ignore[arg-type]
        if low == inside.start and known_equal(width, len(inside)):
            return part  # type: ignore[return-value]
        low += width if isinstance(width, int) else 0
    return None


def _products(heads: Sequence[_Head], forced: bool) -> tuple[list[Product], Node | None]:
    """The heads' products and those that are written beside them; and the node that concatenates them, if one does."""
    own = [scaled_product.parse(head.product) for head in heads]
    _alike(own)
    joined = next((user for user in _users(heads[0]) if columns.is_cat_of_columns(user)), None)
    if joined is None:
        nodes = [each.node for each in own]
        others = [each for each in scaled_mm_siblings.siblings(own[0]) if each.node not in nodes]
        others = [each for each in others if scaled_mm_siblings.stuck(each, min(nodes)) is None]
        found = [*own, *(each for each in others if columns.may_be_columns(each.node, forced))]
    else:
        found = scaled_mm_cat.joined(joined)
        _alike(found)
        if [each.node for each in found[: len(own)]] != [each.node for each in own]:
            names = " and ".join(describe(each.node) for each in own)
            raise Miss("q and k are not the first products", joined, names, describe(found[0].node))
        _check_joined(joined, heads, sum(each.n for each in own))
    for each in found:
        if each.bias is not None:
            raise Miss("the products have a bias", each.node, "none", describe(each.bias))
        if each.out_dtype is not OUT_DTYPE:
            raise Miss(miss.OUTPUT_DTYPE, each.node, str(OUT_DTYPE), str(each.out_dtype))
    if len(found) > MAX_PRODUCTS or any(each.n % HEAD_DIM for each in found):
        wanted = f"at most {MAX_PRODUCTS} of multiples of {HEAD_DIM} columns"
        raise Miss("the products are not whole heads", heads[0].product, wanted, f"N = {' + '.join(str(p.n) for p in found)}")
    return found, joined


def _users(head: _Head) -> Iterator[Node]:
    for node in (head.product, *head.path):
        yield from node.users


def _alike(products: Sequence[Product]) -> bool:
    """True, or a Miss."""
    first = products[0]
    for each in products[1:]:
        if not same_tensor(first.a, each.a) or not same_elements(first.scale_a, each.scale_a):
            raise Miss(_NOT_SIBLINGS, each.node, f"{describe(first.a)}, and one scale of it", describe(each.a))
        if first.fast != each.fast or value_of(first.b).dtype is not value_of(each.b).dtype:
            raise Miss("q and k are products of other options", each.node, describe(first.node), describe(each.node))
    return True


def _check_joined(joined: Node, heads: Sequence[_Head], rotated: int) -> None:
    """Miss where something else than the heads reads q's or k's columns of what is concatenated."""
    own = {node for head in heads for node in head.path}
    for user in joined.users:
        inside = columns.taken(user)
        if user not in own and (inside is None or inside.start < rotated):
            raise Miss(_READ_BEFORE, user, "readers of the columns behind them only", describe(user))


# ---- what the kernel takes ---------------------------------------------------------------------------------------------


def _check_rotation(rope: Rope, made_by: Product) -> None:
    sequences, positions, count, size = rope.x.value.shape
    if not known_equal(size, HEAD_DIM):
        raise Miss(miss.HEAD_DIM, rope.end, str(HEAD_DIM), str(size))
    if not known_equal(count * HEAD_DIM, made_by.n) or not known_equal(sequences * positions, made_by.m):
        wanted = f"[B, S, {made_by.n // HEAD_DIM}, {HEAD_DIM}] of B · S = {made_by.m} rows"
        raise Miss("q or k is not a view of whole rows", rope.end, wanted, describe(rope.x.node))
    if not rope.plain:
        wanted = "halves of whole heads, a number of cos for each column"
        raise Miss("another rotation than the kernel's", rope.end, wanted, rope.described)
    if rope.dtype is not OUT_DTYPE:
        raise Miss(miss.OUTPUT_DTYPE, rope.end, str(OUT_DTYPE), str(rope.dtype))
    for table in (rope.cos, rope.sin):
        value = table.value
        if value.dtype is not OUT_DTYPE:
            raise Miss("cos and sin are not of the output's dtype", table.node, str(OUT_DTYPE), describe(table.node))
        strides = [value.stride(dim) for dim in (0, 1) if not known_equal(value.shape[dim], 1)]
        if not known_equal(value.stride(2), 1) or not all(map(_aligned, (*strides, value.storage_offset()))):
            wanted = "rows of unit stride at multiples of 16 bytes"
            found = f"{describe(table.node)} strides {list(value.stride())} offset {value.storage_offset()}"
            raise Miss("the layout of cos and sin", table.node, wanted, found)
    weight = None if rope.norm is None else rope.norm.weight
    if weight is not None and (value_of(weight).dtype is not OUT_DTYPE or value_of(weight).stride(0) != 1):
        found = f"{describe(weight)} strides {list(value_of(weight).stride())}"
        raise Miss("the norm's weight", weight, f"{OUT_DTYPE} in a row", found)


def _aligned(elements: Any) -> bool:
    return statically_known_true(elements * OUT_DTYPE.itemsize % 16 == 0)


def _check_readers(head: _Head) -> None:
    """Miss where something besides the rotation reads q or k, which it would find rotated."""
    own, pending = {*head.path, *head.rope.inner, head.rope.end}, [head.product, *head.path]
    while pending:
        for user in pending.pop().users:
            if user in own or columns.is_cat_of_columns(user):  # whose readers are looked at by themselves
                continue
            if not is_call(user, aten.permute.default):
                raise Miss(_READ_BEFORE, user, "the rotation as the only reader", describe(user))
            own.add(user)
            pending.append(user)


# ---- where the call stands -------------------------------------------------------------------------------------------------


def _outputs(plan: _Plan) -> list[Node]:
    """What the call's columns replace."""
    return [*(rope.end for rope in plan.ropes), *(each.node for each in plan.products[len(plan.ropes) :])]


def _place(node: Node, plan: _Plan) -> Node:
    """The first of the products, if all that the call needs can be there; else the first reader of what it gives."""
    first = min(each.node for each in plan.products)
    stuck = _stuck(plan, first)
    if stuck is None:
        return first
    behind = min((user for user in _readers(plan) if not is_view(user)), default=node)
    late = _stuck(plan, behind)
    if late is None and behind.op != "output":
        return behind
    wanted = "cos, sin and weights that exist before the products, or before what reads them"
    raise Miss("the rotation needs something computed later", node, wanted, f"{describe(stuck)}, and {describe(behind)}")


def _stuck(plan: _Plan, above: Node) -> Node | None:
    late = (columns.hoist(each, above, move=False) for each in plan.needed)
    return next((each for each in late if each is not None), None)


def _readers(plan: _Plan) -> set[Node]:
    """Users of what the call gives, and of views of it."""
    own = {node for rope in plan.ropes for node in (*rope.inner, rope.end)} | {each.node for each in plan.products}
    sources = [plan.joined, *_outputs(plan)] if plan.joined is not None else _outputs(plan)
    return {user for source in sources for _, user in readers(source) if user not in own and user is not plan.joined}


def replace(match: Match) -> None:
    plan: _Plan = match.data
    graph, place, like = match.node.graph, plan.place, plan.products[0].node
    for needed in plan.needed:
        columns.hoist(needed, place, move=True)
    waiting = sorted(view for view in _readers(plan) if view < place and is_view(view))
    with graph.inserting_before(place):
        first = plan.ropes[0]
        tables = first.cos.put(graph, first.end), first.sin.put(graph, first.end)
        made = call(graph, scaled_mm_rope.OP.overload, *plan.arguments(tables), like=like)
        low, parts = 0, list[Node]()
        for index, each in enumerate(plan.products):
            part = call(graph, aten.slice.Tensor, made, 1, low, low + each.n, like=each.node)
            parts.append(_turned(graph, plan.ropes[index], part) if index < len(plan.ropes) else part)
            low += each.n
    for view in waiting:
        place.prepend(view)
    if plan.joined is not None:
        plan.joined.replace_all_uses_with(made)
        strides.refresh(made)
    for old, new in zip(_outputs(plan), parts, strict=True):
        old.replace_all_uses_with(new)
        strides.refresh(new)
        erase_dead(old)
        erase_dead(new)
    if plan.joined is not None:
        erase_dead(plan.joined)


def _turned(graph: Graph, rope: Rope, part: Node) -> Node:
    shape = torch_compat.symbolic(graph, list(rope.x.value.shape))
    return rope.put_result(graph, call(graph, aten.reshape.default, part, shape, like=rope.end))


# ---- examples --------------------------------------------------------------------------------------------------------

B, S, HEADS, KV_HEADS, K = 2, 20, 2, 1, 64
WIDTHS = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
#: Attention stays as it is.
BEFORE: tuple[tuple[str, RuleMode], ...] = (("causal_attention", "off"),)

Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _operands(device: str, make: Any = rowwise) -> tuple[Any, ...]:
    """x [B, S, K] and its scale, then a weight and its scale for each of q, k and v; cos and sin."""
    a, _, scale, _ = make(device)
    pairs = [value for n in WIDTHS for value in make(device, n=n)[1::2]]
    angles = torch.randn(1, S, HEAD_DIM, device=device) * 9
    if scale.numel() > 1:
        scale = scale.view(B, S, 1)
    return a.view(B, S, K), scale, *pairs, angles.cos().bfloat16(), angles.sin().bfloat16()


def _tensorwise_operands(device: str) -> tuple[Any, ...]:
    return _operands(device, tensorwise)


def _weighted(device: str) -> tuple[Any, ...]:
    return *_operands(device), *(torch.rand(HEAD_DIM, device=device).bfloat16() + 0.5 for _ in range(2))


def _weighted_in_fp32(device: str) -> tuple[Any, ...]:
    *others, q_weight, k_weight = _weighted(device)
    return *others, q_weight.float(), k_weight.float()


def _with_another_input(device: str) -> tuple[Any, ...]:
    return *_operands(device), _operands(device)[0]


def _batched(device: str) -> tuple[Any, ...]:
    *others, _, _ = _operands(device)
    angles = torch.randn(B, S, HEAD_DIM, device=device) * 9
    return *others, angles.cos().bfloat16(), angles.sin().bfloat16()


def _projected(x: Any, s: Any, *pairs: Any, size: int = HEAD_DIM, **options: Any) -> list[torch.Tensor]:
    """q, k and v as [B, S, H, D]."""
    row = s.reshape(-1, 1) if s.numel() > 1 else s
    outs = [product(x.flatten(0, 1), w, row, t, **options) for w, t in zip(pairs[::2], pairs[1::2])]
    return [out.view(*x.shape[:2], -1, size) for out in outs]


def _attention(turned: Sequence[torch.Tensor], v: torch.Tensor) -> torch.Tensor:
    """q and k are [B, H, S, D], v is [B, S, H, D]."""
    q, k = turned
    k, v = (each.expand(-1, HEADS, -1, -1) for each in (k, v.transpose(1, 2)))
    return sdpa(q, k, v)[0]


def _llama(*inputs: Any) -> torch.Tensor:
    *projection, cos, sin = inputs
    q, k, v = _projected(*projection)
    return _attention(_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin), v)


def _qwen3(*inputs: Any, norm: Norm = _llama_norm) -> torch.Tensor:
    *projection, cos, sin, q_weight, k_weight = inputs
    q, k, v = _projected(*projection)
    q, k = norm(q, q_weight).transpose(1, 2), norm(k, k_weight).transpose(1, 2)
    return _attention(_rope(q, k, cos, sin), v)


def _gemma3(*inputs: Any) -> torch.Tensor:
    return _qwen3(*inputs, norm=_gemma_norm)


def _any_sizes(*inputs: Any) -> torch.Tensor:
    for weight, n in zip(inputs[2:8:2], WIDTHS):
        fixed(weight, n)
    return _qwen3(*inputs)


def _packed(*inputs: Any) -> torch.Tensor:
    """Tokens of all sequences in one row, as hand-written models have them."""
    x, s, *pairs, cos, sin = inputs
    q, k, v = (each.squeeze(0) for each in _projected(x.reshape(1, B * S, K), s, *pairs))
    cos, sin = (each.expand(B, -1, -1).reshape(-1, 1, HEAD_DIM) for each in (cos, sin))
    q, k = (each * cos + _half_turned(each) * sin for each in (q, k))
    return _attention([each[None].transpose(1, 2) for each in (q, k)], v[None])


def _half_turned(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)


def _q_alone(*inputs: Any) -> torch.Tensor:
    *projection, cos, sin = inputs
    q, k, v = _projected(*projection)
    q, _ = _rope(q.transpose(1, 2), q.transpose(1, 2), cos, sin)
    return _attention((q, k.transpose(1, 2)), v)


def _late_tables(*inputs: Any) -> torch.Tensor:
    """cos and sin are computed of angles, after the products."""
    *projection, cos, sin = inputs
    q, k, v = _projected(*projection)
    cos, sin = cos.cos(), sin.sin()
    return _attention(_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin), v)


def _v_is_late(*inputs: Any) -> torch.Tensor:
    """v's scale is computed of q, turned."""
    x, s, wq, tq, wk, tk, wv, tv, cos, sin = inputs
    q, k = _projected(x, s, wq, tq, wk, tk)
    q, k = _rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    (v,) = _projected(x, s, wv, tv * q.float().abs().amax())
    return _attention((q, k), v)


def _tables_of_v(*inputs: Any) -> torch.Tensor:
    *projection, cos, sin = inputs
    q, k, v = _projected(*projection)
    cos = cos * v.float().sum().bfloat16()
    q, _ = _rope(q.transpose(1, 2), q.transpose(1, 2), cos, sin)
    return _attention((q, k.transpose(1, 2)), v)


def _q_is_read(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *projection, cos, sin = inputs
    q, k, v = _projected(*projection)
    turned = _rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return _attention(turned, v), q.float().sigmoid()


def _k_of_another_input(*inputs: Any) -> torch.Tensor:
    x, s, wq, tq, wk, tk, wv, tv, cos, sin, y = inputs
    (q, v), (k,) = _projected(x, s, wq, tq, wv, tv), _projected(y, s, wk, tk)
    return _attention(_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin), v)


def _v_first(*inputs: Any) -> torch.Tensor:
    """The position of what is computed first is that of its columns."""
    *projection, cos, sin = inputs
    q, k, v = _projected(*projection)
    x = v.float().sigmoid().bfloat16()
    sin = sin * x.sum()
    return _attention(_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin), x)


def _k_first(*inputs: Any) -> torch.Tensor:
    """q's columns lie behind k's."""
    x, s, *pairs, cos, sin, q_weight, k_weight = inputs
    k, q, v = _projected(x, s, *pairs[2:4], *pairs[:2], *pairs[4:])
    q, k = _llama_norm(q, q_weight).transpose(1, 2), _llama_norm(k, k_weight).transpose(1, 2)
    return _attention(_rope(q, k, cos, sin), v)


def _heads_of_64(*inputs: Any) -> torch.Tensor:
    *projection, cos, sin = inputs
    q, k, v = _projected(*projection, size=64)
    q, k = _rope(q.transpose(1, 2), k.transpose(1, 2), cos[..., :64], sin[..., :64])
    k, v = (each.repeat_interleave(2, 1) for each in (k, v.transpose(1, 2)))
    return sdpa(q, k, v)[0]


def _biased(*inputs: Any) -> torch.Tensor:
    *projection, cos, sin, bias = inputs
    x, s, wq, tq, wk, tk, wv, tv = projection
    row = s.reshape(-1, 1)
    q = product(x.flatten(0, 1), wq, row, tq, bias=bias).view(B, S, -1, HEAD_DIM)
    k, v = _projected(x, s, wk, tk, wv, tv)
    return _attention(_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin), v)


def _bias_added(*inputs: Any) -> torch.Tensor:
    """As Qwen2's q: the bias stands between the product and the rotation."""
    *projection, cos, sin, bias = inputs
    q, k, v = _projected(*projection)
    q = (q.flatten(2) + bias).view(q.shape)
    return _attention(_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin), v)


def _in_pairs(*inputs: Any) -> torch.Tensor:
    """Neighbouring columns are a pair, as Flux has them."""
    *projection, cos, sin = inputs
    q, k, v = _projected(*projection)
    q, k = (each.transpose(1, 2) for each in (q, k))
    turned = []
    for each in (q, k):
        a, b = each.unflatten(-1, (-1, 2)).unbind(-1)
        turned.append(each * cos[:, None] + torch.stack((-b, a), -1).flatten(-2) * sin[:, None])
    return _attention(turned, v)


def _in_fp32(*inputs: Any) -> torch.Tensor:
    *projection, cos, sin = inputs
    q, k, v = _projected(*projection)
    q, k = _rope(q.transpose(1, 2).float(), k.transpose(1, 2).float(), cos.float(), sin.float())
    return _attention((q.bfloat16(), k.bfloat16()), v)


def _in_fp16(*inputs: Any) -> torch.Tensor:
    *projection, cos, sin = inputs
    q, k, v = _projected(*projection, out_dtype=torch.float16)
    return _attention(_rope(q.transpose(1, 2), k.transpose(1, 2), cos.half(), sin.half()), v)


def _returned(*inputs: Any) -> tuple[torch.Tensor, ...]:
    *projection, cos, sin = inputs
    q, k, v = _projected(*projection)
    q, k = _rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q, _attention((q, k), v)


def _rows_merged(*inputs: Any) -> tuple[torch.Tensor, ...]:
    *projection, cos, sin = inputs
    q, k, v = _projected(*projection)
    q, k = _rope(q, k, cos, sin, dim=2)
    return q.reshape(-1, 64).float().sigmoid(), k.float().sigmoid(), v.float().sigmoid()


def _v_of_64(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, s, wq, tq, wk, tk, wv, tv, cos, sin = inputs
    (q, k), (v,) = _projected(x, s, wq, tq, wk, tk), _projected(x, s, wv[:64], tv[:64], size=64)
    q, k = _rope(q, k, cos, sin, dim=2)
    return q.float().sigmoid() + k.float().sigmoid(), v.float().sigmoid()


def _joined_products(*inputs: Any) -> torch.Tensor:
    """q and k are columns of one buffer, and k is a product of another input."""
    x, s, wq, tq, wk, tk, _, _, cos, sin, y = inputs
    row = s.reshape(-1, 1)
    joined = torch.cat([product(x.flatten(0, 1), wq, row, tq), product(y.flatten(0, 1), wk, row, tk)], 1)
    q, k = (joined[:, low:high].view(B, S, -1, HEAD_DIM) for low, high in ((0, WIDTHS[0]), (WIDTHS[0], sum(WIDTHS[:2]))))
    q, k = _rope(q, k, cos, sin, dim=2)
    return q.float().sigmoid() + k.float().sigmoid()


def _heads_as_tokens(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head of q has an angle of its own."""
    *projection, cos, sin = inputs
    q, k, _ = _projected(*projection)
    q = q.view(1, B * S * HEADS, 1, HEAD_DIM)
    cos, sin = (each.expand(B * HEADS, -1, -1).reshape(1, -1, HEAD_DIM) for each in (cos, sin))
    return _rope(q, q, cos, sin, dim=2)[0].float().sigmoid(), k.float().sigmoid()


def _with_bias_of_q(device: str) -> tuple[Any, ...]:
    return *_operands(device), with_bias((None, torch.empty(WIDTHS[0], 0, device=device)))[-1]


def _unaligned(device: str) -> tuple[Any, ...]:
    *others, cos, sin = _operands(device)
    return *others, *(torch.cat((each, each), -1)[..., : HEAD_DIM + 1][..., 1:] for each in (cos, sin))


def _match(name: str, fn: Any, inputs: Any, **options: Any) -> Example:
    return Example(name, fn, inputs, mode="always", before=BEFORE, **options)


def _miss(name: str, fn: Any, inputs: Any, reason: str, **options: Any) -> Example:
    return Example(name, fn, inputs, reason=reason, before=BEFORE, **options)


RULE = Rule(
    name="scaled_mm_rope",
    doc="FP8 projections of q, k and v, then the norm and rotation of q and k → one launch",
    anchors=calling(aten.add.Tensor),
    guard=guard,
    replace=replace,
    exact=False,
    cost=f"{scaled_plan.COST}; the norm's mean too",
    tolerance=ACCUMULATED,
    matches=(
        _match("qwen3", _qwen3, _weighted),
        _match("qwen3_dynamic_shape", _any_sizes, _weighted, dynamic=True),
        _match("gemma3", _gemma3, _weighted),
        _match("llama", _llama, _operands),
        _match("tensorwise", _llama, _tensorwise_operands),
        _match("tables_of_each_sequence", _llama, _batched),
        _match("packed_tokens", _packed, _operands),
        _match("q_alone", _q_alone, _operands),
        _match("k_before_q", _k_first, _weighted),
        _match("late_tables", _late_tables, _operands),
        _match("v_is_late", _v_is_late, _operands),
    ),
    near_misses=(
        _miss("not_asked_for", _llama, _operands, "not measured"),
        _miss("heads_of_64", _heads_of_64, _operands, miss.HEAD_DIM),
        _miss("bias", _biased, _with_bias_of_q, "the products have a bias"),
        _miss("bias_added_after", _bias_added, _with_bias_of_q, "the products have a bias"),
        _miss("by_pairs", _in_pairs, _operands, "another rotation than the kernel's"),
        _miss("v_of_64", _v_of_64, _operands, "the products are not whole heads"),
        _miss("joined_products", _joined_products, _with_another_input, _NOT_SIBLINGS),
        _miss("heads_as_tokens", _heads_as_tokens, _operands, "q or k is not a view of whole rows"),
        _miss("tables_in_fp32", _in_fp32, _operands, "cos and sin are not of the output's dtype"),
        _miss("fp16", _in_fp16, _operands, miss.OUTPUT_DTYPE),
        _miss("tables_not_aligned", _llama, _unaligned, "the layout of cos and sin"),
        _miss("weights_in_fp32", _gemma3, _weighted_in_fp32, "the norm's weight"),
        _miss("q_is_read", _q_is_read, _operands, _READ_BEFORE),
        _miss("k_of_another_input", _k_of_another_input, _with_another_input, _NOT_SIBLINGS),
        _miss("v_first", _v_first, _operands, "the rotation needs something computed later"),
        _miss("tables_of_v", _tables_of_v, _operands, "the rotation needs something computed later"),
        _miss("returned", _returned, _operands, "a sibling is returned to the caller"),
        _miss("rows_merged", _rows_merged, _operands, "a user merges its rows: a column slice would be copied"),
    ),
)
