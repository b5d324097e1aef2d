"""Compile a kernel and look at its PTX and its machine code: what can be known of one that no GPU here can run."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from inductor_ext import jit
from inductor_ext.errors import ToolchainError
from inductor_ext.settings import Settings


def _disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that Triton ships."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    roots = [Path(place) / "backends/nvidia/bin" for place in (triton.submodule_search_locations or ())] if triton else []
    nvcc = shutil.which("nvcc")
    roots += [Path(nvcc).resolve().parent] if nvcc else []
    roots += sorted(Path("/usr/local").glob("cuda*/bin"))
    return found or next((str(root / "cuobjdump") for root in roots if (root / "cuobjdump").is_file()), None)


class Built:
    """A compiled kernel, its PTX, and its machine code where it can be disassembled. Skips the test where there is no nvcc."""

    def __init__(self, spec: jit.JitSpec, folder: Path) -> None:
        folder.mkdir()
        options = Settings().replace(cache_dir=str(folder / "cache"), arch=spec.arch, progress=False)
        try:
            jit.find_toolchain(options)
        except ToolchainError as error:
            pytest.skip(f"no nvcc: {str(error)[:200]}")
        kept = dataclasses.replace(spec, flags=(*spec.flags, "-keep", "-keep-dir", str(folder)))
        (binary,) = jit.prebuild([kept], folder / "built", options).values()
        assert isinstance(binary, Path), str(binary)
        self.binary = binary
        (self.ptx,) = (path.read_text() for path in folder.glob("*.ptx"))
        self.sass = ""
        tool = _disassembler()
        if tool:
            self.sass = subprocess.run([tool, "-sass", str(binary)], capture_output=True, text=True, check=True).stdout

    def instructions(self, pattern: str) -> list[str]:
        """Those of the machine code, in its order."""
        return re.findall(rf"\b(?:{pattern})[A-Z0-9_.]*", self.sass)
