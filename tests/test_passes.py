"""The pass: order of rules, its uuid, what it reports, and PyTorch's bisector naming a rule that is wrong."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensorMode

import inductor_ext
from inductor_ext import graph as graphs
from inductor_ext import registry
from inductor_ext.passes import RewritePass
from inductor_ext.rule import Example, Match, Rule
from inductor_ext.settings import Settings
from tests.support.compiled import Recorder, run_compiled
from tests.support.equal import assert_all_same_bytes
from tests.support.fakegpu import load_guard
from tests.support.rules import plant, wrong_rule

E4 = torch.float8_e4m3fn


def chain(x: Any, s: Any) -> Any:
    return (x.float() / s).clamp(-448.0, 448.0).to(E4)


def inputs() -> tuple[Any, ...]:
    return (torch.randn(32, 64) * 99).bfloat16(), torch.tensor(0.5)


class Named(CustomGraphPass):
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, graph: torch.fx.Graph) -> None:
        pass

    def uuid(self) -> Any:
        return self.name.encode()


# ---- uuid --------------------------------------------------------------------------------------------------------------


def _uuid(previous: Any = None, **options: Any) -> Any:
    return RewritePass(Settings().replace(**options), previous).uuid()


def test_uuid_is_the_same_for_the_same_settings() -> None:
    assert _uuid(rules={"a": "off", "b": "auto"}) == _uuid(rules={"b": "auto", "a": "off"})


def test_uuid_tells_settings_and_wrapped_passes_apart() -> None:
    found = [
        _uuid(),
        _uuid(rules={"fp8_downcast": "off"}),
        _uuid(rules={"fp8_downcast": "always"}),
        _uuid(build="never"),
        _uuid(arch="sm_100a"),
        _uuid(Named("one")),
        _uuid(Named("two")),
        _uuid([Named("one"), Named("two")]),
        _uuid([Named("two"), Named("one")]),
    ]
    assert None not in found and len(set(map(repr, found))) == len(found)


def test_uuid_of_a_bare_function_is_none() -> None:
    assert _uuid(lambda graph: None) is None
    assert _uuid([Named("one"), lambda graph: None]) is None


@pytest.mark.parametrize("changed", ["passes.py", "patterns/support/fp8_chain.py", "kernels/fp8_downcast/fp8_downcast.cuh"])
def test_uuid_changes_with_every_source(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "inductor_ext"
    shutil.copytree(Path(registry.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(registry, "_HERE", copy)
    if not (copy / changed).exists():
        pytest.skip(f"{changed} is not there")
    before = registry.source_digest.__wrapped__()
    assert before == registry.source_digest.__wrapped__()
    (copy / changed).write_text((copy / changed).read_text() + "\n")
    assert registry.source_digest.__wrapped__() != before
    (copy / changed).write_text((copy / changed).read_text()[:-1])
    assert registry.source_digest.__wrapped__() == before


def test_uuid_changes_with_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "inductor_ext"
    shutil.copytree(Path(registry.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(registry, "_HERE", copy)
    before = registry.source_digest.__wrapped__()
    (copy / "patterns" / "extra.py").write_text("")
    assert registry.source_digest.__wrapped__() != before


# ---- running rules ------------------------------------------------------------------------------------------------------


def test_rules_run_in_the_order_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def looking(name: str) -> Rule:
        def guard(node: Any, context: Any) -> None:
            order.append(context.rule)

        return Rule(name, "", lambda graph: list(graph.nodes)[:1], guard, lambda match: None)

    plant(monkeypatch, looking("second_in_the_alphabet"), looking("first_in_the_alphabet"), only=True)
    inductor_ext.explain(chain, *inputs())
    assert list(dict.fromkeys(order)) == ["second_in_the_alphabet", "first_in_the_alphabet"]


def test_a_rule_of_a_person_is_run_reported_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, wrong_rule("mine"), only=True)
    report = inductor_ext.explain(lambda a, b: a * b, *inputs())
    (event,) = report.rewrites
    assert (event.rule, event.detail, event.why, event.kernel) == ("mine", "mul → add", "planted", "")
    assert "aten.add.Tensor" in report.diff()
    assert inductor_ext.explain(lambda a, b: a * b, *inputs(), rules={"mine": "off"}).counts() == {}


def test_reports_say_before_and_after() -> None:
    _, recorder = run_compiled(chain, (torch.randn(37, 5).bfloat16(), torch.tensor(0.5)))  # compiled by no other test
    (report,) = recorder.reports
    assert "aten.clamp_min.default" in report.before and "aten.clamp_min" not in report.after
    assert "inductor_ext.fp8_downcast.default(arg" in report.after and report.seconds > 0
    assert report.summary().endswith("rewrote fp8_downcast ×1; 0 near misses")
    assert type(report).from_dict(report.to_dict()) == report


def test_an_anchor_that_went_with_another_rewrite_is_not_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(graph: torch.fx.Graph) -> list[Any]:
        return [node for node in graph.nodes if "aten.mul" in str(node.target)]

    def replace(match: Match) -> None:
        while match.node.next.op == "call_function":
            following = match.node.next
            following.replace_all_uses_with(match.node)
            match.node.graph.erase_node(following)

    rule = Rule("greedy", "", both, lambda node, context: Match(node, (), "", "planted"), replace)
    plant(monkeypatch, rule, only=True)
    assert inductor_ext.explain(lambda a: (a * 2.0) * 3.0, torch.randn(8)).counts() == {"greedy": 1}


def test_devices_without_a_kernel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    load_guard()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with FakeTensorMode(), torch._inductor.config.patch(joint_graph_constant_folding=False):
        x, s = torch.empty(32, 64, dtype=torch.bfloat16, device="cuda"), torch.empty((), device="cuda")
        report = inductor_ext.explain(chain, x, s)
    (refusal,) = report.refusals
    assert (refusal.reason, refusal.wanted, refusal.found) == ("device", "compute capability 8.9 or later", "8.0")


def test_the_bisector_names_a_planted_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.compiler_bisector import CompilerBisector

    plant(monkeypatch, wrong_rule())
    a, b = torch.randn(16, 16), torch.randn(16, 16)

    def good() -> bool:
        torch._dynamo.reset()
        with torch._inductor.config.patch(fx_graph_cache=False):
            found = torch.compile(lambda a, b: torch.sin(a * b), backend=Recorder())(a, b)
        return torch.allclose(found, torch.sin(a * b), atol=1e-4)

    tests = torch._inductor.config.test_configs
    if not hasattr(tests, "bisect_keep_custom_backend_for_inductor"):
        pytest.skip("this torch's bisector cannot keep a backend that is not its own")
    assert not good()
    with torch._inductor.config.patch({"test_configs.bisect_keep_custom_backend_for_inductor": True}):
        result = CompilerBisector.do_bisect(good)
    assert result is not None and result.subsystem == "post_grad_passes"
    assert "inductor_ext.wrong" in (result.debug_info or ""), result


# ---- the registry -------------------------------------------------------------------------------------------------------


def test_rules_and_ops_have_names_and_words() -> None:
    for thing in (*registry.rules(), *registry.ops()):
        assert thing.name.isidentifier() and thing.doc, thing
    assert len({rule.name for rule in registry.rules()}) == len(registry.rules())
    for rule in registry.rules():
        assert rule.exact or rule.cost, f"{rule.name}: what does it cost?"
        assert all(isinstance(example, Example) and bool(example.reason) for example in rule.near_misses)


def test_importing_two_threads_at_once_is_safe() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        assert len(set(map(id, pool.map(lambda _: registry.ops(), range(16))))) == 1


# ---- a rule with an error ----------------------------------------------------------------------------------------------


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As for a user; and without caches, which do not know of a planted rule."""
    monkeypatch.setattr("inductor_ext.passes.RAISE", False)
    with torch._inductor.config.patch(fx_graph_cache=False):
        yield


def _raise(*_: Any) -> Any:
    raise ValueError("planted")


def _half(match: Match) -> None:
    """Makes a multiplication an addition, of others, and fails."""
    match.node.target, match.node.args = torch.ops.aten.add.Tensor, (match.node.args[0],) * 2
    raise ValueError("planted")


def _unsound(match: Match) -> None:
    """A node that is used before it is made."""
    match.node.append(next(iter(match.node.all_input_nodes)))


def both(x: Any, s: Any) -> Any:
    return chain(x.sin() @ x.t(), s), (x.float() * s).cos() * s


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"guard": _raise}, "ValueError: planted"),
        ({"replace": _raise}, "ValueError: planted"),
        ({"replace": _half}, "ValueError: planted"),
        ({"replace": _unsound}, "RuntimeError: "),
    ],
    ids=["guard", "replace", "half replaced", "a graph that is none"],
)
@pytest.mark.parametrize("first", [False, True], ids=["after ours", "before ours"])
def test_a_rule_that_fails_costs_that_rule_alone(
    changes: dict[str, Any], found: str, first: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = dataclasses.replace(wrong_rule(), **changes)
    rules = registry.rules()
    monkeypatch.setattr(registry, "rules", lambda: (wrong, *rules) if first else (*rules, wrong))
    made = inputs()
    results, recorder = run_compiled(both, made)
    monkeypatch.setattr(registry, "rules", lambda: rules)
    wanted, plain = run_compiled(both, made)
    assert_all_same_bytes(results, wanted)
    assert recorder.counts() == plain.counts() == {"fp8_downcast": 1}
    (report,) = recorder.reports
    refused = [each for each in report.refusals if each.rule == "wrong"]
    assert refused and {each.reason for each in refused} == {"the rule failed"} and refused[0].found.startswith(found)
    assert report.after == plain.reports[0].after
    said = [record.getMessage() for record in caplog.records if "the rule wrong failed" in record.getMessage()]
    assert len(said) == 1 and found in said[0]


@pytest.mark.usefixtures("lenient")
def test_anchors_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, dataclasses.replace(wrong_rule(), anchors=_raise))
    _, recorder = run_compiled(chain, inputs())
    assert recorder.counts() == {"fp8_downcast": 1}


def test_a_snapshot_brings_back_every_node() -> None:
    gm = torch.fx.symbolic_trace(lambda a, b: (a + b, [b * 2, a]))
    for node in gm.graph.nodes:
        node.meta["number"] = node.name
    before = str(gm.graph)
    restore = graphs.snapshot(gm.graph)
    for node in list(gm.graph.nodes):
        if node.op == "call_function":
            node.target = torch.sub
            with gm.graph.inserting_after(node):
                gm.graph.call_function(torch.neg, (node,))
    for _ in range(2):
        restore()
        assert str(gm.graph) == before
        assert all(node.meta["number"] == node.name for node in gm.graph.nodes)
    gm.recompile()
    found = gm(torch.tensor(1.0), torch.tensor(2.0))
    assert found == (torch.tensor(3.0), [torch.tensor(4.0), torch.tensor(1.0)])
