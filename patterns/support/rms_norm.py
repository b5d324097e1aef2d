"""Recognise RMSNorm above a node, in the spellings of model libraries and of PyTorch's own decomposition.

total = a + b                 optional: the residual
h = total.float();  n = h * rsqrt(mean(h², -1, keepdim) + eps)
y = weight * n.to(dtype)      "cast mul": Llama, Mistral, Qwen, Phi
y = (n * weight).to(dtype)    "mul cast": torch.nn.functional.rms_norm, OLMo 2
y = (n * (1 + weight)).to(dtype)    "mul+1 cast": Gemma
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import aten, is_call, is_convert
from inductor_ext.graph import constant_of, describe, same_sizes, value_of
from inductor_ext.kernels import steps
from inductor_ext.miss import Miss, no_other_users

#: What to do about an eps that is an input.
EPS = "a number: mark_dynamic on the inputs in place of dynamic=True, or torch._dynamo.config.specialize_float = True"

_FLOATS = tuple(steps.TOKEN_OF_DTYPE)


@dataclasses.dataclass(frozen=True)
class RmsNorm:
    """``y = norm(total)``; ``inner`` are the nodes between ``total`` and ``y``, both excluded."""

    y: Node
    total: Node
    weight: Node
    eps: float
    norm: str
    inner: tuple[Node, ...]

    @property
    def addends(self) -> tuple[Node, Node] | None:
        """The two tensors that ``total`` is the sum of, if it is one that the kernel can take: like ``total`` in all."""
        if not is_call(self.total, aten.add.Tensor):
            return None
        one, two = self.total.args[:2]
        alike = all(
            isinstance(each, Node)
            and value_of(each).dtype is value_of(self.total).dtype
            and same_sizes(value_of(each).shape, value_of(self.total).shape)
            for each in (one, two)
        )
        return (one, two) if alike else None


def trace(y: Node) -> RmsNorm | None:
    """The norm that ends in ``y``; None where there is nothing like one."""
    found = _weighted(y)
    if found is None:
        return None
    weight, normalised, norm, inner = found
    core = _core(normalised)
    if core is None:
        return None
    h, eps, nodes = core
    inner = [*inner, normalised, *nodes]
    total = h
    if is_convert(h, torch.float32):
        total = h.args[0]
        inner.append(h)
    dtype = value_of(total).dtype
    if dtype not in _FLOATS or value_of(y).dtype is not dtype:
        raise Miss("norm dtype", y, "the same dtype before and after the norm", f"{dtype} and {value_of(y).dtype}")
    columns = value_of(weight)
    if columns.dim() != 1 or columns.dtype not in _FLOATS or not same_sizes(columns.shape, value_of(total).shape[-1:]):
        raise Miss("norm weight", y, "one number a column", describe(weight))
    no_other_users(inner, {y, *inner}, "a step of the norm", "the norm only")
    return RmsNorm(y, total, weight, eps, norm, tuple(inner))


def _weighted(y: Node) -> tuple[Node, Node, str, list[Node]] | None:
    """Weight, normalised value, spelling, and the nodes between them and ``y``."""
    if is_call(y, aten.mul.Tensor):  # weight * n.to(dtype), or everything in fp32
        for weight, other in (y.args[:2], y.args[1::-1]):
            if is_convert(other, value_of(y).dtype) and _is_row(weight, y) and _is_product(other.args[0]):
                return weight, other.args[0], "cast mul", [other]
            if value_of(y).dtype is torch.float32 and _is_row(weight, y) and _is_product(other):
                return weight, other, "mul cast", []
    if is_convert(y, *_FLOATS) and _is_product(y.args[0]):
        product = y.args[0]
        for weight, other in (product.args[:2], product.args[1::-1]):
            if _is_row(weight, product) and _is_product(other):
                above, norm, inner = _plain_weight(weight)
                return above, other, norm, [product, *inner]
    return None


def _plain_weight(weight: Node) -> tuple[Node, str, list[Node]]:
    """The parameter under ``1.0 + weight.float()`` or ``weight.float()``."""
    inner, norm = [], "mul cast"
    in_fp32 = value_of(weight).dtype is torch.float32  # 1 + w in bf16 is rounded: a weight as any other
    if is_call(weight, aten.add.Tensor) and constant_of(weight.args[1]) == 1.0 and in_fp32:
        inner.append(weight)
        weight, norm = weight.args[0], "mul+1 cast"
    if is_convert(weight, torch.float32):
        inner.append(weight)
        weight = weight.args[0]
    return weight, norm, inner


def _is_row(weight: Any, like: Node) -> bool:
    """Whether ``weight`` broadcasts one number a column."""
    if not isinstance(weight, Node) or not isinstance(value_of(weight), torch.Tensor):
        return False
    return value_of(weight).dim() == 1 and value_of(like).dim() > 1


def _is_product(node: Any) -> bool:
    return is_call(node, aten.mul.Tensor) and value_of(node).dtype is torch.float32


def _core(normalised: Node) -> tuple[Node, float, list[Node]] | None:
    """``h``, eps and the nodes of ``h * rsqrt(mean(h²) + eps)`` but the first; a Miss where eps is no constant.

    ``torch.compile(dynamic=True)`` makes inputs of a graph of the Python floats in it, a norm's eps among them.
    """
    for h, factor in (normalised.args[:2], normalised.args[1::-1]):
        if not is_call(factor, aten.rsqrt.default) or not is_call(factor.args[0], aten.add.Tensor, aten.add.Scalar):
            continue
        shifted = factor.args[0]
        mean, eps = shifted.args[:2]
        if value_of(h).dtype is not torch.float32 or not is_call(mean, aten.mean.dim) or not _over_columns(mean):
            continue
        square = mean.args[0]
        if not (is_call(square, aten.pow.Tensor_Scalar) and square.args[0] is h and square.args[1] == 2) and not (
            is_call(square, aten.mul.Tensor) and square.args[0] is h and square.args[1] is h
        ):
            continue
        number = constant_of(eps)
        if number is None:
            raise Miss("eps is not a constant of the graph", shifted, EPS, describe(eps))
        return h, number, [factor, shifted, mean, square]
    return None


def _over_columns(mean: Node) -> bool:
    dims, taken = mean.args[1], value_of(mean.args[0])
    keepdim = mean.args[2] if len(mean.args) > 2 else mean.kwargs.get("keepdim", False)
    return [dim % taken.dim() for dim in dims] == [taken.dim() - 1] and bool(keepdim)
