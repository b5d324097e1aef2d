"""moe_combine against stock Inductor's code for the same lines, and a device copy of as many bytes.

    python -m benchmarks.kernels.moe_combine --out benchmarks/results/h200/moe_combine.json     (--quick: few rows a token)

Stock is ``torch.compile`` of transformers' lines from the second grouped matmul's result on: weights, mask, inverse
permutation, sum. Both sides make the inverse; ours is the op behind Inductor's scatter. CUDA-graph replays in turn, three
rounds, medians, over enough buffers to find L2 cold. Few rows a token (k below 6) are what decides the rule's LEAST_TOP_K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import inductor_ext
from benchmarks import timing
from benchmarks.kernels.shared import script

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
EIGHT = (4096, 8, 2048, 128)
CASES = (*((*shape, False) for shape in SHAPES), (*EIGHT, True))  # masked
QUICK = tuple((*shape, False) for shape in SHAPES if shape[1] <= 6 or shape == EIGHT)
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
    return {
        "tokens": tokens, "k": top_k, "hidden": hidden, "masked": masked, **timing.medians(found),
        "ratio": timing.ratio(found["stock"], found["ours"]), "of_copy": timing.of_copy(moved, found["ours"]),
        "apart": float(f"{float((stock - ours).norm() / stock.norm()):.1e}"),
    }  # fmt: skip


if __name__ == "__main__":
    script(measure, CASES, quick=QUICK)
