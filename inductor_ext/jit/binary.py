"""A binary's bytes as a tvm-ffi module: exactly the bytes that were checked, loaded without another look at any path.

They go into a memfd, an anonymous file that is sealed and that the dynamic linker opens as ``/proc/<pid>/fd/<n>``. Nobody can
exchange it between the check and the load, a read-only or full disk and a ``noexec`` /tmp do not matter, and a process that is
killed leaves nothing behind. The descriptor stays open for the life of the process: gdb reads the symbols through it, and the
dynamic linker knows libraries by *name*, so a number that came back would give the old library instead of the new one.

A warm load of a binary of 1.1 MB takes 3.0 ms instead of 2.0 with ``dlopen`` of the cached file (two cores, shared).
On an H200 compute-sanitizer and ncu run programs whose kernels were loaded so. perf shows host functions of such a binary as
addresses in ``memfd:<kernel>.so``.
Where there is no memfd, no /proc, or no leave to run what is in memory, the bytes go to a file in a private folder,
which is deleted at exit.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inductor_ext.errors import BuildError
from inductor_ext.jit.spec import JitSpec
from inductor_ext.report.shown import line

_modules: dict[str, Any] = {}  # by sha256: one binary is loaded once, or CUDA would register its kernels twice
_names: set[str] = set()  # paths that the dynamic linker has seen


def load(data: bytes, digest: str, spec: JitSpec) -> Any:
    """``data``, whose sha256 is ``digest``, as a ``tvm_ffi.Module`` with every export present. Raises ``BuildError``.

    Modules stay loaded for the life of the process: unloading code that CUDA has registered is not safe.
    """
    import tvm_ffi  # first: binaries find libtvm_ffi's symbols in the process

    try:
        if digest not in _modules:
            open_module = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")  # load_module asks for a name in .so
            module = _opened(open_module, data, f"{spec.name}-{spec.arch}.so")
            tvm_ffi.get_global_func("ffi.ModuleGlobalsAdd")(module)  # as load_module does: never unloaded, not even at exit
            _modules[digest] = module
        for name, _ in spec.exports:
            _modules[digest].get_function(name)
    except Exception as error:  # tvm_ffi maps errors of dlopen to several classes
        first = line((str(error).strip().splitlines() or [type(error).__name__])[0])
        transient = isinstance(error, (OSError, MemoryError)) or "annot allocate memory" in first
        message = f"kernel {spec.name} ({spec.arch}) does not load: {first}"
        raise BuildError(message, first_error=first, transient=transient) from error
    return _modules[digest]


def _opened(open_module: Callable[[str, str], Any], data: bytes, name: str) -> Any:
    try:
        return open_module(_sealed(data, name), "so")
    except (AttributeError, OSError):  # not Linux; forbidden by a sandbox; no /proc
        pass
    except RuntimeError as error:
        if "failed to map segment" not in str(error):  # which is said where SELinux lets nothing in memory be run
            raise
    path = Path(tempfile.mkdtemp(prefix="inductor_ext-loaded-")) / name
    atexit.register(remove, path.parent, os.getpid())
    path.write_bytes(data)
    return open_module(str(path), "so")


def _sealed(data: bytes, name: str) -> str:
    """A path under which the dynamic linker finds ``data``, and which it has not seen before."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(data)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        process = Path("/proc/self").readlink()  # not getpid(): /proc may be that of another pid namespace
        while (path := f"/proc/{process}/fd/{descriptor}") in _names:  # somebody has closed descriptors that were not theirs
            used, descriptor = descriptor, fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, descriptor + 1)
            os.close(used)
        Path(path).stat()
    except BaseException:
        os.close(descriptor)
        raise
    _names.add(path)
    return path


def remove(path: Path, process: int) -> None:
    """Delete a folder of this process at its exit; a child that was forked from it deletes nothing."""
    if os.getpid() == process:
        with contextlib.suppress(OSError):
            shutil.rmtree(path, ignore_errors=True)
