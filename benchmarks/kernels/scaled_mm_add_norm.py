"""An output projection with its residual and the norm after it: two launches against one, in clusters that have whole rows.

    python -m benchmarks.kernels.scaled_mm_add_norm --out benchmarks/results/h200/scaled_mm_add_norm.json
    python -m benchmarks.kernels.scaled_mm_add_norm --table-of benchmarks/results/h200/scaled_mm_add_norm.json   (needs no GPU)

    apart     PyTorch's product and rms_norm_quantize with the residual, or scaled_mm_add as its table says and
              rms_norm_quantize of the sum, whichever is faster here
    together  scaled_mm_add_norm in every configuration

One line a product: o and down of Qwen3-0.6B, whose rows are the widest that a cluster has. Sides are CUDA-graph replays, in
turn, over enough buffers to find L2 cold when a product begins; a norm finds what the product before it left there, as in a
model. Each configuration is first compared with the two launches: the sum byte for byte, FP8 within one step. The second
command makes the op's table of the first one's results.
"""

from __future__ import annotations

import itertools
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
from inductor_ext.kernels.scaled_mm_add.op import OP as ADD
from inductor_ext.kernels.scaled_mm_add.op import TABLE as ADD_TABLE
from inductor_ext.kernels.scaled_mm_add_norm.op import OP, Key, table

E4, BF16 = torch.float8_e4m3fn, torch.bfloat16
N, DEPTHS = 1024, (2048, 3072)  # K of o and down
TOKENS = (512, 1024, 2048, 7168, 16384)
CONFIGS = ("tile:128x128p@1x8", "tile:64x128p@1x8", "tile:128x128c@1x8")
NORM = (1e-6, "cast mul")
PROGRAMS = (TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
BF16_STEP = torch.finfo(BF16).eps  # a scale is an amax in bf16, divided
COMMAND = "python -m benchmarks.kernels.scaled_mm_add_norm --table-of benchmarks/results/h200/scaled_mm_add_norm.json"


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
        arguments = (x, residual, self.weight, *NORM, "row", *PROGRAMS, [])
        RMS_NORM._call(*arguments, out0=self.quantised, out1=self.scale, out2=total)

    def stock(self) -> None:
        made = cases.stock(self.problem, self.x)()
        self.norm(self.x.out if made is None else made, self.residual)

    def apart(self, config: str) -> None:
        x, p = self.x, self.problem
        product = x.a, x.b, x.scale_a, x.scale_b, None, self.residual
        ADD._call(*product, p.out_dtype, p.fast, True, config, out=self.total)
        self.norm(self.total, None)

    def together(self, config: str) -> None:
        x, p = self.x, self.problem
        product = x.a, x.b, x.scale_a, x.scale_b, None, self.residual
        rest = *PROGRAMS, p.out_dtype, p.fast, True, config
        OP._call(*product, self.weight, *NORM, *rest, out0=self.total, out1=self.quantised, out2=self.scale)


def check(case: Case, config: str) -> None:
    """The bytes of the sum; all but rare roundings of FP8 and the scales, and those by one step."""
    case.apart(config.partition("@")[0])
    total, quantised, scale = case.total.clone(), case.quantised.clone(), case.scale.clone()
    for each in (case.total, case.quantised, case.scale):
        each.view(torch.uint8).fill_(0xFF)  # NaN in each of their dtypes
    case.together(config)
    what = f"{config} at {case.problem.label}"
    if not torch.equal(case.total, total):
        raise RuntimeError(f"{what}: the sum is not scaled_mm_add's")
    if not bool(((case.scale - scale).abs() <= scale * BF16_STEP).all()):
        raise RuntimeError(f"{what}: the scales are not those of rms_norm_quantize")
    found, wanted = (each.view(torch.uint8).short() for each in (case.quantised, quantised))
    steps = (torch.where(found < 128, found, 128 - found) - torch.where(wanted < 128, wanted, 128 - wanted)).abs()
    if int(steps.max()) > 1 or float((steps != 0).float().mean()) > 0.02:
        share = float((steps != 0).float().mean())
        raise RuntimeError(f"{what}: {share:.2%} of the FP8 differ from rms_norm_quantize's, by up to {int(steps.max())} steps")


def measure(problem: cases.Problem) -> dict[str, Any]:
    moved = problem.bytes + 3 * problem.m * problem.n * BF16.itemsize
    sets = [Case(problem) for _ in range(timing.sets_for(moved, 16))]
    for config in CONFIGS:
        check(sets[0], config)
    name = ADD_TABLE.choose("sm_90a", problem.m, problem.n, problem.k, problem.rowwise, problem.fast)
    sides: dict[str, list[Callable[[], Any]]] = {
        "torch": [c.stock for c in sets],
        "ours": [lambda c=c: c.apart(name) for c in sets],
        **{config: [lambda c=c, config=config: c.together(config) for c in sets] for config in CONFIGS},
    }
    shape = {"m": problem.m, "n": problem.n, "k": problem.k, "rowwise": problem.rowwise, "end": table(problem.n).end}
    return shape | compare(sides, CONFIGS, "together", name)


def build(problems: list[cases.Problem]) -> None:
    """Every kernel that is compared, in parallel. RuntimeError with the first failure."""
    names = {ADD_TABLE.choose("sm_90a", p.m, p.n, p.k, p.rowwise, p.fast) for p in problems}
    names |= {config.partition("@")[0] for config in CONFIGS}
    specs = [OP.spec_of_key(Key(config, E4, E4, True, NORM[1], *PROGRAMS), "sm_90a") for config in CONFIGS]
    specs += [ADD.spec_of_key((name, E4, E4, BF16, True), "sm_90a") for name in sorted(names)]
    specs += [RMS_NORM.spec_of_key((BF16, added, BF16, NORM[1], "row", *PROGRAMS), "sm_90a") for added in (True, False)]
    built(specs)


def main(
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("scaled_mm_add_norm.json"),
    table_of: Annotated[Path | None, typer.Option("--table-of", help="Measure nothing: make the op's table of these.")] = None,
) -> None:
    if table_of is not None:
        columns = "ours, µs", "the product with its residual and the norm, µs"
        write_table(table(N), table_of, "together", COMMAND, columns, over="a product with its residual and rms_norm_quantize")
        return
    registry.ops()
    problems = [cases.Problem(m, N, k, rowwise, True) for k, rowwise, m in itertools.product(DEPTHS, (True, False), TOKENS)]
    build(problems)
    rows = [measure(problem) for problem in problems]
    timing.write_json(out, {"rows": rows})
    show(rows, 130, without=("all_us",))


if __name__ == "__main__":
    typer.run(main)
