"""FP8 products for the scaled_mm benchmarks: shapes, operands that are cold in L2, and what runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import timing
from benchmarks.kernels.shared import built
from inductor_ext.kernels.scaled_mm import choice
from inductor_ext.kernels.scaled_mm.config import Config
from inductor_ext.kernels.scaled_mm.op import OP

E4 = torch.float8_e4m3fn
MAX_SETS = 48

#: (N, K) of Qwen3-0.6B's projections: q, k and v together, o, gate and up together, down.
GRID = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072))
GRID_M = (1, 16, 64, 128, 512, 1024, 7168)
LLAMA_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
LLAMA_M = (1, 16, 128, 1024, 7168, 16384)
#: What the models above also have: single q, k, v, gate and up; and what others have.
OTHERS = ((1024, 1024), (2048, 1024), (3072, 1024), (1024, 4096), (14336, 4096), (2048, 2048), (8192, 8192), (4096, 12288))


@dataclasses.dataclass(frozen=True)
class Problem:
    m: int
    n: int
    k: int
    rowwise: bool
    fast: bool
    out_dtype: torch.dtype = torch.bfloat16

    @property
    def chosen(self) -> choice.Choice:
        """What scaled_mm's table says."""
        found = choice.choose("sm_90a", self.m, self.n, self.k, self.rowwise, self.fast)
        assert found is not None
        return found

    @property
    def row(self) -> dict[str, Any]:
        return {"m": self.m, "n": self.n, "k": self.k, "rowwise": self.rowwise}

    @property
    def label(self) -> str:
        return f"M={self.m} N={self.n} K={self.k}"

    @property
    def bytes(self) -> int:
        return self.m * self.k + self.n * self.k + self.m * self.n * self.out_dtype.itemsize


@dataclasses.dataclass
class Operands:
    a: torch.Tensor
    b: torch.Tensor
    scale_a: torch.Tensor
    scale_b: torch.Tensor
    out: torch.Tensor


def operands(problem: Problem, device: str = "cuda") -> Operands:
    m, n, k = problem.m, problem.n, problem.k
    a = torch.randn(m, k, device=device, dtype=torch.bfloat16).to(E4)
    b = torch.randn(n, k, device=device, dtype=torch.bfloat16).to(E4).t()
    sizes = ((m, 1), (1, n)) if problem.rowwise else ((), ())
    scales = [torch.rand(size, device=device) * 0.1 + 0.01 for size in sizes]
    return Operands(a, b, scales[0], scales[1], torch.empty(m, n, device=device, dtype=problem.out_dtype))


def cold_operands(problem: Problem) -> list[Operands]:
    """As many sets as it takes for each call to find none of its own in L2."""
    return [operands(problem) for _ in range(timing.sets_for(problem.bytes, MAX_SETS))]


def stock(problem: Problem, x: Operands) -> Callable[[], Any]:
    """``torch._scaled_mm`` as the model's user calls it."""
    return lambda: torch._scaled_mm(
        x.a, x.b, x.scale_a, x.scale_b, out_dtype=problem.out_dtype, use_fast_accum=problem.fast
    )


def key_of(config: Config, problem: Problem) -> Any:
    return config.name, E4, E4, problem.out_dtype, problem.fast


def ours(config: Config, modules: dict[Any, Any], problem: Problem, x: Operands) -> Callable[[], Any]:
    """The kernel of ``config``; weights are promised to be ready, as those of a compiled model are."""
    key = key_of(config, problem)
    assert OP.kernel is not None
    run = OP.kernel.bind(modules[OP.spec_of_key(key, "sm_90a")], key)
    lists = [x.a], [x.b], [x.scale_a], [x.scale_b], [None]
    return lambda: run(*lists, problem.out_dtype, problem.fast, True, "", x.out)


def build(configs: Sequence[tuple[Config, Problem]]) -> dict[Any, Any]:
    """All kernels, in parallel. RuntimeError with the first failure."""
    return built(sorted({OP.spec_of_key(key_of(config, problem), "sm_90a") for config, problem in configs}, key=str))


def effort(problem: Problem) -> dict[str, Any]:
    """How often a graph repeats a call: not twenty times a long one, by 4.15 TB/s of memory and 1 300 TFLOP/s."""
    floor_us = 1e6 * max(problem.bytes / 4.15e12, 2 * problem.m * problem.n * problem.k / 1.3e15) + 2
    return {"least_calls": 20 if floor_us < 100 else 6 if floor_us < 1000 else 2, "least_s": 2e-4}
