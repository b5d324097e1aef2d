"""mxfp8_grouped_mm: a grouped product whose weight was quantised (`inductor_ext.quantize_moe_`) reads it as MXFP8.

    _grouped_mm(x, bf16(data) * 2^(scale - 127), offs)               →   inductor_ext.mxfp8_grouped_mm(x, None, data, scale, …)
    _grouped_mm(mxfp8_round(x), bf16(data) * 2^(scale - 127), offs)  →   … of inductor_ext.mxfp8_quantize(x, …)
    _grouped_mm(bf16(q), bf16(data) * 2^(scale - 127), offs) * s     →   … of q [T, K] e4m3 and s [T, 1] float32
    … with every fourth scale, for 128 of K                          →   … with w_block 128

The dequantisation, which `MXFP8Weight` brings into the graph, goes: no bf16 copy of the weight is made. A bf16 weight is never
quantised here. On a GPU whose kernel has not run yet (``HAS_RUN``) the rule waits for ``always``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import CONVERT, arguments, aten, calling, is_call
from inductor_ext.graph import describe, erase_dead, known_equal, value_of
from inductor_ext.kernels.mxfp8_round.op import OP as ROUND
from inductor_ext.miss import Miss
from inductor_ext.moe import MXFP8Weight, mx
from inductor_ext.patterns.support import grouped_product, mx_weight
from inductor_ext.rule import ACCUMULATED, Context, Example, Match, Rule

BF16 = torch.bfloat16


def guard(node: Node, context: Context) -> Match | None:
    return grouped_product.match(trace(node), context)


def trace(node: Node) -> grouped_product.Grouped:
    given = arguments(node)
    grouped_product.check_call(node, given)
    try:
        weight = mx_weight.trace(given["mat2"])
    except Miss as miss:
        raise miss.at(node) from None
    if weight is None:
        wanted = "a weight in MXFP8: inductor_ext.quantize_moe_(model) makes it, and says what it costs"
        raise Miss("the weight is not quantised", node, wanted, describe(given["mat2"]))
    x, rounding = given["self"], ""
    if is_call(x, ROUND.overload):
        x, rounding = x.args
    out_dtype = value_of(node).dtype
    operands = weight.data, weight.scale, given["offs"]
    scaled = _scaled_rows(node, x)
    if scaled is not None:
        last, data, scale = scaled
        out_dtype = value_of(last).dtype
        return grouped_product.Grouped(last, data, scale, *operands, out_dtype, weight.swizzled, w_block=weight.block)
    return grouped_product.Grouped(node, x, None, *operands, out_dtype, weight.swizzled, rounding, w_block=weight.block)


def _scaled_rows(node: Node, x: Node) -> tuple[Node, Node, Node] | None:
    """Where x is FP8 whose scale, one a row, multiplies the product: the scaled product in ``node``'s dtype, data, scale."""
    if not is_call(x, CONVERT) or value_of(x.args[0]).dtype is not mx.DATA or len(node.users) != 1:
        return None
    product, last = node, next(iter(node.users))
    if is_call(last, CONVERT) and last.args[1] is torch.float32 and len(last.users) == 1:
        product, last = last, next(iter(last.users))
    if not is_call(last, aten.mul.Tensor) or len(last.users) != 1:
        return None
    scale = next((each for each in last.args if each is not product), None)
    rounded = next(iter(last.users))
    if not isinstance(scale, Node) or not is_call(rounded, CONVERT) or rounded.args[1] is not value_of(node).dtype:
        return None
    of_row = value_of(scale)
    if of_row.dtype is not torch.float32 or of_row.dim() != 2 or not known_equal(of_row.shape[1], 1):
        return None
    return (rounded, x.args[0], scale) if known_equal(of_row.shape[0], value_of(x).shape[0]) else None


def replace(match: Match) -> None:
    graph = match.node.graph
    with graph.inserting_before(match.node):
        made = grouped_product.insert(graph, match.data)
    match.node.replace_all_uses_with(made)
    erase_dead(match.node)


# ---- examples --------------------------------------------------------------------------------------------------------


def _offs(device: str, *ends: int) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=device)


def _quantised(device: str, *, k: int = 64, ends: tuple[int, ...] = (3, 3, 10, 12), **options: Any) -> tuple[Any, ...]:
    """x [12, K], a quantised weight [4, 48, K], offs with an empty expert."""
    w = (torch.randn(4, 48, k) * 0.1).bfloat16()
    weight = MXFP8Weight.quantize(w.mT.contiguous() if options.get("transposed") else w, **options)
    if device != "cpu":  # under a FakeTensorMode too
        weight = weight.to(device)
    return torch.randn(12, k, device=device).bfloat16(), weight, _offs(device, *ends)


def _offset(x: torch.Tensor) -> torch.Tensor:
    """``x``, one element behind the beginning of its memory."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _product(x: Any, w: Any, offs: Any) -> torch.Tensor:
    return torch._grouped_mm(x, w.transpose(-2, -1), offs)


def _experts(x: Any, w: Any, offs: Any, down: Any) -> torch.Tensor:
    gate, up = torch.nn.functional.grouped_mm(x, w.transpose(-2, -1), offs=offs).chunk(2, -1)
    return torch.nn.functional.grouped_mm(torch.nn.functional.silu(gate) * up, down.transpose(-2, -1), offs=offs)


def _two(device: str) -> tuple[Any, ...]:
    x, _, offs = _quantised(device, k=32)
    weight = MXFP8Weight.quantize((torch.randn(4, 32, 96) * 0.1).bfloat16())
    wide = MXFP8Weight.quantize((torch.randn(4, 192, 32) * 0.1).bfloat16())
    return x, *((wide, offs, weight) if device == "cpu" else (wide.to(device), offs, weight.to(device)))


def _bf16(device: str) -> tuple[Any, ...]:
    x, _, offs = _quantised(device)
    return x, torch.randn(4, 48, 64, device=device).bfloat16(), offs


def _static_weight(device: str) -> tuple[Any, ...]:
    """As a model's own weights are, even where every size is dynamic."""
    x, w, offs = _quantised(device)
    for each in (w, w._data, w._scale, offs):
        torch._dynamo.mark_static(each)
    return x, w, offs


def _always(name: str, fn: Any, inputs: Any = None, **options: Any) -> Example:
    return Example(name, fn, inputs or _quantised, mode="always", **options)


def _near(name: str, reason: str, fn: Any, inputs: Any = None) -> Example:
    return _always(name, fn, inputs, reason=reason)


MATCHES = (
    _always("weights_only", _product, _quantised),
    _always("functional", lambda x, w, o: torch.nn.functional.grouped_mm(x, w.mT, offs=o), _quantised),
    _always("activations_too", _product, lambda d: _quantised(d, activations="mxfp8")),
    _always("fp8_rows", _product, lambda d: _quantised(d, activations="fp8")),
    _always("fp8_rows_by_128", _product, lambda d: _quantised(d, k=128, activations="fp8")),
    _always("floor", _product, lambda d: _quantised(d, activations="mxfp8", rounding="floor")),
    _always("transposed_in_memory", lambda x, w, o: torch._grouped_mm(x, w, o), lambda d: _quantised(d, transposed=True)),
    _always("experts", _experts, _two, count=2),
    _always("dynamic_rows", _product, _static_weight, dynamic=True),
)

NEAR_MISSES = (
    _near("bf16_weight", "the weight is not quantised", _product, _bf16),
    _near("changed_weight", "the weight is not quantised", lambda x, w, o: _product(x, w + 1, o)),
    _near("batched", "what the groups divide", lambda x, w, o: torch._grouped_mm(x.view(4, 3, -1), w.transpose(-2, -1))),
    _near("summed_over_n", "the weight is quantised along N", lambda x, w, o: torch._grouped_mm(x[:, :48], w, o)),
    _near("columns", "x is not row-major", lambda x, w, o: _product(x[:8].t().contiguous().t(), w, o)),
    _near("between_16_bytes", "x is not row-major", _product, lambda d: (_offset(*_quantised(d)[:1]), *_quantised(d)[1:])),
)

RULE = Rule(
    name="mxfp8_grouped_mm",
    doc="a grouped product with a quantised weight → our kernel, which reads MXFP8, into a planned buffer",
    anchors=calling(aten._grouped_mm.default),
    guard=guard,
    replace=replace,
    exact=False,
    cost=grouped_product.COST,
    tolerance=ACCUMULATED,
    matches=MATCHES,
    near_misses=NEAR_MISSES,
)
