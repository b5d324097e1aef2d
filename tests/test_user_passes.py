"""Graphs that somebody else's pass has changed before ours sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch.fx import Graph

from inductor_ext.calls import aten, calls
from tests.support.compiled import run_compiled, run_copies
from tests.support.equal import assert_all_same_bytes


def _last(graph: Graph) -> None:
    """relu(x) becomes clamp_min(x, 0), behind all that reads it: Inductor sorts a graph after the passes."""
    for node in list(graph.nodes):
        if calls(node, aten.relu.default):
            with graph.inserting_before(graph.output_node()):
                made = graph.call_function(aten.clamp_min.default, (node.args[0], 0.0))
            made.meta.update(node.meta)
            node.replace_all_uses_with(made)
            graph.erase_node(node)


def _named(graph: Graph) -> None:
    """Every argument by its name."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            names = [argument.name for argument in node.target._schema.arguments]
            node.args, node.kwargs = (), {**dict(zip(names, node.args)), **node.kwargs}


@pytest.mark.parametrize("custom_pass", [_last, _named])
def test_rewrites_happen_behind_it(custom_pass: Callable[[Graph], None]) -> None:
    def model(x: Any, s: Any) -> Any:
        q = torch.relu(x)
        return (q.float() / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), (x[:, 1:] * 2).sum(1)

    inputs = (torch.randn(64, 256).bfloat16(), torch.tensor(0.3))
    with torch._inductor.config.patch(post_grad_custom_post_pass=custom_pass):
        found, recorder = run_compiled(model, inputs, rules={"fp8_downcast": "always"})
    assert recorder.counts() == {"fp8_downcast": 1}
    assert_all_same_bytes(found[:1], run_copies(model, inputs)[:1])
