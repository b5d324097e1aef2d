"""The HTML report: one file that needs nothing else, and that shows everything as text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from inductor_ext.report import html
from inductor_ext.report.events import GraphReport, Refusal, Rewrite
from inductor_ext.report.explain import Explanation
from inductor_ext.report.verify import RuleCheck, Verification

SCRIPT = "<script>alert(1)</script>"
KERNEL = {
    "name": "fp8_downcast",
    "source": "a.cuh",
    "exports": [["run", "F<float>::run"]],
    "arch": "sm_90a",
    "flags": [],
}

VOID = {"meta", "br", "link", "img", "input"}


class Balance(HTMLParser):
    """Raises when an end tag does not close what was opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())


def explanation() -> Explanation:
    graph = GraphReport(
        "graph 0",
        [Rewrite("fp8_downcast", f"convert_{i}", "m.py:3 in f", "fp8_downcast", "f32", SCRIPT) for i in range(3)],
        [Refusal("fp8_quantize", "convert_9", "m.py:4 in f", "input layout", "a dense tensor", "x [2]")],
        kernels=[KERNEL],
        before="a = input()\nb = aten.mul(a, 2)\nreturn b",
        after="a = input()\nc = inductor_ext.op(a)\nreturn c",
    )
    return Explanation([graph, GraphReport("graph 1", before="same", after="same")])


def parsed(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_is_well_formed_and_needs_nothing_else() -> None:
    page = html.page(explanation())
    tags = parsed(page).tags
    assert not tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?://|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page


def test_everything_is_escaped() -> None:
    page = html.page(explanation(), [html.Section(SCRIPT, SCRIPT, (SCRIPT,), [(SCRIPT,)])])
    assert SCRIPT not in page and page.count("&lt;script&gt;") == 5


def test_shows_counts_events_kernels_and_diff() -> None:
    page = html.page(explanation())
    assert "<b>3</b>rewrites" in page and "<b>1</b>near miss<" in page
    assert "convert_0, convert_1, convert_2" in page and "a dense tensor" in page
    assert "F&lt;float&gt;::run" in page and "sm_90a" in page
    assert '<span class="del">-b = aten.mul(a, 2)</span>' in page
    assert '<span class="add">+c = inductor_ext.op(a)</span>' in page
    assert "graph 1: unchanged" in page


def test_equal_layers_are_shown_once() -> None:
    layers = [f"mul_{number} = aten.mul.Tensor(x_{number}, {number % 10})" for number in range(28 * 10)]
    graph = GraphReport("graph 0", before="\n".join(layers), after="x = input()")
    shown = html.page(Explanation([graph]))
    assert "⋯ 27 more times, 10 lines each" in shown
    assert shown.count("aten.mul.Tensor") == 10


def test_nothing_rewritten_says_what_to_try() -> None:
    page = html.page(Explanation([GraphReport("graph 0")]))
    parsed(page)
    assert "What to try" in page and "No operator was inserted" in page


def test_verification_section() -> None:
    check = RuleCheck("fp8_quantize", "graph 0", 1, True, 10, 2, 0.5, "value 0")
    section = html.verification_section(Verification([check], None, []))
    assert section.ok is False and "fp8_quantize" in section.text
    assert 'class="bad">✗' in html.page(explanation(), [section])


def test_write_makes_the_folder(tmp_path: Path) -> None:
    path = explanation().to_html(tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
