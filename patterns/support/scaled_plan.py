"""One call of ``inductor_ext.scaled_mm`` for one or several products: whether it pays, with which kernel, and its arguments.

The measured tables (``kernels/scaled_mm/choice.py``) decide. Where M is a number they are asked once, and on a GPU the call
names the configuration, so that nothing is looked up when it runs. Where M changes between calls the op looks at run time, and
may take PyTorch's own operator then; the rewrite pays if one M in its range takes ours. Several products in one buffer cannot
go back to PyTorch's operator without a copy, so no M may lose more than `MAY_LOSE` there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.graph import call, value_of
from inductor_ext.kernels.scaled_mm import choice
from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm.op_table import OpTable
from inductor_ext.kernels.scaled_mm.ready import static_b
from inductor_ext.miss import NO_KERNEL, NOT_FASTER, NOT_MEASURED, Miss
from inductor_ext.patterns.support.scaled_product import Product
from inductor_ext.rule import Call, Context

COST = "the same inputs, sums in fp32 taken in another order, a bias added before rounding; use_fast_accum is kept as written"


#: Speed of one launch for several products, relative to the best of several, below which no M in its range may fall where M
#: changes between calls. On an H200 q, k and v of Qwen3-0.6B, row-wise, gain 2.6x at 16 rows and lose 2 % at 16 384; with a
#: number for M they are left apart there.
MAY_LOSE = 0.97


@dataclasses.dataclass(frozen=True)
class Plan:
    """A call that computes ``products`` side by side. ``shared``: all read the first one's a and scale_a."""

    products: tuple[Product, ...]
    shared: bool
    config: str
    detail: str
    why: str

    @property
    def call(self) -> Call:
        return Call(scaled_mm.OP, torch.fx.map_arg(self.arguments(), value_of))

    def arguments(self) -> tuple[Any, ...]:
        """The op's arguments, nodes for tensors."""
        first = self.products[0]
        left = (first,) if self.shared else self.products
        return (
            [each.a for each in left],
            [each.b for each in self.products],
            [each.scale_a for each in left],
            [each.scale_b for each in self.products],
            [each.bias for each in self.products],
            first.out_dtype,
            first.fast,
            all(static_b(each.a, each.b) for each in self.products),
            self.config,
        )

    def insert(self, graph: Graph) -> Node:
        """The call, at the graph's insertion point."""
        return call(graph, scaled_mm.OP.overload, *self.arguments(), like=self.products[0].node)


def plan(products: Sequence[Product], shared: bool, context: Context, slower: str) -> Plan:
    """The call for ``products``, or why PyTorch's operator stays: ``slower`` is the reason given where it measured faster."""
    first = products[0]
    device = value_of(first.a).device
    target = scaled_mm.target_of(device)
    choices = _choices(target, products)
    using = [found for found in choices if found.use]
    static = isinstance(first.m, int)
    if not context.forced:
        if not choices:
            wanted = f"table_{target}.json beside kernels/scaled_mm/choice.py, which its benchmark makes"
            raise Miss("no measured table for this GPU", first.node, wanted, f"none for {target}")
        if not using:
            best = max(choices, key=_gain)
            raise Miss(slower, first.node, "one that measured faster", best.why)
        worst = min(choices, key=_gain)
        if len(products) > 1 and _gain(worst) < MAY_LOSE:
            wanted = f"at least {MAY_LOSE} times the speed for every M in its range"
            raise Miss(slower, first.node, wanted, worst.why)
    kept = choices if context.forced else using
    names = list(dict.fromkeys(found.config.name for found in kept))
    if not choices and static:  # forced, on a GPU that nothing was measured on
        names = [name for name in (scaled_mm.untuned(target, first.m),) if name]
    on_gpu = device.type == "cuda"
    config = names[0] if static and names and on_gpu else ""  # a CPU runs the reference, whatever the table says
    detail = ", ".join(names) if on_gpu and names else "reference" if not on_gpu else "PyTorch's operator"
    why = "forced" if context.forced else max(using, key=_gain).why
    if not static and not context.forced:
        why += "; M is known at run time, which then chooses"
    return Plan(tuple(products), shared, config, detail, why)


def _gain(found: choice.Choice) -> float:
    return found.stock_us / found.ours_us


def _choices(target: str, products: Sequence[Product]) -> list[choice.Choice]:
    """The tables' choice for M or, where it is symbolic, one for each M in its range at which it may change."""
    m, fast = products[0].m, products[0].fast
    ns, k = tuple(each.n for each in products), max(each.k for each in products)
    rowwise = any(each.rowwise for each in products)
    found = [scaled_mm.decide(target, size, ns, k, rowwise, fast) for size in _sizes(target, m, ns, k, rowwise, fast)]
    return [each for each in found if each is not None]


def _sizes(target: str, m: Any, ns: tuple[int, ...], k: int, rowwise: bool, fast: bool) -> list[int]:
    """M, or the sizes in its range at which the choice may be another: those measured, and the next above each."""
    if isinstance(m, int):
        return [m]
    least, most = scaled_mm.bounds(m)
    table = choice.table(target)
    if table is None:
        return []
    kind = choice.kind(rowwise, fast)
    measured = {row.m for n in {*ns, sum(ns)} for row in table.rows(kind, n, k)}
    sizes = {least, *(size + step for size in measured for step in (0, 1))}
    return sorted(size for size in sizes if least <= size <= most)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a product with an end of its own runs: ``config`` where the call names it, ``detail`` and ``why`` for people."""

    config: str
    detail: str
    why: str


def ended(
    table: OpTable, node: Node, product: Product, problem: tuple[int, int, bool, bool], context: Context, why: str
) -> Ended:
    """What ``table`` says of ``problem`` (N, K, row-wise, fast) for the rows of ``product``; ``why`` is for forced rules."""
    device, static = value_of(product.a).device, isinstance(product.m, int)
    target = scaled_mm.target_of(device)
    gain = _measured(table, target, node, product.m, problem, context)
    name = table.choose(target, product.m if static else scaled_mm.bounds(product.m)[1], *problem)
    if device.type != "cuda":
        return Ended("", "reference", gain or why)
    if not name:
        raise Miss(NO_KERNEL, node, "sm_90a", target)
    return Ended(name if static else "", name, gain or why)


def _measured(
    table: OpTable, target: str, node: Node, rows: Any, problem: tuple[int, int, bool, bool], context: Context
) -> str:
    """What an op's own table says of ``problem`` (N, K, row-wise, fast), where it is a gain for every M that ``rows`` may be;
    "" where the rule is forced."""
    if context.forced:
        return ""
    forced = f'or rules={{"{context.rule}": "always"}}'
    each = [(m, table.decide(target, m, *problem)) for m in table.sizes(target, rows, *problem)]
    unknown = next((m for m, known in each if known is None), None)
    if unknown is not None:
        wanted = f"a measured number of rows, with fast accumulation, on a measured GPU, {forced}"
        raise Miss(NOT_MEASURED, node, wanted, f"{unknown} rows on {target}")
    least = min((known for _, known in each if known is not None), key=lambda known: known.gain)
    if not least.use:
        wanted = f"{choice.MEASURED_GAIN} times the speed of two launches, {forced}"
        raise Miss(NOT_FASTER, node, wanted, least.why)
    return least.why
