"""nvcc compiles every op's examples for Hopper and Blackwell, in parallel, and what comes out exports its functions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from inductor_ext import jit, registry
from inductor_ext.errors import ToolchainError
from inductor_ext.settings import Settings

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]


def _examples(arch: str) -> list[jit.JitSpec]:
    return [spec for op in registry.ops() for spec in op.examples(arch)]


#: The tile family, which adds residuals, gates and rotates heads, is Hopper's, and so is attention; on another GPU rules refuse
#: or take libraries, and the ops run PyTorch's operators.
HOPPER_ONLY = {"scaled_mm_act_mul", "scaled_mm_add", "scaled_mm_rope", "varlen_attention"}

#: Ops that say something in a graph and are computed, where nothing replaces them, by another op and PyTorch.
COMPOSED = {"mxfp8_round"}


def test_every_op_has_an_example_and_a_source() -> None:
    for op in registry.ops():
        if op.kernel is None:
            assert op.library is not None or op.name in COMPOSED, f"{op.name} has neither kernels nor another library's"
            continue
        for arch in ("sm_90a", "sm_100a") if op.name not in HOPPER_ONLY else ("sm_90a",):
            assert op.examples(arch), f"{op.name} for {arch}"


#: What other tests here compile, to look at the machine code: up to a minute of nvcc each.
ELSEWHERE = {"mxfp8_grouped_mm/blackwell.cuh", "mxfp8_grouped_mm/hopper.cuh", "scaled_mm/blackwell.cuh"}
#: Kernels of one source that one nvcc compiles, which takes half as long as one each: reading the headers is most of it.
TOGETHER = 5


def _together(specs: list[jit.JitSpec]) -> list[jit.JitSpec]:
    """The same functions of fewer binaries, each under a name of its own."""
    found = []
    for source in sorted({spec.source for spec in specs}):
        those = [spec for spec in specs if spec.source == source]
        assert not any(spec.flags for spec in those), f"{source}: flags of one kernel would be all kernels'"
        for first in range(0, len(those), TOGETHER):
            some = those[first : first + TOGETHER]
            exports = tuple((f"{name}_{index}", code) for index, spec in enumerate(some) for name, code in spec.exports)
            found.append(jit.JitSpec(some[0].name, source, exports, some[0].arch))
    return sorted(found, key=lambda spec: -len(spec.exports))  # the longest first: all cores end together


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_examples_compile(arch: str, tmp_path: Path) -> None:
    options = Settings().replace(cache_dir=str(tmp_path), arch=arch, progress=False)
    try:
        jit.find_toolchain(options)
    except ToolchainError as error:
        pytest.skip(f"no nvcc: {str(error)[:200]}")
    specs = [spec for spec in _examples(arch) if spec.source not in ELSEWHERE]
    if arch == "sm_100a":  # one of each kernel: the other examples differ in types and steps, which sm_90a's compile
        specs = list({spec.exports[0][1].partition("<")[0]: spec for spec in specs}.values())
    missing = [spec.source for spec in specs if not (jit.kernels_root() / spec.source).is_file()]
    assert not missing
    built: dict[jit.JitSpec, Any] = jit.prebuild(_together(specs), tmp_path / "prebuilt", options)
    failed = {spec.name: str(result) for spec, result in built.items() if isinstance(result, Exception)}
    assert not failed, failed
    assert all(path.is_file() for path in built.values())
    if shutil.which("cuobjdump") and shutil.which("nm"):
        import subprocess

        for spec, path in built.items():
            code = subprocess.run(["cuobjdump", "--list-elf", str(path)], capture_output=True, text=True, check=True).stdout
            assert arch in code, f"{spec.name}: no machine code for {arch}"
            symbols = subprocess.run(["nm", "-D", str(path)], capture_output=True, text=True, check=True).stdout
            for name, _ in spec.exports:
                assert f"__tvm_ffi_{name}" in symbols
