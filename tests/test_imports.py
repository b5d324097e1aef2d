"""Data moves forward only: no two files import each other, the core names no kernel and no pattern, kernels no pattern."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _files() -> dict[str, Path]:
    """Every file by its module's name. In a checkout ``inductor_ext/kernels`` and ``inductor_ext/patterns`` are links."""
    found = {}
    for folder, prefix in (("inductor_ext", ()), ("kernels", ("inductor_ext",)), ("patterns", ("inductor_ext",))):
        for path in (ROOT / folder).rglob("*.py"):
            parts = (*prefix, *path.relative_to(ROOT).with_suffix("").parts)
            if prefix or parts[1] not in ("kernels", "patterns"):
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


FILES = _files()
#: What reports are made of imports what makes them: the one knot that is left.
KNOT = ("inductor_ext", "inductor_ext.cli.", "inductor_ext.moe", "inductor_ext.report.")


def imports(path: Path) -> set[str]:
    """The files that a file imports, wherever it does: at its top, in a function, for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{each.name}" for each in node.names]
            found |= {each if each in FILES else node.module for each in whole}
    return found & FILES.keys()


GRAPH = {name: imports(path) - {name} for name, path in FILES.items()}


def reachable(name: str) -> set[str]:
    found, left = set(), [name]
    while left:
        for each in GRAPH[left.pop()] - found:
            found.add(each)
            left.append(each)
    return found


def test_no_two_files_import_each_other() -> None:
    circular = {name for name in FILES if name in reachable(name)}
    assert {name for name in circular if name != KNOT[0] and not name.startswith(KNOT[1:])} == set()


@pytest.mark.parametrize(
    ("room", "others"),
    [
        ("inductor_ext.kernels.", ("inductor_ext.patterns.",)),
        ("inductor_ext.", ("inductor_ext.kernels.", "inductor_ext.patterns.")),
    ],
)
def test_rooms_import_one_way(room: str, others: tuple[str, ...]) -> None:
    inside = [name for name in FILES if name.startswith(room) and not name.startswith(("inductor_ext.patterns.", *others))]
    found = {name: {each for each in GRAPH[name] if each.startswith(others)} for name in inside}
    assert {name: each for name, each in found.items() if each} == {}
