"""The steps that scales are made of: the kernels' own C++ on the CPU, against PyTorch's operators, byte for byte."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_ext import jit
from inductor_ext.errors import ToolchainError
from inductor_ext.kernels import steps
from inductor_ext.kernels.fp8_downcast.op import OP as DOWNCAST
from inductor_ext.kernels.fp8_quantize.op import OP as QUANTIZE
from inductor_ext.settings import Settings
from tests.support import cuda_on_cpu
from tests.support.equal import assert_same_bytes

PROGRAMS = {
    "add": "add:1e-06",
    "positive_or": "positive_or:1.0",
    "nonzero_or": "nonzero_or:0.37",
    "down_to_a_power": "abs log2 floor exp2",
    "up_to_a_power": "log2 ceil pow2",
    "bits_up": "bits_up",
    "ue8m0": "ue8m0",
    "torchao": "f64 max:1e-12 recip mul:448.0 f32",
    "in_double": "f64 add:0.1 min:100.0 div:512.0 f32",
    "through": "add:scale|add:-2.5|abs",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda_on_cpu.compiled("scale_steps", tmp_path_factory.mktemp("scale_steps"))


def maxima() -> torch.Tensor:
    """What the largest of absolute values may be: zero, subnormal, powers of two and their neighbours, infinite, NaN."""
    powers = torch.ldexp(torch.ones(40), torch.arange(-20, 20))
    near = torch.cat([powers, powers * 1.25, powers * 1.75])
    special = torch.tensor([0.0, 1e-45, 1e-40, 2.0**-126, 1e-12, 0.37, 447.9, 448.0, 3e38, float("inf"), float("nan")])
    return torch.cat([near, special, torch.rand(500, generator=torch.Generator().manual_seed(0)) * 900])


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_a_step_gives_pytorchs_bytes(name: str, library: Any) -> None:
    text, values, scale = PROGRAMS[name], maxima(), torch.tensor(0.75)
    cpp = steps.to_cpp(text, torch.float32, scale=torch.float32).replace("inductor_ext::", "")
    assert cpp.removeprefix("Steps<").removesuffix(">") in (Path(cuda_on_cpu.HERE) / "scale_steps.cpp").read_text()

    found = torch.empty(values.numel())
    numbers = (ctypes.c_double * steps.MAX_CONSTS)(*steps.padded_constants(text))
    pointers = (ctypes.c_void_p(each.data_ptr()) for each in (values, found))
    getattr(library, name)(*pointers, values.numel(), numbers, ctypes.c_float(scale.item()))
    assert_same_bytes(found, steps.evaluate(text, values, scale=scale), text)


@pytest.mark.parametrize("op", ["bits_up", "ue8m0"])
def test_a_rounding_by_the_bits_is_the_next_power_of_two(op: str) -> None:
    values = maxima()
    normal = values[(values >= 2.0**-126) & (values <= 2.0**127)]
    found = steps.evaluate(op, normal)
    assert bool(((found >= normal) & (found < 2 * normal) & (torch.frexp(found).mantissa == 0.5)).all())


def test_steps_of_a_scale_on_the_host_are_no_kernels_business() -> None:
    x, scale = torch.empty(4, 8, dtype=torch.bfloat16, device="meta"), torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"mul:s0\|recip wanted an operand with steps of its own on the device of x"):
        torch.ops.inductor_ext.fp8_downcast(x, [scale], "f32 mul:s0|recip", torch.float8_e4m3fn)


@pytest.mark.nvcc
@pytest.mark.slow
def test_every_step_compiles(tmp_path: Path) -> None:
    options = Settings().replace(cache_dir=str(tmp_path), arch="sm_90a", progress=False)
    try:
        jit.find_toolchain(options)
    except ToolchainError as error:
        pytest.skip(f"no nvcc: {str(error)[:200]}")
    bf16, e4 = torch.bfloat16, torch.float8_e4m3fn
    scale = "f64 max:1e-12 add:1.0 min:9.0 div:3.0 recip mul:448.0 f32 log2 floor pow2 log2 ceil exp2 recip"
    program = "f32 mul:amax|f32|add:1e-06|nonzero_or:1.0|positive_or:2.0|bits_up|ue8m0|abs div:scale|recip min:448.0"
    keys = [(bf16, granularity, scale, program, e4) for granularity in ("row", "tensor")]
    rows = (bf16, "mul:s0|recip f32 div:r1|recip|ceil", e4, (bf16, torch.float32))
    specs = [*(QUANTIZE.spec_of_key(key, "sm_90a") for key in keys), DOWNCAST.spec_of_key(rows, "sm_90a")]
    built = jit.prebuild(specs, tmp_path / "prebuilt", options)
    assert not {spec.name: str(made) for spec, made in built.items() if isinstance(made, Exception)}
