"""An output projection, the residual and the norm after it: the residual added by the norm, or by the product.

    python -m benchmarks.kernels.scaled_mm_add --out benchmarks/results/h200/scaled_mm_add.json
    python -m benchmarks.kernels.scaled_mm_add --table-of benchmarks/results/h200/scaled_mm_add.json     (needs no GPU)

    apart   scaled_mm, by PyTorch's operator or by ours, whichever is faster here; then rms_norm_quantize with the residual
    added   scaled_mm_add in every configuration; then rms_norm_quantize of the sum

One line a product, of Qwen3-0.6B and Llama-3.1-8B. Each configuration is first compared, byte for byte, with its own product
and PyTorch's addition. scaled_mm_fused.py says how it is timed.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from benchmarks.kernels import scaled_mm_cases as cases
from benchmarks.kernels.scaled_mm_fused import BF16, E4, Fused, specs
from benchmarks.kernels.shared import built
from inductor_ext.kernels.rms_norm_quantize.op import OP as RMS_NORM
from inductor_ext.kernels.rms_norm_quantize.op import TORCHAO_PROGRAM, TORCHAO_SCALE
from inductor_ext.kernels.scaled_mm.op import OP as SCALED_MM
from inductor_ext.kernels.scaled_mm_add.op import OP, TABLE

SHAPES = ((1024, 2048), (1024, 3072), (4096, 4096), (4096, 14336))  # N, K of o and down
TOKENS = (512, 1024, 4096, 7168, 16384)
CONFIGS = ("tile:128x128p", "tile:128x160p", "tile:128x128c", "tile:128x128p@2x1", "tile:64x128p")
COLUMNS = "ours and the norm after it, µs", "two launches and the norm, µs"
FUSED = Fused(TABLE, "added", CONFIGS, COLUMNS, "a product and a norm that adds")


class Case:
    """One set of buffers."""

    def __init__(self, problem: cases.Problem) -> None:
        self.problem, self.x = problem, cases.operands(problem)
        m, n = problem.m, problem.n
        self.residual, self.total = (torch.randn(m, n, device="cuda").to(BF16) for _ in range(2))
        self.weight = torch.rand(n, device="cuda").to(BF16)
        self.quantised = torch.empty(m, n, device="cuda", dtype=E4)
        self.scale = torch.empty((m, 1), device="cuda")
        self.none = self.total.new_empty(0)

    def norm(self, x: torch.Tensor, residual: torch.Tensor | None) -> None:
        total = self.none if residual is None else self.total
        arguments = (x, residual, self.weight, 1e-6, "cast mul", "row", TORCHAO_SCALE, TORCHAO_PROGRAM, E4, [])
        RMS_NORM._call(*arguments, out0=self.quantised, out1=self.scale, out2=total)

    def by_torch(self) -> None:
        self.norm(cases.stock(self.problem, self.x)(), self.residual)

    def ours(self, config: str) -> None:
        self.product(config, self.x.out)
        self.norm(self.x.out, self.residual)

    def fused(self, config: str) -> None:
        self.add(config, self.total)
        self.norm(self.total, None)

    def add(self, config: str, out: torch.Tensor) -> None:
        x, p = self.x, self.problem
        OP._call(x.a, x.b, x.scale_a, x.scale_b, None, self.residual, p.out_dtype, p.fast, True, config, out=out)

    def product(self, config: str, out: torch.Tensor) -> None:
        x, p = self.x, self.problem
        SCALED_MM._call([x.a], [x.b], [x.scale_a], [x.scale_b], [None], p.out_dtype, p.fast, True, config, out=out)

    def check(self, config: str) -> None:
        product, found = torch.empty_like(self.total), torch.full_like(self.total, float("nan"))
        self.product(config, product)
        self.add(config, found)
        if not torch.equal(found, product + self.residual):
            raise RuntimeError(f"{config} at {self.problem.label}: the sum is not that of the product and the residual")


def measure(problem: cases.Problem) -> dict[str, Any]:
    moved = problem.bytes + 3 * problem.m * problem.n * BF16.itemsize
    return FUSED.measure(lambda: Case(problem), moved, problem.chosen.config.name, problem.row)


def build(chosen: list[Any]) -> None:
    apart = [problem.chosen.config.name for (problem,) in chosen]
    built([*specs(OP, CONFIGS), *specs(SCALED_MM, {*CONFIGS, *apart})])


PROBLEMS = [
    (cases.Problem(m, n, k, rowwise, True),) for (n, k), rowwise, m in itertools.product(SHAPES, (True, False), TOKENS)
]

if __name__ == "__main__":
    FUSED.script(measure, PROBLEMS, build)
