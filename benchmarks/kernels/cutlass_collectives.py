"""CUTLASS's own SM90 collectives behind scaled_mm's interface: what our kernels are compared with, in speed and in build time.

    product = load(128, 128, pingpong=True, cluster_m=2, exact=False)
    product(a, b, scale_a, scale_b, bias, out)

Operands are those of ``kernels/scaled_mm/op.py``: a [M, K] row-major, b [K, N] column-major, scales of one element or a vector,
bias or None; ``out`` is written. Nothing is allocated, and the kernel may start while the one ahead of it ends, as ours do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from inductor_ext import jit, settings
from inductor_ext.kernels.scaled_mm.config import CPP_TYPES

E4 = torch.float8_e4m3fn
Product = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A tile of ``tile_m`` × ``tile_n``, its schedule, and how many CTAs along M share b's tile."""

    tile_m: int
    tile_n: int
    pingpong: bool
    cluster_m: int
    exact: bool

    @property
    def name(self) -> str:
        schedule = "pingpong" if self.pingpong else "cooperative"
        cluster = f" cluster {self.cluster_m}x1" if self.cluster_m > 1 else ""
        return f"cutlass {self.tile_m}x{self.tile_n} {schedule}{cluster} {'exact' if self.exact else 'fast'}"

    def spec(self, arch: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> jit.JitSpec:
        """The binary for (a's, b's, out's) dtypes."""
        flags = str(self.pingpong).lower(), self.cluster_m, str(self.exact).lower()
        types = ", ".join(CPP_TYPES[dtype] for dtype in dtypes)
        made = f"inductor_ext::ScaledMmCollectives<{types}, {self.tile_m}, {self.tile_n}, {flags[0]}, {flags[1]}, {flags[2]}>"
        exports = ("run", f"{made}::run"), ("run_group", f"{made}::run_group")
        return jit.JitSpec("scaled_mm_cutlass", "scaled_mm/collectives.cuh", exports, arch)


#: vLLM's choices for Hopper by M: 65 to 128, above, and from 8192 with a long K; and the widest cooperative tile.
USUAL = tuple(
    Collective(*tile, exact=exact)
    for exact in (False, True)
    for tile in ((64, 128, True, 1), (128, 128, True, 2), (128, 256, False, 1), (256, 128, False, 2))
)


def load(
    tile_m: int,
    tile_n: int,
    pingpong: bool,
    cluster_m: int,
    exact: bool,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (E4, E4, torch.bfloat16),
) -> Product:
    """``product(a, b, scale_a, scale_b, bias, out)`` for the current GPU; ``InductorExtError`` when it cannot be built."""
    options = settings.current()
    chosen = Collective(tile_m, tile_n, pingpong, cluster_m, exact)
    run = jit.load(chosen.spec(jit.current_arch(options) or "sm_90a", dtypes), options).run

    def product(a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Any, out: Any) -> None:
        run(a, b, scale_a, scale_b, bias, out, False, cluster_m, 1)

    return product
