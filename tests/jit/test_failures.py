"""Everything that can go wrong with a build: each has a clear error, and none leaves a binary that is wrong."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

from inductor_ext.errors import BuildError
from inductor_ext.jit import KernelCache, build, find_toolchain, forget, headers, load, prebuild, prepare, process, try_load

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


# ---- what is remembered of a failure -----------------------------------------------------------------------------------------

TRANSIENT = {
    "killed": "echo 'nvcc error   : cicc died due to signal 9 (Kill signal)'; exit 9",
    "killed itself": "kill -KILL $$",
    "crashed": "kill -SEGV $$",
    "memory": "echo 'virtual memory exhausted: Cannot allocate memory'; exit 1",
    "out of memory": "echo 'cc1plus: out of memory allocating 65536 bytes'; exit 1",
    "disk": "echo 'kernel.ii: fatal error: error writing: No space left on device'; exit 1",
    "quota": "echo 'x: Disk quota exceeded'; exit 1",
    "descriptors": "echo 'sh: 1: Cannot open x: Too many open files'; exit 1",
    "silent": "exit 3",
    "time": "sleep 5",
}


@pytest.mark.parametrize("cause", TRANSIENT)
def test_a_transient_failure_is_tried_again_at_the_next_call(lab, cause):
    lab.fake_nvcc(before=TRANSIENT[cause])
    with pytest.raises(BuildError) as caught:
        load(lab.spec(), lab.settings.replace(build_timeout_s=1))
    assert caught.value.transient
    assert KernelCache(lab.cache).failure_since(lab.spec(), 0.0, "") is None
    assert list((lab.cache / "failed").iterdir()) == []
    lab.nvcc.write_text(lab.nvcc.read_text().replace(TRANSIENT[cause], ""))  # sources and versions as before
    assert load(lab.spec(), lab.settings)["run"]() == 41


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EIO])
def test_an_error_of_the_system_is_not_remembered(lab, monkeypatch, number):
    def fails(*args, **options):
        raise OSError(number, "no")

    find_toolchain(lab.settings)
    with monkeypatch.context() as patch:
        patch.setattr(process.subprocess, "Popen", fails)
        with pytest.raises(BuildError):
            load(lab.spec(), lab.settings)
    assert load(lab.spec(), lab.settings)["run"]() == 41


def test_a_failure_is_forgotten_after_an_hour(lab, monkeypatch):
    lab.fake_nvcc(before="echo 'x.cuh(1): error: expected a thing'; exit 1")
    clock = time.monotonic
    for seconds, compiles in ((0, 1), (3000, 1), (4000, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda seconds=seconds: clock() + seconds)
            with pytest.raises(BuildError, match="expected a thing"):
                load(lab.spec(), lab.settings)
        assert lab.compiles() == compiles


@pytest.mark.parametrize(("age", "believed"), [(1, True), (3500, True), (3700, False), (-60, False), (float("nan"), False)])
def test_a_note_is_believed_for_an_hour_and_never_of_the_future(lab, monkeypatch, age, believed):
    cache, now = KernelCache(lab.cache), time.time()
    cache.make_writable()
    monkeypatch.setattr(time, "time", lambda: now - age)
    cache.note_failure(lab.spec(), {"message": "m", "first_error": "f", "log": "", "state": "s"})
    monkeypatch.setattr(time, "time", lambda: now)
    assert (cache.failure_since(lab.spec(), 0.0, "s") is not None) is believed
    assert cache.failure_since(lab.spec(), 0.0, "another") is None


# ---- directories that cannot be used, or go away -----------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["", "tmp", "locks", "kernels", "failed", "INDUCTOR_EXT"])
def test_a_cache_that_is_deleted_while_the_process_lives_is_made_again(lab, gone):
    load(lab.spec(), lab.settings)
    path = lab.cache / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert load(lab.spec(name="other"), lab.settings)["run"]() == 41
    assert "other" in {entry.name for entry in KernelCache(lab.cache).entries()}


@pytest.mark.parametrize("left", ["kernels", "locks", "logs", "failed", "tmp"])
def test_what_is_left_of_a_cache_that_was_deleted_meanwhile_is_taken_again(lab, left, caplog):
    """A process that waits for a lock makes its folder again, so that nothing but this is there afterwards."""
    load(lab.spec(), lab.settings)
    for path in lab.cache.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    forget()
    assert load(lab.spec(), lab.settings)["run"]() == 41
    assert len(KernelCache(lab.cache).entries()) == 1 and not caplog.records


def test_a_cache_that_is_deleted_while_others_wait_for_its_lock_is_whole_again(lab):
    lab.fake_nvcc(before=f"[ -e {lab.path}/once ] || {{ touch {lab.path}/once; rm -rf {lab.cache}; sleep 0.5; }}")
    code = "import os; os.umask(0o002)" + SIXTEEN.replace("\n    ", "\n")
    assert lab.output(code).splitlines()[-1] == str([0] * PROCESSES)
    assert "cannot be used" not in lab.output('print(load(spec, settings)["run"]())')
    (entry,) = KernelCache(lab.cache).entries()
    assert entry.damage() is None


@pytest.mark.parametrize("gone", ["cache", "cache/tmp"])
def test_a_cache_that_is_deleted_while_it_is_built_into_is_made_again(lab, gone):
    lab.fake_nvcc(before=f"[ -e {lab.path}/once ] || {{ touch {lab.path}/once; rm -rf {lab.path}/{gone}; }}")
    assert load(lab.spec(), lab.settings)["run"]() == 41
    assert len(KernelCache(lab.cache).entries()) == 1


def test_the_private_cache_too_is_made_again(lab, caplog, monkeypatch):
    lab.cache.write_text("a file")
    (lab.path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(lab.path / "temporary"))
    load(lab.spec(), lab.settings)
    for path in (lab.path / "temporary").iterdir():
        shutil.rmtree(path)
    assert load(lab.spec(name="other"), lab.settings)["run"]() == 41
    assert [record.levelname for record in caplog.records if record.name == "inductor_ext.jit"] == ["WARNING"]


def test_a_disk_that_fills_up_costs_one_warning_and_a_private_build(lab, caplog, monkeypatch):
    lab.fake_nvcc(before=f'case "$*" in *{lab.cache}*) echo "x: No space left on device"; exit 1;; esac')
    monkeypatch.setattr(tempfile, "tempdir", str(lab.path))
    with caplog.at_level(logging.WARNING, "inductor_ext.jit"):
        assert load(lab.spec(), lab.settings)["run"]() == 41
        assert load(lab.spec(name="other"), lab.settings)["run"]() == 41
    (record,) = caplog.records
    assert str(lab.cache) in record.getMessage() and "No space left on device" in record.getMessage()
    _nothing_published(lab)


def test_the_private_directory_is_private(lab):
    lab.cache.write_text("a file")
    (lab.path / "temporary").mkdir()
    code = """
        import os
        os.umask(0)
        load(spec, settings)
        print([oct(path.stat().st_mode & 0o777) for path in Path(os.environ["TMPDIR"]).glob("inductor_ext-*")])
    """
    assert lab.output(code, env={"TMPDIR": str(lab.path / "temporary")}).splitlines()[-1] == "['0o700']"


def test_a_relative_cache_stays_where_it_was_first_used(lab):
    code = """
        import os
        from inductor_ext.settings import current
        os.environ["INDUCTOR_EXT_CACHE_DIR"] = "relative"
        chosen = current(nvcc=settings.nvcc)
        load(spec, chosen)
        os.mkdir("elsewhere"); os.chdir("elsewhere")
        from inductor_ext.jit import forget
        forget()
        print(try_load(spec, current(nvcc=settings.nvcc))["run"](), current().cache_path() == chosen.cache_path())
    """
    assert lab.output(code) == "41 True"
    assert (lab.path / "relative/kernels").is_dir() and list((lab.path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without a name")
def test_a_user_without_a_home_and_a_name_has_a_cache(lab):
    for path in [lab.path, *lab.path.parents]:
        if not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o055)
    (lab.path / "temporary").mkdir()
    (lab.path / "temporary").chmod(0o1777)
    lab.path.joinpath("calls").touch()
    lab.path.joinpath("calls").chmod(0o666)
    code = """
        import filelock, os, platformdirs, tvm_ffi  # this Python may be closed to others
        import rich.console
        from inductor_ext.jit import build, headers
        for name in ("inductor-ext", "apache-tvm-ffi", "nvidia-cutlass"): headers.package_version(name)
        headers.tvm_ffi_includes = lambda: [Path("/nowhere")]
        headers.cutlass_include = lambda: None
        del os.environ["HOME"]
        os.setgid(54321); os.setuid(54321)
        settings = settings.replace(cache_dir="")
        print(load(spec, settings)["run"](), settings.cache_path())
    """
    wanted = f"41 {lab.path}/temporary/inductor_ext-54321"
    assert lab.output(code, env={"TMPDIR": str(lab.path / "temporary"), "XDG_CACHE_HOME": ""}) == wanted


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
