"""Gate and up, the activation and its quantisation: two launches, the first of which stores gate and up, or their product.

    python -m benchmarks.kernels.scaled_mm_act_mul --out benchmarks/results/h200/scaled_mm_act_mul.json
    python -m benchmarks.kernels.scaled_mm_act_mul --table-of benchmarks/results/h200/scaled_mm_act_mul.json

    apart   both products side by side by ours, as scaled_mm's table says, or by PyTorch's operator twice, whichever is faster
            here; then act_mul_quantize
    gated   scaled_mm_act_mul in every configuration; then fp8_quantize
    stock   PyTorch's operator twice, then what Inductor makes of SiLU, product and quantisation (with --stock)

One line a problem, N being that of one product. Sides are CUDA-graph replays, in turn, three rounds, over enough buffers to
find L2 cold when a product begins; what quantises finds what the product left there, as in a model. Each configuration is
first compared, byte for byte, with its own products and PyTorch's activation. ``--table-of`` makes the op's table.
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
from inductor_ext.kernels.act_mul_quantize.op import OP as ACT_MUL
from inductor_ext.kernels.act_mul_quantize.op import TORCHAO_PROGRAM, TORCHAO_SCALE
from inductor_ext.kernels.fp8_quantize.op import OP as QUANTIZE
from inductor_ext.kernels.scaled_mm import choice
from inductor_ext.kernels.scaled_mm.op import OP as SCALED_MM
from inductor_ext.kernels.scaled_mm_act_mul.op import OP, TABLE

E4, BF16 = torch.float8_e4m3fn, torch.bfloat16
SHAPES = ((3072, 1024), (12288, 4096), (14336, 4096))  # N, K of gate, and of up: Qwen3-0.6B, Qwen3-8B, Llama-3.1-8B
TOKENS = (512, 1024, 2048, 4096, 7168, 16384)
CONFIGS = (
    "tile:128x128p", "tile:64x256p", "tile:128x128c", "tile:128x256c", "tile:128x128p@2x1", "tile:128x256c@2x1",
    "tile:256x128c@2x1",
)  # fmt: skip
COMMAND = "python -m benchmarks.kernels.scaled_mm_act_mul --table-of benchmarks/results/h200/scaled_mm_act_mul.json"


def inductor_quantise(gate: torch.Tensor, up: torch.Tensor, rowwise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """torchao's recipe, as Inductor compiles it."""
    y = torch.nn.functional.silu(gate) * up
    amax = y.abs().amax(-1, keepdim=True) if rowwise else y.abs().amax()
    scale = (amax / 448.0).float()
    return (y.float() / scale).clamp(-448.0, 448.0).to(E4), scale


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

    def by_torch(self) -> tuple[torch.Tensor, ...]:
        x, p = self.x, self.problem
        options: Any = {"out_dtype": p.out_dtype, "use_fast_accum": p.fast}
        for b, scale, out in zip(self.b, self.scale_b, self.parts):
            torch._scaled_mm(x.a, b, x.scale_a, scale, out=out, **options)
        return self.parts

    def apart(self, products: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        ACT_MUL._call(*products(), "silu", *self.how, [], out0=self.quantised, out1=self.scale)

    def gated(self, config: str) -> None:
        self.gate(config, self.y)
        QUANTIZE._call(self.y, *self.how, out0=self.quantised, out1=self.scale)

    def gate(self, config: str, out: torch.Tensor) -> None:
        x, p = self.x, self.problem
        rest = (None, None, "silu", p.out_dtype, p.fast, True, config)
        OP._call(x.a, *self.b, x.scale_a, *self.scale_b, *rest, out=out)


def check(case: Case, config: str) -> None:
    found = torch.full_like(case.y, float("nan"))
    case.gate(config, found)
    gate, up = case.products(config)
    wanted = torch.nn.functional.silu(gate) * up
    if not torch.equal(found, wanted):
        apart = (found != wanted).sum().item()
        raise RuntimeError(f"{config} at {case.problem.label}: {apart} values are not the activation of its products")


def measure(problem: cases.Problem, stock: Callable[..., Any] | None, replays: int) -> dict[str, Any]:
    moved = problem.bytes + 2 * problem.m * problem.n * BF16.itemsize
    sets = [Case(problem) for _ in range(timing.sets_for(moved, 16))]
    for config in CONFIGS:
        check(sets[0], config)
    chosen = choice.choose("sm_90a", problem.m, problem.n, problem.k, problem.rowwise, problem.fast)
    assert chosen is not None
    sides: dict[str, list[Callable[[], Any]]] = {
        "torch": [lambda c=c: c.apart(c.by_torch) for c in sets],
        "ours": [lambda c=c: c.apart(lambda: c.products(chosen.config.name)) for c in sets],
        **{config: [lambda c=c, config=config: c.gated(config) for c in sets] for config in CONFIGS},
    }
    if stock is not None:
        sides["stock"] = [lambda c=c: stock(*c.by_torch(), c.problem.rowwise) for c in sets]
    found = compare(sides, CONFIGS, "gated", chosen.config.name, replays)
    shape = {"m": problem.m, "n": problem.n // 2, "k": problem.k, "rowwise": problem.rowwise}
    of_stock = round(found["all_us"]["stock"] / found["gated_us"], 3) if stock is not None else None
    return {**shape, **found, "of_stock": of_stock}


def main(
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("scaled_mm_act_mul.json"),
    table_of: Annotated[Path | None, typer.Option("--table-of", help="Measure nothing: make the op's table of these.")] = None,
    stock: Annotated[bool, typer.Option(help="Time Inductor's kernels too.")] = False,
    replays: Annotated[int, typer.Option(help="Of a graph, each round.")] = 7,
    tokens: Annotated[str, typer.Option(help="M, separated by commas.")] = ",".join(map(str, TOKENS)),
) -> None:
    if table_of is not None:
        columns = "ours and the quantisation after it, µs", "the products and act_mul_quantize, µs"
        write_table(TABLE, table_of, "gated", COMMAND, columns, over="the products and act_mul_quantize")
        return
    registry.ops()
    sizes = [int(each) for each in tokens.split(",")]
    problems = [cases.Problem(m, 2 * n, k, rowwise, True) for n, k in SHAPES for rowwise in (True, False) for m in sizes]
    specs = [SCALED_MM.spec_of_key((config, E4, E4, BF16, True), "sm_90a") for config in CONFIGS]
    specs += [OP.spec_of_key((config, E4, E4, BF16, True, "silu"), "sm_90a") for config in CONFIGS]
    for p in problems:
        chosen = choice.choose("sm_90a", p.m, p.n, p.k, p.rowwise, True)
        specs += [] if chosen is None else [SCALED_MM.spec_of_key((chosen.config.name, E4, E4, BF16, True), "sm_90a")]
    for granularity in ("row", "tensor"):
        how = (granularity, TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
        specs += [QUANTIZE.spec_of_key((BF16, *how), "sm_90a"), ACT_MUL.spec_of_key((BF16, "silu", *how), "sm_90a")]
    built(specs)
    compiled = torch.compile(inductor_quantise, dynamic=False) if stock else None
    rows = []
    for problem in problems:
        rows.append(measure(problem, compiled, replays))
        timing.write_json(out, {"rows": rows})
        torch.cuda.empty_cache()
    show(rows, 150, without=("all_us",))


if __name__ == "__main__":
    typer.run(main)
