"""``strict=True``: whether every rule that was asked for has matched, over as many graphs as the model has.

A backend checks after each graph, and counts what its earlier graphs have matched: a decode step need not hold what the prefill
held. Whether more graphs are to come nobody but the user knows, who says so:

    with inductor_ext.whole_model():        # graph breaks, prefill and decode: checked once, at the end of the block
        model.generate(**inputs)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from inductor_ext.errors import StrictError
from inductor_ext.report.events import GraphReport, Refusal
from inductor_ext.report.shown import line
from inductor_ext.settings import Settings

_SHOWN = 20  # near misses in an error: a model has as many as it has layers
_blocks: list[Tally] = []  # that are open, of all threads: a backward may be compiled in another


class Tally:
    """Which of the rules that were asked for have matched so far."""

    def __init__(self) -> None:
        self.compiles = 0
        self._wanted: dict[str, None] = {}
        self._matched: set[str] = set()
        self._misses: list[Refusal] = []

    def add(self, reports: Iterable[GraphReport], chosen: Settings) -> None:
        """The reports of one compile with the settings ``chosen``."""
        self.compiles += 1
        self._wanted.update((rule, None) for rule, mode in chosen.rules.items() if mode != "off")
        for report in reports:
            self._matched.update(event.rule for event in report.rewrites)
            self._misses += [miss for miss in report.refusals if miss.rule in self._wanted]
        self._misses = [miss for miss in self._misses if miss.rule not in self._matched]

    def check(self) -> None:
        """Raise ``StrictError`` where a rule matched nothing, with its near misses."""
        missing = [rule for rule in self._wanted if rule not in self._matched]
        if not missing:
            return
        misses = self._misses[:_SHOWN]
        lines = [line(f"  {m.rule} at {m.node}: {m.reason}; wanted {m.wanted}, found {m.found} {m.source}") for m in misses]
        if len(self._misses) > _SHOWN:
            lines.append(f"  and {len(self._misses) - _SHOWN} more near misses")
        one = self.compiles == 1
        where = "this graph" if one else f"any of {self.compiles} graphs"
        none = "  no near miss either: " + ("the graph holds nothing like it" if one else "no graph holds anything like it")
        raise StrictError(f"strict=True: {', '.join(missing)} matched nothing in {where}\n" + ("\n".join(lines) or none))


def settle(tally: Tally, reports: Iterable[GraphReport], chosen: Settings) -> None:
    """After one compile of a strict backend: check ``tally``, its graphs so far, or leave that to the block that is open."""
    found = list(reports)
    tally.add(found, chosen)
    if not _blocks:
        tally.check()
    for block in _blocks:
        block.add(found, chosen)


@contextlib.contextmanager
def whole_model() -> Iterator[None]:
    """Everything that is compiled in this block is one model: ``strict`` is checked at its end, over all of its graphs.

    Raises ``StrictError`` then, for backends by name, configured ones and ``options=`` alike.
    """
    block = Tally()
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)
    block.check()
