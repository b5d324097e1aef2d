"""The projections of q, k and v, then the norm and rotation of q and k: in two launches, or in one.

    python -m benchmarks.kernels.scaled_mm_rope --out benchmarks/results/h200/scaled_mm_rope.json
    python -m benchmarks.kernels.scaled_mm_rope --table-of benchmarks/results/h200/scaled_mm_rope.json       (needs no GPU)

    apart     the products, by PyTorch's operator (three) or by scaled_mm (one), whichever is faster here; then qk_norm_rope
    together  scaled_mm_rope in every configuration

One line a problem, of Qwen3-0.6B, Qwen3-8B and Llama-3.1-8B (no norm), sequences of 512 tokens. Each configuration is first
compared with its own product and qk_norm_rope. scaled_mm_fused.py says how it is timed.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch

from benchmarks.kernels import scaled_mm_cases as cases
from benchmarks.kernels.scaled_mm_fused import BF16, Fused, specs
from benchmarks.kernels.shared import built
from inductor_ext.kernels.qk_norm_rope.op import OP as QK_NORM_ROPE
from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm.op import OP as SCALED_MM
from inductor_ext.kernels.scaled_mm_rope.op import HEAD_DIM, NORMALISED, OP, table


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
CONFIGS = ("tile:128x128p", "tile:128x128p@2x1", "tile:64x128p")
COLUMNS = "ours, µs", "the products and the rotation, µs"
FUSED = Fused(table(""), "together", CONFIGS, COLUMNS, "the products and qk_norm_rope")


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

    def by_torch(self) -> None:
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

    def fused(self, config: str, out: torch.Tensor | None = None) -> None:
        left = self.a, self.b, self.scale_a, self.scale_b
        rotation = *self.weights, self.cos, self.sin, 2, 1e-6, self.layer.norm
        OP._call(*left, *rotation, BF16, self.problem.fast, True, config, out=self.out if out is None else out)

    def check(self, config: str) -> None:
        """The bytes of the two launches; with a norm, whose sum is taken in another order, all but rare roundings of them."""
        found = torch.full_like(self.out, float("nan"))
        self.fused(config, found)
        self.ours(config)
        turned, v = [each.flatten(2).flatten(0, 1) for each in self.turned], self.out.split(self.layer.widths, 1)[2]
        wanted = torch.cat([*turned, v], 1)
        apart, what = found != wanted, f"{config} at {self.layer.model} {self.problem.label}"
        share = float(apart.float().mean())
        if not bool(found.isfinite().all()) or share > (0.02 if self.layer.norm else 0.0):
            raise RuntimeError(f"{what}: {share:.2%} of the elements are not those of the product and the rotation")
        distance = float((found.float() - wanted.float()).norm() / wanted.float().norm())
        if distance > 1e-3:
            raise RuntimeError(f"{what}: distance {distance:.1e} from the product and the rotation")


def measure(layer: Layer, rowwise: bool, m: int) -> dict[str, Any]:
    problem = cases.Problem(m, sum(layer.widths), layer.k, rowwise, True)
    moved = problem.bytes + 2 * m * sum(layer.widths[:2]) * BF16.itemsize
    end = {"end": NORMALISED} if layer.norm else {}
    row = {"model": layer.model, **problem.row, **end}
    return FUSED.measure(lambda: Case(layer, problem), moved, product_config(layer, rowwise, m), row)


def product_config(layer: Layer, rowwise: bool, m: int) -> str:
    """The configuration of scaled_mm that is timed apart."""
    chosen = scaled_mm.decide("sm_90a", m, layer.widths, layer.k, rowwise, True)
    assert chosen is not None
    return chosen.config.name


def build(chosen: list[Any]) -> None:
    norms = sorted({layer.norm for layer in LAYERS})
    wanted = specs(SCALED_MM, {*CONFIGS, *(product_config(*case) for case in chosen)})
    for norm in norms:
        wanted += specs(OP, CONFIGS, norm)
        wanted.append(QK_NORM_ROPE.spec_of_key((BF16, BF16 if norm else None, BF16, norm, BF16), "sm_90a"))
    built(wanted)


if __name__ == "__main__":
    FUSED.script(measure, list(itertools.product(LAYERS, (True, False), TOKENS)), build)
