"""moe_combine and moe_masks on Hugging Face's experts, their choice by device, and what Inductor writes around them."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext import registry
from inductor_ext.patterns import moe_combine as rule
from tests.support.compiled import run_compiled
from tests.support.fakegpu import fake_cuda_inputs, fake_gpu
from tests.support.moe import qwen3_moe, tokens

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 32, 4, rule.LEAST_TOP_K


def experts(parallel: bool, device: str = "cpu") -> tuple[Any, tuple[torch.Tensor, ...]]:
    """transformers' forward of experts with their weights as arguments, and inputs; ``parallel``: some ids are not here."""
    moe = pytest.importorskip("transformers.integrations.moe")
    if not hasattr(moe, "grouped_mm_experts_forward"):
        pytest.skip("this transformers has no grouped_mm experts")

    def forward(x: Any, ids: Any, weights: Any, gate_up: Any, down: Any) -> torch.Tensor:
        module = SimpleNamespace(
            num_experts=EXPERTS, has_gate=True, has_bias=False, has_post_expert_norm=False, is_transposed=False,
            _is_expert_parallel=parallel, gate_up_proj=gate_up, down_proj=down,
            _apply_gate=lambda both: (lambda gate, up: torch.nn.functional.silu(gate) * up)(*both.chunk(2, -1)),
        )  # fmt: skip
        return moe.grouped_mm_experts_forward(module, x, ids, weights)

    ids = torch.randint(0, EXPERTS + parallel, (10, TOP_K), device=device)
    shapes = (10, HIDDEN), (EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)
    x, gate_up, down = (torch.randn(shape, device=device).bfloat16() for shape in shapes)
    return forward, (x, ids, torch.rand(10, TOP_K, device=device).bfloat16(), gate_up, down)


@pytest.mark.parametrize("parallel", [False, True])
def test_transformers_experts(parallel: bool) -> None:
    """On a CPU both rules need no asking. Of the three masks one goes into the kernel; no masked row reaches the result."""
    forward, inputs = experts(parallel)
    wanted = forward(*inputs)
    found, recorder = run_compiled(forward, inputs)
    assert recorder.counts() == ({"moe_combine": 1, "moe_masks": 2} if parallel else {"moe_combine": 1})
    assert "where" not in recorder.reports[0].after
    assert float((found[0].double() - wanted.double()).norm() / wanted.double().norm()) < 1e-2


def test_a_whole_model() -> None:
    model = qwen3_moe()
    rules = {"moe_combine": "always"}  # two experts a token
    found = inductor_ext.explain(lambda ids: model(ids, use_cache=False).logits, tokens(), rules=rules)
    assert found.counts()["moe_combine"] == 2
    assert "aten.index_put" in found.graphs[0].after, "the inverse is kept"


def _on_cuda(mode: str) -> Any:
    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
        forward, inputs = experts(True, "cuda")
        return inductor_ext.explain(forward, *inputs, rules={"moe_combine": mode})


def test_a_gpu_waits_until_the_kernel_has_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "HAS_RUN", frozenset({"sm_100a"}))
    found = _on_cuda("auto")
    (refusal,) = [each for each in found.refusals if each.rule == "moe_combine"]
    assert refusal.reason == "the kernel has not been run on this GPU yet"
    assert (refusal.wanted, refusal.found) == ("one of sm_100a", "sm_90a")
    assert found.counts() == {"moe_masks": 2}, "what needs no kernel is done; the mask that the sum reads stays"
    assert _on_cuda("always").counts() == {"moe_combine": 1, "moe_masks": 2}
    monkeypatch.setattr(rule, "HAS_RUN", frozenset({"sm_90a"}))
    assert _on_cuda("auto").counts() == {"moe_combine": 1, "moe_masks": 2}


def test_the_result_is_a_planned_buffer() -> None:
    example = next(each for each in registry.rule_named("moe_combine").matches if each.name == "transformers")
    with fake_gpu() as gpu:
        backend = inductor_ext.backend(build="defer", rules={"moe_combine": "always"})
        source = gpu.source(example.fn, lambda: example.inputs("cuda"), backend=backend)
    (call,) = [line.strip() for line in source.splitlines() if "extern_kernels.inductor_ext_moe_combine(" in line]
    assert re.search(r", 4, torch.bfloat16, out=buf\d+\)$", call)
    out = re.search(r"out=(buf\d+)", call)
    assert out and re.search(rf"{out.group(1)} = empty_strided_cuda\(\(6, 64\), \(64, 1\), torch.bfloat16\)", source)
