"""What a rewrite rule is: where to look, a guard, a replacement, and its own examples.

A rule looks at *anchors*, single nodes such as every cast to FP8. For each anchor its guard does one of three things:

* it gives ``None``: this is not the rule's business (an int8 cast, say);
* it raises a `Miss`: it is nearly a match; the miss says which condition failed first, what was wanted and what was found;
* it gives a `Match`: it will be rewritten. The match lists the op calls the replacement needs, so that their kernels can be
  had, and carries whatever the replacement wants to know in ``data``.

Guards never change the graph. They read ``node.meta["val"]``, the fake tensor of every node.
"""

from __future__ import annotations

import dataclasses
import linecache
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.op import Op
from inductor_ext.settings import RuleMode, Settings

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')

#: Of ‖a - b‖ / ‖b‖ for one rewrite of a rule that is not exact, where nothing has enlarged it yet. fp32 sums in another order
#: round one element in some thousand otherwise, 1e-4 in all; a rounding to bf16 left out, or made twice, is 1e-3 or more.
TOLERANCE = 5e-4

#: The same where the hardware's own sums differ by as much as a rounding to bf16: FP8 products with fast accumulation, whose
#: accumulator keeps 13 bits, and attention, whose probabilities are bf16.
ACCUMULATED = 5e-3

#: Of a whole graph's results: each rounding that falls otherwise is enlarged where what comes of it is quantised to FP8. The
#: demo's two layers on a CPU: 1.9e-2 by scaled_mm_siblings, 2e-3 by scaled_mm.
REQUANTIZED = 5e-2


@dataclasses.dataclass(frozen=True)
class Call:
    """An op call that a replacement will insert, with fake tensors for arguments: enough to know its kernel."""

    op: Op
    args: Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Match:
    """An anchor that will be rewritten."""

    node: Node
    calls: tuple[Call, ...]
    detail: str
    why: str
    data: Any = None


@dataclasses.dataclass(frozen=True)
class Context:
    """What a guard may ask besides the graph: whether its rule is forced (``always``) or must pay (``auto``), and options."""

    rule: str
    mode: RuleMode
    options: Settings = dataclasses.field(default_factory=Settings)

    @property
    def forced(self) -> bool:
        return self.mode == "always"


@dataclasses.dataclass(frozen=True)
class Example:
    """A function, and the inputs it is compiled with, that a rule matches or, when ``reason`` is set, nearly matches.

    ``inputs(device)`` makes the arguments. ``reason`` is the expected `Miss.reason`; ``options`` are (name, value) pairs.
    ``before`` are the modes of other rules, such as have to run before it.
    """

    name: str
    fn: Callable[..., Any]
    inputs: Callable[[str], tuple[Any, ...]]
    reason: str = ""
    mode: RuleMode = "auto"
    count: int = 1
    dynamic: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    before: tuple[tuple[str, RuleMode], ...] = ()

    def modes(self, rule: str) -> dict[str, RuleMode]:
        """The modes under which ``rule`` answers to this example as it says; other rules may have any."""
        return {**dict(self.before), rule: self.mode}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rewrite. ``exact``: the result equals the eager nodes', byte for byte; ``cost`` says what it costs if not, and
    ``tolerance`` how far the values behind one rewrite may then move: ‖a - b‖ / ‖b‖.

    ``environment`` says what else than the graph and the settings its guard asks, such as libraries that are installed: a graph
    that was compiled in another environment is not taken from Inductor's caches. ``drops_writes``: inputs that the graph wrote
    to may be left as they were, since the user has said that nothing reads them; `verify` does not compare those then.
    ``differs_unread``: a rewrite changes elements that nothing reads; `verify` then looks at the graph's results alone.
    """

    name: str
    doc: str
    anchors: Callable[[Graph], Iterable[Node]]
    guard: Callable[[Node, Context], Match | None]
    replace: Callable[[Match], None]
    exact: bool = True
    cost: str = ""
    tolerance: float = TOLERANCE
    environment: Callable[[], tuple[str, ...]] = tuple
    drops_writes: bool = False
    differs_unread: bool = False
    matches: tuple[Example, ...] = ()
    near_misses: tuple[Example, ...] = ()


def module_path(node: Node) -> str:
    """The innermost module that made ``node``, as a path: "layers.0.self_attn.q_proj"."""
    entries = list((node.meta.get("nn_module_stack") or {}).values())
    path = entries[-1][0] if entries else ""
    path = re.sub(r"^L\['[^']*'\]\.?", "", path)  # Dynamo's name of the argument that holds the model
    return re.sub(r"\.?_modules\['([^']+)'\]", r".\1", path).strip(".")


def source_line(node: Node) -> str:
    """The user's line that made ``node``: the innermost frame outside PyTorch, "file.py:12 in f: code"."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    inside = f"{torch.__name__}/_", f"{torch.__name__}/nn/functional.py"
    own = [frame for frame in frames if not any(part in frame["file"] for part in inside)]
    if not frames:
        return ""
    frame = (own or frames)[-1]
    code = linecache.getline(frame["file"], int(frame["line"])).strip()
    name = frame["file"].replace("\\", "/").rsplit("/", 1)[-1]
    return f"{name}:{frame['line']} in {frame['function']}" + (f": {code}" if code else "")
