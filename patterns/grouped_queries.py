"""grouped_queries: heads of one decoded token that share K and V become queries of one head, and K and V are not repeated.

    k = repeat_kv(k_);  v = repeat_kv(v_)                                     k_, v_ [B, Hkv, S, D], each head n times
    sdpa(q, k, v, bias)   →   sdpa(q as [B, Hkv, n, D], k_, v_, bias for n queries) as [B, H, 1, D]

q [B, H, 1, D] has one query a sequence, so that a head's number is all that tells queries apart: n heads that read the same K
and V are n queries of it, and may see the same keys. Model libraries write K and V of a cache out n times for them; with the
rewrite they are read as they are, 1/n of the memory traffic of a step's largest part. PyTorch's operator stays the one it was.

cuDNN has a kernel for one query of a head and another for several; where heads are few the first is the faster one. On an H200
a decoding step of 64 sequences of 2048 tokens (4 layers of Llama-3.1-8B's shape) takes 1.97 ms instead of 4.79
(benchmarks/results/h200/llama_decode_64.json): attention is 193 µs of a layer instead of 489, and K and V are not written out;
one of 16 sequences 0.81 ms instead of 1.55 (llama_decode_16.json).
Of one sequence attention is 43 µs instead of 10 (llama_decode_1_grouped.json). With fewer heads than `LEAST_HEADS`, and on a
GPU on which it was not measured (``MEASURED``), the rule waits for ``always``.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from inductor_ext import torch_compat
from inductor_ext.calls import aten
from inductor_ext.graph import call, describe, erase_dead, known_equal, value_of
from inductor_ext.miss import DROPOUT, LOG_SUM_EXP, Miss
from inductor_ext.patterns.support import attention, has_run
from inductor_ext.patterns.support.attention import Attention
from inductor_ext.patterns.support.attention_examples import HKV, H, S, heads, repeated, sdpa
from inductor_ext.rule import ACCUMULATED, Context, Example, Match, Rule

#: GPUs on which decoding steps were measured with it and without.
MEASURED = frozenset({"sm_90a"})

#: Of K and V, in all sequences together: what was measured faster. Between 8, which was slower, and these nothing was measured.
LEAST_HEADS = 128


@dataclasses.dataclass(frozen=True)
class _Plan:
    found: Attention
    k: Node
    v: Node

    @property
    def shape(self) -> list[Any]:
        """Of the queries: [B, Hkv, n, D]."""
        batch, count, _, width = value_of(self.found.q).shape
        shared = value_of(self.k).shape[1]
        return [batch, shared, count // shared, width]


def guard(node: Node, context: Context) -> Match | None:
    found = attention.parse(node)
    q = value_of(found.q)
    if not known_equal(q.shape[2], 1):
        return None
    k, v = attention.before_repeat(found.k), attention.before_repeat(found.v)
    if k is found.k and v is found.v:
        return None
    _check(found, k, v)
    has_run.check(node, context, q.device, MEASURED, has_run.NOT_MEASURED)
    plan = _Plan(found, k, v)
    batch, shared, count, width = plan.shape
    if q.device.type == "cuda" and not context.forced and not statically_known_true(batch * shared >= LEAST_HEADS):
        wanted = f'{LEAST_HEADS} heads of K and V in all sequences, or rules={{"{context.rule}": "always"}}'
        raise Miss("few heads are faster repeated", node, wanted, f"{batch} × {shared}")
    detail = f"{batch} × {count} queries of {shared} heads of {width}, {found.kernel}"
    return Match(node, (), detail, f"K and V are read once, not {count} times", plan)


def _check(found: Attention, k: Node, v: Node) -> None:
    node = found.node
    one, two = value_of(k), value_of(v)
    if found.others or found.output is None:
        other = ", ".join(map(describe, found.others)) or "no use of the output"
        raise Miss(LOG_SUM_EXP, node, "inference: the output alone", other)
    if found.causal:  # PyTorch's causal mask begins at the first key: one query sees that one alone
        raise Miss("causal, with one query", node, "a mask, or none", "is_causal=True")
    if found.dropout:
        raise Miss(DROPOUT, node, "0", str(found.dropout))
    if not known_equal(one.shape[1], two.shape[1]) or one.stride(-1) != 1 or two.stride(-1) != 1:
        found_here = f"{describe(k)} and {describe(v)}, strides {list(one.stride())} and {list(two.stride())}"
        raise Miss("K and V before they are repeated", node, "as many heads, unit stride", found_here)
    if found.bias is not None:
        bias = value_of(found.bias)
        alike = bias.dim() < 4 or known_equal(bias.shape[1], 1) or bias.stride(1) == 0
        if not alike:
            raise Miss("heads have masks of their own", node, "one for all", describe(found.bias))


def replace(match: Match) -> None:
    plan: _Plan = match.data
    found, node, graph = plan.found, match.node, match.node.graph
    assert found.output is not None
    with graph.inserting_before(node):
        shape = torch_compat.symbolic(graph, plan.shape)
        q = call(graph, aten.reshape.default, found.q, shape, like=found.q)
        instead = {found.q: q, found.k: plan.k, found.v: plan.v}
        if found.bias is not None:
            instead[found.bias] = _of_queries(graph, found.bias, plan)
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda each: instead.get(each, each))
        made = call(graph, node.target, *args, like=node, **kwargs)  # type: ignore[arg-type]
        out = call(graph, operator.getitem, made, 0, like=found.output)
        whole = torch_compat.symbolic(graph, list(value_of(found.output).shape))
        out = call(graph, aten.reshape.default, out, whole, like=found.output)
    found.output.replace_all_uses_with(out)
    graph.erase_node(found.output)
    inputs = node.all_input_nodes
    graph.erase_node(node)  # not `erase_dead`: it counts as impure for its dropout, and there is none
    for each in inputs:
        erase_dead(each)


def _of_queries(graph: Graph, bias: Node, plan: _Plan) -> Node:
    """The bias [B, Hkv, n, S] of [… 1 or H, 1, S] that is every head's."""
    value = value_of(bias)
    if value.dim() == 4 and not known_equal(value.shape[1], 1):
        bias = call(graph, aten.slice.Tensor, bias, 1, 0, 1, like=bias)
    batch, shared, count, _ = plan.shape
    wanted = torch_compat.symbolic(graph, [batch, shared, count, value.shape[-1]])
    return call(graph, aten.expand.default, bias, wanted, like=bias)


# ---- examples --------------------------------------------------------------------------------------------------------


def _inputs(device: str) -> tuple[torch.Tensor, ...]:
    """One query a sequence; K and V of S keys; which of them each sequence has."""
    there = torch.arange(S, device=device) < torch.tensor([[S], [S // 2]], device=device)
    return heads(device, H, tokens=1), heads(device, HKV), heads(device, HKV), there


def _bias(there: torch.Tensor, q: torch.Tensor, count: int = 1) -> torch.Tensor:
    return torch.where(there[:, None, None], 0.0, -65536.0).to(q.dtype).expand(-1, count, 1, -1)


def _decoded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, there: torch.Tensor, count: int = 1) -> Any:
    return sdpa(q, repeated(k), repeated(v), _bias(there, q, count))[0].transpose(1, 2).flatten(2)


def _dequantised(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, there: torch.Tensor) -> Any:
    """As an FP8 cache is read."""
    k, v = (x.to(torch.float8_e4m3fn).to(q.dtype) * 0.5 for x in (k, v))
    return _decoded(q, k, v, there)


def _own_masks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, there: torch.Tensor) -> Any:
    slopes = torch.arange(H, device=q.device)[:, None, None].to(q.dtype)
    return sdpa(q, repeated(k), repeated(v), _bias(there, q, H) * slopes)[0] * 2


def _several(device: str) -> tuple[torch.Tensor, ...]:
    return heads(device, H, tokens=1), heads(device, HKV), heads(device, HKV)


RULE = Rule(
    name="grouped_queries",
    doc="attention of one query a sequence: heads that share K and V are queries of one head, and neither is repeated",
    anchors=attention.calls,
    guard=guard,
    replace=replace,
    exact=False,
    cost="the same operator with other sizes: softmax and its sums may be taken in another order",
    tolerance=ACCUMULATED,
    matches=(
        Example("mask", _decoded, _inputs, mode="always"),
        Example("mask_of_each_head", lambda q, k, v, there: _decoded(q, k, v, there, H), _inputs, mode="always"),
        Example("no_mask", lambda q, k, v: sdpa(q, repeated(k), repeated(v))[0] * 2, _several, mode="always"),
        Example(
            "one_head",
            lambda q, k, v: sdpa(q, k.expand(-1, H, -1, -1), v.expand(-1, H, -1, -1))[0] * 2,
            lambda d: (heads(d, H, tokens=1), heads(d, 1), heads(d, 1)),
            mode="always",
        ),
        Example("dequantised", _dequantised, _inputs, mode="always"),
    ),
    near_misses=(
        Example("masks_of_their_own", _own_masks, _inputs, reason="heads have masks of their own"),
        Example(
            "causal",
            lambda q, k, v: sdpa(q, repeated(k), repeated(v), causal=True)[0] * 2,
            _several,
            reason="causal, with one query",
        ),
        Example(
            "log_sum_exp",
            lambda q, k, v: [each * 2 for each in sdpa(q, repeated(k), repeated(v))],
            _several,
            reason="log-sum-exp is used",
        ),
    ),
)
