"""scaled_mm: an FP8 matrix product writes into a planned buffer, with a kernel chosen for its size.

    aten._scaled_mm(a, b, scale_a, scale_b, …)   →   inductor_ext.scaled_mm([a], [b], [scale_a], [scale_b], [bias], …)

``aten._scaled_mm_v2`` (``torch.nn.functional.scaled_mm``) alike. PyTorch's operator stays where it measured faster. Under
``max_autotune``, and where M is a number, Inductor's own autotuner measures our kernels beside its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from inductor_ext import autotune
from inductor_ext.graph import erase_dead
from inductor_ext.miss import Miss
from inductor_ext.patterns.support import scaled_plan, scaled_product
from inductor_ext.rule import ACCUMULATED, Context, Example, Match, Rule

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def guard(node: Node, context: Context) -> Match | None:
    product = scaled_product.parse(node)
    if not context.forced and isinstance(product.m, int) and autotune.active():
        wanted = "no max_autotune, under which Inductor measures our kernels beside PyTorch's and Triton's"
        raise Miss("left to Inductor's autotuner", node, wanted, "max_autotune")
    plan = scaled_plan.plan((product,), True, context, "PyTorch's own operator is faster here")
    return Match(node, (plan.call,), plan.detail, plan.why, plan)


def replace(match: Match) -> None:
    graph = match.node.graph
    scaled_product.absorb(*match.data.products)
    with graph.inserting_before(match.node):
        made = match.data.insert(graph)
    match.node.replace_all_uses_with(made)
    erase_dead(match.node)


# ---- examples --------------------------------------------------------------------------------------------------------


def fp8(device: str, *shape: int, dtype: torch.dtype = E4) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def tensorwise(device: str, m: int = 40, k: int = 64, n: int = 48, dtypes: Any = (E4, E4)) -> tuple[Any, ...]:
    """a [M, K], a weight [N, K], and two scales of one element."""
    a, weight = fp8(device, m, k, dtype=dtypes[0]), fp8(device, n, k, dtype=dtypes[1])
    return a, weight, torch.tensor(0.5, device=device), torch.tensor(0.25, device=device)


def rowwise(device: str, m: int = 40, k: int = 64, n: int = 48) -> tuple[Any, ...]:
    """The same with scales [M, 1] and [N, 1]."""
    a, weight, _, _ = tensorwise(device, m, k, n)
    return a, weight, torch.rand(m, 1, device=device) + 0.5, torch.rand(n, 1, device=device) + 0.5


def with_bias(inputs: tuple[Any, ...], dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    return *inputs, torch.randn(inputs[1].shape[0], device=inputs[1].device).to(dtype)


def product(a: Any, w: Any, s: Any, t: Any, **options: Any) -> torch.Tensor:
    return torch._scaled_mm(a, w.t(), s, t.t(), **{"out_dtype": torch.bfloat16, **options})


def fixed(weight: torch.Tensor, n: int) -> None:
    """Make N and K numbers in a graph whose every size is symbolic; a model's own weights have numbers for sizes anyway."""
    if weight.shape[0] != n or weight.shape[1] != 64:
        raise ValueError(f"wanted {n} rows of 64, found {tuple(weight.shape)}")


def _any_rows(a: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
    fixed(w, 48)
    return product(a, w, s, t)


def _v2(recipe: str) -> Any:
    def call(a: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
        kind = getattr(torch.nn.functional.ScalingType, recipe)
        return torch.nn.functional.scaled_mm(a, w.t(), s, kind, t.t(), kind)

    return call


def _quantised(x: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
    return product((x.float() / s).clamp(-448.0, 448.0).to(E4), w, s, t)


def bias_added(a: Any, w: Any, s: Any, t: Any, b: Any) -> torch.Tensor:
    """A linear layer that adds its bias itself, through the views that flatten its input."""
    return product(a, w, s, t).view(2, -1, w.shape[0]) + b


def _with(name: str, fn: Any, inputs: Any = tensorwise, **options: Any) -> Example:
    return Example(name, fn, inputs, mode="always", **options)


MATCHES = (
    _with("tensorwise", product),
    _with("rowwise", product, rowwise),
    _with("fast_accumulation", lambda *inputs: product(*inputs, use_fast_accum=True), rowwise),
    _with("bias", lambda a, w, s, t, b: product(a, w, s, t, bias=b), lambda d: with_bias(tensorwise(d))),
    _with("bias_added_after", bias_added, lambda d: with_bias(rowwise(d))),
    _with("fp32_output", lambda *inputs: product(*inputs, out_dtype=torch.float32)),
    _with("e5m2_times_e4m3", product, lambda d: tensorwise(d, dtypes=(E5, E4))),
    _with("one_row", product, lambda d: rowwise(d, m=1)),
    _with("dynamic_shape", _any_rows, rowwise, dynamic=True),
    _with("v2_tensorwise", _v2("TensorWise")),
    _with("v2_rowwise", _v2("RowWise"), rowwise),
    _with("padded_rows", lambda a, w, s, t: product(a[:, :48], w[:, :48], s, t)),
    _with("weight_read_early", _quantised, lambda d: (torch.randn(40, 64, device=d).bfloat16(), *tensorwise(d)[1:])),
)


NEAR_MISSES = (
    Example("fp8_output", lambda *inputs: product(*inputs, out_dtype=E4), tensorwise, reason="output dtype"),
    Example("no_output_dtype", lambda *inputs: product(*inputs, out_dtype=None), tensorwise, reason="output dtype"),
    Example(
        "scale_result",
        lambda a, w, s, t: product(a, w, s, t, scale_result=s),
        tensorwise,
        reason="scale_result is given",
    ),
)

RULE = Rule(
    name="scaled_mm",
    doc="an FP8 matrix product → our kernel for its size, into a planned buffer",
    anchors=scaled_product.products,
    guard=guard,
    replace=replace,
    exact=False,
    cost=scaled_plan.COST,
    tolerance=ACCUMULATED,
    matches=MATCHES,
    near_misses=NEAR_MISSES,
)
