"""Rewrites whose kernels have not been measured: left alone on a GPU, with that reason, unless they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext.patterns import act_quantize
from inductor_ext.patterns.support import normed
from inductor_ext.patterns.support.has_run import NOT_MEASURED
from tests.support.fakegpu import fake_cuda_inputs
from tests.support.nearly import quantise_rows

F = torch.nn.functional


def _fp32_residual(x: Any, r: Any, w: Any) -> Any:
    total = x.float() + r.float()
    return quantise_rows((total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w)


CASES: list[tuple[str, Callable[..., Any]]] = [
    ("rms_norm_quantize", _fp32_residual),
    ("rms_norm_quantize", lambda x, r, w: (lambda y: (*quantise_rows(y), y))(F.rms_norm(x + r, (64,), w, 1e-6))),
    ("layer_norm_quantize", lambda x, r, w: quantise_rows(F.layer_norm(x + r, (64,), w, None, 1e-5))),
    ("act_quantize", lambda x, r, w: quantise_rows(F.gelu(x))),
]


@pytest.mark.parametrize(("rule", "fn"), CASES)
def test_on_another_gpu_it_waits_to_be_asked_for(rule: str, fn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (act_quantize, normed):
        monkeypatch.setattr(module, "MEASURED", frozenset({"sm_100a"}))

    def explained(rules: Any) -> Any:
        with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
            given = [torch.randn(32, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
            return inductor_ext.explain(fn, *given, torch.randn(64, device="cuda", dtype=torch.bfloat16), rules=rules)

    left = explained({})
    assert rule not in left.counts()
    assert NOT_MEASURED in [each.reason for each in left.refusals if each.rule == rule]
    assert explained({rule: "always"}).counts()[rule] == 1
