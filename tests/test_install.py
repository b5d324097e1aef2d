"""What pip is asked to install: pins that exist for every Python that is supported, and an image that only serves."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def _uv() -> list[str]:
    """pip cannot be asked this: it evaluates the markers of a pin with the Python that it runs on."""
    if find_spec("uv"):
        return [sys.executable, "-m", "uv"]
    if found := shutil.which("uv"):
        return [found]
    pytest.skip("uv is not installed, which resolves for another Python")


@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_resolves_on(python: str) -> None:
    command = [*_uv(), "pip", "compile", "--quiet", "--python-version", python, "--constraint", "constraints.txt"]
    command += ["--all-extras", "pyproject.toml"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ)
    if result.returncode and "No solution found" not in result.stderr:  # that is uv's answer; anything else is the way to it
        pytest.skip(f"no package index can be asked: {result.stderr.strip().splitlines()[-1:]}")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^torch==", result.stdout, re.MULTILINE)


def test_run_says_what_test_torch_wants() -> None:
    result = subprocess.run([ROOT / "run", "test-torch"], capture_output=True, text=True)
    assert result.returncode and "test-torch wants a version of torch" in result.stderr


# ---- a serving image -------------------------------------------------------------------------------------------------

SERVE = re.search(r"^pip install (torch .*)$", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
COMPILES = """
import torch, inductor_ext
E4 = torch.float8_e4m3fn
def model(x, w, s):
    sx = x.abs().amax().float().clamp(min=1e-12) / 448
    q = (x.float() / sx).clamp(-448, 448).to(E4)
    return torch._scaled_mm(q, w.t(), scale_a=sx, scale_b=s, out_dtype=x.dtype)
args = torch.ones(64, 256).bfloat16(), torch.ones(512, 256).to(E4), torch.tensor(0.1)
backend = inductor_ext.backend(rules={"fp8_quantize": "always"}, strict=True)
assert torch.equal(torch.compile(model, backend=backend)(*args), model(*args))
print("compiled")
"""


def _closure(names: list[str]) -> set[str]:
    """Distributions that pip installs for these."""
    found: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in found:
            continue
        found.add(name)
        needed = map(Requirement, metadata.distribution(name).requires or ())
        names += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that holds what docs/install.md installs for serving, as links, and nothing else."""
    assert SERVE is not None
    folder = tmp_path_factory.mktemp("image")
    for name in _closure(SERVE[1].split()):
        found = metadata.distribution(name)
        for top in {Path(str(file)).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(found.locate_file(top)))
    return folder


def _python(image: Path, *arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, without the site-packages of this one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("INDUCTOR_EXT_", "CUDA_", "PYTHON"))}
    env |= {"PATH": path, "PYTHONPATH": os.pathsep.join([str(ROOT), str(image)])}
    return subprocess.run([sys.executable, "-S", *arguments], env=env, capture_output=True, text=True, timeout=300)


def test_a_serving_image_is_the_dependencies_without_cutlass() -> None:
    assert SERVE is not None
    needed = {canonicalize_name(Requirement(each).name) for each in metadata.requires("inductor-ext") or () if ";" not in each}
    assert {canonicalize_name(name) for name in SERVE[1].split()} == needed - {"nvidia-cutlass"}


def test_a_serving_image_compiles_models(image: Path) -> None:
    absent = "from importlib.metadata import *\nassert not list(distributions(name='nvidia-cutlass'))\nprint('absent')\n"
    result = _python(image, "-c", absent + COMPILES, path=os.environ["PATH"])
    assert result.stdout.split() == ["absent", "compiled"], result.stderr


def test_doctor_says_that_a_serving_image_only_loads(image: Path) -> None:
    result = _python(image, "-m", "inductor_ext.cli", "doctor", "--json", path="")
    found = json.loads(result.stdout)
    checks = {check["name"]: check for check in found["checks"]}
    if checks["nvcc"]["ok"] is None:  # /usr/local/cuda is looked at whatever PATH says
        assert "only loads kernels: it has no nvcc, no host compiler" in found["summary"]
    assert checks["CUTLASS headers"]["ok"] is None and "only building needs" in checks["CUTLASS headers"]["found"]


# ---- what is published -----------------------------------------------------------------------------------------------


def test_a_source_distribution_holds_tests_and_docs(tmp_path: Path) -> None:
    version = metadata.version("setuptools") if find_spec("setuptools") else "0"
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"setuptools 77 is not installed, which pyproject.toml asks for (found {version})")
    wanted = [line.split()[1:] for line in (ROOT / "MANIFEST.in").read_text().splitlines() if not line.startswith("global")]
    left_out = shutil.ignore_patterns("__pycache__", ".*cache", ".venv*", ".git", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=left_out)
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / "source", check=True, capture_output=True, timeout=300)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
        links = [member.name for member in file.getmembers() if member.issym() or member.islnk()]
    for each in (name for names_of in wanted for name in names_of):
        assert each in names, each
    assert {"tests/test_install.py", "docs/install.md", "inductor_ext/kernels/scaled_mm/op.py"} <= names and not links


def test_the_summary_promises_no_more_than_every_rule_keeps() -> None:
    summary = re.search(r'^description = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert summary is not None and "exact" not in summary[1]  # docs/rules.md says it of each rule
