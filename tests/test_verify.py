"""verify: says nothing when nothing differs, and names the rule when something does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext.calls import aten, is_call
from inductor_ext.errors import VerifyError
from inductor_ext.graph import call
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


@pytest.mark.parametrize(("factor", "ok"), [(1.001, True), (1.02, False), (float("nan"), False), (float("inf"), False)])
def test_an_inexact_rule_may_differ_a_little(monkeypatch: pytest.MonkeyPatch, factor: float, ok: bool) -> None:
    plant(monkeypatch, _scales_by(factor), only=True)
    found = inductor_ext.verify(lambda a, b: a * b, torch.randn(8), torch.randn(8), end_to_end=False)
    (check,) = found.checks
    assert check.ok is ok and found.differs == ([] if ok else ["wrong"])
    assert not check.exact and check.differing == 8 and check.max_abs > 0
    assert check.distance == pytest.approx(factor - 1, rel=1e-3) or (check.distance == float("inf") and not ok)


def test_an_inexact_rule_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, wrong_rule(exact=False, cost="everything"), only=True)
    found = inductor_ext.verify(lambda a, b: a * b, torch.randn(8), torch.randn(8), end_to_end=False)
    assert found.differs == ["wrong"] and found.checks[0].distance > 0.1


def test_values_that_are_not_finite_count_for_an_inexact_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, _scales_by(1.001), only=True)
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
