"""What a scaled_mm kernel can be: its family, tile and launch options, by name.

A configuration is named in one word, which is what the tables hold and reports show:

    stream:16x64/8         16 tokens × 64 output channels a CTA, K split over a cluster of 8 (weights are wgmma's M operand)
    tile:128x160p          128 × 160 tiles, pingpong: each of two consumer warpgroups has a tile of its own
    tile:256x128c@2x1      256 × 128 tiles, cooperative, clusters of 2 × 1 CTAs that multicast what they share
    blackwell:256x128@2x1  CUTLASS's SM100 collectives, two SMs an MMA

The part before ``/`` and ``@`` is compiled in, the rest is passed at launch.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import torch

CPP_TYPES = {
    torch.float8_e4m3fn: "__nv_fp8_e4m3",
    torch.float8_e5m2: "__nv_fp8_e5m2",
    torch.bfloat16: "__nv_bfloat16",
    torch.float16: "__half",
    torch.float32: "float",
}
SOURCES = {
    "stream": "scaled_mm/stream.cuh",
    "tile": "scaled_mm/tile.cuh",
    "blackwell": "scaled_mm/blackwell.cuh",
}
#: What a tile of sums becomes when nothing is said (``ends.cuh``).
STORE = "inductor_ext::Store"
_NAME = re.compile(
    r"(?P<family>stream|tile|blackwell):(?P<m>\d+)x(?P<n>\d+)(?P<kind>[pc]?)"
    r"(/(?P<split>\d+))?(@(?P<cm>\d)x(?P<cn>\d))?"
)

#: An accumulator is 32 bits; more than this many a thread, partial sums included, spill.
_MAX_ACCUMULATORS = 208


@dataclasses.dataclass(frozen=True)
class Config:
    """``m`` tokens × ``n`` output channels a tile; ``split`` CTAs share K; clusters of ``cluster`` (along M, along N)."""

    family: str
    m: int
    n: int
    pingpong: bool = False
    split: int = 1
    cluster: tuple[int, int] = (1, 1)

    @property
    def name(self) -> str:
        kind = "" if self.family != "tile" else "p" if self.pingpong else "c"
        split = f"/{self.split}" if self.family == "stream" else ""
        cluster = "" if self.cluster == (1, 1) else f"@{self.cluster[0]}x{self.cluster[1]}"
        return f"{self.family}:{self.m}x{self.n}{kind}{split}{cluster}"

    @property
    def source(self) -> str:
        return SOURCES[self.family]

    @property
    def accumulators(self) -> int:
        """Accumulators a thread has for one tile."""
        if self.family == "stream":
            return self.m // 2
        return self.m * self.n // (128 if self.pingpong else 256)

    def supports(self, exact: bool) -> bool:
        """Whether the kernel exists: an exact one keeps the partial sums of 64 rows beside the whole."""
        if self.family == "blackwell":
            return True
        partial = (self.m if self.family == "stream" else self.n) // 2
        return self.accumulators + (partial if exact else 0) <= _MAX_ACCUMULATORS

    def cpp(
        self, a_dtype: torch.dtype, b_dtype: torch.dtype, out_dtype: torch.dtype, exact: bool, end: str = STORE
    ) -> str:
        """The C++ expression of the class whose functions the host calls; ``end``: a class of ``ends.cuh`` (tile family)."""
        assert self.family == "tile" or end == STORE, f"{self.name}: no kernel of this family does {end}"
        types = ", ".join(CPP_TYPES[dtype] for dtype in (a_dtype, b_dtype, out_dtype))
        if self.family == "stream":
            return f"inductor_ext::ScaledMmStream<{types}, {self.m}, {self.n}, {str(exact).lower()}>"
        if self.family == "tile":
            flags = f"{str(self.pingpong).lower()}, {str(exact).lower()}" + ("" if end == STORE else f", {end}")
            return f"inductor_ext::ScaledMmTile<{types}, {self.m}, {self.n}, {flags}>"
        # cuBLAS and CUTLASS have one accumulation mode on compute capability 10.0: the tensor core keeps fp32.
        return f"inductor_ext::ScaledMmBlackwell<{types}, {self.m}, {self.n}, {self.cluster[0]}>"

    def launch_options(self) -> tuple[int, int]:
        """What the host function takes besides tensors: (split, 1) or the cluster's two sizes."""
        return (self.split, 1) if self.family == "stream" else self.cluster


@functools.cache
def parse(name: str) -> Config:
    """The configuration of a name. ValueError for something else."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"wanted a configuration such as tile:128x128p@2x1, found {name!r}")
    cluster = (int(found["cm"] or 1), int(found["cn"] or 1))
    return Config(found["family"], int(found["m"]), int(found["n"]), found["kind"] == "p", int(found["split"] or 1), cluster)
