"""scaled_mm_rope: q and k are normalised and rotated by the launch that projects them.

    qkv = inductor_ext.scaled_mm([a], [b0, b1, b2], …);  q, k = inductor_ext.qk_norm_rope(qkv[:, q's], qkv[:, k's], …)
        →   qkv = inductor_ext.scaled_mm_rope(a, [b0, b1, b2], …);  q, k = columns of qkv

What `scaled_mm_siblings` and `qk_norm_rope` have made becomes one call. Each element is rounded as those two round it. q and k
are column slices afterwards, as v is already, which attention reads where they lie: of Qwen3-0.6B's 7168 tokens 88 MB of
traffic a layer go, and a launch. What was measured (``kernels/scaled_mm_rope/table_<target>.json``) decides: on an H200
1.2 to 1.5 times as fast at 512 rows, and 0.97 to 1.12 above, where products need shared memory's bandwidth themselves.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from inductor_ext import miss, torch_compat
from inductor_ext.calls import aten, calling, is_call
from inductor_ext.graph import call, describe, erase_dead, known_equal, value_of
from inductor_ext.kernels.qk_norm_rope.op import OP as QK_NORM_ROPE
from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm_rope import op as scaled_mm_rope
from inductor_ext.kernels.scaled_mm_rope.op import HEAD_DIM, MAX_PRODUCTS, OUT_DTYPE
from inductor_ext.memory import is_view, readers
from inductor_ext.miss import Miss
from inductor_ext.patterns.qk_norm_rope import _gemma_norm, _llama_norm, _rope
from inductor_ext.patterns.scaled_mm import fixed, product, rowwise, tensorwise, with_bias
from inductor_ext.patterns.support import columns, scaled_plan, scaled_product
from inductor_ext.patterns.support.attention_examples import sdpa
from inductor_ext.patterns.support.same import in_order
from inductor_ext.rule import ACCUMULATED, Call, Context, Example, Match, Rule
from inductor_ext.settings import RuleMode

_READ_BEFORE = "q or k is read before the rotation too"
_NOT_ONE_CALL = "q and k are not columns of one call"


@dataclasses.dataclass(frozen=True)
class _Columns:
    """``buffer[:, low:high]``; ``node`` is the slice, or the buffer itself."""

    node: Node
    buffer: Node
    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class _Head:
    """q or k: what is read, its weight, and which result of the rotation it becomes."""

    x: Node
    weight: Node | None
    index: int
    columns: _Columns

    @property
    def width(self) -> int:
        return self.columns.high - self.columns.low


@dataclasses.dataclass(frozen=True)
class _Plan:
    node: Node  # the rotation
    buffer: Node  # the products
    heads: tuple[_Head, ...]  # in the order of their columns
    tables: tuple[Node, Node]
    place: Node  # the one of the two before which the call stands
    config: str

    @property
    def inputs(self) -> list[Node]:
        """What the rotation needs besides the products."""
        return [*self.tables, *(head.weight for head in self.heads if head.weight is not None)]

    def arguments(self) -> tuple[Any, ...]:
        """The op's arguments, nodes for tensors."""
        (a,), b, (scale_a,), scale_b, _, out_dtype, fast, static_b, _ = self.buffer.args
        eps, norm = self.node.args[6:8]
        q_weight, k_weight = (*(head.weight for head in self.heads), None)[:2]
        rotation = (q_weight, k_weight, *self.tables, len(self.heads), eps, norm)
        return a, b, scale_a, scale_b, *rotation, out_dtype, fast, static_b, self.config


def guard(node: Node, context: Context) -> Match | None:
    try:
        heads = _heads(node)
        if heads is None:
            return None
        place = _checked(node, heads, context.forced)
    except Miss as found:
        raise found.at(node) from None  # tables and weights are graph inputs, which have no line
    buffer = heads[0].columns.buffer
    (a,), b, scale_a, scale_b, _, _, fast, *_ = buffer.args
    device, m = value_of(a).device, value_of(a).shape[0]
    target = scaled_mm.target_of(device)
    static = isinstance(m, int)
    ns, k = tuple(value_of(each).shape[1] for each in b), value_of(b[0]).shape[0]
    rowwise = scaled_mm.is_rowwise([value_of(each) for each in (*scale_a, *scale_b)])
    table, problem = scaled_mm_rope.table(node.args[7]), (sum(ns), k, rowwise, fast)  # type: ignore[arg-type]
    why = scaled_plan.measured(table, target, node, m, problem, context)
    name = table.choose(target, m if static else scaled_mm.bounds(m)[1], *problem)
    if device.type == "cuda" and not name:
        raise Miss(miss.NO_KERNEL, node, "sm_90a", target)
    plan = _Plan(node, buffer, heads, tuple(node.args[4:6]), place, name if static and device.type == "cuda" else "")
    made = Call(scaled_mm_rope.OP, torch.fx.map_arg(plan.arguments(), value_of))
    turned = " and ".join(str(head.width // HEAD_DIM) for head in heads)
    detail = f"{turned} heads, N = {' + '.join(map(str, ns))}: {name if device.type == 'cuda' else 'reference'}"
    return Match(node, (made,), detail, why or "heads are rotated before they are stored", plan)


def _heads(node: Node) -> tuple[_Head, ...] | None:
    """q and, if there is one, k in the order of their columns; None where they come from no FP8 product."""
    x, weights = [each for each in node.args[:2] if each is not None], node.args[2:4]
    found = [_columns(in_order(each)) for each in x]
    buffers = [in_order(each) if columns_ is None else columns_.buffer for each, columns_ in zip(x, found)]
    if not any(scaled_product.is_product(buffer) or _is_products(buffer) for buffer in buffers):
        return None
    other = next((buffer for buffer in buffers if buffer is not buffers[0]), None)
    wanted = "column slices of one call of inductor_ext.scaled_mm, as scaled_mm_siblings makes of q, k and v"
    if other is not None:
        raise Miss(_NOT_ONE_CALL, node, wanted, f"{describe(buffers[0])} and {describe(other)}")
    if not _is_products(buffers[0]):
        raise Miss(_NOT_ONE_CALL, node, wanted, describe(buffers[0]))
    heads = [_Head(each, weights[i], i, columns_) for i, (each, columns_) in enumerate(zip(x, found)) if columns_ is not None]
    return tuple(sorted(heads, key=lambda head: head.columns.low))


def _is_products(node: Any) -> bool:
    return is_call(node, scaled_mm.OP.overload)


def _columns(node: Node) -> _Columns | None:
    """The columns of a two-dimensional buffer that ``node`` is; None where it is no slice and no call of scaled_mm."""
    if _is_products(node):
        return _Columns(node, node, 0, value_of(node).shape[1])
    inside = columns.taken(node)
    if inside is None or value_of(node).dim() != 2:
        return None
    return _Columns(node, node.args[0], inside.start, inside.stop)  # type: ignore[arg-type]


# ---- what the kernel takes ---------------------------------------------------------------------------------------------


def _checked(node: Node, heads: tuple[_Head, ...], forced: bool) -> Node:
    """Where the call stands."""
    _check_products(heads[0].columns.buffer)
    _check_columns(heads)
    _check_rotation(node, heads)
    _check_readers(node, heads)
    for head in heads:
        result = _result(node, head)
        if result is not None:
            columns.check(result, forced, head.width)
    return _place(node, heads)


def _check_products(buffer: Node) -> None:
    a, b, _, _, bias, out_dtype, *_ = buffer.args
    if len(a) != 1:
        raise Miss("the products do not share a", buffer, "one left side for q, k and v", f"{len(a)} of them")
    if any(each is not None for each in bias):
        found = describe(next(each for each in bias if each is not None))
        raise Miss("the products have a bias", buffer, "none", found)
    if out_dtype is not OUT_DTYPE:
        raise Miss(miss.OUTPUT_DTYPE, buffer, str(OUT_DTYPE), str(out_dtype))
    ns = [value_of(each).shape[1] for each in b]
    if len(ns) > MAX_PRODUCTS or any(n % HEAD_DIM for n in ns):
        wanted = f"at most {MAX_PRODUCTS} of multiples of {HEAD_DIM} columns"
        raise Miss("the products are not whole heads", buffer, wanted, f"N = {' + '.join(map(str, ns))}")


def _check_columns(heads: Sequence[_Head]) -> None:
    """Whether q and k are not the first products and nothing but them."""
    low = 0
    for head, weight in zip(heads, heads[0].columns.buffer.args[1]):
        high, at = low + value_of(weight).shape[1], head.columns
        if (at.low, at.high) != (low, high):
            wanted = f"columns {low} to {high}"
            raise Miss("q and k are not the first products", head.x, wanted, f"columns {at.low} to {at.high}")
        low = high


def _check_rotation(node: Node, heads: Sequence[_Head]) -> None:
    rows = value_of(heads[0].columns.buffer).shape[0]
    for head in heads:
        sequences, positions, count, size = value_of(head.x).shape
        if not known_equal(size, HEAD_DIM):
            raise Miss(miss.HEAD_DIM, head.x, str(HEAD_DIM), str(size))
        if not known_equal(count * HEAD_DIM, head.width) or not known_equal(sequences * positions, rows):
            wanted = f"[B, S, {head.width // HEAD_DIM}, {HEAD_DIM}] of B · S = {rows} rows"
            raise Miss("q or k is not a view of whole rows", head.x, wanted, describe(head.x))
    if node.args[8] is not OUT_DTYPE:
        raise Miss(miss.OUTPUT_DTYPE, node, str(OUT_DTYPE), str(node.args[8]))
    for table in node.args[4:6]:
        value = value_of(table)
        if value.dtype is not OUT_DTYPE:
            raise Miss("cos and sin are not of the output's dtype", table, str(OUT_DTYPE), describe(table))
        strides = [value.stride(dim) for dim in (0, 1) if not known_equal(value.shape[dim], 1)]
        if not known_equal(value.stride(2), 1) or not all(map(_aligned, (*strides, value.storage_offset()))):
            wanted = "rows of unit stride at multiples of 16 bytes"
            found = f"{describe(table)} strides {list(value.stride())} offset {value.storage_offset()}"
            raise Miss("the layout of cos and sin", table, wanted, found)
    for head in heads:
        if head.weight is not None and (value_of(head.weight).dtype is not OUT_DTYPE or value_of(head.weight).stride(0) != 1):
            found = f"{describe(head.weight)} strides {list(value_of(head.weight).stride())}"
            raise Miss("the norm's weight", head.weight, f"{OUT_DTYPE} in a row", found)


def _aligned(elements: Any) -> bool:
    return statically_known_true(elements * OUT_DTYPE.itemsize % 16 == 0)


# ---- what else reads q, k and v ------------------------------------------------------------------------------------------


def _check_readers(node: Node, heads: Sequence[_Head]) -> None:
    """A reader of q or k besides the rotation: it would find them rotated."""
    buffer, rotated = heads[0].columns.buffer, heads[-1].columns.high
    wanted = "readers of the columns behind them only"
    own = {head.columns.node for head in heads}
    for user in buffer.users:
        found = _columns(user)
        behind = found is not None and found.low >= rotated
        if not behind and user not in own and buffer not in own:
            raise Miss(_READ_BEFORE, user, wanted, describe(user))
    for head in heads:
        below, above = node, head.x
        while True:
            other = next((user for user in above.users if user is not below), None)
            if other is not None:
                raise Miss(_READ_BEFORE, above, "the rotation as the only reader", describe(other))
            if above is head.columns.node:
                break
            below, above = above, above.args[0]  # type: ignore[assignment]
    return None


def _result(node: Node, head: _Head) -> Node | None:
    return next((user for user in node.users if is_call(user, operator.getitem) and user.args[1] == head.index), None)


# ---- where the call stands -------------------------------------------------------------------------------------------------


def _place(node: Node, heads: Sequence[_Head]) -> Node:
    """Where the products are, if all that the rotation needs can be there; else where the rotation is, if v can wait."""
    buffer = heads[0].columns.buffer
    needed = [*node.args[4:6], *(head.weight for head in heads)]
    stuck = [late for late in (columns.hoist(each, buffer, move=False) for each in needed) if late is not None]
    if not stuck:
        return buffer
    early = next((user for user in _readers(buffer) if user < node and not is_view(user)), None)
    if early is None:
        return node
    wanted = "cos, sin and weights that exist before the products, or no earlier reader of v"
    found = f"{describe(stuck[0])}, and before it {describe(early)}"
    raise Miss("the rotation needs something computed later", node, wanted, found)


def _readers(buffer: Node) -> list[Node]:
    """Users of ``buffer`` and of views of it, in the graph's order."""
    return sorted({user for _, user in readers(buffer)})


def replace(match: Match) -> None:
    plan: _Plan = match.data
    graph, node, buffer = match.node.graph, plan.node, plan.buffer
    for needed in plan.inputs:
        columns.hoist(needed, plan.place, move=True)
    waiting = [view for view in _readers(buffer) if view < node] if plan.place is node else []
    with graph.inserting_before(plan.place):
        made = call(graph, scaled_mm_rope.OP.overload, *plan.arguments(), like=buffer)
    for view in waiting:
        node.prepend(view)
    results = {head: found for head in plan.heads if (found := _result(node, head)) is not None}
    turned = {}
    with graph.inserting_before(node):
        for head, result in results.items():
            part = call(graph, aten.slice.Tensor, made, 1, head.columns.low, head.columns.high, like=result)
            shape = torch_compat.symbolic(graph, list(value_of(result).shape))
            turned[head] = call(graph, aten.reshape.default, part, shape, like=result)
    for head, result in results.items():
        result.replace_all_uses_with(turned[head])
        erase_dead(result)
        columns.refresh(turned[head])
    buffer.replace_all_uses_with(made)  # v's columns are where they were
    erase_dead(buffer)


# ---- examples --------------------------------------------------------------------------------------------------------

B, S, HEADS, KV_HEADS, K = 2, 20, 2, 1, 64
WIDTHS = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
#: The rules that make what this one reads; attention stays as it is.
BEFORE: tuple[tuple[str, RuleMode], ...] = (
    ("scaled_mm_cat", "always"),
    ("scaled_mm_siblings", "always"),
    ("qk_norm_rope", "always"),
    ("causal_attention", "off"),
)

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
    anchors=lambda graph: calling(QK_NORM_ROPE.overload)(graph),
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
    ),
    near_misses=(
        _miss("not_asked_for", _llama, _operands, "not measured"),
        _miss("heads_of_64", _heads_of_64, _operands, miss.HEAD_DIM),
        _miss("bias", _biased, _with_bias_of_q, "the products have a bias"),
        _miss("v_of_64", _v_of_64, _operands, "the products are not whole heads"),
        _miss("joined_products", _joined_products, _with_another_input, "the products do not share a"),
        _miss("heads_as_tokens", _heads_as_tokens, _operands, "q or k is not a view of whole rows"),
        _miss("tables_in_fp32", _in_fp32, _operands, "cos and sin are not of the output's dtype"),
        _miss("fp16", _in_fp16, _operands, miss.OUTPUT_DTYPE),
        _miss("tables_not_aligned", _llama, _unaligned, "the layout of cos and sin"),
        _miss("weights_in_fp32", _gemma3, _weighted_in_fp32, "the norm's weight"),
        _miss("q_is_read", _q_is_read, _operands, _READ_BEFORE),
        _miss("k_of_another_input", _k_of_another_input, _with_another_input, _NOT_ONE_CALL),
        _miss("v_first", _v_first, _operands, "q and k are not the first products"),
        _miss("tables_of_v", _tables_of_v, _operands, "the rotation needs something computed later"),
        _miss("returned", _returned, _operands, "a sibling is returned to the caller"),
        _miss("rows_merged", _rows_merged, _operands, "a user merges its rows: a column slice would be copied"),
    ),
)
