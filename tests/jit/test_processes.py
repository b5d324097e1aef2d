"""A compiler never outlives the process that started it, whatever ends that one, and takes its own children with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from inductor_ext.errors import BuildError, ToolchainError
from inductor_ext.jit import find_toolchain, load, process

# As nvcc does: a child that works, and has a child of its own; the driver only waits.
TREE = "sh -c 'sleep 100 & echo $! >> {pids}; echo $$ >> {pids}; wait' & echo $! >> {pids}; echo $$ >> {pids}; wait"


def _until(condition, what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    """A zombie is dead: whoever inherited it has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def pids(lab):
    """Gives the process ids that the fake nvcc and its children wrote down, once all are there."""
    path = lab.path / "pids"
    lab.fake_nvcc(before=TREE.format(pids=path))

    def read() -> list[int]:
        _until(lambda: path.exists() and len(path.read_text().splitlines()) >= 4, "the fake nvcc did not start")
        return [int(line) for line in path.read_text().splitlines()]

    yield read
    for pid in read() if path.exists() else ():
        if _alive(pid) and b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


def _all_gone(found: list[int]) -> None:
    _until(lambda: not any(map(_alive, found)), f"still running: {[pid for pid in found if _alive(pid)]}")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGSEGV])
@pytest.mark.parametrize("where", ["load(spec, settings)", "from inductor_ext.jit import prepare; prepare([spec], settings)"])
def test_whatever_ends_the_process_ends_its_compilers(lab, pids, how, where):
    running = lab.python(where)
    found = pids()
    assert all(map(_alive, found))
    running.send_signal(how)
    running.communicate(timeout=20)
    _all_gone(found)


def test_a_process_that_replaces_itself_ends_its_compilers(lab, pids):
    code = """
        import os, threading
        threading.Thread(target=lambda: load(spec, settings), daemon=True).start()
        sys.stdin.read(0)
        import time
        while not (Path(settings.nvcc).parent / "pids").exists(): time.sleep(0.05)
        time.sleep(0.5)
        os.execv("/bin/sh", ["sh", "-c", "exec sleep 30"])  # a child of the shell would keep stdout open for all of it
    """
    running = lab.python(code)
    _all_gone(pids())
    running.kill()
    running.communicate()


def test_children_that_were_forked_meanwhile_do_not_keep_compilers_alive(lab, pids):
    """A DataLoader's workers, say: they hold copies of the parent's descriptors."""
    code = """
        import os, threading, time
        threading.Thread(target=lambda: load(spec, settings), daemon=True).start()
        while not (Path(settings.nvcc).parent / "pids").exists(): time.sleep(0.05)
        if os.fork() == 0:
            os.close(1); os.close(2)
            time.sleep(10)
            os._exit(0)
        print("forked", flush=True)
        time.sleep(100)
    """
    running = lab.python(code)
    assert running.stdout.readline() == "forked\n"
    found = pids()
    running.kill()
    running.communicate(timeout=20)
    started = time.monotonic()
    _all_gone(found)
    assert time.monotonic() - started < 5


def test_a_child_that_ends_does_not_end_its_parents_compiler(lab):
    lab.fake_nvcc(before="sleep 1")
    code = """
        import os, threading, time
        from inductor_ext.jit.process import stop_all
        results = []
        thread = threading.Thread(target=lambda: results.append(load(spec, settings)["run"]()))
        thread.start()
        while not (Path(settings.nvcc).parent / "calls").exists(): time.sleep(0.02)
        if os.fork() == 0:
            stop_all()
            os._exit(0)
        os.wait()
        thread.join()
        print(results)
    """
    assert lab.output(code) == "[41]"


def test_a_time_limit_reaches_the_children(lab, pids):
    with pytest.raises(BuildError, match="stopped after 1 s"):
        load(lab.spec(), lab.settings.replace(build_timeout_s=1))
    _all_gone(pids())


def test_a_compiler_that_hangs_when_it_is_asked_for_its_version_is_stopped_with_its_children(lab, monkeypatch):
    monkeypatch.setattr("inductor_ext.jit.compilers._PROBE_TIMEOUT_S", 0.5)
    lab.nvcc.write_text(f"#!/bin/sh\nsleep 100 &\necho $! > {lab.path}/pids\nwait\n")
    with pytest.raises(ToolchainError, match=r"it gave no answer in 0\.5 s and was stopped"):
        find_toolchain(lab.settings)
    _all_gone([int((lab.path / "pids").read_text())])


def test_status_and_output_come_through(tmp_path):
    with (tmp_path / "output").open("w+") as output:
        assert process.run(["sh", "-c", "echo a; echo b >&2; exit 7"], output, 10) == 7
        assert process.run(["sh", "-c", "kill -SEGV $$"], output, 10) == 128 + signal.SIGSEGV
        output.seek(0)
        assert output.read().startswith("a\nb\n")


def test_nothing_is_left_of_a_run_that_ended(tmp_path):
    """Neither the shell that waits at the lifeline nor a descriptor."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with (tmp_path / "output").open("w+") as output:
        for _ in range(20):
            process.run(["sh", "-c", "echo $PPID >> pids"], output, 10, cwd=tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    leaders = (tmp_path / "pids").read_text().split()
    listed = subprocess.run(["ps", "-eo", "pgid,stat"], capture_output=True, text=True).stdout.splitlines()
    groups = {words[0] for words in map(str.split, listed) if not words[1].startswith("Z")}
    assert not groups & set(leaders)
