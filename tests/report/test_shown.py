"""Nothing that a user's code, file or compiler says is obeyed by a terminal or a browser."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from inductor_ext.moe.quantize import MoEReport
from inductor_ext.report import html, text
from inductor_ext.report.events import GraphReport, Refusal, Rewrite
from inductor_ext.report.explain import Explanation
from inductor_ext.report.shown import line, shown
from inductor_ext.report.verify import RuleCheck, Verification

# Colour, a title, a link, a bell, C1's own escape, a turned direction, a line end of Unicode, half of a pair.
EVIL = "\x1b[31m\x1b]0;title\x07\x1b]8;;http://evil\x1b\\\x9b2J\r\x08\u202e\u2028\udc80[red]x[/red]:smile:<b>"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\ud800-\udfff]")


def evil_explanation() -> Explanation:
    graph = GraphReport(
        EVIL,
        [Rewrite(EVIL, EVIL, EVIL, EVIL, EVIL, EVIL, EVIL)],
        [Refusal(EVIL, EVIL, EVIL, EVIL, EVIL, EVIL, EVIL)],
        kernels=[{"name": EVIL, "source": EVIL, "exports": [["run", EVIL]], "arch": EVIL, "flags": []}],
        before=f"a = {EVIL}",
        after=f"b = {EVIL}",
    )
    return Explanation([graph])


def on_a_terminal(renderable: object) -> str:
    """What a terminal gets, without what rich itself writes for colours."""
    file = io.StringIO()
    Console(file=file, force_terminal=True, width=300, color_system="truecolor").print(renderable)
    return re.sub("\x1b\\[[0-9;]*m", "", file.getvalue())


REPORTS = {
    "explanation": evil_explanation,
    "verification": lambda: Verification([RuleCheck(EVIL, EVIL, 1, True, 10, 2, 0.5, EVIL)], None, []),
    "diff": lambda: text.diff(f"-{EVIL}\n+{EVIL}\n@@ {EVIL}"),
}


@pytest.mark.parametrize("report", REPORTS)
def test_a_terminal_gets_no_control_character(report: str) -> None:
    seen = on_a_terminal(REPORTS[report]())
    assert not OBEYED.search(seen), sorted(set(OBEYED.findall(seen)))
    assert "\\x1b]0;title\\x07" in seen.replace("\n", "")


def test_markup_and_emoji_of_a_user_are_shown_as_they_are() -> None:
    shown_text = text.render(evil_explanation(), width=300)
    assert "[red]x[/red]:smile:<b>" in shown_text


def test_plain_text_can_be_printed_and_has_no_control_character() -> None:
    shown_text = str(evil_explanation())
    assert not OBEYED.search(shown_text)
    assert shown_text.encode()


def test_a_page_has_no_control_character_and_no_foreign_markup(tmp_path: Path) -> None:
    extra = [html.Section(EVIL, EVIL, (EVIL,), [(EVIL,)])]
    path = html.write(evil_explanation(), tmp_path / "page.html", extra)
    page = path.read_text(encoding="utf-8")
    assert not OBEYED.search(page) and "<b>\\" not in page
    assert "\\x1b[31m" in page and "[red]x[/red]:smile:&lt;b&gt;" in page


def test_names_of_weights_are_shown_too() -> None:
    assert not OBEYED.search(on_a_terminal(text.quantized_moe(MoEReport((), (), "mxfp8", EVIL))))


@given(st.text(alphabet=st.characters()))
def test_what_is_shown_is_printable_and_shows_other_text_as_it_is(value: str) -> None:
    seen = shown(value)
    assert not OBEYED.search(seen)
    seen.encode()
    assert shown(seen) == seen
    assert "\n" not in line(value) and "\t" not in line(value)
    if value.isprintable():
        assert seen == value or re.search("[\u061c\u200e\u200f\u2066-\u2069\ufeff]", value)
