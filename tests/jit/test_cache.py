"""What is reused, what is not, and what people can ask of the cache."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from inductor_ext.errors import BuildError, KernelUnavailable, ToolchainError
from inductor_ext.jit import BuildEvent, KernelCache, forget, headers, load, prebuild, prepare, try_load

NO_PATH = {"PATH": ""}


def test_a_second_load_in_the_process_and_in_a_new_one_compiles_nothing(lab):
    assert load(lab.spec(), lab.settings)["run"]() == 41
    assert load(lab.spec(), lab.settings)["run"]() == 41
    assert lab.output('print(load(spec, settings)["run"]())') == "41"
    assert lab.compiles() == 1


def test_warm_load_needs_no_compiler_no_path_and_no_torch(lab):
    load(lab.spec(), lab.settings)
    code = """
        from inductor_ext.jit import find_toolchain
        try: find_toolchain(settings)
        except ToolchainError as error: assert "no-such" in str(error)
        print(load(spec, settings)["run"]())
    """
    lab.nvcc.rename(lab.path / "gone")
    assert lab.output(code.replace("no-such", str(lab.nvcc)), env=NO_PATH) == "41"


def test_editing_a_header_makes_the_old_binary_unusable(lab):
    load(lab.spec(), lab.settings)
    (lab.kernels / "include/value.h").write_text("#define VALUE 50\n")
    forget()
    assert try_load(lab.spec(), lab.settings) is None
    assert load(lab.spec(), lab.settings)["run"]() == 51
    assert lab.compiles() == 2


def test_going_back_to_an_old_header_uses_the_old_binary(lab):
    header = lab.kernels / "include/value.h"
    for text in ("#define VALUE 40\n", "#define VALUE 50\n", "#define VALUE 40\n"):
        header.write_text(text)
        forget()
        value = load(lab.spec(), lab.settings)["run"]()
    assert value == 41 and lab.compiles() == 2


def test_a_header_outside_the_package_counts_too(lab):
    load(lab.spec(), lab.settings)
    stub = lab.path / "stub/tvm/ffi/function.h"
    stub.write_text(stub.read_text() + "// edited\n")
    forget()
    assert try_load(lab.spec(), lab.settings) is None


def test_a_file_that_was_not_included_does_not_count(lab):
    load(lab.spec(), lab.settings)
    (lab.kernels / "include/other.h").write_text("// new\n")
    forget()
    assert try_load(lab.spec(), lab.settings) is not None


@pytest.mark.parametrize("change", [{"arch": "sm_90"}, {"flags": ("-DX",)}, {"exports": (("run", "t::run<2>"),)}])
def test_target_flags_and_exports_are_part_of_the_identity(lab, change):
    load(lab.spec(), lab.settings)
    assert try_load(lab.spec(**change), lab.settings) is None


def test_another_compiler_version_is_not_reused_but_an_unknown_one_is(lab):
    load(lab.spec(), lab.settings)
    lab.fake_nvcc(version=2)
    forget()
    assert try_load(lab.spec(), lab.settings) is None
    assert try_load(lab.spec(), lab.without_compiler) is not None


def test_another_tvm_ffi_version_is_not_reused_and_the_reason_is_told(lab, monkeypatch):
    load(lab.spec(), lab.settings)
    forget()
    monkeypatch.setattr(headers, "package_version", lambda name: "0.0.1")
    with pytest.raises(KernelUnavailable, match=r"built with .*, here is 0\.0\.1"):
        load(lab.spec(), lab.settings.replace(build="never"))


@pytest.mark.parametrize("mode", ["never", "require"])
def test_modes_that_forbid_building_raise_only_when_it_would_be_needed(lab, mode):
    settings = lab.settings.replace(build=mode)
    with pytest.raises(KernelUnavailable, match=f'answer \\(sm_90a\\).*build="{mode}"'):
        load(lab.spec(), settings)
    load(lab.spec(), lab.settings)
    assert load(lab.spec(), settings)["run"]() == 41


def test_without_a_compiler_and_a_binary_the_error_says_where_it_looked(lab):
    with pytest.raises(ToolchainError, match=r"answer.*no-such-nvcc.*INDUCTOR_EXT_NVCC"):
        load(lab.spec(), lab.without_compiler)


def _replace(path, data):
    """As a copy, so that a binary which this process has mapped stays whole."""
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "missing", "record"])
def test_a_damaged_binary_is_built_again(lab, damage):
    load(lab.spec(), lab.settings)
    (entry,) = KernelCache(lab.cache).entries()
    data = entry.binary.read_bytes()
    if damage == "truncated":
        _replace(entry.binary, data[:100])
    elif damage == "corrupt":
        _replace(entry.binary, data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        entry.binary.unlink()
    else:
        (entry.path / "entry.json").write_text("{")
    forget()
    assert load(lab.spec(), lab.settings)["run"]() == 41
    assert lab.compiles() == 2
    (entry,) = KernelCache(lab.cache).entries()
    assert entry.damage() is None


def test_a_damaged_binary_without_a_compiler_says_so(lab):
    load(lab.spec(), lab.settings)
    (entry,) = KernelCache(lab.cache).entries()
    _replace(entry.binary, b"short")
    forget()
    with pytest.raises(KernelUnavailable, match=r"truncated \(wanted \d+ bytes, found 5\).*no nvcc"):
        load(lab.spec(), lab.without_compiler)


def test_a_prebuilt_directory_runs_without_a_compiler_and_is_not_written_to(lab):
    made = prebuild([lab.spec()], lab.path / "shipped", lab.settings)
    assert made[lab.spec()].is_file()
    shutil.rmtree(lab.path / "stub")  # a header that the other machine does not have
    before = sorted(p for p in (lab.path / "shipped").rglob("*"))
    code = f"""
        settings = settings.replace(nvcc="/nowhere/nvcc", prebuilt_dir={str(lab.path / "shipped")!r}, build="never")
        print(load(spec, settings)["run"](), Path(settings.cache_dir).exists())
    """
    assert lab.output(code, env=NO_PATH) == "41 False"
    assert sorted(p for p in (lab.path / "shipped").rglob("*")) == before


def test_a_prebuilt_directory_of_other_sources_is_refused_with_the_reason(lab):
    prebuild([lab.spec()], lab.path / "shipped", lab.settings)
    (lab.kernels / "include/value.h").write_text("#define VALUE 50\n")
    with pytest.raises(KernelUnavailable, match=r"include/value\.h changed"):
        load(lab.spec(), lab.without_compiler.replace(prebuilt_dir=str(lab.path / "shipped")))


def test_prebuild_twice_compiles_once_and_gives_failures_as_values(lab):
    bad = lab.spec(name="bad", exports=(("run", "t::nothing"),))
    prebuild([lab.spec()], lab.path / "shipped", lab.settings)
    made = prebuild([lab.spec(), bad], lab.path / "shipped", lab.settings)
    assert lab.compiles() == 2
    assert isinstance(made[bad], BuildError)
    nothing = prebuild([lab.spec(arch="sm_80")], lab.path / "shipped", lab.without_compiler)
    assert isinstance(nothing[lab.spec(arch="sm_80")], ToolchainError)


def test_prepare_builds_in_parallel_and_tells_each_step(lab):
    lab.fake_nvcc(before="sleep 1")
    good = [lab.spec(name=f"k{i}", exports=(("run", f"t::run<{i}>"),)) for i in range(4)]
    bad = lab.spec(name="bad", exports=(("run", "t::nothing"),))
    events: list[BuildEvent] = []
    started = time.perf_counter()
    results = prepare([*good, bad, good[0]], lab.settings.replace(build_jobs=5), on_progress=events.append)
    assert time.perf_counter() - started < 4.5  # one after another: 5 × 1 s and g++ five times
    assert list(results) == [*good, bad]
    assert [results[spec]["run"]() for spec in good] == [40, 41, 42, 43]
    assert isinstance(results[bad], BuildError)
    assert sorted(e.state for e in events if e.state != "building") == ["built"] * 4 + ["failed"]
    assert [e.done for e in events if e.state != "building"] == [1, 2, 3, 4, 5]
    again: list[BuildEvent] = []
    prepare(good, lab.settings, on_progress=again.append)
    assert [e.state for e in again] == ["loaded"] * 4


def test_prepare_gives_unavailable_kernels_as_values(lab):
    results = prepare([lab.spec()], lab.settings.replace(build="never"))
    assert isinstance(results[lab.spec()], KernelUnavailable)


def test_what_the_cache_tells_about_itself(lab):
    cache = KernelCache(lab.cache)
    assert cache.entries() == [] and cache.size == 0 and not lab.cache.exists()
    load(lab.spec(), lab.settings)
    (entry,) = cache.entries()
    assert (entry.name, entry.arch, entry.spec) == ("answer", "sm_90a", lab.spec())
    assert entry.bytes == entry.binary.stat().st_size and entry.age < 60
    assert cache.path(entry.key) == entry.path and cache.size > entry.bytes
    with pytest.raises(KeyError):
        cache.path("nothing")
    assert cache.clear() == (1, []) and cache.entries() == []


def test_leftovers_of_killed_builds_go_after_two_days_and_nothing_else_does(lab):
    cache, day = KernelCache(lab.cache), 24 * 3600
    cache.make_writable()
    for name, age in (("old", 3 * day), ("young", day)):
        with cache.staging(lab.spec(name=name)) as stage:
            stage = stage.rename(stage.parent / name)  # as if the process had died
        os.utime(stage, (time.time() - age,) * 2)
    (lab.cache / "tmp/somebodys").mkdir()
    os.utime(lab.cache / "tmp/somebodys", (0, 0))
    load(lab.spec(), lab.settings)
    assert sorted(p.name for p in (lab.cache / "tmp").iterdir()) == ["somebodys", "young"]
