"""Finding the compilers, the GPU's target and the headers, and telling people about them."""

from __future__ import annotations

import json

import pytest

from inductor_ext.errors import SettingError, ToolchainError
from inductor_ext.jit import (
    KernelCache,
    build_jobs,
    current_arch,
    diagnose,
    find_toolchain,
    headers,
    include_dirs,
    parallel,
    write_clangd,
)
from inductor_ext.jit import compilers as compilers_module


def test_a_compiler_named_by_hand_is_taken_and_its_version_told(lab):
    toolchain = find_toolchain(lab.settings)
    assert toolchain.nvcc == lab.nvcc and "V99.1.1" in toolchain.nvcc_version
    assert toolchain.describe().startswith("nvcc 99.1.1 with g++ ")


def test_a_compiler_named_by_hand_that_is_not_there_is_not_replaced_by_another(lab):
    with pytest.raises(ToolchainError, match=r"INDUCTOR_EXT_NVCC=.*no-such-nvcc"):
        find_toolchain(lab.without_compiler)


def test_cuda_home_comes_before_path(lab, monkeypatch):
    (lab.path / "bin").mkdir()
    lab.nvcc.rename(lab.path / "bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(lab.path))
    assert find_toolchain(lab.settings.replace(nvcc="")).nvcc == lab.path / "bin/nvcc"


def test_without_any_nvcc_every_place_is_listed(lab, monkeypatch):
    monkeypatch.setattr(compilers_module.shutil, "which", lambda name: None)
    with pytest.raises(ToolchainError) as caught:
        find_toolchain(lab.settings.replace(nvcc=""))
    for place in ("CUDA_HOME", "CUDA_PATH", "PATH", "/usr/local/cuda", "To fix"):
        assert place in str(caught.value)


def test_a_missing_host_compiler_is_reported_as_such(lab, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ToolchainError, match=r"needs a host C\+\+ compiler.*NVCC_CCBIN.*g\+\+ on PATH.*install g\+\+"):
        find_toolchain(lab.settings)


def test_an_nvcc_that_does_not_run_is_reported_with_its_words(lab):
    lab.nvcc.write_text("#!/bin/sh\necho libfoo is missing; exit 127\n")
    with pytest.raises(ToolchainError, match="libfoo is missing"):
        find_toolchain(lab.settings)


def test_versions_are_asked_once_and_again_when_the_compiler_changes(lab):
    KernelCache(lab.cache).make_writable()
    find_toolchain(lab.settings)
    assert "V99.1.1" in (lab.cache / "toolchain.json").read_text()
    lab.fake_nvcc(version=22)
    assert "V99.1.22" in find_toolchain(lab.settings).nvcc_version


def test_a_wrapper_script_counts_with_the_compiler_that_it_starts(lab):
    wrapper = lab.path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\nexec {lab.nvcc} "$@"\n')
    wrapper.chmod(0o755)
    settings = lab.settings.replace(nvcc=str(wrapper))
    assert "V99.1.1" in find_toolchain(settings).nvcc_version
    lab.fake_nvcc(version=2)
    assert "V99.1.2" in find_toolchain(settings).nvcc_version


def test_nvcc_flags_of_the_environment_are_part_of_its_identity(lab, monkeypatch):
    before = find_toolchain(lab.settings).nvcc_version
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    assert find_toolchain(lab.settings).nvcc_version != before


def test_the_host_compilers_own_directories_do_not_include_cpath(lab, monkeypatch):
    monkeypatch.setenv("CPATH", str(lab.path))
    assert lab.path not in find_toolchain(lab.settings).system_dirs


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100a"),
        ((10, 3), "sm_103a"),
        ((12, 0), "sm_120a"),
    ],
)
def test_target_of_each_gpu(lab, monkeypatch, capability, arch):
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert current_arch(lab.settings) == arch


def test_target_without_a_gpu_and_by_hand(lab, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert current_arch(lab.settings) is None
    assert current_arch(lab.settings.replace(arch="sm_100a")) == "sm_100a"
    with pytest.raises(SettingError, match="sm_90a"):
        current_arch(lab.settings.replace(arch="hopper"))


def test_include_directories_exist_and_ours_come_first(lab):
    directories = include_dirs()
    assert directories[:2] == [lab.kernels / "include", lab.kernels]
    assert (directories[2] / "tvm/ffi/function.h").is_file()


def test_without_the_cutlass_wheel_its_directory_is_simply_absent(lab, monkeypatch):
    monkeypatch.setattr(headers, "cutlass_include", lambda: None)
    assert include_dirs() == [lab.kernels / "include", lab.kernels, *headers.tvm_ffi_includes()]


def test_depfile_with_spaces_and_continuations():
    text = "kernel.so : kernel.cu \\\n    /a/b.h \\\n    /with\\ space/c\\#d.h \\\n    /e$$f.h\n"
    assert headers.parse_depfile(text) == ["kernel.cu", "/a/b.h", "/with space/c#d.h", "/e$f.h"]


@pytest.mark.parametrize(
    ("cores", "free", "jobs"), [(8, 64 << 30, 8), (8, 7 << 30, 2), (8, 1 << 30, 1), (8, None, 8), (64, 1 << 40, 10)]
)
def test_parallel_builds_fit_cores_memory_and_work(lab, monkeypatch, cores, free, jobs):
    monkeypatch.setattr(parallel, "_cores", lambda: cores)
    monkeypatch.setattr(parallel, "_free_memory", lambda: free)
    assert build_jobs(lab.settings, 10) == jobs
    assert build_jobs(lab.settings.replace(build_jobs=3), 10) == 3


def test_doctor_reports_every_part_and_never_raises(lab, monkeypatch):
    checks = {check.name: check for check in diagnose(lab.settings)}
    assert list(checks) == [
        "nvcc",
        "host compiler",
        "tvm-ffi",
        "CUTLASS headers",
        "torch",
        "GPU",
        "cache directory",
        "free disk",
        "prebuilt directory",
        "kernel wheels",
    ]
    assert checks["nvcc"].ok and "99.1.1" in checks["nvcc"].found
    assert checks["cache directory"].ok and str(lab.cache) in checks["cache directory"].found
    broken = lab.without_compiler.replace(cache_dir=str(lab.nvcc), prebuilt_dir=str(lab.path / "nothing"))
    checks = {check.name: check for check in diagnose(broken)}
    assert checks["nvcc"].ok is None and checks["nvcc"].fix
    assert checks["cache directory"].ok is False and "INDUCTOR_EXT_CACHE_DIR" in checks["cache directory"].fix
    assert checks["prebuilt directory"].ok is False
    monkeypatch.setenv("INDUCTOR_EXT_ARCH", "hopper")
    first = diagnose()[0]
    assert first.name == "settings" and first.ok is False and "INDUCTOR_EXT_ARCH: wanted something like sm_90a" in first.found


def test_editor_settings_name_every_kernel_and_include(lab):
    written = write_clangd(lab.path, lab.settings.replace(arch="sm_100a"))
    assert [path.name for path in written] == [".clangd", "compile_commands.json"]
    (command,) = json.loads(written[1].read_text())
    assert command["file"].endswith("answer/answer.cuh")
    for argument in ("-xcuda", "--cuda-gpu-arch=sm_100a", f"-I{lab.kernels / 'include'}"):
        assert argument in command["arguments"] and argument in written[0].read_text()
