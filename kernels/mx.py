"""MXFP8 as kernels write it: the format (``inductor_ext/moe/mx.py``), and a granularity, "mx", of the ops that end in it.

Their ``scale_program`` is then a rounding, their ``program`` empty, and scales are plain.
"""

from __future__ import annotations

import torch

from inductor_ext.moe.mx import BLOCK as BLOCK
from inductor_ext.moe.mx import DATA as DATA
from inductor_ext.moe.mx import ROUNDINGS as ROUNDINGS
from inductor_ext.moe.mx import SCALE as SCALE
from inductor_ext.moe.mx import TILE_COLS as TILE_COLS
from inductor_ext.moe.mx import TILE_ROWS as TILE_ROWS
from inductor_ext.moe.mx import block_scale as block_scale
from inductor_ext.moe.mx import ceil_div as ceil_div
from inductor_ext.moe.mx import check_offs as check_offs
from inductor_ext.moe.mx import group_starts as group_starts
from inductor_ext.moe.mx import grouped_shape as grouped_shape
from inductor_ext.moe.mx import quantize as quantize
from inductor_ext.moe.mx import round_up as round_up
from inductor_ext.moe.mx import swizzle as swizzle
from inductor_ext.moe.mx import swizzled_offset as swizzled_offset
from inductor_ext.moe.mx import swizzled_shape as swizzled_shape
from inductor_ext.moe.mx import unswizzle as unswizzle

GRANULARITY = "mx"


def check_granularity(name: str, x: torch.Tensor, rounding: str, program: str, dtype: torch.dtype) -> None:
    """The error of such an op's arguments, if there is one; ``x`` has the columns of what is quantised."""
    if rounding not in ROUNDINGS or program:
        found = f"{rounding!r} and {program!r}"
        raise ValueError(f"{name}: scale_program and program: wanted rceil or floor and nothing for mx, found {found}")
    if dtype is not DATA:
        raise TypeError(f"{name}: dtype: wanted float8_e4m3fn for mx, found {dtype}")
    if x.dim() == 0 or x.shape[-1] % BLOCK != 0:
        raise ValueError(f"{name}: wanted rows of a multiple of {BLOCK} elements for mx, found shape {tuple(x.shape)}")


def scale_shape(x: torch.Tensor) -> tuple[int, ...]:
    """Of plain scales."""
    return (*x.shape[:-1], x.shape[-1] // BLOCK)


def quantisation_types(rounding: str) -> tuple[str, ...]:
    """The C++ template arguments in the place of ``steps.quantisation_types``."""
    scale = f"inductor_ext::MxScale<inductor_ext::mx::{rounding.capitalize()}>"
    return "__nv_fp8_e4m3", "true", "__nv_fp8_e8m0", scale, "inductor_ext::Steps<>"
