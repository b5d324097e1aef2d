"""Eight-bit work that no rule reads, each kind by its name and with what to do instead: near misses of fp8_downcast.

    x.to(float8_e4m3fnuz)                                another format
    clamp(round(x / s)).to(int8)                         another number
    mm(x, weight.to(bf16) * s), weight in FP8            FP8 is only storage: the product is one of bf16
    mm(x, x.to(float8).to(bf16) * s)                     FP8 is only simulated: likewise
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from inductor_ext.calls import CONVERT, aten, calling, is_call
from inductor_ext.graph import describe, is_reshape, through_reshapes, value_of
from inductor_ext.miss import Miss
from inductor_ext.patterns.support.fp8_chain import FLOATS, FP8, is_fp8_cast

OTHER_FP8 = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_BOUNDS = (aten.clamp_min.default, aten.clamp_max.default, aten.minimum.default, aten.maximum.default)
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
_WAY = (CONVERT, aten.mul.Tensor, aten.div.Tensor, aten.clone.default, aten.expand.default)
_DO = "a product that reads FP8 (torch._scaled_mm), such as torchao's Float8DynamicActivationFloat8WeightConfig makes"


def converts(graph: Graph) -> list[Node]:
    """Converts to or from eight bits that `check` may have something to say about."""
    eight = (*FP8, *OTHER_FP8, torch.int8)
    known = (node for node in calling(CONVERT)(graph) if not is_fp8_cast(node))
    return [node for node in known if node.args[1] in eight or value_of(node.args[0]).dtype in eight]


def check(node: Node) -> None:
    """Miss where ``node`` is part of what nothing reads."""
    source, target = value_of(node.args[0]).dtype, node.args[1]
    if target in OTHER_FP8:
        raise Miss("another format than NVIDIA's FP8", node, "float8_e4m3fn or float8_e5m2", str(target))
    if target is torch.int8 and source in FLOATS and _bounded(node.args[0]):
        raise Miss("quantised to int8", node, f"FP8, and {_DO}", describe(node))
    if target not in FLOATS or source not in (*FP8, torch.int8):
        return
    product = _product(node)
    if product is None:
        return
    made_by = through_reshapes(node.args[0])
    if made_by.op in ("placeholder", "get_attr"):
        raise Miss("eight bits are only storage here", node, _DO, describe(product))
    if is_call(made_by, CONVERT):
        raise Miss("FP8 is only simulated here", node, _DO, describe(product))


def _bounded(node: Node) -> bool:
    while is_call(node, CONVERT) or is_reshape(node) or is_call(node, aten.round.default):
        node = node.args[0]
    return is_call(node, *_BOUNDS)


def _product(node: Node, limit: int = 16) -> Node | None:
    """The product that reads ``node``, scaled, converted or viewed."""
    pending, seen = [node], set[Node]()
    while pending and len(seen) < limit:
        for user in pending.pop().users:
            if is_call(user, *_PRODUCTS):
                return user
            if user not in seen and (is_reshape(user) or is_call(user, *_WAY)):
                seen.add(user)
                pending.append(user)
    return None
