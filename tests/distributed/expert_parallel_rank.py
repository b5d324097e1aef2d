"""One rank of test_expert_parallel.py: examples/expert_parallel.py's layer against the same in one process.

python expert_parallel_rank.py [stock | bf16 | fp8]    RANK, WORLD_SIZE, … as torchrun sets them

``stock`` leaves the experts as they are; the others quantise their weights to MXFP8, for tokens of that dtype.
"""

import json
import sys
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

import inductor_ext
from examples.expert_parallel import TOKENS, ExpertParallel, OneProcess, start, tokens_of
from tests.support.compiled import Recorder


def main(tokens: Literal["stock", "bf16", "fp8"]) -> dict[str, Any]:
    device = start()
    given = tokens_of(dist.get_rank(), device)
    whole, parallel = OneProcess().to(device), ExpertParallel(dist.group.WORLD).to(device)
    if tokens != "stock":
        names = {f"experts.{name}": "[E, N, K]" for name in ("gate_up_proj", "down_proj")}
        for layer in (whole, parallel):
            inductor_ext.quantize_moe_(layer, weights=names, activations=tokens, show=False)
    mode = {"moe_combine": "always", "mxfp8_grouped_mm": "always"}  # on a GPU, whether they have run there before or not
    recorder = Recorder(rules=mode)
    everyone = [tokens_of(rank, device) for rank in range(dist.get_world_size())]
    together = [torch.cat(each) for each in zip(*everyone)]
    wanted = torch.empty_like(together[0])
    with torch.no_grad():
        eager = whole(*together)
        if dist.get_rank() == 0:  # one process for the tokens of all
            wanted = torch.compile(whole, backend=Recorder(rules=mode), dynamic=False)(*together)
        found = torch.compile(parallel, backend=recorder, fullgraph=True, dynamic=False)(*given)
    dist.broadcast(wanted, 0)
    wanted, eager = (each[dist.get_rank() * TOKENS :][:TOKENS] for each in (wanted, eager))
    first = dist.get_rank() * parallel.local
    same = []
    for name in ("gate_up_proj", "down_proj"):
        mine, every = (getattr(layer.experts, name) for layer in (parallel, whole))
        if tokens != "stock":
            mine, every = mine.dequantize(), every.dequantize()
        same.append(torch.equal(mine, every[first : first + parallel.local]))
    dist.barrier()
    dist.destroy_process_group()
    return {
        "distance": distance(found, wanted),
        "to_eager": distance(found, eager),
        "device": device.type,
        "norm": float(wanted.float().norm()),
        "rules": recorder.counts(),
        "graphs": len(recorder.reports),
        "all_to_all": sum(report.before.count("_c10d_functional.all_to_all_single") for report in recorder.reports),
        "same_weights": all(same),
    }


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


if __name__ == "__main__":
    print(json.dumps(main(cast(Literal["stock", "bf16", "fp8"], sys.argv[1]))))
