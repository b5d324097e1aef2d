"""scaled_mm's SM100 kernels: no GPU has run them, so their PTX and machine code are looked at instead."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from inductor_ext import jit
from inductor_ext.kernels.scaled_mm import choice
from inductor_ext.kernels.scaled_mm.op import OP, decide
from tests.support.machine_code import Built

ARCH = "sm_100a"
NAMES = {"128x128": "blackwell:128x128", "256x128": "blackwell:256x128@2x1"}


@pytest.fixture(scope="module", params=list(NAMES))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    keys = {key[0]: key for key in OP.kernel.examples(ARCH)}  # type: ignore[union-attr, operator]
    spec = OP.spec_of_key(keys[NAMES[request.param]], ARCH)
    return request.param, Built(spec, tmp_path_factory.mktemp("blackwell") / request.param)


@pytest.mark.nvcc
@pytest.mark.slow
def test_tensor_cores_of_one_or_two_sms(built: Any) -> None:
    tile, code = built
    pair = tile == "256x128"
    used = set(re.findall(r"tcgen05\.mma\.cta_group::(\d)\.kind::(\w+)", code.ptx))
    assert used == {("2" if pair else "1", "f8f6f4")}
    assert "wgmma" not in code.ptx and "mma.sync" not in code.ptx
    if code.sass:
        assert set(code.instructions("UTC[A-Z]*MMA")) == {"UTCQMMA.2CTA" if pair else "UTCQMMA"}
        assert {name.endswith("2CTA") for name in code.instructions("UTMALDG")} == {pair}


@pytest.mark.nvcc
@pytest.mark.slow
def test_scales_are_read_after_the_kernel_ahead_has_ended(built: Any) -> None:
    """CUTLASS's epilogue warps do not wait by themselves: a scale that is still being computed would be read stale."""
    _, code = built
    assert "griddepcontrol.wait" in code.ptx and "griddepcontrol.launch_dependents" in code.ptx
    loads = re.findall(r"griddepcontrol\.wait|ld\.global[.\w]*", code.ptx)
    assert loads and loads[0] == "griddepcontrol.wait"
    order = code.instructions("ACQBULK|LDG")
    assert not order or all(order[i - 1] == "ACQBULK" for i, name in enumerate(order) if name.startswith("LDG")), order


@pytest.mark.nvcc
@pytest.mark.slow
def test_nothing_spills(built: Any) -> None:
    _, code = built
    assert ".local" not in code.ptx
    assert code.instructions("STL|LDL") == []


@pytest.mark.nvcc
@pytest.mark.slow
def test_errors_name_the_argument(built: Any) -> None:
    """The host functions, without a GPU: as far as they get with tensors of a CPU."""
    import tvm_ffi

    tile, code = built
    module = tvm_ffi.load_module(str(code.binary))
    cluster = 2 if tile == "256x128" else 1
    e4 = torch.zeros(128, 128).to(torch.float8_e4m3fn)
    scale, out = torch.ones(1), torch.empty(128, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=rf"cluster: wanted {cluster} x 1, as compiled in, found 4 x 1"):
        module.run(e4, e4.t(), scale, scale, None, out, False, 4, 1)
    with pytest.raises(TypeError, match="a: wanted float8_e4m3fn, found bfloat16"):
        module.run(out, e4.t(), scale, scale, None, out, False, cluster, 1)
    with pytest.raises(ValueError, match="a: wanted a CUDA tensor"):
        module.run(e4, e4.t(), scale, scale, None, out, False, cluster, 1)
    with pytest.raises(ValueError, match="wanted one a and scale_a or 2, and 2 of the others, as of b, found 1, 1, 1, 2"):
        module.run_group([e4], [e4.t()] * 2, [scale], [scale], [None, None], out, False, cluster, 1)
    with pytest.raises(ValueError, match="a: wanted a CUDA tensor"):
        module.run_group([e4], [e4.t()] * 2, [scale], [scale] * 2, [None, out[0]], out, False, cluster, 1)


@pytest.mark.parametrize("target", ["sm_89", "sm_120a"])
def test_other_targets_keep_pytorchs_operator(target: str) -> None:
    assert OP.examples(target) == []
    assert choice.table(target) is None
    assert decide(target, 128, (4096,), 4096, True, True) is None


def test_no_table_for_blackwell_itself() -> None:
    """Nothing was measured there: a kernel is used when asked for by name, or when Inductor's autotuner finds it faster."""
    assert choice.table(ARCH) is None
    assert decide(ARCH, 128, (4096,), 4096, True, True) is None


def test_the_source_says_that_it_has_not_run() -> None:
    assert "NOT RUN ON HARDWARE" in (jit.kernels_root() / "scaled_mm/blackwell.cuh").read_text()
