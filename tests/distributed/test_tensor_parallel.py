"""Tensor parallelism through DTensor, compiled on every rank: FP8 linear layers against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.ranks import needs, run_ranks

PROGRAM = Path(__file__).with_name("tensor_parallel_rank.py")


def check(folder: Path) -> None:
    for found in run_ranks(PROGRAM, folder):
        assert found["local_weights"] == [[128, 128], [128, 128]], "of [256, 128] and [128, 256]"
        assert found["collectives"] == ["all_reduce max", "all_reduce sum"], "one for the scale, one for the result"
        # The first layer's input is whole on each rank. The second's scale is that of all ranks' columns: no local kernel.
        assert found["rules"] == {"fp8_quantize": 1, "scaled_mm": 2}
        assert "a step of the scale is not one the kernel computes" in found["refusals"]
        # A rank rounds its half of each sum to bf16 before they are added: two roundings more, of 2⁻⁹ each.
        assert 0 < found["distance"] < 1e-2


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="two GPUs: NCCL is tested")
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    needs("gloo")
    check(tmp_path)


@pytest.mark.gpu
def test_two_gpus_give_what_one_gives(tmp_path: Path) -> None:
    needs("nccl")
    if torch.cuda.device_count() < 2:
        pytest.skip(f"wanted two GPUs, found {torch.cuda.device_count()}")
    check(tmp_path)
