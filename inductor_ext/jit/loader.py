"""``load`` and ``try_load``: what this process holds, else the prebuilt directory, an installed wheel of kernels, the cache, a
build.

A process keeps what it loaded and what failed: edits of a header are seen by the next process, or after ``forget()``;
a failed build is tried again once a source, the compiler or the target changed, or after an hour; one that failed for want of
disk, memory or time is not remembered at all.
"""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from inductor_ext.errors import BuildError, KernelUnavailable, ToolchainError
from inductor_ext.jit import binary, headers, shipped
from inductor_ext.jit.build import CacheFailed, build
from inductor_ext.jit.cache import NOTE_LIFE_S, Entry, KernelCache
from inductor_ext.jit.files import Refused, is_disk_full, said
from inductor_ext.jit.spec import JitSpec
from inductor_ext.jit.toolchain import Compilers, Toolchain, find_toolchain, known_compilers
from inductor_ext.report.shown import line
from inductor_ext.settings import Settings, current

logger = logging.getLogger("inductor_ext.jit")

_LOCK_SLACK_S = 60
_CHMOD = "`chmod -R go-w` is right for one that others can write, if you trust all who could"
_Place = tuple[JitSpec, str, str]
_loaded: dict[_Place, Any] = {}
_failed: dict[tuple[_Place, str], tuple[BuildError, float]] = {}
_warned: set[Path] = set()
_writable: dict[tuple[Path, int], KernelCache] = {}
_writable_lock = threading.Lock()


def load(spec: JitSpec, settings: Settings | None = None) -> Any:
    """The spec's ``tvm_ffi.Module``, built when nothing that exists fits and ``settings.build`` allows it.

    Raises ``BuildError`` (does not compile), ``ToolchainError`` (nothing to compile with) or ``KernelUnavailable``
    (``build="never"`` or ``"require"``, or what exists does not fit and there is no compiler).
    """
    settings = settings or current()
    rejected: list[str] = []
    module = _existing(spec, settings, rejected)
    if module is not None:
        return module
    if settings.build in ("never", "require"):
        raise _unavailable(spec, rejected, f'build="{settings.build}" forbids compiling it', settings)
    try:
        toolchain = find_toolchain(settings)
    except ToolchainError as error:
        if rejected:
            raise _unavailable(spec, rejected, str(error), settings) from error
        raise ToolchainError(f"kernel {spec.name} ({spec.arch}) is not built yet and cannot be: {error}") from error
    module = _build_and_load(spec, settings, toolchain)
    _loaded[_place(spec, settings)] = module
    return module


def try_load(spec: JitSpec, settings: Settings | None = None) -> Any | None:
    """The spec's module when it is loaded, prebuilt or cached, else None. Never builds."""
    return _existing(spec, settings or current(), [])


def forget() -> None:
    """Make the next ``load`` look at the disk again. Code that is already loaded stays in the process."""
    _loaded.clear()
    _failed.clear()
    _warned.clear()
    _writable.clear()
    shipped.installed.cache_clear()


def _place(spec: JitSpec, settings: Settings) -> _Place:
    return spec, str(settings.cache_path()), settings.prebuilt_dir


def _existing(spec: JitSpec, settings: Settings, rejected: list[str]) -> Any | None:
    """From memory or disk. Reasons why entries on disk do not fit are appended to ``rejected``."""
    place = _place(spec, settings)
    if place in _loaded:
        return _loaded[place]
    compilers = Compilers(None, None)
    for cache, name in _caches(settings, spec.arch):
        if reason := cache.refusal():
            rejected.append(f"{line(cache.root)}: {line(reason)}")
            if cache.prebuilt:  # that of a cache is told when something has to be built
                told = f"{name} is not used: it {line(reason)}"
                _warn_once(cache.root, f"{told}. To fix: make it again, or correct it ({_CHMOD})")
            continue
        if not cache.has_slot(spec):
            continue
        if not cache.prebuilt:
            compilers = known_compilers(settings)
        module = _first_that_loads(spec, cache, compilers, rejected)
        if module is not None:
            _loaded[place] = module
            return module
    return None


def _caches(settings: Settings, arch: str) -> list[tuple[KernelCache, str]]:
    """Where binaries for ``arch`` may be, in the order in which they are looked for, each with what people call it."""
    caches = []
    if settings.prebuilt_dir:
        path = settings.prebuilt_path()
        caches.append((KernelCache(path, prebuilt=True), f"INDUCTOR_EXT_PREBUILT_DIR={line(path)}"))
    if wheel := shipped.installed(arch):
        if wheel.unfit:
            told = f"{line(wheel.describe())} is not used: it {line(wheel.unfit)}"
            _warn_once(wheel.root, f"{told}. To fix: install the one of this version")
        else:
            caches.append((KernelCache(wheel.root, prebuilt=True), line(wheel.describe())))
    caches.append((KernelCache(settings.cache_path()), "the kernel cache"))
    writable = _writable.get((settings.cache_path(), os.getpid()))
    if writable and writable.root != settings.cache_path():
        caches.append((writable, "this process's private cache"))
    return caches


def _first_that_loads(spec: JitSpec, cache: KernelCache, compilers: Compilers, rejected: list[str]) -> Any | None:
    for entry, code in cache.candidates(spec, compilers, rejected):
        try:
            return binary.load(code, entry.record.sha256, spec)
        except BuildError as error:  # made where libc is newer, say
            rejected.append(f"{entry.key}: {error.first_error}")
    return None


def _build_and_load(spec: JitSpec, settings: Settings, toolchain: Toolchain) -> Any:
    state = headers.digest((headers.snapshot(), toolchain.nvcc_version, toolchain.host_version))
    key = (_place(spec, settings), state)
    if key in _failed:
        error, then = _failed[key]
        if time.monotonic() - then < NOTE_LIFE_S:
            raise error.with_traceback(None)
        del _failed[key]
    try:
        return _build_somewhere(spec, settings, toolchain, state)
    except BuildError as error:
        if not error.transient:
            _failed[key] = error, time.monotonic()
        raise


def _build_somewhere(spec: JitSpec, settings: Settings, toolchain: Toolchain, state: str) -> Any:
    """In the user's cache, else, when that turns out to be full, read-only or gone, in this process's private one."""
    cache = writable_cache(settings)
    try:
        entry, code = build_into(cache, spec, toolchain, settings, state=state)
    except CacheFailed as error:
        if cache.root != settings.cache_path():
            raise
        try:
            private = _fall_back(settings, error.first_error)
        except BuildError:
            raise error from None  # that of the cache says more
        entry, code = build_into(private, spec, toolchain, settings, state=state)
    return binary.load(code, entry.record.sha256, spec)


def build_into(
    cache: KernelCache, spec: JitSpec, toolchain: Toolchain, settings: Settings, *, state: str = ""
) -> tuple[Entry, bytes]:
    """The fitting entry of ``cache`` and its bytes, built when there is none; one process compiles, others take its result.

    Raises ``BuildError``, also the one that the process before met while this one waited for it.
    """
    started = time.time()
    with cache.lock(spec, settings.build_timeout_s + _LOCK_SLACK_S):
        rejected: list[str] = []
        for found in cache.candidates(spec, toolchain.compilers, rejected):
            return found
        for reason in rejected:
            logger.debug("%s: not usable: %s", spec.name, reason)
        note = cache.failure_since(spec, started, state)
        if note is not None:
            raise BuildError(note["message"], first_error=note["first_error"], log=note["log"])
        try:
            return build(spec, cache, toolchain, settings)
        except BuildError as error:
            if not error.transient:
                failure = {"message": str(error), "first_error": error.first_error, "log": error.log, "state": state}
                cache.note_failure(spec, failure)
            raise


def writable_cache(settings: Settings) -> KernelCache:
    """The user's cache, or one of this process alone (with one warning) when that cannot be written.

    Raises ``BuildError`` when there is no temporary directory either. Folders that were deleted since are made again.
    """
    path = settings.cache_path()
    key = (path, os.getpid())  # a forked child must not use a directory that its parent deletes
    with _writable_lock:
        known = _writable.get(key)
        if known is not None and known.is_complete():
            return known
        cache = known or KernelCache(path)
        try:
            cache.make_writable()
        except OSError as error:
            cache = _private_cache(path, error)
        _writable[key] = cache
        return cache


def _fall_back(settings: Settings, why: str) -> KernelCache:
    path = settings.cache_path()
    with _writable_lock:
        key = (path, os.getpid())
        if key not in _writable or _writable[key].root == path:  # another thread may have been here
            _writable[key] = _private_cache(path, Refused(why))
        return _writable[key]


def _private_cache(path: Path, why: OSError) -> KernelCache:
    try:
        cache = KernelCache(Path(tempfile.mkdtemp(prefix="inductor_ext-")))
        atexit.register(binary.remove, cache.root, os.getpid())
        cache.make_writable()
    except OSError as error:
        full = f"the disk of the kernel cache {line(path)} is full: " if is_disk_full(why) else ""
        raise BuildError(
            f"{full}kernels cannot be built: neither the cache {line(path)} ({line(said(why))}) nor the temporary directory "
            f"({line(said(error))}) can be written; set INDUCTOR_EXT_CACHE_DIR or TMPDIR",
            first_error=said(error),
            transient=True,
        ) from error
    _warn_once(
        path,
        f"the kernel cache {line(path)} cannot be used ({line(said(why))}): kernels are built for this process only, in "
        f"{cache.root}. To fix: set INDUCTOR_EXT_CACHE_DIR to a new directory, or correct this one ({_CHMOD})",
    )
    return cache


def _warn_once(path: Path, message: str) -> None:
    if path not in _warned:
        _warned.add(path)
        logger.warning("%s", message)


def _after_fork() -> None:
    """A child that was forked while another thread held the lock could never take it."""
    global _writable_lock
    _writable_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _unavailable(spec: JitSpec, rejected: list[str], why: str, settings: Settings) -> KernelUnavailable:
    looked = ", ".join(line(cache.root) for cache, _ in _caches(settings, spec.arch))
    found = "; ".join(rejected) if rejected else "no entry for it"
    return KernelUnavailable(
        f"kernel {spec.name} ({spec.arch}): no usable binary in {looked} (found: {found}), and {why}. "
        f"To fix: build it where a compiler is (`inductor-ext build`, or INDUCTOR_EXT_BUILD=compile)"
    )
