"""Every example that a rule carries: counts, graphs, bytes, refusals; on CPU tensors and on fake CUDA tensors."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext import registry
from inductor_ext.report.explain import Explanation, cloned
from inductor_ext.report.verify import Verification
from inductor_ext.rule import Example, Rule
from tests.support.compiled import run_compiled, run_copies
from tests.support.equal import assert_all_same_bytes
from tests.support.fakegpu import fake_cuda_inputs
from tests.support.golden import assert_golden, golden_torch_only

GOLDEN = Path(__file__).parent / "golden"


def _examples(kind: str) -> list[Any]:
    return [
        pytest.param(rule, example, id=f"{rule.name}-{example.name}")
        for rule in registry.rules()
        for example in getattr(rule, kind)
    ]


MATCHES, NEAR_MISSES = _examples("matches"), _examples("near_misses")
#: Inductor's own code for the rest of such a graph need not give eager's bytes: rsqrt and silu are its own.
WITH_PRODUCER = {"norm_forced", "three_users_of_one_norm"}
#: Rules that remove nodes, or give them other inputs.
NO_OP = {"quantize_once", "moe_masks", "grouped_queries", "written_columns", "residual_rows"}
#: Of ‖a - b‖ / ‖b‖ of a whole compiled graph: Inductor's code for the rest keeps fp32 where eager mode rounds to bf16.
COMPILED = 1e-2
#: Rules that share the op for every norm.
NORMS = {"rms_norm_quantize", "layer_norm_quantize"}
#: What is replaced rounds once more than the op.
ROUNDED_TWICE = {
    "fp8_rows", "fp8_rows_by_128", "bias_added_after", "halves_bias_added_after",
    "scatter_add", "onto_shared_experts", "index_add", "index_put", "any_tokens_index_add",
}  # fmt: skip


@functools.cache
def _verified(rule: Rule, example: Example) -> Verification:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return inductor_ext.verify(
        example.fn,
        *example.inputs("cpu"),
        rules=example.modes(rule.name),
        options=dict(example.options),
        dynamic=example.dynamic,
        end_to_end=False,
    )


def _explained_on_cuda(rule: Rule, example: Example) -> Explanation:
    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
        return _explained(rule, example, "cuda")


def _explained(rule: Rule, example: Example, device: str) -> Explanation:
    return inductor_ext.explain(
        example.fn,
        *example.inputs(device),
        rules=example.modes(rule.name),
        options=dict(example.options),
        dynamic=example.dynamic,
    )


@pytest.mark.parametrize(("rule", "example"), MATCHES)
def test_match_is_rewritten_as_often_as_it_says(rule: Rule, example: Example) -> None:
    found = _verified(rule, example)
    rewrites = [event for graph in found.graphs for event in graph.rewrites if event.rule == rule.name]
    assert len(rewrites) == example.count
    for event in rewrites:
        assert event.node and event.why
        assert event.source.endswith(tuple("0123456789")) or ": " in event.source, event.source
        if rule.name not in NO_OP:
            op = "scaled_mm" if rule.name in ("scaled_mm_cat", "scaled_mm_siblings") else rule.name
            known = {"causal_attention": "varlen_attention", "prefill_only": "varlen_attention"}
            known |= {"mxfp8_scaled_grouped_mm": "mxfp8_grouped_mm", "moe_scatter": "moe_combine"}
            kernel = event.kernel.removeprefix("mxfp8_quantize+")
            assert kernel == known.get(op, op) or (kernel == "norm_quantize" and rule.name in NORMS)


@pytest.mark.parametrize(("rule", "example"), MATCHES)
def test_match_gives_the_bytes_of_what_it_replaced(rule: Rule, example: Example) -> None:
    found = _verified(rule, example)
    checks = [check for check in found.checks if check.rule == rule.name]
    assert checks and all(check.elements > 0 for check in checks)
    assert found.differs == []
    assert all(check.differing == 0 for check in checks if check.exact)
    limit = 4e-3 if example.name in ROUNDED_TWICE else 1e-3
    assert all(check.distance < limit for check in checks), "on a CPU not even another rounding is to be seen"


@pytest.mark.parametrize(("rule", "example"), MATCHES)
def test_match_changes_the_graph_as_agreed(rule: Rule, example: Example) -> None:
    golden_torch_only()
    texts = []
    for report in _verified(rule, example).graphs:
        before, after = report.before.splitlines(), report.after.splitlines()
        texts.extend(list(difflib.unified_diff(before, after, n=1000, lineterm=""))[3:])
    assert_golden(GOLDEN / rule.name / f"{example.name}.txt", "\n".join(texts))


@pytest.mark.parametrize(("rule", "example"), [p for p in MATCHES if p.values[1].name not in WITH_PRODUCER])
def test_compiled_match_gives_the_result_of_eager(rule: Rule, example: Example) -> None:
    """The bytes, or for a rule that does not promise them what `verify` asks for."""
    inputs = example.inputs("cpu")
    wanted = run_copies(example.fn, inputs)
    options = dict(example.options)
    found, recorder = run_compiled(example.fn, inputs, rules=example.modes(rule.name), dynamic=example.dynamic, **options)
    if rule.drops_writes:
        outputs = len(pytree.tree_leaves(example.fn(*cloned(inputs))))
        found, wanted = found[:outputs], wanted[:outputs]
    assert recorder.counts().get(rule.name) == example.count
    if rule.exact:
        assert_all_same_bytes(found, wanted)
        return
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert float((a.double() - b.double()).norm()) <= COMPILED * float(b.double().norm())


@pytest.mark.parametrize(("rule", "example"), MATCHES)
def test_match_on_fake_cuda(rule: Rule, example: Example) -> None:
    assert _explained_on_cuda(rule, example).counts().get(rule.name) == example.count


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("rule", "example"), NEAR_MISSES)
def test_near_miss_is_refused_for_its_reason(rule: Rule, example: Example, device: str) -> None:
    if device == "cuda":
        found = _explained_on_cuda(rule, example)
    else:
        found = _explained(rule, example, "cpu")
    assert found.counts().get(rule.name, 0) == 0
    refusals = [refusal for refusal in found.refusals if refusal.rule == rule.name]
    assert example.reason in [refusal.reason for refusal in refusals]
    for refusal in refusals:
        assert refusal.node and refusal.wanted and refusal.found and refusal.source, refusal
        # An earlier rule may have made the node: it is in the graph afterwards then.
        assert any(refusal.node in graph.before + graph.after for graph in found.graphs)


def test_every_rule_has_examples_of_both_kinds() -> None:
    for rule in registry.rules():
        names = [example.name for example in (*rule.matches, *rule.near_misses)]
        assert rule.matches and rule.near_misses and len(names) == len(set(names)), rule.name


def test_no_golden_file_is_left_over() -> None:
    known = {f"{rule.name}/{example.name}.txt" for rule in registry.rules() for example in rule.matches}
    assert {path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*.txt")} <= known
