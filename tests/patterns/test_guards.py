"""No rule makes a compiled graph one of fewer shapes: what it asks of symbolic sizes leaves no guard, unless that is meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext import passes, registry
from inductor_ext.graph import value_of
from inductor_ext.rule import Example, Rule

DYNAMIC = [
    pytest.param(rule, example, id=f"{rule.name}-{example.name}")
    for rule in registry.rules()
    for example in (*rule.matches, *rule.near_misses)
    if example.dynamic
]
#: Meant, by `graph.guarded_equal` and `graph.guarded_at_most`: as many slots as tokens, columns that a kernel takes.
MEANT = {
    ("qk_norm_rope_store", "qwen3_dynamic_shape"): 1,
    ("act_cat_quantize", "single_block_dynamic_shape"): 1,
    ("act_cat_quantize", "heads_dynamic_shape"): 1,
}
#: Left by PyTorch's own views of a fake tensor: that a size is not 0.
NOT_EMPTY = "Ne("


@pytest.mark.parametrize(("rule", "example"), DYNAMIC)
def test_a_rule_leaves_no_guard(monkeypatch: pytest.MonkeyPatch, rule: Rule, example: Example) -> None:
    made: list[str] = []
    run = passes.RewritePass.__call__

    def watched(self: Any, graph: Any, *args: Any, **kwargs: Any) -> None:
        values = (value_of(node) for node in graph.nodes)
        shapes = next(value.fake_mode.shape_env for value in values if isinstance(value, torch.Tensor))  # type: ignore[attr-defined]
        before = len(shapes.guards)
        run(self, graph, *args, **kwargs)
        made.extend(str(guard.expr) for guard in shapes.guards[before:])

    monkeypatch.setattr(passes.RewritePass, "__call__", watched)
    torch._dynamo.reset()
    inductor_ext.explain(example.fn, *example.inputs("cpu"), rules=example.modes(rule.name), dynamic=True)
    left = [each for each in made if not (each.startswith(NOT_EMPTY) and each.endswith(", 0)"))]
    assert len(left) == MEANT.get((rule.name, example.name), 0), left
