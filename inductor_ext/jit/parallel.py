"""Many kernels at once: ``prepare`` for this process, ``start`` in the background, ``prebuild`` for one without a compiler.

Both give failures as values: a kernel that does not build costs its graph one rewrite, not the compile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from inductor_ext.errors import BuildError, InductorExtError
from inductor_ext.jit.cache import SHIPPED, KernelCache
from inductor_ext.jit.files import said
from inductor_ext.jit.loader import build_into, load, try_load
from inductor_ext.jit.process import stop_all
from inductor_ext.jit.progress import Counter, Listener, terminal_line
from inductor_ext.jit.spec import JitSpec
from inductor_ext.jit.toolchain import find_toolchain
from inductor_ext.report.shown import line
from inductor_ext.settings import Settings, current

logger = logging.getLogger("inductor_ext.jit")

_MEMORY_PER_BUILD = 3 << 30  # one nvcc on a CUTLASS kernel takes 3 GiB and more
T = TypeVar("T")


def prepare(
    specs: Iterable[JitSpec],
    settings: Settings | None = None,
    *,
    on_progress: Listener | None = None,
    stopped: threading.Event | None = None,
) -> dict[JitSpec, Any | InductorExtError]:
    """Load every spec, building in parallel what does not exist yet. A value is a module or the error; none is raised.

    ``on_progress`` gets a ``BuildEvent`` for each step, one at a time, from any thread. Once ``stopped`` is set no further
    compiler starts.
    """
    settings = settings or current()
    wanted = list(dict.fromkeys(specs))
    results: dict[JitSpec, Any] = {spec: _guarded(spec, lambda s: try_load(s, settings)) for spec in wanted}
    missing = [spec for spec in wanted if results[spec] is None]
    counter = Counter(len(wanted), on_progress)
    for spec in wanted:
        if results[spec] is not None:
            counter.step(spec, "loaded")
    if settings.build in ("never", "require"):
        for spec in missing:
            results[spec] = _guarded(spec, lambda s: load(s, settings))
            counter.step(spec, "failed", error=results[spec] if isinstance(results[spec], Exception) else None)
    else:
        results.update(_in_parallel(missing, lambda s: load(s, settings), settings, on_progress, len(wanted), stopped))
    return results


class Started:
    """What `prepare` gives of ``specs``, made in a thread of its own while the caller goes on."""

    def __init__(self, specs: Iterable[JitSpec], settings: Settings) -> None:
        self._stopped = threading.Event()
        pool = ThreadPoolExecutor(1, thread_name_prefix="inductor_ext-prepare")
        self._future = pool.submit(prepare, list(specs), settings, stopped=self._stopped)
        pool.shutdown(wait=False)

    def result(self) -> dict[JitSpec, Any | InductorExtError]:
        """Waits for the last of them."""
        return self._future.result()

    def stop(self) -> None:
        """Nobody waits for the result any more: end the compilers, as Ctrl-C does in `prepare`."""
        self._stopped.set()
        if not self._future.done():
            stop_all()


def start(specs: Iterable[JitSpec], settings: Settings) -> Started:
    """`prepare` in the background."""
    return Started(specs, settings)


def prebuild(
    specs: Iterable[JitSpec],
    directory: Path | str,
    settings: Settings | None = None,
    *,
    on_progress: Listener | None = None,
) -> dict[JitSpec, Path | InductorExtError]:
    """Build every spec into ``directory``, usable as ``settings.prebuilt_dir`` by a machine without a compiler.

    Needs no GPU. What the directory holds already and still fits is kept. A value is the binary's path or the error.
    """
    settings = settings or current()
    wanted = list(dict.fromkeys(specs))
    root = Path(directory).expanduser().absolute()
    cache = KernelCache(root) if root == settings.cache_path() else KernelCache(root, mode=SHIPPED)

    def make(spec: JitSpec) -> Path:
        toolchain = find_toolchain(settings)
        try:
            cache.make_writable()
        except OSError as error:
            raise BuildError(
                f"the directory {line(root)} cannot be used: it {line(said(error))}", first_error=said(error)
            ) from error
        return build_into(cache, spec, toolchain, settings)[0].binary

    results = _in_parallel(wanted, make, settings, on_progress, len(wanted))
    if cache.is_ours():
        cache.tidy()
        try:
            cache.write_manifest()
        except OSError as error:
            failed = BuildError(f"the manifest of {line(root)} cannot be written: {line(said(error))}", first_error=said(error))
            return dict.fromkeys(wanted, failed)
    return results


def build_jobs(settings: Settings, count: int) -> int:
    """How many compilers run at once: ``settings.build_jobs``, else by cores and free memory; at most ``count``."""
    jobs = settings.build_jobs
    if jobs <= 0:
        jobs = _cores()
        if (free := _free_memory()) is not None:
            jobs = min(jobs, free // _MEMORY_PER_BUILD)
    return max(1, min(jobs, count))


def _in_parallel(
    specs: list[JitSpec],
    make: Callable[[JitSpec], T],
    settings: Settings,
    on_progress: Listener | None,
    total: int,
    stopped: threading.Event | None = None,
) -> dict[JitSpec, T | InductorExtError]:
    """``make(spec)`` for each, as values. Ctrl-C stops the compilers instead of waiting for them."""
    if not specs:
        return {}
    with terminal_line(total, show=settings.progress) as line:
        counter = Counter(total, line, on_progress)
        counter.done = total - len(specs)

        def one(spec: JitSpec) -> T | InductorExtError:
            if stopped is not None and stopped.is_set():
                return BuildError(f"kernel {spec.name} ({spec.arch}): the compile was stopped", first_error="", transient=True)
            counter.step(spec, "building")
            started = time.perf_counter()
            result = _guarded(spec, make)
            error = result if isinstance(result, InductorExtError) else None
            counter.step(spec, "failed" if error else "built", time.perf_counter() - started, error)
            return result

        pool = ThreadPoolExecutor(build_jobs(settings, len(specs)), thread_name_prefix="inductor_ext-build")
        try:
            return dict(zip(specs, pool.map(one, specs)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()
            raise
        finally:
            pool.shutdown(wait=True)


def _guarded(spec: JitSpec, make: Callable[[JitSpec], T]) -> T | InductorExtError:
    try:
        return make(spec)
    except InductorExtError as error:
        return error
    except Exception as error:  # one kernel must not take the whole compile with it; the traceback goes to the log
        logger.exception("kernel %s: unexpected error", spec.name)
        return BuildError(f"kernel {spec.name} ({spec.arch}): {type(error).__name__}: {error}", first_error=str(error))


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def _free_memory() -> int | None:
    """Bytes that can still be used: the machine's, or the container's (cgroup v2) when that is less."""
    bounds = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        bounds.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        bounds.append(max(0, limit - used + int(stat.get("inactive_file", 0))))  # the page cache gives way
    return min(bounds) if bounds else None
