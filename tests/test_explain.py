"""explain: every rewrite and near miss with the person's own line, without building or keeping anything."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext import jit
from tests.support.compiled import run_compiled

E4 = torch.float8_e4m3fn


def chain(x: Any, s: Any) -> Any:
    scaled = x.float() / s
    bounded = scaled.clamp(-448.0, 448.0)
    return bounded.to(E4)  # the cast


def two(x: Any, s: Any) -> Any:
    return chain(x, s), chain(torch.sin(x), s)


def inputs() -> tuple[Any, ...]:
    return (torch.randn(32, 64) * 99).bfloat16(), torch.tensor(0.5)


def test_a_rewrite_and_a_near_miss() -> None:
    report = inductor_ext.explain(two, *inputs())
    (rewrite,) = report.rewrites
    assert (rewrite.rule, rewrite.kernel) == ("fp8_downcast", "fp8_downcast")
    assert rewrite.detail == "f32 div:s0 max:-448.0 min:448.0 → torch.float8_e4m3fn"
    assert rewrite.why.startswith("its input comes from graph input")
    assert rewrite.source.startswith("test_explain.py:")
    assert rewrite.source.endswith("in chain: return bounded.to(E4)  # the cast")
    (refusal,) = report.refusals
    assert (refusal.rule, refusal.reason) == ("fp8_downcast", "Inductor fuses this chain into its producer for free")
    assert refusal.wanted.startswith("a graph input, a GEMM") and refusal.found.startswith("aten.sin.default 'sin' bfloat16")
    assert refusal.source.endswith("in chain: return bounded.to(E4)  # the cast")
    assert report.counts() == {"fp8_downcast": 1}


def test_diff_and_json_say_the_same() -> None:
    report = inductor_ext.explain(two, *inputs())
    diff = report.diff()
    assert diff.startswith("--- graph") and "\n+fp8_downcast_default = inductor_ext.fp8_downcast.default(" in diff
    assert "\n-clamp_min = aten.clamp_min.default(" in diff
    data = json.loads(report.to_json())
    assert data["counts"] == {"fp8_downcast": 1}
    (graph,) = data["graphs"]
    assert graph["rewrites"][0]["source"] == report.rewrites[0].source
    assert graph["refusals"][0]["found"] == report.refusals[0].found
    assert data == report.to_dict()


def test_it_agrees_with_a_compile() -> None:
    _, recorder = run_compiled(two, inputs())
    explained = inductor_ext.explain(two, *inputs())
    assert recorder.counts() == explained.counts()
    assert [(r.reason, r.found) for r in recorder.refusals()] == [(r.reason, r.found) for r in explained.refusals]


def test_no_kernel_is_asked_for_and_no_code_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.graph import GraphLowering

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("this must not run")

    monkeypatch.setattr(jit, "prepare", never)
    monkeypatch.setattr(GraphLowering, "run", never)
    assert inductor_ext.explain(two, *inputs()).counts() == {"fp8_downcast": 1}


@pytest.mark.parametrize("mode", ["auto", "always", "off"])
def test_modes_of_a_rule(mode: str) -> None:
    report = inductor_ext.explain(two, *inputs(), rules={"fp8_downcast": mode})
    assert report.counts() == {"auto": {"fp8_downcast": 1}, "always": {"fp8_downcast": 2}, "off": {}}[mode]
    if mode == "always":
        assert {rewrite.why for rewrite in report.rewrites} == {"forced"}


def test_after_a_compile_and_twice() -> None:
    given = inputs()
    run_compiled(two, given)
    for _ in range(2):
        assert inductor_ext.explain(two, *given).counts() == {"fp8_downcast": 1}


def test_modules_keywords_dynamic_shapes_and_options() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(64, 16, bias=False, dtype=torch.bfloat16).requires_grad_(False)

        def forward(self, x: Any, *, s: Any) -> Any:
            return chain(self.linear(x), s)

    x, s = inputs()
    report = inductor_ext.explain(Model(), x, s=s, dynamic=True, options={"max_autotune": False})
    assert report.counts() == {"fp8_downcast": 1}
    assert report.rewrites[0].why.startswith("its input comes from aten.mm.default")
    assert "# bfloat16[s" in report.graphs[0].before


def test_arguments_are_not_written_to() -> None:
    def store(k: Any, s: Any, cache: Any, at: Any) -> None:
        cache.view(-1, 2, 8)[at] = chain(k, s)

    cache = torch.zeros(4, 4, 2, 8, dtype=torch.uint8).view(E4)
    report = inductor_ext.explain(store, torch.randn(4, 2, 8).bfloat16(), torch.tensor(0.5), cache, torch.arange(4))
    assert report.counts() == {"downcast_fp8": 1}
    assert not cache.view(torch.uint8).any()


def test_training_shows_both_graphs() -> None:
    def loss(w: Any, x: Any) -> Any:
        return (torch.sin(w) * x).sum()

    w = torch.randn(8, requires_grad=True)
    report = inductor_ext.explain(loss, w, torch.randn(8))
    assert len(report.graphs) == 2 and report.counts() == {}
    assert "aten.sin.default" in report.graphs[0].before and "aten.cos.default" in report.graphs[1].before


def test_a_clamp_that_training_differentiates_is_a_near_miss() -> None:
    x = inputs()[0].requires_grad_()
    report = inductor_ext.explain(chain, x, torch.tensor(0.5))
    (refusal,) = report.refusals
    assert refusal.reason == "the scaled value has a second user" and refusal.found.startswith(("aten.ge.", "aten.gt."))


def test_errors_of_the_model_come_through() -> None:
    def broken(x: Any) -> Any:
        raise KeyError("no such layer")

    with pytest.raises(KeyError, match="no such layer"):
        inductor_ext.explain(broken, torch.randn(2))


def test_a_graph_with_a_tensor_that_the_function_makes() -> None:
    """Such a constant is a real tensor among fake ones, which cannot be copied."""

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x.exp() * torch.tensor([1.0, 2.0])

    x = torch.randn(3, 2)
    assert "= aten.mul.Tensor(exp" in inductor_ext.explain(scaled, x).graphs[0].before
    assert inductor_ext.verify(scaled, x, end_to_end=False).ok
