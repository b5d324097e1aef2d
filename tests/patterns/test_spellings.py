"""The usual spellings of a scale-clamp-cast chain, 1 to 13, each with what the rules make of it and eager's bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from tests.support.compiled import run_compiled, run_copies
from tests.support.equal import assert_all_same_bytes
from tests.support.fakegpu import fake_cuda_inputs

E4 = torch.float8_e4m3fn
LIMITS = torch.finfo(E4)  # a module global on purpose: with dynamic shapes torch 2.15 makes its bounds graph inputs


def _x(device: str, *shape: int) -> torch.Tensor:
    return (torch.randn(shape or (64, 128), device=device) * 90).bfloat16()


def _scaled(device: str) -> tuple[Any, ...]:
    return _x(device), torch.tensor(0.3, device=device)


def _one(device: str) -> tuple[Any, ...]:
    return (_x(device, 64, 256),)


def _kv(device: str) -> tuple[Any, ...]:
    cache = torch.zeros(4, 256, 8, 64, dtype=torch.uint8, device=device).view(E4)
    slots = (torch.arange(16, device=device) * 37) % 1024
    return _x(device, 16, 8, 64), torch.tensor(0.3, device=device), cache, slots


def static_divide(x: Any, s: Any) -> Any:
    return (x.float() / s).clamp(LIMITS.min, LIMITS.max).to(E4)


def times_reciprocal(x: Any, s: Any) -> Any:
    return torch.clamp(x * s.reciprocal(), -448, 448).to(E4)


def times_one_over(x: Any, s: Any) -> Any:
    return (x * (1.0 / s)).clamp(min=-448, max=448).to(E4)


def python_number(x: Any) -> Any:
    return (x.float() * 0.25).clamp(-448, 448).to(E4)


def tensor_amax(x: Any) -> Any:
    s = 448.0 / x.abs().max().float().clamp(min=1e-12)
    return (x.float() * s).clamp(-448, 448).to(E4), s.reciprocal()


def row_amax(x: Any) -> Any:
    s = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448.0
    return (x.float() / s).clamp(-448, 448).to(E4), s


def kv_index_put(x: Any, s: Any, cache: Any, slots: Any) -> Any:
    cache.view(-1, 8, 64).index_put_((slots,), (x.float() / s).clamp(-448, 448).to(E4))
    return cache


def kv_assign(x: Any, s: Any, cache: Any, slots: Any) -> None:
    cache.view(-1, 8, 64)[slots] = (x.float() / s).clamp(-448, 448).to(E4)


def kv_assign_and_read(x: Any, s: Any, cache: Any, slots: Any) -> Any:
    q = (x.float() / s).clamp(-448, 448).to(E4)
    cache.view(-1, 8, 64)[slots] = q
    return q.float()


def kv_index_copy_bytes(x: Any, s: Any, cache: Any, slots: Any) -> None:
    q = (x.float() / s).clamp(-448, 448).to(E4).view(torch.uint8)
    cache.view(torch.uint8).view(-1, 8, 64).index_copy_(0, slots, q)


def kv_one_position(x: Any, s: Any, cache: Any, slots: Any) -> None:
    q = (x[:8].float() / s).clamp(-448, 448).to(E4)
    cache[:, 3:11] = q.unsqueeze(0)


def minimum_maximum(x: Any, s: Any) -> Any:
    low, high = (torch.full((), bound, device=x.device) for bound in (-448.0, 448.0))
    return torch.minimum(torch.maximum(x.float() / s, low), high).to(E4)


def hardtanh(x: Any, s: Any) -> Any:
    return torch.nn.functional.hardtanh(x / s, -448, 448).to(E4)


def no_clamp(x: Any, s: Any) -> Any:
    return (x / s).to(E4)


def norm_then_static(x: Any, s: Any) -> Any:
    f = x.float()
    y = (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(torch.bfloat16)
    return (y.float() / s).clamp(-448, 448).to(E4)


def tensor_bounds(x: Any, s: Any) -> Any:
    # torch.tensor(…, device="cuda") copies from the host, which a fake GPU cannot.
    make = torch.tensor if x.device.type == "cpu" else lambda bound: torch.full((), bound, device=x.device)
    low, high = make(-448.0), make(448.0)
    return torch.clamp(torch.div(x.to(torch.float32), s), low, high).to(E4)


def group_128(x: Any) -> Any:
    b = x.float().view(x.shape[0], -1, 128)
    s = b.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
    return (b / s).clamp(-448, 448).to(E4).view(x.shape), s.squeeze(-1)


def mx_32(x: Any) -> Any:
    b = x.float().view(x.shape[0], -1, 32)
    e = torch.floor(torch.log2(b.abs().amax(-1, keepdim=True).clamp(min=2**-126))) - 8
    return (b * torch.exp2(-e)).clamp(-448, 448).to(E4).view(x.shape), e


SPELLINGS: list[tuple[str, Callable[..., Any], Callable[[str], tuple[Any, ...]], dict[str, int]]] = [
    ("1", static_divide, _scaled, {"fp8_downcast": 1}),
    ("2", times_reciprocal, _scaled, {"fp8_downcast": 1}),
    ("2b", times_one_over, _scaled, {"fp8_downcast": 1}),
    ("3", python_number, _one, {"fp8_downcast": 1}),
    ("4", tensor_amax, _one, {"fp8_quantize": 1}),
    ("5", row_amax, _one, {"fp8_quantize": 1}),
    ("6", kv_index_put, _kv, {"downcast_fp8": 1}),
    ("6b", kv_assign, _kv, {"downcast_fp8": 1}),
    ("6b-read", kv_assign_and_read, _kv, {}),
    ("6c", kv_index_copy_bytes, _kv, {"downcast_fp8": 1}),
    ("6d", kv_one_position, _kv, {}),
    ("7", minimum_maximum, _scaled, {"fp8_downcast": 1}),
    ("8", hardtanh, _scaled, {"fp8_downcast": 1}),
    ("9", no_clamp, _scaled, {"fp8_downcast": 1}),
    ("10", norm_then_static, _scaled, {"rms_norm_quantize": 1}),
    ("11", tensor_bounds, _scaled, {"fp8_downcast": 1}),
    ("12", group_128, _one, {"fp8_quantize": 1}),
    ("13", mx_32, _one, {}),
]
CASES = [pytest.param(*case[1:], id=f"{case[0]}-{case[1].__name__}") for case in SPELLINGS]
#: Left to Inductor, whose own arithmetic (log2) need not be eager's, or a norm, whose mean is summed in another order.
NOT_OURS = {"norm_then_static", "mx_32"}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("fn", "inputs", "wanted"), CASES)
def test_spelling(fn: Any, inputs: Any, wanted: dict[str, int], dynamic: bool) -> None:
    given = inputs("cpu")
    found, recorder = run_compiled(fn, given, dynamic=dynamic)
    assert recorder.counts() == wanted
    if fn.__name__ not in NOT_OURS:
        assert_all_same_bytes(found, run_copies(fn, given))
    if not wanted:
        assert recorder.refusals(), "left alone without a reason"


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("fn", "inputs", "wanted"), CASES)
def test_spelling_on_fake_cuda(fn: Any, inputs: Any, wanted: dict[str, int], dynamic: bool) -> None:
    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
        found = inductor_ext.explain(fn, *inputs("cuda"), dynamic=dynamic)
    assert found.counts() == wanted


def test_bounds_that_are_float64_graph_inputs() -> None:
    """What torch 2.15 makes of a module-global finfo with dynamic shapes: 0-d float64 inputs, on the CPU, as bounds."""

    def bounded(x: Any, s: Any, low: Any, high: Any) -> Any:
        y = x.float() / s
        return torch.clamp_max(torch.clamp_min(y, low.to(y.dtype)), high.to(y.dtype)).to(E4)

    bounds = tuple(torch.tensor(value, dtype=torch.float64) for value in (-448.0, 448.0))
    given = (*_scaled("cpu"), *bounds)
    found, recorder = run_compiled(bounded, given, dynamic=True, rules={"fp8_downcast": "always"})
    assert recorder.counts() == {"fp8_downcast": 1}
    assert "max:s1 min:s2" in recorder.reports[0].after
    assert_all_same_bytes(found, run_copies(bounded, given))

    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
        cpu_bounds = tuple(torch.empty((), dtype=torch.float64) for _ in range(2))
        report = inductor_ext.explain(bounded, *_scaled("cuda"), *cpu_bounds, dynamic=True)
    assert report.counts() == {"fp8_downcast": 1}
