"""nvcc out of pip wheels: found where it is whole and fits, else said why; and one kernel built with nothing but the wheels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from inductor_ext import settings as settings_module
from inductor_ext.errors import ToolchainError
from inductor_ext.jit import diagnose, find_toolchain, load, wheels

VERSIONS = {name: "13.0.88" for name in wheels.PARTS} | {"nvidia-cuda-runtime": "13.0.96"}
REPOSITORY = Path(settings_module.__file__).resolve().parents[1]


@pytest.fixture
def site(lab, monkeypatch):
    """A folder of packages in which the lab's nvcc is a wheel's, and a PATH with no other nvcc."""
    site = lab.path / "site"
    root = site / "nvidia" / "cu13"
    for name, paths in wheels.PARTS.items():
        _install(site, name, VERSIONS[name])
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text("")
    shutil.copy2(lab.nvcc, root / "bin" / "nvcc")
    (site / "torch").mkdir()
    _torch(site, "13.0")
    tools = lab.path / "tools"
    tools.mkdir()
    for tool in ("g++", "cc1plus", "as", "ld", "sh", "cat"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(Path(found).resolve())
    monkeypatch.setenv("PATH", str(tools))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    wheels.installed.cache_clear()
    yield site
    wheels.installed.cache_clear()


def _install(site, name, version):
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def _torch(site, cuda):
    _install(site, "torch", "2.13.0")
    (site / "torch" / "version.py").write_text(f"from typing import Optional\ncuda: Optional[str] = {cuda!r}\nhip = None\n")


def _place(lab):
    """What is said of the wheels where they are not taken."""
    try:
        found = find_toolchain(lab.settings.replace(nvcc=""))
    except ToolchainError as error:
        return str(error)
    assert found.nvcc == Path("/usr/local/cuda/bin/nvcc"), found  # the last place, on a machine that has one
    return wheels.installed().describe()


def test_the_wheels_nvcc_is_found_and_builds(lab, site):
    settings = lab.settings.replace(nvcc="")
    assert find_toolchain(settings).nvcc == site / "nvidia/cu13/bin/nvcc"
    assert load(lab.spec(), settings)["run"]() == 41


def test_an_nvcc_on_path_comes_first(lab, site, monkeypatch):
    monkeypatch.setenv("PATH", os.pathsep.join([os.environ["PATH"], str(lab.path)]))
    assert find_toolchain(lab.settings.replace(nvcc="")).nvcc == lab.nvcc


def test_a_part_of_another_version_makes_another_compiler(lab, site):
    settings = lab.settings.replace(nvcc="")
    before = find_toolchain(settings).nvcc_version
    assert "nvidia-cuda-runtime 13.0.96" in before
    shutil.rmtree(site / "nvidia_cuda_runtime-13.0.96.dist-info")
    _install(site, "nvidia-cuda-runtime", "13.0.97")
    wheels.installed.cache_clear()
    assert find_toolchain(settings).nvcc_version != before


@pytest.mark.parametrize("part", [part for part in wheels.PARTS if part != wheels.NVCC])
def test_without_a_part_it_is_not_taken_and_the_part_is_named(lab, site, part):
    for path in wheels.PARTS[part]:
        (site / "nvidia" / "cu13" / path).unlink()
    assert f"not whole: there is no {part}" in _place(lab)


def test_parts_of_several_compilers_are_not_taken(lab, site):
    shutil.rmtree(site / "nvidia_nvvm-13.0.88.dist-info")
    _install(site, "nvidia-nvvm", "13.5.37")
    assert "of several versions: nvidia-cuda-nvcc 13.0, nvidia-nvvm 13.5, nvidia-cuda-crt 13.0" in _place(lab)


@pytest.mark.parametrize(("cuda", "fits"), [("13.2", True), (None, True), ("12.8", False)])
def test_torchs_cuda_decides(lab, site, cuda, fits):
    _torch(site, cuda)
    if fits:
        assert find_toolchain(lab.settings.replace(nvcc="")).nvcc == site / "nvidia/cu13/bin/nvcc"
    else:
        assert "for CUDA 13.0, and torch is built for CUDA 12.8" in _place(lab)


def test_the_linker_looks_in_lib_where_there_is_no_lib64(lab, site):
    settings, root = lab.settings.replace(nvcc=""), site / "nvidia" / "cu13"
    (root / "lib" / "libcudadevrt.a").write_text("")
    lab.fake_nvcc(before=f'echo "$LIBRARY_PATH" > {lab.path}/seen')
    shutil.copy2(lab.nvcc, root / "bin" / "nvcc")
    load(lab.spec(), settings)
    assert (lab.path / "seen").read_text().split(":")[0].strip() == str(root / "lib")


def test_without_any_nvcc_the_wheels_are_the_fix(lab, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    wheels.installed.cache_clear()
    nvcc = next(check for check in diagnose(lab.settings.replace(nvcc="")) if check.name == "nvcc")
    assert nvcc.ok is None and nvcc.fix.startswith("`pip install 'inductor-ext[nvcc]'`")


@pytest.mark.slow
@pytest.mark.parametrize("series", ["13.0", "13.5"])  # 13.0 looks for its libraries where the wheel has none
def test_the_real_wheels_build_a_kernel(tmp_path, series):
    """In a process that has these wheels and g++ and no other part of CUDA."""
    target = _downloaded(tmp_path / "wheels", series)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "g++").symlink_to(str(shutil.which("g++")))
    for tool in ("as", "ld", "sh", "cat", "rm"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    code = """
from inductor_ext import jit, registry, settings
from inductor_ext.jit import toolchain
chosen = settings.current(cache_dir={cache!r}, arch="sm_90a", build_jobs=1)
assert {target!r} in str(toolchain.find_toolchain(chosen).nvcc), toolchain.find_toolchain(chosen)
op = next(op for op in registry.ops() if op.name == "fp8_downcast")
spec = op.examples("sm_90a", "")[0]
made = jit.prepare([spec], chosen)[spec]
print("built" if not isinstance(made, Exception) else made)
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "INDUCTOR_EXT_"))}
    env.update(PATH=str(tools), PYTHONPATH=os.pathsep.join([str(REPOSITORY), str(target)]))
    script = code.format(cache=str(tmp_path / "cache"), target=str(target))
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert result.stdout.strip() == "built", result.stdout + result.stderr


def _downloaded(target, series):
    """The wheels that ``inductor-ext[nvcc]`` names, of one CUDA version; skips where they cannot be had."""
    if not find_spec("uv") and not shutil.which("uv"):
        pytest.skip("uv is not installed, which installs into a folder")
    uv = [sys.executable, "-m", "uv"] if find_spec("uv") else ["uv"]
    wanted = f"cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]=={series}.*"
    command = [*uv, "pip", "install", "--quiet", "--python", sys.executable, "--target", str(target), wanted]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode:
        pytest.skip(f"the wheels cannot be had: {result.stderr.strip().splitlines()[-1:]}")
    return target
