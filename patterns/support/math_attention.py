"""Attention that PyTorch computes step by step in fp32 (`SDPBackend.MATH`), as `Attention`.

    safe_softmax(q.float() · c @ (k.float()ᵀ · c) + bias) @ v.float(), rounded to q's dtype;  c = √scale, [B, H, S, D]

The dispatcher sends attention there whose mask has a last stride other than 1, which no kernel of PyTorch's takes. That is how
transformers writes the mask of an encoder without padding, ``(query >= 0).expand(…)``: on a GPU two products in fp32 and a
softmax over [S, S] in memory then take the place of one kernel.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from inductor_ext import torch_compat
from inductor_ext.calls import CONVERT, aten, is_call, is_convert, prims
from inductor_ext.graph import constant_of, known_equal, same_sizes, value_of
from inductor_ext.miss import no_other_users
from inductor_ext.patterns.support.attention import MATH, Attention
from inductor_ext.patterns.support.attention_mask import uniform

_HALVES = (torch.bfloat16, torch.float16)
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def read(product: Node) -> Attention | None:
    """The attention whose second product is the ``bmm`` ``product``; None where that is something else.

    Miss where the scores or the probabilities are read elsewhere too.
    """
    joined = _only_user(product, *_RESHAPES)
    result = joined and _only_user(joined, CONVERT)
    softmax = _softmax(_heads(product.args[0]))
    if result is None or softmax is None:
        return None
    masked = softmax[-1]
    if not is_call(masked, aten.add.Tensor):
        return None
    scores, bias = masked.args
    if not is_call(scores, *_RESHAPES) or not isinstance(bias, Node):
        return None
    first: Node = scores.args[0]  # type: ignore[assignment]
    if not is_call(first, aten.bmm.default):
        return None
    q, of_q = _scaled(_heads(first.args[0]))
    k, of_k = _scaled(_heads(first.args[1]))
    dtype = result.args[1]
    q, k = (_before_cast(each, dtype, torch_compat.LEAVES_ROUNDINGS_OUT) for each in (q, _transposed(k)))
    v = _before_cast(_heads(product.args[1]), dtype)
    if q is None or k is None or v is None or of_q is None or of_q <= 0 or of_q != of_k:
        return None
    b, h, s, d = value_of(q).shape
    t, width = value_of(k).shape[2], value_of(v).shape[-1]
    shapes = {k: (b, h, t, d), v: (b, h, t, width), scores: (b, h, s, t), masked: (b, h, s, t), result: (b, h, s, width)}
    if not all(same_sizes(value_of(node).shape, shape) for node, shape in shapes.items()):
        return None
    own = {*softmax, *_between(product.args[0], softmax[0]), product, first, scores}
    no_other_users([first, *own - {first, product}], own, "what attention computes on its way", "its result alone")
    return Attention(product, MATH, q, k, v, bias, False, 0.0, of_q * of_k, result, (), dtype)


def had_no_choice(bias: Node) -> bool:
    """Whether no kernel of PyTorch's takes the mask: its last stride is not 1."""
    value = value_of(bias.args[0] if is_call(bias, aten.where.self) else bias)  # the dispatcher was given the condition
    return value.dim() > 0 and not known_equal(value.shape[-1], 1) and value.stride(-1) != 1


def _only_user(node: Node, *targets: Any) -> Node | None:
    found = next(iter(node.users), None)
    return found if len(node.users) == 1 and is_call(found, *targets) else None


def _between(node: Node, end: Node) -> list[Node]:
    """From ``node`` up to ``end``, each the first argument of the one before; without ``end``."""
    found = []
    while node is not end:
        found.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return found


def _heads(node: Any) -> Node | None:
    """[B, H, S, D] where ``node`` is that as [B · H, S, D], through copies."""
    if not is_call(node, *_RESHAPES):
        return None
    found = node.args[0]
    while is_call(found, aten.clone.default, aten.expand.default):
        if not same_sizes(value_of(found).shape, value_of(found.args[0]).shape):
            return None
        found = found.args[0]
    shape = value_of(found).shape
    return found if len(shape) == 4 and same_sizes(value_of(node).shape, (shape[0] * shape[1], *shape[2:])) else None


def _softmax(node: Any) -> tuple[Node, ...] | None:
    """The nodes of ``_safe_softmax(x, -1)`` whose result ``node`` is, that first and x last; rows of -inf alone give zeros."""
    if not is_call(node, aten.where.self) or uniform(node.args[1]) != 0:
        return None
    empty, _, shares = node.args
    if not is_call(shares, aten.div.Tensor) or not is_call(shares.args[0], aten.exp.default):
        return None
    powers, total = shares.args
    apart = powers.args[0]
    if not is_call(apart, aten.sub.Tensor):
        return None
    x, largest = apart.args
    reduced = _maximum_and_sum(x, powers, largest, total)
    if reduced is None or not is_call(empty, aten.logical_not.default):
        return None
    some = empty.args[0]
    if not is_call(some, aten.any.dim) or not _last(some) or not is_call(some.args[0], aten.logical_not.default):
        return None
    hidden = some.args[0].args[0]
    if not is_call(hidden, aten.eq.Scalar) or hidden.args != (x, -math.inf):
        return None
    return node, shares, powers, apart, *reduced, empty, some, some.args[0], hidden, x


def _maximum_and_sum(x: Node, powers: Node, largest: Node, total: Node) -> tuple[Node, ...] | None:
    """The nodes of both, which Inductor takes together for a GPU."""
    if is_call(largest, operator.getitem) and is_call(total, operator.getitem):
        both: Node = largest.args[0]  # type: ignore[assignment]
        if not is_call(both, prims.prepare_softmax_online.default) or largest.args[1] != 0 or total.args != (both, 1):
            return None
        return (largest, total, both) if both.args[0] is x and both.args[1] in (-1, value_of(x).dim() - 1) else None
    if not is_call(largest, aten.amax.default) or not is_call(total, aten.sum.dim_IntList):
        return None
    same = largest.args[0] is x and total.args[0] is powers and _last(largest) and _last(total)
    return (largest, total) if same else None


def _last(node: Node) -> bool:
    """Whether a reduction is over the last dimension alone, which it keeps."""
    _, dim, keep = (*node.args, None, None)[:3]
    dims = [dim] if isinstance(dim, int) else dim
    return keep is True and isinstance(dims, (list, tuple)) and list(dims) in ([-1], [value_of(node).dim() - 1])


def _scaled(node: Node | None) -> tuple[Node | None, float | None]:
    """The node and the number that it is multiplied by."""
    if not is_call(node, aten.mul.Scalar, aten.mul.Tensor):
        return None, None
    return node.args[0], constant_of(node.args[1])  # type: ignore[union-attr]


def _transposed(node: Node | None) -> Node | None:
    if not is_call(node, aten.permute.default):
        return None
    return node.args[0] if list(node.args[1]) in ([0, 1, 3, 2], [0, 1, -1, -2]) else None  # type: ignore[union-attr]


def _before_cast(node: Any, dtype: Any, or_not_rounded: bool = False) -> Node | None:
    """[B, H, S, D] of 16-bit ``dtype`` where ``node`` is that in fp32; or ``node``, whose rounding may be left out.

    V says that attention was asked for in 16 bits: PyTorch takes q, k and v of one dtype.
    """
    if dtype not in _HALVES or node is None or value_of(node).dtype is not torch.float32 or value_of(node).dim() != 4:
        return None
    if is_convert(node, torch.float32) and value_of(node.args[0]).dtype in _HALVES:
        return node.args[0] if value_of(node.args[0]).dtype is dtype else None
    return node if or_not_rounded else None
