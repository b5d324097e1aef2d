"""Build kernels for a benchmark: one nvcc call a translation unit, all of them in parallel, loaded through tvm-ffi."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import tvm_ffi

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-shared", "-Xcompiler", "-fPIC"]


@dataclasses.dataclass(frozen=True)
class Unit:
    """One translation unit: a header of ``kernels/`` (or source text) and the functions it exports."""

    name: str
    header: str
    exports: tuple[tuple[str, str], ...]  # (name, C++ expression)
    flags: tuple[str, ...] = ()
    text: str = ""

    def source(self) -> str:
        lines = [f'#include "{self.header}"', self.text]
        lines += [f"TVM_FFI_DLL_EXPORT_TYPED_FUNC({name}, ({expression}));" for name, expression in self.exports]
        return "\n".join(lines) + "\n"


def build(units: list[Unit], jobs: int | None = None) -> dict[str, Any]:
    """The loaded modules by unit name. Raises RuntimeError with nvcc's output."""
    folder = Path(tempfile.mkdtemp(prefix="kernels_"))
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    include = tvm_ffi.libinfo.find_include_path()
    library = Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent

    def compile_one(unit: Unit) -> Path:
        source, binary = folder / f"{unit.name}.cu", folder / f"{unit.name}.so"
        source.write_text(unit.source())
        command = ["nvcc", *FLAGS, *unit.flags, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-lineinfo"]
        command += [f"-I{KERNELS / 'include'}", f"-I{KERNELS}", f"-I{include}", "-o", str(binary), str(source)]
        command += [f"-L{library}", "-ltvm_ffi"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{unit.name}: {' '.join(command)}\n{done.stdout}{done.stderr}")
        return binary

    with concurrent.futures.ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        binaries = list(pool.map(compile_one, units))
    return {unit.name: tvm_ffi.load_module(str(binary)) for unit, binary in zip(units, binaries)}
