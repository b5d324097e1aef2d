"""scaled_mm_act_mul: the FP8 products of gate and up become one launch that stores their gated activation alone.

    act(aten._scaled_mm(a, gate, …)) * aten._scaled_mm(a, up, …)   →   inductor_ext.scaled_mm_act_mul(a, gate, up, …, act, …)
    the same of the halves of one product's columns                     gate and up being halves of its weight

act is SiLU or GELU, each step rounded as the operators round it. What follows, a quantisation, reads M · N numbers where it
read 2 · M · N, and as many fewer are written: 88 MB a layer of Qwen3-0.6B's 7168 tokens. Whether the products hide the
activation, the op's table says (``kernels/scaled_mm_act_mul/table_<target>.json``, measured with SiLU).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from inductor_ext import torch_compat
from inductor_ext.calls import aten, calling, is_call
from inductor_ext.graph import call, describe, erase_dead, known_equal, value_of
from inductor_ext.kernels.scaled_mm.ready import static_b
from inductor_ext.kernels.scaled_mm_act_mul import op as scaled_mm_act_mul
from inductor_ext.kernels.scaled_mm_act_mul.op import OUT_DTYPES
from inductor_ext.miss import NOT_MEASURED, NOT_WHOLE_COLUMNS, Miss, no_other_users
from inductor_ext.patterns.act_mul_quantize import gated
from inductor_ext.patterns.scaled_mm import fixed, product, rowwise, tensorwise, with_bias
from inductor_ext.patterns.support import columns, scaled_plan, scaled_product
from inductor_ext.patterns.support.same import same_elements, same_tensor
from inductor_ext.patterns.support.scaled_product import Product
from inductor_ext.rule import ACCUMULATED, Call, Context, Example, Match, Rule


@dataclasses.dataclass(frozen=True)
class _Half:
    """gate or up: columns ``low`` to ``high`` of ``product``, and the nodes from the product to it."""

    product: Product
    low: int
    high: int
    path: tuple[Node, ...]

    @property
    def n(self) -> int:
        return self.high - self.low

    def part(self, node: Node | None, dim: int, take: Callable[..., Any]) -> Any:
        """What makes these columns of the weight, of its scale or its bias; a scale of one element is everyone's."""
        if node is None or value_of(node).numel() == 1 or self.n == self.product.n:
            return node
        return take(node, dim, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class _Plan:
    gate: _Half
    up: _Half
    act: str
    config: str

    def arguments(self, take: Callable[..., Any]) -> tuple[Any, ...]:
        """The op's arguments, nodes for tensors; ``take`` makes elements low to high of a node in a dimension."""
        p, halves = self.gate.product, (self.gate, self.up)
        weights = [half.part(half.product.b, 1, take) for half in halves]
        scales = [half.part(half.product.scale_b, _long(half.product.scale_b), take) for half in halves]
        biases = [half.part(half.product.bias, 0, take) for half in halves]
        ready = all(static_b(half.product.a, half.product.b) for half in halves)
        return p.a, *weights, p.scale_a, *scales, *biases, self.act, p.out_dtype, p.fast, ready, self.config


def _long(scale: Node) -> int:
    """The dimension of a vector in which its elements lie."""
    return max(range(value_of(scale).dim()), key=lambda dim: value_of(scale).shape[dim], default=0)


def guard(node: Node, context: Context) -> Match | None:
    found = gated(node)
    if found is None:
        return None
    act, *operands, inner = found
    halves = [_half(operand) for operand in operands]
    if all(half is None for half in halves):
        return None
    gate, up = _both(halves, operands)
    own = {node, *inner, *gate.path, *up.path}
    no_other_users(own - {node}, own, "gate or up", "the gated activation alone")
    p = gate.product
    problem = gate.n, p.k, p.rowwise or up.product.rowwise, p.fast
    if act != "silu" and not context.forced:  # the table was measured with SiLU
        raise Miss(NOT_MEASURED, node, f'SiLU, or rules={{"{context.rule}": "always"}}', act)
    run = scaled_plan.ended(scaled_mm_act_mul.TABLE, node, p, problem, context, "gate and up are not stored")
    plan = _Plan(gate, up, act, run.config)
    made = Call(scaled_mm_act_mul.OP, torch.fx.map_arg(plan.arguments(_fake_part), value_of))
    return Match(node, (made,), f"{act}, N = {gate.n}: {run.detail}", run.why, plan)


def _half(operand: Node) -> _Half | None:
    """Of which product ``operand`` is all or some columns; None where it is of none."""
    path = []
    node, low, high, whole = operand, 0, None, operand  # whole: what the columns are taken of
    while True:
        node, steps = scaled_product.way(node)
        path.extend(steps)
        if scaled_product.is_product(node):
            break
        inside = _columns(node) if high is None else None
        if inside is None:
            return None
        low, high, *steps = inside
        path.extend(steps)
        node = whole = steps[-1].args[0]  # type: ignore[assignment]
    found = scaled_product.parse(node)
    high = found.n if high is None else high
    if not known_equal(value_of(operand).shape[-1], high - low) or not known_equal(value_of(whole).shape[-1], found.n):
        wanted = f"views that keep the columns, {found.n} of them"
        raise Miss(NOT_WHOLE_COLUMNS, operand, wanted, f"a view as {list(value_of(operand).shape)}")
    return _Half(found, low, high, (node, *path))


def _columns(node: Node) -> tuple[Any, ...] | None:
    """Where a slice of the last dimension, or one part of it split, begins and ends, and the nodes that take it."""
    if is_call(node, operator.getitem) and is_call(node.args[0], aten.split.Tensor, aten.split_with_sizes.default):
        split, index = node.args
        parts = [part.shape[-1] for part in value_of(split)]  # type: ignore[arg-type]
        whole, _, dim = (*split.args, 0)[:3]  # type: ignore[union-attr]
        if dim not in (-1, value_of(whole).dim() - 1) or not all(isinstance(part, int) for part in parts):  # type: ignore[arg-type]
            return None
        low = sum(parts[:index])  # type: ignore[misc]
        return low, low + parts[index], node, split  # type: ignore[index]
    inside = columns.taken(node)
    return None if inside is None else (inside.start, inside.stop, node)


# ---- what the kernel takes ---------------------------------------------------------------------------------------------


def _both(halves: Sequence[_Half | None], operands: Sequence[Node]) -> tuple[_Half, _Half]:
    """gate and up, two parts of products that one launch can do."""
    for half, operand in zip(halves, operands):
        if half is None:
            found = describe(scaled_product.way(operand)[0])
            raise Miss("gate and up are not both FP8 products", operand, "aten._scaled_mm", found)
    gate, up = halves
    assert isinstance(gate, _Half) and isinstance(up, _Half)
    p, q = gate.product, up.product
    if not same_tensor(p.a, q.a) or not same_elements(p.scale_a, q.scale_a):
        wanted = "one a, and one scale of it"
        raise Miss("gate and up are products of different tensors", q.node, wanted, f"{describe(p.a)} and {describe(q.a)}")
    if p.fast != q.fast or p.out_dtype is not q.out_dtype or p.out_dtype not in OUT_DTYPES:
        found = f"{p.out_dtype} and {q.out_dtype}, use_fast_accum {p.fast} and {q.fast}"
        raise Miss("the options of gate and up", q.node, "bfloat16 or float16, and the same use_fast_accum", found)
    weights = [value_of(each.b) for each in (p, q)]
    if weights[0].dtype is not weights[1].dtype or weights[0].stride() != weights[1].stride() or gate.n != up.n:
        found = " and ".join(f"{describe(each.b)} strides {list(value_of(each.b).stride())}" for each in (p, q))
        raise Miss("the weights of gate and up are not alike", q.node, "one dtype, size and pitch", found)
    if p.node is q.node and (gate.low % 16 or up.low % 16 or gate.low == up.low):
        wanted = "two parts of the weight, from multiples of 16 rows on"
        raise Miss("the halves of the product", q.node, wanted, f"columns from {gate.low} and {up.low} on")
    return gate, up


# ---- the rewrite ---------------------------------------------------------------------------------------------------------


def _fake_part(node: Node, dim: int, low: int, high: int) -> torch.Tensor:
    value = value_of(node)
    with value.fake_mode:
        return value.narrow(dim, low, high - low)


def replace(match: Match) -> None:
    plan: _Plan = match.data
    node, graph, p = match.node, match.node.graph, plan.gate.product
    shape = value_of(node).shape

    def take(operand: Node, dim: int, low: int, high: int) -> Node:
        return call(graph, aten.slice.Tensor, operand, dim, low, high, like=p.node)

    with graph.inserting_before(node):
        made = call(graph, scaled_mm_act_mul.OP.overload, *plan.arguments(take), like=p.node)
        if len(shape) != 2:
            made = call(graph, aten.reshape.default, made, torch_compat.symbolic(graph, list(shape)), like=node)
    node.replace_all_uses_with(made)
    erase_dead(node)


# ---- examples --------------------------------------------------------------------------------------------------------


def _operands(device: str, make: Any = rowwise) -> tuple[Any, ...]:
    """a, its scale, and gate's and up's weights and scales."""
    a, _, s, _ = make(device)
    return a, s, *(value for _ in range(2) for value in make(device)[1::2])


def _tensorwise(device: str) -> tuple[Any, ...]:
    return _operands(device, tensorwise)


def _quantised(y: torch.Tensor) -> Any:
    s = (y.abs().amax(-1, keepdim=True) / 448.0).float()
    return (y.float() / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), s


def _silu(a: Any, s: Any, w: Any, t: Any, u: Any, r: Any, **options: Any) -> torch.Tensor:
    return torch.nn.functional.silu(product(a, w, s, t, **options)) * product(a, u, s, r, **options)


def _gelu(a: Any, s: Any, w: Any, t: Any, u: Any, r: Any) -> torch.Tensor:
    return product(a, u, s, r) * torch.nn.functional.gelu(product(a, w, s, t), approximate="tanh")


def _into_fp8(*inputs: Any) -> Any:
    return _quantised(_silu(*inputs))


def _any_rows(a: Any, s: Any, w: Any, t: Any, u: Any, r: Any) -> Any:
    fixed(w, 48)
    fixed(u, 48)
    return _into_fp8(a, s, w, t, u, r)


def _through_views(a: Any, s: Any, w: Any, t: Any, u: Any, r: Any) -> torch.Tensor:
    gate, up = (product(a, weight, s, scale).view(2, 20, 48) for weight, scale in ((w, t), (u, r)))
    return torch.nn.functional.silu(gate) * up


def _with_bias(a: Any, s: Any, w: Any, t: Any, u: Any, r: Any, b: Any, c: Any) -> torch.Tensor:
    return torch.nn.functional.silu(product(a, w, s, t, bias=b)) * product(a, u, s, r, bias=c)


def _bias_added(a: Any, s: Any, w: Any, t: Any, u: Any, r: Any, b: Any, c: Any) -> torch.Tensor:
    gate, up = product(a, w, s, t).view(2, 20, 48) + b, product(a, u, s, r).view(2, 20, 48) + c
    return torch.nn.functional.silu(gate) * up


def _halves_bias_added(a: Any, w: Any, s: Any, t: Any, b: Any) -> torch.Tensor:
    gate, up = (product(a, w, s, t) + b).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _halves(a: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
    gate, up = product(a, w, s, t).view(2, 20, 96).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _packed_halves(a: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
    """Of packed tokens: no view stands between the product and its halves."""
    gate, up = product(a, w, s, t).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _packed_slices(a: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
    both = product(a, w, s, t)
    return torch.nn.functional.silu(both[:, :48]) * both[:, 48:]


def _always(name: str, fn: Any, inputs: Any = _operands, **options: Any) -> Example:
    return Example(name, fn, inputs, mode="always", **options)


def _with(count: int) -> Any:
    return lambda device: (*_operands(device), *(torch.randn(48, device=device).bfloat16() for _ in range(count)))


MATCHES = (
    _always("rowwise", _into_fp8),
    _always("tensorwise", _silu, _tensorwise),
    _always("fast_accumulation", lambda *i: _silu(*i, use_fast_accum=True)),
    _always("gelu", _gelu),
    _always("through_views", _through_views),
    _always("bias", _with_bias, _with(2)),
    _always("bias_added_after", _bias_added, _with(2)),
    _always("halves_bias_added_after", _halves_bias_added, lambda d: with_bias(rowwise(d, n=96))),
    _always("halves_of_one_product", _halves, lambda d: rowwise(d, n=96)),
    _always("packed_halves", _packed_halves, lambda d: rowwise(d, n=96)),
    _always("packed_slices", _packed_slices, lambda d: rowwise(d, n=96)),
    _always("dynamic_shape", _any_rows, dynamic=True),
)

NEAR_MISSES = (
    Example("not_measured", _silu, _operands, reason="not measured"),
    _always(
        "returned_too",
        lambda a, s, w, t, u, r: (torch.nn.functional.silu(p := product(a, w, s, t)) * product(a, u, s, r), p),
        reason="gate or up has a second user",
    ),
    _always(
        "up_is_no_product",
        lambda a, s, w, t, u, r: torch.nn.functional.silu(product(a, w, s, t)) * r.reshape(1, -1).bfloat16().expand(40, 48),
        reason="gate and up are not both FP8 products",
    ),
    _always(
        "another_a",
        lambda a, s, w, t, u, r: (
            torch.nn.functional.silu(product(a, w, s, t)) * product(a.view(torch.int8).neg().view(a.dtype), u, s, r)
        ),
        reason="gate and up are products of different tensors",
    ),
    _always(
        "other_options",
        lambda a, s, w, t, u, r: torch.nn.functional.silu(product(a, w, s, t)) * product(a, u, s, r, use_fast_accum=True),
        reason="the options of gate and up",
    ),
    _always(
        "columns_split",
        lambda a, s, w, t, u, r: torch.nn.functional.silu(product(a, w, s, t).view(80, 24)) * product(a, u, s, r).view(80, 24),
        reason=NOT_WHOLE_COLUMNS,
    ),
)

RULE = Rule(
    name="scaled_mm_act_mul",
    doc="the FP8 products of gate and up, and their gated activation → one launch that stores the activation",
    anchors=calling(aten.mul.Tensor),
    guard=guard,
    replace=replace,
    exact=False,
    cost=scaled_plan.COST,
    tolerance=ACCUMULATED,
    matches=MATCHES,
    near_misses=NEAR_MISSES,
)
