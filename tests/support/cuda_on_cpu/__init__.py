"""Kernels' own sources compiled by the host compiler and run on the CPU, where no GPU is: see ``cuda_on_cpu.h``."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "kernels"
FLAGS = ("-std=c++17", "-O1", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-U_FORTIFY_SOURCE")


def compiled(name: str, folder: Path) -> ctypes.CDLL:
    """``name``.cpp as a library, made in ``folder``."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    made = folder / f"{name}.so"
    command = [compiler, *FLAGS, f"-I{HERE}", f"-I{KERNELS}"]
    command += ["-fno-gnu-unique"]  # a copy of the library has variables of its own
    command += [f"-I{KERNELS / 'include'}", str(HERE / f"{name}.cpp"), "-o", str(made)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[:4000]
    return ctypes.CDLL(str(made))


class Given(ctypes.Structure):
    """A tensor of at most four dimensions, and the bytes from its first element to its last."""

    _fields_ = (
        ("pointer", ctypes.c_void_p),
        ("ndim", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
    )

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Any:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1 if tensor.numel() else 0
        sizes, strides = ((ctypes.c_int64 * 4)(*each) for each in (tensor.shape, tensor.stride()))
        return cls(tensor.data_ptr(), tensor.dim(), last * tensor.element_size(), sizes, strides)
