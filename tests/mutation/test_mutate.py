"""The mutation tool: what it finds, that a planted mutant is killed, that its list of equivalents names what exists."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from inductor_ext import registry
from tests.mutation import __main__ as mutate
from tests.mutation.campaign import ordered
from tests.mutation.sites import PROBE, Modules, Probe, instrument

GUARDED = '''
def limited(x, other=0):
    if x > 10:
        return None
    if other > 10:
        return None
    return x


def is_small(x: int) -> bool:
    return x < 10


def first(pairs):
    for a, b in pairs:
        if (a, b) != (1, 2):
            continue
        return a
    return None


def each(xs):
    return all(x > 0 for x in xs) or not [x for x in xs if x and x != 3]
'''


def run(mutant: str | None, call: str) -> Any:
    made = instrument(GUARDED, "planted.py")
    probe = Probe()
    probe.active = next(site.id for site in made.sites if mutant in site.id) if mutant else None
    space: dict[str, Any] = {PROBE: probe}
    exec(compile(made.tree, "planted.py", "exec"), space)
    return eval(call, space)


@pytest.mark.parametrize(
    ("mutant", "call", "original", "mutated"),
    [
        ("limited: never `x > 10`", "limited(11)", None, 11),
        ("limited: never `other > 10`", "limited(11)", None, None),
        ("is_small: always `x < 10`", "is_small(11)", False, True),
        ("is_small: never `x < 10`", "is_small(1)", True, False),
        ("first: nothing of `pairs`", "first([(1, 2)])", 1, None),
        ("first: without `a != 1`", "first([(0, 2)])", None, 0),
        ("first: without `b != 2`", "first([(1, 3)])", None, 1),
        ("each: without `all(x > 0 for x in xs)`", "each([1])", True, False),
        ("each: without `x != 3`", "each([-1, 3])", False, False),
        ("each: without `x != 3`", "each([0, 3])", True, False),
        ("each: nothing of `xs`", "each([-1])", False, True),
    ],
)  # fmt: skip
def test_a_mutant_does_what_it_says(mutant: str, call: str, original: Any, mutated: Any) -> None:
    assert run(None, call) == original
    assert run(mutant, call) == mutated


def test_ids_do_not_depend_on_lines_and_are_unique() -> None:
    moved = instrument("# one\n\n\nX = [x for x in ()] and 3\n" + GUARDED.replace("other > 10", "other  >  10"), "planted.py")
    found = instrument(GUARDED, "planted.py")
    ids = [site.id.replace("other  >  10", "other > 10") for site in moved.sites]
    assert ids == [site.id for site in found.sites] and len(set(ids)) == len(ids)


def test_words_are_no_guards() -> None:
    source = "def f(x):\n    said = x or 'nothing'\n    return said\n"
    assert not instrument(source, "a.py").sites


def test_examples_are_no_guards() -> None:
    source = "def f(x):\n    return x and 1\n\n# ---- examples ---\n\ndef g(x):\n    return x and 1\n"
    assert {site.id.split()[1] for site in instrument(source, "a.py").sites} == {"f:"}


def test_golden_graphs_come_last_and_one_of_every_test_first() -> None:
    tests = [(3.0, False, "a[x-1]"), (1.0, False, "a[x-2]"), (2.0, False, "b[x-1]"), (9.0, False, "a[y-1]")]
    tests.append((0.1, True, "c[x-1]"))
    assert ordered(tests) == ["a[x-2]", "b[x-1]", "a[y-1]", "a[x-1]", "c[x-1]"]


CAMPAIGN = """
import sys
from pathlib import Path
import pytest
from tests.mutation.campaign import Campaign, Options, State
from tests.mutation.sites import Modules, Probe

folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
probe, found = Probe(), Modules({"planted": folder / "planted.py"}, folder)
found.install(probe)
ids = [site.id for site in found.sites() if "limited" in site.id or "is_small" in site.id]
equivalents = {"planted.py is_small: never `x < 10`": "planted"}
plan = Options(found, ids, dict.fromkeys(ids, "planted"), equivalents, State(), jobs=2, budget=5.0, say=lambda line: None)
status = pytest.main(["-q", "-c", str(folder / "pytest.ini"), "--capture=sys", str(folder)], plugins=[Campaign(probe, plan)])
for name in ids:
    print(name, "->", plan.state.results[name].text())
sys.exit(status)
"""

TESTS = """
import planted

def test_limit():
    assert planted.limited(11) is None

def test_all():
    assert planted.limited(3) == 3 and not planted.is_small(99)

def test_other():
    assert planted.limited(3, 11) in (3, None)
"""


def test_a_planted_mutant_is_killed_and_an_equivalent_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(GUARDED)
    (tmp_path / "test_planted.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    made = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CAMPAIGN), str(tmp_path)],
        cwd=mutate.ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    found = [line.removeprefix("planted.py ") for line in made.stdout.splitlines() if " -> " in line]
    assert found == [
        "limited: never `x > 10` -> killed by test_planted.py::test_limit",
        "limited: never `other > 10` -> SURVIVED 1 of 1 tests that come there",
        "is_small: always `x < 10` -> killed by test_planted.py::test_all",
        "is_small: never `x < 10` -> equivalent: planted",
    ]


# ---- the project's own -----------------------------------------------------------------------------------------------


def test_every_rule_and_every_reader_has_mutants() -> None:
    sites = Modules(mutate.modules(), mutate.ROOT).sites()
    changes = mutate.inserted()
    files = {site.file for site in sites}
    elsewhere = {"rms_norm_quantize", "layer_norm_quantize"}  # whose guard is that of patterns/support/normed.py
    assert {f"patterns/{name}.py" for name in registry.RULE_MODULES if name not in elsewhere} <= files
    assert "inductor_ext/graph.py" in files
    # These remove nodes, or give them other inputs.
    without_op = {"quantize_once", "grouped_queries", "written_columns", "residual_rows"}
    assert {rule.name for rule in registry.rules()} - {change.rule for change in changes} <= without_op
    ids = [site.id for site in sites] + [change.id for change in changes]
    assert len(ids) == len(set(ids))
    unknown = set(mutate.equivalents()).difference(ids)
    assert not unknown, f"equivalent.txt names mutants that are not there (the guard's text has changed?): {sorted(unknown)}"
    assert all(len(why) > 20 for why in mutate.equivalents().values()), "a sentence says why it changes nothing"


def test_a_line_of_equivalents_without_a_reason_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "equivalent.txt").write_text("# comment\n\na.py f: never `x` -- x is never true here\n")
    assert mutate.equivalents(tmp_path / "equivalent.txt") == {"a.py f: never `x`": "x is never true here"}
    (tmp_path / "equivalent.txt").write_text("a.py f: never `x`\n")
    with pytest.raises(SystemExit, match="wanted 'ID -- why it changes nothing'"):
        mutate.equivalents(tmp_path / "equivalent.txt")
