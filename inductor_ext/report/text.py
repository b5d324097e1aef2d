"""Reports as text: tables for a terminal (`renderable`, `verification`) and the same as plain text (`render`).

Events that differ only in the numbers inside node names and of layers, as those of 28 equal layers do, share one row.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from inductor_ext.report.events import Refusal, Rewrite
from inductor_ext.report.shown import line, shown

if TYPE_CHECKING:
    from inductor_ext.moe.quantize import MoEReport
    from inductor_ext.report.explain import Explanation
    from inductor_ext.report.verify import Verification

WIDTH = 140

#: The number that torch.fx gives a node to tell it from others of the same operator: ``mul_14``, ``arg3_1``.
_NODE_NUMBER = re.compile(r"(?<=[a-z])\d*_\d+\b")


#: Fewer lines are not worth a line that says how often they come.
_WORTH_FOLDING = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """Equal events: the first of them, and the nodes and modules of all."""

    event: Any
    nodes: tuple[str, ...]
    modules: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.nodes)

    @property
    def where(self) -> str:
        """The first node's name, and how many more there are."""
        return line(self.nodes[0]) + (f" +{self.count - 1}" if self.count > 1 else "")


    @property
    def module(self) -> str:
        """The modules' path, the layers' numbers in one: ``layers.0–27.mlp``. "" where PyTorch kept none."""
        paths = [path.split(".") for path in dict.fromkeys(self.modules)]
        parts = [list(dict.fromkeys(part)) for part in zip(*paths)]
        several = sum(len(part) > 1 for part in parts) > 1
        return ".".join(part[0] if len(part) == 1 else "*" if several else _ranges(part) for part in parts)


def rows(events: Iterable[Rewrite | Refusal]) -> list[Row]:
    """Events in order of first appearance, equal ones together."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for event in events:
        fields = dataclasses.asdict(event)
        del fields["node"]
        module = tuple("*" if part.isdigit() else part for part in fields.pop("module").split("."))
        key = module, *(_NODE_NUMBER.sub("", value) for value in fields.values())
        found.setdefault(key, []).append(event)
    return [Row(same[0], tuple(each.node for each in same), tuple(each.module for each in same)) for same in found.values()]


def _ranges(numbers: Iterable[str]) -> str:
    """``0–3, 5`` of 0, 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)


def folded(lines: Sequence[str]) -> list[tuple[str, int, int]]:
    """(line, 0, 0) of each of ``lines``. Of a stretch that repeats itself, numbers in nodes' names apart, as equal layers do,
    its first turn alone, and behind it ("", turns left out, lines of a turn)."""
    keys = [_NODE_NUMBER.sub("", line) for line in lines]
    nearest: dict[str, int] = {}
    following = [len(lines)] * len(lines)  # where a line comes again
    for index in reversed(range(len(lines))):
        following[index] = nearest.get(keys[index], len(lines))
        nearest[keys[index]] = index
    found: list[tuple[str, int, int]] = []
    index = 0
    while index < len(lines):
        turns, period = _turns(keys, following, index)
        found += [(line, 0, 0) for line in lines[index : index + period]]
        if turns > 1:
            found.append(("", turns - 1, period))
        index += turns * period
    return found


def _turns(keys: Sequence[str], following: Sequence[int], index: int) -> tuple[int, int]:
    """How often the lines from ``index`` on come one after the other, and how many they are; (1, 1): they do not."""
    again = following[index]
    while again < len(keys):
        period, turns = again - index, 1
        while keys[index : index + period] == keys[index + turns * period : index + (turns + 1) * period]:
            turns += 1
        if turns > 1 and period >= _WORTH_FOLDING:
            return turns, period
        again = following[again]
    return 1, 1


def render(report: Any, width: int = WIDTH) -> str:
    """Plain text of an `Explanation` or a `Verification`: fixed width, no colours, no trailing blanks."""
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, legacy_windows=False, force_terminal=False)
    console.print(report.__rich__())
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def renderable(explanation: Explanation) -> RenderableType:
    """A summary line a graph, a table of rewrites, one of near misses, and what to try when nothing was found."""
    parts: list[RenderableType] = [_text(graph.summary(), "bold") for graph in explanation.graphs]
    if explanation.rewrites:
        parts.append(_rewrites(explanation.rewrites))
    if explanation.refusals:
        parts.append(_near_misses(explanation.refusals))
    if not explanation.rewrites:
        parts.append(_text("\n".join(["What to try:", *(f"  - {each}" for each in advice(explanation))])))
    return Group(*parts)


def diff(lines: str) -> Text:
    """A unified diff in colours; print it with ``soft_wrap=True``, so that no line is cut."""
    styles = {"+": "green", "-": "red", "@": "magenta"}
    found = Text()
    for each in re.split("(?<=\n)", lines):
        found.append(shown(each), styles.get(each[:1], ""))
    return found


def advice(explanation: Explanation) -> list[str]:
    """What a person can do when nothing was rewritten, by how far the rules got."""
    if not explanation.graphs:
        return [
            "no graph was compiled: the model ran no tensor operators under Dynamo, or compiling is switched off "
            "(torch.compiler.disable, TORCH_COMPILE_DISABLE)"
        ]
    if explanation.refusals:
        names = sorted({miss.rule for miss in explanation.refusals})
        forced = ", ".join(f'"{name}": "always"' for name in names)
        return [
            'make the model give what the column "wanted" names, at the source line beside it',
            f"a rewrite refused because it would not pay is done all the same with rules={{{forced}}}",
        ]
    return [
        "no rule saw anything like its pattern: `inductor-ext rules` lists what each looks for, and "
        "`inductor-ext rules show NAME` shows code that it matches",
        "the rules look for casts to float8 in the model's own graph: quantise the model first, and run it on the "
        "inputs that it will serve",
        "print(explanation.graphs[0].before) is the graph that the rules saw",
    ]


def _text(value: object, style: str = "") -> Text:
    """Every cell and every line goes through here: no character that a user gave is obeyed by a terminal."""
    return Text(shown(value), style)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.ROUNDED, show_lines=True)
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column == "×" else "left")
    return table


def _where(row: Row) -> Text:
    place = Text(line(row.event.source) or "no source line known")
    if row.module:
        place.append(f"\nin {line(row.module)}")
    return place.append(f"\nnode {row.where}", "dim")


def _rewrites(events: list[Rewrite]) -> Table:
    table = _table(f"Rewrites ({len(events)})", "×", "rule", "where", "now", "why")
    for row in rows(events):
        event: Rewrite = row.event
        now = f"{event.kernel}\n{event.detail}" if event.kernel else event.detail
        table.add_row(str(row.count), _text(event.rule), _where(row), _text(now), _text(event.why))
    return table


def _near_misses(events: list[Refusal]) -> Table:
    table = _table(f"Near misses ({len(events)})", "×", "rule", "where", "reason", "wanted and found")
    for row in rows(events):
        event: Refusal = row.event
        facts = Text.assemble(("wanted ", "dim"), shown(event.wanted), ("\nfound  ", "dim"), shown(event.found))
        table.add_row(str(row.count), _text(event.rule), _where(row), _text(event.reason), facts)
    return table


def verification(found: Verification) -> RenderableType:
    """One verdict, a table with a row for each rule on each graph, and the distances end to end."""
    if found.ok:
        verdict = Text("verify: every rewrite agrees with what it replaced", "bold green")
    elif found.differs:
        verdict = _text(f"verify: {', '.join(found.differs)} differs from what it replaced", "bold red")
    else:
        verdict = Text("verify: each rewrite agrees, but the compiled model is further from eager than stock is", "bold red")
    parts: list[RenderableType] = [verdict]
    if found.checks:
        parts.append(_checks(found))
    else:
        parts.append(Text("  nothing was rewritten, so there was nothing to compare rule by rule"))
    if found.end_to_end:
        distances = found.end_to_end
        parts.append(
            Text(
                "relative distance of the outputs: "
                f"stock to eager {distances.stock_to_eager:.3g}, ours to eager {distances.ours_to_eager:.3g}, "
                f"ours to stock {distances.ours_to_stock:.3g}"
            )
        )
    return Group(*parts)


def _checks(found: Verification) -> Table:
    table = _table("Rule by rule", "rule", "graph", "rewrites", "promise", "differing", "max diff", "result")
    for check in found.checks:
        result = "equal" if check.differing == 0 else f"{'ok' if check.ok else 'DIFFERS'}: {check.where}"
        if check.differing and not check.exact:
            result += f"; relative distance {check.distance:.2g}"
        cells = (
            check.rule,
            check.graph,
            str(check.rewrites),
            "same bytes" if check.exact else "close",
            f"{check.differing:,} of {check.elements:,}",
            f"{check.max_abs:.3g}",
            result,
        )
        table.add_row(*map(_text, cells), style=None if check.ok else "red")
    return table


def quantized_moe(report: MoEReport) -> RenderableType:
    """A summary line, a table of the weights that were quantised, and one of those that were left alone."""
    settings = f"activations {report.activations}, scales {report.rounding}"
    summary = f"quantize_moe_: {len(report.weights)} weights to MXFP8, {settings}"
    if report.weights:
        sizes = f"{report.bytes_before / 2**20:,.2f} → {report.bytes_after / 2**20:,.2f} MiB"
        summary += f"; relative error {report.error:.3%}, {sizes}"
    parts: list[RenderableType] = [_text(summary, "bold")]
    if report.weights:
        errors = "relative error", "largest error", "largest weight"
        table = _table("Quantised", "weight", "shape", *errors, "MiB before → after")
        for weight in report.weights:
            sizes = f"{weight.bytes_before / 2**20:,.2f} → {weight.bytes_after / 2**20:,.2f}"
            numbers = f"{weight.error:.3%}", f"{weight.max_error:.3g}", f"{weight.max_weight:.3g}"
            table.add_row(*map(_text, (line(weight.name), str(list(weight.shape)), *numbers, sizes)))
        table.show_lines = False
        parts.append(table)
    if report.skipped:
        table = _table("Left alone", "weight", "reason", "wanted", "found")
        for skipped in report.skipped:
            table.add_row(*map(_text, (line(skipped.name), skipped.reason, skipped.wanted, skipped.found)))
        table.show_lines = False
        parts.append(table)
    return Group(*parts)
