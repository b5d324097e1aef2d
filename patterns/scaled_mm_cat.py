"""scaled_mm_cat: FP8 products that are only concatenated are written side by side in the first place.

    cat([a0·b0, a1·b1, …], -1)   →   inductor_ext.scaled_mm([a0, a1, …], [b0, b1, …], …)

The products may share a or not. Views of them that keep the columns may stand before the concatenation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext import torch_compat
from inductor_ext.calls import aten, calling
from inductor_ext.graph import call, describe, erase_dead, known_equal, value_of
from inductor_ext.miss import NOT_WHOLE_COLUMNS, Miss, no_other_users, second_user
from inductor_ext.patterns.scaled_mm import bias_added, fixed, product, rowwise, tensorwise
from inductor_ext.patterns.support import columns, scaled_plan, scaled_product
from inductor_ext.patterns.support.same import same_elements, same_tensor
from inductor_ext.patterns.support.scaled_product import Product
from inductor_ext.rule import ACCUMULATED, Context, Example, Match, Rule


def anchors(graph: Graph) -> list[Node]:
    def products(node: Node) -> int:
        return sum(scaled_product.is_product(scaled_product.way(part)[0]) for part in node.args[0])

    return [node for node in calling(aten.cat.default)(graph) if columns.is_cat_of_columns(node) and products(node) > 1]


def guard(node: Node, context: Context) -> Match | None:
    products = joined(node)
    plan = scaled_plan.plan(products, _shared(products), context, "the products are faster apart")
    detail = f"{len(products)} products, N = {' + '.join(str(each.n) for each in products)}: {plan.detail}"
    return Match(node, (plan.call,), detail, plan.why, plan)


def joined(node: Node) -> list[Product]:
    """The products that ``node`` concatenates, all of a kind and read by it alone."""
    products: list[Product] = []
    for part in node.args[0]:
        source, path = scaled_product.way(part)
        if not scaled_product.is_product(source):
            raise Miss("not only products", node, "an FP8 product as every operand", describe(part))
        found = scaled_product.parse(source)
        twice = node.args[0].count(part) > 1
        no_other_users([source, *path], path if twice else [*path, node], "the product", "the concatenation as its only user")
        if not known_equal(value_of(part).shape[-1], found.n):
            wanted, shape = "views that keep the columns", list(value_of(part).shape)
            raise Miss(NOT_WHOLE_COLUMNS, part, f"{wanted}, {found.n} of them", f"a view as {shape}")
        products.append(found)
    odd = next((each for each in products if _kind(each) != _kind(products[0]) or not known_equal(each.m, products[0].m)), None)
    if odd is not None:
        wanted = f"{_described(products[0])}, as the first has"
        raise Miss("the products are not alike", odd.node, wanted, _described(odd))
    return products


def replace(match: Match) -> None:
    graph, shape = match.node.graph, value_of(match.node).shape
    with graph.inserting_before(match.node):
        made = match.data.insert(graph)
        if len(shape) != 2:
            made = call(graph, aten.reshape.default, made, torch_compat.symbolic(graph, list(shape)), like=match.node)
    match.node.replace_all_uses_with(made)
    erase_dead(match.node)


def _kind(product: Product) -> tuple[Any, ...]:
    return product.out_dtype, product.fast, value_of(product.a).dtype, value_of(product.b).dtype


def _described(product: Product) -> str:
    accumulation = "fast" if product.fast else "exact"
    types = f"{value_of(product.a).dtype} × {value_of(product.b).dtype} → {product.out_dtype}"
    return f"{types}, {accumulation} accumulation, {product.m} rows"


def _shared(products: list[Product]) -> bool:
    first = products[0]
    return all(same_tensor(first.a, each.a) and same_elements(first.scale_a, each.scale_a) for each in products)


# ---- examples --------------------------------------------------------------------------------------------------------


def _two(device: str, make: Any = tensorwise, k: int = 64) -> tuple[Any, ...]:
    return *make(device), *make(device, k=k, n=32)


def _join(a: Any, w: Any, s: Any, t: Any, c: Any, u: Any, r: Any, v: Any, **options: Any) -> torch.Tensor:
    return torch.cat([product(a, w, s, t), product(c, u, r, v, **options)], 1)


def _join_any_rows(*inputs: Any) -> torch.Tensor:
    fixed(inputs[1], 48)
    fixed(inputs[5], 32)
    return _join(*inputs)


def _join_shared(a: Any, w: Any, s: Any, t: Any, c: Any, u: Any, r: Any, v: Any) -> torch.Tensor:
    return torch.cat([product(a, w, s, t).view(2, 20, 48), product(a, u, s, v).view(2, 20, 32)], -1)


def _join_biased(a: Any, w: Any, s: Any, t: Any, c: Any, u: Any, r: Any, v: Any, b: Any, d: Any) -> torch.Tensor:
    return torch.cat([bias_added(a, w, s, t, b), bias_added(c, u, r, v, d)], -1)


def _biases(device: str) -> list[torch.Tensor]:
    return [torch.randn(n, device=device).bfloat16() for n in (48, 32)]


def _used_twice(*inputs: Any) -> Any:
    p, q = product(*inputs[:4]), product(*inputs[4:])
    return torch.cat([p, q], 1), p.float().sigmoid()


MATCHES = (
    Example("two_inputs", _join, _two, mode="always"),
    Example("two_depths", _join, lambda d: _two(d, k=128), mode="always"),
    Example("bias_added_after", _join_biased, lambda d: (*_two(d, rowwise), *_biases(d)), mode="always"),
    Example("dynamic_shape", _join_any_rows, lambda d: _two(d, rowwise), mode="always", dynamic=True),
    Example("shared_input_through_views", _join_shared, _two, mode="always"),
)

NEAR_MISSES = (
    Example("second_user", _used_twice, _two, reason=second_user("the product")),
    Example(
        "with_something_else",
        lambda *inputs: torch.cat([product(*inputs[:4]), product(*inputs[4:8]), inputs[8]], 1),
        lambda d: (*_two(d), torch.zeros(40, 8, device=d).bfloat16()),
        reason="not only products",
    ),
    Example(
        "other_accumulation",
        lambda *inputs: _join(*inputs, use_fast_accum=True),
        _two,
        reason="the products are not alike",
    ),
    Example(
        "columns_merged",
        lambda *inputs: torch.cat([product(*inputs[:4]).view(-1, 16), product(*inputs[4:]).view(-1, 16)[:120]], 1),
        lambda d: (*tensorwise(d), *tensorwise(d)),
        reason=NOT_WHOLE_COLUMNS,
    ),
)

RULE = Rule(
    name="scaled_mm_cat",
    doc="concatenated FP8 products → one launch into one buffer",
    anchors=anchors,
    guard=guard,
    replace=replace,
    exact=False,
    cost=scaled_plan.COST,
    tolerance=ACCUMULATED,
    matches=MATCHES,
    near_misses=NEAR_MISSES,
)
