"""Everything that a build or a load depends on, looked at: what ``inductor-ext doctor`` shows."""

from __future__ import annotations

import dataclasses
import shutil

from inductor_ext.errors import SettingError
from inductor_ext.jit import compilers, headers, shipped
from inductor_ext.jit.cache import KernelCache
from inductor_ext.jit.files import said
from inductor_ext.jit.toolchain import current_arch
from inductor_ext.settings import Settings, current

_FREE_DISK_WANTED = 1 << 30


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
    checks += [_check_cache_dir, _check_free_disk, _check_prebuilt, _check_wheels]
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
        found = "none, which only building needs: kernels of products cannot be built here"
        return Check("CUTLASS headers", None, found, "pip install nvidia-cutlass")
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


def _check_wheels(settings: Settings) -> Check:
    found = shipped.every()
    if not found:
        return Check("kernel wheels", None, "none installed", "make one with `inductor-ext build --wheel`")
    told, ok = [], True
    for wheel in found:
        cache = KernelCache(wheel.root, prebuilt=True)
        reason = wheel.unfit or cache.refusal()
        ok = ok and not reason
        told.append(f"{wheel.describe()}: {reason or f'{len(cache.entries())} kernels'}")
    fix = "" if ok else "install it again, for this version; nobody but its owner (you or root) may be able to write there"
    return Check("kernel wheels", ok, "; ".join(told), fix)
