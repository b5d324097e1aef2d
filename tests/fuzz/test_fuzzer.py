"""The fuzzer itself: it sees planted faults, makes their programs small, and says nothing where nothing is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from inductor_ext import registry
from inductor_ext.calls import aten, is_call
from inductor_ext.rule import Match
from tests.fuzz.campaign import Campaign
from tests.fuzz.capture import prepared
from tests.fuzz.check import check
from tests.fuzz.compare import both_nan, overlap
from tests.fuzz.program import Program, loaded, pruned
from tests.fuzz.reduce import reduced
from tests.support.rules import plant, wrong_rule

X = (("x", "torch.randn(4, 64)"),)


def test_program_is_its_source() -> None:
    program = Program("p", X, ("y = F.silu(x)", "y.mul_(2)"), ("y", "x[1:]"), (("fp8_quantize", "always"),), dynamic=True)
    read = loaded(program.source())
    x = read.inputs()
    assert torch.equal(read.fn(*x)[0], torch.nn.functional.silu(x[0]) * 2)
    assert (read.rules, read.dynamic, read.backward) == ({"fp8_quantize": "always"}, True, False)


def test_statements_that_nothing_reads_go_and_stores_stay() -> None:
    program = Program("p", X, ("a = x.sin()", "b = x.cos()", "x.mul_(2)", "x[1:] = 0"), ("a",))
    assert pruned(program).lines == ("a = x.sin()", "x.mul_(2)", "x[1:] = 0")


def test_wrong_rule_is_seen_and_its_program_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, wrong_rule())
    monkeypatch.setattr(registry, "rule_named", lambda name: next(rule for rule in registry.rules() if rule.name == name))
    result = Campaign(seed=1).run(3, ["act_mul_quantize"])
    found = [each for each in result.found.values() if each.fault.rule == "wrong"]
    assert {each.fault.kind for each in found} >= {"output differs"}
    smallest = min((each.program for each in found), key=lambda program: len(program.lines))
    assert len(smallest.lines) <= 2 and " * " in smallest.source()


def test_rule_that_raises_is_a_fault_of_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    from inductor_ext.patterns import fp8_quantize

    def guard(*_: object) -> None:
        raise TypeError("planted")

    monkeypatch.setattr(fp8_quantize.dynamic_scale, "amax_above", guard)
    program = Program("p", X, ("s = x.abs().amax(-1, keepdim=True) / 448.0", "q = (x / s).clamp(-448.0, 448.0).to(E4)"), ("q",))
    with prepared():
        faults = check(program.loaded()).faults
    assert [fault.kind for fault in faults] == ["raised TypeError"]


def test_results_that_come_to_share_memory_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(match: Match) -> None:
        match.node.replace_all_uses_with(match.data)
        match.node.graph.erase_node(match.node)

    def guard(node: torch.fx.Node, _: object) -> Match | None:
        first = next(each for each in node.graph.nodes if is_call(each, aten.sin.default))
        return None if first is node else Match(node, (), "shared", "planted", first)

    rule = dataclasses.replace(
        wrong_rule("shares"),
        anchors=lambda graph: [node for node in graph.nodes if is_call(node, aten.sin.default)],
        guard=guard,
        replace=replace,
    )
    plant(monkeypatch, rule, only=True)
    monkeypatch.setattr(registry, "rule_named", lambda name: next(rule for rule in registry.rules() if rule.name == name))
    with prepared():
        faults = check(Program("p", X, ("a = x.sin()", "b = (x * 2).sin()"), ("a", "b")).loaded()).faults
    assert [(fault.kind, fault.detail) for fault in faults][-1] == ("results overlap", "output 0 and output 1")


def test_right_program_has_no_fault() -> None:
    lines = ("s = x.abs().amax(-1, keepdim=True) / 448.0", "q = (x / s).clamp(-448.0, 448.0).to(E4)")
    with prepared():
        outcome = check(Program("p", X, lines, ("q", "s")).loaded())
    assert outcome.rewrites == {"fp8_quantize": 1} and not outcome.faults and not outcome.discarded


def test_program_that_eager_refuses_is_discarded() -> None:
    with prepared():
        outcome = check(Program("p", X, ("y = x @ x",), ("y",)).loaded())
    assert outcome.discarded.startswith("eager: RuntimeError") and not outcome.faults


def test_reduced_keeps_what_fails() -> None:
    program = Program("p", X, ("a = x.sin()", "b = a.cos()", "c = b * 2", "d = c + 1"), ("a", "d"), backward=True)
    small = reduced(program, lambda each: any("b * 2" in line or "x * 2" in line for line in each.lines))
    assert small.lines == ("c = x * 2",) and small.outputs == ("c",) and not small.backward


@pytest.mark.parametrize(
    ("one", "two", "shared"),
    [
        (lambda x: x, lambda x: x, True),
        (lambda x: x[:2], lambda x: x[2:], False),
        (lambda x: x[:, ::2], lambda x: x[:, 1::2], False),
        (lambda x: x[:, ::2], lambda x: x[:, ::3], True),
        (lambda x: x.t(), lambda x: x[1], True),
        (lambda x: x, lambda x: x.clone(), False),
        (lambda x: x.view(torch.uint8)[:, 1::4], lambda x: x.view(torch.uint8)[:, ::4], False),
    ],
)
def test_overlap_is_of_elements(one: object, two: object, shared: bool) -> None:
    x = torch.randn(4, 6)
    assert overlap(one(x), two(x)) is shared  # type: ignore[operator]


def test_a_nan_in_a_cache_of_bytes_has_no_sign() -> None:
    old, new = torch.tensor([127, 255, 3, 127], dtype=torch.uint8), torch.tensor([255, 127, 3, 126], dtype=torch.uint8)
    assert both_nan(old, new).tolist() == [True, True, False, False]
    assert not both_nan(old.int(), new.int()).any()
