"""Read what `inductor_ext.moe.MXFP8Weight` leaves in a graph: the dequantisation of MXFP8, in plain operators.

    trace(node)  →  Weight(data, scale, swizzled, block)   or   None (nothing is dequantised there)   or a Miss

``node`` is the second operand of a grouped product, [E, K, N]: a transposed view of ``data`` [E, N, K] e4m3 times its scales'
powers of two. ``scale`` is a node of uint8: [E, N, K/32], or [E, bytes of tiles] where it was un-swizzled on the way. ``block``
is 128 where only every fourth scale is read, for 128 elements of K.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import aten, is_call, is_convert
from inductor_ext.graph import describe, value_of
from inductor_ext.kernels.mxfp8_grouped_mm.op import W_BLOCKS
from inductor_ext.miss import Miss
from inductor_ext.moe import mx

_VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_LSHIFT = (aten.__lshift__.Scalar, aten.bitwise_left_shift.Tensor_Scalar)
#: From [E, R, C, r % 32, r / 32, c] to rows and columns.
_UNSWIZZLE = [0, 1, 4, 3, 2, 5]


@dataclasses.dataclass(frozen=True)
class Weight:
    """``data`` [E, N, K] e4m3 and its scales, as bytes."""

    data: Node
    scale: Node
    swizzled: bool
    block: int = mx.BLOCK


def trace(node: Node) -> Weight | None:
    transposed = is_call(node, aten.permute.default) and [dim % 3 for dim in node.args[1]] == [0, 2, 1]
    value = node.args[0] if transposed else node
    product = _through_views(value)
    if not is_call(product, aten.mul.Tensor):
        return None
    data, power = product.args
    data = _through_views(data)
    if not is_convert(data, torch.bfloat16) or value_of(data.args[0]).dtype is not mx.DATA:
        return None
    data = data.args[0]
    scale = _scale_of(power)
    if scale is None:
        return None
    if not transposed:
        wanted = "a weight that is quantised along the dimension that is summed over"
        raise Miss("the weight is quantised along N", node, wanted, describe(data))
    return _weight(node, data, scale, list(value_of(product).shape))


def _weight(node: Node, data: Node, scale: Node, blocks: list[Any]) -> Weight:
    """``blocks``: the shape in which both were multiplied."""
    stored = value_of(data)
    if stored.dim() != 3 or not stored.is_contiguous():
        found = f"{describe(data)} strides {list(stored.stride())}"
        raise Miss("the weight's data does not lie as [E, N, K]", node, "three dimensions, contiguous", found)
    experts, n, k = stored.shape
    block = mx.BLOCK
    if is_call(scale, aten.slice.Tensor) and scale.args[1] in (2, -1) and scale.args[2:3] == (0,) and len(scale.args) == 5:
        scale, block = scale.args[0], mx.BLOCK * scale.args[4]
        if block not in W_BLOCKS:
            wanted = f"one for each {' or '.join(map(str, W_BLOCKS))} elements along K"
            raise Miss("the weight's scales", node, wanted, f"one for each {block} of {describe(data)}")
    if blocks != [experts, n, k // block, block]:
        raise Miss("the weight's scales", node, f"one for each {block} elements along K", f"products of shape {blocks}")
    tiles = _tiles_of(scale)
    if tiles is not None:
        rows, columns = mx.swizzled_shape(n, k // mx.BLOCK)
        if list(value_of(tiles).shape) == [experts, rows * columns]:
            return Weight(data, tiles, True, block)
    if list(value_of(scale).shape) != [experts, n, k // mx.BLOCK] or not value_of(scale).is_contiguous():
        wanted = f"one for each {mx.BLOCK} elements along K, contiguous, or tiles of 128 x 4"
        raise Miss("the weight's scales", node, wanted, f"{describe(scale)} for {describe(data)}")
    return Weight(data, scale, False, block)


def _scale_of(power: Node) -> Node | None:
    """The bytes of ``bf16(where(s == 0 or s == 255, s << 7 | 64, s << 7))[..., None]``."""
    if not is_call(power, aten.unsqueeze.default):
        return None
    bits = power.args[0]
    if not is_call(bits, aten.view.dtype) or bits.args[1] is not torch.bfloat16:
        return None
    chosen = bits.args[0]
    if not is_call(chosen, aten.where.self):
        return None
    edge, marked, shifted = chosen.args
    if not is_call(shifted, *_LSHIFT) or shifted.args[1] != 7 or not is_convert(shifted.args[0], torch.int16):
        return None
    scale = shifted.args[0].args[0]
    at_edge = is_call(edge, aten.bitwise_or.Tensor, aten.logical_or.default) and all(
        is_call(each, aten.eq.Scalar) and each.args[0] is scale for each in edge.args
    )
    with_bit = is_call(marked, aten.bitwise_or.Scalar) and marked.args == (shifted, 64)
    if not at_edge or not with_bit or {each.args[1] for each in edge.args} != {0, 255}:
        return None
    return scale if value_of(scale).dtype is torch.uint8 else None


def _tiles_of(scale: Node) -> Node | None:
    """The swizzled bytes that ``scale`` was made of, if it was."""
    while is_call(scale, aten.slice.Tensor) and scale.args[2:3] == (0,) and len(scale.args) < 5:
        scale = scale.args[0]
    rows = scale
    while is_call(rows, *_VIEWS, aten.clone.default):
        rows = rows.args[0]
    if rows is scale or not is_call(rows, aten.permute.default) or list(rows.args[1]) != _UNSWIZZLE:
        return None
    tiles = rows.args[0]
    in_tiles: Any = value_of(tiles).shape
    if list(in_tiles[3:]) != [32, 4, 4]:
        return None
    if list(value_of(scale).shape) != [in_tiles[0], in_tiles[1] * mx.TILE_ROWS, in_tiles[2] * mx.TILE_COLS]:
        return None
    return _through_views(tiles)


def _through_views(node: Any) -> Any:
    while is_call(node, *_VIEWS):
        node = node.args[0]
    return node
