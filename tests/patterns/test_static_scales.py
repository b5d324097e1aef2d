"""Static scales at norms and gated activations: what the examples of the two rules cannot show, and whole models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext import registry
from inductor_ext.bench import model as models
from inductor_ext.bench import quantize
from inductor_ext.bench.workload import Workload
from inductor_ext.demo import scaled_mm_works
from tests.support.compiled import run_compiled, run_copies
from tests.support.fakegpu import FakeGpu, fake_cuda_inputs, fake_gpu

E4, BF16 = torch.float8_e4m3fn, torch.bfloat16
SHAPES = {
    "qwen3": models.ModelShape("qwen3", 2, 256, 4, 2, 64, 512, 512),
    "llama": models.ModelShape("llama", 2, 256, 4, 2, 64, 512, 512),
}
#: q, k and v, gate and up, down, and what attention gives: of two layers.
EXPECTED = {"rms_norm_quantize": 4, "act_mul_quantize": 2, "fp8_downcast": 2}


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def quantised(y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (y.float() / scale).clamp(-448.0, 448.0).to(E4)


def inputs(*scales: float, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    made = torch.Generator().manual_seed(0)
    x, weight = torch.randn(24, 64, generator=made).to(BF16), torch.rand(64, generator=made).to(BF16)
    return tuple(each.to(device) for each in (x, weight, *map(torch.tensor, scales)))


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as fake:
        yield fake


# ---- models ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("made_by", ["torchao", "us"])
@pytest.mark.parametrize("family", SHAPES)
def test_a_model_of_the_benchmark(monkeypatch: pytest.MonkeyPatch, family: str, made_by: str) -> None:
    """``bench model --fp8 static``: every linear layer has a scale of its own, and every quantisation finds its producer."""
    pytest.importorskip("transformers")
    if not scaled_mm_works(torch.device("cpu")):
        pytest.skip("FP8 products are dequantised ones here, and Inductor's business")
    shape = SHAPES[family]
    given = Workload((16, 16)).inputs(shape.vocab, "cpu", 1)
    if made_by == "us":
        monkeypatch.setattr(quantize, "_torchao", lambda *_: (_ for _ in ()).throw(ImportError("none here")))
    model, how = quantize.quantize(lambda: models.build(shape, "cpu"), "static", lambda each: each(**given), "cpu")
    if made_by == "torchao" and "by torchao" not in how:
        pytest.skip(how)
    torch._dynamo.reset()
    found = inductor_ext.explain(model, **given)
    assert {rule: found.counts().get(rule) for rule in EXPECTED} == EXPECTED
    (graph,) = found.graphs
    assert [len(each.split(",")) for each in _scales(graph.after, "rms_norm_quantize")] == [3, 2, 3, 2]
    assert [len(each.split(",")) for each in _scales(graph.after, "act_mul_quantize")] == [1, 1]
    casts = [line for line in graph.after.splitlines() if "convert_element_type" in line and "float8" in line]
    assert not casts, "no quantisation is left to Inductor"
    assert inductor_ext.verify(model, **given).ok


def _scales(text: str, op: str) -> list[str]:
    return re.findall(rf"inductor_ext\.{op}\.default\(.*, static, .*\[(.*)\]\)", text)


class Shared(nn.Module):
    """q, k and v, calibrated together: they quantise alike, and their products have one input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("weight", torch.ones(64, dtype=BF16))
        self.register_buffer("weights", torch.randn(3, 64, 64).to(E4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y, one = norm(x, self.weight), torch.ones_like(self.scale)
        q, k, v = (
            torch._scaled_mm(quantised(y, self.scale), each.t(), self.scale, one, out_dtype=BF16) for each in self.weights
        )
        return [q * 2, k * 2, v * 2]


def test_one_scale_for_q_k_and_v_is_one_output() -> None:
    """quantize_once merges them first; without it the kernel writes the same three times, which is right too."""
    x = inputs()[0]
    found = inductor_ext.explain(Shared(), x)
    assert found.counts()["quantize_once"] == 2 and found.counts()["rms_norm_quantize"] == 1
    (graph,) = found.graphs
    assert [each.count(",") for each in _scales(graph.after, "rms_norm_quantize")] == [0]
    assert graph.after.count("inductor_ext.scaled_mm.default(") == 1, "one launch for three products of one input"
    alone = inductor_ext.explain(Shared(), x, rules={"quantize_once": "off", "scaled_mm_siblings": "off"})
    assert [each.count(",") for each in _scales(alone.graphs[0].after, "rms_norm_quantize")] == [2]


# ---- other rules -----------------------------------------------------------------------------------------------------


def test_the_rule_for_chains_alone_takes_what_is_left() -> None:
    def fn(x: torch.Tensor, weight: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> Any:
        return quantised(norm(x, weight), s), quantised(x, t)

    given = inputs(0.02, 0.05)
    assert inductor_ext.explain(fn, *given).counts() == {"rms_norm_quantize": 1, "fp8_downcast": 1}
    forced = {"fp8_downcast": "always"}
    assert inductor_ext.explain(fn, *given, rules=forced).counts() == {"rms_norm_quantize": 1, "fp8_downcast": 1}
    off = {**forced, "rms_norm_quantize": "off"}
    assert inductor_ext.explain(fn, *given, rules=off).counts() == {"fp8_downcast": 2}


def test_a_cache_store_keeps_its_chain() -> None:
    """What is quantised only to be stored into a cache is the store's, whatever computes it."""

    def store(x: torch.Tensor, weight: torch.Tensor, s: torch.Tensor, cache: torch.Tensor, loc: torch.Tensor) -> None:
        cache.view(-1, 64)[loc] = quantised(norm(x, weight), s)

    cache = torch.zeros(4, 16, 64).to(E4)
    found = inductor_ext.explain(store, *inputs(0.02), cache, torch.arange(24))
    assert found.counts() == {"downcast_fp8": 1}
    (refused,) = [each for each in found.refusals if each.rule == "rms_norm_quantize"]
    assert refused.reason == "Inductor fuses this chain into its consumer for free"


# ---- guards ----------------------------------------------------------------------------------------------------------


def test_a_scale_of_the_host_is_refused() -> None:
    def fn(x: torch.Tensor, weight: torch.Tensor, s: torch.Tensor) -> Any:
        return quantised(norm(x, weight), s)

    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
        *given, scale = inputs(0.02)
        found = inductor_ext.explain(fn, *(each.cuda() for each in given), scale)
    (refused,) = [each for each in found.refusals if each.rule == "rms_norm_quantize"]
    assert (refused.reason, refused.wanted) == ("the scale is on another device", "a tensor on cuda:0")
    assert refused.found.endswith("on cpu")


def test_steps_that_are_too_many_for_the_kernel_stay_with_the_scale() -> None:
    def fn(x: torch.Tensor, weight: torch.Tensor, s: torch.Tensor) -> Any:
        for each in (3.0, 5.0, 7.0, 9.0):
            s = (s * each).clamp(min=1e-9)
        return quantised(norm(x, weight), s)

    found = inductor_ext.explain(fn, *inputs(1e-7))
    assert found.counts() == {"rms_norm_quantize": 1}
    assert ", static, , f32 div:scale max:-448.0 min:448.0," in found.graphs[0].after
    assert inductor_ext.verify(fn, *inputs(1e-7)).ok


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("residual", [True, False])
def test_scales_that_are_parameters_of_a_frozen_graph(residual: bool, count: int) -> None:
    """Freezing computes what depends on them alone, and puts the result where it is first used: behind the sum."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(64).to(BF16) + 0.5)
            self.scales = nn.ParameterList(nn.Parameter(torch.tensor(-1.0 * (i + 1))) for i in range(count))

        def forward(self, x: torch.Tensor, other: torch.Tensor) -> Any:
            total = x + other if residual else x
            return [quantised(norm(total, self.weight), torch.exp(scale)).float() for scale in self.scales]

    given = inputs()[0], inputs()[0] * 2
    model = Frozen().requires_grad_(False)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        wanted = run_copies(model, given)
        found, recorder = run_compiled(model, given, rules={"rms_norm_quantize": "always"})
    (graph,) = recorder.reports
    assert recorder.counts()["rms_norm_quantize"] == 1 and "aten.exp" not in graph.before
    for one, two in zip(found, wanted):
        assert float((one - two).norm()) <= 1e-2 * float(two.norm())


# ---- generated code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("count", [1, 3])
def test_outputs_are_planned_and_not_copied(gpu: FakeGpu, count: int, dynamic: bool) -> None:
    def layer(x: Any, residual: Any, weight: Any, w: Any, *scales: Any) -> Any:
        total = x + residual
        y, one = norm(total, weight), torch.ones_like(scales[0])
        return *(torch._scaled_mm(quantised(y, each), w.t(), each, one, out_dtype=BF16) for each in scales), total

    def make() -> tuple[torch.Tensor, ...]:
        x, residual = (torch.empty(32, 64, dtype=BF16, device="cuda") for _ in range(2))
        weight, w = torch.empty(64, dtype=BF16, device="cuda"), torch.empty(64, 64, dtype=E4, device="cuda")
        return x, residual, weight, w, *(torch.empty((), device="cuda") for _ in range(count))

    backend = inductor_ext.backend(build="defer", rules={"scaled_mm": "off"})
    source = gpu.source(layer, make, backend=backend, dynamic=dynamic)
    code = source.split("def call(")[1].split("runner = ")[0]
    (made,) = re.findall(r"^\s*extern_kernels\.inductor_ext_rms_norm_quantize\((.*)\)$", code, re.MULTILINE)
    assert re.search(r"'static', '', 'f32 div:scale max:-448.0 min:448.0', torch.float8_e4m3fn, \[arg\d+_1", made)
    assert re.search(r"out0=buf\d+, out1=buf\d+, out2=buf\d+", made)
    products = re.findall(r"extern_kernels\._scaled_mm\((.*)\)", code)
    assert len(products) == count and all(".copy_(" not in line for line in code.splitlines())
    if count > 1:
        out = re.search(r"out0=(buf\d+)", made)
        assert out and all(each.startswith(f"reinterpret_tensor({out[1]}, ") for each in products), "its parts, as they lie"
    kernels = [line for line in code.splitlines() if ".run(" in line]
    assert len(kernels) <= 1, "but for ones_like nothing is left to Inductor"


def test_the_rules_have_examples_of_static_scales() -> None:
    for name in ("rms_norm_quantize", "act_mul_quantize"):
        rule = registry.rule_named(name)
        for kind in (rule.matches, rule.near_misses):
            assert any("static" in each.name for each in kind)
