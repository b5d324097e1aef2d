"""The one pass that Inductor runs: it applies the rules in order and collects what happened.

It is set as ``post_grad_custom_post_pass``, after whatever pass was there before. Its ``uuid`` covers all sources, the settings
and the wrapped pass, so that Inductor's FX-graph cache and AOTAutograd's cache stay usable and never serve a stale graph.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._inductor import custom_graph_pass
from torch.fx import Graph, Node
from torch.fx.passes.graph_transform_observer import GraphTransformObserver

from inductor_ext import graph as graphs
from inductor_ext import jit, plan, registry, torch_compat
from inductor_ext.calls import by_position
from inductor_ext.miss import DEVICE, Miss
from inductor_ext.op import device_of
from inductor_ext.report import store
from inductor_ext.report.events import GraphReport, Refusal, Rewrite
from inductor_ext.rule import Call, Context, Match, Rule, module_path, source_line
from inductor_ext.settings import RuleMode, Settings

log = logging.getLogger("inductor_ext")

#: A pass that is told whether the graph is for inference exists from torch 2.12 on.
PassBase: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", custom_graph_pass.CustomGraphPass)

#: Called with (rule name, graph text before, graph after as a deep copy) by `verify`; None otherwise.
Observer = Callable[[str, Graph], None]

_graph_counter = threading.local()

#: Whether an exception in a rule ends the compile, as our own tests want it. Else it costs that rule and a warning.
RAISE = False


class _RuleError(Exception):
    """A replacement failed, and may have left the graph half changed."""

    def __init__(self, rule: Rule, failure: Refusal) -> None:
        super().__init__(failure.found)
        self.rule, self.failure = rule, failure


class RewritePass(PassBase):
    """Runs the rules of ``settings`` over a post-grad graph.

    ``observer`` gets a look at the graph before the first rule ("") and after each rule that changed it. ``on_report`` gets the
    `GraphReport` of every graph: at once or, with ``later``, in `finish`. Then the pass does not wait for kernels: they are
    built while Inductor goes on.
    """

    def __init__(
        self,
        settings: Settings,
        previous: Any = None,
        on_report: Callable[[GraphReport], None] | None = None,
        observer: Observer | None = None,
        *,
        later: bool = False,
    ) -> None:
        self.settings = settings
        self.previous = previous
        self.on_report = on_report
        self.observer = observer
        self._report: GraphReport | None = None  # of the graph that is being compiled
        self.report_keys: list[str] = []  # of the reports of this pass, under which they are counted
        self.later = later
        self.failed: dict[jit.JitSpec, Exception] = {}  # kernels that a graph compiled before could not have
        self._made: list[GraphReport] = []  # since the last `finish`, and the kernels that are being built for them
        self._started: list[jit.Started] = []
        self._warned: set[tuple[str, str]] = set()

    def uuid(self) -> Any:
        previous = torch_compat.uuid_of_pass(self.previous)
        if previous is None:  # a bare function: Inductor must not cache what it cannot name
            return None
        rules = tuple(sorted(self.settings.rules.items()))
        return (
            "inductor_ext",
            registry.source_digest().hex(),
            rules,
            self.settings.build,
            self.settings.arch,
            self.settings.prefill_only,
            self.settings.checks,
            tuple(sorted(spec.describe() for spec in self.failed)),
            tuple(rule.environment() for rule in self._rules()),
            previous,
        )

    def __call__(self, graph: Graph, is_inference: bool = True) -> None:
        torch_compat.run_pass(self.previous, graph, is_inference)
        started = time.perf_counter()
        torch_compat.sort(graph)  # a user's pass may leave its nodes in any order: Inductor sorts them, but later
        by_position(graph)
        graph.eliminate_dead_code()  # functionalisation leaves dead views behind, which would count as users
        report = GraphReport(name=_next_name())
        report.before = graphs.text_of(graph)
        if self.observer:
            self.observer("", graph)
        kernels = self._rewrite(graph, report)
        if report.rewrites:
            torch_compat.check_aot_inductor()
        report.after = graphs.text_of(graph)
        report.kernels = [spec.to_dict() for spec, module in kernels.items() if not isinstance(module, Exception)]
        report.seconds = time.perf_counter() - started
        self._report = report
        self.report_keys.append(store.publish(report))
        if self.later:
            self._made.append(report)
        elif self.on_report:
            self.on_report(report)

    def finish(self, others: dict[jit.JitSpec, Any]) -> bool:
        """Wait for the kernels that were started since the last call, and give the reports of their graphs to ``on_report``.

        ``others`` are kernels that what was compiled since needs too. False where one cannot be had and that is news: `failed`
        says so then, the reports are withdrawn, and all that was compiled since has to be compiled again.
        """
        made, started = self._made, self._started
        self._made, self._started = [], []
        kernels = {**others, **{spec: module for each in started for spec, module in each.result().items()}}
        lacking = {spec: found for spec, found in kernels.items() if isinstance(found, Exception) and spec not in self.failed}
        self.failed.update(lacking)
        for report in reversed(made if lacking else ()):
            store.withdraw(self.report_keys.pop(), report)
        if self.on_report and not lacking:
            for report in made:
                self.on_report(report)
        return not lacking

    def stop(self) -> None:
        """The compile has ended early: nobody waits for kernels any more."""
        for each in self._started:
            each.stop()
        self._made, self._started = [], []

    def _rewrite(self, graph: Graph, report: GraphReport) -> dict[jit.JitSpec, Any]:
        """Apply all rules, then have the kernels of what they made, all together; those kernels, with their modules.

        Where a rule fails half-way, or a kernel cannot be had, all rules run again on the graph as it was, without them.
        """
        kernels: dict[jit.JitSpec, Any] = dict(self.failed)
        failures: list[_RuleError] = []
        restore = graphs.snapshot(graph)
        while True:
            rules = [rule for rule in self._rules() if all(rule is not failure.rule for failure in failures)]
            try:
                for rule in rules:
                    self._apply(rule, graph, report, kernels)
                needed = plan.kernels_of(graph, jit.current_arch(self.settings))
                if not self._lack(needed, kernels):
                    return {spec: kernels.get(spec) for spec in needed}
            except _RuleError as failure:
                failures.append(failure)
            restore()
            if self.observer:
                self.observer("", graph)
            report.rewrites.clear()
            report.refusals[:] = [each.failure for each in failures]

    def add_autotuned(self, line: str, kernel: jit.JitSpec | None) -> None:
        """Inductor's autotuner, which runs after this pass, chose between kernels: ``kernel``, if one of ours has won."""
        if self._report is not None:
            self._report.autotuned.append(line)
            if kernel is not None and kernel.to_dict() not in self._report.kernels:
                self._report.kernels.append(kernel.to_dict())
            self.report_keys[-1] = store.amend(self.report_keys[-1], self._report)

    def _mode(self, rule: Rule) -> RuleMode:
        return self.settings.rules.get(rule.name, "auto")

    def _rules(self) -> list[Rule]:
        return [rule for rule in registry.rules() if self._mode(rule) != "off"]

    # ---- kernels ----------------------------------------------------------------------------------------------------

    def _lack(self, needed: list[jit.JitSpec], kernels: dict[jit.JitSpec, Any]) -> bool:
        """Build or load what is not in ``kernels`` yet, in parallel, and say whether a rewrite has to do without one of it.

        With ``later`` that is only begun, and `finish` says it.
        """
        unknown = [spec for spec in needed if spec not in kernels]
        if not unknown or self.settings.build == "defer":
            return False
        if self.later:
            self._started.append(jit.start(unknown, self.settings))
            return False
        made = jit.prepare(unknown, self.settings)
        kernels.update(made)
        lacking = [module for module in made.values() if isinstance(module, Exception)]
        if lacking and self.settings.build == "require":  # asked for: no cold build and no stock operators behind one's back
            raise lacking[0]
        return bool(lacking)

    def _specs(self, calls: tuple[Call, ...]) -> list[jit.JitSpec]:
        """The kernels of calls on a CUDA device; the reference needs none."""
        arch = jit.current_arch(self.settings)
        found = []
        for made in calls:
            if arch and device_of(made.args).type == "cuda":
                found += made.op.specs(made.args, arch)
        return found

    def _check_kernels(self, match: Match, kernels: dict[jit.JitSpec, Any]) -> None:
        """Miss where the device or a failed build rules a match out."""
        for made in match.calls:
            device = device_of(made.args)
            if device.type not in ("cpu", "cuda"):
                raise Miss(DEVICE, match.node, "cuda or cpu", str(device))
            if device.type == "cuda" and made.op.kernel is not None:
                have, need = torch.cuda.get_device_capability(device), made.op.kernel.min_capability
                if have < need:
                    wanted = f"compute capability {need[0]}.{need[1]} or later"
                    raise Miss(DEVICE, match.node, wanted, f"{have[0]}.{have[1]}")
        if not any(isinstance(module, Exception) for module in kernels.values()):
            return
        for spec in self._specs(match.calls):
            if isinstance(kernels.get(spec), Exception):
                raise Miss("kernel not available", match.node, f"kernel {spec.describe()}", str(kernels[spec]))

    # ---- one rule ---------------------------------------------------------------------------------------------------

    def _apply(self, rule: Rule, graph: Graph, report: GraphReport, kernels: dict[jit.JitSpec, Any]) -> None:
        context = Context(rule.name, self._mode(rule), self.settings)
        before = len(report.rewrites)

        def run(graph: Graph) -> None:
            for anchor in self._anchors(rule, graph):
                if not anchor._erased:
                    self._visit(rule, context, anchor, report, kernels)

        # PyTorch's compiler bisector switches passes off by the observer's name, and so can name a bad rule.
        owner = graph.owning_module
        if owner is None:
            run(graph)
        else:
            name = f"inductor_ext.{rule.name}"
            GraphTransformObserver(owner, name, subsystem="post_grad_passes").apply_graph_pass(run)
        if len(report.rewrites) > before:
            with self._contained(rule, graph.output_node()):
                graph.lint()
            if self.observer:
                self.observer(rule.name, graph)

    def _visit(self, rule: Rule, context: Context, anchor: Node, report: GraphReport, kernels: dict[jit.JitSpec, Any]) -> None:
        found = self._guarded(rule, anchor, context, kernels)
        if isinstance(found, Refusal):
            report.refusals.append(found)
        elif found is not None:
            op_names = "+".join(made.op.name for made in found.calls)
            where = source_line(found.node), module_path(found.node)
            event = Rewrite(rule.name, found.node.name, where[0], op_names, found.detail, found.why, where[1])
            with self._contained(rule, anchor):
                rule.replace(found)
            report.rewrites.append(event)

    # ---- errors in rules --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _contained(self, rule: Rule, anchor: Node) -> Iterator[None]:
        """Around what changes the graph: `_rewrite` goes back to before the first rule, and leaves this one out."""
        try:
            yield
        except Exception as error:
            if RAISE:
                raise
            raise _RuleError(rule, self._failure(rule, anchor, error)) from error

    def _anchors(self, rule: Rule, graph: Graph) -> list[Node]:
        try:
            return list(rule.anchors(graph))
        except Exception as error:
            if RAISE:
                raise
            self._failure(rule, graph.output_node(), error)
            return []

    def _guarded(self, rule: Rule, anchor: Node, context: Context, kernels: dict[jit.JitSpec, Any]) -> Match | Refusal | None:
        """What ``rule`` says of ``anchor``: the one place where a `Miss` becomes a near miss."""
        try:
            match = rule.guard(anchor, context)
            if match is not None:
                _check_arguments(match)
                self._check_kernels(match, kernels)
            return match
        except Miss as miss:
            return _refusal(rule, miss)
        except Exception as error:
            if RAISE:
                raise
            return self._failure(rule, anchor, error)

    def _failure(self, rule: Rule, anchor: Node, error: Exception) -> Refusal:
        """The refusal for a rule's own exception, and one warning."""
        found = f"{type(error).__name__}: {error}"[:300]
        if (rule.name, found) not in self._warned:
            self._warned.add((rule.name, found))
            log.warning("the rule %s failed, which is an error in it, and is left out: %s", rule.name, found)
            log.debug("where the rule %s failed", rule.name, exc_info=error)
        return _refusal(rule, Miss("the rule failed", anchor, "a rule without errors; please report this one", found))


def _refusal(rule: Rule, miss: Miss) -> Refusal:
    node = miss.node
    return Refusal(rule.name, node.name, source_line(node), miss.reason, miss.wanted, miss.found, module_path(node))


def _check_arguments(match: Match) -> None:
    """Miss where an op would not take its arguments: a graph may hold what its own operators refuse when they run."""
    for made in match.calls:
        try:
            made.op.fake(*made.args)
        except (TypeError, ValueError) as error:
            wanted = f"arguments that {made.op.name} takes"
            raise Miss("the op does not take these arguments", match.node, wanted, str(error)) from None


def _next_name() -> str:
    count = getattr(_graph_counter, "count", 0)
    _graph_counter.count = count + 1
    return f"graph {count}"
