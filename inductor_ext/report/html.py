"""One self-contained HTML file of an `Explanation`: no script, no font, no image, nothing from elsewhere."""

from __future__ import annotations

import dataclasses
import difflib
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inductor_ext import settings
from inductor_ext.report import text
from inductor_ext.report.events import GraphReport
from inductor_ext.report.shown import shown

if TYPE_CHECKING:
    from inductor_ext.report.explain import Explanation
    from inductor_ext.report.verify import Verification

_TEMPLATE = "report.html.j2"


@dataclasses.dataclass(frozen=True)
class Section:
    """A part added by the caller: a paragraph and a table. ``ok`` colours the title's mark; None shows none."""

    title: str
    text: str = ""
    columns: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = ()
    ok: bool | None = None


def write(explanation: Explanation, path: str | Path, extra: Sequence[Section] | None = None) -> Path:
    """Write the report of ``explanation``, ``extra`` sections first, and return the file's path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(explanation, extra or ()), encoding="utf-8")
    return path


def page(explanation: Explanation, extra: Sequence[Section] = ()) -> str:
    """The HTML text itself."""
    found: str = environment(Path(__file__).parent).get_template(_TEMPLATE).render(
        explanation=explanation,
        counts=explanation.counts(),
        rewrites=text.rows(explanation.rewrites),
        refusals=text.rows(explanation.refusals),
        advice=[] if explanation.rewrites else text.advice(explanation),
        ops=Counter(name for event in explanation.rewrites for name in event.kernel.split("+") if name),
        kernels=_kernels(explanation.graphs),
        diffs=[(graph, diff_lines(graph)) for graph in explanation.graphs],
        folded=folded,
        whole=lambda graph: [("same", line) for line in graph.after.splitlines()],
        extra=extra,
        versions=versions(),
        settings=_settings(),
    )
    return found


def environment(*folders: Path) -> Any:
    """Templates of ``folders`` in which every value is text: markup is escaped, control characters are spelt out."""
    import jinja2
    from markupsafe import Markup

    def text_of(value: Any) -> Any:
        return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    loader = jinja2.FileSystemLoader(folders)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=text_of)


def verification_section(found: Verification) -> Section:
    """What `verify` found, as a part of the page."""
    lines = [
        (
            check.rule,
            check.graph,
            str(check.rewrites),
            "same bytes" if check.exact else "close",
            f"{check.elements:,}",
            f"{check.differing:,}",
            f"{check.max_abs:.3g}",
            f"{check.distance:.2g}",
        )
        for check in found.checks
    ]
    if not found.ok:
        verdict = f"Differs: {', '.join(found.differs) or 'the compiled model, end to end'}."
    else:
        verdict = "Every rewrite agrees with what it replaced." if lines else "Nothing was rewritten."
    columns = ("rule", "graph", "rewrites", "promise", "elements", "differing", "max difference", "relative distance")
    return Section("Each rewrite against what it replaced", verdict, columns, lines, ok=found.ok)


def diff_lines(graph: GraphReport) -> list[tuple[str, str]]:
    """(kind, line) of a graph's unified diff; kind is "add", "del", "at" or "same". Empty when nothing changed."""
    before, after = graph.before.splitlines(), graph.after.splitlines()
    lines = list(difflib.unified_diff(before, after, lineterm=""))[2:]
    kinds = {"+": "add", "-": "del", "@": "at"}
    return [(kinds.get(line[:1], "same"), line) for line in lines]


def folded(lines: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same lines, equal layers once, and behind them a line of the kind "at" that says how many more there are."""
    found, at = [], 0
    for line, turns, period in text.folded([line for _, line in lines]):
        if turns:
            times = f"{turns} more time{'s'[: turns != 1]}"
            found.append(("at", f"⋯ {times}, {period} lines each, which differ in nodes' numbers alone"))
            at += turns * period
        else:
            found.append((lines[at][0], line))
            at += 1
    return found


def versions() -> dict[str, str]:
    """What the report was made with."""
    import torch

    import inductor_ext

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: the ops run their references"
    return {
        "inductor_ext": inductor_ext.__version__,
        "torch": str(torch.__version__),
        "CUDA": torch.version.cuda or "not in this torch",
        "GPU": gpu,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _kernels(graphs: list[GraphReport]) -> list[dict[str, Any]]:
    """Kernels of all graphs, each once."""
    found = {str(kernel): kernel for graph in graphs for kernel in graph.kernels}
    return list(found.values())


def _settings() -> list[tuple[str, str, str, str, bool]]:
    """(option, variable, value, doc, differs from the default) of every option as it is now."""
    chosen = settings.current()
    found = []
    for name, env, default, doc in settings.table():
        value = str(getattr(chosen, name))
        found.append((name, env, value, doc, value != default))
    return found
