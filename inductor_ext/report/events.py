"""What happened while one graph was compiled: plain data that travels as JSON and that `report` turns into text and HTML."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A rule replaced the chain that ended in ``node`` (its name in the graph that the rule saw) by calls of ``kernel``."""

    rule: str
    node: str
    source: str  # the user's line, "file.py:12 in f: code", or "" when PyTorch kept none
    kernel: str  # the op that was inserted, or "" for a rule that only removes nodes
    detail: str = ""  # what the kernel was told: program, granularity, …
    why: str = ""  # why this was done: forced, opaque producer, …
    module: str = ""  # the module it was in, "layers.0.self_attn.q_proj"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A rule looked at ``node`` and left it alone: the first condition that failed, what it wanted and what it found."""

    rule: str
    node: str
    source: str
    reason: str
    wanted: str
    found: str
    module: str = ""


@dataclasses.dataclass
class GraphReport:
    """All events of one post-grad graph. ``before`` and ``after`` are its text around the rules."""

    name: str
    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    refusals: list[Refusal] = dataclasses.field(default_factory=list)
    kernels: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # JitSpec.to_dict() of each kernel needed
    before: str = ""
    after: str = ""
    seconds: float = 0.0
    autotuned: list[str] = dataclasses.field(default_factory=list)  # what Inductor measured beside kernels of ours, a line each
    cached: bool = False  # replayed from Inductor's cache; the rules did not run in this process

    def counts(self) -> dict[str, int]:
        return dict(Counter(event.rule for event in self.rewrites))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GraphReport:
        known = {**data}
        known["rewrites"] = [Rewrite(**event) for event in data["rewrites"]]
        known["refusals"] = [Refusal(**event) for event in data["refusals"]]
        return cls(**known)

    def summary(self) -> str:
        """One line: what was rewritten, how often, how many near misses."""
        done = ", ".join(f"{rule} ×{count}" for rule, count in self.counts().items()) or "nothing"
        misses = f"{len(self.refusals)} near miss{'' if len(self.refusals) == 1 else 'es'}"
        cached = " (from Inductor's cache)" if self.cached else ""
        return f"{self.name}: rewrote {done}; {misses}{cached}"
