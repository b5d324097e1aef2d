"""Where a kernel's headers come from, and whether they still are what a binary was built from.

nvcc's depfile names every header that it read (for host and device passes). Each is one of: ours, under ``kernels/``:
always hashed; of a package whose version is recorded (tvm-ffi, CUTLASS); of the compilers (CUDA toolkit, libstdc++,
libc): covered by their version texts; anything else: hashed too. A CUTLASS kernel reads 1 100 headers, so hashing all
of them at each load would cost more than the load itself.

Not seen, as in ccache: a new file that would now be found *before* a header that was read.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from inductor_ext.jit.files import read_regular

PACKAGE, TVM_FFI, CUTLASS = "inductor-ext", "apache-tvm-ffi", "nvidia-cutlass"
_OURS = "kernels:"
_LARGEST = 256 << 20  # bytes of one header; a damaged record may name anything, /dev/zero or a pipe too
_SOURCE_SUFFIXES = {".cuh", ".cu", ".h", ".hpp", ".hxx", ".inl", ".cpp"}


def kernels_root() -> Path:
    """The installed ``kernels/`` directory, real path (in a checkout ``inductor_ext/kernels`` is a link)."""
    return (Path(__file__).resolve().parent.parent / "kernels").resolve()


def tvm_ffi_includes() -> list[Path]:
    """tvm-ffi's and dlpack's include directories. Imports tvm_ffi, and with it torch: only for builds."""
    from tvm_ffi import libinfo

    paths = (libinfo.find_include_path(), libinfo.find_dlpack_include_path())
    return list(dict.fromkeys(Path(p).resolve() for p in paths))


@functools.cache
def cutlass_include() -> Path | None:
    """CUTLASS headers of the nvidia-cutlass wheel, without importing it; None when the wheel is absent."""
    try:
        dist = importlib.metadata.distribution(CUTLASS)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(dist.locate_file("cutlass_library/source/include")))
    if path.is_dir():
        return path.resolve()
    for file in dist.files or ():  # an editable or relocated install
        if "cutlass_library/source/include" in file.as_posix():
            whole = Path(str(dist.locate_file(file))).resolve()
            return next((p for p in whole.parents if p.name == "include"), None)
    return None


def include_dirs() -> list[Path]:
    """Include directories in the order that nvcc gets them: ours, tvm-ffi, CUTLASS when its wheel is installed."""
    cutlass = cutlass_include()
    return [kernels_root() / "include", kernels_root(), *tvm_ffi_includes(), *([cutlass] if cutlass else [])]


@functools.cache
def package_version(name: str) -> str | None:
    """Installed version of a distribution, None when there is none (a checkout on PYTHONPATH)."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def snapshot() -> dict[str, str]:
    """Hash of every source file under ``kernels/``, by path: what a build is about to read."""
    root = kernels_root()
    files = sorted(p for p in root.rglob("*") if p.suffix in _SOURCE_SUFFIXES and p.is_file())
    return {_OURS + p.relative_to(root).as_posix(): _sha256(p) for p in files}


def digest(values: object) -> str:
    """Short stable hash of plain values."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:24]


def parse_depfile(text: str) -> list[str]:
    """Paths of a make rule: ``target : a b \\`` with spaces and ``#`` escaped by a backslash and ``$`` doubled."""
    body = text.replace("\\\r\n", " ").replace("\\\n", " ").partition(": ")[2]
    body = body.replace("\\ ", "\0").replace("\\#", "#").replace("$$", "$")
    return [word.replace("\0", " ") for word in body.split()]


def collect(paths: Iterable[str], compilers: Sequence[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """Split what nvcc read: (hash by path of ours and unknown ones, version by package of the packages used).

    ``compilers``: directories of headers that belong to them.
    """
    root = kernels_root()
    packaged = [(TVM_FFI, directory) for directory in tvm_ffi_includes()]
    cutlass = cutlass_include()
    if cutlass:
        packaged.append((CUTLASS, cutlass))
    packaged = [(name, directory) for name, directory in packaged if package_version(name)]
    hashes: dict[str, str] = {}
    packages = {name: version for name in (PACKAGE, TVM_FFI) if (version := package_version(name))}
    for raw in paths:
        path, real = Path(raw), Path(raw).resolve()
        ours = next((p.relative_to(root).as_posix() for p in (path, real) if p.is_relative_to(root)), None)
        if ours is not None:
            hashes[_OURS + ours] = _sha256(real)
            continue
        package = next((name for name, directory in packaged if real.is_relative_to(directory)), None)
        if package:
            packages[package] = package_version(package) or ""
        elif not any(real.is_relative_to(directory) for directory in compilers):
            hashes[str(path if path.is_absolute() else real)] = _sha256(real)
    return hashes, packages


def changed(hashes: Mapping[str, str], packages: Mapping[str, str], *, shipped_only: bool) -> str | None:
    """First difference between what a binary was built from and what is here now, in words; None when all agree.

    ``shipped_only``: headers outside ``kernels/`` that this machine lacks do not count (a prebuilt directory). A
    package that is not installed here cannot differ either: binaries need no CUTLASS headers to run.
    """
    for name, version in packages.items():
        here = package_version(name)
        if here is not None and here != version:
            return f"built with {name} {version}, here is {here}"
    root = kernels_root()
    for name, wanted in hashes.items():
        ours = name.startswith(_OURS)
        path = root / name.removeprefix(_OURS) if ours else Path(name)
        try:
            found = _sha256(path) if ours else _remembered_sha256(path)
        except (OSError, ValueError):  # ValueError: a damaged record names what no file can be called
            if shipped_only and not ours:
                continue
            return f"built from {name.removeprefix(_OURS)}, which is not here"
        if found != wanted:
            return f"{name.removeprefix(_OURS)} changed since it was built"
    return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(read_regular(path, _LARGEST)).hexdigest()


_foreign: dict[tuple[str, int, int], str] = {}


def _remembered_sha256(path: Path) -> str:
    """Hash of a header that is not ours, once a process as long as its time and size stay: there may be many."""
    stat = path.stat()
    key = (str(path), stat.st_mtime_ns, stat.st_size)
    if key not in _foreign:
        _foreign[key] = _sha256(path)
    return _foreign[key]
