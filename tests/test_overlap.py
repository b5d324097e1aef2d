"""Kernels are built while Inductor goes on; a graph whose kernel cannot be had is compiled once more, without it.

There is no GPU: what a graph on the CPU would need on one is named by the test, and the compiled function runs references.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from inductor_ext import jit, plan, registry
from inductor_ext.errors import BuildError
from inductor_ext.jit import parallel
from inductor_ext.passes import RewritePass
from inductor_ext.settings import Settings
from tests.support.compiled import Recorder

OP = next(op for op in registry.ops() if op.name == "fp8_downcast")
SPEC = OP.examples("sm_90a")[0]
ALWAYS = {"fp8_downcast": "always"}


def _chain(x: torch.Tensor) -> torch.Tensor:
    return (x.float() / 0.5).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def _trained(x: torch.Tensor) -> torch.Tensor:
    return (x * x) * _chain(x.detach()).float()


class Builds:
    """Every call of `fp8_downcast` needs `SPEC`, whose build ends when ``ends`` is set, or has failed where ``broken``."""

    def __init__(self, patch: pytest.MonkeyPatch, broken: bool = False) -> None:
        self.broken, self.asked, self.ends, self.compiled = broken, 0, threading.Event(), threading.Event()
        self.ends.set()
        patch.setattr(plan, "kernels_of", lambda graph, arch: self._needed(node.target for node in graph.nodes))
        patch.setattr(RewritePass, "_specs", lambda self_, calls: self._needed(call.op.overload for call in calls))
        patch.setattr(parallel, "prepare", self.prepare)
        patch.setattr(jit, "prepare", self.prepare)

    def _needed(self, targets: Any) -> list[jit.JitSpec]:
        return [SPEC] if OP.overload in list(targets) else []

    def prepare(self, specs: Any, settings: Any, stopped: Any = None) -> dict[Any, Any]:
        self.asked += 1
        assert self.ends.wait(60), "nothing went on while it was built"
        return {spec: BuildError("no kernel today") if self.broken else object() for spec in specs}


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(monkeypatch)


@contextlib.contextmanager
def _caches(folder: Path, autograd: bool = False) -> Iterator[None]:
    import torch._functorch.config
    import torch._inductor.config

    with (
        torch._inductor.config.patch(fx_graph_cache=True, fx_graph_remote_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=autograd),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        yield


def _run(fn: Callable[..., Any] = _chain, grad: bool = False, **options: Any) -> tuple[Any, Recorder]:
    torch._dynamo.reset()
    recorder = Recorder(rules=ALWAYS, **options)
    x = torch.linspace(-300, 300, 4096).view(8, 512).requires_grad_(grad)
    out = torch.compile(fn, backend=recorder)(x)
    assert torch.equal(out.detach().view(torch.uint8), fn(x).detach().view(torch.uint8))
    return out, recorder


def test_inductor_goes_on_while_kernels_are_built(builds: Builds, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The build ends only once code was generated, which is after the pass."""
    from torch._inductor.graph import GraphLowering

    builds.ends.clear()
    generate = GraphLowering.codegen

    def generated(self: Any) -> Any:
        builds.ends.set()
        return generate(self)

    monkeypatch.setattr(GraphLowering, "codegen", generated)
    with _caches(tmp_path):
        _, recorder = _run()
    (report,) = recorder.reports
    assert report.counts() == {"fp8_downcast": 1} and report.kernels == [SPEC.to_dict()] and builds.asked == 1


def test_a_graph_whose_kernel_fails_is_compiled_again_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    builds = Builds(monkeypatch, broken=True)
    counted = dict(counters["inductor"])
    with _caches(tmp_path):
        _, recorder = _run()
    (report,) = recorder.reports
    assert report.counts() == {} and report.kernels == [] and report.before == report.after and builds.asked == 1
    (refusal,) = report.refusals
    assert (refusal.reason, refusal.found) == ("kernel not available", "no kernel today")
    assert counters["inductor"]["inductor_ext.fp8_downcast"] == counted.get("inductor_ext.fp8_downcast", 0)


@pytest.mark.parametrize("autograd", [False, True])
def test_a_cached_graph_whose_kernel_is_gone_is_compiled_without_it(
    builds: Builds, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, autograd: bool
) -> None:
    """Inductor's graph cache tells nobody that a kernel has to exist. AOTAutograd's gives back all at once: it then runs the
    reference, with a warning."""
    with _caches(tmp_path, autograd):
        assert _run()[1].counts() == {"fp8_downcast": 1}
        builds.broken = True
        again = _run()[1]
        assert len(again.reports) == 1 and again.counts() == ({"fp8_downcast": 1} if autograd else {})
        builds.broken = False
        assert _run()[1].counts() == {"fp8_downcast": 1}, "what was compiled without the kernel has another name in the cache"


def test_a_cached_graph_is_reported_once(builds: Builds, tmp_path: Path) -> None:
    with _caches(tmp_path):
        _run()
        _, recorder = _run()
    (report,) = recorder.reports
    assert report.cached and report.counts() == {"fp8_downcast": 1} and builds.asked == 2


def test_a_training_step_reports_both_of_its_graphs(builds: Builds, tmp_path: Path) -> None:
    with _caches(tmp_path):
        out, recorder = _run(_trained, grad=True)
        assert len(recorder.reports) == 1
        _run(torch.neg)  # another graph, compiled in between, is not this one's
        out.sum().backward()
    assert [report.counts() for report in recorder.reports] == [{"fp8_downcast": 1}] * 2, "backward computes the chain again"


def test_a_compile_that_ends_early_stops_its_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor.graph import GraphLowering

    stopped: list[bool] = []

    class Never(jit.Started):
        def __init__(self, specs: Any, settings: Any) -> None: ...

        def stop(self) -> None:
            stopped.append(True)

    def fail(self: Any) -> Any:
        raise RuntimeError("no code today")

    Builds(monkeypatch)
    monkeypatch.setattr(jit, "start", Never)
    monkeypatch.setattr(GraphLowering, "codegen", fail)
    with _caches(tmp_path), pytest.raises(Exception, match="no code today"):
        _run()
    assert stopped == [True]


@pytest.mark.parametrize("build", ["require", "never"])
def test_who_forbids_builds_has_the_answer_before_anything_is_compiled(
    build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Builds(monkeypatch, broken=True)
    monkeypatch.setattr(jit, "start", None)
    with _caches(tmp_path):
        if build == "require":
            with pytest.raises(Exception, match="no kernel today"):
                _run(build=build)
        else:
            assert _run(build=build)[1].counts() == {}


def test_no_compiler_starts_once_it_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ends = threading.Event(), threading.Event()
    loaded: list[jit.JitSpec] = []

    def load(spec: jit.JitSpec, settings: Settings) -> object:
        loaded.append(spec)
        begun.set()
        assert ends.wait(60)
        return object()

    monkeypatch.setattr(parallel, "try_load", lambda spec, settings: None)
    monkeypatch.setattr(parallel, "load", load)
    first, second = OP.examples("sm_90a")[:2]
    started = jit.start([first, second], Settings(build_jobs=1, progress=False))
    assert begun.wait(60)
    started.stop()
    ends.set()
    results = started.result()
    assert loaded == [first] and isinstance(results[second], BuildError) and results[second].transient
