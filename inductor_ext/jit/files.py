"""Small files written so that no reader sees half of them, and what an ``OSError`` means."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that no reader ever sees half of it. Raises ``OSError``."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).chmod(0o644)  # mkstemp makes it private; a shared cache is read by others
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def is_disk_full(error: OSError) -> bool:
    """The disk or the quota is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
