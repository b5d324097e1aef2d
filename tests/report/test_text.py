"""Reports as plain text, against golden text (EXPECTTEST_ACCEPT=1 accepts a change)."""

from __future__ import annotations

import dataclasses

import pytest
from expecttest import TestCase

from inductor_ext.report import text
from inductor_ext.report.events import GraphReport, Refusal, Rewrite
from inductor_ext.report.explain import Explanation
from inductor_ext.report.verify import EndToEnd, RuleCheck, Verification

LINE = "model.py:7 in forward: q = (x / s).to(FP8)"


def rewrite(number: int, **changes: str) -> Rewrite:
    fields = {"kernel": "fp8_downcast", "detail": "f32 div:s0", "why": f"its input comes from mm 'mm_{number}'"}
    return Rewrite("fp8_downcast", f"convert_{number}", LINE, **{**fields, **changes})


def refusal(number: int, found: str) -> Refusal:
    return Refusal("fp8_quantize", f"convert_{number}", LINE, "input layout", "a dense tensor", found)


def ascii_of(report: object, width: int) -> str:
    """The rendered report in ASCII, which is all that expecttest can write into this file."""
    return text.render(report, width).translate(str.maketrans("│─╭╮╰╯├┤┬┴┼×", "|-+++++++++x"))


def in_layers(*paths: str, **changes: str) -> list[Rewrite]:
    made = [rewrite(number, why="opaque producer", **changes) for number in range(len(paths))]
    return [dataclasses.replace(each, module=path) for each, path in zip(made, paths)]


def test_equal_layers_share_a_row_and_others_do_not() -> None:
    events = in_layers(*(f"layers.{index}.mlp.up" for index in range(28)))
    events += in_layers("layers.3.mlp.up", detail="f32 div:s1") + in_layers("layers.4.mlp.down", "head")
    assert [(row.count, row.module) for row in text.rows(events)] == [
        (28, "layers.0–27.mlp.up"),
        (1, "layers.3.mlp.up"),
        (1, "layers.4.mlp.down"),
        (1, "head"),
    ]


@pytest.mark.parametrize(
    ("paths", "module"),
    [
        (["layers.0.a", "layers.2.a", "layers.3.a", "layers.9.a", "layers.10.a"], "layers.0, 2–3, 9–10.a"),
        (["layers.1.a", "layers.1.a"], "layers.1.a"),
        (["blocks.0.experts.1", "blocks.1.experts.0"], "blocks.*.experts.*"),
        (["blocks.0.experts.1", "blocks.0.experts.2"], "blocks.0.experts.1–2"),
        ([""], ""),
    ],
)
def test_the_modules_of_a_row(paths: list[str], module: str) -> None:
    (row,) = text.rows(in_layers(*paths))
    assert (row.count, row.module) == (len(paths), module)


def layer(index: int, steps: int = 9, scale: float = 2.0) -> list[str]:
    numbers = range(index * steps, (index + 1) * steps)
    return [f"mul_{number} = aten.mul.Tensor(x_{number}, {scale}) + {number % steps}" for number in numbers]


def test_equal_layers_of_a_graph_are_shown_once() -> None:
    before, after = ["x = input()"], ["return mul_1"]
    lines = [*before, *(line for index in range(5) for line in layer(index)), *after]
    assert text.folded(lines) == [(line, 0, 0) for line in [*before, *layer(0)]] + [("", 4, 9), (after[0], 0, 0)]
    other = [*layer(0), *layer(1), *layer(2, scale=3.0), *layer(3)]
    assert text.folded(other) == [(line, 0, 0) for line in layer(0)] + [("", 1, 9)] + [
        (line, 0, 0) for index, scale in ((2, 3.0), (3, 2.0)) for line in layer(index, scale=scale)
    ], "a constant is no node's number"
    few = [line for index in range(5) for line in layer(index, steps=3)]
    shown = text.folded(few)
    assert sum(1 + turns * period - (turns > 0) for _, turns, period in shown) == len(few), "every line is there or counted"
    assert text.folded([]) == []


class Text(TestCase):
    maxDiff = None

    def test_equal_events_share_a_row(self) -> None:
        graph = GraphReport("graph 0", [rewrite(1), rewrite(2), rewrite(30)], [refusal(4, "x_1 [2]"), refusal(5, "x_2 [3]")])
        self.assertExpectedInline(
            ascii_of(Explanation([graph]), width=100),
            """\
graph 0: rewrote fp8_downcast x3; 2 near misses
Rewrites (3)
+---+--------------+--------------------------------+--------------+-------------------------------+
| x | rule         | where                          | now          | why                           |
+---+--------------+--------------------------------+--------------+-------------------------------+
| 3 | fp8_downcast | model.py:7 in forward: q = (x  | fp8_downcast | its input comes from mm       |
|   |              | / s).to(FP8)                   | f32 div:s0   | 'mm_1'                        |
|   |              | node convert_1 +2              |              |                               |
+---+--------------+--------------------------------+--------------+-------------------------------+
Near misses (2)
+---+--------------+----------------------------------------+--------------+-----------------------+
| x | rule         | where                                  | reason       | wanted and found      |
+---+--------------+----------------------------------------+--------------+-----------------------+
| 1 | fp8_quantize | model.py:7 in forward: q = (x /        | input layout | wanted a dense tensor |
|   |              | s).to(FP8)                             |              | found  x_1 [2]        |
|   |              | node convert_4                         |              |                       |
+---+--------------+----------------------------------------+--------------+-----------------------+
| 1 | fp8_quantize | model.py:7 in forward: q = (x /        | input layout | wanted a dense tensor |
|   |              | s).to(FP8)                             |              | found  x_2 [3]        |
|   |              | node convert_5                         |              |                       |
+---+--------------+----------------------------------------+--------------+-----------------------+""",
        )

    def test_a_rule_without_a_kernel(self) -> None:
        graph = GraphReport("graph 0", [rewrite(1, kernel="", detail="shares mm_2", why="the same chain")])
        self.assertExpectedInline(
            ascii_of(Explanation([graph]), width=100),
            """\
graph 0: rewrote fp8_downcast x1; 0 near misses
Rewrites (1)
+---+--------------+--------------------------------------------+-------------+----------------+
| x | rule         | where                                      | now         | why            |
+---+--------------+--------------------------------------------+-------------+----------------+
| 1 | fp8_downcast | model.py:7 in forward: q = (x / s).to(FP8) | shares mm_2 | the same chain |
|   |              | node convert_1                             |             |                |
+---+--------------+--------------------------------------------+-------------+----------------+""",
        )

    def test_nothing_found(self) -> None:
        self.assertExpectedInline(
            ascii_of(Explanation([GraphReport("graph 0")]), width=100),
            """\
graph 0: rewrote nothing; 0 near misses
What to try:
  - no rule saw anything like its pattern: `inductor-ext rules` lists what each looks for, and
`inductor-ext rules show NAME` shows code that it matches
  - the rules look for casts to float8 in the model's own graph: quantise the model first, and run
it on the inputs that it will serve
  - print(explanation.graphs[0].before) is the graph that the rules saw""",
        )

    def test_only_near_misses(self) -> None:
        shown = text.render(Explanation([GraphReport("graph 0", [], [refusal(1, "x [2]")])]), width=100)
        self.assertIn('rules={"fp8_quantize": "always"}', " ".join(shown.split()))

    def test_no_graph(self) -> None:
        self.assertIn("no graph was compiled", text.render(Explanation([])))

    def test_verification(self) -> None:
        checks = [
            RuleCheck("quantize_once", "graph 0", 6, exact=True, elements=4096),
            RuleCheck("fp8_quantize", "graph 0", 2, True, 4096, 3, 0.5, "value 0, first at [1, 2]"),
        ]
        found = Verification(checks, EndToEnd(0.01, 0.0123456, 0.0), [])
        self.assertExpectedInline(
            ascii_of(found, width=100),
            """\
verify: fp8_quantize differs from what it replaced
Rule by rule
+---------------+---------+----------+------------+------------+----------+------------------------+
| rule          | graph   | rewrites | promise    | differing  | max diff | result                 |
+---------------+---------+----------+------------+------------+----------+------------------------+
| quantize_once | graph 0 | 6        | same bytes | 0 of 4,096 | 0        | equal                  |
+---------------+---------+----------+------------+------------+----------+------------------------+
| fp8_quantize  | graph 0 | 2        | same bytes | 3 of 4,096 | 0.5      | DIFFERS: value 0,      |
|               |         |          |            |            |          | first at [1, 2]        |
+---------------+---------+----------+------------+------------+----------+------------------------+
relative distance of the outputs: stock to eager 0.01, ours to eager 0.0123, ours to stock 0""",
        )

    def test_verification_of_nothing(self) -> None:
        self.assertIn("nothing to compare", text.render(Verification([], None, [])))

    def test_markup_in_a_source_line_is_text(self) -> None:
        shown = text.render(Explanation([GraphReport("graph 0", [rewrite(1, detail="x[red]y[/red]")])]))
        self.assertIn("x[red]y[/red]", shown)
