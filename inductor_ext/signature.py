"""One signature an op: the dispatcher's schema from a function's annotations, and functions that take arguments by name.

    def reference(x: torch.Tensor, cache: Mutated, slots: Sequence[torch.Tensor], count: SymInt = 1) -> torch.Tensor: ...

    Signature.of("store", reference).schema      # store(Tensor x, Tensor(a!) cache, Tensor[] slots, SymInt count=1) -> Tensor

An op's other functions name the arguments that they read, in any order. `Signature.positional` makes of one, once, a function
of all arguments: it compiles a line of source, as ``dataclasses`` does for ``__init__``, so that a call looks no name up.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import linecache
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import torch

#: A tensor that the op writes, and an integer that may be symbolic while a graph is compiled.
Mutated = Annotated[torch.Tensor, "Tensor({}!)"]
SymInt = Annotated[int, "SymInt"]

_TYPES = {torch.Tensor: "Tensor", torch.dtype: "ScalarType", int: "int", float: "float", bool: "bool", str: "str"}
_SOURCES = itertools.count()


class Call:
    """``function`` called with ``takes``, a Python argument list that names an op's arguments and the ``constants``.

    ``Call(module.run, "x, out, split", split=8)`` costs what ``module.run(x, out, 8)`` costs: no function of Python's lies
    between. An op's output is called ``out``; several are ``out0``, ``out1``, …
    """

    __call__: Callable[..., Any]  # for type checkers: an op makes a function of it

    def __init__(self, function: Callable[..., Any], takes: str, **constants: Any) -> None:
        self.function, self.takes, self.constants = function, takes, constants


@dataclasses.dataclass(frozen=True)
class Signature:
    """The arguments of the op ``name`` in order, with their types in the dispatcher's language; how many tensors it returns."""

    name: str
    types: dict[str, str]
    defaults: dict[str, Any]
    results: int

    @classmethod
    def of(cls, name: str, function: Callable[..., Any]) -> Signature:
        """That of an annotated function. TypeError for an annotation that the dispatcher has no type for."""
        hints, parameters = typing.get_type_hints(function, include_extras=True), inspect.signature(function).parameters
        letters = iter("abcdefgh")
        kinds = {each: _type(f"{name}: {each}", hints.get(each), letters) for each in parameters}
        defaults = {each: spec.default for each, spec in parameters.items() if spec.default is not spec.empty}
        returned = hints.get("return")
        tensors = () if returned is type(None) else typing.get_args(returned) or (returned,)
        if any(each is not torch.Tensor for each in tensors):
            raise TypeError(f"{name}: return: wanted Tensor, a tuple of Tensor or None, found {_shown(returned)}")
        return cls(name, kinds, defaults, len(tensors))

    @property
    def outs(self) -> tuple[str, ...]:
        """What the results are called where they are given; nothing for an op that only writes its arguments."""
        return ("out",) if self.results == 1 else tuple(f"out{i}" for i in range(self.results))

    @property
    def schema(self) -> str:
        results = "Tensor" if self.results == 1 else f"({', '.join(['Tensor'] * self.results)})"
        return f"{self.name}({self._arguments()}) -> {results}"

    def out_schema(self, scratch: bool) -> str:
        """That of the overload which writes into given results and, with ``scratch``, takes memory to work in."""
        written = sum("!" in kind for kind in self.types.values())
        outs = [f"Tensor({chr(97 + written + i)}!) {out}" for i, out in enumerate(self.outs)]
        return f"{self.name}.out({self._arguments()}, *, {', '.join(outs + ['Tensor(z!)? scratch=None'] * scratch)}) -> ()"

    def _arguments(self) -> str:
        return ", ".join(f"{kind} {name}" + self._default(name, "={!r}") for name, kind in self.types.items())

    def _default(self, name: str, form: str) -> str:
        return form.format(self.defaults[name]) if name in self.defaults else ""

    # ---- functions that take arguments by name ----------------------------------------------------------------------

    def call(self, what: str, function: Any, outs: Sequence[str] = ()) -> Call:
        """How ``function``, which errors call ``what``, is called: a Python function with what its parameters name.

        Whatever else can be called, a kernel or a function of ``*args``, gets every argument and ``outs``.
        """
        names = [*self.types, *outs]
        if isinstance(function, Call):
            made, words = function, ast.walk(ast.parse(f"_({function.takes})"))
            taken = [word.id for word in words if isinstance(word, ast.Name) and word.id not in ("_", *function.constants)]
        else:
            taken = _parameters(function, names)
            made = Call(function, ", ".join(taken))
        if unknown := [name for name in taken if name not in names]:
            raise TypeError(f"{self.name}: {what}: wanted names of {', '.join(names)}, found {', '.join(unknown)}")
        return made

    def positional(self, what: str, function: Any, outs: Sequence[str] = ()) -> Callable[..., Any]:
        """``function`` as one of all arguments and ``outs``, in order."""
        call = self.call(what, function, outs)
        if not self.defaults and call.takes == ", ".join((*self.types, *outs)):
            return call.function
        scope: dict[str, Any] = {}
        parameters = self.parameters(outs, "")
        return self.compiled(what, f"def {self.name}({parameters}):\n    return {written(call, '_function', scope)}\n", scope)

    def parameters(self, outs: Sequence[str], separator: str = "*") -> str:
        """The parameters of a Python function of all arguments and ``outs``; memory to work in need not be given."""
        own = [f"{name}{self._default(name, '={!r}')}" for name in self.types]
        given = [f"{out}=None" if out == "scratch" or (self.defaults and not separator) else out for out in outs]
        return ", ".join([*own, *([separator] if separator and outs else []), *given])

    def compiled(self, what: str, source: str, scope: dict[str, Any]) -> Callable[..., Any]:
        """The function that ``source`` defines, with ``scope`` as its globals. Tracebacks and debuggers show the source."""
        path = f"<inductor_ext {self.name}.{what} {next(_SOURCES)}>"
        linecache.cache[path] = len(source), None, source.splitlines(keepends=True), path
        exec(compile(source, path, "exec"), scope)
        made: Callable[..., Any] = scope[self.name]
        return made


def written(call: Call, name: str, scope: dict[str, Any]) -> str:
    """The source of a call: its function is put into ``scope`` as ``name``, and its constants under their own names."""
    scope.update(call.constants, **{name: call.function})
    return f"{name}({call.takes})"


def _parameters(function: Any, everything: list[str]) -> list[str]:
    if not isinstance(function, (types.FunctionType, types.MethodType)):
        return everything
    parameters = inspect.signature(function).parameters
    return everything if any(each.kind is each.VAR_POSITIONAL for each in parameters.values()) else list(parameters)


def _type(where: str, annotation: Any, letters: Iterator[str]) -> str:
    """The dispatcher's type of an annotation; an argument that is written takes the next of ``letters``."""
    arguments = typing.get_args(annotation)
    if annotation in _TYPES:
        return _TYPES[annotation]
    if typing.get_origin(annotation) is Annotated and isinstance(arguments[1], str):
        return arguments[1].format(next(letters)) if "{}" in arguments[1] else arguments[1]
    if type(None) in arguments and len(arguments) == 2:
        (whole,) = (each for each in arguments if each is not type(None))
        return f"{_type(where, whole, letters)}?"
    origin = typing.get_origin(annotation)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"{_type(where, arguments[0], letters)}[]"
    known = "Tensor, Mutated, dtype, int, SymInt, float, bool, str, a Sequence of one or one | None"
    raise TypeError(f"{where}: wanted an annotation of {known}, found {_shown(annotation)}")


def _shown(annotation: Any) -> str:
    return "none" if annotation is None else getattr(annotation, "__name__", None) or str(annotation)
