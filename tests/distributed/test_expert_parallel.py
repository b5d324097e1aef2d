"""Expert parallelism, compiled on every rank: the layer of examples/expert_parallel.py against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.ranks import needs, run_ranks

PROGRAM = Path(__file__).with_name("expert_parallel_rank.py")


RULES = {
    "stock": {"moe_combine": 1},
    "bf16": {"moe_combine": 1, "mxfp8_grouped_mm": 2},
    "fp8": {"moe_combine": 1, "mxfp8_grouped_mm": 2, "act_mul_quantize": 1},
}


def check(tokens: str, folder: Path) -> None:
    # Tokens quantised again after SwiGLU, in one kernel or by eager's three, fall to either side of a step of FP8.
    again = 3e-2 if tokens == "fp8" else 1e-2
    for found in run_ranks(PROGRAM, folder, tokens):
        assert found["same_weights"] and found["norm"] > 1
        assert found["graphs"] == 1 and found["all_to_all"] == 3, "rows, ids and results travel inside one graph"
        assert found["rules"] == RULES[tokens]
        # A row meets the same expert, in another place among other rows. On a CPU not even that changes a bit.
        assert found["distance"] <= (0.0 if found["device"] == "cpu" and tokens != "fp8" else 1e-2)
        assert found["to_eager"] < again


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="two GPUs: NCCL is tested")
@pytest.mark.parametrize("tokens", ["bf16", "fp8"])
def test_two_processes_give_what_one_gives(tokens: str, tmp_path: Path) -> None:
    needs("gloo")
    check(tokens, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", sorted(RULES))
def test_two_gpus_give_what_one_gives(tokens: str, tmp_path: Path) -> None:
    needs("nccl")
    if torch.cuda.device_count() < 2:
        pytest.skip(f"wanted two GPUs, found {torch.cuda.device_count()}")
    check(tokens, tmp_path)
