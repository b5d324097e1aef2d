"""The yardstick of scaled_mm, CUTLASS's own SM90 collectives, compiles and is what it says."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

from inductor_ext import jit
from inductor_ext.errors import ToolchainError
from inductor_ext.settings import Settings

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/kernels"))
from cutlass_collectives import USUAL, Collective

E4 = torch.float8_e4m3fn


def test_specs_differ() -> None:
    specs = [collective.spec("sm_90a", (E4, E4, torch.bfloat16)) for collective in USUAL]
    assert len(set(specs)) == len(USUAL) == 8
    assert len({collective.name for collective in USUAL}) == 8


@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.skipif(bool(os.environ.get("CI")), reason="CUTLASS's own templates, for a benchmark alone: 80 s of nvcc")
def test_fast_pingpong_compiles(tmp_path: Path) -> None:
    options = Settings().replace(cache_dir=str(tmp_path / "cache"), arch="sm_90a", progress=False)
    try:
        jit.find_toolchain(options)
    except ToolchainError as error:
        pytest.skip(f"no nvcc: {str(error)[:200]}")
    spec = Collective(128, 128, True, 2, False).spec("sm_90a", (E4, E4, torch.bfloat16))
    kept = dataclasses.replace(spec, flags=("-keep", "-keep-dir", str(tmp_path)))
    (binary,) = jit.prebuild([kept], tmp_path / "built", options).values()
    assert isinstance(binary, Path), str(binary)
    (ptx,) = (path.read_text() for path in tmp_path.glob("*.ptx"))
    assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in ptx
    assert "griddepcontrol.wait" in ptx and "griddepcontrol.launch_dependents" in ptx
