"""Whose binary is loaded: what another user of the machine could have planted, exchanged or misplaced is not."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess

import pytest

from inductor_ext.errors import KernelUnavailable, SettingError
from inductor_ext.jit import KernelCache, binary, cache, forget, load, prebuild, try_load

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
SOMEBODY = 54321


@pytest.fixture
def entry(lab):
    """An entry of ``lab``'s cache, and nothing of it in this process."""
    load(lab.spec(), lab.settings)
    forget()
    (found,) = KernelCache(lab.cache).entries()
    return found


def _reasons(lab) -> str:
    with pytest.raises(KernelUnavailable) as caught:
        load(lab.spec(), lab.settings.replace(build="never"))
    return str(caught.value)


def _planted(lab, directory, answer: int) -> None:
    """A binary that answers something else, with a record that holds for its bytes."""
    source = (lab.kernels / "include/value.h").read_text()
    (lab.kernels / "include/value.h").write_text(f"#define VALUE {answer - 1}\n")
    other = lab.settings.replace(cache_dir=str(lab.path / "attacker"))
    load(lab.spec(), other)
    (lab.kernels / "include/value.h").write_text(source)
    (made,) = KernelCache(lab.path / "attacker").entries()
    record = json.loads((made.path / "entry.json").read_text())
    wanted = json.loads((directory / "entry.json").read_text())
    wanted["binary"] = record["binary"]
    for name in ("kernel.so", "entry.json"):
        (directory / name).unlink()
    shutil.copy(made.binary, directory / "kernel.so")
    (directory / "entry.json").write_text(json.dumps(wanted))
    forget()


LEVELS = ("", "kernels", "kernels/{slot}", "kernels/{slot}/{key}")
FILES = ("kernels/{slot}/{key}/kernel.so", "kernels/{slot}/{key}/entry.json")


@pytest.mark.parametrize("where", [*LEVELS, *FILES])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_group_or_others_can_write_is_not_loaded(lab, entry, where, mode):
    path = lab.cache / where.format(slot=entry.path.parent.name, key=entry.key)
    path.chmod(path.stat().st_mode | mode)
    assert try_load(lab.spec(), lab.settings) is None
    assert "can be written by its group or by others" in _reasons(lab)


@AS_ROOT
@pytest.mark.parametrize("where", [*LEVELS, *FILES])
def test_what_belongs_to_another_user_is_not_loaded(lab, entry, where):
    path = lab.cache / where.format(slot=entry.path.parent.name, key=entry.key)
    os.chown(path, SOMEBODY, SOMEBODY)
    assert try_load(lab.spec(), lab.settings) is None
    assert f"belongs to user {SOMEBODY} (wanted root)" in _reasons(lab)


@pytest.mark.parametrize("where", [*LEVELS[1:], *FILES])
def test_no_link_is_followed_below_the_root(lab, entry, where):
    path = lab.cache / where.format(slot=entry.path.parent.name, key=entry.key)
    path.rename(lab.path / "elsewhere")
    path.symlink_to(lab.path / "elsewhere")
    assert try_load(lab.spec(), lab.settings) is None
    assert "link" in _reasons(lab)


def test_a_link_to_the_root_is_the_users_own_choice(lab, entry):
    lab.cache.rename(lab.path / "other disk")
    lab.cache.symlink_to(lab.path / "other disk")
    assert try_load(lab.spec(), lab.settings)["run"]() == 41


def test_a_planted_binary_does_not_run_and_is_built_over(lab, entry):
    """The attack of the review: right name, right record, others can write the folder."""
    _planted(lab, entry.path, 666)
    entry.path.chmod(0o777)
    assert load(lab.spec(), lab.settings)["run"]() == 41
    forget()
    assert try_load(lab.spec(), lab.settings)["run"]() == 41  # the place was cleared for it
    assert entry.path.stat().st_mode & 0o777 == 0o700


def test_a_record_of_another_spec_or_place_is_refused(lab, entry):
    """Same path, same bytes; the whole spec is compared, not the key that stands in the path."""
    other = lab.spec(exports=(("run", "t::run<2>"),))
    place = lab.cache / "kernels" / KernelCache(lab.cache).slot(other) / entry.key
    place.parent.mkdir(mode=0o700)
    shutil.copytree(entry.path, place)
    with pytest.raises(KernelUnavailable, match="its record is of another spec"):
        load(other, lab.settings.replace(build="never"))
    assert load(other, lab.settings)["run"]() == 42
    forget()
    entry.path.rename(entry.path.with_name("0" * 24))
    assert "belongs to another entry" in _reasons(lab)


def test_what_was_hashed_is_what_is_loaded(lab, entry, monkeypatch):
    """Somebody with write access exchanges the file, and rewrites it in place, after the check and before the load."""
    honest = binary.load

    def late(code, digest, spec):
        with entry.binary.open("r+b") as file:
            file.write(b"\0" * 4096)
        entry.binary.unlink()
        entry.binary.write_bytes(b"not a library")
        return honest(code, digest, spec)

    monkeypatch.setattr(binary, "load", late)
    assert try_load(lab.spec(), lab.settings)["run"]() == 41


def test_a_binary_whose_descriptor_somebody_closed_is_not_taken_for_the_next(lab):
    """The dynamic linker knows libraries by name: a /proc/<pid>/fd/<n> that came back would give the old one."""
    code = """
        import os
        def opened(): return {int(name) for name in os.listdir("/proc/self/fd")}
        first = opened()
        one = load(spec, settings)
        for descriptor in opened() - first:
            if os.path.exists(f"/proc/self/fd/{descriptor}") and "memfd" in os.readlink(f"/proc/self/fd/{descriptor}"):
                os.close(descriptor)
        two = load(JitSpec("answer", "answer/answer.cuh", (("run", "t::run<2>"),), arch="sm_90a"), settings)
        print(one["run"](), two["run"]())
    """
    assert lab.output(code) == "41 42"


def test_without_a_memfd_a_private_file_does_and_goes_with_the_process(lab):
    (lab.path / "temporary").mkdir()
    code = """
        import os
        del os.memfd_create
        module, here = load(spec, settings), Path(os.environ["TMPDIR"])
        print(module["run"](), len(list(here.glob("inductor_ext-loaded-*/answer-sm_90a.so"))))
    """
    load(lab.spec(), lab.settings)
    assert lab.output(code, env={"TMPDIR": str(lab.path / "temporary")}) == "41 1"
    assert list((lab.path / "temporary").iterdir()) == []


def test_where_nothing_in_memory_may_be_run_a_private_file_does(lab, entry, monkeypatch):
    import tvm_ffi

    honest = tvm_ffi.get_global_func

    def strict(name):
        if not name.startswith("ffi.Module.load"):
            return honest(name)

        def opened(path, kind):
            if path.startswith("/proc"):
                raise RuntimeError(f"{path}: failed to map segment from shared object")
            return honest(name)(path, kind)

        return opened

    monkeypatch.setattr(tvm_ffi, "get_global_func", strict)
    monkeypatch.setattr(binary, "_modules", {})
    assert try_load(lab.spec(), lab.settings)["run"]() == 41


@pytest.mark.skipif(shutil.which("gdb") is None, reason="no gdb")
def test_a_debugger_sees_the_functions_of_a_loaded_binary(lab):
    load(lab.spec(), lab.settings)
    process = lab.python('load(spec, settings)\nprint("loaded", flush=True)\nimport time; time.sleep(100)')
    try:
        line = process.stdout.readline()
        if line != "loaded\n":
            pytest.fail(line + process.stdout.read())
        gdb = ["gdb", "-nx", "-batch", "-p", str(process.pid), "-ex", "info symbol __tvm_ffi_run", "-ex", "info sharedlibrary"]
        shown = subprocess.run(gdb, capture_output=True, text=True, timeout=120)
        if "ptrace: Operation not permitted" in shown.stderr + shown.stdout:
            pytest.skip("gdb may not attach here")
        assert "__tvm_ffi_run in section .text of /proc/" in shown.stdout, shown.stdout + shown.stderr
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("umask", ["0", "002", "022", "077"])
def test_everything_is_private_whatever_the_umask(lab, umask):
    code = f"""
        import os
        os.umask(0o{umask})
        print(load(spec, settings)["run"]())
        root = Path(settings.cache_dir)
        modes = {{path: path.stat().st_mode & 0o777 for path in [root, *root.rglob("*")]}}
        assert all(mode == 0o700 for path, mode in modes.items() if path.is_dir()), modes
        assert not any(mode & 0o022 for path, mode in modes.items()), modes
        from inductor_ext.jit import forget
        forget()
        print(try_load(spec, settings)["run"]())
    """
    assert lab.output(code).split() == ["41", "41"]
    assert lab.compiles() == 1


# ---- a directory that was shipped ------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(lab):
    """(directory, settings that use it and forbid building)."""
    prebuild([lab.spec()], lab.path / "shipped", lab.settings)
    forget()
    settings = lab.settings.replace(build="never", cache_dir=str(lab.path / "none"), prebuilt_dir=str(lab.path / "shipped"))
    return lab.path / "shipped", settings


def test_a_prebuilt_directory_can_be_read_by_all_and_written_by_its_owner_only(lab, shipped):
    directory, settings = shipped
    modes = {path: path.stat().st_mode & 0o777 for path in [directory, *directory.rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o755}
    assert {mode for path, mode in modes.items() if path.parent.parent.parent.name == "kernels"} == {0o644}
    assert try_load(lab.spec(), settings)["run"]() == 41


@AS_ROOT
def test_a_prebuilt_directory_of_root_serves_a_container_that_runs_as_somebody_else(lab, shipped):
    directory, _ = shipped
    for path in [lab.path, *lab.path.parents]:
        if not path.stat().st_mode & 0o001 and path != path.parent:
            path.chmod(path.stat().st_mode | 0o055)  # pytest's own folders are private
    code = f"""
        import os, platformdirs, tvm_ffi  # this Python may be closed to others
        for name in ("inductor-ext", "apache-tvm-ffi", "nvidia-cutlass"): headers.package_version(name)
        os.setgid({SOMEBODY}); os.setuid({SOMEBODY})
        settings = settings.replace(build="never", cache_dir="/nowhere", prebuilt_dir={str(directory)!r})
        print(load(spec, settings)["run"]())
    """
    assert lab.output(code) == "41"


@pytest.mark.parametrize("what", ["does not exist", "has no manifest"])
def test_a_prebuilt_directory_that_is_none_is_told_once(lab, caplog, what):
    directory = lab.path / "shipped"
    if what != "does not exist":
        directory.mkdir()
    with caplog.at_level(logging.WARNING, "inductor_ext.jit"):
        for _ in range(3):
            assert try_load(lab.spec(), lab.settings.replace(prebuilt_dir=str(directory))) is None
    (record,) = caplog.records
    assert what in record.getMessage() and "inductor-ext build" in record.getMessage()


@pytest.mark.parametrize("where", ["", "kernels", "manifest.json"])
def test_a_prebuilt_directory_that_others_can_write_is_refused_with_one_warning(lab, shipped, where, caplog):
    directory, settings = shipped
    (directory / where).chmod(0o777)
    with caplog.at_level(logging.WARNING, "inductor_ext.jit"):
        for _ in range(3):
            assert try_load(lab.spec(), settings) is None
    told = [record.getMessage() for record in caplog.records]
    if where == "kernels":
        assert told == []  # the directory can be used, what is below is refused where it is asked for
        with pytest.raises(KernelUnavailable, match="mode 0777, wanted no write permission"):
            load(lab.spec(), settings)
    else:
        assert len(told) == 1 and "mode 0777, wanted no write permission for them" in told[0] and str(directory) in told[0]


NOT_MANIFESTS = ("gone", "[]", '{"format": 1}', '{"format": 1, "entries": {}}', "[" * 100_000, "fifo", "link")


@pytest.mark.parametrize("damage", NOT_MANIFESTS, ids=range(len(NOT_MANIFESTS)))
def test_only_what_the_manifest_lists_is_looked_at(lab, shipped, damage):
    directory, settings = shipped
    manifest = directory / "manifest.json"
    kept = manifest.read_text()
    manifest.unlink()
    if damage == "fifo":
        os.mkfifo(manifest)
    elif damage == "link":
        (lab.path / "kept.json").write_text(kept)
        manifest.symlink_to(lab.path / "kept.json")
    elif damage != "gone":
        manifest.write_text(damage)
    assert try_load(lab.spec(), settings) is None
    with pytest.raises(KernelUnavailable, match=r"manifest\.json"):
        load(lab.spec(), settings)


def test_a_record_that_was_edited_after_the_manifest_is_refused(lab, shipped):
    directory, settings = shipped
    (entry,) = KernelCache(directory, prebuilt=True).entries()
    text = (entry.path / "entry.json").read_text()
    (entry.path / "entry.json").write_text(text + " ")
    with pytest.raises(KernelUnavailable, match=r"is not what manifest\.json lists"):
        load(lab.spec(), settings)


# ---- what is deleted -------------------------------------------------------------------------------------------------------


def _tree(path):
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


def test_clear_refuses_a_folder_that_is_no_cache(lab):
    for name in ("kernels/linux-6.1", "logs", "failed", "tmp"):
        (lab.cache / name).mkdir(parents=True)
    (lab.cache / "logs/server.log").write_text("precious")
    (lab.cache / "toolchain.json").write_text("{}")
    before = _tree(lab.cache)
    with pytest.raises(SettingError, match=r"wanted a kernel cache, found .*linux-6\.1.*nothing was deleted"):
        KernelCache(lab.cache).clear()
    assert _tree(lab.cache) == before


def test_clear_deletes_what_is_ours_and_names_the_rest(lab, entry):
    slot = entry.path.parent.relative_to(lab.cache)
    foreign = ["kernels/notes.txt", f"{slot}/{'1' * 24}/thesis.tex", "logs/server.log", "a.txt"]
    for name in foreign:
        (lab.cache / name).parent.mkdir(exist_ok=True)
        (lab.cache / name).write_text("precious")
    (lab.path / "outside").mkdir()
    (lab.path / "outside/file").write_text("precious")
    (lab.cache / "failed").rmdir()
    (lab.cache / "failed").symlink_to(lab.path / "outside")
    count, left = KernelCache(lab.cache).clear()
    assert count == 1 and not entry.path.exists()
    assert all((lab.cache / name).read_text() == "precious" for name in foreign)
    assert (lab.path / "outside/file").exists()
    assert sorted(left) == ["a.txt", "failed", f"kernels/{entry.path.parent.name}", "kernels/notes.txt", "logs/server.log"]


def test_a_cache_of_an_earlier_version_is_recognised_and_marked(lab, entry):
    (lab.cache / "INDUCTOR_EXT").unlink()
    assert try_load(lab.spec(), lab.settings)["run"]() == 41
    load(lab.spec(name="other"), lab.settings)
    assert (lab.cache / "INDUCTOR_EXT").is_file()
    (lab.cache / "INDUCTOR_EXT").unlink()
    assert KernelCache(lab.cache).clear() == (2, [])


def test_a_folder_with_other_things_is_not_taken_for_a_cache(lab, caplog):
    lab.cache.mkdir()
    (lab.cache / "kernels").mkdir()
    (lab.cache / "kernels/gemm.cu").write_text("precious")
    with caplog.at_level(logging.WARNING, "inductor_ext.jit"):
        assert load(lab.spec(), lab.settings)["run"]() == 41
    (record,) = caplog.records
    assert "holds kernels" in record.getMessage() and "wanted a new folder" in record.getMessage()
    assert _tree(lab.cache) == ["kernels", "kernels/gemm.cu"]
    made = prebuild([lab.spec()], lab.cache, lab.settings)[lab.spec()]
    assert "holds kernels/gemm.cu and no file INDUCTOR_EXT" in str(made)
    assert _tree(lab.cache) == ["kernels", "kernels/gemm.cu"]


def test_an_empty_folder_that_a_umask_left_open_is_made_private(lab):
    lab.cache.mkdir()
    lab.cache.chmod(0o775)
    assert load(lab.spec(), lab.settings)["run"]() == 41
    assert lab.cache.stat().st_mode & 0o777 == 0o700 and len(KernelCache(lab.cache).entries()) == 1


def test_a_cache_that_others_can_write_is_neither_read_nor_cleared_nor_written(lab, entry, caplog):
    lab.cache.chmod(0o770)
    before = _tree(lab.cache)
    with caplog.at_level(logging.WARNING, "inductor_ext.jit"):
        assert load(lab.spec(), lab.settings)["run"]() == 41
        assert load(lab.spec(name="other"), lab.settings)["run"]() == 41
    (record,) = caplog.records
    assert "found mode 0770, wanted no write permission" in record.getMessage()
    with pytest.raises(SettingError, match="0770"):
        KernelCache(lab.cache).clear()
    assert _tree(lab.cache) == before and lab.compiles() == 3
    assert cache.PRIVATE == 0o700
