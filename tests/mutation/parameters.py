"""Change the arguments of the ops that rules insert, each once, when they are inserted.

A rule's ``replace`` is wrapped: of the nodes that are new afterwards, those that call an op of ours (or a mutating one through
``auto_functionalized_v2``) have one argument changed, by its type in the schema:

* a number, a flag, a dtype, a text: another. Of texts (programs, spellings of a norm) one that the same argument was seen to
  have in another call, so that it is a valid one; a number of the text changes where there is none;
* a tensor: swapped with the next argument of its shape and dtype; a cache with the other cache; an optional one: left out;
* a list of tensors: backwards; of optional ones: without.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx import Node

from tests.mutation.sites import Probe

#: Nothing to change in this call.
SAME = object()

_NEXT_DTYPE = {
    torch.float8_e4m3fn: torch.float8_e5m2,
    torch.float8_e5m2: torch.float8_e4m3fn,
    torch.bfloat16: torch.float32,
    torch.float32: torch.bfloat16,
    torch.float16: torch.bfloat16,
    torch.uint8: torch.int8,
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """``what`` is done to ``argument`` of ``op`` when ``rule`` inserts it."""

    rule: str
    op: str
    argument: str
    what: str

    @property
    def id(self) -> str:
        return f"{self.rule} inserts {self.op}: {self.argument} {self.what}"


def parameters(rules: Mapping[str, Path], ops: Mapping[str, Any]) -> list[Parameter]:
    """Those of every op that a rule's file imports, itself or through the files that it imports."""
    found = []
    for rule, path in rules.items():
        for op in sorted(_imported_ops(path, set())):
            for argument in ops[op].overload._schema.arguments:
                found += [Parameter(rule, op, argument.name, what) for what in _changes(str(argument.type), argument.is_write)]
    return found


def _imported_ops(path: Path, seen: set[Path]) -> set[str]:
    found: set[str] = set()
    if path in seen or not path.exists():
        return found
    seen.add(path)
    patterns = next(parent for parent in path.parents if parent.name == "patterns")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        for name in names:
            kernel = re.fullmatch(r"inductor_ext\.kernels\.(\w+)\.op\.\w+", name)
            if kernel:
                found.add(kernel[1])
            elif name.startswith("inductor_ext.patterns."):
                found |= _imported_ops(patterns.joinpath(*name.split(".")[2:]).with_suffix(".py"), seen)
    return found


def _changes(kind: str, written: bool) -> Iterable[str]:
    if kind in ("Tensor", "Optional[Tensor]"):
        yield "swapped"
        if kind != "Tensor":
            yield "left out"
    elif kind == "List[Tensor]":
        yield "backwards"
    elif kind == "List[Optional[Tensor]]":
        yield "left out"
    else:
        yield "changed"


class Insertions:
    """Watches what rules insert; the active mutant of the probe changes it."""

    def __init__(self, probe: Probe, ops: Mapping[str, Any], known: Iterable[Parameter]) -> None:
        self.probe, self.ops = probe, ops
        self.known = {each.id for each in known}
        self.texts: dict[str, set[str]] = {}  # by op and argument: what was seen
        self.changed = 0

    def wrap(self, rule: str, replace: Callable[[Any], None]) -> Callable[[Any], None]:
        def replaced(match: Any) -> None:
            graph = match.node.graph
            before = set(graph.nodes)
            replace(match)
            for node in [each for each in graph.nodes if each not in before]:
                self._visit(rule, node)

        return replaced

    def _visit(self, rule: str, node: Node) -> None:
        called = _called(node)
        if called is None or called[0] not in self.ops:
            return
        op, given = called
        for argument in self.ops[op].overload._schema.arguments:
            for what in _changes(str(argument.type), argument.is_write):
                mutant = Parameter(rule, op, argument.name, what)
                if mutant.id not in self.known or not (self.probe.recording or self.probe.active == mutant.id):
                    continue
                if isinstance(given.get(argument.name), str):
                    self.texts.setdefault(f"{op}.{argument.name}", set()).add(given[argument.name])
                changes = self._change(op, argument, what, given)
                if not changes and not (self.probe.recording and isinstance(given.get(argument.name), str)):
                    continue
                if self.probe.recording:
                    self.probe.seen.add(mutant.id)
                else:
                    _update(node, self.ops[op], changes)
                    self.changed += 1

    def _change(self, op: str, argument: Any, what: str, given: dict[str, Any]) -> dict[str, Any]:
        """New values of arguments, and of what ``auto_functionalized_v2`` knows instead of one."""
        name = argument.name
        if argument.is_write and f"_{name}_base_index" in given:
            return self._swapped_base(op, name, given) if what == "swapped" else {}
        value = given.get(name)
        if what == "left out":
            if isinstance(value, (list, tuple)):
                return {name: [None] * len(value)} if any(each is not None for each in value) else {}
            return {name: None} if isinstance(value, Node) else {}
        if what == "backwards":
            turned = list(value or ())[::-1]
            return {name: turned} if turned != list(value or ()) else {}
        if what == "swapped":
            return _swapped(name, given, [each.name for each in self.ops[op].overload._schema.arguments])
        changed = _other(value, self.texts.get(f"{op}.{name}", set()))
        return {} if changed is SAME else {name: changed}

    def _swapped_base(self, op: str, name: str, given: dict[str, Any]) -> dict[str, Any]:
        names = [each.name for each in self.ops[op].overload._schema.arguments if each.is_write]
        later = names[names.index(name) + 1 :]
        for other in later:
            if given.get(f"_{other}_base_index") is None:
                continue
            changes = {}
            for part in ("base_index", "size", "stride", "storage_offset"):
                one, two = f"_{name}_{part}", f"_{other}_{part}"
                if one in given and two in given and given[one] != given[two]:
                    changes |= {one: given[two], two: given[one]}
            if changes:
                return changes
        return {}


def _called(node: Node) -> tuple[str, dict[str, Any]] | None:
    """The op's name and its arguments by name."""
    if node.op != "call_function":
        return None
    if node.target is auto_functionalized_v2:
        return node.args[0]._schema.name.partition("::")[2], dict(node.kwargs)  # type: ignore[union-attr]
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "inductor_ext":
        return None
    names = [argument.name for argument in node.target._schema.arguments]
    return node.target._schema.name.partition("::")[2], {**dict(zip(names, node.args)), **node.kwargs}


def _update(node: Node, op: Any, changes: dict[str, Any]) -> None:
    names = [argument.name for argument in op.overload._schema.arguments]
    args = list(node.args)
    kwargs = dict(node.kwargs)
    for name, value in changes.items():
        if node.target is not auto_functionalized_v2 and name not in kwargs:
            args[names.index(name)] = value
        else:
            kwargs[name] = value
    node.args, node.kwargs = tuple(args), kwargs


def _swapped(name: str, given: dict[str, Any], names: list[str]) -> dict[str, Any]:
    value = given.get(name)
    if not isinstance(value, Node):
        return {}
    for other in names[names.index(name) + 1 :]:
        with_ = given.get(other)
        if isinstance(with_, Node) and with_ is not value and _kind(with_) == _kind(value):
            return {name: with_, other: value}
    return {}


def _kind(node: Node) -> Any:
    value = node.meta.get("val")
    return (value.dtype, [str(size) for size in value.shape]) if isinstance(value, torch.Tensor) else None


def _other(value: Any, texts: set[str]) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 2 + 1
    if isinstance(value, torch.dtype):
        return _NEXT_DTYPE.get(value, SAME)
    if isinstance(value, str):
        other = next((text for text in sorted(texts) if text != value), None)
        if other is not None:
            return other
        changed = re.sub(r"\d+\.\d+", lambda number: str(float(number[0]) * 2 + 1), value, count=1)
        return changed if changed != value else SAME
    return SAME
