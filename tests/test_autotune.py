"""Our kernels in Inductor's autotuner, on a fake H200: what is offered, what the generated wrapper calls, what is reported."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext import autotune, jit, registry, settings
from inductor_ext.backend import compile_graph
from inductor_ext.errors import BuildError
from inductor_ext.kernels.scaled_mm.autotune import MOST
from inductor_ext.report import store
from inductor_ext.report.events import GraphReport
from tests.support.fakegpu import FakeGpu, fake_gpu

E4 = torch.float8_e4m3fn
NAME = "inductor_ext_scaled_mm_tuned"


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    registry.ops()
    registry.define_lowerings()


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as fake:
        yield fake


class Measured:
    """Stands in for the measuring: times by kind, and what was offered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, ours: float, aten: float = 2.0, triton: float = 3.0) -> None:
        from torch._inductor.select_algorithm import AlgorithmSelectorCache, ExternKernelCaller

        self.offered: list[Any] = []

        def benchmark(cache: Any, choices: list[Any], *args: Any, **kwargs: Any) -> dict[Any, float]:
            self.offered = list(choices)
            ms = {}
            for position, choice in enumerate(choices):
                kind = ours if choice.name == NAME else aten if isinstance(choice, ExternKernelCaller) else triton
                ms[choice] = kind + position * 1e-3
            return ms

        monkeypatch.setattr(AlgorithmSelectorCache, "benchmark", benchmark)
        monkeypatch.setattr(AlgorithmSelectorCache, "make_precompile_fn", lambda *args, **kwargs: lambda: {})

    @property
    def ours(self) -> list[str]:
        return [choice.description for choice in self.offered if choice.name == NAME]


def _product(a: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
    return torch._scaled_mm(a, w.t(), s, t, out_dtype=torch.bfloat16, use_fast_accum=True)


def _inputs(m: int = 512, n: int = 1024, k: int = 1024) -> tuple[torch.Tensor, ...]:
    a, w = torch.empty(m, k, dtype=E4, device="cuda"), torch.empty(n, k, dtype=E4, device="cuda")
    return a, w, torch.empty(m, 1, device="cuda"), torch.empty(1, n, device="cuda")


def _source(gpu: FakeGpu, fn: Any = _product, make: Any = _inputs, *, backend: Any = None, **config: Any) -> str:
    config = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN", "autotune_local_cache": False, **config}
    return gpu.source(fn, make, backend=backend or inductor_ext.backend(build="defer"), **config)


def test_ours_is_called_where_it_is_the_fastest(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch, ours=1.0)
    source = _source(gpu)
    assert 1 < len(measured.ours) <= MOST
    assert measured.ours == list(dict.fromkeys(measured.ours)), "each kernel once"
    call = f"extern_kernels.{NAME}(arg1_1, reinterpret_tensor(arg0_1, (1024, 1024), (1, 1024), 0), arg2_1, arg3_1, "
    assert f"{call}config='{measured.ours[0]}', use_fast_accum=True, static_b=False, out=buf0)" in source
    assert "buf0 = empty_strided_cuda((512, 1024), (1024, 1), torch.bfloat16)" in source
    assert "_scaled_mm(" not in source


def test_aten_stays_where_it_is_the_fastest(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch, ours=5.0)
    source = _source(gpu)
    assert measured.ours
    assert "extern_kernels._scaled_mm(" in source and NAME not in source


def test_bias_and_exact_accumulation(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def biased(a: Any, w: Any, s: Any, t: Any, bias: Any) -> torch.Tensor:
        return torch._scaled_mm(a, w.t(), s, t, bias=bias, out_dtype=torch.bfloat16)

    measured = Measured(monkeypatch, ours=1.0)
    bias = lambda: torch.empty(1024, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    source = _source(gpu, biased, lambda: (*_inputs(), bias()))
    assert measured.ours
    assert f"arg3_1, arg4_1, config='{measured.ours[0]}', use_fast_accum=False, static_b=False, out=buf0)" in source


def test_a_weight_is_read_ahead_of_a_quantised_activation(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def quantised(x: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
        return _product((x.float() / s).clamp(-448.0, 448.0).to(E4), w, s, t)

    Measured(monkeypatch, ours=1.0)
    x = lambda: torch.empty(512, 1024, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    source = _source(gpu, quantised, lambda: (x(), *_inputs()[1:]))
    assert "use_fast_accum=True, static_b=True, out=" in source


def test_mode_of_torch_compile(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch, ours=1.0)
    ours = inductor_ext.backend(build="defer")

    def compiled(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        return ours(gm, inputs, mode="max-autotune-no-cudagraphs")

    assert NAME in _source(gpu, backend=compiled, max_autotune=False)
    assert measured.ours


def _fp8_output(a: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
    return torch._scaled_mm(a, w.t(), torch.ones((), device=a.device), torch.ones((), device=a.device), out_dtype=E4)


def _off_by_half(a: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
    return _product(a.flatten()[8 : 8 + 512 * 512].view(512, 512), w[:, :512], s, t)  # rows begin 8 bytes off


@pytest.mark.parametrize(
    ("fn", "config"),
    [
        pytest.param(_product, {"max_autotune": False}, id="not_asked_for"),
        pytest.param(_fp8_output, {}, id="fp8_output"),
        pytest.param(_off_by_half, {}, id="rows_off_16_bytes"),
    ],
)
def test_not_offered(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, fn: Any, config: Any) -> None:
    measured = Measured(monkeypatch, ours=1.0)
    assert NAME not in _source(gpu, fn, backend=inductor_ext.backend(build="defer", rules={"scaled_mm": "off"}), **config)
    assert measured.ours == []


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"max_autotune": True}, True),
        ({"max_autotune_gemm": True}, True),
        ({}, False),
        ({"max_autotune": True, "max_autotune_gemm_backends": "TRITON"}, False),
        ({"max_autotune": True, "max_autotune_gemm_backends": "aten, triton"}, True),
        ({"max_autotune": True, "cpp_wrapper": True}, False),
        ({"max_autotune": True, "deterministic": True}, False),
        ({"max_autotune": True, "autotune_in_subproc": True}, False),
    ],
)
def test_active(config: dict[str, Any], wanted: bool) -> None:
    with torch._inductor.config.patch(config):
        assert autotune.active() is wanted


def test_another_backend_is_left_alone(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch, ours=1.0)
    assert NAME not in _source(gpu, backend="inductor")
    assert measured.ours == []


def test_a_symbolic_size_keeps_the_table(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch, ours=1.0)
    registry.define_lowerings()
    config = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"}
    gpu.source(_product, _inputs, backend=inductor_ext.backend(build="defer"), dynamic=True, **config)
    assert measured.ours == []


def test_kernels_that_cannot_be_built_are_not_measured(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[jit.JitSpec] = []

    def prepare(specs: Any, settings: Any) -> dict[jit.JitSpec, Any]:
        asked.extend(specs)
        bad = BuildError("does not compile", first_error="no")
        distinct = list(dict.fromkeys(asked))  # configurations may share a binary
        return {spec: bad if position % 2 else object() for position, spec in enumerate(distinct)}

    measured = Measured(monkeypatch, ours=1.0)
    monkeypatch.setattr(jit, "prepare", prepare)
    with caplog.at_level(logging.DEBUG, "inductor_ext"):
        source = _source(gpu, backend=inductor_ext.backend(arch="sm_90a"))
    assert {spec.arch for spec in asked} == {"sm_90a"}
    assert measured.ours
    left_out = re.findall(r"scaled_mm: (\S+) is not measured: does not compile", caplog.text)
    assert left_out and len(left_out) + len(measured.ours) == len(asked) and not set(left_out) & set(measured.ours)
    assert NAME in source


def test_what_was_chosen_is_reported(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reports: list[GraphReport] = []
    measured = Measured(monkeypatch, ours=1.0)
    before = store.snapshot()

    def compiled(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        return compile_graph(gm, inputs, settings.current(build="defer", arch="sm_90a"), on_report=reports.append)

    with caplog.at_level(logging.INFO, "inductor_ext"):
        _source(gpu, backend=compiled)
    (report,) = reports
    (line,) = report.autotuned
    assert line.startswith(f"scaled_mm of [512, 1024], [1024, 1024]: {measured.ours[0]} is the fastest, 1001.0 µs; ")
    assert line.endswith("aten 2000.0") and line in caplog.text
    (spec,) = (jit.JitSpec.from_dict(kernel) for kernel in report.kernels)
    assert spec.source == "scaled_mm/tile.cuh", "a cached graph has its kernel built before its first call"
    ((_, replayed),) = store.replayed(before)
    assert (replayed.autotuned, replayed.kernels) == (report.autotuned, report.kernels)


def test_the_winning_call_computes_the_product() -> None:
    """The function that generated code calls, on a CPU: the reference runs."""
    from torch._inductor.select_algorithm import extern_kernels

    registry.define_lowerings()
    a, w = torch.randn(32, 64).to(E4), torch.randn(48, 64).to(E4)
    s, t, bias = torch.rand(32, 1), torch.rand(1, 48), torch.randn(48).bfloat16()
    out = torch.empty(32, 48, dtype=torch.bfloat16)
    call = getattr(extern_kernels, NAME)
    call(a, w.t(), s, t, bias, config="tile:128x128p", use_fast_accum=True, static_b=False, out=out)
    wanted = ((a.float() @ w.float().t()) * s * t + bias.float()).bfloat16()
    torch.testing.assert_close(out, wanted)
