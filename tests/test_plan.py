"""Kernels are had once all rules have run: together, those of what is left in the graph only, and around one that fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from inductor_ext import jit, plan, registry
from inductor_ext.errors import BuildError
from inductor_ext.patterns.mxfp8_grouped_mm import _quantised
from inductor_ext.report.events import GraphReport
from inductor_ext.rule import Example, Rule
from tests.support.compiled import Recorder
from tests.support.fakegpu import fake_gpu

RULE = registry.rule_named("scaled_mm_rope")
EXAMPLE = next(example for example in RULE.matches if example.name == "llama")
EXPERTS = registry.rule_named("mxfp8_grouped_mm")


def _two_products(device: str) -> tuple[Any, ...]:
    x, wide, offs = _quantised(device, k=64, activations="mxfp8")
    return x, wide, offs, _quantised(device, k=32, activations="mxfp8")[1]


def _gated(x: Any, wide: Any, offs: Any, down: Any) -> torch.Tensor:
    gate, up = torch._grouped_mm(x, wide.transpose(-2, -1), offs).split([32, 16], -1)[0].split([16, 16], -1)
    gate, up = (torch.cat([each, each], -1) for each in (gate, up))
    return torch._grouped_mm(torch.nn.functional.silu(gate) * up, down.transpose(-2, -1), offs)


TWO_PRODUCTS = Example("gated", _gated, _two_products, mode="always", before=(("act_mul_quantize", "always"),))


#: What the fused launch replaces, forced too: tables know nothing of sizes as small as the examples'.
BESIDE: dict[str, Any] = dict.fromkeys(("scaled_mm_siblings", "qk_norm_rope"), "always")


class Builds:
    """`jit.prepare` that builds nothing, and fails for the ops in ``broken``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *broken: str) -> None:
        self.asked: list[list[str]] = []
        self.broken = broken
        monkeypatch.setattr(jit, "prepare", self.prepare)

    def prepare(self, specs: Any, settings: Any) -> dict[Any, Any]:
        self.asked.append([spec.name for spec in specs])
        return {spec: BuildError(f"no {spec.name} today") if spec.name in self.broken else object() for spec in specs}


def _compiled(rule: Rule = RULE, example: Example = EXAMPLE, **options: Any) -> tuple[str, GraphReport]:
    recorder = Recorder(arch="sm_90a", rules={**BESIDE, **example.modes(rule.name)}, **options)
    with fake_gpu() as gpu:
        source = gpu.source(example.fn, lambda: example.inputs("cuda"), backend=recorder)
    (report,) = recorder.reports
    return source, report


def test_a_chain_of_rules_asks_once_and_for_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = Builds(monkeypatch)
    _, report = _compiled(EXPERTS, TWO_PRODUCTS)
    assert report.counts() == {"mxfp8_grouped_mm": 2, "act_mul_quantize": 1}
    (asked,) = builds.asked
    assert sorted(set(asked)) == ["act_mul_quantize", "mxfp8_grouped_mm", "mxfp8_quantize"]
    assert asked.count("mxfp8_quantize") == 1, "that of the activation went into its kernel before it was built"
    assert sorted(kernel["name"] for kernel in report.kernels) == sorted(asked)


def test_the_largest_rewrite_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = Builds(monkeypatch)
    source, report = _compiled()
    assert report.counts() == {"scaled_mm_rope": 1} and builds.asked == [["scaled_mm_rope"]]
    assert "scaled_mm_rope" in source


def test_a_kernel_that_is_not_had_leaves_what_came_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = Builds(monkeypatch, "scaled_mm_rope")
    source, report = _compiled()
    assert [sorted(set(names)) for names in builds.asked] == [["scaled_mm_rope"], ["qk_norm_rope", "scaled_mm"]]
    assert report.counts() == {"scaled_mm_siblings": 1, "qk_norm_rope": 1}
    (missed,) = [refusal for refusal in report.refusals if refusal.rule == "scaled_mm_rope"]
    assert (missed.reason, missed.found) == ("kernel not available", "no scaled_mm_rope today")
    assert {kernel["name"] for kernel in report.kernels} == {"qk_norm_rope", "scaled_mm"}
    assert "scaled_mm_rope" not in source and "qk_norm_rope" in source


def test_when_nothing_is_had_the_graph_is_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    Builds(monkeypatch, "scaled_mm_rope", "scaled_mm", "qk_norm_rope")
    source, report = _compiled()
    assert report.rewrites == [] and report.kernels == [] and report.before == report.after
    assert "inductor_ext" not in source


def test_require_raises_for_a_kernel_that_only_a_chain_of_rules_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    Builds(monkeypatch, "scaled_mm_rope")
    with pytest.raises(Exception, match="no scaled_mm_rope today"):
        _compiled(build="require")


def test_a_call_that_its_op_does_not_take_is_no_error_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    op = next(op for op in registry.ops() if op.name == "fp8_downcast")

    def refuse(*_: Any) -> list[Any]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(op, "specs", refuse)
    graph = torch.fx.Graph()
    with FakeTensorMode():
        x = graph.placeholder("x")
        x.meta["val"] = torch.empty(4, 16, dtype=torch.bfloat16)
    graph.call_function(op.overload, (x, [], "mul:0.5", torch.float8_e4m3fn))
    monkeypatch.setattr(plan, "device_of", lambda args: torch.device("cuda"))
    assert plan.kernels_of(graph, "sm_90a") == [] and plan.kernels_of(graph, None) == []
