"""What in a cache directory is this package's own, and how that, and nothing else, is deleted.

A root is ours when it has the marker. Earlier versions made none, and somebody who deletes a cache while a process waits for
a lock in it leaves none; then it is ours if all that it holds has the names that only this package gives. Below a root that
is ours only what has the name, the place and the shape of something that this package makes is ever deleted; the rest is left
and named.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import stat
import time
from pathlib import Path

from inductor_ext.errors import SettingError
from inductor_ext.jit.files import Folder, Refused, said, write_atomically
from inductor_ext.report.shown import line

MARKER, MANIFEST, TOOLCHAIN = "INDUCTOR_EXT", "manifest.json", "toolchain.json"
BINARY, SOURCE, RECORD = "kernel.so", "kernel.cu", "entry.json"
FOLDERS = ("kernels", "locks", "logs", "failed", "tmp")
SLOT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*-sm_[0-9]+[af]?-[0-9a-f]{24}")
STAGE = "build-"
STALE_TMP_S = 2 * 24 * 3600  # twice the longest build_timeout_s
_KEY = re.compile(r"[0-9a-f]{24}")
_UNFINISHED = re.compile(rf"\.({MARKER}|.*\.json|.*\.log)-[a-z0-9_]{{8}}")  # what a killed write_atomically leaves
_SYSTEM = re.compile(r"lost\+found|\.nfs.*|\.snapshot")  # what file systems put into a folder that is a mount
_TEXT = """inductor_ext kernels
This folder holds kernel binaries of inductor_ext and may be deleted; they are built again when they are needed.
Where this file is, `inductor-ext cache clear` deletes what inductor_ext has made, and nothing else.
"""


def is_marked(root: Folder) -> bool:
    """Whether a root has the marker."""
    with contextlib.suppress(OSError):
        return root.read(MARKER, 1 << 16).startswith(_TEXT.splitlines()[0].encode())
    return False


def mark(folder: Path) -> None:
    """Put the marker into a folder of ours. Raises ``OSError``."""
    write_atomically(folder / MARKER, _TEXT)


def claim(root: Folder) -> None:
    """Mark a root that is new, empty, or a cache of an earlier version. Raises ``OSError``, `Refused` for any other."""
    if not is_marked(root):
        if found := strangers(root):
            raise Refused(f"{_holding(found)} (wanted a new folder, an empty one, or one made by inductor_ext)")
        mark(root.path)


def strangers(root: Folder, *, emptied: bool = False) -> list[str]:
    """Names in a root that no version of this package made; all of them when there is nothing that shows it to be ours.

    ``emptied``: of a root that is ours, whatever is still there after all that is ours was deleted.
    """
    names = [name for name in root.names() if not (_SYSTEM.fullmatch(name) or _UNFINISHED.fullmatch(name))]
    foreign, inside = [], []
    for name in names:
        if name in FOLDERS:
            try:
                with root.folder(name) as folder:
                    inside += folder.names()
                    foreign += [f"{name}/{each}" for each in folder.names() if not _belongs(name, each, emptied)]
            except OSError:
                foreign.append(name)
        elif name not in (MARKER, TOOLCHAIN, MANIFEST) or root.kind(name) != stat.S_IFREG:
            foreign.append(name)
    only_folders = bool(names) and set(names) <= set(FOLDERS) and not inside
    named = any(SLOT.match(name) or name.startswith(STAGE) for name in inside)
    certain = named or only_folders or {"kernels", "locks"} <= set(names)
    return foreign if foreign or emptied or certain else names


def clear(root: Path) -> tuple[int, list[str]]:
    """Delete every binary, log and note of a failure: the number of binaries, and what is left because it is not ours.

    A build under way is left alone: its lock and its stage. Raises ``SettingError`` when the root is no kernel cache.
    """
    try:
        with Folder(root) as folder:
            if not is_marked(folder) and (found := strangers(folder)):
                raise Refused(_holding(found))
    except FileNotFoundError:
        return 0, []
    except OSError as error:
        where = f"INDUCTOR_EXT_CACHE_DIR: wanted a kernel cache, found {line(root)}"
        raise SettingError(f"{where}, which {said(error)}; nothing was deleted") from error
    count = _clear_kernels(root)
    clear_files(root, "logs", ".log")
    clear_files(root, "failed", ".json")
    for name in (TOOLCHAIN, MANIFEST):
        with contextlib.suppress(OSError):
            (root / name).unlink()
    sweep(root)
    with Folder(root) as folder:
        return count, strangers(folder, emptied=True)


def clear_files(root: Path, folder: str, suffix: str) -> None:
    """Delete the files that are named after a slot, and half-written ones."""
    for path in _inside(root, folder):
        ours = path.name.endswith(suffix) and SLOT.fullmatch(path.name.removesuffix(suffix))
        if ours or _UNFINISHED.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def sweep(root: Path) -> None:
    """Delete what killed builds left in ``tmp`` long ago."""
    for path in _inside(root, "tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > STALE_TMP_S and _is_stage(path):
                shutil.rmtree(path, ignore_errors=True)


def _clear_kernels(root: Path) -> int:
    count = 0
    for path in _inside(root, "kernels"):
        if not SLOT.fullmatch(path.name):
            continue
        for entry in _inside(root, "kernels", path.name):
            if _is_entry(entry):
                count += (entry / BINARY).is_file()
                shutil.rmtree(entry, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.rmdir()
    return count


def _inside(root: Path, *names: str) -> list[Path]:
    """What is in a folder of ours; nothing when it is not there, or when a link or a file has its name."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        folder = stack.enter_context(Folder(root))
        for name in names:
            folder = stack.enter_context(folder.folder(name))
        return [folder.path / name for name in folder.names()]
    return []


def _belongs(folder: str, name: str, emptied: bool) -> bool:
    if folder == "tmp" or (folder == "locks" and (emptied or name == "manifest.lock")):
        return True
    return not emptied and bool(_UNFINISHED.fullmatch(name) or SLOT.match(name))


def _is_entry(path: Path) -> bool:
    """Whether a path is a folder that holds nothing but what `KernelCache.publish` puts into one."""
    if not _KEY.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    return {each.name for each in path.iterdir()} <= {BINARY, SOURCE, RECORD}


def _is_stage(path: Path) -> bool:
    """A folder that `KernelCache.staging` made, in this version or in an earlier one (which put no marker into it)."""
    if path.is_symlink() or not path.is_dir():
        return False
    return (path / MARKER).is_file() or (path / "entry" / SOURCE).is_file()


def _holding(found: list[str]) -> str:
    names = ", ".join(map(line, found[:5])) + (", …" if len(found) > 5 else "")
    return f"holds {names} and no file {MARKER}"
