"""The rewrites as a pass object, for those who call Inductor themselves: pass managers, `standalone_compile`, AOTInductor.

    p = inductor_ext.graph_pass(rules={"scaled_mm": "auto"}, strict=True, on_report=print)
    with torch._inductor.config.patch(post_grad_custom_post_pass=p):
        model(*inputs)
    p.complete()

It does what the backend does: ops and lowerings are defined when it is made, outputs are buffers that Inductor plans, and the
kernels of a graph are there before its compile ends. It waits for them, since it sees no more of the compile than its own part.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from typing import Any

from torch.fx import Graph

from inductor_ext import jit, passes, registry, settings, strict, torch_compat
from inductor_ext.backend import announce, prepare_kernels
from inductor_ext.report import store
from inductor_ext.report.events import GraphReport
from inductor_ext.settings import Settings


class GraphPass(passes.PassBase):
    """See `graph_pass`, which makes it. One for each model: ``strict`` is about the graphs of one."""

    def __init__(
        self,
        chosen: Settings,
        *,
        first: Any = None,
        then: Any = None,
        on_report: Callable[[GraphReport], None] | None = None,
    ) -> None:
        registry.check_rules(chosen)
        registry.define_lowerings()  # a cached graph does not run the pass and calls the ops all the same
        torch_compat.trace_scaled_mm_v2()
        self.settings, self.first, self.then, self.on_report = chosen, first, then, on_report
        self._tally = strict.Tally()
        self._running: passes.RewritePass | None = None
        self._keys: list[str] = []  # of the reports that were made here, since `_before`
        self._before = store.snapshot()

    def __call__(self, graph: Graph, is_inference: bool = True) -> None:
        self._keep_keys()
        self._running = passes.RewritePass(self.settings, self.first, self._tell)
        self._running(graph, is_inference)
        torch_compat.run_pass(self.then, graph, is_inference)

    def uuid(self) -> str | None:
        """The same text in each process, for sources, settings and the other passes that are the same; JSON can hold it.

        None where one of the other passes has none: Inductor then keeps nothing of what they have changed.
        """
        own, then = passes.RewritePass(self.settings, self.first).uuid(), torch_compat.uuid_of_pass(self.then)
        if own is None or then is None:
            return None
        return hashlib.sha256(_plain((own, then)).encode()).hexdigest()

    def complete(self) -> None:
        """Say that all graphs of the model are compiled.

        Graphs that Inductor's caches gave back whole did not run the pass: their reports reach ``on_report`` now, and their
        kernels are loaded or built now and not at the first call. With ``strict``, raises ``StrictError`` where a rule that was
        asked for matched in none of the graphs.
        """
        self._keep_keys()
        replayed = [report for _, report in store.replayed(self._before, self._keys)]
        self._before, self._keys = store.snapshot(), []
        lacking = [found for found in prepare_kernels(replayed, self.settings).values() if isinstance(found, Exception)]
        if lacking and self.settings.build == "require":
            raise lacking[0]
        for report in replayed:
            self._tell(report)
        if self.settings.strict and self._tally.compiles:  # of none nothing is known: a cache that keeps no reports gave them
            self._tally.check()

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        """Asked by vLLM's pass manager: always."""
        return True

    def is_applicable_for_shape(self, shape: Any) -> bool:
        """Asked by SGLang's and earlier vLLM's: always."""
        return True

    def add_autotuned(self, told: str, kernel: jit.JitSpec | None) -> None:
        """Inductor's autotuner chose between kernels for the graph that is being compiled."""
        if self._running is not None:
            self._running.add_autotuned(told, kernel)

    def _keep_keys(self) -> None:
        if self._running is not None:
            self._keys += self._running.report_keys  # not before: the autotuner amends the last of them
        self._running = None

    def _tell(self, report: GraphReport) -> None:
        self._tally.add([report], self.settings)
        announce(report)
        if self.on_report:
            self.on_report(report)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphPass:
        """Itself: frameworks copy the configuration that holds it, and what the copy sees is asked of the original."""
        return self

    def __reduce__(self) -> Any:
        """In another process: the same settings and passes, and no report. ``on_report`` belongs to this process."""
        return _made, (self.settings, self.first, self.then)


def _made(chosen: Settings, first: Any, then: Any) -> GraphPass:
    return GraphPass(chosen, first=first, then=then)


def graph_pass(
    *, first: Any = None, then: Any = None, on_report: Callable[[GraphReport], None] | None = None, **options: Any
) -> GraphPass:
    """The rewrites as one pass, for Inductor's ``post_grad_custom_post_pass`` or a pass manager that runs there.

    ``first`` and ``then``: another pass, or a list of them, that runs before or behind ours. ``on_report`` gets the
    `GraphReport` of each graph. Everything else is an option of ``Settings``, as `inductor_ext.backend` takes them; unknown
    ones raise ``SettingError`` here. Call `GraphPass.complete` when the model has been compiled.
    """
    return GraphPass(settings.current(**options), first=first, then=then, on_report=on_report)


def _plain(value: Any) -> str:
    """Text that is the same in every process for equal values, which ``repr`` of an object of any class need not be."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_plain, value))})"
    if value is None or isinstance(value, (str, bytes, int, float)):
        return repr(value)
    return hashlib.sha256(pickle.dumps(value)).hexdigest()
