"""causal_attention: attention whose mask is a band of positions drops the mask, and the repeated heads of K and V.

    bias = where(key <= query, 0, -inf)  [B, 1, S, S];  k = repeat_kv(k_);  v = repeat_kv(v_)
    sdpa(q, k, v, bias)   →   attention of q, k_, v_ by the fastest library that knows causal masks, windows and GQA

Model libraries compute the mask and repeat K and V whatever kernel runs; the kernel then reads them instead of skipping half of
the work. What the mask allows is proven from its nodes (`attention_mask.read`), for symbolic sizes too. In a band the diagonal
is allowed, so no row is empty. The result lies in memory as [B, S, H, D], which is what output projections read.

cuDNN and torch's own flash attention are called as PyTorch's operators; any other library through `varlen_attention`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.graph import aten, call, describe, erase_dead, known_equal, value_of
from inductor_ext.kernels.varlen_attention import implementations
from inductor_ext.kernels.varlen_attention.op import OP, problem_of
from inductor_ext.patterns.support import attention, attention_mask
from inductor_ext.patterns.support.attention import Attention
from inductor_ext.patterns.support.attention_mask import Band
from inductor_ext.patterns.support.fp8_chain import Failure
from inductor_ext.rule import Call, Context, Example, Match, Refusal, Rule


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is emitted: ``implementation`` of `implementations`, "cpu" for the reference."""

    found: Attention
    k: Node
    v: Node
    band: Band
    implementation: str

    @property
    def left(self) -> int:
        return -1 if self.band.left is None else self.band.left

    @property
    def right(self) -> int:
        return -1 if self.band.right is None else self.band.right


def anchors(graph: Graph) -> Iterable[Node]:
    return attention.calls(graph)


def guard(node: Node, context: Context) -> Match | Refusal | None:
    found = attention.parse(node)
    refused = _unsupported(found, context)
    if refused is not None:
        return refused
    band = Band(right=0) if found.causal else Band()
    if found.bias is not None:
        allowed = attention_mask.read(found.bias)
        if isinstance(allowed, Failure):
            return context.refuse(node, allowed.reason, wanted=allowed.wanted, found=allowed.found)
        band = band.and_(allowed)
    k, v = attention.before_repeat(found.k), attention.before_repeat(found.v)
    if (
        not known_equal(value_of(k).shape[1], value_of(v).shape[1])
        or value_of(k).stride(-1) != 1
        or value_of(v).stride(-1) != 1
    ):
        k, v = found.k, found.v  # as they are repeated
    gains = [gain for gain, there in (("no mask", found.bias is not None), ("K and V as they are", k is not found.k)) if there]
    if not gains and not context.forced:
        return context.refuse(node, "nothing to gain", wanted="a mask, or repeated heads of K and V", found=describe(node))
    plan = _Plan(found, k, v, band, "")
    chosen = _choose(plan, context)
    if isinstance(chosen, Refusal):
        return chosen
    library, why = chosen
    plan = dataclasses.replace(plan, implementation=library.name if library else "cpu")
    heads = f"{value_of(found.q).shape[1]}/{value_of(k).shape[1]} heads of {value_of(found.q).shape[3]}"
    detail = f"{_named(band)}, {heads}, {library.title if library else 'reference'}" + (f" ({why})" if why else "")
    made = () if _as_aten(plan) else (Call(OP, _arguments(plan, value_of)),)
    return Match(node, made, detail, ", ".join(gains) or "forced", plan)


def _unsupported(found: Attention, context: Context) -> Refusal | None:
    node = found.node
    q, k, v = (value_of(each) for each in (found.q, found.k, found.v))
    if found.dropout:
        return context.refuse(node, "dropout", wanted="0", found=str(found.dropout))
    if found.others or found.output is None:
        other = ", ".join(map(describe, found.others)) or "no use of the output"
        return context.refuse(node, "log-sum-exp is used", wanted="inference: the output alone", found=other)
    if not known_equal(q.shape[2], k.shape[2]):
        return context.refuse(node, "queries are not the keys' tokens", wanted=f"{q.shape[2]} keys", found=str(k.shape[2]))
    if not isinstance(q.shape[3], int) or not isinstance(found.scale, (int, float)):
        return context.refuse(node, "head size is not known", wanted="a number", found=str(q.shape[3]))
    if not known_equal(q.shape[3], v.shape[3]):
        wanted = f"heads of {q.shape[3]} in V, as in Q and K"
        return context.refuse(node, "head size of V (MLA)", wanted=wanted, found=str(v.shape[3]))
    if any(each.stride(-1) != 1 for each in (q, k, v)):
        strides = ", ".join(str(list(each.stride())) for each in (q, k, v))
        return context.refuse(node, "input layout", wanted="unit stride in the last dimension", found=strides)
    return None


def _choose(plan: _Plan, context: Context) -> tuple[Any, str] | Refusal:
    """The implementation (None for the CPU's reference), and what faster ones lack."""
    q = value_of(plan.found.q)
    if q.device.type == "cpu":
        return None, ""
    problem = problem_of(q, plan.left, plan.right, 0.0, False, q.shape[2])
    chosen, why = implementations.choose(problem, known=(plan.found.kernel,))
    if chosen is None:
        wanted = "a library that can do it: flash-attn 4, 3 or 2, cuDNN or torch's flash attention"
        return context.refuse(plan.found.node, "no implementation", wanted=wanted, found=why)
    return chosen, why


def _named(band: Band) -> str:
    if band == Band():
        return "full"
    if band == Band(right=0):
        return "causal"
    return f"keys from -{band.left} to +{band.right}".replace("None", "∞")


def _as_aten(plan: _Plan) -> bool:
    """Whether PyTorch's own operator runs it, in a buffer of its own: without a copy where it cannot write into a given one."""
    return plan.implementation in ("cudnn", "torch") and plan.band in (Band(), Band(right=0))


def _arguments(plan: _Plan, of: Any) -> tuple[Any, ...]:
    """The op's arguments: q, k and v as ``of`` gives them, [B, S, H, D] views of what attention reads."""
    rows = []
    for node in (plan.found.q, plan.k, plan.v):
        value = of(node)
        rows.append(value.permute(0, 2, 1, 3) if isinstance(value, torch.Tensor) else value)
    implementation = "" if plan.implementation == "cpu" else plan.implementation
    return (*rows, None, 0, float(plan.found.scale), plan.left, plan.right, 0.0, False, implementation)


def replace(match: Match) -> None:
    plan: _Plan = match.data
    found, graph = plan.found, match.node.graph
    assert found.output is not None
    with graph.inserting_before(match.node):
        if _as_aten(plan):
            made = _emit_aten(graph, plan)
        else:
            order = [0, 2, 1, 3]
            rows = _arguments(plan, lambda node: call(graph, aten.permute.default, node, order, like=match.node))
            made = call(graph, OP.overload, *rows, like=match.node)
            made = call(graph, aten.permute.default, made, order, like=match.node)
    found.output.replace_all_uses_with(made)
    graph.erase_node(found.output)
    inputs = found.node.all_input_nodes
    graph.erase_node(found.node)  # not `erase_dead`: it counts as impure for its dropout, and there is none
    for node in inputs:
        erase_dead(node)


def _emit_aten(graph: Graph, plan: _Plan) -> Node:
    found, inputs, rest = plan.found, (plan.found.q, plan.k, plan.v), (0.0, plan.band.right == 0)
    scale = {"like": found.node, "scale": float(found.scale)}
    if plan.implementation == "cudnn":
        made = call(graph, aten._scaled_dot_product_cudnn_attention.default, *inputs, None, False, *rest, **scale)
    else:
        made = call(graph, aten._scaled_dot_product_flash_attention.default, *inputs, *rest, **scale)
    return call(graph, operator.getitem, made, 0, like=found.node)


# ---- examples --------------------------------------------------------------------------------------------------------

H, HKV, S, D = 4, 2, 24, 16


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any = None, causal: bool = False) -> Any:
    """As the dispatcher sends it: on a CPU to its flash attention, on a GPU to cuDNN's."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)[:2]
    return aten._scaled_dot_product_cudnn_attention(q, k, v, bias, False, 0.0, causal)[:2]


def _heads(device: str, heads: int, width: int = D, tokens: int = S) -> torch.Tensor:
    """[B, heads, S, D] as a projection leaves it. A CPU's fp32 shows any error; a GPU's kernels take 16 bits."""
    x = torch.randn(2, tokens, heads, width, device=device).transpose(1, 2)
    return x if device == "cpu" else x.bfloat16()


def _qkv(device: str) -> tuple[torch.Tensor, ...]:
    return _heads(device, H), _heads(device, HKV), _heads(device, HKV)


def _equal_heads(device: str) -> tuple[torch.Tensor, ...]:
    return tuple(_heads(device, H) for _ in range(3))


def _repeated(x: torch.Tensor) -> torch.Tensor:
    """transformers' repeat_kv."""
    b, heads, tokens, width = x.shape
    return x[:, :, None].expand(b, heads, H // heads, tokens, width).reshape(b, H, tokens, width)


def _additive(allowed: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.where(allowed, 0.0, -65536.0).to(q.dtype).expand(q.shape[0], 1, q.shape[2], q.shape[2])


def _positions(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.arange(q.shape[2], device=q.device)
    return at[None, None, :, None], at[None, None, None, :]


def _projected(device: str) -> tuple[torch.Tensor, ...]:
    """[B, S, heads · D], as q_proj, k_proj and v_proj give it."""
    return tuple(each.transpose(1, 2).flatten(2) for each in _qkv(device))


def _split(*projected: torch.Tensor) -> list[torch.Tensor]:
    return [x.view(*x.shape[:2], heads, D).transpose(1, 2) for x, heads in zip(projected, (H, HKV, HKV))]


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    q, k, v = _split(q, k, v)
    query, key = _positions(q)
    return _sdpa(q, _repeated(k), _repeated(v), _additive(key <= query, q))[0].transpose(1, 2).flatten(2)


def _one_sequence_each(batch: int, position_ids: torch.Tensor) -> torch.Tensor:
    """transformers' find_packed_sequence_indices, and its gather: whether query and key are of one sequence."""
    position_ids = position_ids.expand(batch, -1)
    apart = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    sequence = (apart != 1).cumsum(-1)
    rows = torch.arange(batch, device=position_ids.device)[:, None, None, None]
    at = torch.arange(position_ids.shape[1], device=position_ids.device)
    return sequence[rows, at[None, None, :, None]] == sequence[rows, at[None, None, None, :]]


def _transformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position_ids: Any = None) -> Any:
    q, k, v = _split(q, k, v)
    if position_ids is None:
        position_ids = torch.arange(q.shape[2], device=q.device)[None]
    query, key = _positions(q)
    allowed = torch.ones((), dtype=torch.bool, device=q.device) & (key <= query)
    allowed = allowed & _one_sequence_each(q.shape[0], position_ids)
    return _sdpa(q, _repeated(k), _repeated(v), _additive(allowed, q))[0].transpose(1, 2).flatten(2)


def _triangle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    bias = torch.full((q.shape[2], q.shape[2]), float("-inf"), device=q.device, dtype=q.dtype).triu(1)
    return _sdpa(q, k, v, bias[None, None].expand(2, 1, -1, -1))[0] * 2


def _of_band(allowed: Any) -> Any:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        query, key = _positions(q)
        return _sdpa(q, k, v, _additive(allowed(query, key), q))[0] * 2

    return run


def _with_input(device: str, **shape: Any) -> tuple[torch.Tensor, ...]:
    return *_equal_heads(device), torch.ones(2, S, dtype=torch.bool, device=device)


def _padding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> Any:
    query, key = _positions(q)
    return _sdpa(q, k, v, _additive((key <= query) & mask[:, None, None, :], q))[0] * 2


def _learnt(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    query, key = _positions(q)
    distances = torch.where(key <= query, (key - query).to(q.dtype) * 0.1, -65536.0)
    return _sdpa(q, k, v, distances.expand(2, 1, -1, -1))[0] * 2


def _more_keys(device: str) -> tuple[torch.Tensor, ...]:
    return _heads(device, H), _heads(device, H, tokens=2 * S), _heads(device, H, tokens=2 * S)


def _packed(device: str) -> tuple[torch.Tensor, ...]:
    return *_projected(device), torch.arange(S, device=device).remainder(7)[None]


RULE = Rule(
    name="causal_attention",
    doc="attention with a mask of positions, and K and V repeated for GQA → without either, by the fastest library there is",
    anchors=anchors,
    guard=guard,
    replace=replace,
    exact=False,
    cost="another kernel: softmax and its sums are taken in another order",
    # Any element may move by one place of bf16. Where a row is quantised to FP8 next, as before o_proj, its scale moves
    # with it and some elements land on the next FP8 step: 0.025 was seen of one layer's outputs, stock being 0.046 from eager.
    tolerance=5e-2,
    environment=implementations.versions,
    matches=(
        Example("causal", _causal, _projected),
        Example("causal_dynamic_shape", _causal, _projected, dynamic=True),
        Example("transformers", _transformers, _projected),
        Example("transformers_dynamic_shape", _transformers, _projected, dynamic=True),
        Example("triangle_of_infinities", _triangle, _equal_heads),
        Example("full", _of_band(lambda query, key: (query >= 0) & (key >= 0)), _equal_heads),
        Example("no_mask_but_repeated_heads", lambda q, k, v: _sdpa(q, _repeated(k), _repeated(v), causal=True)[0] * 2, _qkv),
        Example(
            "one_head_of_keys",
            lambda q, k, v: _sdpa(q, k.expand_as(q), v.expand_as(q), causal=True)[0] * 2,
            lambda d: (_heads(d, H), _heads(d, 1), _heads(d, 1)),
        ),
        Example("forced", lambda q, k, v: _sdpa(q, k, v, causal=True)[0] * 2, _equal_heads, mode="always"),
    ),
    near_misses=(
        Example("nothing_to_gain", lambda q, k, v: _sdpa(q, k, v, causal=True)[0] * 2, _equal_heads, reason="nothing to gain"),
        Example(
            "packed_sequences_of_an_input",
            _transformers,
            _packed,
            reason="the mask tells packed sequences of a graph input apart",
        ),
        Example("padding", _padding, _with_input, reason="the mask depends on a graph input"),
        Example("distances", _learnt, _equal_heads, reason="the bias is not a mask of positions"),
        Example("either_of_two", _of_band(lambda i, j: (j <= i) | (j < 4)), _equal_heads, reason="the mask is no band"),
        Example("first_keys_only", _of_band(lambda i, j: (j <= i) & (j < 9)), _equal_heads, reason="the mask is no band"),
        Example("not_itself", _of_band(lambda i, j: j < i), _equal_heads, reason="the mask hides a token from itself"),
        Example(
            "symbolic_head_size",
            _of_band(lambda i, j: j <= i),
            _equal_heads,
            dynamic=True,
            reason="head size is not known",
        ),
        Example(
            "log_sum_exp",
            lambda q, k, v: [each * 2 for each in _sdpa(q, k, v, causal=True)],
            _equal_heads,
            reason="log-sum-exp is used",
        ),
        Example(
            "more_keys_than_queries",
            lambda q, k, v: _sdpa(q, k, v)[0] * 2,
            _more_keys,
            mode="always",
            reason="queries are not the keys' tokens",
        ),
    ),
)
