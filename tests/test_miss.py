"""One wording for one reason: what more than one reader says is in the catalogue, `inductor_ext/miss.py`."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from inductor_ext import miss
from inductor_ext.miss import Miss, found_or_none, no_other_users

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*sorted((ROOT / "patterns").rglob("*.py")), ROOT / "inductor_ext" / "passes.py"]


def _reasons(path: Path) -> Iterator[ast.expr]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Miss":
            yield node.args[0]


def test_a_reason_that_two_readers_give_is_in_the_catalogue() -> None:
    places: dict[str, set[str]] = defaultdict(set)
    for path in SOURCES:
        for reason in _reasons(path):
            if isinstance(reason, ast.Constant):
                places[reason.value].add(path.name)
    assert len(places) > 50
    assert {reason: sorted(names) for reason, names in places.items() if len(names) > 1} == {}


def test_no_reason_says_in_other_words_what_the_catalogue_says() -> None:
    catalogue = {value for name, value in vars(miss).items() if name.isupper()}
    for path in SOURCES:
        for reason in _reasons(path):
            text = ast.unparse(reason)
            assert "second user" not in text and "for free" not in text, f"{path.name}: {text}"
            assert not (isinstance(reason, ast.Constant) and reason.value in catalogue), f"{path.name}: {text}"


def test_another_user_is_told_of() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    one = graph.call_function(torch.ops.aten.neg.default, (x,))
    two = graph.call_function(torch.ops.aten.abs.default, (x,))
    no_other_users([x], {one, two}, "a step", "two")
    with pytest.raises(Miss) as missed:
        no_other_users([x], {one}, "a step", "the negation alone")
    found = missed.value
    assert (found.reason, found.node, found.wanted) == ("a step has a second user", x, "the negation alone")
    assert "abs" in found.found and str(found) == f"a step has a second user: wanted the negation alone, found {found.found}"
    assert found.at(two).node is two and found.at(two).reason == found.reason


def test_what_misses_is_none() -> None:
    def read(node: int) -> int:
        if node < 0:
            raise Miss("negative", torch.fx.Graph().placeholder("x"), "0 or more", str(node))
        return node

    assert found_or_none(read, 3) == 3 and found_or_none(read, -3) is None
