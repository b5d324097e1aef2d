"""Recognise RMSNorm and LayerNorm above a node as a fact, in the spellings of model libraries and of PyTorch's decompositions.

    total = a + b                                   optional: the residual, in its own dtype or in fp32
    h = total.float();  n = h / root(mean(h²) + eps)                                  "rms"
    c = h - mean(h);    n = c / root(mean(c²) + eps)                                  "layer"
    y = …n…                                         weight, bias, modulation and roundings, as kernels/norms.py writes them

What a root and a mean look like are the functions `_ROOTS`, `_SQUARES` and `_VARIANCES`, traced: a new spelling is one more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import aten, is_call, is_convert
from inductor_ext.graph import constant_of, describe, is_reshape, known_equal, same_sizes, through_reshapes, value_of
from inductor_ext.kernels import steps
from inductor_ext.miss import Miss, no_other_users
from inductor_ext.patterns.support.expression import Expression
from inductor_ext.patterns.support.same import same_value

#: What to do about an eps that is an input.
EPS = "a number: mark_dynamic on the inputs in place of dynamic=True, or torch._dynamo.config.specialize_float = True"

_FLOATS = tuple(steps.TOKEN_OF_DTYPE)
#: Nodes between the division by the root and y, at most: five steps, each with a rounding, and converts.
_DEEPEST = 12

# n, of h and of what is under the root; the kernel multiplies by rsqrt, which differs in the last bits.
_ROOTS = (
    Expression(lambda h, v: h * torch.rsqrt(v), tensors=2),
    Expression(lambda h, v: h / torch.sqrt(v), tensors=2),
    Expression(lambda h, v: h * (1.0 / torch.sqrt(v)), tensors=2),
    Expression(lambda h, v: h * torch.sqrt(v).reciprocal(), tensors=2),
    Expression(lambda h, v: h * v.pow(-0.5), tensors=2),
)
# What is under the root, of h and eps.
_SQUARES = (
    Expression(lambda h, eps: h.pow(2).mean(-1, keepdim=True) + eps, numbers=1),
    Expression(lambda h, eps: (h * h).mean(-1, keepdim=True) + eps, numbers=1),
    Expression(lambda h, eps: aten.add.Scalar(h.pow(2).mean(-1, keepdim=True), eps), numbers=1),  # torch's own rms_norm
    Expression(lambda h, eps: h.pow(2).sum(-1, keepdim=True) / h.shape[-1] + eps, numbers=1),
    Expression(lambda h, eps: (h * h).sum(-1, keepdim=True) / h.shape[-1] + eps, numbers=1),
)
# The same of a centred h, and h centred; in each pair the h is one.
_VARIANCES = (
    (
        Expression(lambda h, eps: torch.var_mean(h, -1, correction=0, keepdim=True)[0] + eps, numbers=1),
        Expression(lambda h: h - torch.var_mean(h, -1, correction=0, keepdim=True)[1]),
    ),
    (
        Expression(lambda h, eps: torch.var(h, -1, correction=0, keepdim=True) + eps, numbers=1),
        Expression(lambda h: h - h.mean(-1, keepdim=True)),
    ),
)
_CENTRED = Expression(lambda h: h - h.mean(-1, keepdim=True))


@dataclasses.dataclass(frozen=True)
class Operand:
    """What a step multiplies by or adds: ``node`` as memory has it; ``made`` is what the graph makes of it, 1 + it perhaps."""

    node: Node
    made: Node


@dataclasses.dataclass(frozen=True)
class Norm:
    """``y = norm(total)`` of ``kind``, "rms" or "layer"; ``steps`` are those behind the root, as kernels/norms.py writes them.

    ``wide``: total is an fp32 sum of narrower ``addends``, and normalised without being rounded. ``inner`` are the nodes
    between total and y, both excluded.
    """

    kind: str
    y: Node
    total: Node
    eps: float
    steps: str
    operands: dict[str, Operand]
    addends: tuple[Node, Node] | None
    wide: bool
    inner: tuple[Node, ...]

    @property
    def dtype(self) -> torch.dtype:
        """That of x and of y."""
        return value_of(self.y).dtype  # type: ignore[no-any-return]

    def node(self, operand: str) -> Node | None:
        return self.operands[operand].node if operand in self.operands else None

    @property
    def roundings(self) -> list[Node]:
        """What hands a wide sum on: its roundings to the dtype of x."""
        return [user for user in self.total.users if is_convert(user, self.dtype)] if self.wide else []


@dataclasses.dataclass(frozen=True)
class _Core:
    """n, before any step."""

    kind: str
    h: Node
    eps: float
    nodes: list[Node]


def trace(y: Node, kind: str = "") -> Norm | None:
    """The norm that ends in ``y``; None where there is nothing like one, or it is none of ``kind``, if that is given."""
    value = value_of(y)
    if not isinstance(value, torch.Tensor) or value.dtype not in _FLOATS:
        return None
    found = _steps(y, y, _DEEPEST)
    if found is None or kind not in ("", found[0].kind):
        return None
    core, tokens, operands, nodes = found
    inner = [node for node in (*core.nodes, *nodes) if node is not y]
    total, addends, wide = _summed(core.h, value.dtype)
    if total is not core.h:
        inner.append(core.h)
    dtype = value_of(total).dtype
    if not wide and value.dtype is not dtype:
        raise Miss("norm dtype", y, "the same dtype before and after the norm", f"{dtype} and {value.dtype}")
    _check_operands(y, operands)
    no_other_users([node for node in inner if node is not core.h], {y, *inner}, "a step of the norm", "the norm only")
    return Norm(core.kind, y, total, core.eps, _written(tokens), operands, addends, wide, tuple(inner))


def _written(tokens: list[str]) -> str:
    """The program of kernels/norms.py: one rounding at the end, which is also said unless there was one before."""
    while tokens and tokens[-1] == "cast":
        tokens = tokens[:-1]
    return " ".join(tokens if "cast" in tokens else [*tokens, "cast"])


# ---- what is behind the root -----------------------------------------------------------------------------------------

_Found = tuple[_Core, list[str], dict[str, Operand], list[Node]]


def _steps(node: Any, y: Node, deepest: int) -> _Found | None:
    """The core above ``node``, the steps from it, what they read, and the nodes between, ``node`` included."""
    if deepest == 0 or not isinstance(value_of(node), torch.Tensor):
        return None
    dtype, own = value_of(y).dtype, value_of(node).dtype
    if not same_sizes(value_of(node).shape, value_of(y).shape):
        return None
    core = _core(node)
    if core is not None:
        return core, [], {}, []
    if is_call(node, aten.clone.default):  # torch's rms_norm makes a permuted result contiguous
        found = _steps(node.args[0], y, deepest - 1)
        return found and _and(found, node, [])
    if is_convert(node, dtype, torch.float32):
        found = _steps(node.args[0], y, deepest - 1)
        return found and _and(found, node, ["cast"] if own is not torch.float32 else [])
    if own not in (dtype, torch.float32) or not is_call(node, aten.mul.Tensor, aten.add.Tensor):
        return None
    for operand, other in (node.args[:2], node.args[1::-1]):
        if not _may_be_operand(operand):
            continue
        found = _steps(other, y, deepest - 1)
        if found is None:
            continue
        name, token, read = _operand(operand, node)
        if name in found[2]:
            raise Miss("a norm with two such operands", node, f"one {name}", describe(operand))
        rounded = ["cast"] if own is not torch.float32 else []
        return _and((found[0], found[1], {**found[2], name: read}, found[3]), node, [token, *rounded])
    return None


def _and(found: _Found, node: Node, tokens: list[str]) -> _Found:
    core, before, operands, nodes = found
    return core, [*before, *tokens], operands, [*nodes, node]


def _may_be_operand(operand: Any) -> bool:
    """Whether ``operand`` is a tensor that has columns, of floats or for each column one integer."""
    value = value_of(operand)
    if not isinstance(value, torch.Tensor):
        return False
    return value.dim() > 0 if value.dtype.is_floating_point else value.dim() == 1  # of integers: named by _check_operands


def _operand(operand: Node, step: Node) -> tuple[str, str, Operand]:
    """Weight, bias, factor or shift, its token, and what is read."""
    times = is_call(step, aten.mul.Tensor)
    token, node = "", operand
    if is_convert(node, torch.float32) and value_of(node.args[0]).dtype in _FLOATS:
        node = node.args[0]
    if times and is_call(node, aten.add.Tensor) and constant_of(node.args[1]) == 1.0 and isinstance(node.args[0], Node):
        wide = value_of(node).dtype is torch.float32
        token, node = ("+1" if wide else "+1r"), node.args[0]
        if is_convert(node, torch.float32) and value_of(node.args[0]).dtype in _FLOATS:
            node = node.args[0]
    if value_of(through_reshapes(node)).dim() == 1:
        node = _vector(node)
        return ("weight", f"mul{token}", Operand(node, operand)) if times else ("bias", "add", Operand(node, operand))
    return ("factor", f"factor{token}", Operand(node, operand)) if times else ("shift", "shift", Operand(node, operand))


def _vector(node: Node) -> Node:
    """What a reshape to [1, …, 1, C] was made of; a vector itself otherwise."""
    return through_reshapes(node) if is_reshape(node) else node


def _check_operands(y: Node, operands: dict[str, Operand]) -> None:
    shape = value_of(y).shape
    for name, operand in operands.items():
        value = value_of(operand.node)
        if name in ("weight", "bias"):
            if value.dim() != 1 or value.dtype not in _FLOATS or not same_sizes(value.shape, shape[-1:]):
                raise Miss("norm weight", y, "one number a column", describe(operand.node))
        elif value.dtype not in _FLOATS or samples(value.shape, shape) is None:
            wanted = "one row for each of the first dimensions, the same for all others"
            raise Miss("norm modulation", y, wanted, describe(operand.node))
    for one, two in (("weight", "bias"), ("factor", "shift")):
        if one in operands and two in operands:
            a, b = (value_of(operands[each].node) for each in (one, two))
            if a.dtype is not b.dtype or samples(a.shape, shape) != samples(b.shape, shape):
                both = f"{describe(operands[one].node)} and {describe(operands[two].node)}"
                raise Miss("norm operands", y, f"{one} and {two} of one dtype, for the same rows", both)


def samples(shape: Any, of: Any) -> int | None:
    """How many of the first dimensions of ``of`` a modulation has rows for, being the same for the others; None: it is none."""
    padded = [1] * (len(of) - len(shape)) + list(shape)
    if not known_equal(padded[-1], of[-1]):
        return None
    count = 0
    for size, wanted in zip(padded[:-1], of[:-1]):
        if not known_equal(size, wanted):
            break
        count += 1
    return count if all(known_equal(size, 1) for size in padded[count:-1]) else None


# ---- the root and what is under it -----------------------------------------------------------------------------------


def _core(node: Node) -> _Core | None:
    """``node`` as n; a Miss where eps is no constant.

    ``torch.compile(dynamic=True)`` makes inputs of a graph of the Python floats in it, a norm's eps among them.
    """
    if value_of(node).dtype is not torch.float32 or not is_call(node, aten.mul.Tensor, aten.div.Tensor):
        return None
    if not any(_one_a_row(each) for each in node.args[:2]):  # the root
        return None
    for root in _ROOTS:
        found = root.match(node)
        if found is None:
            continue
        for kind, h, eps, nodes in _under(*found.tensors):
            number = constant_of(eps)
            if number is None:
                raise Miss("eps is not a constant of the graph", found.tensors[1], EPS, describe(eps))
            return _Core(kind, h, number, [node, *(each for each in found.nodes if each is not node), *nodes])
    return None


def _one_a_row(node: Any) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dim() > 1 and known_equal(value.shape[-1], 1)


def _under(c: Node, v: Node) -> Iterator[tuple[str, Node, Any, list[Node]]]:
    """Kind, h, eps and the nodes, of what ``v`` under the root is of ``c`` that is divided by it."""
    for squares in _SQUARES:
        found = squares.match(v)
        if found is not None and same_value(found.tensors[0], c):
            centred = _CENTRED.match(c)
            if centred is None:
                yield "rms", c, found.numbers[0], found.nodes
            else:
                yield "layer", centred.tensors[0], found.numbers[0], [*found.nodes, *centred.nodes]
    for variance, less_mean in _VARIANCES:
        found, less = variance.match(v), less_mean.match(c)
        if found is not None and less is not None and same_value(found.tensors[0], less.tensors[0]):
            yield "layer", less.tensors[0], found.numbers[0], [*found.nodes, *less.nodes]


# ---- the sum before it -----------------------------------------------------------------------------------------------


def _summed(h: Node, dtype: torch.dtype) -> tuple[Node, tuple[Node, Node] | None, bool]:
    """What is normalised, the two tensors that it is the sum of, if it is one, and whether that is in fp32 and not rounded."""
    if is_convert(h, torch.float32):
        total = h.args[0]
        return total, _addends(total), False
    narrow = _narrow_addends(h, dtype) if dtype is not torch.float32 else None
    return (h, narrow, True) if narrow is not None else (h, _addends(h), False)


def _addends(total: Node) -> tuple[Node, Node] | None:
    """Of a sum in its own dtype, or in fp32 and rounded to it: tensors that are like the sum in all."""
    value = value_of(total)
    if is_call(total, aten.add.Tensor):
        one, two = total.args[:2]
        return (one, two) if _like(one, total, value.dtype) and _like(two, total, value.dtype) else None
    if is_convert(total, torch.bfloat16, torch.float16):
        return _narrow_addends(total.args[0], value.dtype)
    return None


def _narrow_addends(total: Node, dtype: torch.dtype) -> tuple[Node, Node] | None:
    """a and b of ``a.float() + b.float()``, both of ``dtype`` and as large as the sum."""
    if not is_call(total, aten.add.Tensor):
        return None
    pair = total.args[:2]
    if not all(is_convert(each, torch.float32) and _like(each.args[0], total, dtype) for each in pair):
        return None
    one, two = (each.args[0] for each in pair)
    return one, two


def _like(node: Any, total: Node, dtype: torch.dtype) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype is dtype and same_sizes(value.shape, value_of(total).shape)
