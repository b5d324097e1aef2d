"""Rules planted for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from inductor_ext import registry
from inductor_ext.calls import aten, is_call
from inductor_ext.rule import Match, Rule


def wrong_rule(name: str = "wrong", **changes: Any) -> Rule:
    """A rule that makes every ``aten.mul`` by a tensor an addition."""

    def replace(match: Match) -> None:
        match.node.target = aten.add.Tensor

    return Rule(
        name=name,
        doc="mul → add, which is wrong",
        anchors=lambda graph: [node for node in graph.nodes if is_call(node, aten.mul.Tensor)],
        guard=lambda node, context: Match(node, (), "mul → add", "planted"),
        replace=replace,
        **changes,
    )


def plant(monkeypatch: pytest.MonkeyPatch, *rules: Rule, only: bool = False) -> None:
    """Add ``rules`` to the registry for the length of a test."""
    kept = () if only else registry.rules()
    monkeypatch.setattr(registry, "rules", lambda: (*kept, *rules))


def named(rule: str, **changes: Any) -> Rule:
    return dataclasses.replace(registry.rule_named(rule), **changes)


def names_of(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]
