"""An FP8 MLP in one go, or some of its rows at a time, so that gate and up need not leave L2.

    python -m benchmarks.kernels.mlp_chunks --out benchmarks/results/h200/mlp_chunks.json

    gate and up in one launch → SiLU(gate) · up, quantised → down, with our kernels; row-wise scales, fast accumulation

Gate and up of Qwen3-0.6B's 7168 tokens are 88 MB in bf16, more than the 50 MB of L2: the activation reads them from memory. A
chunk has buffers for its own rows alone, which the next chunk writes over, and its rows of the output. Every product of a chunk
is a launch of its own, with its own last wave. Each side is compared with the first (within 5e-3: other rows may take another
kernel); times are CUDA-graph replays, in turn, three rounds, medians, over enough inputs to find L2 cold when an MLP begins.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import timing
from benchmarks.kernels.shared import built, script
from inductor_ext.kernels.act_mul_quantize.op import OP as ACT_MUL
from inductor_ext.kernels.act_mul_quantize.op import TORCHAO_PROGRAM, TORCHAO_SCALE
from inductor_ext.kernels.scaled_mm import choice
from inductor_ext.kernels.scaled_mm.op import OP as SCALED_MM

E4, BF16 = torch.float8_e4m3fn, torch.bfloat16
MODELS = {"Qwen3-0.6B": (1024, 3072), "Qwen3-8B": (4096, 12288), "Llama-3.1-8B": (4096, 14336)}  # hidden, intermediate
TOKENS = (4096, 7168, 16384)
CHUNKS = (1, 2, 3, 4, 6, 8)
ARCH = "sm_90a"


class Mlp:
    """Weights, one input and one output."""

    def __init__(self, tokens: int, hidden: int, intermediate: int) -> None:
        def fp8(n: int, k: int) -> torch.Tensor:
            return torch.randn(n, k, device="cuda", dtype=BF16).to(E4)

        self.tokens, self.intermediate = tokens, intermediate
        self.x, self.x_scale = fp8(tokens, hidden), torch.rand(tokens, 1, device="cuda") * 0.1
        self.weights = [fp8(intermediate, hidden).t(), fp8(intermediate, hidden).t()]
        self.scales = [torch.rand(1, intermediate, device="cuda") * 0.1 for _ in range(2)]
        self.down, self.down_scale = fp8(hidden, intermediate).t(), torch.rand(1, hidden, device="cuda") * 0.1
        self.out = torch.empty(tokens, hidden, device="cuda", dtype=BF16)

    @property
    def bytes(self) -> int:
        return self.tokens * self.intermediate * 5 + sum(each.numel() for each in (*self.weights, self.down))

    def buffers(self, chunks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = -(-self.tokens // chunks)
        return (
            torch.empty(rows, 2 * self.intermediate, device="cuda", dtype=BF16),
            torch.empty(rows, self.intermediate, device="cuda", dtype=E4),
            torch.empty(rows, 1, device="cuda"),
        )

    def in_chunks(self, chunks: int) -> Callable[[], None]:
        both, made, scale = self.buffers(chunks)
        rows = len(both)

        def run() -> None:
            for first in range(0, self.tokens, rows):
                count = min(rows, self.tokens - first)
                x, x_scale, out = (each[first : first + count] for each in (self.x, self.x_scale, self.out))
                wide, quantised, of_row = both[:count], made[:count], scale[:count]
                _multiply([x], self.weights, [x_scale], self.scales, wide)
                gate, up = wide.split(self.intermediate, 1)
                recipe = ("row", TORCHAO_SCALE, TORCHAO_PROGRAM, E4, [])
                ACT_MUL._call(gate, up, "silu", *recipe, out0=quantised, out1=of_row)
                _multiply([quantised], [self.down], [of_row], [self.down_scale], out)

        return run


def _multiply(a: list[Any], b: list[Any], scale_a: list[Any], scale_b: list[Any], out: torch.Tensor) -> None:
    """As a compiled model calls it: the configuration follows from the rows."""
    SCALED_MM._call(a, b, scale_a, scale_b, [None] * len(b), BF16, True, True, "", out=out)


def build(_: Any) -> None:
    """Every kernel that some chunk takes, in parallel."""
    sizes = {-(-tokens // chunks) for tokens, chunks in itertools.product(TOKENS, CHUNKS)}
    shapes = [shape for hidden, middle in MODELS.values() for shape in ((2 * middle, hidden), (hidden, middle))]
    chosen = [choice.choose(ARCH, m, n, k, True, True) for m in sizes for n, k in shapes]
    names = {each.config.name for each in chosen if each is not None}
    specs = [SCALED_MM.spec_of_key((name, E4, E4, BF16, True), ARCH) for name in sorted(names)]
    act = ACT_MUL.spec_of_key((BF16, "silu", "row", TORCHAO_SCALE, TORCHAO_PROGRAM, E4), ARCH)
    built([*specs, act])


def measure(model: str, tokens: int) -> dict[str, Any]:
    hidden, intermediate = MODELS[model]
    first = Mlp(tokens, hidden, intermediate)
    sets = [first, *(Mlp(tokens, hidden, intermediate) for _ in range(timing.sets_for(first.bytes, 8) - 1))]
    sides = {chunks: [each.in_chunks(chunks) for each in sets] for chunks in CHUNKS}
    sides[1][0]()
    wanted = first.out.clone()
    for chunks, calls in sides.items():
        first.out.fill_(torch.nan)
        calls[0]()
        # Another number of rows may be another configuration, which sums K in another order.
        distance = float((first.out.double() - wanted.double()).norm() / wanted.double().norm())
        if not distance < 5e-3:
            raise SystemExit(f"{model}, {tokens} tokens, {chunks} chunks: another result, by {distance:.2g}")
    times = timing.in_turn(sides, replays=5, least_calls=4)
    return {
        "model": model, "tokens": tokens, "megabytes": round(tokens * intermediate * 4e-6, 1),
        "chunks": list(times), "us": [round(statistics.median(each), 2) for each in times.values()],
        "ratio": [timing.ratio(times[1], each) for each in times.values()],
    }  # fmt: skip


if __name__ == "__main__":
    script(measure, itertools.product(MODELS, TOKENS), build=build)
