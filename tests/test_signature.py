"""One signature an op: the schema that annotations give, and functions that take its arguments by name."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from inductor_ext.signature import Call, Mutated, Signature, SymInt


def everything(
    x: torch.Tensor,
    maybe: torch.Tensor | None,
    many: Sequence[torch.Tensor],
    some: Sequence[torch.Tensor | None],
    cache: Mutated,
    other: Mutated | None,
    dtype: torch.dtype,
    rows: SymInt,
    factor: float,
    name: str,
    count: int = 1,
    flag: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x, x


def one(x: torch.Tensor, scale: float, shift: int = 2) -> torch.Tensor:
    return x * scale + shift


def nothing(x: Mutated) -> None:
    x.zero_()


ONE = Signature.of("one", one)


def test_annotations_are_the_schema() -> None:
    made = Signature.of("everything", everything)
    assert made.schema == (
        "everything(Tensor x, Tensor? maybe, Tensor[] many, Tensor?[] some, Tensor(a!) cache, Tensor(b!)? other, "
        "ScalarType dtype, SymInt rows, float factor, str name, int count=1, bool flag=False) -> (Tensor, Tensor)"
    )
    assert made.outs == ("out0", "out1")
    torch._C.parse_schema(f"tests::{made.schema}")


def test_the_overload_that_writes_into_its_outputs() -> None:
    assert Signature.of("everything", everything).out_schema(False).endswith("*, Tensor(c!) out0, Tensor(d!) out1) -> ()")
    assert ONE.out_schema(True).endswith("*, Tensor(a!) out, Tensor(z!)? scratch=None) -> ()")
    torch._C.parse_schema(f"tests::{ONE.out_schema(True)}")


def test_an_op_that_only_writes_its_arguments() -> None:
    made = Signature.of("nothing", nothing)
    assert (made.schema, made.outs) == ("nothing(Tensor(a!) x) -> ()", ())


def wrong_argument(x: complex) -> torch.Tensor:
    raise AssertionError


def no_annotation(x) -> torch.Tensor:  # type: ignore[no-untyped-def]
    raise AssertionError


def wrong_result(x: torch.Tensor) -> int:
    raise AssertionError


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (wrong_argument, "f: x: wanted an annotation of Tensor, .* found complex"),
        (no_annotation, "f: x: wanted an annotation of Tensor, .* found none"),
        (wrong_result, "f: return: wanted Tensor, a tuple of Tensor or None, found int"),
    ],
)
def test_annotations_without_a_type(function: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Signature.of("f", function)


# ---- functions -----------------------------------------------------------------------------------------------------------


def test_arguments_by_name_in_any_order() -> None:
    made = ONE.positional("bind", lambda out, shift, x: (out, shift, x), ("out",))
    assert made("x", 1.0, 3, "out") == ("out", 3, "x")
    assert ONE.positional("key", lambda: "always")("x", 1.0) == "always"


def test_defaults_are_those_of_the_signature() -> None:
    """The dispatcher leaves out what has its default."""
    assert ONE.positional("key", lambda shift, x: (shift, x))("x", 1.0) == (2, "x")
    assert ONE.positional("key", lambda x, scale, shift: shift)("x", 1.0) == 2


def test_what_has_no_names_gets_everything() -> None:
    assert ONE.positional("bind", lambda *given: given, ("out",))("x", 1.0, 3, "out") == ("x", 1.0, 3, "out")


def test_a_call_may_take_constants_and_parts() -> None:
    call = Call(lambda *given: given, "x[0], (scale, shift), *numbers, out", numbers=(7, 8))
    assert ONE.positional("bind", call, ("out",))(["first"], 1.0, 3, "out") == ("first", (1.0, 3), 7, 8, "out")


@pytest.mark.parametrize("function", [lambda y: y, Call(print, "x, y, z", z=1)])
def test_a_name_that_is_no_argument(function: Any) -> None:
    with pytest.raises(TypeError, match="one: key: wanted names of x, scale, shift, found y"):
        ONE.positional("key", function)


def test_a_traceback_shows_the_call() -> None:
    def fails(scale: Any) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError) as caught:
        ONE.positional("key", fails)("x", 1.0)
    assert "_function(scale)" in "".join(traceback.format_tb(caught.tb))
