"""Golden text files: compared, or written with ``EXPECTTEST_ACCEPT=1``."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import pytest
import torch

#: Graphs differ between torch versions in what AOTAutograd decomposes and how nodes are called; goldens are of this one.
GOLDEN_TORCH = "2.13"


def golden_torch_only() -> None:
    found = torch.__version__
    if not found.startswith(GOLDEN_TORCH + "."):
        pytest.skip(f"golden graphs are those of torch {GOLDEN_TORCH}, found {found}")


def assert_golden(path: Path, text: str) -> None:
    text = text.rstrip() + "\n"
    if os.environ.get("EXPECTTEST_ACCEPT") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return
    assert path.exists(), f"no golden file {path.name}; accept the text with EXPECTTEST_ACCEPT=1:\n{text}"
    wanted = path.read_text()
    diff = "\n".join(difflib.unified_diff(wanted.splitlines(), text.splitlines(), "golden", "found", lineterm=""))
    assert text == wanted, f"{path.name} differs; accept the new text with EXPECTTEST_ACCEPT=1:\n{diff}"
