"""scaled_mm_siblings: FP8 products that share their left side become one launch into one buffer.

    q = a·b0; k = a·b1; v = a·b2   →   qkv = inductor_ext.scaled_mm([a], [b0, b1, b2], …); q, k, v = columns of qkv

q, k and v of an attention layer, gate and up of an MLP. The weights stay where they are: the kernel takes several. What reads
a product reads a column slice afterwards, whose rows are further apart; where that costs a copy, products are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.graph import describe, value_of
from inductor_ext.miss import Miss, found_or_none
from inductor_ext.patterns.scaled_mm import bias_added, fixed, product, rowwise, tensorwise
from inductor_ext.patterns.support import columns, scaled_plan, scaled_product
from inductor_ext.patterns.support.same import is_pure, root, same_elements, same_tensor
from inductor_ext.patterns.support.scaled_product import Product
from inductor_ext.rule import ACCUMULATED, Context, Example, Match, Rule


def guard(node: Node, context: Context) -> Match | None:
    first = found_or_none(scaled_product.parse, node)
    if first is None:
        return None  # scaled_mm reports it
    others = list(siblings(first))
    if not others:
        return None
    columns.check(first.end, context.forced, first.n)
    others = [other for other in others if columns.may_be_columns(other.end, context.forced, other.n)]
    if any(other.node < node and stuck(first, other.node) is None for other in others):
        return None  # of the group that the other one begins
    later = [other for other in others if node < other.node]
    group = [first, *(other for other in later if stuck(other, node) is None)]
    if len(group) == 1:
        _check_order(node, later)
        return None
    plan = scaled_plan.plan(group, True, context, "the products are faster apart")
    detail = f"{len(group)} products, N = {' + '.join(str(each.n) for each in group)}: {plan.detail}"
    return Match(node, (plan.call,), detail, plan.why, plan)


def replace(match: Match) -> None:
    graph, plan = match.node.graph, match.data
    for each in plan.products:
        scaled_product.absorb(each)
        for operand in (each.b, each.scale_b, each.bias):
            columns.hoist(operand, match.node, move=True)
    with graph.inserting_before(match.node):
        buffer = plan.insert(graph)
    columns.split(graph, buffer, [each.node for each in plan.products])


def siblings(first: Product) -> Iterator[Product]:
    """Products with the same a and scale_a as ``first``, and the same options, in the graph's order."""
    for node in sorted(_products_below(root(first.a))):
        if node is first.node:
            continue
        other = found_or_none(scaled_product.parse, node)
        if other is not None and _alike(first, other):
            yield other


def _alike(one: Product, two: Product) -> bool:
    return (
        one.out_dtype is two.out_dtype
        and one.fast == two.fast
        and value_of(one.b).dtype is value_of(two.b).dtype
        and same_tensor(one.a, two.a)
        and same_elements(one.scale_a, two.scale_a)
    )


def _products_below(source: Node) -> set[Node]:
    found, seen, pending = set(), {source}, [source]
    while pending:
        for user in pending.pop().users:
            if scaled_product.is_product(user):
                found.add(user)
            elif is_pure(user) and user not in seen:
                seen.add(user)
                pending.append(user)
    return found


def stuck(product: Product, above: Node) -> Node | None:
    """What keeps a product from being computed before ``above``; a and scale_a are the other one's."""
    late = (columns.hoist(operand, above, move=False) for operand in (product.b, product.scale_b, product.bias))
    return next((node for node in late if node is not None), None)


def _check_order(node: Node, later: list[Product]) -> None:
    for other in later:
        found = stuck(other, node)
        if found is not None:
            wanted = "weights, scales and biases that exist before the first of the products"
            raise Miss("a sibling needs something computed later", node, wanted, describe(found))


# ---- examples --------------------------------------------------------------------------------------------------------


def _inputs(device: str, *widths: int, make: Any = tensorwise) -> tuple[Any, ...]:
    """a, scale_a, then a weight and its scale for each width."""
    a, _, s, _ = make(device)
    return a, s, *(value for n in widths for value in make(device, n=n)[1::2])


def _apart(a: Any, s: Any, *pairs: Any, **options: Any) -> list[torch.Tensor]:
    return [product(a, w, s, t, **options) for w, t in zip(pairs[::2], pairs[1::2])]


def _qkv(*inputs: Any) -> Any:
    q, k, v = _apart(*inputs)
    return q.float().sigmoid()[:, :32] * k.float().sigmoid()[:, :32] + v.float().sigmoid()[:, :32]


def _biased(*inputs: Any) -> torch.Tensor:
    """As BERT's: each layer adds its bias itself."""
    a, s, w, t, u, r, b, c = inputs
    q, k = bias_added(a, w, s, t, b), bias_added(a, u, s, r, c)
    return q.float().sigmoid()[..., :32] * k.float().sigmoid()


def _qkv_any_rows(*inputs: Any) -> Any:
    for weight, n in zip(inputs[2::2], (48, 32, 32)):
        fixed(weight, n)
    return _qkv(*inputs)


def _quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = (x.abs().amax(-1, keepdim=True) / 448.0).float()
    return (x.float() / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), s


def _linear(x: Any, w: Any, t: Any) -> torch.Tensor:
    """torchao's linear layer: it quantises and flattens its input itself."""
    q, s = _quantise(x)
    out = product(q.reshape(-1, x.shape[-1]), w, s.unsqueeze(-1).reshape(-1, 1), t)
    return out.reshape(*x.shape[:-1], w.shape[0])


def _gate_up(x: Any, w: Any, t: Any, u: Any, r: Any) -> torch.Tensor:
    return torch.nn.functional.silu(_linear(x, w, t)) * _linear(x, u, r)


def _model_inputs(device: str) -> tuple[Any, ...]:
    x = torch.randn(2, 16, 64, device=device).bfloat16()
    return x, *(value for _ in range(2) for value in rowwise(device)[1::2])


def _pair(device: str) -> tuple[Any, ...]:
    return _inputs(device, 32, 32)


def _with_biases(device: str) -> tuple[Any, ...]:
    return *_inputs(device, 48, 32, make=rowwise), *(torch.randn(n, device=device).bfloat16() for n in (48, 32))


def _whole_and_parts(*inputs: Any) -> Any:
    p, q = _apart(*inputs)
    return torch.cat([p, q], 1), p.float().sigmoid(), q.float().sigmoid()


def _second_weight_is_late(a: Any, s: Any, w: Any, t: Any, u: Any, r: Any) -> torch.Tensor:
    p = product(a, w, s, t)
    return p.float().sigmoid() + product(a, u, s, p.float().sigmoid().amax().reshape(1, 1)).float().sigmoid()


MATCHES = (
    Example("q_k_v", _qkv, lambda d: _inputs(d, 48, 32, 32), mode="always"),
    Example("rowwise", _qkv, lambda d: _inputs(d, 48, 32, 32, make=rowwise), mode="always"),
    Example("dynamic_shape", _qkv_any_rows, lambda d: _inputs(d, 48, 32, 32, make=rowwise), mode="always", dynamic=True),
    Example("gate_up_torchao", _gate_up, _model_inputs, mode="always"),
    Example("bias_added_after", _biased, _with_biases, mode="always"),
    Example("parts_and_whole", _whole_and_parts, _pair, mode="always"),
)

NEAR_MISSES = (
    Example("returned", lambda *inputs: _apart(*inputs), _pair, reason="a sibling is returned to the caller"),
    Example(
        "rows_merged",
        lambda *inputs: [p.reshape(-1, 16).float().sigmoid() for p in _apart(*inputs)],
        _pair,
        reason="a user merges its rows: a column slice would be copied",
    ),
    Example(
        "second_scale_is_late",
        _second_weight_is_late,
        _pair,
        reason="a sibling needs something computed later",
    ),
)

RULE = Rule(
    name="scaled_mm_siblings",
    doc="FP8 products that share a: q, k, v; gate, up → one launch into one buffer",
    anchors=scaled_product.products,
    guard=guard,
    replace=replace,
    exact=False,
    cost=scaled_plan.COST,
    tolerance=ACCUMULATED,
    matches=MATCHES,
    near_misses=NEAR_MISSES,
)
