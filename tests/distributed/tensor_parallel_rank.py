"""One rank of test_tensor_parallel.py: FP8 linear layers split by PyTorch's DTensor, against the same in one process.

python tensor_parallel_rank.py        RANK, WORLD_SIZE, … as torchrun sets them
"""

import json
import re
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from examples.expert_parallel import start
from tests.support.compiled import Recorder

E4 = torch.float8_e4m3fn
#: On a GPU, whatever was measured for so small sizes.
RULES: dict[str, Any] = {"fp8_quantize": "always", "scaled_mm": "always"}
TOKENS, HIDDEN, INTERMEDIATE = 32, 128, 256


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for the whole tensor, in fp32: torchao divides in bf16, and Inductor's own code does not keep that rounding."""
    scale = x.abs().amax().float() / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(E4), scale


class Float8Linear(torch.nn.Linear):
    """A linear layer whose weight is FP8, with a scale, and whose input is quantised as it comes."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, bias=False, dtype=torch.bfloat16)
        weight, scale = quantised(self.weight.detach())
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        data, scale = quantised(x)
        return torch._scaled_mm(data, self.weight.t(), scale, self.scale, out_dtype=torch.bfloat16)


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = Float8Linear(HIDDEN, INTERMEDIATE), Float8Linear(INTERMEDIATE, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def main() -> dict[str, Any]:
    device = start()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    whole, split = Mlp().to(device), Mlp().to(device)
    # Every rank made the same weights: nothing has to be sent, and gloo sends no FP8.
    split = parallelize_module(split, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()}, src_data_rank=None)
    recorder = Recorder(rules=RULES)
    with torch.no_grad():
        wanted = torch.empty_like(x)
        if dist.get_rank() == 0:
            wanted = torch.compile(whole, backend=Recorder(rules=RULES), dynamic=False)(x)
        dist.broadcast(wanted, 0)
        found = torch.compile(split, backend=recorder, dynamic=False)(x)
    local = [list(linear.weight.to_local().shape) for linear in (split.up, split.down)]
    dist.barrier()
    dist.destroy_process_group()
    return {
        "distance": distance(found, wanted),
        "rules": recorder.counts(),
        "refusals": [refusal.reason for refusal in recorder.refusals("fp8_quantize")],
        "collectives": sorted(
            f"{kind} {operation}"
            for report in recorder.reports
            for kind, operation in re.findall(r"_c10d_functional\.(all_\w+)\.default\(\w+, (\w+)", report.before)
        ),
        "local_weights": local,
    }


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


if __name__ == "__main__":
    print(json.dumps(main()))
