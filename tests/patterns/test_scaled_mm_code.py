"""What Inductor writes around scaled_mm, on a fake H200: planned buffers and their reuse, no copies, symbolic sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import inductor_ext
from tests.support import scaled_tables as tables
from tests.support.fakegpu import FakeGpu, fake_gpu
from tests.support.products import BF16, empty, one, quantise, scale
from tests.support.scaled_tables import FASTER, STREAM, TILE

forgotten = pytest.fixture(autouse=True)(tables.forgetting)
OURS = {"scaled_mm": "always", "scaled_mm_siblings": "always", "scaled_mm_cat": "always"}
STOCK = dict.fromkeys(OURS, "off")


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as fake:
        yield fake


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {(128, 128): FASTER, (256, 128): FASTER, (384, 128): FASTER})


def body(gpu: FakeGpu, fn: Any, make: Callable[[], Any], rules: Any = OURS, dynamic: bool | None = False) -> str:
    """The generated ``call``, without comments."""
    source = gpu.source(fn, make, backend=inductor_ext.backend(build="defer", rules=rules), dynamic=dynamic)
    lines = source.split("runner = ")[0].splitlines()
    return "\n".join(line for line in lines if not line.strip().startswith("#"))


def calls(source: str) -> list[str]:
    return [line.strip() for line in source.splitlines() if "extern_kernels.inductor_ext_scaled_mm(" in line]


def kernels(source: str) -> list[str]:
    return re.findall(r"(triton_\w+)\.run\(", source)


def bf16_buffers(source: str) -> list[str]:
    return re.findall(r"(buf\d+) = empty_strided_cuda\(.*torch.bfloat16\)", source)


def weights(count: int, n: int = 128, k: int = 128) -> tuple[Any, ...]:
    return tuple(value for _ in range(count) for value in (empty(n, k), scale()))


def two_layers(x: Any, s: Any, w: Any, t: Any, u: Any, r: Any) -> Any:
    return one(quantise(one(quantise(x, s), w, s, t), s), u, s, r)


def layer_inputs() -> tuple[Any, ...]:
    return empty(64, 128, dtype=BF16), scale(), *weights(2)


def test_a_product_writes_into_a_planned_buffer(gpu: FakeGpu) -> None:
    source = body(gpu, one, lambda: (empty(64, 128), empty(256, 128), scale(), scale()))
    (call,) = calls(source)
    (buffer,) = bf16_buffers(source)
    assert f"{buffer} = empty_strided_cuda((64, 256), (256, 1), torch.bfloat16)" in source
    assert call.endswith(f"[None], torch.bfloat16, False, False, '{TILE}', out={buffer})")
    assert "reinterpret_tensor(arg" in call, "b is the weight where it lies"
    assert "_scaled_mm(" not in source.replace(call, "") and kernels(source) == []


def test_the_kernel_is_named_for_its_size(gpu: FakeGpu) -> None:
    (call,) = calls(body(gpu, one, lambda: (empty(16, 128), empty(128, 128), scale(), scale())))
    assert f"'{STREAM}'" in call


def test_buffers_are_reused(gpu: FakeGpu) -> None:
    """The second layer's FP8 and bf16 buffers are the first one's."""
    source = body(gpu, two_layers, layer_inputs)
    assert len(calls(source)) == 2 and "aten._scaled_mm" not in source and "extern_kernels._scaled_mm" not in source
    assert len(re.findall(r"= empty_strided_cuda\(", source)) == 2, source
    assert len(re.findall(r"; del buf\d+  # reuse", source)) == 2, source


def test_a_product_that_nobody_needs_any_more_is_freed(gpu: FakeGpu) -> None:
    def summed(a: Any, s: Any, w: Any, t: Any) -> Any:
        return torch.sin(one(a, w, s, t)).sum()

    source = body(gpu, summed, lambda: (empty(64, 128), scale(), *weights(1)))
    (call,) = calls(source)
    (written,) = re.findall(r"out=(buf\d+)\)", call)
    assert f"del {written}" in source


def concatenated(a: Any, s: Any, w: Any, t: Any, c: Any, u: Any, r: Any) -> Any:
    return torch.cat([one(a, w, s, t), one(c, u, s, r)], 1)


def test_a_concatenation_is_written_in_place(gpu: FakeGpu) -> None:
    def make() -> tuple[Any, ...]:
        return empty(64, 128), scale(), *weights(1), empty(64, 128), *weights(1)

    source = body(gpu, concatenated, make)
    (call,) = calls(source)
    assert kernels(source) == [] and len(bf16_buffers(source)) == 1
    assert "empty_strided_cuda((64, 256), (256, 1), torch.bfloat16)" in source
    assert call.count("reinterpret_tensor(arg") == 2 and call.startswith("extern_kernels.inductor_ext_scaled_mm([arg")
    stock = body(gpu, concatenated, make, STOCK)
    assert "(256, 1)" in stock and (kernels(stock) or len(bf16_buffers(stock)) > 1), "stock has a copy or more buffers to see"


def gate_up(a: Any, s: Any, w: Any, t: Any, u: Any, r: Any) -> Any:
    """With an activation that scaled_mm_act_mul does not have."""
    return torch.tanh(one(a, w, s, t)) * one(a, u, s, r)


def test_siblings_are_read_where_they_lie(gpu: FakeGpu) -> None:
    """One launch, one buffer, and one fused kernel that reads both halves of it."""
    source = body(gpu, gate_up, lambda: (empty(64, 128), scale(), *weights(2)))
    (call,) = calls(source)
    assert "empty_strided_cuda((64, 256), (256, 1), torch.bfloat16)" in source
    (kernel,) = re.findall(r"triton_\w+\.run\((.*)\)", source)
    (written,) = re.findall(r"out=(buf\d+)\)", call)
    assert kernel.split(", ")[0] == written and len(bf16_buffers(source)) == 2
    assert len(kernels(source)) == 1


def test_a_product_of_a_sibling_reads_its_columns(gpu: FakeGpu) -> None:
    """An operator that is not fused gets a view of the columns: attention, here, by heads."""

    def attention(a: Any, s: Any, *pairs: Any) -> Any:
        q, k, v = (one(a, w, s, t).view(2, 32, 2, 64).transpose(1, 2) for w, t in zip(pairs[::2], pairs[1::2]))
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    source = body(gpu, attention, lambda: (empty(64, 128), scale(), *weights(3)))
    (call,) = calls(source)
    (written,) = re.findall(r"out=(buf\d+)\)", call)
    (line,) = [line for line in source.splitlines() if "flash_attention" in line and "(" in line and "reinterpret" in line]
    for offset in (0, 128, 256):
        assert f"reinterpret_tensor({written}, (2, 2, 32, 64), (12288, 64, 384, 1), {offset})" in line
    assert kernels(source) == [], "no copy"


def test_matrix_products_of_siblings_read_their_columns(gpu: FakeGpu) -> None:
    def squared(a: Any, s: Any, w: Any, t: Any, u: Any, r: Any) -> Any:
        return torch.mm(one(a, w, s, t), one(a, u, s, r).t())

    source = body(gpu, squared, lambda: (empty(64, 128), scale(), *weights(2)))
    (call,) = calls(source)
    (written,) = re.findall(r"out=(buf\d+)\)", call)
    assert f"reinterpret_tensor({written}, (64, 128), (256, 1), 0)" in source
    assert f"reinterpret_tensor({written}, (128, 64), (1, 256), 128)" in source and kernels(source) == []


def test_a_dynamic_m_has_a_symbolic_buffer(gpu: FakeGpu) -> None:
    def make() -> tuple[Any, ...]:
        a = empty(48, 128)
        torch._dynamo.mark_dynamic(a, 0)
        return a, scale(), *weights(2)

    source = body(gpu, gate_up, make, dynamic=None)
    (call,) = calls(source)
    assert re.search(r"empty_strided_cuda\(\(s\d+, 256\), \(256, 1\), torch.bfloat16\)", source)
    assert re.search(r"torch.bfloat16, False, False, '', out=buf\d+\)$", call), "the op chooses when it runs"


def test_what_inductor_lays_out_is_what_the_kernel_wants(gpu: FakeGpu) -> None:
    """Quantising ``x.t()`` would give columns, if the op did not ask for the rows that were traced."""

    def transposed(x: Any, s: Any, w: Any, t: Any) -> Any:
        return one(quantise(x.t().contiguous(), s), w, s, t)

    rules = {**OURS, "fp8_downcast": "off"}
    source = body(gpu, transposed, lambda: (empty(128, 64, dtype=BF16), scale(), *weights(1)), rules)
    assert "empty_strided_cuda((64, 128), (128, 1), torch.float8_e4m3fn)" in source and len(calls(source)) == 1


def test_an_older_gpu_keeps_torchs_operator() -> None:
    with fake_gpu((8, 9)) as ada:
        source = body(ada, one, lambda: (empty(64, 128), empty(256, 128), scale(), scale()))
    assert calls(source) == [] and "extern_kernels._scaled_mm(" in source
