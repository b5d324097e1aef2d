"""The strategy: a family's own program, then up to three edits; a few with dynamic sizes, a few with a backward pass."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.fuzz.builder import Builder
from tests.fuzz.edits import edited
from tests.fuzz.families import FAMILIES
from tests.fuzz.program import Program

#: Edits of a program: a quarter have none, so that every rule is seen to rewrite.
COUNTS = (0, 0, 1, 1, 1, 2, 2, 3)


@st.composite
def programs(draw: Any, family: str, cuda: bool = False) -> Program:
    builder = Builder(draw, family, cuda)
    FAMILIES[family](builder)
    program = edited(draw, builder.program(), draw(st.sampled_from(COUNTS)))
    if builder.chance(2):
        program = program.replace(dynamic=True)
    elif builder.chance(2):
        program = program.replace(backward=True)
    return program
