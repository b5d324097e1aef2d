"""moe_combine against stock Inductor's code for the same lines, and a device copy of as many bytes.

    python -m benchmarks.kernels.moe_combine --out benchmarks/results/h200/moe_combine.json     (--quick: few rows a token)

Stock is ``torch.compile`` of transformers' lines from the second grouped matmul's result on: weights, mask, inverse
permutation, sum. Both sides make the inverse; ours is the op behind Inductor's scatter. CUDA-graph replays in turn, three
rounds, medians, over enough buffers to find L2 cold. Few rows a token (k below 6) are what decides the rule's LEAST_TOP_K.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import inductor_ext
from benchmarks import timing
from benchmarks.kernels.shared import show
from inductor_ext import registry

#: tokens, k, hidden, experts: Qwen3-30B-A3B, Mixtral-8x7B, widths of gpt-oss and DeepSeek-V3, and other k
SHAPES = (
    *((tokens, 8, 2048, 128) for tokens in (1, 16, 128, 1024, 4096, 16384)),
    *((tokens, 2, 4096, 8) for tokens in (1, 4096)),
    (4096, 1, 4096, 16),
    (512, 2, 4096, 8),
    (16384, 2, 4096, 8),
    (4096, 3, 2048, 64),
    (4096, 4, 2048, 64),
    (4096, 4, 2880, 32),
    (4096, 5, 2048, 64),
    (4096, 6, 2048, 64),
    (4096, 8, 7168, 256),
)
MASKED_TOO = (4096, 8, 2048, 128)
QUICK = tuple(shape for shape in SHAPES if shape[1] <= 6 or shape == MASKED_TOO)
Call = Callable[[], Any]


def combine(y: Any, weights: Any, sorted_ids: Any, perm: Any, experts: int, masked: bool) -> torch.Tensor:
    tokens, top_k = weights.shape
    if masked:
        y = y.masked_fill((sorted_ids >= experts).unsqueeze(-1), 0.0)
    y = y * weights.reshape(-1)[perm].unsqueeze(-1)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.shape[0], device=perm.device)
    return y[inverse].view(tokens, top_k, -1).sum(dim=1)


def measure(tokens: int, top_k: int, hidden: int, experts: int, masked: bool) -> dict[str, Any]:
    torch._dynamo.reset()

    def layer(y: Any, weights: Any, sorted_ids: Any, perm: Any) -> torch.Tensor:
        return combine(y, weights, sorted_ids, perm, experts, masked)

    moved = tokens * hidden * 2 * (top_k + 1) + tokens * top_k * 18
    backend = inductor_ext.backend(rules={"moe_combine": "always"})
    sides = {
        "stock": torch.compile(layer, dynamic=False),
        "ours": torch.compile(layer, dynamic=False, backend=backend),
    }
    calls: dict[str, list[Call]] = {name: [] for name in sides}
    for _ in range(timing.sets_for(moved, 32)):
        ids = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
        sorted_ids, perm = torch.sort(ids.view(-1))
        y = torch.randn(tokens * top_k, hidden, device="cuda").bfloat16()
        given = (y, torch.rand(tokens, top_k, device="cuda").bfloat16(), sorted_ids, perm)
        for name, side in sides.items():
            calls[name].append(lambda side=side, given=given: side(*given))
    stock, ours = (calls[name][0]().float() for name in sides)
    found = timing.in_turn(calls, replays=9)
    ratio = timing.ratio(found["stock"], found["ours"])
    time = statistics.median(found["ours"])
    return {
        "tokens": tokens, "k": top_k, "hidden": hidden, "masked": masked,
        "stock_us": round(statistics.median(found["stock"]), 2), "ours_us": round(time, 2), "ratio": round(ratio, 3),
        "of_copy": round(timing.copy_time(moved) * 1e6 / time, 3),
        "apart": float(f"{float((stock - ours).norm() / stock.norm()):.1e}"),
    }  # fmt: skip


def main(
    out: Annotated[Path | None, typer.Option(help="Where the numbers go.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON too.")] = False,
    quick: Annotated[bool, typer.Option(help="Few rows a token, and one shape with eight.")] = False,
) -> None:
    registry.ops()
    shapes = QUICK if quick else SHAPES
    masks = {MASKED_TOO: (False, True)} if not quick else {}
    rows = [measure(*shape, masked) for shape in shapes for masked in masks.get(shape, (False,))]
    if out is not None:
        timing.write_json(out, {"rows": rows})
    if as_json:
        print(json.dumps(rows))
    show(rows, 120)


if __name__ == "__main__":
    typer.run(main)
