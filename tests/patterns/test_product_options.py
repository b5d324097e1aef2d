"""What an op that computes FP8 products is told besides its tensors: nothing that a CPU's bytes would show if it were wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from inductor_ext import registry
from inductor_ext.calls import arguments
from inductor_ext.graph import copy_of
from inductor_ext.patterns.support.scaled_product import is_product
from tests.support import perturbed
from tests.support.products import BF16, empty, explained, one, quantise, scale

RULES = ("scaled_mm", "scaled_mm_cat", "scaled_mm_siblings", "scaled_mm_add", "scaled_mm_act_mul", "scaled_mm_rope")


def _set(graph: torch.fx.Graph, name: str, value: Any) -> None:
    """Give every product of ``graph`` the option."""
    for node in filter(is_product, graph.nodes):
        index = [argument.name for argument in node.target._schema.arguments].index(name)
        if index < len(node.args):
            node.args = (*node.args[:index], value, *node.args[index + 1 :])
        else:
            node.kwargs = {**node.kwargs, name: value}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_the_op_accumulates_as_the_products_do_and_a_cpu_names_no_configuration(rule: str, fast: bool) -> None:
    registry.define_lowerings()
    example = registry.rule_named(rule).matches[0]
    modes = {**{other.name: "off" for other in registry.rules()}, **example.modes(rule)}
    (captured,) = perturbed.capture(example.fn, example.inputs("cpu"), dynamic=example.dynamic)
    graph = copy_of(captured.graph)
    _set(graph, "use_fast_accum", fast)
    made, counts = perturbed.rewritten(graph, modes)
    assert counts[rule] == example.count
    called = [arguments(node) for node in made.nodes if "inductor_ext.scaled_mm" in str(node.target)]
    assert called and {given["use_fast_accum"] for given in called} == {fast}
    assert {given["config"] for given in called} == {""}


def _cat(a: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
    return torch.cat([one(a, w, s, t), one(quantise(a, s), w, s, t)], -1)


def _siblings(a: Any, w: Any, s: Any, t: Any) -> Any:
    return torch.sin(one(a, w, s, t)), torch.cos(one(a, w[:32], s, t))


def _add(a: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
    return one(a, w, s, t) + torch.ones(1, 1, dtype=BF16, device="cuda").expand(a.shape[0], w.shape[0]).contiguous()


def _gated(a: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
    return torch.nn.functional.silu(one(a, w, s, t)) * one(a, w[:], s, t * 2)


#: A program for each rule, and the op that it inserts.
PRODUCTS: dict[str, tuple[Callable[..., Any], str]] = {
    "scaled_mm": (one, "scaled_mm"),
    "scaled_mm_cat": (_cat, "scaled_mm"),
    "scaled_mm_siblings": (_siblings, "scaled_mm"),
    "scaled_mm_add": (_add, "scaled_mm_add"),
    "scaled_mm_act_mul": (_gated, "scaled_mm_act_mul"),
}


@pytest.mark.parametrize("rule", list(PRODUCTS))
@pytest.mark.parametrize("made", ["a", "a_and_b", "nothing"])
def test_b_is_static_only_where_a_kernel_of_this_graph_lies_between(rule: str, made: str) -> None:
    """Its first tiles are loaded while the kernel ahead still runs, which must not be the one that writes them."""
    fn, op = PRODUCTS[rule]

    def program(x: Any, y: Any, s: Any, t: Any) -> Any:
        a = quantise(x, s) if made != "nothing" else x
        return fn(a, quantise(y, t) if made == "a_and_b" else y, s, t)

    def inputs() -> tuple[Any, ...]:
        a, b = (BF16 if name in made.split("_and_") else torch.float8_e4m3fn for name in "ab")
        return empty(32, 64, dtype=a), empty(48, 64, dtype=b), scale(), scale()

    (graph,) = explained(program, inputs, **{"quantize_once": "off", rule: "always"}).graphs
    (line,) = [line for line in graph.after.splitlines() if f"inductor_ext.{op}." in line]
    found = re.search(r"torch.bfloat16, (?:True|False), (True|False), ", line)
    assert found is not None and found[1] == str(made == "a")


@pytest.mark.parametrize("made", ["a", "nothing"])
def test_weights_of_projections_are_static_only_where_a_kernel_lies_between(made: str) -> None:
    example = registry.rule_named("scaled_mm_rope").matches[0]

    def program(x: Any, s: Any, *rest: Any) -> Any:
        return example.fn(quantise(x, s) if made == "a" else x, s, *rest)

    def inputs() -> tuple[Any, ...]:
        a, *rest = example.inputs("cuda")
        return torch.empty_like(a, dtype=BF16) if made == "a" else a, *rest

    (graph,) = explained(program, inputs, **example.modes("scaled_mm_rope")).graphs
    (line,) = [line for line in graph.after.splitlines() if "inductor_ext.scaled_mm_rope." in line]
    assert re.search(r"(True|False), (True|False), ", line.rpartition("torch.bfloat16, ")[2])[2] == str(made == "a")  # type: ignore[index]
