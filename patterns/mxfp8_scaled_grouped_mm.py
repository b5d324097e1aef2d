"""mxfp8_scaled_grouped_mm: PyTorch's grouped product in MXFP8 takes our kernel, and a planned buffer.

    torch.nn.functional.scaled_grouped_mm(x, w.transpose(-2, -1), x_scale, BlockWise1x32, w_scale, BlockWise1x32, …, offs=offs)
        →   inductor_ext.mxfp8_grouped_mm(x, x_scale, w, w_scale, offs, …)

which is ``aten._scaled_grouped_mm_v2`` with 1x32 blocks, scales plain or in tiles (SWIZZLE_32_4_4), x [T, K] in groups and one
w [E, N, K] a group. On a GPU whose kernel has not run yet (``HAS_RUN``) the rule
waits for ``always``.

PyTorch accepts this call on GPUs that have no MX tensor core, and it ends there in a launch failure which loses the CUDA
context (torch 2.11 on an H200). There the op takes the product even where it has no kernel for it, and multiplies what it
dequantises; and where the product stays all the same, a warning says so while the graph compiles.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import arguments, aten, calling, is_call
from inductor_ext.graph import describe, erase_dead, value_of
from inductor_ext.miss import CONTRACTION_DIM, SCALE_DTYPE, SCALE_LAYOUT, Miss
from inductor_ext.moe import mx
from inductor_ext.patterns.support import grouped_product
from inductor_ext.rule import Context, Example, Match, Rule, source_line

log = logging.getLogger("inductor_ext")

#: Values of ``torch.nn.functional.ScalingType`` and ``SwizzleType``.
BLOCK_WISE_1X32, NO_SWIZZLE, SWIZZLE_32_4_4 = 3, 0, 1
#: GPUs that PyTorch starts its kernel on, and that have no MX tensor core. Older ones it refuses itself.
WITHOUT_MX = ((9, 0), (10, 0))  # from, to
_SWIZZLES = {(): False, (NO_SWIZZLE,): False, (SWIZZLE_32_4_4,): True}


def guard(node: Node, context: Context) -> Match | None:
    device = value_of(node).device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    blocks = BLOCK_WISE_1X32 in arguments(node)["recipe_a"]
    if not blocks or not WITHOUT_MX[0] <= capability < WITHOUT_MX[1]:
        return grouped_product.match(trace(node), context)
    try:
        return grouped_product.match(trace(node), context, "PyTorch's kernel cannot run on a GPU without MX tensor cores")
    except Miss as miss:
        _warn(capability, miss.reason, miss.wanted, miss.found, source_line(miss.node))
        raise


@functools.lru_cache(maxsize=64)
def _warn(capability: tuple[int, int], reason: str, wanted: str, found: str, source: str) -> None:
    """Once for each place: guards are asked twice, and the same line may stand in every layer."""
    log.warning(
        "scaled_grouped_mm with 1x32 blocks%s: this GPU (compute capability %d.%d) has no MX tensor core, and PyTorch's "
        "kernel, which stays here, fails on it so that the process loses its CUDA context. The rule "
        "mxfp8_scaled_grouped_mm did not take the product: %s (wanted %s, found %s)",
        f" at {source}" if source else "", *capability, reason, wanted, found,
    )  # fmt: skip


def trace(node: Node) -> grouped_product.Grouped:
    given = arguments(node)
    for name in "ab":
        recipe = list(given[f"recipe_{name}"])
        if recipe != [BLOCK_WISE_1X32]:
            wanted = f"one scale for each 32 elements along K ([{BLOCK_WISE_1X32}], BlockWise1x32)"
            raise Miss("scaling recipe", node, wanted, f"recipe_{name} {recipe}")
    swizzles = [_SWIZZLES.get(tuple(given[f"swizzle_{name}"])) for name in "ab"]
    if swizzles[0] is None or swizzles[0] is not swizzles[1]:
        found = f"{list(given['swizzle_a'])} and {list(given['swizzle_b'])}"
        raise Miss(SCALE_LAYOUT, node, "both plain, or both in tiles (SWIZZLE_32_4_4)", found)
    grouped_product.check_call(node, given)
    if given["contraction_dim"]:
        raise Miss(CONTRACTION_DIM, node, "none", str(list(given["contraction_dim"])))
    for name in "ab":
        (scale,) = given[f"scale_{name}"]
        if value_of(scale).dtype is not mx.SCALE:
            raise Miss(SCALE_DTYPE, node, "float8_e8m0fnu", describe(scale))
    w = given["mat2"]
    transposed = is_call(w, aten.permute.default) and [dim % 3 for dim in w.args[1]] == [0, 2, 1]
    return grouped_product.Grouped(
        node, given["self"], given["scale_a"][0], w.args[0] if transposed else w, given["scale_b"][0], given["offs"],
        value_of(node).dtype, swizzles[0], transposed=not transposed,
    )  # fmt: skip


def replace(match: Match) -> None:
    graph = match.node.graph
    with graph.inserting_before(match.node):
        made = grouped_product.insert(graph, match.data)
    match.node.replace_all_uses_with(made)
    erase_dead(match.node)


# ---- examples --------------------------------------------------------------------------------------------------------


def _inputs(device: str, k: int = 64, swizzled: bool = False) -> tuple[Any, ...]:
    """x [12, K] and w [4, 48, K] in MXFP8, their scales, offs with an empty expert."""
    offs = torch.tensor([3, 3, 10, 12], dtype=torch.int32, device=device)
    quantize = torch.ops.inductor_ext.mxfp8_quantize
    x, x_scale = quantize(torch.randn(12, k, device=device).bfloat16(), offs if swizzled else None, "rceil", swizzled)
    w, w_scale = quantize((torch.randn(4, 48, k, device=device) * 0.1).bfloat16(), None, "rceil", swizzled)
    return x, x_scale, w, w_scale, offs


def _tiles(device: str) -> tuple[Any, ...]:
    return _inputs(device, swizzled=True)


def _product(x: Any, x_scale: Any, w: Any, w_scale: Any, offs: Any, **options: Any) -> torch.Tensor:
    recipe, swizzle = torch.nn.functional.ScalingType, torch.nn.functional.SwizzleType
    tiles = w_scale.dim() == 2 and w_scale.dtype is mx.SCALE
    kind = swizzle.SWIZZLE_32_4_4 if tiles else swizzle.NO_SWIZZLE
    blocks = recipe.BlockWise1x32
    given = {"scale_recipe_a": blocks, "scale_recipe_b": blocks, "swizzle_a": kind, "swizzle_b": kind}
    return torch.nn.functional.scaled_grouped_mm(
        x, w.transpose(-2, -1), scale_a=x_scale, scale_b=w_scale, offs=offs, **{**given, **options}
    )


def _transposed(device: str) -> tuple[Any, ...]:
    x, x_scale, w, w_scale, offs = _inputs(device)
    return x, x_scale, w.transpose(-2, -1), w_scale, offs


def _given_transposed(x: Any, x_scale: Any, w: Any, w_scale: Any, offs: Any) -> torch.Tensor:
    kind = torch.nn.functional.ScalingType.BlockWise1x32
    return torch.nn.functional.scaled_grouped_mm(x, w, x_scale, kind, w_scale, kind, offs=offs)


def _quantised_here(x: Any, w: Any, w_scale: Any, offs: Any) -> torch.Tensor:
    data, scale = torch.ops.inductor_ext.mxfp8_quantize(x, None, "rceil", False)
    return _product(data, scale, w, w_scale, offs)


def _unquantised(device: str) -> tuple[Any, ...]:
    _, _, *rest = _inputs(device)
    return torch.randn(12, 64, device=device).bfloat16(), *rest


def _row_wise(device: str) -> tuple[Any, ...]:
    x, _, w, _, offs = _inputs(device)
    return x, torch.rand(12, device=device) + 0.5, w, torch.rand(4, 48, device=device) + 0.5, offs


def _always(name: str, fn: Any, inputs: Any = _inputs, **options: Any) -> Example:
    return Example(name, fn, inputs, mode="always", **options)


def _other(name: str) -> dict[str, Any]:
    kind = getattr(torch.nn.functional.ScalingType, name)
    return {"scale_recipe_a": kind, "scale_recipe_b": kind}


MATCHES = (
    _always("plain_scales", _product),
    _always("swizzled_scales", _product, _tiles),
    _always("x_quantised_in_the_graph", _quantised_here, _unquantised),
    _always("fp16_output", lambda *inputs: _product(*inputs, output_dtype=torch.float16)),
    _always("fast_accumulation", lambda *inputs: _product(*inputs, use_fast_accum=True)),
    _always("weight_given_transposed", _given_transposed, _transposed),
)

NEAR_MISSES = (
    Example(
        "row_wise",
        lambda *inputs: _product(*inputs, **_other("RowWise")),
        _row_wise,
        mode="always",
        reason="scaling recipe",
    ),
)

RULE = Rule(
    name="mxfp8_scaled_grouped_mm",
    doc="scaled_grouped_mm with 1x32 blocks (MXFP8) → our kernel, into a planned buffer",
    anchors=calling(aten._scaled_grouped_mm_v2.default),
    guard=guard,
    replace=replace,
    exact=False,
    cost=grouped_product.COST,
    matches=MATCHES,
    near_misses=NEAR_MISSES,
)
