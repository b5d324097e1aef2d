"""An output projection, the residual and the norm after it: the residual added by the norm, or by the product.

    python -m benchmarks.kernels.scaled_mm_add --out benchmarks/results/h200/scaled_mm_add.json
    python -m benchmarks.kernels.scaled_mm_add --table-of benchmarks/results/h200/scaled_mm_add.json     the op's table from it

    apart   scaled_mm, by PyTorch's operator or by ours, whichever is faster here; then rms_norm_quantize with the residual
    added   scaled_mm_add in every configuration; then rms_norm_quantize of the sum

One line a product, of Qwen3-0.6B and Llama-3.1-8B. Sides are CUDA-graph replays, in turn, three rounds, over enough buffers to
find L2 cold when a product begins; a norm finds what the product before it left there, as in a model. Each configuration is
first compared, byte for byte, with its own product and PyTorch's addition.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import timing
from benchmarks.kernels import scaled_mm_cases as cases
from benchmarks.kernels.scaled_mm_fused import compare, write_table
from benchmarks.kernels.shared import built, show
from inductor_ext import registry
from inductor_ext.kernels.rms_norm_quantize.op import OP as RMS_NORM
from inductor_ext.kernels.rms_norm_quantize.op import TORCHAO_PROGRAM, TORCHAO_SCALE
from inductor_ext.kernels.scaled_mm import choice
from inductor_ext.kernels.scaled_mm.op import OP as SCALED_MM
from inductor_ext.kernels.scaled_mm_add.op import OP, TABLE

E4, BF16 = torch.float8_e4m3fn, torch.bfloat16
SHAPES = ((1024, 2048), (1024, 3072), (4096, 4096), (4096, 14336))  # N, K of o and down
TOKENS = (512, 1024, 4096, 7168, 16384)
CONFIGS = ("tile:128x128p", "tile:128x160p", "tile:128x128c", "tile:128x128p@2x1", "tile:64x128p")
COMMAND = "python -m benchmarks.kernels.scaled_mm_add --table-of benchmarks/results/h200/scaled_mm_add.json"


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

    def apart(self, product: Callable[[], Any]) -> None:
        made = product()
        self.norm(self.x.out if made is None else made, self.residual)

    def added(self, config: str) -> None:
        self.add(config, self.total)
        self.norm(self.total, None)

    def add(self, config: str, out: torch.Tensor) -> None:
        x, p = self.x, self.problem
        OP._call(x.a, x.b, x.scale_a, x.scale_b, None, self.residual, p.out_dtype, p.fast, True, config, out=out)

    def product(self, config: str, out: torch.Tensor) -> None:
        x, p = self.x, self.problem
        SCALED_MM._call([x.a], [x.b], [x.scale_a], [x.scale_b], [None], p.out_dtype, p.fast, True, config, out=out)


def check(case: Case, config: str) -> None:
    product, found = torch.empty_like(case.total), torch.full_like(case.total, float("nan"))
    case.product(config, product)
    case.add(config, found)
    if not torch.equal(found, product + case.residual):
        raise RuntimeError(f"{config} at {case.problem.label}: the sum is not that of the product and the residual")


def measure(problem: cases.Problem) -> dict[str, Any]:
    moved = problem.bytes + 3 * problem.m * problem.n * BF16.itemsize
    sets = [Case(problem) for _ in range(timing.sets_for(moved, 16))]
    for config in CONFIGS:
        check(sets[0], config)
    chosen = choice.choose("sm_90a", problem.m, problem.n, problem.k, problem.rowwise, problem.fast)
    assert chosen is not None
    sides: dict[str, list[Callable[[], Any]]] = {
        "torch": [lambda c=c: c.apart(cases.stock(problem, c.x)) for c in sets],
        "ours": [lambda c=c: c.apart(lambda: c.product(chosen.config.name, c.x.out)) for c in sets],
        **{config: [lambda c=c, config=config: c.added(config) for c in sets] for config in CONFIGS},
    }
    shape = {"m": problem.m, "n": problem.n, "k": problem.k, "rowwise": problem.rowwise}
    return shape | compare(sides, CONFIGS, "added")


def main(
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("scaled_mm_add.json"),
    table_of: Annotated[Path | None, typer.Option("--table-of", help="Measure nothing: make the op's table of these.")] = None,
) -> None:
    if table_of is not None:
        columns = "ours and the norm after it, µs", "two launches and the norm, µs"
        write_table(TABLE, table_of, "added", COMMAND, columns, over="a product and a norm that adds")
        return
    registry.ops()
    built(op.spec_of_key((config, E4, E4, BF16, True), "sm_90a") for op in (OP, SCALED_MM) for config in CONFIGS)
    problems = [cases.Problem(m, n, k, rowwise, True) for n, k in SHAPES for rowwise in (True, False) for m in TOKENS]
    rows = [measure(problem) for problem in problems]
    timing.write_json(out, {"rows": rows})
    show(rows, 130, without=("all_us",))


if __name__ == "__main__":
    typer.run(main)
