"""Where kernel binaries are kept, and the proof that one still fits.

    <root>/kernels/<name>-<arch>-<slot>/<key>/   kernel.so, kernel.cu, entry.json
    <root>/locks  logs  failed  tmp  toolchain.json

Two levels, as in ccache's direct mode. The *slot* is what is known before anything is compiled: generated source,
flags, exact target, platform. The *key* adds what only a compile tells: compiler versions, package versions and the
hash of each header that was read. A look-up reads the few ``entry.json`` of a slot and takes the one whose facts all
hold here and now; a fact that this machine cannot know (it has no nvcc) does not count against it. A prebuilt directory
has the same format.

Entries are whole directories, made in ``tmp/`` and published by one rename, so a reader sees all of one or nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inductor_ext.jit import headers
from inductor_ext.jit.files import write_atomically
from inductor_ext.jit.spec import JitSpec
from inductor_ext.jit.toolchain import BASE_FLAGS, Compilers

logger = logging.getLogger("inductor_ext.jit")

FORMAT = 1
BINARY, RECORD = "kernel.so", "entry.json"
STALE_TMP_S = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published binary. ``record`` is its ``entry.json``."""

    path: Path
    spec: JitSpec
    record: dict[str, Any]

    @property
    def key(self) -> str:
        return self.path.name

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def arch(self) -> str:
        return self.spec.arch

    @property
    def binary(self) -> Path:
        return self.path / BINARY

    @property
    def bytes(self) -> int:
        return int(self.record["binary"]["size"])

    @property
    def age(self) -> float:
        """Seconds since it was built."""
        return max(0.0, time.time() - float(self.record["created"]))

    def damage(self) -> str | None:
        """What is wrong with the binary, None when it is what was published."""
        wanted = self.record["binary"]
        try:
            data = self.binary.read_bytes()
        except OSError as error:
            return f"{BINARY} cannot be read ({error.strerror})"
        if len(data) != wanted["size"]:
            return f"{BINARY} is truncated (wanted {wanted['size']} bytes, found {len(data)})"
        if hashlib.sha256(data).hexdigest() != wanted["sha256"]:
            return f"{BINARY} is corrupt (its sha256 is not the recorded one)"
        return None


class KernelCache:
    """Binaries under ``root``. Creates no directory before something is built.

    ``prebuilt``: a directory shipped to this machine; which compilers it was made with does not matter then.
    """

    def __init__(self, root: Path, *, prebuilt: bool = False) -> None:
        self.root = Path(root)
        self.prebuilt = prebuilt

    def entries(self) -> list[Entry]:
        """Every readable entry, newest first."""
        found = [self._read(path.parent) for path in self.root.glob(f"kernels/*/*/{RECORD}")]
        return sorted((e for e in found if e), key=lambda e: e.age)

    @property
    def size(self) -> int:
        """Bytes of everything under the root."""
        return sum(p.lstat().st_size for p in self.root.rglob("*") if p.is_file())

    def path(self, key: str) -> Path:
        """Directory of one entry. Raises ``KeyError``."""
        for path in self.root.glob(f"kernels/*/{key}"):
            return path
        raise KeyError(key)

    def clear(self) -> int:
        """Delete every binary, log and note of a failure; the number of binaries. A build under way is left alone."""
        count = len(list(self.root.glob(f"kernels/*/*/{BINARY}")))
        for name in ("kernels", "logs", "failed"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / "toolchain.json").unlink(missing_ok=True)
        self.sweep()
        return count

    def slot(self, spec: JitSpec) -> str:
        """Name of everything that is known about a spec before compiling."""
        known = (FORMAT, spec.translation_unit(), BASE_FLAGS, spec.flags, spec.arch, platform.machine())
        return f"{spec.name}-{spec.arch}-{headers.digest(known)}"

    def has_slot(self, spec: JitSpec) -> bool:
        """Whether anything was ever built for the spec: the cheap question before ``candidates``."""
        return (self.root / "kernels" / self.slot(spec)).is_dir()

    def candidates(self, spec: JitSpec, compilers: Compilers, rejected: list[str]) -> Iterator[Entry]:
        """Entries that fit here and now, newest first. Why others do not is appended to ``rejected``."""
        paths = list(self.root.glob(f"kernels/{self.slot(spec)}/*/"))
        entries = [(path, self._read(path)) for path in paths]
        for path, entry in sorted(entries, key=lambda pair: pair[1].age if pair[1] else 0.0):
            if entry is None:
                rejected.append(f"{path.name}: {RECORD} cannot be read")
            elif reason := self._misfit(entry, compilers) or entry.damage():
                rejected.append(f"{entry.key}: {reason}")
            else:
                yield entry

    def _misfit(self, entry: Entry, compilers: Compilers) -> str | None:
        made = entry.record["made"]
        if not self.prebuilt:
            for what, here in (("nvcc", compilers.nvcc), ("host compiler", compilers.host)):
                if here is not None and here != made[what]:
                    return f"built with another {what} ({made[what]!r}, here is {here!r})"
        return headers.changed(entry.record["headers"], made["packages"], shipped_only=self.prebuilt)

    def _read(self, path: Path) -> Entry | None:
        try:
            record = json.loads((path / RECORD).read_text())
            if record["format"] != FORMAT:
                return None
            entry = Entry(path, JitSpec.from_dict(record["spec"]), record)
            _ = entry.bytes, entry.age, record["made"]["packages"], record["headers"], record["binary"]["sha256"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        return entry

    def make_writable(self) -> None:
        """Create the folders and prove that files can be made. Raises ``OSError`` (read-only, full, a file)."""
        for name in ("kernels", "locks", "logs", "failed", "tmp"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root / "tmp"):
            pass
        self.sweep()

    def sweep(self) -> None:
        """Delete what killed builds left in ``tmp`` more than a day ago."""
        for path in self.root.glob("tmp/*"):
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime > STALE_TMP_S:
                    shutil.rmtree(path, ignore_errors=True)

    def tidy(self) -> None:
        """Delete the folders that only building needs, where no other process uses them: a directory to be shipped."""
        shutil.rmtree(self.root / "failed", ignore_errors=True)
        for name in ("tmp", "logs"):
            with contextlib.suppress(OSError):
                (self.root / name).rmdir()

    @contextlib.contextmanager
    def staging(self, spec: JitSpec) -> Iterator[Path]:
        """A private directory to build in, on the same file system as the published ones. Raises ``OSError``."""
        path = Path(tempfile.mkdtemp(dir=self.root / "tmp", prefix=f"{spec.name}-"))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, spec: JitSpec, timeout_s: float) -> Iterator[None]:
        """One builder of a slot at a time. The system drops the lock of a process that dies.

        Where locks do not work (some network file systems, another user's file) it goes on without: publishing stays
        atomic, the same kernel may then be compiled twice.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.root / "locks" / f"{self.slot(spec)}.lock", timeout=timeout_s)
        try:
            lock.acquire()
        except Timeout:
            logger.warning(
                "%s: waited %.0f s for another process that builds it; building it here too", spec.name, timeout_s
            )
        except (OSError, NotImplementedError) as error:
            logger.debug("%s: no lock (%s); going on without", spec.name, error)
        try:
            yield
        finally:
            lock.release()

    def publish(self, staged: Path, spec: JitSpec, record: dict[str, Any]) -> Entry:
        """Complete a staged directory that holds the binary and rename it to its place. Raises ``OSError``.

        When another process was first its entry is taken, unless it is damaged: then it is replaced.
        """
        data = (staged / BINARY).read_bytes()
        binary = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        full = {"format": FORMAT, "spec": spec.to_dict(), **record, "binary": binary, "created": time.time()}
        write_atomically(staged / RECORD, json.dumps(full, indent=1))
        key = headers.digest((sorted(record["made"].items(), key=str), sorted(record["headers"].items())))
        target = self.root / "kernels" / self.slot(spec) / key
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            winner = self._read(target)
            if winner and not winner.damage():
                return winner
            target.rename(staged.parent / "damaged")
            staged.rename(target)
        return Entry(target, spec, full)

    def note_failure(self, spec: JitSpec, note: dict[str, Any]) -> None:
        """Tell processes that wait for the lock how the build went, so that they do not repeat it."""
        with contextlib.suppress(OSError):
            write_atomically(
                self.root / "failed" / f"{self.slot(spec)}.json", json.dumps({**note, "time": time.time()})
            )

    def failure_since(self, spec: JitSpec, started: float, state: str) -> dict[str, Any] | None:
        """The failure that another process met since ``started`` with the same sources and compilers."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            note = json.loads((self.root / "failed" / f"{self.slot(spec)}.json").read_text())
            if note["time"] >= started and note["state"] == state:
                return dict(note)
        return None
