"""Expert parallelism: each rank has some of the experts, in MXFP8, and tokens travel to them and back by all-to-all.

    torchrun --nproc-per-node 2 examples/expert_parallel.py          two CPU processes (gloo), or one GPU each (NCCL)

The layer is compiled with ``backend="inductor_ext"`` on every rank; its collectives are PyTorch's own. Every rank also computes
its tokens with all experts in one process, from the same quantised weights, and says how far apart the two results are.

Splits are fixed, so that shapes are static and nothing waits for the host: each rank sends each other rank a block of as many
rows as it has at all, T · k, and marks those that are empty with an expert that does not exist. That moves more than it must;
exchanging sizes first would move less, and wait.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

TOKENS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 64, 8, 2, 128, 64  # tokens of a rank; the rest of the whole layer


class Experts(torch.nn.Module):
    """SwiGLU experts, those from ``first`` to ``last`` of the layer's; equal weights on every rank and machine."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        for name, shape in (("gate_up_proj", (2 * INTERMEDIATE, HIDDEN)), ("down_proj", (HIDDEN, INTERMEDIATE))):
            every = torch.randn(EXPERTS, *shape, generator=made) * shape[1] ** -0.5
            self.register_parameter(name, torch.nn.Parameter(every[first:last].bfloat16(), requires_grad=False))

    def forward(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Rows [S, H] through the experts ``ids`` [S]. A row whose expert does not exist comes back as anything."""
        count = self.gate_up_proj.shape[0]
        sorted_ids, perm = torch.sort(ids)
        counts = torch.histc(sorted_ids.float() if ids.device.type == "cpu" else sorted_ids.int(), count, 0, count - 1)
        offs = torch.cumsum(counts, 0, dtype=torch.int32)
        both = torch.nn.functional.grouped_mm(rows[perm], self.gate_up_proj.transpose(-2, -1), offs=offs)
        gate, up = both.chunk(2, -1)
        y = torch.nn.functional.grouped_mm(torch.nn.functional.silu(gate) * up, self.down_proj.transpose(-2, -1), offs=offs)
        return y[torch.argsort(perm)]


class OneProcess(torch.nn.Module):
    """All experts here: x [T, H], expert ids and weights [T, k]."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts(0, EXPERTS)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = self.experts(x.repeat_interleave(TOP_K, 0), ids.view(-1))
        return (y.view(-1, TOP_K, HIDDEN) * weights.unsqueeze(-1)).sum(1)


class ExpertParallel(torch.nn.Module):
    """The same, with ``EXPERTS / ranks`` of the experts on each rank of ``group``."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group, self.ranks = group, dist.get_world_size(group)
        assert EXPERTS % self.ranks == 0, f"wanted a number of ranks that divides {EXPERTS}, found {self.ranks}"
        self.local = EXPERTS // self.ranks
        first = dist.get_rank(group) * self.local
        self.experts = Experts(first, first + self.local)

    def exchange(self, blocks: Tensor) -> Tensor:
        """Block r of [ranks · rows, …] goes to rank r; block r of the result came from there."""
        return collectives.all_to_all_single(blocks, None, None, self.group)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        slots = ids.numel()
        sorted_ids, perm = torch.sort(ids.view(-1))
        to = sorted_ids // self.local
        first = torch.searchsorted(to, torch.arange(self.ranks, device=x.device))
        place = to * slots + torch.arange(slots, device=x.device) - first[to]

        rows = x.new_zeros(self.ranks * slots, HIDDEN)
        rows[place] = x[perm // TOP_K]
        experts = ids.new_full((self.ranks * slots,), self.local)  # no such expert
        experts[place] = sorted_ids - to * self.local
        y = self.exchange(self.experts(self.exchange(rows), self.exchange(experts)))

        back = torch.empty_like(place)
        back[perm] = place
        return (y[back].view(-1, TOP_K, HIDDEN) * weights.unsqueeze(-1)).sum(1)


def tokens_of(rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's tokens, and where its router sends them."""
    made = torch.Generator().manual_seed(1 + rank)
    x = torch.randn(TOKENS, HIDDEN, generator=made).bfloat16()
    weights, ids = torch.rand(TOKENS, EXPERTS, generator=made).topk(TOP_K)
    return x.to(device), ids.to(device), weights.bfloat16().to(device)


def start() -> torch.device:
    """This process as one of those that torchrun has started."""
    rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
        return torch.device("cuda", rank)
    dist.init_process_group("gloo")
    return torch.device("cpu")


def main() -> None:
    import inductor_ext

    device = start()
    rank = dist.get_rank()
    x, ids, weights = tokens_of(rank, device)
    names = {f"experts.{name}": "[E, N, K]" for name in ("gate_up_proj", "down_proj")}
    results = []
    with torch.no_grad():
        for layer in (OneProcess(), ExpertParallel(dist.group.WORLD)):
            layer.to(device)
            inductor_ext.quantize_moe_(layer, weights=names, show=False)
            results.append(torch.compile(layer, backend="inductor_ext")(x, ids, weights).float())
    whole, parallel = results
    distance = float((parallel - whole).norm() / whole.norm())
    print(f"rank {rank} on {device}: {TOKENS} tokens, distance to one process {distance:.1e}", flush=True)
    dist.destroy_process_group()
    if distance > 1e-2:
        raise SystemExit("too far apart")


if __name__ == "__main__":
    main()
