"""Expert parallelism, compiled on every rank: the layer of examples/expert_parallel.py against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.ranks import needs, run_ranks

PROGRAM = Path(__file__).with_name("expert_parallel_rank.py")


def check(weights: str, folder: Path) -> None:
    for found in run_ranks(PROGRAM, folder, weights):
        assert found["same_weights"] and found["norm"] > 1
        assert found["graphs"] == 1 and found["all_to_all"] == 3, "rows, ids and results travel inside one graph"
        assert found["rules"] == {"moe_combine": 1, **({"mxfp8_grouped_mm": 2} if weights == "mxfp8" else {})}
        # A row meets the same expert, in another place among other rows. On a CPU not even that changes a bit.
        assert found["distance"] <= (0.0 if found["device"] == "cpu" else 1e-2)
        assert found["to_eager"] < 1e-2


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="two GPUs: NCCL is tested")
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    needs("gloo")
    check("mxfp8", tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["mxfp8", "bf16"])
def test_two_gpus_give_what_one_gives(weights: str, tmp_path: Path) -> None:
    needs("nccl")
    if torch.cuda.device_count() < 2:
        pytest.skip(f"wanted two GPUs, found {torch.cuda.device_count()}")
    check(weights, tmp_path)
