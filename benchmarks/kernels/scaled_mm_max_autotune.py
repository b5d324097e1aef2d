"""``max_autotune`` with our kernels beside PyTorch's and Triton's, on a real GPU: who won, and what the winner takes.

    python -m benchmarks.kernels.scaled_mm_max_autotune --quick --out benchmarks/results/h200/scaled_mm_max_autotune.json

Each product is compiled with ``mode="max-autotune-no-cudagraphs"`` by stock Inductor and by this backend. The winner is read
from the generated code; outputs are compared with the eager operator; both sides are CUDA-graph replays over cold operands.
With ``--quick`` Inductor measures PyTorch's operator and ours only; its Triton templates take a minute a product.
"""

from __future__ import annotations

import itertools
import logging
import re
import statistics
from typing import Any

import torch
from torch._inductor.utils import run_and_get_code

import inductor_ext
from benchmarks import timing
from benchmarks.kernels import scaled_mm_cases as cases
from benchmarks.kernels.scaled_mm_cases import Problem
from benchmarks.kernels.shared import script

PROBLEMS = (
    Problem(16, 4096, 1024, True, True),
    Problem(512, 1024, 3072, True, True),
    Problem(512, 1024, 3072, False, True),
    Problem(7168, 1024, 2048, True, True),
)
MODE = "max-autotune-no-cudagraphs"


def product(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor) -> torch.Tensor:
    return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)


def winner(code: str) -> str:
    if found := re.search(r"inductor_ext_scaled_mm_tuned\(.*?config='([^']+)'", code):
        return found[1]
    return "aten" if "extern_kernels._scaled_mm" in code else "triton"


def measure(problem: Problem, triton: bool) -> dict[str, Any]:
    sets = cases.cold_operands(problem)
    args = [(x.a, x.b, x.scale_a, x.scale_b) for x in sets]
    ours = inductor_ext.backend()
    gemms = {} if triton else {"max_autotune_gemm_backends": "ATEN"}
    options = {**torch._inductor.list_mode_options(MODE), **gemms}
    backends: dict[str, Any] = {
        "stock": lambda gm, inputs, **_: torch._inductor.compile(gm, inputs, options=options),
        "ours": lambda gm, inputs, **_: ours(gm, inputs, mode=MODE, options=gemms),
    }
    eager = product(*args[0])
    sides, row = {}, {**problem.row, "triton": triton}
    for name, backend in backends.items():
        torch._dynamo.reset()
        compiled = torch.compile(product, backend=backend, dynamic=False)
        made, codes = run_and_get_code(compiled, *args[0])
        row[f"{name}_takes"] = winner("\n".join(codes))
        row[f"{name}_error"] = float((made.double() - eager.double()).norm() / eager.double().norm())
        found = []
        for _ in range(3):
            found.append(timing.graph_time([lambda x=x, c=compiled: c(*x) for x in args], replays=9) * 1e6)
        sides[name] = row[f"{name}_us"] = round(statistics.median(found), 2)
    return row | {"ratio": round(sides["stock"] / sides["ours"], 3)}


if __name__ == "__main__":
    logging.getLogger("inductor_ext").setLevel(logging.INFO)  # what each candidate took
    logging.basicConfig(format="%(message)s")
    script(measure, itertools.product(PROBLEMS, (False, True)), quick=[(problem, False) for problem in PROBLEMS], width=150)
