"""The backend as a person meets it: by name, configured, with modes, options, other passes, caches, training, strictness."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.custom_graph_pass import CustomGraphPass

import inductor_ext
from inductor_ext import jit
from inductor_ext.errors import BuildError, SettingError, StrictError
from inductor_ext.report.events import GraphReport
from tests.support.compiled import Recorder, run_compiled, run_copies
from tests.support.equal import assert_all_same_bytes, assert_same_bytes
from tests.support.fakegpu import fake_gpu
from tests.support.processes import run_python
from tests.support.rules import names_of

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def chain(x: Any, s: Any) -> Any:
    return (x.float() / s).clamp(-448.0, 448.0).to(E4)


def inputs(rows: int = 32) -> tuple[Any, ...]:
    return (torch.randn(rows, 64) * 99).bfloat16(), torch.tensor(0.5)


# ---- by name -----------------------------------------------------------------------------------------------------------


def test_by_name_without_importing_the_package(tmp_path: Path) -> None:
    run_python(
        """
        import sys, torch
        assert "inductor_ext" not in sys.modules
        assert "inductor_ext" in torch.compiler.list_backends()
        def f(x, s):
            return (x.float() / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        x, s = torch.randn(32, 64).bfloat16(), torch.tensor(0.5)
        found = torch.compile(f, backend="inductor_ext")(x, s)
        assert torch.equal(found.view(torch.uint8), f(x, s).view(torch.uint8))
        """,
        tmp_path,
    )


def test_importing_does_no_work(tmp_path: Path) -> None:
    run_python(
        """
        import os, sys, torch
        import torch._inductor  # makes its own cache directory
        before = set(os.listdir())
        import inductor_ext
        assert not torch.cuda.is_initialized()
        assert "torch._inductor.lowering" not in sys.modules and "tvm_ffi" not in sys.modules
        assert set(os.listdir()) == before
        """,
        tmp_path,
        HOME=str(tmp_path / "home"),
        XDG_CACHE_HOME=str(tmp_path / "xdg"),
    )
    assert not (tmp_path / "home").exists() and not (tmp_path / "xdg").exists()


# ---- configured --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": {"fp8_downcas": "auto"}}, r"no rule is called 'fp8_downcas'; rules are .*fp8_downcast"),
        ({"rules": {"fp8_downcast": "sometimes"}}, r"rules\['fp8_downcast'\]: wanted one of auto, always, off, found 'so"),
        ({"rules": "fp8_downcast"}, "rules: wanted a mapping of rule name to mode, found str"),
        ({"stric": True}, r"unknown option 'stric'; options are .*strict"),
        ({"build": "later"}, "option build: wanted one of compile, defer, never, require, found 'later'"),
    ],
)
def test_bad_options_are_named_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        inductor_ext.backend(**options)


def test_bad_options_in_compile_are_named() -> None:
    with pytest.raises(BackendCompilerFailed, match="no rule is called 'nothing'"):
        torch.compile(chain, backend="inductor_ext", options={"rules": {"nothing": "off"}})(*inputs())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no_such_key"):
        torch.compile(chain, backend="inductor_ext", options={"no_such_key": 1})(*inputs())


def test_bad_mode_is_named() -> None:
    with pytest.raises(Exception, match="fastest"):
        torch.compile(chain, backend="inductor_ext", mode="fastest")(*inputs())


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes(mode: str | None) -> None:
    given = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, recorder = run_compiled(chain, given, mode=mode)
    assert recorder.counts() == {"fp8_downcast": 1}
    assert_all_same_bytes(found, run_copies(chain, given))


def test_mode_sets_what_it_sets_for_inductor() -> None:
    seen: list[Any] = []

    class Look(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            seen.append((torch._inductor.config.triton.cudagraphs, torch._inductor.config.max_autotune))

        def uuid(self) -> Any:
            return b"look"

    with torch._inductor.config.patch(post_grad_custom_post_pass=Look(), fx_graph_cache=False):
        for mode in (None, "reduce-overhead", "max-autotune"):
            torch._dynamo.reset()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.compile(chain, backend="inductor_ext", mode=mode)(*inputs())
    assert seen == [(False, False), (True, False), (True, True)]


def test_options_of_inductor_and_of_ours_together() -> None:
    given, seen = inputs(), Mark("both")
    options = {"max_autotune": True, "rules": {"fp8_downcast": "off"}, "post_grad_custom_post_pass": seen}
    found = torch.compile(chain, backend="inductor_ext", options=options)(*given)
    assert_same_bytes(found, chain(*given))
    assert len(seen.seen) == 1


def test_options_override_the_configured_backend() -> None:
    recorder = Recorder(rules={"fp8_downcast": "off"})
    torch.compile(chain, backend=recorder)(*inputs())
    assert recorder.counts() == {}
    torch._dynamo.reset()
    torch.compile(chain, backend=recorder, options={"rules": {"fp8_downcast": "always"}})(*inputs())
    assert recorder.counts() == {"fp8_downcast": 1}


def test_environment_sets_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_RULES", "fp8_downcast=off")
    _, recorder = run_compiled(chain, inputs())
    assert recorder.counts() == {}


def test_a_rule_that_is_off_neither_rewrites_nor_complains() -> None:
    def sine(x: Any, s: Any) -> Any:
        return chain(torch.sin(x), s)

    _, recorder = run_compiled(sine, inputs(), rules={"fp8_downcast": "off"})
    assert recorder.counts() == {} and recorder.refusals("fp8_downcast") == []
    _, recorder = run_compiled(sine, inputs(), rules={"fp8_downcast": "always"})
    assert recorder.counts() == {"fp8_downcast": 1}


# ---- strict ------------------------------------------------------------------------------------------------------------


def test_strict_names_the_rule_and_its_near_miss() -> None:
    backend = inductor_ext.backend(rules={"fp8_downcast": "auto", "fp8_quantize": "off"}, strict=True)
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(lambda x, s: chain(torch.sin(x), s), backend=backend)(*inputs())
    assert isinstance(caught.value.inner_exception, StrictError)
    message = str(caught.value.inner_exception)
    assert message.startswith("strict=True: fp8_downcast matched nothing in this graph\n  fp8_downcast at ")
    assert "Inductor fuses this chain into its producer for free; wanted a graph input, " in message
    assert "found aten.sin.default 'sin'" in message and "test_backend.py:" in message


def test_strict_without_a_near_miss() -> None:
    backend = inductor_ext.backend(rules={"downcast_fp8": "auto"}, strict=True)
    with pytest.raises(BackendCompilerFailed, match="no near miss either: the graph holds nothing like it"):
        torch.compile(chain, backend=backend)(*inputs())


def test_strict_is_satisfied_on_a_cache_hit_too() -> None:
    backend = inductor_ext.backend(rules={"fp8_downcast": "auto"}, strict=True)
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(chain, backend=backend)(*inputs())


# ---- other passes ------------------------------------------------------------------------------------------------------


class Mark(CustomGraphPass):
    """Notes what it saw: our ops must not be there yet."""

    def __init__(self, name: str = "mark") -> None:
        self.name = name
        self.seen: list[list[str]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.seen.append(names_of(graph))

    def uuid(self) -> Any:
        return self.name.encode()


def _run_with(recorder: Recorder, **keywords: Any) -> None:
    torch._dynamo.reset()
    given = inputs()
    assert_same_bytes(torch.compile(chain, backend=recorder, **keywords)(*given), chain(*given))


@pytest.mark.parametrize("where", ["config", "options"])
def test_a_pass_already_set_runs_first(where: str) -> None:
    mark, recorder = Mark(f"first in {where}"), Recorder()
    with torch._inductor.config.patch(post_grad_custom_post_pass=mark if where == "config" else None):
        _run_with(recorder, options={"post_grad_custom_post_pass": mark} if where == "options" else {})
    (seen,) = mark.seen
    assert "aten.clamp_max.default" in seen and not any("inductor_ext" in name for name in seen)
    assert recorder.counts() == {"fp8_downcast": 1}


def test_a_list_of_passes_runs_first() -> None:
    if not hasattr(torch._inductor.custom_graph_pass, "CustomInferenceAwareGraphPass"):
        pytest.skip("torch 2.11 takes one pass only")
    first, second, recorder = Mark("list 1"), Mark("list 2"), Recorder()
    with torch._inductor.config.patch(post_grad_custom_post_pass=[first, second]):
        _run_with(recorder)
    assert len(first.seen) == len(second.seen) == 1
    assert recorder.counts() == {"fp8_downcast": 1}


def test_an_inference_aware_pass_is_told() -> None:
    aware = getattr(torch._inductor.custom_graph_pass, "CustomInferenceAwareGraphPass", None)
    if aware is None:
        pytest.skip("torch 2.12 and later")
    told: list[bool] = []

    class Aware(aware):  # type: ignore[misc, valid-type]
        def __call__(self, graph: torch.fx.Graph, is_inference: bool) -> None:
            told.append(is_inference)

        def uuid(self) -> Any:
            return b"aware"

    with torch._inductor.config.patch(post_grad_custom_post_pass=Aware()):
        _run_with(Recorder())
    assert told == [True]


def test_a_bare_function_as_pass_runs_first_and_switches_the_cache_off() -> None:
    seen: list[list[str]] = []
    for _ in range(2):
        recorder = Recorder()
        with torch._inductor.config.patch(post_grad_custom_post_pass=lambda graph: seen.append(names_of(graph))):
            _run_with(recorder)
        assert recorder.counts() == {"fp8_downcast": 1} and not recorder.reports[0].cached
    assert len(seen) == 2


# ---- caches ------------------------------------------------------------------------------------------------------------

CACHE_PROGRAM = """
import json, torch
from torch._dynamo.utils import counters
from inductor_ext import settings
from inductor_ext.backend import compile_graph
reports = []
def backend(gm, inputs, **kwargs):
    return compile_graph(gm, inputs, settings.current(), on_report=reports.append)
def f(x, y, s):
    quantised = (x.float() / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return quantised, (torch.sin(y).float() / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
torch.manual_seed(0)
x, s = torch.randn(32, 64).bfloat16(), torch.tensor(0.5)
found, _ = torch.compile(f, backend=backend)(x, x, s)
assert torch.equal(found.view(torch.uint8), f(x, x, s)[0].view(torch.uint8))
(report,) = reports
print(json.dumps({
    "counts": report.counts(),
    "refusals": [[r.rule, r.reason, r.wanted, r.found, r.source] for r in report.refusals],
    "sources": [r.source for r in report.rewrites],
    "graph": [report.before, report.after],
    "cached": report.cached,
    "fx": [counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]],
    "aot": counters["aot_autograd"]["autograd_cache_hit"],
}))
"""


def test_both_caches_hit_in_a_new_process_and_the_report_is_the_same(tmp_path: Path) -> None:
    first, second, off = (
        json.loads(run_python(CACHE_PROGRAM, tmp_path, **environment).stdout.splitlines()[-1])
        for environment in ({}, {}, {"INDUCTOR_EXT_RULES": "fp8_downcast=off"})
    )
    assert first["counts"] == {"fp8_downcast": 1}
    assert first["refusals"][0][:2] == ["fp8_downcast", "Inductor fuses this chain into its producer for free"]
    assert first["fx"] == [0, 1] and first["aot"] == 0 and first["cached"] is False
    assert second["fx"][1] == 0 and second["aot"] == 1 and second["cached"] is True
    for key in ("counts", "refusals", "sources", "graph"):
        assert second[key] == first[key], key
    assert off["aot"] == 0 and off["fx"] == [0, 1] and off["counts"] == {} and off["refusals"] == []


def test_second_compile_in_one_process_hits_and_reports() -> None:
    given = inputs(33)
    _, first = run_compiled(chain, given)
    found, second = run_compiled(chain, given)
    assert [first.reports[0].cached, second.reports[0].cached] == [False, True]
    assert first.counts() == second.counts() == {"fp8_downcast": 1}
    assert_all_same_bytes(found, run_copies(chain, given))


# ---- graphs ------------------------------------------------------------------------------------------------------------


class QuantisedProduct(torch.autograd.Function):
    """x @ w with e4m3 activations forward and e5m2 gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: Any, w: Any, s: Any) -> Any:
        ctx.save_for_backward(x, w, s)
        return chain(x, s).float() * s @ w

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, w, s = ctx.saved_tensors
        quantised = (grad.float() / s).clamp(-57344.0, 57344.0).to(E5).float() * s
        return quantised @ w.t(), x.t() @ quantised, None


def test_training_rewrites_forward_and_backward() -> None:
    x, w, s = torch.randn(32, 64), torch.randn(64, 16), torch.tensor(0.01)
    recorder = Recorder(rules={"fp8_downcast": "always"})
    compiled = torch.compile(lambda *args: QuantisedProduct.apply(*args).square().sum(), backend=recorder)
    results = []
    for fn in (lambda *args: QuantisedProduct.apply(*args).square().sum(), compiled):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        loss = fn(*leaves, s)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert [report.counts() for report in recorder.reports] == [{"fp8_downcast": 1}] * 2
    assert "float8_e4m3fn" in recorder.reports[0].after and "float8_e5m2" in recorder.reports[1].after
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-3)


def test_graph_breaks_give_one_report_and_one_line_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    def broken(x: Any, s: Any) -> Any:
        first = chain(x, s)
        torch._dynamo.graph_break()
        return first, chain(x * 1.0, s)

    given = inputs(34)
    with caplog.at_level(logging.INFO, logger="inductor_ext"):
        found, recorder = run_compiled(broken, given)
    assert_all_same_bytes(found, run_copies(broken, given))
    assert len(recorder.reports) == 2
    lines = [record.getMessage() for record in caplog.records if record.name == "inductor_ext"]
    assert len(lines) == 2 and all("rewrote" in line and "near miss" in line for line in lines), lines


def test_a_changed_number_of_rows_does_not_recompile() -> None:
    recorder = Recorder()
    compiled = torch.compile(chain, backend=recorder, dynamic=True)
    for rows in (32, 7, 65, 2, 1024):
        given = inputs(rows)
        assert_same_bytes(compiled(*given), chain(*given))
    assert len(recorder.reports) == 1 and recorder.counts() == {"fp8_downcast": 1}


def test_a_module_with_a_cache_as_buffer() -> None:
    class Cache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.zeros(64, 8, 16, dtype=torch.uint8).view(E4))

        def forward(self, k: Any, s: Any, at: Any) -> Any:
            self.rows[at] = chain(k, s)
            return self.rows[at].float().sum()

    k, s, at = torch.randn(4, 8, 16).bfloat16(), torch.tensor(0.5), torch.tensor([3, 9, 1, 60])
    eager, ours, recorder = Cache(), Cache(), Recorder()
    compiled = torch.compile(ours, backend=recorder)
    for _ in range(2):
        torch.testing.assert_close(compiled(k, s, at), eager(k, s, at))
        assert_same_bytes(ours.rows, eager.rows)
    assert recorder.counts() == {"downcast_fp8": 1}


def test_torch_logs_and_torch_trace(tmp_path: Path) -> None:
    done = run_python(
        """
        import torch
        def f(x, s):
            return (x.float() / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        torch.compile(f, backend="inductor_ext")(torch.randn(32, 64).bfloat16(), torch.tensor(0.5))
        """,
        tmp_path,
        TORCH_LOGS="+inductor_ext",
        TORCH_TRACE=str(tmp_path / "trace"),
    )
    lines = [line for line in done.stderr.splitlines() if "rewrote" in line]
    assert len(lines) == 1 and "graph 0: rewrote fp8_downcast ×1; 0 near misses" in lines[0], done.stderr
    (trace,) = (tmp_path / "trace").iterdir()
    assert '"inductor_ext_report"' in trace.read_text()


# ---- kernels -----------------------------------------------------------------------------------------------------------


def _on_fake_cuda(**options: Any) -> tuple[str, list[GraphReport]]:
    recorder = Recorder(arch="sm_90a", **options)

    def make() -> tuple[Any, ...]:
        return torch.empty(32, 64, dtype=torch.bfloat16, device="cuda"), torch.empty((), device="cuda")

    with fake_gpu() as gpu:
        return gpu.source(chain, make, backend=recorder), recorder.reports


def test_a_kernel_that_does_not_build_leaves_the_graph_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    error = BuildError("kernel fp8_downcast (sm_90a) was not built: error: expected ';'", first_error="error: expected ';'")
    monkeypatch.setattr(jit, "prepare", lambda specs, settings: dict.fromkeys(specs, error))
    source, (report,) = _on_fake_cuda()
    assert "fp8_downcast" not in source and ".run(" in source
    assert report.counts() == {} and report.kernels == [] and report.before == report.after
    (refusal,) = report.refusals
    assert (refusal.rule, refusal.reason) == ("fp8_downcast", "kernel not available")
    assert "fp8_downcast" in refusal.wanted and "expected ';'" in refusal.found and refusal.source


def test_kernels_are_prepared_once_before_the_graph_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[jit.JitSpec]] = []

    def prepare(specs: Any, settings: Any) -> dict[Any, Any]:
        asked.append(list(specs))
        return dict.fromkeys(specs, object())

    monkeypatch.setattr(jit, "prepare", prepare)
    source, (report,) = _on_fake_cuda()
    ((spec,),) = asked
    assert spec.name == "fp8_downcast" and spec.arch == "sm_90a"
    assert report.kernels == [spec.to_dict()] and jit.JitSpec.from_dict(report.kernels[0]) == spec
    assert "fp8_downcast" in source


def test_require_makes_a_missing_kernel_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "prepare", lambda specs, settings: dict.fromkeys(specs, BuildError("no kernel today")))
    with pytest.raises(Exception, match="no kernel today"):
        _on_fake_cuda(build="require")


def test_deferred_kernels_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("prepare was called")

    monkeypatch.setattr(jit, "prepare", never)
    assert "fp8_downcast" in _on_fake_cuda(build="defer")[0]


def test_caches_that_are_off_are_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    """Inductor then works in a folder of its own, and nothing is there behind it."""
    x, s = torch.randn(8, 16).bfloat16(), torch.tensor(0.5)
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(lambda x, s: (x.float() / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), backend="inductor_ext")(x, s)
    assert not [record for record in caplog.records if record.name == "inductor_ext" and record.levelname == "WARNING"]
