"""README.md and docs/ against the code: options, rules, commands and links; and how long the README may be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import inductor_ext
from inductor_ext import registry, settings
from inductor_ext.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_options_table_is_that_of_the_settings() -> None:
    text = (ROOT / "docs" / "options.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| `\w+` \| `INDUCTOR_EXT_", line)]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    listed = [(*(cell.strip("`") for cell in found[:3]), found[3].replace("\\|", "|")) for found in cells]
    assert listed == settings.table()


def test_every_rule_is_listed() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "rules.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(rule.name for rule in registry.rules())


def test_commands_exist() -> None:
    names = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    templates = ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")
    for page in (README, *(path.read_text() for path in (*ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md", *templates))):
        assert set(re.findall(r"`?inductor-ext ([a-z]+)", page)) <= names


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1500


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {inductor_ext.__version__}\n" in (ROOT / "CITATION.cff").read_text()


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(page.relative_to(ROOT).as_posix() for page in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    for target in re.findall(r"`((?:report|jit)/\w+\.py|\w+\.py)`", text) if page.startswith("docs/how") else ():
        assert (ROOT / "inductor_ext" / target).exists(), target
