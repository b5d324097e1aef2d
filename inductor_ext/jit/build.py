"""Compile one ``JitSpec`` into a cache: nvcc called directly, one translation unit, one target.

A binary is published only after its headers were seen not to change meanwhile and after it was loaded once and had
every export. Every way to fail ends in a ``BuildError`` of one paragraph: which kernel, the first error, where the
whole log is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import logging
import os
import re
import shlex
import shutil
import signal
import tempfile
import time
from pathlib import Path

from inductor_ext.errors import BuildError
from inductor_ext.jit import binary, headers, process, wheels
from inductor_ext.jit.cache import Entry, KernelCache
from inductor_ext.jit.files import is_disk_full, read_regular, write_atomically
from inductor_ext.jit.ours import BINARY, SOURCE
from inductor_ext.jit.record import BINARY_LIMIT, Record
from inductor_ext.jit.spec import JitSpec
from inductor_ext.jit.toolchain import BASE_FLAGS, Toolchain
from inductor_ext.report.shown import line, shown
from inductor_ext.settings import Settings

logger = logging.getLogger("inductor_ext.jit")

_TRIES = 3  # when sources are edited, or the cache is deleted, while they compile
_EDITED = "its sources changed"
# collect2 only repeats that ld failed: what it could not find stands a line before
_ERROR = re.compile(
    r"^(?!collect2).*(\berror\b\s*(#\S+)?\s*:|\bfatal\s*:|undefined reference|ld: cannot find"
    r"|No space left|\bKilled\b)",
    re.IGNORECASE,
)

_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded")
_KILLED = re.compile(r"\bKilled\b|signal 9\b|status 0x9\b")
# What a compiler says when it was the machine's fault and not the source's: the same may work in a minute.
_TRANSIENT = re.compile(
    rf"{_DISK_FULL.pattern}|{_KILLED.pattern}|died due to signal|terminated by signal|out of memory|annot allocate memory"
    r"|memory exhausted|bad_alloc|Too many open files|Resource temporarily unavailable|Stale file handle|Input/output error"
    r"|Text file busy",
    re.IGNORECASE,
)


class CacheFailed(BuildError):
    """The folder that was built in was at fault, not the kernel or the compiler: another one may do."""


@dataclasses.dataclass(frozen=True)
class _Job:
    spec: JitSpec
    cache: KernelCache
    toolchain: Toolchain
    timeout_s: float

    def failed(
        self,
        cause: str,
        *,
        output: str = "",
        command: list[str] | None = None,
        first: str = "",
        transient: bool = False,
        kind: type[BuildError] = BuildError,
    ) -> BuildError:
        log = _write_log(self, command or [], output) if output else ""
        message = f"kernel {self.spec.name} ({self.spec.arch}) was not built with {self.toolchain.describe()}: {cause}"
        if log:
            message += f". Full output: {log}"
        return kind(message, first_error=first or cause, log=log, transient=transient)


def build(spec: JitSpec, cache: KernelCache, toolchain: Toolchain, settings: Settings) -> tuple[Entry, bytes]:
    """Compile and publish: the entry and its bytes. The caller holds the lock of the spec's slot. Raises ``BuildError``."""
    job = _Job(spec, cache, toolchain, float(settings.build_timeout_s))
    why = _EDITED
    for _ in range(_TRIES):
        try:
            built = _build_once(job)
        except FileNotFoundError as error:  # somebody deleted the cache, or a part of it, meanwhile
            why = f"{error.filename or error} was gone"
            with contextlib.suppress(OSError):
                cache.make_writable()
        except OSError as error:
            cause = _disk_full(cache.root) if is_disk_full(error) else f"{type(error).__name__}: {error}"
            raise job.failed(cause, transient=True, kind=CacheFailed) from error
        else:
            if built is not None:
                return built
            why = _EDITED
            logger.info("%s: a source changed while it compiled; compiling again", spec.name)
    kind = BuildError if why == _EDITED else CacheFailed
    raise job.failed(f"{line(why)} {_TRIES} times while it compiled", transient=True, kind=kind)


def _build_once(job: _Job) -> tuple[Entry, bytes] | None:
    """One compile; None when a source was edited meanwhile. Raises ``BuildError`` and ``OSError``."""
    before = headers.snapshot()
    if not (headers.kernels_root() / job.spec.source).is_file():
        raise job.failed(f"its source {headers.kernels_root() / job.spec.source} does not exist")
    with job.cache.staging(job.spec) as stage:
        staged = stage / "entry"
        staged.mkdir(mode=0o700)
        (staged / SOURCE).write_text(job.spec.translation_unit(), encoding="utf-8")
        started = time.perf_counter()
        command = _command(job, stage)
        _compile(job, command, stage)
        seconds = time.perf_counter() - started
        read = headers.parse_depfile(os.fsdecode(read_regular(stage / "kernel.d", 64 << 20)))
        hashes, packages = headers.collect((p for p in read if not p.startswith(str(stage))), job.toolchain.system_dirs)
        if any(before.get(name, hashes[name]) != hashes[name] for name in hashes):
            return None
        code = read_regular(staged / BINARY, BINARY_LIMIT, links=False)
        digest = hashlib.sha256(code).hexdigest()
        _load_test(job, code, digest)
        record = Record(
            spec=job.spec,
            nvcc=job.toolchain.nvcc_version,
            host=job.toolchain.host_version,
            packages=packages,
            headers=hashes,
            seconds=round(seconds, 2),
            sha256=digest,
            size=len(code),
            created=time.time(),
        )
        entry = job.cache.publish(staged, record)
        logger.info("built %s in %.1f s: %s", job.spec.describe(), seconds, entry.path)
        return entry, code if entry.record.sha256 == record.sha256 else entry.code()


def _command(job: _Job, stage: Path) -> list[str]:
    ours, *rest = headers.include_dirs()
    root, *packages = rest
    command = [str(job.toolchain.nvcc), *BASE_FLAGS, job.spec.gencode(), "-ccbin", str(job.toolchain.host)]
    command += ["-I", str(ours), "-I", str(root)]
    for path in packages:
        command += ["-isystem", str(path)]
    command += ["-MD", "-MF", str(stage / "kernel.d"), *job.spec.flags]
    return [*command, "-o", str(stage / "entry" / BINARY), str(stage / "entry" / SOURCE)]


def _compile(job: _Job, command: list[str], stage: Path) -> None:
    """Run nvcc. Its intermediate files go to the stage too, so that a killed build leaves nothing elsewhere."""
    env = {**os.environ, "TMPDIR": str(stage), "LC_ALL": "C"}
    if libraries := wheels.library_path(job.toolchain.nvcc):
        env["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(libraries), env.get("LIBRARY_PATH")]))
    with (stage / "output.txt").open("w+", encoding="utf-8", errors="replace") as file:
        try:
            code = process.run(command, file, job.timeout_s, cwd=stage, env=env)
        except process.TimedOut:
            file.seek(0)
            cause = f"nvcc was stopped after {job.timeout_s:g} s (INDUCTOR_EXT_BUILD_TIMEOUT)"
            raise job.failed(cause, output=file.read() or cause, command=command, transient=True) from None
        file.seek(0)
        output = file.read()
    if code == 0 and (stage / "entry" / BINARY).is_file():
        return
    if not (stage / "entry" / SOURCE).is_file():
        raise FileNotFoundError(errno.ENOENT, "the cache was deleted while it was built into", str(stage))
    said = first_error(output)
    first = cause = said or f"nvcc ended with status {code} and said nothing"
    if _DISK_FULL.search(output):
        full = f"{first}: {_disk_full(stage)}"
        raise job.failed(full, output=output, command=command, first=first, transient=True, kind=CacheFailed)
    if code == 128 + signal.SIGKILL or _KILLED.search(output):
        cause = f"{first}: the compiler was killed, most often for memory; lower INDUCTOR_EXT_BUILD_JOBS"
    transient = code > 128 or not said or bool(_TRANSIENT.search(output))
    raise job.failed(cause, output=output or first, command=command, first=first, transient=transient)


def _load_test(job: _Job, code: bytes, digest: str) -> None:
    """Nothing is published that does not load. A machine that only builds may lack the driver."""
    try:
        binary.load(code, digest, job.spec)
    except BuildError as error:
        if "libcuda.so" not in error.first_error:
            cause = f"it compiled but does not load: {error.first_error}"
            raise job.failed(cause, first=error.first_error, transient=error.transient) from error


def first_error(output: str) -> str:
    """The compiler's first error line, else its last line."""
    lines = [shown(each.strip()) for each in output.splitlines() if each.strip()]
    return next((each for each in lines if _ERROR.search(each)), lines[-1] if lines else "")[:500]


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
        write_atomically(path, text)  # by a rename: what has the log's name, a link or a pipe, is not written through
        return str(path)
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(prefix=f"inductor_ext-{job.spec.name}-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        return name
    return ""
