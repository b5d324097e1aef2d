"""mxfp8_grouped_mm's kernels for compute capability 10.0: which calls they serve, which tile a call takes, how one is made.

A tile is named ``blackwell:<output channels>x<tokens>``, ``@2x1`` where two SMs share it (``blackwell.cuh``).

No kernel of these has run: the project had no Blackwell GPU. `TILES` is a guess, made of what a tile wastes and not of
measurements: a group of 20 tokens fills a third of 64 columns, and a sixth of 128.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

TARGET = "sm_100a"
SOURCE = "mxfp8_grouped_mm/blackwell.cuh"
DATA = torch.float8_e4m3fn
OUT_TYPES = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half", torch.float32: "float"}

#: (tokens a group on average, up to which it is taken; name; its template arguments)
TILES = (
    (64, "blackwell:128x64", (128, 64, 1)),
    (128, "blackwell:128x128", (128, 128, 1)),
    (512, "blackwell:256x128@2x1", (256, 128, 2)),
    (None, "blackwell:256x256@2x1", (256, 256, 2)),
)
ARGUMENTS = {name: arguments for _, name, arguments in TILES}

# ---- which kernel ----------------------------------------------------------------------------------------------------


def unsupported(x: Any, x_scale: Any, w: Any, out_dtype: torch.dtype, swizzled: bool) -> tuple[str, str] | None:
    """What is wanted and what was found instead where no kernel of these can serve a call; None where one can."""
    if x_scale is None:
        return "x in MXFP8 too: tensor cores multiply it with MXFP8 weights, and bf16 they do not", f"{x.dtype} without x_scale"
    if x_scale.dtype is torch.float32:
        return "x in MXFP8: a scale for 32 elements along K", "one for each row"
    if not swizzled:
        return "scales in tiles of 128 x 4, as tensor cores of compute capability 10.0 read them", "plain scales"
    multiple = 16 // out_dtype.itemsize
    if w.shape[1] % multiple:
        return f"N to be a multiple of {multiple}: rows of out start at multiples of 16 bytes", f"N = {w.shape[1]}"
    return None


def slower(x: Any, x_scale: Any, w: Any) -> None:
    """Nothing was measured."""


def tile(tokens: int, experts: int) -> str:
    """By tokens a group, on average: how many each really has is known on the device alone."""
    mean = tokens / max(experts, 1)
    return next(name for most, name, _ in TILES if most is None or mean <= most)


def keys(x: Any, x_scale: Any, w: Any, out_dtype: torch.dtype, w_block: int) -> list[Hashable]:
    """The key of a call or, where the number of tokens is symbolic, every key that some number leads to."""
    tokens = x.shape[0]
    return [(name, out_dtype) for name in ([tile(tokens, w.shape[0])] if isinstance(tokens, int) else ARGUMENTS)]


# ---- scratch ---------------------------------------------------------------------------------------------------------


def scratch_bytes(experts: int, sms: int) -> int:
    """``scratch_bytes`` of blackwell.cuh, which checks it: 5 TMA descriptors an SM, and the arrays of all groups.

    The first descriptor is at a multiple of 128 bytes, wherever the buffer starts.
    """

    def array(size: int) -> int:
        return -(-experts * size // 64) * 64

    return 128 * (5 * sms + 1) + array(12) + 8 * array(8) + 2 * array(20)


def scratch(x: Any, x_scale: Any, w: Any) -> int:
    return scratch_bytes(w.shape[0], torch.cuda.get_device_properties(x.device).multi_processor_count)


# ---- the kernel ------------------------------------------------------------------------------------------------------


def made(key: Any) -> str:
    """The C++ class of a key."""
    name, out_dtype = key
    return f"inductor_ext::Mxfp8GroupedBlackwell<{', '.join(map(str, (OUT_TYPES[out_dtype], *ARGUMENTS[name])))}>"


def exports(key: Any) -> tuple[tuple[str, str], ...]:
    return (("run", f"{made(key)}::run"),)


def bind(module: Any, key: Any) -> Callable[..., None]:
    launch = module.run

    def run(x: Any, x_scale: Any, w: Any, w_scale: Any, offs: Any, out: Any, kept: Any = None) -> None:
        if kept is None:  # a call outside of compiled code
            kept = x.new_empty(scratch(x, x_scale, w), dtype=torch.uint8)
        launch(x, x_scale, w, w_scale, offs, out, kept)

    return run


def examples() -> Sequence[Hashable]:
    """For few tokens a group and for many: one SM, and two."""
    return (("blackwell:128x64", torch.bfloat16), ("blackwell:256x128@2x1", torch.bfloat16))
