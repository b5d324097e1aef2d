"""Everything that can go wrong with a build: each has a clear error, and none leaves a binary that is wrong."""

from __future__ import annotations

import errno
import logging
import signal
import tempfile
import time
from pathlib import Path

import pytest

from inductor_ext.errors import BuildError
from inductor_ext.jit import KernelCache, build, forget, headers, load, prebuild, prepare, try_load

PROCESSES = 16
SIXTEEN = f"""
    import os, tvm_ffi
    read, write = os.pipe()
    children = []
    for _ in range({PROCESSES}):
        pid = os.fork()
        if pid == 0:
            os.close(write)
            os.read(read, 1)  # all start when the parent closes the pipe
            code = 1
            try:
                code = 0 if load(spec, settings)["run"]() == 41 else 2
            except BuildError as error:
                code = 3 if "expected" in str(error) else 4
            finally:
                os._exit(code)
        children.append(pid)
    os.close(write)
    print(sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
"""


def _nothing_published(lab):
    assert KernelCache(lab.cache).entries() == []
    assert list((lab.cache / "tmp").iterdir()) == []


def test_sixteen_processes_compile_once(lab):
    lab.fake_nvcc(before="sleep 0.3")
    assert lab.output(SIXTEEN) == str([0] * PROCESSES)
    assert lab.compiles() == 1
    assert len(KernelCache(lab.cache).entries()) == 1


def test_sixteen_processes_meet_a_failure_once(lab):
    lab.fake_nvcc(before="sleep 1; echo 'x.cuh(1): error: expected a thing'; exit 1")
    assert lab.output(SIXTEEN) == str([3] * PROCESSES)
    assert lab.compiles() == 1


def test_a_failed_compile_names_kernel_first_error_and_log_and_is_not_repeated(lab):
    (lab.kernels / "answer/answer.cuh").write_text("namespace t { template <int N> int run() { return nothing; } }\n")
    with pytest.raises(BuildError) as caught:
        load(lab.spec(), lab.settings)
    error = caught.value
    assert "nothing" in error.first_error and "error:" in error.first_error
    assert "answer (sm_90a)" in str(error) and error.first_error in str(error) and error.log in str(error)
    assert "\n" not in str(error)
    log = Path(error.log).read_text()
    assert Path(error.log).parent == lab.cache / "logs" and str(lab.nvcc) in log and "nothing" in log
    with pytest.raises(BuildError) as again:
        load(lab.spec(), lab.settings)
    assert str(again.value) == str(error) and lab.compiles() == 1
    _nothing_published(lab)


def test_a_failed_compile_is_tried_again_once_the_source_changed(lab):
    source = lab.kernels / "answer/answer.cuh"
    good = source.read_text()
    source.write_text("#error not yet\n")
    with pytest.raises(BuildError, match="not yet"):
        load(lab.spec(), lab.settings)
    source.write_text(good)
    assert load(lab.spec(), lab.settings)["run"]() == 41


def test_a_missing_source_is_named(lab):
    with pytest.raises(BuildError, match=r"no/such\.cuh does not exist"):
        load(lab.spec(source="no/such.cuh"), lab.settings)


def test_a_compiler_past_its_time_is_stopped_with_its_children(lab):
    lab.fake_nvcc(before=f"sh -c 'sleep 3; touch {lab.path}/survived'")
    with pytest.raises(BuildError, match=r"stopped after 1 s \(INDUCTOR_EXT_BUILD_TIMEOUT\)"):
        load(lab.spec(), lab.settings.replace(build_timeout_s=1))
    time.sleep(2.5)
    assert not (lab.path / "survived").exists()
    _nothing_published(lab)


def test_a_killed_build_leaves_only_a_temporary_directory(lab):
    lab.fake_nvcc(before=f"touch {lab.path}/compiling; sleep 5; exit 1")
    process = lab.python("load(spec, settings)")
    deadline = time.monotonic() + 30
    while not (lab.path / "compiling").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert KernelCache(lab.cache).entries() == []
    assert len(list((lab.cache / "tmp").iterdir())) == 1
    lab.fake_nvcc()
    assert load(lab.spec(), lab.settings.replace(build_timeout_s=5))["run"]() == 41


def test_a_disk_that_fills_up_while_compiling_is_named(lab):
    lab.fake_nvcc(before="echo 'kernel.ii: fatal error: error writing: No space left on device'; exit 1")
    with pytest.raises(BuildError, match=r"disk of .* is full \(\d+ MiB free\).*INDUCTOR_EXT_CACHE_DIR"):
        load(lab.spec(), lab.settings)
    _nothing_published(lab)


def test_a_disk_that_is_full_at_publishing_is_named(lab, monkeypatch):
    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(BuildError, match=r"disk of .* is full"):
        load(lab.spec(), lab.settings)
    _nothing_published(lab)


def test_a_disk_that_is_full_before_anything_is_named(lab, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(BuildError, match=r"disk of .* is full"):
        load(lab.spec(), lab.settings)


def test_a_compiler_killed_for_memory_gets_the_advice(lab):
    lab.fake_nvcc(before="echo 'nvcc error : cicc died due to signal 9 (Kill signal)'; exit 9")
    with pytest.raises(BuildError, match="INDUCTOR_EXT_BUILD_JOBS"):
        load(lab.spec(), lab.settings)


def test_a_cache_that_cannot_be_written_costs_one_warning_and_a_private_build(lab, caplog):
    lab.cache.write_text("a file where the directory should be; permission bits mean nothing to root\n")
    with caplog.at_level(logging.WARNING, "inductor_ext.jit"):
        assert load(lab.spec(), lab.settings)["run"]() == 41
        assert load(lab.spec(name="other"), lab.settings)["run"]() == 41
    (record,) = caplog.records
    assert str(lab.cache) in record.getMessage() and "INDUCTOR_EXT_CACHE_DIR" in record.getMessage()
    assert lab.compiles() == 2


def test_a_read_only_cache_still_serves_what_it_holds(lab, monkeypatch):
    load(lab.spec(), lab.settings)
    forget()

    def read_only(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", read_only)
    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    monkeypatch.setattr(Path, "mkdir", read_only)
    assert load(lab.spec(), lab.settings)["run"]() == 41
    with pytest.raises(BuildError, match=r"neither the cache .* nor the temporary directory"):
        load(lab.spec(name="other"), lab.settings)


def test_the_private_directory_goes_with_its_process(lab):
    lab.cache.write_text("a file\n")
    code = 'print(load(spec, settings)["run"]())'
    temporary = lab.path / "temporary"
    temporary.mkdir()
    assert lab.output(code, env={"TMPDIR": str(temporary)}).splitlines()[-1] == "41"
    assert list(temporary.glob("inductor_ext-*")) == []


def test_prebuild_into_a_directory_that_cannot_be_written_is_a_value(lab):
    (lab.path / "file").write_text("")
    made = prebuild([lab.spec()], lab.path / "file", lab.settings)
    assert isinstance(made[lab.spec()], BuildError)


def test_a_binary_without_its_export_is_not_published(lab):
    lab.fake_nvcc()
    script = lab.nvcc.read_text().replace('exec "$host"', 'exec "$host" -D__tvm_ffi_run=__tvm_ffi_gone')
    lab.nvcc.write_text(script)
    with pytest.raises(BuildError, match="compiled but does not load"):
        load(lab.spec(exports=(("run", "t::run<1>"),)), lab.settings)
    _nothing_published(lab)


def test_sources_edited_while_they_compile_are_compiled_again(lab):
    header = lab.kernels / "include/value.h"
    edit = f"[ -e {lab.path}/edited ] || {{ touch {lab.path}/edited; echo '#define VALUE 50' > {header}; }}"
    lab.fake_nvcc(before=edit)
    assert load(lab.spec(), lab.settings)["run"]() == 51
    assert lab.compiles() == 2


def test_the_loser_of_a_race_takes_the_winners_entry(lab, monkeypatch):
    """Where locks do not work two processes compile the same; the second finds the place taken."""
    load(lab.spec(), lab.settings)
    (winner,) = KernelCache(lab.cache).entries()
    monkeypatch.setattr(KernelCache, "candidates", lambda *args: iter(()))
    forget()
    assert load(lab.spec(), lab.settings)["run"]() == 41
    monkeypatch.undo()
    (entry,) = KernelCache(lab.cache).entries()
    assert entry.record.created == winner.record.created


def test_ctrl_c_during_prepare_stops_the_compilers(lab):
    lab.fake_nvcc(before=f"touch {lab.path}/compiling; sh -c 'sleep 3; touch {lab.path}/survived'")
    process = lab.python("from inductor_ext.jit import prepare\nprepare([spec], settings)")
    while not (lab.path / "compiling").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    process.communicate(timeout=20)
    assert process.returncode != 0 and time.monotonic() - started < 2.5
    time.sleep(max(0.0, 3.5 - (time.monotonic() - started)))
    assert not (lab.path / "survived").exists()


def test_an_unexpected_error_in_prepare_is_a_value(lab, monkeypatch):
    monkeypatch.setattr(headers, "snapshot", lambda: 1 / 0)
    result = prepare([lab.spec()], lab.settings)[lab.spec()]
    assert isinstance(result, BuildError) and "ZeroDivisionError" in str(result)


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        ("a.cuh(3): warning #1: x\na.cuh(4): error: identifier\nb: error: later\n", "a.cuh(4): error: identifier"),
        ('a.cuh(3): error #20: identifier "x" is undefined\n', 'a.cuh(3): error #20: identifier "x" is undefined'),
        ("ptxas fatal   : Unresolved extern function 'f'\n", "ptxas fatal   : Unresolved extern function 'f'"),
        ("nvcc fatal   : Unsupported gpu architecture\n", "nvcc fatal   : Unsupported gpu architecture"),
        (
            "/usr/bin/ld: cannot find -lx: No such file\ncollect2: error: ld returned 1\n",
            "/usr/bin/ld: cannot find -lx: No such file",
        ),
        ("no pattern\nlast line\n", "last line"),
        ("", ""),
    ],
)
def test_first_error_of_each_tool(output, wanted):
    assert build.first_error(output) == wanted


def test_try_load_never_compiles(lab):
    assert try_load(lab.spec(), lab.settings) is None and lab.compiles() == 0


def test_importing_and_asking_creates_no_directory(lab):
    lab.output("try_load(spec, settings)\nassert not Path(settings.cache_dir).exists()")


def test_importing_the_jit_imports_neither_torch_nor_tvm_ffi(lab):
    assert lab.output("print('tvm_ffi' in sys.modules, sys.modules['torch'])") == "False None"
