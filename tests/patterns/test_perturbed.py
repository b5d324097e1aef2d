"""Each match of every rule with one node changed: another argument, another dtype, another reader.

The rule then refuses, or what it makes of the changed graph gives what that gives.

That is how a reader is found that takes a node without one of its arguments: ``alpha`` of an addition, ``dtype`` of a mean, a
convert to int8 where it knows one to bfloat16.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

from inductor_ext import registry
from inductor_ext.rule import Rule
from tests.support import perturbed

#: Every so many changes of an example are made, others of the next example. All of them, with INDUCTOR_EXT_EVERY=1, take eight
#: minutes; rules with long graphs have examples enough.
_EVERY = int(os.environ.get("INDUCTOR_EXT_EVERY", "4"))
#: Of ‖a - b‖ / ‖b‖, besides what the unchanged example has: one bf16 rounding too many or too few of all elements is 2e-3.
_LIMIT = 1e-3
#: Dtypes in which a rounding may cost a whole step.
_WHOLE = ("torch.int", "torch.uint", "torch.bool")
#: Sums of such numbers depend on the order in which they underflow.
_TINY = 1e-30


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Half of the changes are no graphs, and PyTorch logs why for each."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _examples() -> list[Any]:
    pairs = [(rule, index, example) for rule in registry.rules() for index, example in enumerate(rule.matches)]
    return [pytest.param(rule, index, id=f"{rule.name}-{example.name}") for rule, index, example in pairs]


@pytest.mark.parametrize(("rule", "index"), _examples())
def test_changed_match_is_refused_or_gives_what_the_graph_gives(rule: Rule, index: int) -> None:
    example = rule.matches[index]
    registry.define_lowerings()
    options = dict(example.options)
    modes = {**{other.name: "off" for other in registry.rules()}, **example.modes(rule.name)}
    for captured in perturbed.capture(example.fn, example.inputs("cpu"), dynamic=example.dynamic, **options):
        known = _known(captured, modes, options)
        for change in list(perturbed.changes(captured.graph))[index % _EVERY :: _EVERY]:
            graph = perturbed.changed(captured, change)
            if graph is None:
                continue
            made, counts = perturbed.rewritten(graph, modes, **options)
            wanted = perturbed.run(graph, captured.inputs) if counts else None
            if wanted is None:  # refused, or eager raises
                continue
            found = perturbed.run(made, captured.inputs)
            assert found is not None, f"{change}: raises, which the graph does not"
            _compare(rule, str(change), found, wanted, known, captured.tensors)


def _known(captured: perturbed.Captured, modes: dict[str, Any], options: dict[str, Any]) -> float:
    """How far the unchanged graph and what the rules make of it are apart."""
    made, _ = perturbed.rewritten(captured.graph, modes, **options)
    wanted, found = perturbed.run(captured.graph, captured.inputs), perturbed.run(made, captured.inputs)
    assert wanted is not None and found is not None
    outputs = len(pytree.tree_leaves(captured.graph.output_node().args[0]))
    return max((perturbed.distance(b, a)[1] for a, b in zip(wanted[:outputs], found)), default=0.0)


def _compare(rule: Rule, change: str, found: list[torch.Tensor], wanted: list[torch.Tensor], known: float, inputs: int) -> None:
    written = [] if rule.drops_writes else list(zip(found, wanted))[-inputs:]
    outputs = list(zip(found, wanted))[: len(found) - inputs]
    for index, (a, b) in enumerate([*outputs, *written]):
        if b.is_floating_point() and b.numel() and float(b.float().abs().nan_to_num().max()) < _TINY:
            continue
        differing, distance = perturbed.distance(a, b)
        if rule.exact:
            assert not differing, f"{change}: {differing} of {b.numel()} values of tensor {index} differ"
        else:
            limit = _LIMIT + known * (10 if any(name in change for name in _WHOLE) else 2)
            assert distance <= limit, f"{change}: tensor {index} is {distance:.1e} apart, unchanged {known:.1e}"
