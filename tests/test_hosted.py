"""The rewrites as a pass object: in Inductor's own config, in a manager as vLLM's, for AOTInductor and saved artefacts."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code

import inductor_ext
from inductor_ext import jit, plan, registry
from inductor_ext.errors import SettingError, StrictError
from inductor_ext.hosted import GraphPass
from inductor_ext.report.events import GraphReport

E4 = torch.float8_e4m3fn
AOT_HANDS_ON_DTYPES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
REPOSITORY = Path(inductor_ext.__file__).parents[1]
RULES = {"fp8_quantize": "always"}


def linear(x: Any, w: Any, s: Any) -> Any:
    sx = x.abs().amax().float().clamp(min=1e-12) / 448
    q = (x.float() / sx).clamp(-448, 448).to(E4)
    return torch._scaled_mm(q, w.t(), scale_a=sx, scale_b=s, out_dtype=x.dtype)


def store(cache: Any, slots: Any, k: Any) -> None:
    cache[slots] = (k.float() / 0.5).clamp(-448, 448).to(E4).view(torch.uint8)


def both(x: Any, w: Any, s: Any, cache: Any, slots: Any) -> Any:
    out = linear(x, w, s)
    store(cache.view(-1, 64), slots, out)
    return out


def inputs() -> tuple[Any, ...]:
    torch.manual_seed(0)
    linear_ = torch.randn(6, 128).bfloat16(), torch.randn(64, 128).to(E4), torch.rand(())
    return *linear_, torch.zeros(4, 4, 64, dtype=torch.uint8), torch.arange(6)


@contextlib.contextmanager
def _host(custom_pass: Any, folder: Path | None = None, **config: Any) -> Iterator[None]:
    """What calls Inductor has set its pass; its cache is ``folder``."""
    torch._dynamo.reset()
    config["fx_graph_cache"] = folder is not None
    with (
        torch._inductor.config.patch(post_grad_custom_post_pass=custom_pass, **config),
        torch._functorch.config.patch(enable_autograd_cache=folder is not None),
        pytest.MonkeyPatch.context() as patch,
    ):
        if folder is not None:
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        yield


def _same_as_eager(fn: Callable[..., Any], args: tuple[Any, ...], **keywords: Any) -> None:
    ours, eager = ([each.clone() for each in args] for _ in range(2))
    assert torch.equal(torch.compile(fn, **keywords)(*ours), fn(*eager))
    for a, b in zip(ours, eager):
        assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


# ---- as Inductor's own pass ------------------------------------------------------------------------------------------


def test_it_does_what_the_backend_does() -> None:
    """The same calls in the generated code, into buffers that Inductor plans."""
    reports: list[GraphReport] = []
    with _host(inductor_ext.graph_pass(rules=RULES, on_report=reports.append)):
        _same_as_eager(both, inputs())
        torch._dynamo.reset()
        _, (hosted,) = run_and_get_code(torch.compile(both), *inputs())
    with _host(None):
        _, (ours,) = run_and_get_code(torch.compile(both, backend=inductor_ext.backend(rules=RULES)), *inputs())
    calls = [re.findall(r"extern_kernels\.inductor_ext_\w+\(.*", code) for code in (hosted, ours)]
    assert calls[0] == calls[1]
    assert any(re.search(r"inductor_ext_scaled_mm\(.*out=buf\d+\)", call) for call in calls[0])
    assert reports[0].counts() == {"scaled_mm": 1, "fp8_quantize": 1, "downcast_fp8": 1}


def test_dynamic_sizes() -> None:
    reports: list[GraphReport] = []
    with _host(inductor_ext.graph_pass(rules=RULES, on_report=reports.append)):
        for rows in (5, 6, 7):
            x, w, s = inputs()[:3]
            x = x.repeat(2, 1)[:rows]
            torch._dynamo.mark_dynamic(x, 0)
            assert torch.equal(torch.compile(linear)(x, w, s), linear(x, w, s))
    assert [report.counts() for report in reports] == [{"scaled_mm": 1, "fp8_quantize": 1}]


def test_options_are_checked_when_it_is_made() -> None:
    with pytest.raises(SettingError, match="unknown option 'stric'"):
        inductor_ext.graph_pass(stric=True)
    with pytest.raises(SettingError, match="no rule is called 'nope'"):
        inductor_ext.graph_pass(rules={"nope": "auto"})


class Mark(CustomGraphPass):
    def __init__(self, name: str, seen: list[Any]) -> None:
        self.name, self.seen = name, seen

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.seen.append((self.name, any("inductor_ext" in str(node.target) for node in graph.nodes)))

    def uuid(self) -> str:
        return self.name


def test_other_passes_run_before_and_behind_it() -> None:
    seen: list[Any] = []
    with _host(inductor_ext.graph_pass(first=Mark("a", seen), then=[Mark("b", seen), Mark("c", seen)], rules=RULES)):
        _same_as_eager(linear, inputs()[:3])
    assert seen == [("a", False), ("b", True), ("c", True)]


# ---- identity --------------------------------------------------------------------------------------------------------


def test_its_uuid_is_that_of_sources_settings_and_passes() -> None:
    made = [
        inductor_ext.graph_pass(),
        inductor_ext.graph_pass(rules=RULES),
        inductor_ext.graph_pass(prefill_only=True),
        inductor_ext.graph_pass(first=Mark("a", [])),
        inductor_ext.graph_pass(then=Mark("a", [])),
    ]
    uuids = [each.uuid() for each in made]
    assert len(set(uuids)) == len(uuids) and json.loads(json.dumps(uuids)) == uuids
    assert inductor_ext.graph_pass(strict=True).uuid() == uuids[0]  # what is compiled does not depend on it
    assert inductor_ext.graph_pass(first=lambda graph: None).uuid() is None


def test_its_uuid_is_the_same_in_another_process() -> None:
    code = f"import inductor_ext; print(inductor_ext.graph_pass(rules={RULES!r}).uuid())"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == inductor_ext.graph_pass(rules=RULES).uuid()


def test_it_survives_copies_and_pickle() -> None:
    made = inductor_ext.graph_pass(rules=RULES, strict=True, on_report=lambda report: None, first=Mark("a", []))
    assert copy.deepcopy({"post_grad_custom_post_pass": made})["post_grad_custom_post_pass"] is made
    again = pickle.loads(pickle.dumps(made))
    assert isinstance(again, GraphPass) and again.uuid() == made.uuid() and again.settings == made.settings
    assert again.on_report is None


# ---- kernels, caches, strict -----------------------------------------------------------------------------------------


def test_kernels_are_there_when_a_graph_has_been_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = next(op for op in registry.ops() if op.name == "fp8_quantize").examples("sm_90a")[0]
    asked: list[Any] = []
    monkeypatch.setattr(plan, "kernels_of", lambda graph, arch: [spec])

    def prepare(specs: Any, settings: Any) -> Any:
        asked.extend(specs)
        return dict.fromkeys(specs, object())

    monkeypatch.setattr(jit, "prepare", prepare)
    told: list[Any] = []
    with _host(inductor_ext.graph_pass(rules=RULES, on_report=lambda report: told.append((list(asked), report.kernels)))):
        _same_as_eager(linear, inputs()[:3])
    assert told == [([spec], [spec.to_dict()])]


def test_a_cached_graph_is_told_and_its_kernels_are_loaded_by_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = next(op for op in registry.ops() if op.name == "fp8_quantize").examples("sm_90a")[0]
    asked: list[Any] = []
    monkeypatch.setattr(plan, "kernels_of", lambda graph, arch: [spec])

    def prepare(specs: Any, settings: Any) -> Any:
        asked.append(list(specs))
        return dict.fromkeys(specs, object())

    monkeypatch.setattr(jit, "prepare", prepare)
    for cached in (False, True):
        reports: list[GraphReport] = []
        made = inductor_ext.graph_pass(rules=RULES, strict=True, on_report=reports.append)
        with _host(made, tmp_path):
            _same_as_eager(linear, inputs()[:3])
            assert bool(reports) is not cached
            made.complete()
            made.complete()  # says nothing twice
        assert [report.cached for report in reports] == [cached]
        assert reports[0].counts() == {"scaled_mm": 1, "fp8_quantize": 1}
    assert asked == [[spec], [spec]]


def test_strict_is_about_all_graphs_and_told_by_complete() -> None:
    made = inductor_ext.graph_pass(rules={**RULES, "moe_combine": "auto"}, strict=True)
    made.complete()  # nothing is known yet
    with _host(made):
        _same_as_eager(linear, inputs()[:3])
        _same_as_eager(torch.sin, inputs()[:1])
    with pytest.raises(StrictError, match=r"moe_combine matched nothing in any of 2 graphs\n  no near miss either"):
        made.complete()


# ---- a manager of passes, as vLLM's ----------------------------------------------------------------------------------


class Manager(CustomGraphPass):
    """vLLM's, in short: each pass with the graph alone where it is applicable, a uuid that is a hash of JSON."""

    def __init__(self, passes: list[Any]) -> None:
        self.passes = passes

    def __call__(self, graph: torch.fx.Graph) -> None:
        for each in self.passes:
            if getattr(each, "is_applicable_for_range", lambda range_: True)((1, 8192)):
                each(graph)

    def uuid(self) -> str:
        return json.dumps({"passes": [each.uuid() for each in self.passes]}, sort_keys=True)


def test_in_a_manager_between_other_passes() -> None:
    reports: list[GraphReport] = []
    seen: list[Any] = []
    made = inductor_ext.graph_pass(rules=RULES, strict=True, on_report=reports.append)
    manager = Manager([Mark("theirs", seen), copy.deepcopy(made), Mark("cleanup", seen)])
    with _host(manager, enable_auto_functionalized_v2=False):
        _same_as_eager(both, inputs())
    made.complete()
    assert seen == [("theirs", False), ("cleanup", True)]
    assert reports[0].counts() == {"scaled_mm": 1, "fp8_quantize": 1, "downcast_fp8": 1}


def test_vllms_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM asserts that a pass is of its own class; this is that class without the rest of vLLM."""
    import types

    class InductorPass(CustomGraphPass):
        def uuid(self) -> str:
            raise AssertionError("the pass has a uuid of its own")

        def is_applicable_for_range(self, compile_range: Any) -> bool:
            raise AssertionError("the pass decides itself")

    names = ["vllm", "vllm.compilation", "vllm.compilation.passes", "vllm.compilation.passes.inductor_pass"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].InductorPass = InductorPass  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "inductor_ext.integrations.vllm", raising=False)
    from inductor_ext.integrations.vllm import graph_pass

    made = graph_pass(rules=RULES)
    assert isinstance(made, InductorPass) and made.uuid() == inductor_ext.graph_pass(rules=RULES).uuid()
    again = pickle.loads(pickle.dumps(made))
    assert isinstance(again, InductorPass) and again.uuid() == made.uuid()
    with _host(Manager([made])):
        _same_as_eager(linear, inputs()[:3])
    sys.modules.pop("inductor_ext.integrations.vllm")


# ---- what is compiled here and loaded elsewhere ----------------------------------------------------------------------

PROCESS = """
import sys, torch
{importing}
E4 = torch.float8_e4m3fn
torch.manual_seed(0)
args = torch.randn(6, 128).bfloat16(), torch.randn(64, 128).to(E4), torch.rand(())
path = {path!r}
try:
    {code}
    print("total", out.float().sum().item())
except Exception as error:
    print(type(error).__name__, str(error).splitlines()[0][:300])
"""


def _elsewhere(importing: str, path: Path, code: str) -> str:
    script = PROCESS.format(importing=importing, path=str(path), code=code)
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TORCHINDUCTOR_CACHE_DIR": str(path.parent / "elsewhere")}
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    return result.stdout.strip() or result.stderr


@pytest.mark.slow
def test_an_aotinductor_package_runs_where_the_ops_are_imported(tmp_path: Path) -> None:
    class Linear(torch.nn.Module):
        def forward(self, x: Any, w: Any, s: Any) -> Any:
            return linear(x, w, s)

    args, reports, path = inputs()[:3], [], tmp_path / "model.pt2"
    made = inductor_ext.graph_pass(rules=RULES, strict=True, on_report=reports.append)
    exported = torch.export.export(Linear(), args)
    config = {"post_grad_custom_post_pass": made}
    if not AOT_HANDS_ON_DTYPES:
        with pytest.raises(Exception, match=r"results would be wrong \(wanted torch 2\.13 or later\)"):
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=config)
        return
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=config)
    made.complete()
    assert reports[0].counts() == {"scaled_mm": 1, "fp8_quantize": 1}
    code = "out = torch._inductor.aoti_load_package(path)(*args)"
    assert _elsewhere("import inductor_ext", path, code) == f"total {linear(*args).float().sum().item()}"
    assert "inductor_ext" in _elsewhere("", path, code)  # the error names whose op it is


def test_a_saved_artefact_runs_where_the_ops_are_imported(tmp_path: Path) -> None:
    from torch._inductor import standalone_compile

    args, path = inputs()[:3], tmp_path / "artefact.bin"
    patches = {"post_grad_custom_post_pass": inductor_ext.graph_pass(rules=RULES)}

    def save(gm: Any, examples: Any) -> Any:
        made = standalone_compile(gm, examples, dynamic_shapes="from_graph", options={"config_patches": patches})
        made.save(path=str(path), format="binary")
        return lambda *given: made(*given)

    with _host(None, tmp_path / "here"):
        torch.compile(linear, backend=save, fullgraph=True)(*args)
    code = "out = torch._inductor.CompiledArtifact.load(path=path, format='binary')(*args)[0]"
    for importing in ("import inductor_ext", ""):  # its code imports what it calls
        assert _elsewhere(importing, path, code) == f"total {linear(*args).float().sum().item()}"
