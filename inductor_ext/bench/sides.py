"""What a run compares. Every side is a process of its own with empty Inductor caches; a `Job` is all that it is told.

``max-autotune-no-cudagraphs`` is the mode of the -max sides: the benchmark captures the CUDA graph of every side itself, the
same way, so that a mode's own graphs do not enter the comparison.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from inductor_ext import registry
from inductor_ext.bench.families import ModelShape
from inductor_ext.bench.workload import Workload
from inductor_ext.errors import SettingError
from inductor_ext.settings import RuleMode

MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to run the model. ``backend``: eager, inductor or inductor_ext; ``rules``: modes of rules, ours only."""

    name: str
    backend: str
    mode: str | None = None
    rules: Mapping[str, RuleMode] = dataclasses.field(default_factory=dict)


SIDES = {
    "eager": Side("eager", "eager"),
    "stock": Side("stock", "inductor"),
    "stock-max": Side("stock-max", "inductor", MAX_AUTOTUNE),
    "ours": Side("ours", "inductor_ext"),
    "ours-max": Side("ours-max", "inductor_ext", MAX_AUTOTUNE),
}


def parse_sides(text: str, rules: Mapping[str, RuleMode]) -> list[Side]:
    """``"stock,ours"`` as sides; ``rules`` goes to those of this backend."""
    found = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in SIDES:
            raise SettingError(f"--sides: wanted some of {', '.join(SIDES)}, found {name!r}")
        side = SIDES[name]
        found.append(dataclasses.replace(side, rules=dict(rules)) if side.backend == "inductor_ext" else side)
    if not found or len({side.name for side in found}) < len(found):
        raise SettingError(f"--sides: wanted each side once, at least one; found {text!r}")
    return found


def ablation(fired: Sequence[str], rules: Mapping[str, RuleMode]) -> list[Side]:
    """Stock, then this backend with no rule, with the first, the first two, … of the rules that ``fired``.

    Rules run in the registry's order and each sees what those before it left, so a rule that does nothing among all of them
    does nothing here either and needs no side.
    """
    order = [rule.name for rule in registry.rules() if rule.name in fired]
    found = [SIDES["stock"]]
    for count in range(len(order) + 1):
        on = set(order[:count])
        modes: dict[str, RuleMode] = {rule.name: "off" for rule in registry.rules() if rule.name not in on}
        modes.update({name: mode for name, mode in rules.items() if name in on})
        found.append(Side(f"+ {order[count - 1]}" if count else "no rules", "inductor_ext", rules=modes))
    return found


@dataclasses.dataclass(frozen=True)
class Job:
    """What the process of a side needs. ``attention`` is Hugging Face's ``attn_implementation``."""

    side: Side
    shape: ModelShape
    workload: Workload
    fp8: str
    device: str
    folder: str
    attention: str = "sdpa"
    cosine_inputs: int = 8
    reference: bool = False
    coordinate_descent: bool = True

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        given: dict[str, Any] = json.loads(text)
        given["side"] = Side(**given["side"])
        given["shape"] = ModelShape(**given["shape"])
        lengths = tuple(given["workload"]["lengths"])
        given["workload"] = Workload(lengths, given["workload"]["packed"], given["workload"]["context"])
        return Job(**given)
