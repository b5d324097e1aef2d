"""MXFP8 quantised where it is computed: what the examples of the two rules cannot show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext import MXFP8Weight, registry
from tests.support.compiled import run_compiled, run_copies
from tests.support.fakegpu import FakeGpu, fake_cuda_inputs, fake_gpu

BF16 = torch.bfloat16
PRODUCERS = pytest.mark.parametrize("rule", ["rms_norm_quantize", "act_mul_quantize"])


def example(rule: str) -> Any:
    return next(each for each in registry.rule_named(rule).matches if each.name == "mxfp8")


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as fake:
        yield fake


@PRODUCERS
def test_a_kernel_that_has_not_run_waits_for_always(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    def on_cuda(**rules: str) -> Any:
        with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
            return inductor_ext.explain(example(rule).fn, *example(rule).inputs("cuda"), rules=rules)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("inductor_ext.patterns.support.quantisation.HAS_RUN", frozenset())
    found = on_cuda()
    (only,) = [each for each in found.refusals if each.rule == rule]
    assert only.reason == "the kernel has not been run on this GPU yet" and not found.rewrites
    assert only.wanted == f'rules={{"{rule}": "always"}}' and only.found == "sm_90a"
    assert on_cuda(**{rule: "always"}).counts() == {rule: 1}
    monkeypatch.setattr("inductor_ext.patterns.support.quantisation.HAS_RUN", frozenset({"sm_90a"}))
    assert on_cuda().counts() == {rule: 1}


@PRODUCERS
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_data_and_scales_are_planned_and_not_copied(gpu: FakeGpu, rule: str, dynamic: bool) -> None:
    backend = inductor_ext.backend(build="defer", rules={rule: "always"})
    source = gpu.source(example(rule).fn, lambda: example(rule).inputs("cuda"), backend=backend, dynamic=dynamic)
    (made,) = re.findall(rf"^\s*extern_kernels\.inductor_ext_{rule}\((.*)\)$", source, re.MULTILINE)
    assert re.search(r"out0=buf\d+, out1=buf\d+", made) and "'mx', 'rceil', ''" in made
    code = source.split("def call(")[1].split("runner = ")[0]
    assert ".run(" not in code and ".copy_(" not in code, "one kernel, and views of what it wrote"


def test_the_second_product_of_experts_takes_its_activation_from_one_kernel() -> None:
    """SiLU(gate) · up, rounded to MXFP8 for a grouped product: two rules, one after the other."""

    def experts(gate_up: torch.Tensor, down: Any, offs: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch._grouped_mm(torch.nn.functional.silu(gate) * up, down.transpose(-2, -1), offs)

    down = MXFP8Weight.quantize(torch.randn(4, 48, 64).to(BF16), activations="mxfp8")
    inputs = torch.randn(12, 128).to(BF16) * 3, down, torch.tensor([3, 3, 10, 12], dtype=torch.int32)
    wanted = run_copies(experts, inputs)[0]
    (found, *_), recorder = run_compiled(experts, inputs)
    assert recorder.counts() == {"mxfp8_grouped_mm": 1, "act_mul_quantize": 1}
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
