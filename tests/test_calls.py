"""A node is recognised with all of its arguments, or not at all."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from inductor_ext.calls import CONVERT, arguments, aten, by_position, calls, is_call, is_convert


def made(target: Any, *args: Any, **kwargs: Any) -> Node:
    graph = Graph()
    x = graph.placeholder("x")
    return graph.call_function(target, tuple(x if each == "x" else each for each in args), kwargs)


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (aten.add.Tensor, ("x", "x"), {"alpha": 2}),
        (aten.sub.Tensor, ("x", "x"), {"alpha": 0.5}),
        (aten.mean.dim, ("x", [-1], True), {"dtype": torch.bfloat16}),
        (aten.sum.dim_IntList, ("x", [1]), {"dtype": torch.float32}),
        (aten.gelu.default, ("x",), {"approximate": "tanh"}),
    ],
)
def test_an_argument_that_nobody_looks_at_makes_it_another_call(target: Any, args: Any, kwargs: Any) -> None:
    node = made(target, *args, **kwargs)
    assert calls(node, target) and not is_call(node, target)
    assert is_call(made(target, *args), target), "without it, it is one"


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (aten.add.Tensor, ("x", "x"), {"alpha": 1}),
        (aten.add.Tensor, ("x", "x"), {"alpha": 1.0}),
        (aten.mean.dim, ("x", [-1], True), {"dtype": None}),
        (aten.slice.Tensor, ("x", 1, 2, 5, 2), {}),
        (aten.amax.default, ("x", [0], True), {}),
        (aten.clone.default, ("x",), {"memory_format": torch.contiguous_format}),
        (operator.getitem, ("x", 3), {}),
    ],
)
def test_defaults_and_what_callers_read_do_not(target: Any, args: Any, kwargs: Any) -> None:
    assert is_call(made(target, *args, **kwargs), target)


def test_the_arguments_of_a_call_are_all_there_by_name() -> None:
    node = made(aten.amax.default, "x", keepdim=True)
    assert arguments(node) == {"self": node.args[0], "dim": [], "keepdim": True}


def test_a_convert_is_known_with_its_dtype() -> None:
    node = made(CONVERT, "x", torch.int8)
    assert is_convert(node, torch.int8, torch.int16) and not is_convert(node, torch.bfloat16, torch.float32)


def test_arguments_given_by_name_are_put_in_their_place() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.slice.Tensor, (x,), {"start": 2, "dim": 1})
    named = graph.call_function(aten.add.Tensor, (), {"self": x, "other": x, "alpha": 2})
    by_position(graph)
    assert (node.args, dict(node.kwargs)) == ((x, 1, 2), {})
    assert (named.args, dict(named.kwargs)) == ((x, x), {"alpha": 2})


def test_what_is_no_operator_keeps_its_arguments() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    slot = graph.call_function(operator.mul, (x, 2))
    rounded = graph.call_function(round, (x,), {"ndigits": 2})
    by_position(graph)
    assert slot.args == (x, 2)
    assert (rounded.args, dict(rounded.kwargs)) == ((x,), {"ndigits": 2})


def test_an_operator_of_others_is_known_whatever_its_arguments() -> None:
    """Whose rule reads it knows them; nobody else recognises it."""
    target = torch.ops.inductor_ext.mxfp8_grouped_mm.default
    node = made(target, "x", None, "x", "x", "x", torch.float16, True, 128)
    assert is_call(node, target)
