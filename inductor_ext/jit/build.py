"""Compile one ``JitSpec`` into a cache: nvcc called directly, one translation unit, one target.

A binary is published only after its headers were seen not to change meanwhile and after it was loaded once and had
every export. Every way to fail ends in a ``BuildError`` of one paragraph: which kernel, the first error, where the
whole log is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from inductor_ext.errors import BuildError
from inductor_ext.jit import headers
from inductor_ext.jit.cache import BINARY, Entry, KernelCache
from inductor_ext.jit.files import is_disk_full
from inductor_ext.jit.spec import JitSpec
from inductor_ext.jit.toolchain import BASE_FLAGS, Toolchain
from inductor_ext.settings import Settings

logger = logging.getLogger("inductor_ext.jit")

_TRIES = 3  # when sources are edited while they compile
# collect2 only repeats that ld failed: what it could not find stands a line before
_ERROR = re.compile(
    r"^(?!collect2).*(\berror\b\s*(#\S+)?\s*:|\bfatal\s*:|undefined reference|ld: cannot find"
    r"|No space left|\bKilled\b)",
    re.IGNORECASE,
)

_running: set[subprocess.Popen[str]] = set()
_running_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class _Job:
    spec: JitSpec
    cache: KernelCache
    toolchain: Toolchain
    timeout_s: float

    def failed(self, cause: str, *, output: str = "", command: list[str] | None = None, first: str = "") -> BuildError:
        log = _write_log(self, command or [], output) if output else ""
        message = f"kernel {self.spec.name} ({self.spec.arch}) was not built with {self.toolchain.describe()}: {cause}"
        if log:
            message += f". Full output: {log}"
        return BuildError(message, first_error=first or cause, log=log)


def build(spec: JitSpec, cache: KernelCache, toolchain: Toolchain, settings: Settings) -> Entry:
    """Compile and publish. The caller holds the lock of the spec's slot. Raises ``BuildError``."""
    job = _Job(spec, cache, toolchain, float(settings.build_timeout_s))
    try:
        for _ in range(_TRIES):
            entry = _build_once(job)
            if entry is not None:
                return entry
            logger.info("%s: a source changed while it compiled; compiling again", spec.name)
    except OSError as error:
        if is_disk_full(error):
            raise job.failed(_disk_full(cache.root)) from error
        raise job.failed(f"{type(error).__name__}: {error}") from error
    raise job.failed(f"its sources changed {_TRIES} times while it compiled; try again when they rest")


def _build_once(job: _Job) -> Entry | None:
    """One compile; None when a source was edited meanwhile. Raises ``BuildError`` and ``OSError``."""
    before = headers.snapshot()
    if not (headers.kernels_root() / job.spec.source).is_file():
        raise job.failed(f"its source {headers.kernels_root() / job.spec.source} does not exist")
    with job.cache.staging(job.spec) as stage:
        staged = stage / "entry"
        staged.mkdir()
        (staged / "kernel.cu").write_text(job.spec.translation_unit())
        started = time.perf_counter()
        command = _command(job, stage)
        _compile(job, command, stage)
        seconds = time.perf_counter() - started
        read = headers.parse_depfile((stage / "kernel.d").read_text())
        hashes, packages = headers.collect((p for p in read if not p.startswith(str(stage))), job.toolchain)
        if any(before.get(name, hashes[name]) != hashes[name] for name in hashes):
            return None
        _load_test(job, staged / BINARY)
        made = {"nvcc": job.toolchain.nvcc_version, "host compiler": job.toolchain.host_version, "packages": packages}
        record = {"made": made, "headers": hashes, "seconds": round(seconds, 2)}
        entry = job.cache.publish(staged, job.spec, record)
        logger.info("built %s in %.1f s: %s", job.spec.describe(), seconds, entry.path)
        return entry


def _command(job: _Job, stage: Path) -> list[str]:
    ours, *rest = headers.include_dirs()
    root, *packages = rest
    command = [str(job.toolchain.nvcc), *BASE_FLAGS, job.spec.gencode(), "-ccbin", str(job.toolchain.host)]
    command += ["-I", str(ours), "-I", str(root)]
    for path in packages:
        command += ["-isystem", str(path)]
    command += ["-MD", "-MF", str(stage / "kernel.d"), *job.spec.flags]
    return [*command, "-o", str(stage / "entry" / BINARY), str(stage / "entry" / "kernel.cu")]


def _compile(job: _Job, command: list[str], stage: Path) -> None:
    """Run nvcc. Its intermediate files go to the stage too, so that a killed build leaves nothing elsewhere."""
    code, output = _run(job, command, stage)
    binary = stage / "entry" / BINARY
    if code == 0 and binary.is_file():
        return
    first = first_error(output) or f"nvcc ended with status {code} and said nothing"
    cause = first
    if "No space left on device" in output or "Disk quota exceeded" in output:
        cause = f"{first}: {_disk_full(stage)}"
    elif code in (-signal.SIGKILL, 128 + signal.SIGKILL) or re.search(r"\bKilled\b|signal 9|status 0x9\b", output):
        cause = f"{first}: the compiler was killed, most often for memory; lower INDUCTOR_EXT_BUILD_JOBS"
    raise job.failed(cause, output=output or first, command=command, first=first)


def _run(job: _Job, command: list[str], stage: Path) -> tuple[int, str]:
    """(exit status, output). nvcc starts other programs, so it gets a process group that can be stopped as one."""
    with (stage / "output.txt").open("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=stage,
            env={**os.environ, "TMPDIR": str(stage), "LC_ALL": "C"},
            start_new_session=True,
        )
        with _running_lock:
            _running.add(process)
        try:
            code = process.wait(job.timeout_s)
        except subprocess.TimeoutExpired:
            _stop(process)
            output.seek(0)
            cause = f"nvcc was stopped after {job.timeout_s:g} s (INDUCTOR_EXT_BUILD_TIMEOUT)"
            raise job.failed(cause, output=output.read() or cause, command=command) from None
        except BaseException:
            _stop(process)
            raise
        finally:
            with _running_lock:
                _running.discard(process)
        output.seek(0)
        return code, output.read()


def _stop(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _load_test(job: _Job, binary: Path) -> None:
    """Nothing is published that does not load. A machine that only builds may lack the driver."""
    try:
        load(binary, job.spec)
    except BuildError as error:
        if "libcuda.so" not in error.first_error:
            raise job.failed(f"it compiled but does not load: {error.first_error}", first=error.first_error) from error


def stop_all() -> None:
    """Stop every compiler that this process started: Ctrl-C reaches Python, not their process groups."""
    with _running_lock:
        running = list(_running)
    for process in running:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def load(binary: Path, spec: JitSpec) -> Any:
    """The binary as a ``tvm_ffi.Module`` with every export present. Raises ``BuildError``.

    Modules stay loaded for the life of the process: unloading code that CUDA has registered is not safe.
    """
    import tvm_ffi  # first: binaries find libtvm_ffi's symbols in the process

    try:
        module = tvm_ffi.load_module(str(binary))
        for name, _ in spec.exports:
            module.get_function(name)
    except Exception as error:  # tvm_ffi maps errors of dlopen to several classes
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BuildError(f"kernel {spec.name} ({spec.arch}) does not load: {first}", first_error=first) from error
    return module


def first_error(output: str) -> str:
    """The compiler's first error line, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else "")[:500]


def _disk_full(path: Path) -> str:
    try:
        free = f"{shutil.disk_usage(path).free / 2**20:.0f} MiB free"
    except OSError:
        free = "free space unknown"
    return f"the disk of {path} is full ({free}); free some space or set INDUCTOR_EXT_CACHE_DIR to another disk"


def _write_log(job: _Job, command: list[str], output: str) -> str:
    """Path of the log, "" when it cannot be written anywhere. One a kernel, the newest wins, so they do not pile up."""
    text = f"# {job.spec.describe()}\n# {job.toolchain.describe()}\n{shlex.join(command)}\n\n{output}"
    path = job.cache.root / "logs" / f"{job.cache.slot(job.spec)}.log"
    with contextlib.suppress(OSError):
        path.write_text(text)
        return str(path)
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(prefix=f"inductor_ext-{job.spec.name}-", suffix=".log")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        return name
    return ""
