"""The compilers that build kernels, and the GPU target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from inductor_ext.errors import ToolchainError
from inductor_ext.jit import compilers
from inductor_ext.settings import Settings, current

# NDEBUG: CUTLASS asserts inside its barriers, and a kernel that may call __assertfail gets its wgmma serialised (ptxas C7510).
# -z now: an undefined symbol shows at load, where it can be handled, not at the first call.
# no-gnu-unique: two binaries of one template would share its static variables, such as "this kernel has been configured".
BASE_FLAGS = (
    *("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-shared"),
    *("-Xcompiler", "-fPIC,-fno-gnu-unique", "-Xlinker", "-z,now"),
)


@dataclasses.dataclass(frozen=True)
class Compilers:
    """Version texts as a binary's identity holds them; None where this machine has no such compiler."""

    nvcc: str | None
    host: str | None


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """A usable pair of compilers. ``system_dirs`` are the include directories that belong to them."""

    nvcc: Path
    nvcc_version: str
    host: Path
    host_version: str
    system_dirs: tuple[Path, ...]

    @property
    def compilers(self) -> Compilers:
        return Compilers(self.nvcc_version, self.host_version)

    def describe(self) -> str:
        """Short versions, such as ``nvcc 13.0.88 with g++ 12.2.0``."""
        nvcc, host = compilers.short_version(self.nvcc_version), compilers.short_version(self.host_version)
        return f"nvcc {nvcc} with {self.host.name} {host}"


def arch_of(capability: tuple[int, int]) -> str:
    """Exact target of a GPU: from compute capability 9.0 on the arch-specific one, which wgmma, TMA and tcgen05 need."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def current_arch(settings: Settings | None = None) -> str | None:
    """Exact target of the current GPU (``sm_90a``), or ``settings.arch``; None without a GPU."""
    settings = settings or current()
    if settings.arch:
        return settings.arch
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return arch_of(torch.cuda.get_device_capability())


def find_toolchain(settings: Settings | None = None) -> Toolchain:
    """nvcc and its host compiler. Raises ``ToolchainError`` naming every place looked at, and the fix."""
    settings = settings or current()
    nvcc, looked = compilers.find_nvcc(settings)
    if nvcc is None:
        raise ToolchainError(f"no nvcc: looked at {'; '.join(looked)}. To fix: {compilers.INSTALL_NVCC}")
    host, looked = compilers.find_host_compiler()
    if host is None:
        raise ToolchainError(
            f"nvcc is {nvcc}, but it needs a host C++ compiler: looked at {'; '.join(looked)}. "
            f"To fix: {compilers.INSTALL_HOST}"
        )
    memo = compilers.VersionMemo(settings.cache_path() / "toolchain.json")
    nvcc_text, nvcc_dirs = memo.get(nvcc, compilers.probe_nvcc)
    host_text, host_dirs = memo.get(host, compilers.probe_host)
    dirs = tuple(dict.fromkeys(Path(d) for d in [*nvcc_dirs, *host_dirs]))
    return Toolchain(nvcc, compilers.with_environment(nvcc_text, nvcc), host, host_text, dirs)


def known_compilers(settings: Settings) -> Compilers:
    """Versions of the compilers that are here; never raises: a warm load needs no compiler."""
    memo = compilers.VersionMemo(settings.cache_path() / "toolchain.json")

    def ask(path: Path | None, probe: Callable[[Path], tuple[str, list[str]]]) -> str | None:
        try:
            return memo.get(path, probe)[0] if path else None
        except ToolchainError:
            return None

    path = compilers.find_nvcc(settings)[0]
    nvcc = ask(path, compilers.probe_nvcc)
    host = ask(compilers.find_host_compiler()[0], compilers.probe_host)
    return Compilers(compilers.with_environment(nvcc, path) if path and nvcc else None, host)
