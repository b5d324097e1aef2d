"""The projections of q, k and v, then the norm and rotation of q and k: in two launches, or in one.

    python -m benchmarks.kernels.scaled_mm_rope --out benchmarks/results/h200/scaled_mm_rope.json
    python -m benchmarks.kernels.scaled_mm_rope --table-of benchmarks/results/h200/scaled_mm_rope.json       (needs no GPU)

    apart     the products, by PyTorch's operator (three) or by scaled_mm (one), whichever is faster here; then qk_norm_rope
    together  scaled_mm_rope in every configuration

One line a problem, of Qwen3-0.6B, Qwen3-8B and Llama-3.1-8B (no norm), sequences of 512 tokens. Sides are CUDA-graph replays,
in turn, three rounds, over enough buffers to find L2 cold when a product begins; a rotation finds what the product before it
left there, as in a model. Each configuration is first compared with its own product and qk_norm_rope.
"""

from __future__ import annotations

import dataclasses
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
from inductor_ext.kernels.qk_norm_rope.op import OP as QK_NORM_ROPE
from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm.op import OP as SCALED_MM
from inductor_ext.kernels.scaled_mm_rope.op import HEAD_DIM, NORMALISED, OP, table

E4, BF16 = torch.float8_e4m3fn, torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Layer:
    model: str
    heads: tuple[int, int, int]  # of q, k and v
    k: int
    norm: str

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(count * HEAD_DIM for count in self.heads)


LAYERS = (
    Layer("Qwen3-0.6B", (16, 8, 8), 1024, "cast mul"),
    Layer("Qwen3-8B", (32, 8, 8), 4096, "cast mul"),
    Layer("Llama-3.1-8B", (32, 8, 8), 4096, ""),
)
TOKENS = (512, 1024, 4096, 7168, 16384)
SEQUENCE = 512
COMMAND = "python -m benchmarks.kernels.scaled_mm_rope --table-of benchmarks/results/h200/scaled_mm_rope.json"
CONFIGS = ("tile:128x128p", "tile:128x128p@2x1", "tile:64x128p")


class Case:
    """One set of buffers."""

    def __init__(self, layer: Layer, problem: cases.Problem) -> None:
        self.layer, self.problem, m = layer, problem, problem.m
        whole = cases.operands(problem)
        self.a, self.scale_a, self.out = whole.a, whole.scale_a, whole.out
        each = [cases.operands(dataclasses.replace(problem, n=n)) for n in layer.widths]
        self.b, self.scale_b = [x.b for x in each], [x.scale_b for x in each]
        self.parts = [x.out for x in each]
        angles = torch.randn(1, SEQUENCE, HEAD_DIM, device="cuda") * 9
        self.cos, self.sin = angles.cos().to(BF16), angles.sin().to(BF16)
        weights = [(torch.rand(HEAD_DIM, device="cuda") + 0.5).to(BF16) for _ in range(2)]
        self.weights = weights if layer.norm else [None, None]
        shapes = [(m // SEQUENCE, SEQUENCE, count, HEAD_DIM) for count in layer.heads[:2]]
        self.turned = [torch.empty(shape, device="cuda", dtype=BF16) for shape in shapes]

    def stock(self) -> None:
        """Three launches, each into a tensor of its own, and the rotation."""
        p = self.problem
        for b, scale_b, out in zip(self.b, self.scale_b, self.parts):
            aten_out = torch.ops.aten._scaled_mm.out
            aten_out(self.a, b, self.scale_a, scale_b, None, None, BF16, p.fast, out=out)
        self.rotate(self.parts)

    def ours(self, config: str) -> None:
        self.product(config, self.out)
        self.rotate(self.out.split(self.layer.widths, 1))

    def product(self, config: str, out: torch.Tensor) -> None:
        none = [None] * len(self.b)
        arguments = ([self.a], self.b, [self.scale_a], self.scale_b, none, BF16, self.problem.fast, True, config)
        SCALED_MM._call(*arguments, out=out)

    def rotate(self, parts: Any) -> None:
        q, k = (part.view(turned.shape) for part, turned in zip(parts, self.turned))
        arguments = (q, k, *self.weights, self.cos, self.sin, 1e-6, self.layer.norm, BF16)
        QK_NORM_ROPE._call(*arguments, out0=self.turned[0], out1=self.turned[1])

    def together(self, config: str, out: torch.Tensor | None = None) -> None:
        left = self.a, self.b, self.scale_a, self.scale_b
        rotation = *self.weights, self.cos, self.sin, 2, 1e-6, self.layer.norm
        OP._call(*left, *rotation, BF16, self.problem.fast, True, config, out=self.out if out is None else out)


def check(case: Case, config: str) -> None:
    """The bytes of the two launches; with a norm, whose sum is taken in another order, all but rare roundings of them."""
    found = torch.full_like(case.out, float("nan"))
    case.together(config, found)
    case.ours(config)
    wanted = torch.cat([*(each.flatten(2).flatten(0, 1) for each in case.turned), case.out.split(case.layer.widths, 1)[2]], 1)
    apart, what = found != wanted, f"{config} at {case.layer.model} {case.problem.label}"
    share = float(apart.float().mean())
    if not bool(found.isfinite().all()) or share > (0.02 if case.layer.norm else 0.0):
        raise RuntimeError(f"{what}: {share:.2%} of the elements are not those of the product and the rotation")
    distance = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    if distance > 1e-3:
        raise RuntimeError(f"{what}: distance {distance:.1e} from the product and the rotation")


def measure(layer: Layer, m: int, rowwise: bool) -> dict[str, Any]:
    problem = cases.Problem(m, sum(layer.widths), layer.k, rowwise, True)
    moved = problem.bytes + 2 * m * sum(layer.widths[:2]) * BF16.itemsize
    sets = [Case(layer, problem) for _ in range(timing.sets_for(moved, 16))]
    for config in CONFIGS:
        check(sets[0], config)
    name = product_config(problem, layer)
    sides: dict[str, list[Callable[[], Any]]] = {
        "torch": [c.stock for c in sets],
        "ours": [lambda c=c: c.ours(name) for c in sets],
        **{config: [lambda c=c, config=config: c.together(config) for c in sets] for config in CONFIGS},
    }
    end = {"end": NORMALISED} if layer.norm else {}
    shape = {"model": layer.model, "m": m, "n": problem.n, "k": problem.k, "rowwise": rowwise, **end}
    return shape | compare(sides, CONFIGS, "together", name)


def product_config(problem: cases.Problem, layer: Layer) -> str:
    """The configuration of scaled_mm that is timed apart."""
    chosen = scaled_mm.decide("sm_90a", problem.m, layer.widths, problem.k, problem.rowwise, True)
    assert chosen is not None
    return chosen.config.name


def build() -> None:
    """Every kernel that is compared, in parallel. RuntimeError with the first failure."""
    names, norms = set(CONFIGS), {layer.norm for layer in LAYERS}
    for layer, m, rowwise in itertools.product(LAYERS, TOKENS, (True, False)):
        names.add(product_config(cases.Problem(m, sum(layer.widths), layer.k, rowwise, True), layer))
    specs = [OP.spec_of_key((config, E4, E4, BF16, True, norm), "sm_90a") for config in CONFIGS for norm in sorted(norms)]
    specs += [SCALED_MM.spec_of_key((name, E4, E4, BF16, True), "sm_90a") for name in sorted(names)]
    specs += [QK_NORM_ROPE.spec_of_key((BF16, BF16 if norm else None, BF16, norm, BF16), "sm_90a") for norm in sorted(norms)]
    built(specs)


def main(
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("scaled_mm_rope.json"),
    table_of: Annotated[Path | None, typer.Option("--table-of", help="Measure nothing: make the op's table of these.")] = None,
) -> None:
    if table_of is not None:
        columns = "ours, µs", "the products and the rotation, µs"
        write_table(table(""), table_of, "together", COMMAND, columns, over="the products and qk_norm_rope")
        return
    registry.ops()
    build()
    rows = [measure(layer, m, rowwise) for layer, rowwise, m in itertools.product(LAYERS, (True, False), TOKENS)]
    timing.write_json(out, {"rows": rows})
    show(rows, 130, without=("all_us",))


if __name__ == "__main__":
    typer.run(main)
