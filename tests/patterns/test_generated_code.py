"""What Inductor writes around our ops, on a fake H200: planned buffers, their reuse, and caches that are not copied."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext import registry
from inductor_ext.rule import Example
from tests.support.fakegpu import FakeGpu, fake_gpu

E4 = torch.float8_e4m3fn
DYNAMIC = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as fake:
        yield fake


def _source(gpu: FakeGpu, fn: Any, make: Any, *, dynamic: bool | None = False, rules: Any = None) -> str:
    return gpu.source(fn, make, backend=inductor_ext.backend(build="defer", rules=rules or {}), dynamic=dynamic)


def _calls(source: str, op: str) -> list[str]:
    """Lines that call one of our ops, through the dispatcher or straight from ``extern_kernels``."""
    return [line.strip() for line in source.splitlines() if re.search(rf"\binductor_ext[._]{op}\b\S*\(", line)]


def _allocations(source: str) -> list[str]:
    return re.findall(r"(buf\d+) = empty_strided_cuda\(", source)


def _quantise(x: Any, s: Any) -> Any:
    return (x.float() / s).clamp(-448.0, 448.0).to(E4)


def _x(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda")


def _scale() -> torch.Tensor:
    return torch.empty((), device="cuda")


@DYNAMIC
def test_fp8_downcast_writes_into_a_planned_buffer(gpu: FakeGpu, dynamic: bool) -> None:
    source = _source(gpu, _quantise, lambda: (_x(64, 128), _scale()), dynamic=dynamic)
    (call,) = _calls(source, "fp8_downcast")
    assert call.endswith("'f32 div:s0 max:-448.0 min:448.0', torch.float8_e4m3fn, out=buf0)")
    assert _allocations(source) == ["buf0"]
    shape = r"\(s\d+, s\d+\), \(s\d+, 1\)" if dynamic else r"\(64, 128\), \(128, 1\)"
    assert re.search(rf"buf0 = empty_strided_cuda\({shape}, torch.float8_e4m3fn\)", source)
    assert ".run(" not in source.split("benchmark_compiled_module")[0].split("runner = ")[0]


@DYNAMIC
def test_fp8_quantize_writes_into_two_planned_buffers(gpu: FakeGpu, dynamic: bool) -> None:
    def rowwise(x: Any) -> Any:
        s = (x.abs().amax(-1, keepdim=True) / 448.0).float()
        return _quantise(x, s), s

    source = _source(gpu, rowwise, lambda: (_x(64, 128),), dynamic=dynamic)
    (call,) = _calls(source, "fp8_quantize")
    assert call.endswith("out0=buf0, out1=buf1)")
    assert _allocations(source) == ["buf0", "buf1"]
    rows = r"s\d+" if dynamic else "64"
    assert re.search(rf"buf1 = empty_strided_cuda\(\({rows}, 1\), \(1, 1\), torch.float32\)", source)
    assert "return (buf0, buf1, )" in source


def test_one_scale_is_not_filled_before_it_is_written(gpu: FakeGpu) -> None:
    """Inductor makes a kernel of an empty tensor without dimensions: a launch for each scale of a tensor."""

    def linear(x: Any, w: Any, t: Any) -> Any:
        s = (x.abs().amax() / 448.0).float()
        return torch._scaled_mm(_quantise(x, s), w.t(), s, t, out_dtype=torch.bfloat16)

    def make() -> tuple[Any, ...]:
        return _x(64, 128), torch.empty(128, 128, dtype=E4, device="cuda"), _scale()

    source = _source(gpu, linear, make)
    (call,) = _calls(source, "fp8_quantize")
    assert call.endswith("out0=buf0, out1=reinterpret_tensor(buf1, (), (), 0))")
    assert "buf1 = empty_strided_cuda((1, ), (1, ), torch.float32)" in source
    assert "triton_" not in source.split("def call")[1]


@DYNAMIC
def test_a_chain_of_ops_reuses_the_first_ones_buffer(gpu: FakeGpu, dynamic: bool) -> None:
    def twice(x: Any, w: Any, s: Any, t: Any) -> Any:
        first = torch._scaled_mm(_quantise(x, s), w.t(), s, t, out_dtype=torch.bfloat16)
        return torch._scaled_mm(_quantise(first, s), w.t(), s, t, out_dtype=torch.bfloat16)

    def make() -> tuple[Any, ...]:
        return _x(64, 128), torch.empty(128, 128, dtype=E4, device="cuda"), _scale(), _scale()

    source = _source(gpu, twice, make, dynamic=dynamic, rules={"scaled_mm": "off"})
    first, second = (re.search(r"out=(buf\d+)\)", call).group(1) for call in _calls(source, "fp8_downcast"))  # type: ignore[union-attr]
    assert re.search(rf"{second} = {first}; del {first}  # reuse", source), source
    assert len(_allocations(source)) == 2, "one FP8 and one bf16 buffer serve both layers"


@DYNAMIC
def test_freed_before_it_is_reused(gpu: FakeGpu, dynamic: bool) -> None:
    """Without reuse in sight the buffer is at least freed: the planner knows when the op's output dies."""

    def one(x: Any, w: Any, s: Any, t: Any) -> Any:
        return torch._scaled_mm(_quantise(x, s), w.t(), s, t, out_dtype=torch.bfloat16)

    def make() -> tuple[Any, ...]:
        return _x(64, 128), torch.empty(128, 128, dtype=E4, device="cuda"), _scale(), _scale()

    assert "del buf0" in _source(gpu, one, make, dynamic=dynamic, rules={"scaled_mm": "off"})


def _cache_examples() -> list[Any]:
    rule = registry.rule_named("downcast_fp8")
    return [pytest.param(example, id=example.name) for example in rule.matches if example.mode == "auto"]


@pytest.mark.parametrize("tokens", ["static", "dynamic"])
@pytest.mark.parametrize("example", _cache_examples())
def test_caches_are_written_in_place(gpu: FakeGpu, example: Example, tokens: str) -> None:
    def make() -> tuple[Any, ...]:
        inputs = example.inputs("cuda")
        for value in inputs:
            if tokens == "dynamic" and value.dim() and value.shape[0] == 16:
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return inputs

    source = _source(gpu, example.fn, make, dynamic=True if example.dynamic else None)
    body = source.split("runner = ")[0]
    calls = _calls(body, "downcast_fp8")
    assert len(calls) == example.count
    inputs = example.inputs("cpu")
    caches = [value for value in inputs if isinstance(value, torch.Tensor) and value.element_size() == 1]
    assert caches
    for call in calls:
        arguments = re.findall(r"arg\d+_1|buf\d+", call.split("(", 1)[1])
        made_here = example.name.startswith(("two_indices", "blocks_and_rows"))  # indices are
        assert not any(name.startswith("buf") for name in arguments[:4]) or made_here, call
    smallest = min(value.numel() for value in caches)
    for line in body.splitlines():
        if "empty_strided_cuda" in line or "copy_if_misaligned" in line:
            assert "float8" not in line and "uint8" not in line, f"a copy of a cache: {line}"
        launched = re.search(r"\.run\(.*?, (\d+), stream", line)
        assert not launched or int(launched.group(1)) < smallest, f"a kernel as large as a cache: {line}"


@pytest.mark.parametrize("through", ["direct", "view"])
def test_reading_old_rows_first_copies_no_cache(gpu: FakeGpu, through: str) -> None:
    def store(k: Any, kc: Any, at: Any) -> Any:
        target = kc if through == "direct" else kc.view(-1, 8, 64)
        old = target[at].float() + 1
        target[at] = _quantise(k, 0.5)
        return old

    shape = (64, 8, 64) if through == "direct" else (4, 16, 8, 64)
    make = lambda: (_x(16, 8, 64), torch.empty(shape, dtype=E4, device="cuda"), torch.arange(16, device="cuda"))  # noqa: E731
    body = _source(gpu, store, make).split("runner = ")[0]
    (call,) = _calls(body, "downcast_fp8")
    assert "buf" not in call and not re.search(r"empty_strided_cuda\(.*float8", body)
    lines = [line for line in body.splitlines() if ".run(" in line or call in line]
    assert call in lines[-1], "old rows are read before the store"


def test_stock_copies_what_ours_does_not(gpu: FakeGpu) -> None:
    """The test of the test: stock Inductor copies the caches behind ``unbind(0)``, and the checks above would see it."""
    (example,) = [example for example in registry.rule_named("downcast_fp8").matches if example.name == "unbind"]
    body = gpu.source(example.fn, lambda: example.inputs("cuda")).split("runner = ")[0]
    assert re.search(r"empty_strided_cuda\(.*float8", body)


def test_an_older_gpu_keeps_its_graph() -> None:
    with fake_gpu((8, 0)) as ampere:
        source = _source(ampere, _quantise, lambda: (_x(64, 128), _scale()))
    assert _calls(source, "fp8_downcast") == [] and ".run(" in source
