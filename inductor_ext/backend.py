"""The torch.compile backend: Inductor with the rewrite pass added.

``torch.compile(model, backend="inductor_ext")`` finds `inductor_ext` through the entry point; `backend` makes a configured one.
``mode=`` and ``options=`` mean what they mean for Inductor; ``options`` may also hold this package's own (``rules``,
``strict``, …: see ``settings.py``). A post-grad pass that is already set, in the options or in Inductor's config, runs first.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from inductor_ext import graph as graphs
from inductor_ext import jit, registry, settings, strict, torch_compat
from inductor_ext.report import store
from inductor_ext.report.events import GraphReport
from inductor_ext.report.shown import line
from inductor_ext.settings import Settings

if TYPE_CHECKING:
    from inductor_ext.passes import RewritePass

log = logging.getLogger("inductor_ext")

OwnOptions = {field.name for field in dataclasses.fields(Settings)}
OnReport = Callable[[GraphReport], None]

#: Whether kernels are built while Inductor goes on. Tests that end a compile in its middle switch it off.
OVERLAP = True


def inductor_ext(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Any = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """The backend itself, as the entry point names it."""
    return compile_graph(gm, example_inputs, settings.current(), mode=mode, options=options)


def backend(**options: Any) -> Callable[..., Callable[..., Any]]:
    """A configured backend: ``torch.compile(model, backend=inductor_ext.backend(rules={"fp8_downcast": "always"}))``.

    Takes every option of ``Settings``; unknown names, modes and rules raise ``SettingError`` here. ``strict`` counts over all
    graphs that it compiles: make one for each model (see `inductor_ext.strict`).
    """
    snapshot = settings.current(**options)
    registry.check_rules(snapshot)
    torch_compat.trace_scaled_mm_v2()
    tally = strict.Tally()

    def configured(gm: Any, example_inputs: Any, *, mode: Any = None, options: Any = None, **kwargs: Any) -> Any:
        return compile_graph(gm, example_inputs, snapshot, mode=mode, options=options, tally=tally)

    return configured


def compile_graph(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    chosen: Settings,
    *,
    mode: str | None = None,
    options: Any = None,
    on_report: OnReport | None = None,
    observer: Any = None,
    inner_compile: Callable[..., Any] | None = None,
    inductor_options: dict[str, Any] | None = None,
    tally: strict.Tally | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph with Inductor and the rules of ``chosen``.

    ``on_report`` gets the report of every graph, cached ones too; ``observer`` and ``inner_compile`` are for `verify`.
    ``tally`` holds what earlier graphs of the model have matched.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    from inductor_ext.passes import RewritePass

    patches, own = _split_options(mode, options)
    chosen = chosen.replace(**own)
    registry.check_rules(chosen)
    registry.define_lowerings()
    torch_compat.trace_scaled_mm_v2()
    patches.update(inductor_options or {})
    previous = torch_compat.previous_post_grad_pass(patches)
    later = OVERLAP and chosen.build == "compile" and inner_compile is None and observer is None
    session = _Session(chosen, on_report, tally or strict.Tally())
    patches["post_grad_custom_post_pass"] = rewrite = RewritePass(chosen, previous, session.tell, observer, later=later)
    session.follow(rewrite)
    inner = inner_compile or compile_fx_inner
    compiled = compile_fx(
        gm, example_inputs, inner_compile=session.overlapped(inner) if later else inner, config_patches=patches
    )
    session.finish()
    return cast(Callable[..., Any], compiled)


class _Session:
    """Reports of one backend call: those of graphs compiled now, and those replayed from a cache."""

    def __init__(self, chosen: Settings, on_report: OnReport | None, tally: strict.Tally) -> None:
        self.chosen = chosen
        self.on_report = on_report
        self.tally = tally
        self.reports: list[GraphReport] = []

    def follow(self, rewrite: RewritePass) -> None:
        self.rewrite = rewrite
        self._before = store.snapshot()
        self._told: list[str] = []  # keys of reports that `overlapped` had from a cache

    def overlapped(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """``inner``, which compiles a graph, while kernels are built; once more, without them, where some cannot be had.

        On 16 cores the kernels of a new model take as long as the rest of what Inductor does after the pass, 10 s.
        """

        @functools.wraps(inner)
        def compile_inner(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
            while True:
                again = graphs.copied(gm)  # compiling changes it
                before, known = store.snapshot(), len(self.rewrite.report_keys)
                try:
                    compiled = inner(gm, example_inputs, **kwargs)
                    replayed = store.replayed(before, self.rewrite.report_keys[known:])
                    if self.rewrite.finish(self._kernels_of(report for _, report in replayed)):
                        break
                except BaseException:
                    self.rewrite.stop()
                    raise
                for key, report in replayed:
                    store.withdraw(key, report)
                torch_compat.compiles_again()
                gm = again
            for key, report in replayed:
                self._told.append(key)
                self.tell(report)
            return compiled

        return compile_inner

    def finish(self) -> None:
        """After the compile: reports of graphs that a cache gave back whole, and whether all was found that was asked for."""
        replayed = [report for _, report in store.replayed(self._before, [*self.rewrite.report_keys, *self._told])]
        self._kernels_of(replayed)
        for report in replayed:
            self.tell(report)
        if self.chosen.strict:
            strict.settle(self.tally, self.reports, self.chosen)

    def tell(self, report: GraphReport) -> None:
        self.reports.append(report)
        announce(report)
        if self.on_report:
            self.on_report(report)

    def _kernels_of(self, reports: Iterable[GraphReport]) -> dict[jit.JitSpec, Any]:
        return prepare_kernels(reports, self.chosen)


def prepare_kernels(reports: Iterable[GraphReport], chosen: Settings) -> dict[jit.JitSpec, Any]:
    """A cached graph calls kernels that were built once; build what is gone now, not at the first call."""
    kernels = [jit.JitSpec.from_dict(kernel) for report in reports for kernel in report.kernels]
    return jit.prepare(kernels, chosen) if kernels and chosen.build in ("compile", "require") else {}


def announce(report: GraphReport) -> None:
    """One INFO line, a DEBUG line for each near miss, and the whole report in TORCH_TRACE."""
    log.info("%s", report.summary())
    for refusal in report.refusals:
        told = f"{refusal.reason} (wanted {refusal.wanted}, found {refusal.found}) {refusal.source}"
        log.debug("%s", line(f"{refusal.rule}: {refusal.node} left alone: {told}"))
    _trace_artifact(report)


def _split_options(mode: str | None, options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inductor's patches of a mode and options, and this package's own options."""
    patches: dict[str, Any] = {}
    if mode and mode != "default":
        patches.update(torch._inductor.list_mode_options(mode))
    given = dict(options or {})
    own = {name: given.pop(name) for name in list(given) if name in OwnOptions}
    patches.update(given)
    return patches, own


def _trace_artifact(report: GraphReport) -> None:
    """Put the report into TORCH_TRACE, where tlparse finds it."""
    import json

    from torch._logging import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "inductor_ext_report", "encoding": "json"},
        payload_fn=lambda: json.dumps(report.to_dict()),
    )
