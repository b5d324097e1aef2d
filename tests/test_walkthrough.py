"""docs/adding-an-op-and-rule.md stays true: its files go into a copy of the checkout, and its commands run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding-an-op-and-rule.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"^(?:#|//) file: (\S+)\n")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the page's files in it and the new names in the registry."""
    copy = tmp_path_factory.mktemp("walkthrough")
    for name in ("inductor_ext", "kernels", "patterns"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for _language, text in BLOCK.findall(PAGE):
        if named := FILE.match(text):
            path = copy / named[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text[named.end() :])
    registry = copy / "inductor_ext" / "registry.py"
    code, count = re.subn(
        r"^((?:OP|RULE)_MODULES = \((?:[^)]*?)),?\s*\)", r'\1, "scaled_relu")', registry.read_text(), flags=re.M
    )
    assert count == 2
    registry.write_text(code)
    return copy


def run(checkout: Path, *command: str) -> str:
    """The output of a Python program that sees the copy and no other inductor_ext."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "TORCHINDUCTOR_CACHE_DIR": str(checkout / "cache")}
    environment["INDUCTOR_EXT_CACHE_DIR"] = str(checkout / "kernel-cache")
    done = subprocess.run([sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands() -> list[list[str]]:
    """The page's shell commands, each as a list of words after ``inductor-ext``."""
    lines = [line for language, text in BLOCK.findall(PAGE) if language == "sh" for line in text.splitlines()]
    assert all(line.startswith("inductor-ext ") for line in lines)
    return [line.split()[1:] for line in lines]


def test_every_block_is_run() -> None:
    blocks = BLOCK.findall(PAGE)
    assert [FILE.match(text)[1] for language, text in blocks if language != "sh"] == [  # type: ignore[index]
        "kernels/scaled_relu/op.py",
        "kernels/scaled_relu/scaled_relu.cuh",
        "patterns/scaled_relu.py",
        "try_it.py",
    ]
    assert [words[0] for words in commands()] == ["rules", "build"]


def test_the_rules_examples(checkout: Path) -> None:
    shown = run(checkout, "-m", "inductor_ext.cli", *commands()[0])
    assert shown.count("✓") == 7 and "✗" not in shown
    assert "inductor_ext.scaled_relu.default(" in shown


def test_the_model(checkout: Path) -> None:
    assert "scaled_relu ×1" in run(checkout, "try_it.py")


@pytest.mark.nvcc
def test_the_kernel_compiles(checkout: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    assert "2 of 2 kernels are in prebuilt" in run(checkout, "-m", "inductor_ext.cli", *commands()[1])
    assert len(list((checkout / "prebuilt").rglob("kernel.so"))) == 2
