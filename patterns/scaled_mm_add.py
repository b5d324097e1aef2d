"""scaled_mm_add: an FP8 matrix product that is only added to a residual adds it itself.

    x + view(aten._scaled_mm(a, b, …))   →   view(inductor_ext.scaled_mm_add(a, b, …, reshape(x, [M, N]), …))

The sum is that of the two operators given the product: rounded, added, rounded. A norm that follows reads the sum alone, where
it read the product and the residual and wrote the sum: of Qwen3-0.6B's 7168 × 1024 activations 51 MB become 22, and the
product, which is busy with arithmetic, reads 15 more. That pays for some sizes: those that the table of the op
(``kernels/scaled_mm_add/table_<target>.json``) says it does for, norm included.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext import torch_compat
from inductor_ext.calls import arguments, aten
from inductor_ext.graph import call, describe, erase_dead, known_equal, same_sizes, value_of
from inductor_ext.kernels.scaled_mm.ready import static_b
from inductor_ext.kernels.scaled_mm_add import op as scaled_mm_add
from inductor_ext.miss import NOT_WHOLE_COLUMNS, Miss, no_other_users, second_user
from inductor_ext.patterns.scaled_mm import bias_added, fixed, product, rowwise, tensorwise, with_bias
from inductor_ext.patterns.support import scaled_plan, scaled_product
from inductor_ext.patterns.support.scaled_product import Product
from inductor_ext.rule import ACCUMULATED, Call, Context, Example, Match, Rule


@dataclasses.dataclass(frozen=True)
class _Plan:
    product: Product
    residual: Node
    config: str

    def arguments(self, residual: Any) -> tuple[Any, ...]:
        """The op's arguments, nodes for tensors, with the residual as [M, N]."""
        p = self.product
        ready = static_b(p.a, p.b)
        return p.a, p.b, p.scale_a, p.scale_b, p.bias, residual, p.out_dtype, p.fast, ready, self.config


def anchors(graph: Graph) -> list[Node]:
    return [node for node in graph.find_nodes(op="call_function", target=aten.add.Tensor) if _operands(node) is not None]


def _operands(node: Node) -> tuple[Node, Node] | None:
    """(what is made of a product, what is added to it), if one operand is a view of a product."""
    if len(node.args) != 2 or not all(isinstance(each, Node) for each in node.args):
        return None
    one, other = node.args
    for part, residual in ((one, other), (other, one)):
        source, _ = scaled_product.way(part)
        if scaled_product.is_product(source) and scaled_product.way(node)[0] is not source:  # which would be its bias
            return part, residual  # type: ignore[return-value]
    return None


def guard(node: Node, context: Context) -> Match | None:
    operands = _operands(node)
    assert operands is not None
    part, residual = operands
    found = scaled_product.parse(scaled_product.way(part)[0])
    _check(node, part, residual, found)
    problem = found.n, found.k, found.rowwise, found.fast
    run = scaled_plan.ended(scaled_mm_add.TABLE, node, found, problem, context, "the residual is read with the product")
    plan = _Plan(found, residual, run.config)
    arguments = torch.fx.map_arg(plan.arguments(_fake_rows(residual, found)), value_of)
    return Match(node, (Call(scaled_mm_add.OP, arguments),), run.detail, run.why, plan)


def _check(node: Node, part: Node, residual: Node, found: Product) -> None:
    """Miss where the sum is not element by element of two tensors alike, or the product is used besides."""
    alpha = arguments(node)["alpha"]
    if alpha != 1:
        raise Miss("alpha", node, "1", str(alpha))
    value, other = value_of(part), value_of(residual)
    if not isinstance(other, torch.Tensor) or other.dtype != value.dtype or not same_sizes(other.shape, value.shape):
        raise Miss("the residual is not like the product", node, describe(part), describe(residual))
    if not known_equal(value.shape[-1], found.n):
        wanted = f"views that keep the columns, {found.n} of them"
        raise Miss(NOT_WHOLE_COLUMNS, part, wanted, f"a view as {list(value.shape)}")
    path = [found.node, *scaled_product.way(part)[1]]
    no_other_users(path, path if list(node.args).count(part) > 1 else [*path, node], "the product", "this sum alone")
    strides = other.stride()
    dense = other.is_contiguous() or (other.dim() == 2 and strides[1] == 1 and _aligned(strides[0] * other.element_size()))
    if not dense:
        wanted = "rows one after the other, or at multiples of 16 bytes"
        raise Miss("the residual's layout", node, wanted, f"strides {list(strides)}")


def _aligned(pitch: Any) -> bool:
    return isinstance(pitch, int) and pitch % 16 == 0


def _fake_rows(residual: Node, found: Product) -> torch.Tensor:
    value = value_of(residual)
    with value.fake_mode:
        return value if value.dim() == 2 else value.reshape(found.m, found.n)


def replace(match: Match) -> None:
    plan: _Plan = match.data
    node, graph = match.node, match.node.graph
    shape = value_of(node).shape
    with graph.inserting_before(node):
        rows = plan.residual
        if len(shape) != 2:
            flat = torch_compat.symbolic(graph, [plan.product.m, plan.product.n])
            rows = call(graph, aten.reshape.default, rows, flat, like=node)
        made = call(graph, scaled_mm_add.OP.overload, *plan.arguments(rows), like=plan.product.node)
        if len(shape) != 2:
            made = call(graph, aten.reshape.default, made, torch_compat.symbolic(graph, list(shape)), like=node)
    node.replace_all_uses_with(made)
    erase_dead(node)


# ---- examples --------------------------------------------------------------------------------------------------------


def _and_residual(inputs: Any) -> Any:
    return lambda device: (*inputs(device), torch.randn(40, 48, device=device).bfloat16())


def _in_columns(device: str) -> tuple[Any, ...]:
    return *rowwise(device), torch.randn(48, 40, device=device).bfloat16().t()


def _added(a: Any, w: Any, s: Any, t: Any, x: Any) -> Any:
    return x + product(a, w, s, t)


def _any_rows(a: Any, w: Any, s: Any, t: Any, x: Any) -> Any:
    fixed(w, 48)
    if x.shape[1] != 48:
        raise ValueError(f"wanted 48 columns, found {x.shape[1]}")
    return _added(a, w, s, t, x)


def _through_views(a: Any, w: Any, s: Any, t: Any, x: Any) -> Any:
    return product(a, w, s, t).view(2, 20, 48) + x.view(2, 20, 48)


def _with_bias(a: Any, w: Any, s: Any, t: Any, b: Any, x: Any) -> Any:
    return x + product(a, w, s, t, bias=b)


def _into_a_norm(a: Any, w: Any, s: Any, t: Any, x: Any) -> Any:
    x = (x + product(a, w, s, t)).float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), x


def _always(name: str, fn: Any, inputs: Any, **options: Any) -> Example:
    return Example(name, fn, _and_residual(inputs), mode="always", **options)


RULE = Rule(
    name="scaled_mm_add",
    doc="an FP8 matrix product that is only added to a residual → adds it itself",
    anchors=anchors,
    guard=guard,
    replace=replace,
    exact=False,
    cost=scaled_plan.COST,
    tolerance=ACCUMULATED,
    matches=(
        _always("tensorwise", _added, tensorwise),
        _always("rowwise", _added, rowwise),
        _always("fast_accumulation", lambda *i: i[4] + product(*i[:4], use_fast_accum=True), rowwise),
        _always("through_views", _through_views, rowwise),
        _always("bias", _with_bias, lambda d: with_bias(tensorwise(d))),
        _always("bias_added_after", lambda *i: i[5] + bias_added(*i[:5]).view(40, 48), lambda d: with_bias(rowwise(d))),
        _always("into_a_norm", _into_a_norm, rowwise),
        _always("dynamic_shape", _any_rows, rowwise, dynamic=True),
    ),
    near_misses=(
        Example("not_measured", _added, _and_residual(rowwise), reason="not measured"),
        _always(
            "second_user",
            lambda *i: (i[4] + (p := product(*i[:4])), p.float().sigmoid()),
            rowwise,
            reason=second_user("the product"),
        ),
        _always(
            "other_dtype", lambda *i: i[4].float() + product(*i[:4]), rowwise, reason="the residual is not like the product"
        ),
        _always("one_row", lambda *i: i[4][:1] + product(*i[:4]), rowwise, reason="the residual is not like the product"),
        _always("alpha", lambda *i: torch.add(i[4], product(*i[:4]), alpha=2), rowwise, reason="alpha"),
        _always(
            "columns_split",
            lambda *i: i[4].view(80, 24) + product(*i[:4]).view(80, 24),
            rowwise,
            reason=NOT_WHOLE_COLUMNS,
        ),
        Example("columns", _added, _in_columns, mode="always", reason="the residual's layout"),
    ),
)
