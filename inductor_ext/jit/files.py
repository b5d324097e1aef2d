"""Files that somebody else may have made: opened so that nothing blocks, no link is followed and the owner is known.

A kernel binary is code that this process will run, so a folder that holds one is looked at as ssh looks at ``~/.ssh``: it and
what is in it must belong to this user or to root, and nobody else may write there. `Folder` holds a folder open; what is
looked up in it is looked up in that very folder, whatever is renamed meanwhile, and a file is judged by the descriptor that
its bytes are then read from.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # NONBLOCK: opening a FIFO must not wait for a writer
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Refused(OSError):
    """A file or folder is there, and it is not what it has to be. ``reason`` says what was found and what was wanted."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EPERM, reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def said(error: OSError) -> str:
    """An ``OSError`` in a few words, without the path."""
    return error.reason if isinstance(error, Refused) else error.strerror or str(error) or type(error).__name__


def distrust(status: os.stat_result) -> str | None:
    """Why what has this status may have been made or changed by another user than this one and root; None when it was not."""
    user = os.geteuid()
    if status.st_uid not in (0, user):
        wanted = f"user {user} or root" if user else "root"
        return f"belongs to user {status.st_uid} (wanted {wanted})"
    if status.st_mode & _OTHERS_WRITE:
        mode = stat.S_IMODE(status.st_mode)
        return f"can be written by its group or by others (found mode {mode:04o}, wanted no write permission for them)"
    return None


class Folder:
    """An open folder that can be trusted, as a context manager. Raises ``OSError``; `Refused` when it cannot be trusted."""

    def __init__(self, path: Path | str, within: int | None = None) -> None:
        """``within``: the folder that a name is looked up in. A link there is refused; one on the way to a root is not."""
        self.path = Path(path)
        follow = 0 if within is None else os.O_NOFOLLOW
        try:
            self._fd = os.open(path, _READ | os.O_DIRECTORY | follow, dir_fd=within)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise Refused("is no folder (a link or a file; wanted a folder)") from None
            raise
        if reason := distrust(os.fstat(self._fd)):
            os.close(self._fd)
            raise Refused(reason)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._fd)

    def folder(self, name: str) -> Folder:
        """A folder in this one."""
        found = Folder(name, self._fd)
        found.path = self.path / name
        return found

    def names(self) -> list[str]:
        return sorted(os.listdir(self._fd))  # noqa: PTH208 (pathlib knows no descriptors)

    def kind(self, name: str) -> int | None:
        """``stat.S_IFMT`` of a name, of the link itself where it is one; None when nothing has the name."""
        try:
            return stat.S_IFMT(os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return None

    def read(self, name: str, limit: int) -> bytes:
        """Bytes of a regular file in this folder that can be trusted as it can. Raises ``OSError``."""
        return _read(name, limit, flags=os.O_NOFOLLOW, within=self._fd, trusted=True)


def read_regular(path: Path | str, limit: int, *, links: bool = True) -> bytes:
    """Bytes of any regular file of at most ``limit`` bytes, whoever owns it: for facts, never for code. Raises ``OSError``."""
    return _read(path, limit, flags=0 if links else os.O_NOFOLLOW, within=None, trusted=False)


def _read(path: Path | str, limit: int, *, flags: int, within: int | None, trusted: bool) -> bytes:
    try:
        descriptor = os.open(path, _READ | flags, dir_fd=within)
    except ValueError as error:  # a NUL, or half of a surrogate pair, in a name that a damaged record gave
        raise Refused(f"has a name that no file can have ({error})") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket, or a FIFO that nobody writes
            raise Refused("is no regular file (a link, a pipe or a socket)") from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Refused("is no regular file")
        if trusted and (reason := distrust(status)):
            raise Refused(reason)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1) if status.st_size <= limit else b""
    finally:
        os.close(descriptor)
    if status.st_size > limit or len(data) > limit:
        raise Refused(f"is too large (wanted at most {limit:,} bytes, found {max(status.st_size, len(data)):,})")
    return data


def parse_json(data: bytes) -> Any:
    """The JSON value of ``data``. Raises ``ValueError`` whatever is wrong with it, too deep a nesting included."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def make_folder(path: Path, mode: int) -> None:
    """Create a folder, and those above it, if it is not there. Others can write to none of them, whatever the umask."""
    if path.is_dir():
        return
    missing = [path, *(parent for parent in path.parents if not os.path.lexists(parent))]
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):
            each.mkdir(mode=mode)
    if not os.path.lexists(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that no reader ever sees half of it. Raises ``OSError``."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            os.fchmod(handle, 0o644)  # mkstemp makes it private; a directory that is shipped is read by others
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink(missing_ok=True)
        raise


def scratch() -> IO[str]:
    """A nameless file for what a program says; it needs no disk where the system has files in memory."""
    descriptor = -1
    with contextlib.suppress(AttributeError, OSError):
        descriptor = os.memfd_create("inductor_ext-scratch")
    if descriptor < 0:
        return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    return os.fdopen(descriptor, "w+", encoding="utf-8", errors="replace")


def is_disk_full(error: OSError) -> bool:
    """The disk or the quota is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
