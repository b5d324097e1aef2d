"""verify: says nothing when nothing differs, and names the rule when something does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext.calls import aten, is_call, is_convert
from inductor_ext.errors import VerifyError
from inductor_ext.graph import call
from inductor_ext.report import compare
from inductor_ext.report.verify import RuleCheck, _compare
from inductor_ext.rule import Match, Rule
from tests.support.rules import plant, wrong_rule

E4 = torch.float8_e4m3fn


def chain(x: Any, s: Any) -> Any:
    return (x.float() / s).clamp(-448.0, 448.0).to(E4)


def inputs() -> tuple[Any, ...]:
    return (torch.randn(32, 64) * 99).bfloat16(), torch.tensor(0.5)


def test_nothing_differs() -> None:
    found = inductor_ext.verify(chain, *inputs())
    (check,) = found.checks
    assert (check.rule, check.rewrites, check.exact, check.differing, check.max_abs) == ("fp8_downcast", 1, True, 0, 0.0)
    assert check.elements == 32 * 64 + 32 * 64 + 1, "output and inputs"
    assert found.ok and found.differs == []
    assert found.end_to_end is not None and found.end_to_end.ours_to_eager == 0.0
    found.raise_if_different()


def test_the_rule_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, wrong_rule())

    def model(x: Any, s: Any) -> Any:
        return chain(x, s), x * 3.0

    x, s = inputs()
    x[5, 7] = 8.0
    found = inductor_ext.verify(model, x, s, end_to_end=False)
    assert found.differs == ["wrong"] and not found.ok
    checks = {check.rule: check for check in found.checks}
    assert checks["fp8_downcast"].ok and checks["fp8_downcast"].differing == 0
    assert checks["wrong"].differing > 0 and checks["wrong"].max_abs > 100 and "value 1" in checks["wrong"].where
    with pytest.raises(VerifyError, match="wrong"):
        found.raise_if_different()
    assert found.to_dict()["differs"] == ["wrong"]


def test_a_difference_in_a_mutated_argument_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, wrong_rule(), only=True)

    def model(x: Any, y: Any) -> None:
        x.copy_(x * y)

    assert inductor_ext.verify(model, torch.randn(8), torch.randn(8), end_to_end=False).differs == ["wrong"]


def _scales_by(factor: float) -> Rule:
    """An inexact rule that makes ``a * b`` ``(a * b) * factor``."""

    def replace(match: Match) -> None:
        graph, node = match.node.graph, match.node
        with graph.inserting_after(node):
            made = call(graph, aten.mul.Tensor, node, factor)
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)

    return dataclasses.replace(wrong_rule(exact=False, cost="everything"), replace=replace)


@pytest.mark.parametrize(("factor", "ok"), [(1.0003, True), (1.002, False), (float("nan"), False), (float("inf"), False)])
def test_an_inexact_rule_may_differ_a_little(monkeypatch: pytest.MonkeyPatch, factor: float, ok: bool) -> None:
    plant(monkeypatch, _scales_by(factor), only=True)
    found = inductor_ext.verify(lambda a, b: a * b, torch.randn(8), torch.randn(8), end_to_end=False)
    (check,) = found.checks
    assert check.ok is ok and found.differs == ([] if ok else ["wrong"])
    assert not check.exact and check.differing == 8 and check.max_abs > 0
    for distance in (check.distance, check.local):
        assert distance == pytest.approx(factor - 1, rel=1e-2) or (distance == float("inf") and not ok)


def test_an_inexact_rule_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, wrong_rule(exact=False, cost="everything"), only=True)
    found = inductor_ext.verify(lambda a, b: a * b, torch.randn(8), torch.randn(8), end_to_end=False)
    assert found.differs == ["wrong"] and found.checks[0].distance > 0.1


def test_values_that_are_not_finite_count_for_an_inexact_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, _scales_by(1.0003), only=True)
    special = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    assert inductor_ext.verify(lambda a, b: a * b, special, torch.ones(4), end_to_end=False).ok


def test_a_zero_of_the_wrong_sign_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(match: Match) -> None:
        match.node.target = aten.abs.default

    rule = Rule(
        name="unsigned",
        doc="neg → abs",
        anchors=lambda graph: [node for node in graph.nodes if is_call(node, aten.neg.default)],
        guard=lambda node, context: Match(node, (), "", "planted"),
        replace=replace,
    )
    plant(monkeypatch, rule, only=True)
    assert inductor_ext.verify(torch.neg, torch.zeros(4), end_to_end=False).differs == ["unsigned"]


@pytest.mark.parametrize(
    ("old", "new", "differing"),
    [
        ([1.0, float("nan")], [1.0, float("nan")], 0),
        ([1.0, float("nan")], [1.0, 2.0], 1),
        ([float("inf"), 1.0], [float("inf"), 1.0], 0),
        ([float("inf"), 1.0], [-float("inf"), 1.5], 2),
        ([0.0, -0.0], [-0.0, -0.0], 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_comparison(old: list[float], new: list[float], differing: int, dtype: torch.dtype) -> None:
    check = RuleCheck("rule", "graph", 1, exact=True)
    _compare(check, "value", torch.tensor(old).to(dtype), torch.tensor(new).to(dtype))
    assert (check.differing, check.elements, check.ok) == (differing, 2, differing == 0)


def test_comparison_of_shapes_dtypes_and_integers() -> None:
    check = RuleCheck("rule", "graph", 1, exact=True)
    _compare(check, "value 0", torch.zeros(3), torch.zeros(2))
    assert not check.ok and "[3]" in check.where and "[2]" in check.where
    check = RuleCheck("rule", "graph", 1, exact=True)
    _compare(check, "value 0", torch.tensor([1, 2**53 + 1]), torch.tensor([1, 2**53]))
    assert check.differing == 1
    _compare(check, "value 1", torch.zeros(0), torch.zeros(0))
    assert check.differing == 1


def test_a_rounding_that_is_left_out_is_seen_where_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rounding to bf16 of one operand, in front of a quantisation that hides half of it and enlarges the rest."""

    def replace(match: Match) -> None:
        match.node.replace_all_uses_with(match.node.args[0].args[0])  # type: ignore[union-attr, arg-type]
        match.node.graph.erase_node(match.node)

    rule = Rule(
        name="unrounded",
        doc="float(bfloat16(x)) → x",
        anchors=lambda graph: [
            n for n in graph.nodes if is_convert(n, torch.float32) and is_convert(n.args[0], torch.bfloat16)
        ],
        guard=lambda node, context: Match(node, (), "", "planted"),
        replace=replace,
        exact=False,
        cost="a rounding",
    )
    plant(monkeypatch, rule, only=True)
    found = inductor_ext.verify(lambda x: (x * 3.0).bfloat16().float() + 1.0, torch.randn(64, 64), end_to_end=False)
    (check,) = found.checks
    assert found.differs == ["unrounded"] and check.tolerance < check.local < 3e-3 and check.distance < 1e-2


def _shares(node: Any) -> Match:
    return Match(node, (), "", "planted")


def test_results_that_share_memory_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equal results made one: every value is right, and writing to one changes the other."""

    def replace(match: Match) -> None:
        first, second = [n for n in match.node.graph.nodes if is_call(n, aten.neg.default)]
        second.replace_all_uses_with(first)
        match.node.graph.erase_node(second)

    rule = Rule(
        name="merges",
        doc="two equal results → one",
        anchors=lambda graph: [n for n in graph.nodes if is_call(n, aten.neg.default)][:1],
        guard=lambda node, context: _shares(node),
        replace=replace,
    )
    plant(monkeypatch, rule, only=True)
    found = inductor_ext.verify(lambda x: (-x, (-x)[1:], x * 1), torch.randn(4, 8), end_to_end=False)
    (check,) = found.checks
    assert check.differing == 0 and found.differs == ["merges"]
    assert check.aliasing == "output 0 and output 1 share memory now"


def test_a_store_is_compared_as_inductor_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of the old rows that reads the buffer after the write: its value is the old one in a graph of values alone."""
    found = inductor_ext.verify(_stored_between, *_between(), end_to_end=False)
    assert found.ok

    def replace(match: Match) -> None:
        (copy,) = [n for n in match.node.graph.nodes if is_call(n, aten.copy_.default)]
        with match.node.graph.inserting_after(copy):
            late = call(match.node.graph, aten.mul.Tensor, copy.args[0], 2.0)
        match.node.replace_all_uses_with(late)
        match.node.graph.erase_node(match.node)

    rule = Rule(
        name="late",
        doc="reads a buffer after it is written",
        anchors=lambda graph: [n for n in graph.nodes if is_call(n, aten.mul.Tensor)],
        guard=lambda node, context: _shares(node),
        replace=replace,
    )
    plant(monkeypatch, rule, only=True)
    assert inductor_ext.verify(_stored_between, *_between(), end_to_end=False).differs == ["late"]


def _stored_between(cache: Any, rows: Any, at: Any) -> Any:
    old = cache * 2.0
    cache[at] = rows
    return old


def _between() -> tuple[Any, ...]:
    return torch.randn(16, 8), torch.randn(4, 8), torch.arange(4)


@pytest.mark.parametrize(
    ("one", "two", "overlap"),
    [
        (lambda x: x[:2], lambda x: x[2:], False),
        (lambda x: x[:, ::2], lambda x: x[:, 1::2], False),
        (lambda x: x[:, 2:], lambda x: x.view(torch.uint8)[:, 8:9], True),
        (lambda x: x[:, 2:], lambda x: x.view(torch.uint8)[:, 7:8], False),
        (lambda x: x.t(), lambda x: x[3, 7], True),
        (lambda x: x[:0], lambda x: x, False),
        (lambda x: x, lambda x: x.clone(), False),
    ],
)
def test_overlap_is_told_byte_by_byte(one: Any, two: Any, overlap: bool) -> None:
    x = torch.randn(4, 8)
    results = compare.Results([one(x), two(x)], [])
    assert bool(compare.shared(results)) is overlap
    assert compare.shared(compare.Results([one(x)], [two(x)])) == ({("output 0", "input 0")} if overlap else set())


@pytest.mark.parametrize("ask", [inductor_ext.explain, inductor_ext.verify])
def test_a_frozen_model_is_explained_and_verified(ask: Any) -> None:
    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.randn(16, 64))

        def forward(self, x: Any, s: Any) -> Any:
            return chain(x.float() @ self.w.t(), s)

    with torch.no_grad():
        found = ask(Linear(), *inputs(), options={"freezing": True})
    assert found.graphs and (ask is inductor_ext.explain or found.ok)


def test_the_callers_tensors_are_left_alone() -> None:
    def store(k: Any, s: Any, cache: Any, at: Any) -> None:
        cache[at] = chain(k, s)

    cache = torch.zeros(16, 2, 8, dtype=torch.uint8).view(E4)
    given = (torch.randn(4, 2, 8).bfloat16(), torch.tensor(0.5), cache, torch.arange(4))
    found = inductor_ext.verify(store, *given)
    assert found.ok and [check.rule for check in found.checks] == ["downcast_fp8"]
    assert not cache.view(torch.uint8).any()


def test_graph_breaks_keywords_and_modes() -> None:
    def model(x: Any, *, s: Any) -> Any:
        first = chain(x, s)
        torch._dynamo.graph_break()
        return first, chain(x, s + 1)

    x, s = inputs()
    found = inductor_ext.verify(model, x, s=s, dynamic=True, end_to_end=False)
    assert [check.rule for check in found.checks] == ["fp8_downcast"] * 2 and found.ok
    assert len({check.graph for check in found.checks}) == 2


def test_end_to_end_measures_the_distance_to_eager() -> None:
    def model(x: Any, s: Any, w: Any) -> Any:
        return torch.nn.functional.silu(chain(x, s).float() @ w)

    found = inductor_ext.verify(model, *inputs(), torch.randn(64, 16), rules={"fp8_downcast": "always"})
    assert found.end_to_end is not None and found.end_to_end.ok and found.end_to_end.ours_to_stock < 1e-4


def test_end_to_end_sees_what_the_rules_do(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, wrong_rule(), only=True)
    found = inductor_ext.verify(lambda a, b: a * b, torch.randn(8) + 5, torch.randn(8) + 5, options={"fx_graph_cache": False})
    assert found.end_to_end is not None and not found.end_to_end.ok and found.end_to_end.stock_to_eager == 0.0
