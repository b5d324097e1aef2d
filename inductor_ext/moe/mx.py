"""MXFP8 in PyTorch's operators: the scale of a block, its data, and how scales lie in memory.

A block is 32 consecutive elements of a row; amax = max |x| over it, in x's own dtype, NaN propagates.

    scale = 2^(byte - 127)                 an e8m0 byte; 255 is NaN
    "rceil"   the least power of two that is not below amax / 448 in fp32 (cuBLAS; CUDA's e8m0 conversion); infinity: byte 254
    "floor"   2^(floor(log2 amax) - 8), OCP MX 1.0: values up to 1.75 times amax's power of two fit, larger ones saturate
    data  = saturating cast of x / scale to e4m3, to nearest even

Bytes are those of torchao's ``to_mx`` in both modes, the edges too: a block whose scale is 2^-127 is divided by 1 ("rceil":
all of it is zero in e4m3 anyway) or by 2^-126 ("floor"); a NaN in a block makes the whole block NaN ("rceil"), or only itself
and infinities while the rest becomes zero ("floor"), the scale being NaN both times. One difference: torchao takes an fp32
logarithm, whose rounding hides an amax that is less than about 2^-17 above 448·2^k; the scale here is then one power of two
larger, as cuBLAS's is. It needs fp32 input: bf16 and fp16 have no such numbers.

Plain scales are [T, K/32]. Swizzled scales are what tensor cores of compute capability 10.0 read: tiles of 128 rows by 4,

    byte (r % 32)·16 + (r / 32)·4 + c   of a tile's 512;   tiles along K first, then along rows

so that a group of rows, padded to 128, is one run of memory. Rows and scales that pad are zero.
"""

from __future__ import annotations

import torch

BLOCK = 32  # elements with one scale
TILE_ROWS, TILE_COLS = 128, 4  # of swizzled scales
ROUNDINGS = ("rceil", "floor")
DATA, SCALE = torch.float8_e4m3fn, torch.float8_e8m0fnu

_ROUND_UP = 0x1FFFFF  # carries into the exponent where the mantissa is above 1.75, 448's
_STICKY = (8 << 23) + 0x600001  # the one amax above 448·2^-127 whose quotient by 448 rounds to 2^-127, a subnormal number


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def round_up(size: int, multiple: int) -> int:
    return ceil_div(size, multiple) * multiple


# ---- scales and data -------------------------------------------------------------------------------------------------


def block_scale(amax: torch.Tensor, rounding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The e8m0 byte (uint8) of blocks with that amax, and the fp32 factor that their elements are multiplied by."""
    amax = amax.float()
    bits = amax.view(torch.int32)
    if rounding == "rceil":
        byte = ((bits - (bits == _STICKY).int() + _ROUND_UP) >> 23) - 8
        byte = torch.where(amax.isinf(), 254, byte.clamp(min=0))
    else:
        byte = ((bits >> 23) - 8).clamp(min=0)
    byte = torch.where(amax.isnan(), 255, byte)
    factor = ((254 - byte).clamp(min=1) << 23).view(torch.float32)  # 2^(127 - byte); 2^126 and 2^-126 are as far as this goes
    if rounding == "rceil":
        factor = torch.where(byte == 0, 1.0, torch.where(byte == 254, 2.0**-127, factor))
        factor = torch.where(byte == 255, torch.nan, factor)
    else:
        factor = torch.where(byte == 0, 2.0**126, torch.where(byte == 255, 0.0, factor))
    return byte.to(torch.uint8), factor


def quantize(x: torch.Tensor, rounding: str, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [..., K] as e4m3 data of its shape and plain e8m0 scales [..., K / 32], both contiguous.

    ``block``: so many elements, a multiple of 32 that divides K, get one scale, which is stored once for each 32 of them.
    """
    blocks = x.contiguous().view(*x.shape[:-1], x.shape[-1] // block, block)
    byte, factor = block_scale(blocks.abs().amax(-1), rounding)
    scaled = blocks.float() * factor.unsqueeze(-1)
    return scaled.clamp(-448.0, 448.0).to(DATA).view(x.shape), byte.repeat_interleave(block // BLOCK, -1).view(SCALE)


def dequantize(data: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """MXFP8 with plain scales as numbers; exact in float64, and within their range in bf16 and float32."""
    values = data.to(dtype).unflatten(-1, (-1, BLOCK))
    return (values * power_of_two(scales).to(dtype).unsqueeze(-1)).flatten(-2)


def power_of_two(scales: torch.Tensor) -> torch.Tensor:
    """e8m0 as float32, whatever this torch's own cast makes of the edges: byte 0 is 2^-127, a subnormal, and 255 NaN."""
    exponent = scales.view(torch.uint8).to(torch.int32)
    edge = (exponent == 0) | (exponent == 255)
    return torch.where(edge, (exponent << 23) | (1 << 22), exponent << 23).view(torch.float32)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def swizzled_shape(rows: int, cols: int) -> tuple[int, int]:
    """Of the swizzled scales of one group of ``rows`` rows with ``cols`` scales each, padded."""
    return round_up(rows, TILE_ROWS), round_up(cols, TILE_COLS)


def grouped_shape(rows: int, cols: int, groups: int) -> tuple[int, int]:
    """Of the swizzled scales of ``rows`` rows in ``groups`` groups, wherever they end: torchao's bound."""
    return rows + TILE_ROWS * groups, round_up(cols, TILE_COLS)


def group_starts(offs: torch.Tensor) -> torch.Tensor:
    """The first padded row of each group, and behind the last one all of them: [E + 1] int64, from cumulative ends [E]."""
    ends = torch.nn.functional.pad(offs.long(), (1, 0))
    return torch.nn.functional.pad((ends.diff() + (TILE_ROWS - 1)) // TILE_ROWS * TILE_ROWS, (1, 0)).cumsum(0)


def swizzled_offset(row: torch.Tensor, col: torch.Tensor, cols: int) -> torch.Tensor:
    """Where in a group's memory the scale ``col`` of its row ``row`` is; ``cols`` scales a row, not padded."""
    tile = row // TILE_ROWS * ceil_div(cols, TILE_COLS) + col // TILE_COLS
    return tile * (TILE_ROWS * TILE_COLS) + row % 32 * 16 + row % TILE_ROWS // 32 * 4 + col % TILE_COLS


def swizzle(scales: torch.Tensor, offs: torch.Tensor | None = None) -> torch.Tensor:
    """Plain scales swizzled: [T, C] as one group or, with ``offs``, as groups of rows; [E, N, C] as E groups, [E, bytes]."""
    if scales.dim() == 3:
        if scales.shape[0] == 0:
            return scales.new_empty(0, _bytes(swizzled_shape(*scales.shape[1:])))
        return torch.stack([swizzle(group).view(torch.uint8).flatten() for group in scales]).view(SCALE)
    rows, cols = scales.shape
    shape = swizzled_shape(rows, cols) if offs is None else grouped_shape(rows, cols, offs.shape[0])
    made = torch.zeros(_bytes(shape) + 1, dtype=torch.uint8, device=scales.device)  # one more for rows of no group
    made[_places((rows, cols), offs, made.numel() - 1, scales.device)] = scales.view(torch.uint8)
    return made[:-1].view(SCALE).view(shape)


def unswizzle(swizzled: torch.Tensor, rows: int, cols: int, offs: torch.Tensor | None = None) -> torch.Tensor:
    """Plain scales [rows, cols] from what `swizzle` made of them; rows of no group are zero bytes."""
    flat = torch.nn.functional.pad(swizzled.contiguous().view(torch.uint8).flatten(), (0, 1))
    return flat[_places((rows, cols), offs, flat.numel() - 1, swizzled.device)].view(SCALE)


def _places(shape: tuple[int, ...], offs: torch.Tensor | None, nowhere: int, device: torch.device) -> torch.Tensor:
    """The place of every plain scale in the swizzled buffer, ``nowhere`` for rows of no group."""
    rows, cols = shape
    row, col = torch.arange(rows, device=device), torch.arange(cols, device=device)
    if offs is None:
        return swizzled_offset(row[:, None], col, cols)
    group = torch.searchsorted(offs.long(), row, right=True)
    inside = group < offs.shape[0]
    start = torch.nn.functional.pad(offs.long(), (1, 0))[group]
    padded = group_starts(offs)[group] + row - start  # groups begin at whole tiles: a row of the buffer is one of a group
    return torch.where(inside[:, None], swizzled_offset(padded[:, None], col, cols), nowhere)


def _bytes(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def check_offs(name: str, offs: torch.Tensor, rows: int) -> None:
    """ValueError unless ``offs`` are cumulative ends of groups of ``rows`` rows. Reads them: one host sync on a GPU."""
    ends = [0, *offs.tolist(), rows]
    if sorted(ends) != ends:
        raise ValueError(f"{name}: offs: wanted cumulative ends from 0 to {rows}, the rows of x, found {ends[1:-1]}")
