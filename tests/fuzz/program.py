"""A program as text: inputs, straight-line statements, outputs. It is what is drawn, run, edited, minimised and printed.

    Program(inputs=(("x", "torch.randn(4, 64).bfloat16()"),), lines=("h = x.float()", "y = h * 2"), outputs=("y",))

``source()`` is a file that runs by itself; the corpus is made of such files, and `load` reads one back.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.fuzz import values

NAME = re.compile(r"(?<![\w.\"'])[a-z_][a-z_0-9]*(?![\w(=\"'])(?!\s*=[^=])")

#: What a file may leave out.
_DEFAULTS = {"RULES": {}, "OPTIONS": {}, "DYNAMIC": False, "BACKWARD": False, "XFAIL": False}


@dataclasses.dataclass(frozen=True)
class Program:
    """``inputs`` are (name, expression), made in order, so that one may be a view of an earlier one."""

    family: str
    inputs: tuple[tuple[str, str], ...]
    lines: tuple[str, ...]
    outputs: tuple[str, ...]
    rules: tuple[tuple[str, str], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    dynamic: bool = False
    backward: bool = False
    edits: tuple[str, ...] = ()  # what was done to the family's own program, for people

    def source(self, doc: str = "") -> str:
        names = ", ".join(name for name, _ in self.inputs)
        made = [f"{name} = {expression}" for name, expression in self.inputs] + [f"return ({names},)"]
        body = [*self.lines, f"return ({', '.join(self.outputs)},)" if self.outputs else "return ()"]
        code = "\n".join(("def inputs():", *_indented(made), "", "", f"def f({names}):", *_indented(body)))
        used = [name for name in values.__all__ if re.search(rf"\b{name}\b", code)]
        head = [f'"""{(doc or self.family)[:120]}"""', "", "import torch"]
        head += ["import torch.nn.functional as F"] if re.search(r"\bF\.", code) else []
        head += ["", f"from tests.fuzz.values import {', '.join(used)}"] if used else []
        flags = {"RULES": dict(self.rules), "OPTIONS": dict(self.options), "DYNAMIC": self.dynamic, "BACKWARD": self.backward}
        chosen = [f"{name} = {value!r}".replace("'", '"') for name, value in flags.items() if value != _DEFAULTS[name]]
        return "\n".join((*head, *(["", *chosen] if chosen else []), "", "", code, ""))

    def loaded(self) -> Loaded:
        return loaded(self.source(), self.family)

    def replace(self, **changes: Any) -> Program:
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A program that can run."""

    fn: Callable[..., Any]
    make: Callable[[], tuple[Any, ...]]
    rules: Mapping[str, Any]
    options: Mapping[str, Any]
    dynamic: bool
    backward: bool
    xfail: bool = False  # of a file of the corpus: it still fails
    doc: str = ""

    def inputs(self) -> tuple[Any, ...]:
        torch.manual_seed(0)
        return tuple(self.make())


def loaded(source: str, name: str = "program") -> Loaded:
    space: dict[str, Any] = {"__name__": f"tests.fuzz.{name}"}
    exec(compile(source, f"<{name}>", "exec"), space)
    given = {name.lower(): value for name, value in {**_DEFAULTS, **space}.items() if name in _DEFAULTS}
    return Loaded(space["f"], space["inputs"], doc=space["__doc__"], **given)


def _indented(lines: Iterable[str]) -> Iterable[str]:
    return (f"    {line}" for line in lines)


def load(path: Path) -> Loaded:
    return loaded(path.read_text(), path.stem)


def targets(line: str) -> tuple[str, ...]:
    """Names that a statement binds; none for a store or a call in place."""
    left, equals, _ = line.partition(" = ")
    if not equals or not re.fullmatch(r"[\w, ]+", left):
        return ()
    return tuple(name.strip() for name in left.split(",") if name.strip())


def expression(line: str) -> str:
    return line.partition(" = ")[2] if targets(line) else line


def names_in(text: str, known: Any) -> list[str]:
    return [match.group() for match in NAME.finditer(text) if match.group() in known]


def defined_before(program: Program, position: int) -> list[str]:
    """Names that statement ``position`` may use."""
    found = [name for name, _ in program.inputs]
    for line in program.lines[:position]:
        found += [name for name in targets(line) if name not in found]
    return found


def renamed(text: str, changes: Mapping[str, str]) -> str:
    return NAME.sub(lambda match: changes.get(match.group(), match.group()), text)


def pruned(program: Program) -> Program:
    """Without statements whose result nothing needs; stores stay."""
    needed = {name for output in program.outputs for name in NAME.findall(output)}
    kept: list[str] = []
    for line in reversed(program.lines):
        bound = targets(line)
        if bound and not needed.intersection(bound) and not _writes(line):
            continue
        kept.append(line)
        needed.update(NAME.findall(line))
    return program.replace(lines=tuple(reversed(kept)))


def _writes(line: str) -> bool:
    return re.search(r"\w_\(", line) is not None
