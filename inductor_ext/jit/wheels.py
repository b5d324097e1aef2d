"""nvcc out of pip wheels: where it is installed, and whether it is whole.

NVIDIA ships the toolkit in parts, which pip puts into one folder, ``site-packages/nvidia/cu13``. nvcc needs five of them, and
neither its own requirements nor their versions make pip install a set that fits: ``inductor-ext[nvcc]`` does. `cuda.pathfinder`
finds an nvcc too, and says neither whether it is whole nor whether it fits torch's CUDA.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from importlib import metadata
from pathlib import Path

NVCC = "nvidia-cuda-nvcc"
#: Part -> what nvcc looks for of it, below its folder.
PARTS = {
    NVCC: ("bin/nvcc",),
    "nvidia-nvvm": ("nvvm/bin/cicc",),
    "nvidia-cuda-crt": ("include/crt/host_config.h",),
    "nvidia-cuda-runtime": ("include/cuda_runtime.h", "lib/libcudart_static.a"),
    "nvidia-cuda-cccl": ("include/cccl/nv/target",),
}
#: These come out of one compiler: an nvcc of 13.0 hands on what the cicc of 13.5 made, and ptxas does not know it.
_SAME_VERSION = (NVCC, "nvidia-nvvm", "nvidia-cuda-crt")


@dataclasses.dataclass(frozen=True)
class Wheels:
    """nvcc's wheels of this environment. ``unfit`` says why they cannot be used, "" where they can."""

    nvcc: Path
    versions: dict[str, str]
    unfit: str

    def describe(self) -> str:
        return f"{NVCC} {self.versions[NVCC]} at {self.nvcc}" + (f" ({self.unfit})" if self.unfit else "")


@functools.cache
def installed() -> Wheels | None:
    """The wheels of nvcc, None where that is not installed. Imports neither torch nor CUDA."""
    try:
        found = metadata.distribution(NVCC)
    except metadata.PackageNotFoundError:
        return None
    root = Path(str(found.locate_file(f"nvidia/cu{_numbers(found.version)[0]}")))
    versions = {name: version for name in PARTS if (version := _version(name))}
    return Wheels(root / "bin" / "nvcc", versions, _unfit(root, versions))


def versions_beside(nvcc: Path) -> dict[str, str]:
    """The wheels that ``nvcc`` is one of; they are replaced one by one. Empty for any other nvcc."""
    wheels = installed()
    return wheels.versions if wheels and wheels.nvcc == nvcc else {}


def library_path(nvcc: Path) -> Path | None:
    """Where the linker finds the libraries of an nvcc that itself looks in ``lib64``, as those of 13.0 and 13.1 do."""
    root = nvcc.resolve().parent.parent
    return root / "lib" if (root / "lib" / "libcudadevrt.a").is_file() and not (root / "lib64").exists() else None


def torch_cuda() -> str | None:
    """``13.0``, of the torch that is installed and not imported; None where it is built without CUDA, or is not there."""
    try:
        text = Path(str(metadata.distribution("torch").locate_file("torch/version.py"))).read_text()
    except (metadata.PackageNotFoundError, OSError):
        return None
    match = re.search(r"^cuda\b.*=\s*['\"](\d+\.\d+)", text, re.MULTILINE)
    return match.group(1) if match else None


def _unfit(root: Path, versions: dict[str, str]) -> str:
    missing = [name for name, paths in PARTS.items() if not all((root / path).is_file() for path in paths)]
    if missing:
        return f"not whole: there is no {', no '.join(missing)}"
    series = {name: ".".join(_numbers(versions[name])[:2]) for name in _SAME_VERSION if name in versions}
    if len(set(series.values())) > 1:
        return "of several versions: " + ", ".join(f"{name} {version}" for name, version in series.items())
    cuda = torch_cuda()
    if cuda is not None and cuda.split(".")[0] != series[NVCC].split(".")[0]:
        return f"for CUDA {series[NVCC]}, and torch is built for CUDA {cuda}"
    return ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[str]:
    return re.findall(r"\d+", version)
