"""PyTorch's scaled-dot-product attention in a graph, whichever kernel it was sent to, and what its keys were repeated from."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import arguments, aten, calling, is_call
from inductor_ext.graph import known_equal, same_sizes, value_of

#: Node → what people call the kernel.
KERNELS = {
    aten._scaled_dot_product_cudnn_attention.default: "cudnn",
    aten._scaled_dot_product_flash_attention.default: "torch",
    aten._scaled_dot_product_efficient_attention.default: "efficient",
    aten._scaled_dot_product_fused_attention_overrideable.default: "overrideable",
    aten._scaled_dot_product_flash_attention_for_cpu.default: "cpu",
}

#: What people call attention step by step (`math_attention`), which is no node of its own.
MATH = "math"


@dataclasses.dataclass(frozen=True)
class Attention:
    """``softmax(scale · q @ kᵀ + bias) @ v`` over [B, H, S, D]; ``output`` is the node of its first result."""

    node: Node
    kernel: str
    q: Node
    k: Node
    v: Node
    bias: Node | None
    causal: bool
    dropout: float
    scale: Any  # None where head_dim is symbolic
    output: Node | None
    others: tuple[Node, ...]  # users of its other results
    rounded: torch.dtype | None = None  # 16 bits that q, k and v have to be rounded to first
    unscaled: tuple[Node, ...] = ()  # a product of q with a number that ``scale`` has taken over, and the views behind it


calls = calling(*KERNELS)

VIEWS = aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.permute.default


def parse(node: Node) -> Attention:
    """The arguments by name: every kernel has them in another order."""
    given = arguments(node)
    scale = given.get("scale")
    head_dim = value_of(given["query"]).shape[-1]
    results = {user.args[1]: user for user in node.users if is_call(user, operator.getitem)}
    return Attention(
        node,
        KERNELS[node.target],  # type: ignore[index]
        given["query"],
        given["key"],
        given["value"],
        given.get("attn_bias", given.get("attn_mask")),
        bool(given.get("is_causal", False)),
        float(given.get("dropout_p", 0.0)),
        1.0 / math.sqrt(head_dim) if scale is None and isinstance(head_dim, int) else scale,
        results.get(0),  # type: ignore[call-overload]
        tuple(user for user in node.users if user is not results.get(0)),  # type: ignore[call-overload]
    )


def before_copy(node: Node) -> Node:
    """What ``node`` copies, where that is rows too: heads [B, H, S, D] whose columns lie side by side need not lie in order."""
    source = node.args[0] if is_call(node, aten.clone.default) else None
    if not isinstance(source, Node) or value_of(node).dim() != 4 or not known_equal(value_of(source).stride(-1), 1):
        return node
    return source


def before_scaling(found: Attention) -> Attention:
    """Takes over what q is multiplied by where that is a power of two: with it or without, products round alike."""
    node, views = before_copy(found.q), list[Node]()
    while is_call(node, *VIEWS):
        views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    if not is_call(node, aten.mul.Tensor) or not isinstance(found.scale, float):
        return found
    x, factor = node.args
    if not isinstance(x, Node) or not isinstance(factor, (int, float)) or not _is_power_of_two(factor):
        return found
    same = value_of(x).dtype is value_of(node).dtype and same_sizes(value_of(x).stride(), value_of(node).stride())
    if not same or len(node.users) > 1:
        return found
    return dataclasses.replace(found, q=x, scale=found.scale * factor, unscaled=(node, *reversed(views)))


def _is_power_of_two(factor: float) -> bool:
    return 2.0**-16 <= factor <= 2.0**16 and math.frexp(factor)[0] == 0.5


def before_repeat(node: Node) -> Node:
    """[B, Hkv, S, D] where ``node`` [B, H, S, D] repeats each head H / Hkv times, as GQA does; else ``node``.

    ``x[:, :, None].expand(B, Hkv, n, S, D).reshape(B, H, S, D)``, with or without a copy between, or one head expanded.
    """
    value = value_of(node)
    inner = _through_copies(node)
    if is_call(inner, aten.expand.default) and value_of(inner).dim() == 4:
        source = inner.args[0]
        same = _sizes(source, value, but=1) and known_equal(value_of(source).shape[1], 1)
        return source if same else node
    if not is_call(inner, aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return node
    expanded = _through_copies(inner.args[0])
    if not is_call(expanded, aten.expand.default) or value_of(expanded).dim() != 5:
        return node
    source = expanded.args[0]
    five, before = value_of(expanded).shape, value_of(source).shape
    if not is_call(source, aten.unsqueeze.default) or not known_equal(before[2], 1):
        return node
    repeated = (five[0], five[1], five[3], five[4])
    x = source.args[0]
    same = all(map(known_equal, repeated, value_of(x).shape)) and _sizes(x, value, but=1)
    return x if same and known_equal(five[1] * five[2], value.shape[1]) else node


def _sizes(node: Any, value: torch.Tensor, but: int) -> bool:
    found = value_of(node).shape
    return len(found) == value.dim() and all(known_equal(a, b) for d, (a, b) in enumerate(zip(found, value.shape)) if d != but)


def _through_copies(node: Node) -> Node:
    while is_call(node, aten.clone.default, aten.alias.default):
        node = node.args[0]
    return node
