"""``inductor-ext rules`` and ``rules show NAME``: the rewrite rules, and their own examples run on the CPU."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from inductor_ext import registry
from inductor_ext.cli.common import Group, JsonOption, print_json, stdout, table
from inductor_ext.report import text
from inductor_ext.rule import Example, Rule

app = typer.Typer(cls=Group, help="List the rewrite rules; `rules show NAME` runs one's examples.", invoke_without_command=True)


@app.callback()
def rules(context: typer.Context, as_json: JsonOption = False) -> None:
    if context.invoked_subcommand:
        return
    found = [describe(rule) for rule in registry.rules()]
    if as_json:
        print_json(found)
        return
    shown = table("rule", "what it does", "result", "matches", "near misses")
    for rule in found:
        promise = "bit-exact" if rule["exact"] else f"not exact: {rule['cost']}"
        cells = (rule["doc"], promise, str(rule["matches"]), str(rule["near_misses"]))
        shown.add_row(Text(rule["name"], "bold"), *map(Text, cells))
    stdout().print(shown)
    stdout().print("They run in this order. `inductor-ext rules show NAME` shows what one matches.", style="dim")


def describe(rule: Rule) -> dict[str, Any]:
    return {
        "name": rule.name,
        "doc": rule.doc,
        "exact": rule.exact,
        "cost": rule.cost,
        "matches": len(rule.matches),
        "near_misses": len(rule.near_misses),
    }


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an example did. ``ok``: it was rewritten as often, or refused for the reason, that it says."""

    example: str
    kind: str
    ok: bool
    rewrites: int
    refusals: tuple[dict[str, str], ...]
    diff: str


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A rule, as `inductor-ext rules` lists them.")],
    example: Annotated[str, typer.Option(help="Only this example.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Run a rule's examples on the CPU: the graph's diff of what it matches, the reason for what it refuses."""
    rule = registry.rule_named(name)
    examples = [found for found in (*rule.matches, *rule.near_misses) if example in ("", found.name)]
    if not examples:
        names = ", ".join(found.name for found in (*rule.matches, *rule.near_misses))
        raise typer.BadParameter(f"{name} has no example {example!r}; its examples are {names}", param_hint="--example")
    if not as_json:
        stdout().print(Text.assemble((rule.name, "bold"), f": {rule.doc}"))
        stdout().print(Text(inspect.getdoc(inspect.getmodule(rule.guard)) or "", "dim"))
    outcomes = []
    for one in examples:
        outcomes.append(run(rule, one))
        if not as_json:
            _print(stdout(), outcomes[-1])
    if as_json:
        print_json([dataclasses.asdict(outcome) for outcome in outcomes])
    if not all(outcome.ok for outcome in outcomes):
        raise typer.Exit(1)


def run(rule: Rule, example: Example) -> Outcome:
    """An example through `explain`, with every rule off that it does not need."""
    import torch

    import inductor_ext

    torch.manual_seed(0)
    modes: dict[str, Any] = {other.name: "off" for other in registry.rules()} | example.modes(rule.name)
    found = inductor_ext.explain(example.fn, *example.inputs("cpu"), rules=modes, dynamic=example.dynamic or None)
    rewrites = sum(event.rule == rule.name for event in found.rewrites)
    misses = [miss for miss in found.refusals if miss.rule == rule.name]
    reasons = {miss.reason for miss in misses}
    ok = example.reason in reasons and not rewrites if example.reason else rewrites == example.count
    refusals = tuple(dataclasses.asdict(miss) for miss in misses)
    return Outcome(example.name, "near miss" if example.reason else "match", ok, rewrites, refusals, found.diff())


def _print(console: Console, outcome: Outcome) -> None:
    mark = ("✓ ", "green") if outcome.ok else ("✗ ", "bold red")
    console.print(Text.assemble("\n", mark, (f"{outcome.kind} {outcome.example}", "bold")))
    if outcome.diff:
        console.print(text.diff(outcome.diff), soft_wrap=True)
    for miss in outcome.refusals:
        facts = ("wanted", "found", "source")
        console.print(Text("\n".join([f"  {miss['reason']}", *(f"    {fact:7}{miss[fact]}" for fact in facts)])))
