"""mxfp8_grouped_mm's kernels for compute capability 9.0: which calls they serve, which tile a call takes, how one is made.

A tile is named ``hopper:<output channels>x<tokens>``, of a CTA; with ``@2`` two CTAs with neighbouring channels bring the same
tokens once for both, and with ``@1x2`` two with neighbouring tokens the same weights (``hopper.cuh``). `TILES` was measured
(``benchmarks/kernels/mxfp8_grouped_mm.py --tune``); why it came out so:

* Weights are read once where an expert's tokens fit one tile, so tiles are wider than a group is on average: groups differ most
  where they have few tokens (random routing: mean 4, 2 % of the groups above 8).
* Every tile reads its tokens again. 64 tokens in bf16 are 16 KB for 128 of K, 64 rows of weights are 8: L2 gives 5.5 TB/s at
  most, so weights at 4 TB/s leave 1.5 for tokens. That is why tiles of more tokens have more rows. A tile brings its tokens in
  boxes of 8 to 32, as many as its group has, so that a wide tile costs a small group little.
* 64 × 8 runs twice on an SM: one token of Qwen3-30B-A3B is 192 tiles of 64 rows, for 264 places.
* 128 × 256 uses each converted weight for twice as many tokens as 256 × 128. Its tokens are 64 KB for 128 of K, which two CTAs
  share.
* One scale of weights for 128 of K, not 32, lets FP8 tensor cores add four products before an FFMA a sum. L2 then is a limit
  too: 256 × 128 reads 48 KB for 128 of K, 40 with tokens shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

TARGET = "sm_90a"
SOURCE = "mxfp8_grouped_mm/hopper.cuh"
DATA = torch.float8_e4m3fn
#: What x may be, and the name in C++ of what the kernel reads: bf16; MXFP8, which a launch before it makes bf16; e4m3 with one
#: fp32 scale a row; the same with weights whose four scales of each 128 elements along K are equal: only the first is read.
KINDS = {"bf16": "kBf16", "mxfp8": "kBf16", "fp8": "kFp8", "fp8_128": "kFp8By128"}
OUT_TYPES = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half", torch.float32: "float"}
MAX_EXPERTS = 1024
MAX_SIZE = 1 << 24
MOST_ROWS = 2048  # of bf16 tokens an expert: see `slower`

#: (tokens a group on average, up to which it is taken; tile), by kind of x: the fastest of ``--tune`` on an H200, both matmuls
#: of both models taken together (benchmarks/results/h200/mxfp8_grouped_mm_tiles.json)
TILES: dict[str, tuple[tuple[float, str], ...]] = {
    "bf16": (
        (1, "hopper:64x8"),
        (5, "hopper:128x8"),
        (12, "hopper:128x16"),
        (24, "hopper:128x32"),
        (64, "hopper:256x64"),
        (180, "hopper:128x128@2"),
        (512, "hopper:256x128@2"),
        (float("inf"), "hopper:128x256@2"),
    ),
    "fp8": (
        (1, "hopper:64x8"),
        (12, "hopper:64x16"),
        (24, "hopper:128x32"),
        (64, "hopper:256x64"),
        (float("inf"), "hopper:256x128@2"),
    ),
    "fp8_128": (
        (1, "hopper:64x8"),
        (12, "hopper:64x32"),
        (24, "hopper:128x32"),
        (64, "hopper:64x64"),
        (float("inf"), "hopper:256x128@2"),
    ),
}
TILES["mxfp8"] = TILES["bf16"]

_ALL = tuple(f"hopper:{w}x{n}" for w in (64, 128, 256) for n in (8, 16, 32, 64, 128) if (w, n) != (64, 128))
_CLUSTERS = "hopper:128x128@2", "hopper:256x128@2", "hopper:256x128@1x2"
_OF_256 = "hopper:128x256", "hopper:128x256@2"

#: Every tile that compiles: what ``--tune`` compares.
ALL_TILES: dict[str, tuple[str, ...]] = {
    "bf16": (*_ALL, *_CLUSTERS, *_OF_256),
    "fp8": (*_ALL, *_CLUSTERS),
    "fp8_128": (*_ALL, *_CLUSTERS),
}

# ---- which kernel ----------------------------------------------------------------------------------------------------


def unsupported(x: Any, x_scale: Any, w: Any, out_dtype: torch.dtype, swizzled: bool) -> tuple[str, str] | None:
    """What is wanted and what was found instead where no kernel of these can serve a call; None where one can."""
    if swizzled:
        return "plain scales", "scales in tiles of 128 x 4, which compute capability 9.0 has no use for"
    if x_scale is None and x.dtype is not torch.bfloat16:
        # Weights times their scales need bf16's range, and bf16 is three bits too short for fp16 x.
        return "x in bfloat16, FP8 or MXFP8", f"{x.dtype}"
    experts, n, k = w.shape
    if n % 8:
        return "N to be a multiple of 8: rows of out start at multiples of 16 bytes", f"N = {n}"
    if experts > MAX_EXPERTS:
        return f"at most {MAX_EXPERTS} experts, whose ends fit in shared memory", f"{experts}"
    if n > MAX_SIZE or k > MAX_SIZE:
        return f"N and K of at most {MAX_SIZE}", f"N = {n}, K = {k}"
    return None


def slower(x: Any, x_scale: Any, w: Any) -> tuple[str, str] | None:
    """What is wanted and what was found where a bf16 copy of the weights and PyTorch's product take less; None elsewhere.

    Measured on an H200 with bf16 tokens: 0.84 to 0.92 of the speed of PyTorch's product of bf16 weights at 1 024 rows an
    expert, 0.80 to 0.82 at 4 096. A step that makes the copy moves 3 bytes a weight more: at 4 TB/s, by reckoning, the kernel
    is then 1.02 to 1.10 times as fast at 1 024 rows, and 0.86 at 4 096.
    """
    tokens, experts = x.shape[0], w.shape[0]
    if (x_scale is not None and x_scale.dtype is torch.float32) or not isinstance(tokens, int) or tokens <= MOST_ROWS * experts:
        return None
    return f'at most {MOST_ROWS} rows an expert, or FP8 tokens (activations="fp8")', f"{tokens // max(experts, 1)} rows in bf16"


def kind(x_scale: torch.Tensor | None, w_block: int) -> str:
    if x_scale is None:
        return "bf16"
    if x_scale.dtype is not torch.float32:
        return "mxfp8"
    return "fp8_128" if w_block == 128 else "fp8"


def tile(kind: str, tokens: int, experts: int) -> str:
    """By tokens a group, on average: how many each really has is known on the device alone."""
    mean = tokens / max(experts, 1)
    return next(name for most, name in TILES[kind] if mean <= most)


def keys(x: Any, x_scale: Any, w: Any, out_dtype: torch.dtype, w_block: int) -> list[Hashable]:
    """The key of a call or, where the number of tokens is symbolic, every key that some number leads to."""
    of, tokens = kind(x_scale, w_block), x.shape[0]
    names = [tile(of, tokens, w.shape[0])] if isinstance(tokens, int) else dict.fromkeys(name for _, name in TILES[of])
    return [(name, of, out_dtype) for name in names]


# ---- the kernel ------------------------------------------------------------------------------------------------------


def sizes(name: str) -> tuple[int, int, int]:
    """A tile's output channels and tokens of a CTA, and the CTAs of a cluster."""
    channels, tokens = map(int, name.partition(":")[2].partition("@")[0].split("x"))
    return channels, tokens, math.prod(_cluster(name))


def _cluster(name: str) -> tuple[int, int]:
    """A cluster's CTAs along channels and along tokens."""
    channels, _, tokens = name.partition("@")[2].partition("x")
    return int(channels or 1), int(tokens or 1)


def made(key: Any) -> str:
    """The C++ class of a key."""
    name, kind, out_dtype = key
    of = f"inductor_ext::GroupedX::{KINDS[kind]}", OUT_TYPES[out_dtype], *map(str, (*sizes(name)[:2], *_cluster(name)))
    return f"inductor_ext::Mxfp8GroupedMm<{', '.join(of)}>"


def exports(key: Any) -> tuple[tuple[str, str], ...]:
    run = (("run", f"{made(key)}::run"),)
    return (*run, ("to_bf16", "inductor_ext::Mxfp8ToBf16::run")) if key[1] == "mxfp8" else run


def scratch(x: Any, x_scale: Any, w: Any) -> Any:
    """Bytes of x in bf16, where it is MXFP8."""
    return 2 * x.shape[0] * x.shape[1] if kind(x_scale, 32) == "mxfp8" else 0


def bind(module: Any, key: Any) -> Callable[..., None]:
    launch = module.run
    if key[1] != "mxfp8":
        return lambda x, x_scale, w, w_scale, offs, out, scratch=None: launch(x, x_scale, w, w_scale, offs, out)
    to_bf16 = module.to_bf16

    def run(x: Any, x_scale: Any, w: Any, w_scale: Any, offs: Any, out: Any, scratch: Any = None) -> None:
        if scratch is None:  # a call outside of compiled code
            scratch = torch.empty(2 * x.numel(), dtype=torch.uint8, device=x.device)
        to_bf16(x, x_scale, scratch)
        launch(scratch.view(torch.bfloat16).view(x.shape), None, w, w_scale, offs, out)

    return run


def examples() -> Sequence[Hashable]:
    """What CI compiles: a narrow and the widest tiles, and x in MXFP8 and FP8."""
    widest = ("256x128", "bf16"), ("128x256@2", "bf16"), ("64x16", "mxfp8"), ("256x128", "fp8"), ("256x128@2", "fp8_128")
    return [(f"hopper:{tile}", kind, torch.bfloat16) for tile, kind in (("64x8", "bf16"), *widest)]
