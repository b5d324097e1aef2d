"""Compilers as child processes that never outlive this one, whatever ends it.

nvcc starts cicc, ptxas and the host compiler, so each call gets a process group of its own. In it a shell waits at a pipe, the
lifeline, whose other end only this process holds: when that end closes, for any reason, SIGKILL of this process included, the
shell kills its whole group. (PR_SET_PDEATHSIG would reach nvcc alone, and fires when the *thread* that started it ends.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_SHELL = """
exec 3<&0 </dev/null
( read -r line <&3; kill -KILL 0 ) >/dev/null 2>&1 &
watcher=$!
"$@" 3<&-
status=$?
kill -KILL "$watcher" 2>/dev/null
exit "$status"
"""

_lifelines: set[int] = set()  # our ends of the pipes of what runs now
_lock = threading.Lock()


class TimedOut(Exception):
    """The process and its children were stopped after their time."""


def run(
    command: Sequence[str],
    output: IO[str],
    timeout_s: float,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> int:
    """Run to the end; stdout and stderr go to ``output``, a file. The exit status, 128 + n where signal n killed it.

    Raises `TimedOut`, and ``OSError`` when nothing can be started. Whatever is raised, nothing is left running.
    """
    theirs, lifeline = os.pipe()  # not inheritable: another thread's child holds neither end
    with _lock:
        _lifelines.add(lifeline)
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", _SHELL, "sh", *command],
            stdin=theirs,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=env,
            start_new_session=True,
        )
    except BaseException:
        _cut(lifeline)
        raise
    finally:
        os.close(theirs)
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise TimedOut from None
    finally:
        _cut(lifeline)
        if process.returncode is None:  # only this thread waits for it, so the number is still its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return 128 - code if code < 0 else code


def stop_all() -> None:
    """Stop everything that `run` has started in this process: Ctrl-C reaches Python, not other process groups."""
    with _lock:
        running = list(_lifelines)
    for lifeline in running:
        _cut(lifeline)


def _cut(lifeline: int) -> None:
    with _lock:
        if lifeline in _lifelines:
            _lifelines.discard(lifeline)
            os.close(lifeline)


def _after_fork() -> None:
    """A forked child lets go of the lifelines: the compilers are its parent's, and end with that one."""
    global _lock
    _lock = threading.Lock()
    for lifeline in _lifelines:
        with contextlib.suppress(OSError):
            os.close(lifeline)
    _lifelines.clear()


os.register_at_fork(after_in_child=_after_fork)
