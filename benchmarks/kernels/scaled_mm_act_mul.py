"""Gate and up, the activation and its quantisation: two launches, the first of which stores gate and up, or their product.

    python -m benchmarks.kernels.scaled_mm_act_mul --out benchmarks/results/h200/scaled_mm_act_mul.json
    python -m benchmarks.kernels.scaled_mm_act_mul --table-of benchmarks/results/h200/scaled_mm_act_mul.json     (needs no GPU)

    apart   both products side by side by ours, as scaled_mm's table says, or by PyTorch's operator twice, whichever is faster
            here; then act_mul_quantize
    gated   scaled_mm_act_mul in every configuration; then fp8_quantize

One line a problem, N being that of one product. Each configuration is first compared, byte for byte, with its own products and
PyTorch's activation. scaled_mm_fused.py says how it is timed.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from benchmarks.kernels import scaled_mm_cases as cases
from benchmarks.kernels.scaled_mm_fused import BF16, E4, Fused, specs
from benchmarks.kernels.shared import built
from inductor_ext.kernels.act_mul_quantize.op import OP as ACT_MUL
from inductor_ext.kernels.act_mul_quantize.op import TORCHAO_PROGRAM, TORCHAO_SCALE
from inductor_ext.kernels.fp8_quantize.op import OP as QUANTIZE
from inductor_ext.kernels.scaled_mm.op import OP as SCALED_MM
from inductor_ext.kernels.scaled_mm_act_mul.op import OP, TABLE

SHAPES = ((3072, 1024), (12288, 4096), (14336, 4096))  # N, K of gate, and of up: Qwen3-0.6B, Qwen3-8B, Llama-3.1-8B
TOKENS = (512, 1024, 2048, 4096, 7168, 16384)
CONFIGS = (
    "tile:128x128p", "tile:64x256p", "tile:128x128c", "tile:128x256c", "tile:128x128p@2x1", "tile:128x256c@2x1",
    "tile:256x128c@2x1",
)  # fmt: skip
COLUMNS = "ours and the quantisation after it, µs", "the products and act_mul_quantize, µs"
FUSED = Fused(TABLE, "gated", CONFIGS, COLUMNS, "the products and act_mul_quantize")


class Case:
    """One set of buffers. ``problem.n`` is that of both products together."""

    def __init__(self, problem: cases.Problem) -> None:
        self.problem, self.x = problem, cases.operands(problem)
        m, n = problem.m, problem.n // 2
        self.b = self.x.b[:, :n], self.x.b[:, n:]
        row = self.x.scale_b.numel() > 1
        self.scale_b = (self.x.scale_b[:, :n], self.x.scale_b[:, n:]) if row else (self.x.scale_b, self.x.scale_b)
        self.y = torch.empty(m, n, device="cuda", dtype=BF16)
        self.parts = tuple(torch.empty(m, n, device="cuda", dtype=BF16) for _ in range(2))
        self.quantised = torch.empty(m, n, device="cuda", dtype=E4)
        self.scale = torch.empty((m, 1) if problem.rowwise else (), device="cuda")
        self.how = ("row" if problem.rowwise else "tensor", TORCHAO_SCALE, TORCHAO_PROGRAM, E4)

    def products(self, config: str) -> tuple[torch.Tensor, torch.Tensor]:
        x, p = self.x, self.problem
        none = [None, None]
        SCALED_MM._call([x.a], [*self.b], [x.scale_a], [*self.scale_b], none, p.out_dtype, p.fast, True, config, out=x.out)
        gate, up = x.out.chunk(2, 1)
        return gate, up

    def activate(self, products: tuple[torch.Tensor, ...]) -> None:
        ACT_MUL._call(*products, "silu", *self.how, [], out0=self.quantised, out1=self.scale)

    def by_torch(self) -> None:
        x, p = self.x, self.problem
        options: Any = {"out_dtype": p.out_dtype, "use_fast_accum": p.fast}
        for b, scale, out in zip(self.b, self.scale_b, self.parts):
            torch._scaled_mm(x.a, b, x.scale_a, scale, out=out, **options)
        self.activate(self.parts)

    def ours(self, config: str) -> None:
        self.activate(self.products(config))

    def fused(self, config: str) -> None:
        self.gate(config, self.y)
        QUANTIZE._call(self.y, *self.how, out0=self.quantised, out1=self.scale)

    def gate(self, config: str, out: torch.Tensor) -> None:
        x, p = self.x, self.problem
        rest = (None, None, "silu", p.out_dtype, p.fast, True, config)
        OP._call(x.a, *self.b, x.scale_a, *self.scale_b, *rest, out=out)

    def check(self, config: str) -> None:
        found = torch.full_like(self.y, float("nan"))
        self.gate(config, found)
        gate, up = self.products(config)
        wanted = torch.nn.functional.silu(gate) * up
        if not torch.equal(found, wanted):
            apart = (found != wanted).sum().item()
            raise RuntimeError(f"{config} at {self.problem.label}: {apart} values are not the activation of its products")


def measure(problem: cases.Problem) -> dict[str, Any]:
    moved = problem.bytes + 2 * problem.m * problem.n * BF16.itemsize
    return FUSED.measure(lambda: Case(problem), moved, problem.chosen.config.name, {**problem.row, "n": problem.n // 2})


def build(chosen: list[Any]) -> None:
    wanted = specs(OP, CONFIGS, "silu") + specs(SCALED_MM, {*CONFIGS, *(p.chosen.config.name for (p,) in chosen)})
    for granularity in ("row", "tensor"):
        how = (granularity, TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
        wanted += [QUANTIZE.spec_of_key((BF16, *how), "sm_90a"), ACT_MUL.spec_of_key((BF16, "silu", *how), "sm_90a")]
    built(wanted)


PROBLEMS = [
    (cases.Problem(m, 2 * n, k, rowwise, True),) for (n, k), rowwise, m in itertools.product(SHAPES, (True, False), TOKENS)
]

if __name__ == "__main__":
    FUSED.script(measure, PROBLEMS, build)
