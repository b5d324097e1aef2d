"""mxfp8_grouped_mm's kernel for compute capability 9.0: its own source, compiled by g++, on the CPU (``hopper_on_cpu.h``)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_ext.kernels.mxfp8_grouped_mm import hopper
from tests.support.cuda_on_cpu import KERNELS, Given

HERE = Path(__file__).parent


class Kernel:
    """One tile, by the key that `hopper` has for it. A call raises RuntimeError where hardware would hang or fault."""

    def __init__(self, key: Any, folder: Path) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("no g++")
        made = folder / "kernel.so"
        types, _, _ = hopper.made(key).partition("<")[2].rpartition(">")
        kind, out, channels, tokens = types.split(", ")
        command = [compiler, "-std=c++17", "-O1", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
        command += [f"-I{HERE}", f"-I{KERNELS}", f"-I{KERNELS / 'include'}"]
        command += [f"-DMXFP8_{name}={value}" for name, value in zip(("KIND", "OUT", "W", "N"), (kind, out, channels, tokens))]
        run = subprocess.run([*command, str(HERE / "mxfp8_grouped_mm.cpp"), "-o", str(made)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[:4000]
        self.library = ctypes.CDLL(str(made))

    def __call__(
        self, x: torch.Tensor, x_scale: torch.Tensor | None, w: Any, w_scale: Any, offs: Any, out: Any, *, sms: int = 2
    ) -> None:
        given = [None if each is None else Given.of(each) for each in (x, x_scale, w, w_scale, offs, out)]
        error = ctypes.create_string_buffer(500)
        if self.library.mxfp8_grouped_mm(*(each and ctypes.byref(each) for each in given), sms, error, 500):
            raise RuntimeError(error.value.decode())
