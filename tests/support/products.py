"""FP8 products on fake CUDA tensors, and what the rules say to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext.report.explain import Explanation
from tests.support.fakegpu import fake_cuda_inputs

E4 = torch.float8_e4m3fn
BF16 = torch.bfloat16


def explained(fn: Any, make: Callable[[], tuple[Any, ...]], *, dynamic: bool | None = False, **modes: str) -> Explanation:
    """`explain` for an H200, on fake CUDA tensors; rules that are not named are in mode auto."""
    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
        return inductor_ext.explain(fn, *make(), rules=modes, dynamic=dynamic)


def empty(*shape: int, dtype: torch.dtype = E4) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def scale(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.float32)


def refusals(found: Explanation, rule: str) -> list[str]:
    return [each.reason for each in found.refusals if each.rule == rule]


def one(a: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
    return torch._scaled_mm(a, w.t(), s, t, out_dtype=BF16)


def tensorwise(m: int = 32, n: int = 48, k: int = 64) -> tuple[Any, ...]:
    return empty(m, k), empty(n, k), scale(), scale()


def quantise(x: Any, s: Any) -> torch.Tensor:
    return (x.float() / s).clamp(-448.0, 448.0).to(E4)
