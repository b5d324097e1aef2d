"""What the rules for grouped products with MXFP8 weights share: the product, what the op cannot do, and the call."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.calls import aten
from inductor_ext.graph import call, describe, known_equal, value_of
from inductor_ext.kernels.mxfp8_grouped_mm.op import HAS_RUN, OP, OUT_DTYPES, X_DTYPES, slower, unsupported
from inductor_ext.kernels.mxfp8_quantize.op import OP as QUANTIZE
from inductor_ext.miss import NOT_FASTER, OUTPUT_DTYPE, Miss
from inductor_ext.moe import mx
from inductor_ext.patterns.support import has_run
from inductor_ext.rule import Call, Context, Match

COST = "products are exact, sums in fp32 taken in another order"


@dataclasses.dataclass(frozen=True)
class Grouped:
    """x [T, K] · w [E, N, K], by groups. ``rounding``: x is to be quantised so first; ``transposed``: w is [E, K, N]."""

    node: Node
    x: Node
    x_scale: Node | None
    w: Node
    w_scale: Node
    offs: Node
    out_dtype: torch.dtype
    swizzled: bool
    rounding: str = ""
    transposed: bool = False
    w_block: int = mx.BLOCK  # elements of K that share a scale of w


def check_call(node: Node, given: dict[str, Any]) -> None:
    """Miss for groups or options that the op does not have."""
    x, w = value_of(given["self"]), value_of(given["mat2"])
    if x.dim() != 2 or w.dim() != 3:
        wanted = "rows [T, K] in groups, and a weight [E, K, N] for each"
        raise Miss("what the groups divide", node, wanted, f"{describe(given['self'])} and {describe(given['mat2'])}")
    if given["offs"] is None:
        raise Miss("offs is missing", node, "the ends of the groups, int32 [E]", "None")
    if given["bias"] is not None:
        raise Miss("bias is given", node, "None, as torch wants it", describe(given["bias"]))
    if given["out_dtype"] not in (None, *OUT_DTYPES):
        raise Miss(OUTPUT_DTYPE, node, "bfloat16, float16 or float32", str(given["out_dtype"]))


def _check(found: Grouped) -> None:
    """Miss for operands that the op cannot read, where it would say so less well or not before it runs."""
    x, w = value_of(found.x), _weight(found)
    if not all(isinstance(size, int) for size in w.shape):
        raise Miss("E, N or K is symbolic", found.node, "numbers; only T may change between calls", describe(found.w))
    if w.shape[2] % mx.BLOCK:
        raise Miss("K is not a multiple of 32", found.node, "a multiple of 32", f"K {w.shape[2]} of {describe(found.w)}")
    if x.dtype not in (*X_DTYPES, mx.DATA):
        raise Miss("dtype of x", found.node, "bfloat16, float16 or float8_e4m3fn", describe(found.x))
    pitch, begin = (elements * x.element_size() for elements in (x.stride(0), x.storage_offset()))
    if not known_equal(x.stride(1), 1) or not known_equal(pitch % 16, 0) or not known_equal(begin % 16, 0):
        wanted = "unit stride along K, and rows at multiples of 16 bytes"
        strides = f"{describe(found.x)} strides {list(x.stride())} offset {x.storage_offset()}"
        raise Miss("x is not row-major", found.node, wanted, strides)


def match(found: Grouped, context: Context, fails: str = "") -> Match:
    """The rewrite of a product, or why it stays.

    ``fails`` says why PyTorch's own kernel cannot run here, if so. Then even a product for which there is no kernel of ours is
    rewritten: the op runs PyTorch's bf16 one on dequantised operands.
    """
    _check(found)
    made = _values(found)
    x, x_scale, w, _, _, out_dtype, swizzled, _ = made[-1].args
    try:
        _fake(OP.fake, made[-1].args, x)
    except (TypeError, ValueError) as error:
        argument, wanted, given = _parts(str(error))
        raise Miss(argument, found.node, wanted, given) from None
    missing = unsupported(x, x_scale, w, out_dtype, swizzled)
    if missing is not None and not fails:
        raise Miss("no kernel for this GPU does it", found.node, missing[0], missing[1])
    if missing is None:
        has_run.check(found.node, context, x.device, HAS_RUN)
    loses = slower(x, x_scale, w) if not (fails or context.forced) else None
    if loses is not None:
        raise Miss(NOT_FASTER, found.node, loses[0], loses[1])
    experts, n, k = w.shape
    kinds = str(value_of(found.x).dtype)[6:] + (f" to MXFP8 ({found.rounding})" if found.rounding else "")
    layout = "swizzled" if swizzled else "plain"
    detail = f"{experts} experts of {n} x {k}, x {kinds}, {layout} scales"
    if missing is not None:
        why = f"{fails}; PyTorch's bf16 product of the dequantised operands runs instead: ours wants {missing[0]}"
        return Match(found.node, made, detail, why, found)
    return Match(found.node, made, detail, "weights are read as MXFP8, half the bytes of bf16", found)


def insert(graph: Graph, found: Grouped) -> Node:
    """The call, at the graph's insertion point."""
    x, x_scale = found.x, found.x_scale
    if found.rounding:
        offs = found.offs if found.swizzled else None
        quantized = call(graph, QUANTIZE.overload, x, offs, found.rounding, found.swizzled, like=found.node)
        x, x_scale = (call(graph, operator.getitem, quantized, i, like=found.node) for i in range(2))
    w = call(graph, aten.permute.default, found.w, [0, 2, 1], like=found.node) if found.transposed else found.w
    rest = (w, found.w_scale, found.offs, found.out_dtype, found.swizzled, found.w_block)
    return call(graph, OP.overload, x, x_scale, *rest, like=found.node)


def _values(found: Grouped) -> tuple[Call, ...]:
    """The calls with fake tensors."""
    x, x_scale, w_scale, offs = (value_of(each) for each in (found.x, found.x_scale, found.w_scale, found.offs))
    rest = (_weight(found), w_scale, offs, found.out_dtype, found.swizzled, found.w_block)
    if not found.rounding:
        return (Call(OP, (x, x_scale, *rest)),)
    first = (x, offs if found.swizzled else None, found.rounding, found.swizzled)
    return Call(QUANTIZE, first), Call(OP, (*_fake(QUANTIZE.fake, first, x), *rest))


def _weight(found: Grouped) -> Any:
    """The fake [E, N, K]."""
    value = value_of(found.w)
    return _fake(torch.Tensor.transpose, (value, -2, -1), value) if found.transposed else value


def _parts(message: str) -> tuple[str, str, str]:
    """Argument, wanted and found of one of the op's errors: ``mxfp8_grouped_mm: w_scale: wanted …, found …``."""
    argument, _, rest = message.removeprefix(f"{OP.name}: ").partition(": wanted ")
    wanted, _, found = rest.rpartition(", found ")
    return argument, wanted, found


def _fake(function: Callable[..., Any], args: Any, like: Any) -> Any:
    with like.fake_mode:
        return function(*args)
