"""causal_attention: attention whose mask is a band of positions drops the mask, the repeated heads of K and V, and copies.

    bias = where(key <= query, 0, -inf)  [B, 1, S, S];  k = repeat_kv(k_);  v = repeat_kv(v_)
    sdpa(q, k, v, bias)   →   attention of q, k_, v_ by the fastest library that knows causal masks, windows and GQA

Model libraries compute the mask and repeat K and V whatever kernel runs; the kernel then reads them instead of skipping half of
the work. What the mask allows is proven from its nodes (`attention_mask.read`), for symbolic sizes too. In a band the diagonal
is allowed, so no row is empty. The result lies in memory as [B, S, H, D], which is what output projections read.

A mask of one value a row, which transformers makes for encoders, PyTorch gives to none of its kernels: it computes attention
step by step in fp32, and the rule reads that too (`math_attention`). With any other mask such steps may be what was asked for.

Q, K and V that are copied into the order [B, H, S, D] (Whisper) are read where the projections left them. A power of two that q
is multiplied by goes into the scale, which rounds alike.

cuDNN and torch's own flash attention are called as PyTorch's operators; any other library through `varlen_attention`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import aten, calling, is_call
from inductor_ext.graph import describe, is_opaque, known_equal, value_of
from inductor_ext.kernels.varlen_attention import implementations
from inductor_ext.miss import Miss
from inductor_ext.patterns.support import attention, attention_mask, attention_plan, math_attention
from inductor_ext.patterns.support.attention import Attention
from inductor_ext.patterns.support.attention_examples import (
    D,
    H,
    S,
    additive,
    equal_heads,
    heads,
    projected,
    qkv,
    repeated,
    sdpa,
    sdpa_scaled,
    split,
)
from inductor_ext.patterns.support.attention_mask import Band
from inductor_ext.patterns.support.attention_plan import Source
from inductor_ext.rule import ACCUMULATED, Context, Example, Match, Rule


def guard(node: Node, context: Context) -> Match | None:
    found = math_attention.read(node) if is_call(node, aten.bmm.default) else attention.parse(node)
    if found is None:
        return None
    attention_plan.check(found, (Source(found.k, dtype=found.rounded), Source(found.v, dtype=found.rounded)))
    found, copied = _where_they_lie(found)
    band = Band(right=0) if found.causal else Band()
    if found.bias is not None:
        try:
            band = band.and_(attention_mask.read(found.bias))
        except Miss as miss:
            raise miss.at(node) from None
    if found.kernel == attention.MATH and not context.forced and not math_attention.had_no_choice(found.bias):
        wanted = f'a mask whose last stride is not 1, or rules={{"{context.rule}": "always"}}'
        raise Miss("attention step by step may be what was asked for", node, wanted, describe(found.bias))
    k, v = attention.before_repeat(found.k), attention.before_repeat(found.v)
    if (
        not known_equal(value_of(k).shape[1], value_of(v).shape[1])
        or value_of(k).stride(-1) != 1
        or value_of(v).stride(-1) != 1
    ):
        k, v = found.k, found.v  # as they are repeated
    known = ("no mask", found.bias is not None), ("K and V as they are", k is not found.k), ("q, k and v as they are", copied)
    gains = [gain for gain, there in known if there]
    if found.kernel == attention.MATH:
        gains.insert(0, "one kernel")
    if not gains and not context.forced:
        raise Miss("nothing to gain", node, "a mask, repeated heads of K and V, or copies of products", describe(node))
    sources = Source(k, dtype=found.rounded), Source(v, dtype=found.rounded)
    return attention_plan.match(found, *sources, band, ", ".join(gains) or "forced")


def _where_they_lie(found: Attention) -> tuple[Attention, bool]:
    """``found`` of what Q, K and V are copies of, and whether such a copy is a kernel, of what an opaque one wrote."""
    plain = attention.before_scaling(found)
    if plain is found:
        plain = dataclasses.replace(found, q=attention.before_copy(found.q))
    plain = dataclasses.replace(plain, k=attention.before_copy(found.k), v=attention.before_copy(found.v))
    pairs = (found.q, plain.q), (found.k, plain.k), (found.v, plain.v)
    return plain, any(new is not old and is_opaque(new) for old, new in pairs)


# ---- examples --------------------------------------------------------------------------------------------------------


def _whisper(x: Any, wq: Any, wk: Any, wv: Any) -> torch.Tensor:
    """transformers' WhisperAttention: q scaled by its projection's caller, all three copied into the order of heads."""
    q = ((x @ wq) * 0.25).view(*x.shape[:2], H, D).transpose(1, 2).contiguous()
    k, v = ((x @ w).view(*x.shape[:2], H, D).transpose(1, 2).contiguous() for w in (wk, wv))
    return sdpa_scaled(q, k, v, 1.0).transpose(1, 2).reshape(x.shape) @ wq


def _scaled_alone(x: Any, wq: Any, wk: Any, wv: Any) -> torch.Tensor:
    q, k, v = ((x @ w).view(*x.shape[:2], H, D).transpose(1, 2) for w in (wq, wk, wv))
    return sdpa_scaled(q * 0.5, k, v, 0.7)


def _copied_alone(x: Any, wq: Any, wk: Any, wv: Any) -> torch.Tensor:
    q, k, v = ((x @ w).view(*x.shape[:2], H, D).transpose(1, 2) for w in (wq, wk, wv))
    return sdpa_scaled(q * 0.3, k.contiguous(), v, 0.7)


def _scaled_by_thirds(x: Any, wq: Any, wk: Any, wv: Any) -> torch.Tensor:
    q, k, v = ((x @ w).view(*x.shape[:2], H, D).transpose(1, 2) for w in (wq, wk, wv))
    return sdpa_scaled(((x @ wq) * 0.3).view(q.shape[0], S, H, D).transpose(1, 2), k, v, 1.0)


def _copied_from_sums(x: Any, wq: Any, wk: Any, wv: Any) -> torch.Tensor:
    """What Inductor computes itself it puts in the order that is asked for."""
    q, k, v = (((x @ w) + x).view(*x.shape[:2], H, D).transpose(1, 2).contiguous() for w in (wq, wk, wv))
    return sdpa_scaled(q, k, v, 1.0)


def _projections(device: str) -> tuple[torch.Tensor, ...]:
    x, *weights = torch.randn(2, S, H * D, device=device), *(torch.randn(H * D, H * D, device=device) / 8 for _ in range(3))
    return tuple(each if device == "cpu" else each.bfloat16() for each in (x, *weights))


def _positions(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.arange(q.shape[2], device=q.device)
    return at[None, None, :, None], at[None, None, None, :]


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    q, k, v = split(q, k, v)
    query, key = _positions(q)
    return sdpa(q, repeated(k), repeated(v), additive(key <= query, q))[0].transpose(1, 2).flatten(2)


def _one_sequence_each(batch: int, position_ids: torch.Tensor) -> torch.Tensor:
    """transformers' find_packed_sequence_indices, and its gather: whether query and key are of one sequence."""
    position_ids = position_ids.expand(batch, -1)
    apart = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    sequence = (apart != 1).cumsum(-1)
    rows = torch.arange(batch, device=position_ids.device)[:, None, None, None]
    at = torch.arange(position_ids.shape[1], device=position_ids.device)
    return sequence[rows, at[None, None, :, None]] == sequence[rows, at[None, None, None, :]]


def _transformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position_ids: Any = None) -> Any:
    q, k, v = split(q, k, v)
    if position_ids is None:
        position_ids = torch.arange(q.shape[2], device=q.device)[None]
    query, key = _positions(q)
    allowed = torch.ones((), dtype=torch.bool, device=q.device) & (key <= query)
    allowed = allowed & _one_sequence_each(q.shape[0], position_ids)
    return sdpa(q, repeated(k), repeated(v), additive(allowed, q))[0].transpose(1, 2).flatten(2)


def _triangle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    bias = torch.full((q.shape[2], q.shape[2]), float("-inf"), device=q.device, dtype=q.dtype).triu(1)
    return sdpa(q, k, v, bias[None, None].expand(2, 1, -1, -1))[0] * 2


def _of_band(allowed: Any) -> Any:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        query, key = _positions(q)
        return sdpa(q, k, v, additive(allowed(query, key), q))[0] * 2

    return run


def _with_input(device: str, **shape: Any) -> tuple[torch.Tensor, ...]:
    return *equal_heads(device), torch.ones(2, S, dtype=torch.bool, device=device)


def _padding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> Any:
    query, key = _positions(q)
    return sdpa(q, k, v, additive((key <= query) & mask[:, None, None, :], q))[0] * 2


def _learnt(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    query, key = _positions(q)
    distances = torch.where(key <= query, (key - query).to(q.dtype) * 0.1, -65536.0)
    return sdpa(q, k, v, distances.expand(2, 1, -1, -1))[0] * 2


def _more_keys(device: str) -> tuple[torch.Tensor, ...]:
    return heads(device, H), heads(device, H, tokens=2 * S), heads(device, H, tokens=2 * S)


def _packed(device: str) -> tuple[torch.Tensor, ...]:
    return *projected(device), torch.arange(S, device=device).remainder(7)[None]


def _lower(q: torch.Tensor) -> torch.Tensor:
    query, key = _positions(q)
    return (key <= query).expand(q.shape[0], 1, -1, -1)


def _halves(device: str) -> tuple[torch.Tensor, ...]:
    return tuple(each.bfloat16() for each in projected(device))


def _rows_of_one_value(q: torch.Tensor) -> torch.Tensor:
    """transformers' mask of an encoder without padding, which no kernel of PyTorch's takes."""
    query, _ = _positions(q)
    allowed = torch.ones((), dtype=torch.bool, device=q.device) & (query >= 0)
    return allowed.expand(q.shape[0], 1, q.shape[2], q.shape[2])


def _in_steps(mask: Any, *projected: torch.Tensor, both: bool = False) -> Any:
    """As the dispatcher sends it where no kernel takes the mask; ``both``: with its probabilities."""
    q, k, v = split(*projected)
    shown, hidden = (torch.full((), number, dtype=q.dtype, device=q.device) for number in (0.0, float("-inf")))
    bias = torch.where(mask(q), shown, hidden)
    found = aten._scaled_dot_product_attention_math(q, repeated(k), repeated(v), bias)
    return found[0].transpose(1, 2).flatten(2) if not both else [each * 2 for each in found]


RULE = Rule(
    name="causal_attention",
    doc="attention with a mask of positions, and K and V repeated for GQA → without either, by the fastest library there is",
    anchors=calling(*attention.KERNELS, aten.bmm.default),
    guard=guard,
    replace=attention_plan.replace,
    exact=False,
    cost="another kernel: softmax and its sums are taken in another order",
    # Any element may move by one place of bf16. Where a row is quantised to FP8 next, as before o_proj, its scale moves
    # with it and some elements land on the next FP8 step: 0.025 was seen of one layer's outputs, stock being 0.046 from eager.
    tolerance=ACCUMULATED,
    environment=implementations.versions,
    matches=(
        Example("causal", _causal, projected),
        Example("causal_dynamic_shape", _causal, projected, dynamic=True),
        Example("transformers", _transformers, projected),
        Example("transformers_dynamic_shape", _transformers, projected, dynamic=True),
        Example("triangle_of_infinities", _triangle, equal_heads),
        Example("full", _of_band(lambda query, key: (query >= 0) & (key >= 0)), equal_heads),
        Example("no_mask_but_repeated_heads", lambda q, k, v: sdpa(q, repeated(k), repeated(v), causal=True)[0] * 2, qkv),
        Example(
            "one_head_of_keys",
            lambda q, k, v: sdpa(q, k.expand_as(q), v.expand_as(q), causal=True)[0] * 2,
            lambda d: (heads(d, H), heads(d, 1), heads(d, 1)),
        ),
        Example("steps", lambda *x: _in_steps(_rows_of_one_value, *x), _halves),
        Example("steps_dynamic_shape", lambda *x: _in_steps(_rows_of_one_value, *x), _halves, dynamic=True),
        Example("steps_forced", lambda *x: _in_steps(_lower, *x), _halves, mode="always"),
        Example("forced", lambda q, k, v: sdpa(q, k, v, causal=True)[0] * 2, equal_heads, mode="always"),
        Example("whisper", _whisper, _projections),
        Example("whisper_dynamic_shape", _whisper, _projections, dynamic=True),
        Example("copied", _copied_alone, _projections),
        Example("scaled", _scaled_alone, _projections),
    ),
    near_misses=(
        Example("scaled_by_thirds", _scaled_by_thirds, _projections, reason="nothing to gain"),
        Example("copied_from_sums", _copied_from_sums, _projections, reason="nothing to gain"),
        Example("nothing_to_gain", lambda q, k, v: sdpa(q, k, v, causal=True)[0] * 2, equal_heads, reason="nothing to gain"),
        Example(
            "packed_sequences_of_an_input",
            _transformers,
            _packed,
            reason="the mask tells packed sequences of a graph input apart",
        ),
        Example(
            "steps_with_another_mask",
            lambda *x: _in_steps(_lower, *x),
            _halves,
            reason="attention step by step may be what was asked for",
        ),
        Example(
            "probabilities",
            lambda *x: _in_steps(_rows_of_one_value, *x, both=True),
            _halves,
            reason="what attention computes on its way has a second user",
        ),
        Example("padding", _padding, _with_input, reason="the mask depends on a graph input"),
        Example("distances", _learnt, equal_heads, reason="the bias is not a mask of positions"),
        Example("either_of_two", _of_band(lambda i, j: (j <= i) | (j < 4)), equal_heads, reason="the mask is no band"),
        Example("first_keys_only", _of_band(lambda i, j: (j <= i) & (j < 9)), equal_heads, reason="the mask is no band"),
        Example("not_itself", _of_band(lambda i, j: j < i), equal_heads, reason="the mask hides a token from itself"),
        Example(
            "symbolic_head_size",
            _of_band(lambda i, j: j <= i),
            equal_heads,
            dynamic=True,
            reason="head size is not known",
        ),
        Example(
            "log_sum_exp",
            lambda q, k, v: [each * 2 for each in sdpa(q, k, v, causal=True)],
            equal_heads,
            reason="log-sum-exp is used",
        ),
        Example(
            "more_keys_than_queries",
            lambda q, k, v: sdpa(q, k, v)[0] * 2,
            _more_keys,
            mode="always",
            reason="queries are not the keys' tokens",
        ),
    ),
)
