"""What pip is asked to install: the pins of ``./run`` exist for every Python that is supported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

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
