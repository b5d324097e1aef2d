"""``load`` and ``try_load``: what this process holds, else the prebuilt directory, else the cache, else a build.

A process keeps what it loaded and what failed: edits of a header are seen by the next process, or after ``forget()``;
a failed build is tried again once a source, the compiler or the target changed.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from inductor_ext.errors import BuildError, KernelUnavailable, ToolchainError
from inductor_ext.jit import headers
from inductor_ext.jit.build import build
from inductor_ext.jit.build import load as load_binary
from inductor_ext.jit.cache import Entry, KernelCache
from inductor_ext.jit.files import is_disk_full
from inductor_ext.jit.spec import JitSpec
from inductor_ext.jit.toolchain import Compilers, Toolchain, find_toolchain, known_compilers
from inductor_ext.settings import Settings, current

logger = logging.getLogger("inductor_ext.jit")

_LOCK_SLACK_S = 60
_Place = tuple[JitSpec, str, str]
_loaded: dict[_Place, Any] = {}
_failed: dict[tuple[_Place, str], BuildError] = {}
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
    _writable.clear()


def _place(spec: JitSpec, settings: Settings) -> _Place:
    return spec, str(settings.cache_path()), settings.prebuilt_dir


def _existing(spec: JitSpec, settings: Settings, rejected: list[str]) -> Any | None:
    """From memory or disk. Reasons why entries on disk do not fit are appended to ``rejected``."""
    place = _place(spec, settings)
    if place in _loaded:
        return _loaded[place]
    compilers = Compilers(None, None)
    for cache in _caches(settings):
        if not cache.has_slot(spec):
            continue
        if not cache.prebuilt:
            compilers = known_compilers(settings)
        module = _first_that_loads(spec, cache, compilers, rejected)
        if module is not None:
            _loaded[place] = module
            return module
    return None


def _caches(settings: Settings) -> list[KernelCache]:
    caches = [KernelCache(settings.cache_path())]
    if settings.prebuilt_dir:
        caches.insert(0, KernelCache(Path(settings.prebuilt_dir).expanduser(), prebuilt=True))
    writable = _writable.get((settings.cache_path(), os.getpid()))
    if writable and writable.root != settings.cache_path():  # this process's private one
        caches.append(writable)
    return caches


def _first_that_loads(spec: JitSpec, cache: KernelCache, compilers: Compilers, rejected: list[str]) -> Any | None:
    for entry in cache.candidates(spec, compilers, rejected):
        try:
            return load_binary(entry.binary, spec)
        except BuildError as error:  # made where libc is newer, say
            rejected.append(f"{entry.key}: {error.first_error}")
    return None


def _build_and_load(spec: JitSpec, settings: Settings, toolchain: Toolchain) -> Any:
    state = headers.digest((headers.snapshot(), toolchain.nvcc_version, toolchain.host_version))
    key = (_place(spec, settings), state)
    if key in _failed:
        raise _failed[key].with_traceback(None)
    try:
        entry = build_into(writable_cache(settings), spec, toolchain, settings, state=state)
        return load_binary(entry.binary, spec)
    except BuildError as error:
        _failed[key] = error
        raise


def build_into(
    cache: KernelCache, spec: JitSpec, toolchain: Toolchain, settings: Settings, *, state: str = ""
) -> Entry:
    """The fitting entry of ``cache``, built when there is none; one process compiles, the others take its result.

    Raises ``BuildError``, also the one that the process before met while this one waited for it.
    """
    started = time.time()
    with cache.lock(spec, settings.build_timeout_s + _LOCK_SLACK_S):
        rejected: list[str] = []
        for entry in cache.candidates(spec, toolchain.compilers, rejected):
            return entry
        for reason in rejected:
            logger.debug("%s: not usable: %s", spec.name, reason)
        note = cache.failure_since(spec, started, state)
        if note is not None:
            raise BuildError(note["message"], first_error=note["first_error"], log=note["log"])
        try:
            return build(spec, cache, toolchain, settings)
        except BuildError as error:
            failure = {"message": str(error), "first_error": error.first_error, "log": error.log, "state": state}
            cache.note_failure(spec, failure)
            raise


def writable_cache(settings: Settings) -> KernelCache:
    """The user's cache, or one of this process alone (with one warning) when that cannot be written.

    Raises ``BuildError`` when the disk is full or there is no temporary directory either.
    """
    path = settings.cache_path()
    key = (path, os.getpid())  # a forked child must not use a directory that its parent deletes
    with _writable_lock:
        if key not in _writable:
            _writable[key] = _make_writable(path)
        return _writable[key]


def _make_writable(path: Path) -> KernelCache:
    cache = KernelCache(path)
    try:
        cache.make_writable()
    except OSError as error:
        if is_disk_full(error):
            raise BuildError(
                f"the disk of the kernel cache {path} is full; free some space or set INDUCTOR_EXT_CACHE_DIR",
                first_error=str(error),
            ) from error
        return _private_cache(path, error)
    return cache


def _private_cache(path: Path, why: OSError) -> KernelCache:
    try:
        cache = KernelCache(Path(tempfile.mkdtemp(prefix="inductor_ext-")))
        cache.make_writable()
    except OSError as error:
        raise BuildError(
            f"kernels cannot be built: neither the cache {path} ({why.strerror}) nor the temporary directory "
            f"({error.strerror}) can be written; set INDUCTOR_EXT_CACHE_DIR or TMPDIR",
            first_error=str(error),
        ) from error
    atexit.register(_remove, cache.root, os.getpid())
    logger.warning(
        "the kernel cache %s cannot be written (%s): kernels are built for this process only, in %s; "
        "set INDUCTOR_EXT_CACHE_DIR to a directory that can be written",
        path,
        why.strerror or why,
        cache.root,
    )
    return cache


def _remove(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(path, ignore_errors=True)


def _unavailable(spec: JitSpec, rejected: list[str], why: str, settings: Settings) -> KernelUnavailable:
    looked = ", ".join(str(cache.root) for cache in _caches(settings))
    found = "; ".join(rejected) if rejected else "no entry for it"
    return KernelUnavailable(
        f"kernel {spec.name} ({spec.arch}): no usable binary in {looked} (found: {found}), and {why}. "
        f"To fix: build it where a compiler is (`inductor-ext build`, or INDUCTOR_EXT_BUILD=compile)"
    )
