"""The compilers that build kernels, the GPU target, and what tells people of them: ``diagnose``, ``write_clangd``."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from inductor_ext.errors import InductorExtError, SettingError, ToolchainError
from inductor_ext.jit import compilers, headers
from inductor_ext.jit.files import said
from inductor_ext.settings import Settings, current

# NDEBUG: CUTLASS asserts inside its barriers, and a kernel that may call __assertfail gets its wgmma serialised (ptxas C7510).
# -z now: an undefined symbol shows at load, where it can be handled, not at the first call.
# no-gnu-unique: two binaries of one template would share its static variables, such as "this kernel has been configured".
BASE_FLAGS = (
    *("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-shared"),
    *("-Xcompiler", "-fPIC,-fno-gnu-unique", "-Xlinker", "-z,now"),
)
_FREE_DISK_WANTED = 1 << 30


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


def current_arch(settings: Settings | None = None) -> str | None:
    """Exact target of the current GPU (``sm_90a``), or ``settings.arch``; None without a GPU.

    From compute capability 9.0 on the arch-specific target is taken: wgmma, TMA and tcgen05 need it.
    """
    settings = settings or current()
    if settings.arch:
        return settings.arch
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


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
    return Toolchain(nvcc, compilers.with_environment(nvcc_text), host, host_text, dirs)


def known_compilers(settings: Settings) -> Compilers:
    """Versions of the compilers that are here; never raises: a warm load needs no compiler."""
    memo = compilers.VersionMemo(settings.cache_path() / "toolchain.json")

    def ask(path: Path | None, probe: Callable[[Path], tuple[str, list[str]]]) -> str | None:
        try:
            return memo.get(path, probe)[0] if path else None
        except ToolchainError:
            return None

    nvcc = ask(compilers.find_nvcc(settings)[0], compilers.probe_nvcc)
    host = ask(compilers.find_host_compiler()[0], compilers.probe_host)
    return Compilers(compilers.with_environment(nvcc) if nvcc else None, host)


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of ``inductor-ext doctor``; ``ok=None`` means absent but not needed for everything."""

    name: str
    ok: bool | None
    found: str
    fix: str = ""


def diagnose(settings: Settings | None = None) -> list[Check]:
    """Everything a build or a load depends on, each with what was found and how to fix it. Never raises."""
    results = []
    try:
        settings = settings or current()
    except SettingError as error:  # doctor is for broken machines: a wrong variable must not hide what else is wrong
        settings = Settings()
        fix = "correct or unset the variable; the lines below are about the defaults"
        results.append(Check("settings", False, str(error), fix))
    checks = [_check_nvcc, _check_host, _check_tvm_ffi, _check_cutlass, _check_torch, _check_gpu]
    checks += [_check_cache_dir, _check_free_disk, _check_prebuilt]
    for check in checks:
        try:
            results.append(check(settings))
        except Exception as error:  # doctor is for broken machines: one failing check must not hide the others
            results.append(Check(check.__name__.removeprefix("_check_"), False, f"{type(error).__name__}: {error}"))
    return results


def _check_nvcc(settings: Settings) -> Check:
    path, looked = compilers.find_nvcc(settings)
    if path is None:
        return Check("nvcc", None, f"none; looked at {'; '.join(looked)}", compilers.INSTALL_NVCC)
    text = compilers.probe_nvcc(path)[0]
    return Check("nvcc", True, f"{compilers.short_version(text)} at {path}")


def _check_host(settings: Settings) -> Check:
    path, looked = compilers.find_host_compiler()
    if path is None:
        return Check("host compiler", None, f"none; looked at {'; '.join(looked)}", compilers.INSTALL_HOST)
    return Check("host compiler", True, f"{compilers.probe_host(path)[0]} at {path}")


def _check_tvm_ffi(settings: Settings) -> Check:
    fix = "pip install apache-tvm-ffi"
    version = headers.package_version(headers.TVM_FFI)
    try:
        includes = headers.tvm_ffi_includes()
    except (ImportError, RuntimeError) as error:
        return Check("tvm-ffi", False, str(error), fix)
    return Check("tvm-ffi", True, f"{version or 'unknown version'}, headers in {includes[0]}")


def _check_cutlass(settings: Settings) -> Check:
    version, path = headers.package_version(headers.CUTLASS), headers.cutlass_include()
    if path is None:
        return Check("CUTLASS headers", None, "none; GEMM kernels cannot be built", "pip install nvidia-cutlass")
    return Check("CUTLASS headers", True, f"{version} in {path}")


def _check_torch(settings: Settings) -> Check:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    fix = "" if torch.version.cuda else "install a CUDA build of torch to run kernels; building them works without"
    return Check("torch", True if torch.version.cuda else None, f"{torch.__version__} ({cuda})", fix)


def _check_gpu(settings: Settings) -> Check:
    import torch

    arch = current_arch(settings)
    if arch is None:
        return Check("GPU", None, "none visible to torch", "set INDUCTOR_EXT_ARCH (sm_90a, …) to build without one")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, target set by hand"
    return Check("GPU", True, f"{name}, target {arch}")


def _check_cache_dir(settings: Settings) -> Check:
    from inductor_ext.jit.cache import KernelCache

    path = settings.cache_path()
    try:
        KernelCache(path).make_writable()
    except OSError as error:
        fix = "set INDUCTOR_EXT_CACHE_DIR to a directory you can write; until then each process builds for itself"
        return Check("cache directory", False, f"{path}: {said(error)}", fix)
    return Check("cache directory", True, f"{path}, writable")


def _check_free_disk(settings: Settings) -> Check:
    path = settings.cache_path()
    existing = next(p for p in (path, *path.parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    enough = free >= _FREE_DISK_WANTED
    fix = "" if enough else "free some space or set INDUCTOR_EXT_CACHE_DIR to another disk (wanted 1 GiB)"
    return Check("free disk", enough, f"{free / 2**30:.1f} GiB at {existing}", fix)


def _check_prebuilt(settings: Settings) -> Check:
    from inductor_ext.jit.cache import KernelCache

    if not settings.prebuilt_dir:
        return Check("prebuilt directory", None, "not set")
    path = settings.prebuilt_path()
    cache = KernelCache(path, prebuilt=True)
    if reason := cache.refusal():
        fix = "make it with `inductor-ext build`; nobody but its owner (you or root) may be able to write there"
        return Check("prebuilt directory", False, f"{path} {reason}", fix)
    entries = cache.entries()
    if not entries:
        what = "holds no kernels" if path.is_dir() else "is not a directory"
        return Check("prebuilt directory", False, f"{path} {what}", "make it with `inductor-ext build`")
    arches = ", ".join(sorted({entry.arch for entry in entries}))
    return Check("prebuilt directory", True, f"{path}: {len(entries)} kernels for {arches}")


def write_clangd(directory: Path, settings: Settings | None = None) -> list[Path]:
    """Write ``.clangd`` and ``compile_commands.json`` so that an editor understands ``kernels/*.cuh``.

    Both name paths of this machine, so they are not for a repository. Raises ``ToolchainError`` when they cannot be
    written.
    """
    settings = settings or current()
    arguments = _clang_arguments(settings)
    root = headers.kernels_root()
    sources = sorted(p for p in root.rglob("*") if p.suffix in (".cuh", ".cu"))
    commands = [{"directory": str(root), "file": str(p), "arguments": ["clang++", *arguments, str(p)]} for p in sources]
    lines = ["# Made by `inductor-ext clangd`; names paths of this machine.", "CompileFlags:", "  Add:"]
    lines += [f"    - {json.dumps(argument)}" for argument in arguments]
    lines += ["Diagnostics:", '  Suppress: ["drv_unsupported_cuda_version"]']
    written = [Path(directory) / ".clangd", Path(directory) / "compile_commands.json"]
    try:
        written[0].write_text("\n".join(lines) + "\n")
        written[1].write_text(json.dumps(commands, indent=1) + "\n")
    except OSError as error:
        raise ToolchainError(f"cannot write editor settings: {error}") from error
    return written


def _clang_arguments(settings: Settings) -> list[str]:
    try:
        arch = current_arch(settings)
    except InductorExtError:
        arch = None
    arguments = ["-xcuda", BASE_FLAGS[0], f"--cuda-gpu-arch={arch or 'sm_90a'}", "--no-cuda-version-check"]
    try:
        toolkit = next(iter(d for d in find_toolchain(settings).system_dirs if (d / "cuda_runtime.h").is_file()), None)
    except ToolchainError:
        toolkit = None
    if toolkit is not None:  # <toolkit>/targets/<platform>/include or <toolkit>/include
        up = 3 if toolkit.parent.parent.name == "targets" else 1
        arguments.append(f"--cuda-path={toolkit.parents[up - 1]}")
    return [*arguments, *(f"-I{path}" for path in headers.include_dirs())]
