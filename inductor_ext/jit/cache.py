"""Where kernel binaries are kept, and the proof that one still fits and that nobody else has put it there.

    <root>/INDUCTOR_EXT                          the marker: this folder is ours
    <root>/kernels/<name>-<arch>-<slot>/<key>/   kernel.so, kernel.cu, entry.json
    <root>/locks  logs  failed  tmp  toolchain.json
    <root>/manifest.json                         of a directory that is shipped: its entries, and the sha256 of their records

Two levels, as in ccache's direct mode. The *slot* is what is known before anything is compiled: generated source,
flags, exact target, platform. The *key* adds what only a compile tells: compiler versions, package versions and the
hash of each header that was read. A look-up reads the few ``entry.json`` of a slot and takes the one whose facts all
hold here and now; a fact that this machine cannot know (it has no nvcc) does not count against it. A prebuilt directory
has the same format.

Entries are whole directories, made in ``tmp/`` and published by one rename, so a reader sees all of one or nothing.

What the checks protect against. A binary is code that this process runs, so the root, every folder below it on the way to a
binary, the record and the binary itself must belong to this user or to root and must not be writable by group or others; no
link is followed below the root; the record must hold the very spec that is asked for; and the bytes that were hashed are the
bytes that are loaded. So another user of the machine can neither plant a binary nor exchange one, and a copy that broke off,
a disk that lost a block or an entry put into the wrong place is a miss, not a crash. They do not protect against this user's
own processes or root, who could change this package as well; nor against whoever made the prebuilt directory that the user
points at and now owns: its manifest says that it is complete, not that it is benign.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from inductor_ext.jit import headers, ours
from inductor_ext.jit.files import Folder, Refused, make_folder, parse_json, said, write_atomically
from inductor_ext.jit.ours import BINARY, FOLDERS, MANIFEST, MARKER, RECORD, SLOT
from inductor_ext.jit.record import FORMAT, RECORD_LIMIT, Record
from inductor_ext.jit.spec import JitSpec
from inductor_ext.jit.toolchain import BASE_FLAGS, Compilers
from inductor_ext.report.shown import line

logger = logging.getLogger("inductor_ext.jit")

NOTE_LIFE_S = 3600
PRIVATE, SHIPPED = 0o700, 0o755  # modes of folders
_NOTE_LIMIT = 1 << 20
_TRIES = 3


Code = bytes  # of a binary; within `Entry` that name is its size


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published binary. ``record`` is its ``entry.json``."""

    path: Path
    record: Record

    @property
    def spec(self) -> JitSpec:
        return self.record.spec

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
        return self.record.size

    @property
    def age(self) -> float:
        """Seconds since it was built."""
        return max(0.0, time.time() - self.record.created)

    def code(self) -> Code:
        """The binary's bytes. Raises ``OSError`` or ``ValueError`` when they are not what was published."""
        root, names = self.path.parents[2], self.path.parts[-3:]
        with _walk(root, *names) as folder:
            data = folder.read(BINARY, max(self.record.size, 1))
        if len(data) != self.record.size:
            raise ValueError(f"is truncated (wanted {self.record.size} bytes, found {len(data)})")
        if hashlib.sha256(data).hexdigest() != self.record.sha256:
            raise ValueError("is corrupt (its sha256 is not the recorded one)")
        return data

    def damage(self) -> str | None:
        """What is wrong with the binary, None when it is what was published."""
        try:
            self.code()
        except (OSError, ValueError) as error:
            return f"{BINARY} {_reason(error)}"
        return None


class KernelCache:
    """Binaries under ``root``. Creates no directory before something is built.

    ``prebuilt``: a directory shipped to this machine; which compilers it was made with does not matter then, and only what
    its manifest lists is looked at. ``mode``: of the folders that are made.
    """

    def __init__(self, root: Path, *, prebuilt: bool = False, mode: int = PRIVATE) -> None:
        self.root = Path(root)
        self.prebuilt = prebuilt
        self.mode = mode

    def refusal(self) -> str | None:
        """Why nothing below the root is looked at: what was found and what was wanted. None when it can be, or is not there."""
        try:
            with Folder(self.root) as root:
                if self.prebuilt:
                    _manifest(root)
        except FileNotFoundError:
            if self.prebuilt:
                found = f"has no {MANIFEST}" if self.root.is_dir() else "does not exist"
                return f"{found} (wanted a directory made by this version's `inductor-ext build`)"
        except OSError as error:
            return said(error)
        except ValueError as error:
            return f"has a {MANIFEST} that cannot be used ({error})"
        return None

    def entries(self) -> list[Entry]:
        """Every readable entry that can be trusted, newest first."""
        found = []
        with contextlib.suppress(OSError, ValueError), Folder(self.root) as root:
            listed = _manifest(root) if self.prebuilt else None
            with root.folder("kernels") as kernels:
                for slot in filter(SLOT.fullmatch, kernels.names()):
                    with contextlib.suppress(OSError), kernels.folder(slot) as folder:
                        for key in folder.names():
                            with contextlib.suppress(OSError, ValueError):
                                found.append(_read(folder, key, listed))
        return sorted(found, key=lambda e: e.age)

    @property
    def size(self) -> int:
        """Bytes of everything under the root."""
        total = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                with contextlib.suppress(OSError):
                    total += Path(folder, name).lstat().st_size
        return total

    def path(self, key: str) -> Path:
        """Directory of one entry. Raises ``KeyError``."""
        for entry in self.entries():
            if entry.key == key:
                return entry.path
        raise KeyError(key)

    def slot(self, spec: JitSpec) -> str:
        """Name of everything that is known about a spec before compiling."""
        known = (FORMAT, spec.translation_unit(), BASE_FLAGS, spec.flags, spec.arch, platform.machine())
        return f"{spec.name}-{spec.arch}-{headers.digest(known)}"

    def has_slot(self, spec: JitSpec) -> bool:
        """Whether anything was ever built for the spec: the cheap question before ``candidates``."""
        return os.path.lexists(self.root / "kernels" / self.slot(spec))

    def candidates(self, spec: JitSpec, compilers: Compilers, rejected: list[str]) -> Iterator[tuple[Entry, bytes]]:
        """Entries that fit here and now with their bytes, newest first. Why others do not is appended to ``rejected``."""
        entries, slot = [], self.slot(spec)
        try:
            with Folder(self.root) as root, root.folder("kernels") as kernels, kernels.folder(slot) as folder:
                listed = _manifest(root) if self.prebuilt else None
                for key in folder.names():
                    try:
                        entries.append(_read(folder, key, listed))
                    except (OSError, ValueError) as error:
                        rejected.append(f"{line(key)}: {_reason(error)}")
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            rejected.append(f"{self.root / 'kernels' / slot}: {_reason(error)}")
            return
        for entry in sorted(entries, key=lambda entry: entry.age):
            if reason := self._misfit(entry, spec, compilers):
                rejected.append(f"{entry.key}: {reason}")
                continue
            try:
                code = entry.code()
            except (OSError, ValueError) as error:
                rejected.append(f"{entry.key}: {BINARY} {_reason(error)}")
                continue
            yield entry, code

    def _misfit(self, entry: Entry, spec: JitSpec, compilers: Compilers) -> str | None:
        made = entry.record
        if made.spec != spec:
            return f"its record is of another spec ({line(made.spec.describe())})"
        if not self.prebuilt:
            for what, here, then in (("nvcc", compilers.nvcc, made.nvcc), ("host compiler", compilers.host, made.host)):
                if here is not None and here != then:
                    return f"built with another {what} ({line(repr(then))}, here is {here!r})"
        reason = headers.changed(made.headers, made.packages, shipped_only=self.prebuilt)
        return line(reason) if reason else None

    def make_writable(self) -> None:
        """Create the folders and the marker, and prove that files can be made. Raises ``OSError``.

        A folder that is there already is taken when it is empty, has the marker, or is a cache of an earlier version.
        """
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):  # somebody deletes it at this very moment
                return self._make_writable()
        return self._make_writable()

    def _make_writable(self) -> None:
        self._make_root()
        with Folder(self.root) as root:
            ours.claim(root)
            for name in FOLDERS:
                make_folder(self.root / name, self.mode)
                if name == "locks":
                    self._close_locks()
                root.folder(name).__exit__(None, None, None)
        with tempfile.TemporaryDirectory(dir=self.root / "tmp"):
            pass
        ours.sweep(self.root)

    def _close_locks(self) -> None:
        """Make the folder of locks private where filelock, whose process waited, has just made it again as the umask says."""
        locks = self.root / "locks"
        status = locks.lstat()
        own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if own and status.st_mode & 0o022 and all(map(_is_lock, locks.iterdir())):
            locks.chmod(self.mode)

    def _make_root(self) -> None:
        """The root; one that a umask left open to a group is made private while it holds nothing, or nothing but locks.

        filelock makes the folders of a lock again, as the umask says, when somebody deletes the cache while it waits.
        """
        make_folder(self.root, self.mode)
        status = self.root.stat()
        names, locks = {path.name for path in self.root.iterdir()}, self.root / "locks"
        if status.st_uid == os.geteuid() and status.st_mode & 0o022 and names <= {"locks"}:
            if names and (locks.is_symlink() or not all(map(_is_lock, locks.iterdir()))):
                return
            for path in (self.root, *([locks] if names else [])):
                path.chmod(self.mode)

    def is_ours(self) -> bool:
        """Whether the root has the marker, and nobody else can have put it there."""
        with contextlib.suppress(OSError), Folder(self.root) as root:
            return ours.is_marked(root)
        return False

    def is_complete(self) -> bool:
        """Whether everything that `make_writable` makes is there: anybody may have deleted it since."""
        return all(map(os.path.lexists, [self.root / MARKER, *(self.root / name for name in FOLDERS)]))

    def clear(self) -> tuple[int, list[str]]:
        """Delete what is ours: the number of binaries, and what is left. Raises ``SettingError``; see `ours.clear`."""
        return ours.clear(self.root)

    def tidy(self) -> None:
        """Delete the folders that only building needs, where no other process uses them: a directory to be shipped."""
        ours.clear_files(self.root, "failed", ".json")
        for name in ("tmp", "logs", "failed"):
            with contextlib.suppress(OSError):
                (self.root / name).rmdir()

    def write_manifest(self) -> None:
        """List the whole entries, so that a reader knows what belongs to the directory. Raises ``OSError``."""
        with self._lock("manifest", 60):
            found = {}
            for entry in self.entries():
                if entry.damage() is None:
                    with _walk(self.root, *entry.path.parts[-3:]) as folder:
                        record = folder.read(RECORD, RECORD_LIMIT)
                    found["/".join(entry.path.parts[-2:])] = hashlib.sha256(record).hexdigest()
            made_by = headers.package_version(headers.PACKAGE)
            whole = {"format": FORMAT, "made by": made_by, "entries": dict(sorted(found.items()))}
            write_atomically(self.root / MANIFEST, json.dumps(whole, indent=1))

    @contextlib.contextmanager
    def staging(self, spec: JitSpec) -> Iterator[Path]:
        """A private directory to build in, on the same file system as the published ones. Raises ``OSError``."""
        path = Path(tempfile.mkdtemp(dir=self.root / "tmp", prefix=f"{ours.STAGE}{spec.name}-"))
        try:
            ours.mark(path)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, spec: JitSpec, timeout_s: float) -> Iterator[None]:
        """One builder of a slot at a time. The system drops the lock of a process that dies.

        Where locks do not work (some network file systems, another user's file) it goes on without: publishing stays
        atomic, the same kernel may then be compiled twice.
        """
        with self._lock(self.slot(spec), timeout_s):
            yield

    @contextlib.contextmanager
    def _lock(self, name: str, timeout_s: float) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock = FileLock(self.root / "locks" / f"{name}.lock", timeout=timeout_s, mode=0o600)
        try:
            lock.acquire()
        except Timeout:
            logger.warning("%s: waited %.0f s for another process that builds it; building it here too", name, timeout_s)
        except (OSError, NotImplementedError) as error:
            logger.debug("%s: no lock (%s); going on without", name, error)
        try:
            yield
        finally:
            lock.release()

    def publish(self, staged: Path, record: Record) -> Entry:
        """Complete a staged directory that holds the binary and rename it to its place. Raises ``OSError``.

        When another process was first its entry is taken. Whatever else stands in the place is moved out of it.
        """
        write_atomically(staged / RECORD, record.text())
        for path in staged.iterdir():
            path.chmod(0o644)
        staged.chmod(self.mode)
        slot = self.slot(record.spec)
        target = self.root / "kernels" / slot / _key_of(record)
        for attempt in range(4):  # others may publish the same, or clear the way for it, at the same time
            try:
                with _walk(self.root, "kernels") as kernels:
                    make_folder(target.parent, self.mode)
                    kernels.folder(slot).__exit__(None, None, None)
                staged.rename(target)
                return Entry(target, record)
            except (Refused, NotADirectoryError) as error:
                in_the_way = target.parent if isinstance(error, Refused) or not target.parent.is_dir() else target
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                with contextlib.suppress(OSError, ValueError), _walk(self.root, "kernels", slot) as folder:
                    winner = _read(folder, target.name, None)
                    if winner.spec == record.spec and winner.damage() is None:
                        return winner
                in_the_way = target
            with contextlib.suppress(FileNotFoundError):
                in_the_way.rename(staged.parent / f"aside-{attempt}")
        raise Refused(f"its place {target} cannot be cleared")

    def note_failure(self, spec: JitSpec, note: dict[str, str]) -> None:
        """Tell processes that wait for the lock how the build went, so that they do not repeat it."""
        with contextlib.suppress(OSError):
            write_atomically(
                self.root / "failed" / f"{self.slot(spec)}.json", json.dumps({**note, "time": time.time()})
            )

    def failure_since(self, spec: JitSpec, started: float, state: str) -> dict[str, str] | None:
        """The failure that another process met since ``started`` with the same sources and compilers."""
        now = time.time()
        with contextlib.suppress(OSError, ValueError):
            with _walk(self.root, "failed") as folder:
                raw = parse_json(folder.read(f"{self.slot(spec)}.json", _NOTE_LIMIT))
            if not isinstance(raw, dict) or isinstance(raw.get("time"), bool) or not isinstance(raw.get("time"), (int, float)):
                return None
            note = {name: raw.get(name) for name in ("message", "first_error", "log", "state")}
            fresh = max(started, now - NOTE_LIFE_S) <= raw["time"] <= now  # one of the future was made by another clock
            if fresh and note["state"] == state and all(isinstance(text, str) for text in note.values()):
                return {name: str(text) for name, text in note.items()}
        return None


def _is_lock(path: Path) -> bool:
    return path.suffix == ".lock" and path.is_file() and not path.is_symlink()


@contextlib.contextmanager
def _walk(root: Path, *names: str) -> Iterator[Folder]:
    """A folder below the root, each on the way there looked at."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(Folder(root))
        for name in names:
            folder = stack.enter_context(folder.folder(name))
        yield folder


def _read(slot: Folder, key: str, listed: dict[str, str] | None) -> Entry:
    """The entry ``key`` of an open slot. Raises ``OSError`` or ``ValueError`` saying what is wrong with it."""
    with slot.folder(key) as folder:
        try:
            data = folder.read(RECORD, RECORD_LIMIT)
        except OSError as error:
            raise Refused(f"{RECORD} cannot be read ({said(error)})") from None
        if listed is not None and listed.get(f"{slot.path.name}/{key}") != hashlib.sha256(data).hexdigest():
            raise Refused(f"is not what {MANIFEST} lists")
        try:
            record = Record.parse(data)
        except ValueError as error:
            raise Refused(f"{RECORD} cannot be read ({error})") from None
        if _key_of(record) != key:
            raise Refused(f"{RECORD} belongs to another entry")
        return Entry(slot.path / key, record)


def _key_of(record: Record) -> str:
    return headers.digest((record.made(), sorted(record.headers.items())))


def _manifest(root: Folder) -> dict[str, str]:
    """Record hashes by ``slot/key``. Raises ``OSError`` or ``ValueError``."""
    try:
        raw = parse_json(root.read(MANIFEST, 16 << 20))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(said(error)) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(raw.get("entries"), dict):
        raise ValueError(f"wanted format {FORMAT} and a mapping of entries")
    return {name: str(digest) for name, digest in raw["entries"].items()}


def _reason(error: OSError | ValueError) -> str:
    return line(said(error) if isinstance(error, OSError) else error)
