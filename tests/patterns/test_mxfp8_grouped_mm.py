"""The rules for MXFP8 grouped products beyond their examples: what a CPU cannot show, GPUs, and the code Inductor writes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext import MXFP8Weight, torch_compat
from inductor_ext.kernels.mxfp8_grouped_mm import op as grouped
from inductor_ext.patterns import mxfp8_scaled_grouped_mm as scaled
from inductor_ext.report.explain import Explanation
from tests.support.fakegpu import FakeGpu, fake_cuda_inputs, fake_gpu

BF16 = torch.bfloat16
ALWAYS = {"mxfp8_grouped_mm": "always", "mxfp8_scaled_grouped_mm": "always"}


def on_cuda(
    fn: Any, make: Any, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), **rules: str
) -> Explanation:
    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        return inductor_ext.explain(fn, *make("cuda"), rules=rules)


def refusal(found: Explanation, rule: str) -> Any:
    (only,) = [each for each in found.refusals if each.rule == rule]
    assert only.node and only.wanted and only.found and only.source
    return only


# ---- scaled_grouped_mm: what no CPU computes ------------------------------------------------------------------------------

product, inputs, tiles = scaled._product, scaled._inputs, scaled._tiles
SWIZZLE, PLAIN = torch.nn.functional.SwizzleType.SWIZZLE_32_4_4, torch.nn.functional.SwizzleType.NO_SWIZZLE
NEAR: dict[str, Any] = {
    "nvfp4_blocks": ("scaling recipe", lambda *x: product(*x, **scaled._other("BlockWise1x16"))),
    "one_side_swizzled": ("scale layout", lambda *x: product(*x, swizzle_a=SWIZZLE)),
    "two_swizzles": ("scale layout", lambda *x: product(*x, swizzle_a=[PLAIN, PLAIN], swizzle_b=[PLAIN, PLAIN])),
    "rows_apart": ("x is not row-major", lambda x, s, w, t, o: product(torch.cat((x, x[:, :8]), 1)[:, :64], s, w, t, o)),
    "ends_apart": ("offs", lambda x, s, w, t, o: product(x, s, w, t, torch.stack((o, o), 1)[:, 0])),
    "bias": ("bias is given", lambda x, s, w, t, o: product(x, s, w, t, o, bias=t[:, :, 0].view(torch.uint8).to(BF16))),
    "fp8_output": ("output dtype", lambda *x: product(*x, output_dtype=torch.float8_e4m3fn)),
    "no_offs": ("offs is missing", lambda x, s, w, t, o: product(x, s, w, t, None)),
    "batched": ("what the groups divide", lambda x, s, w, t, o: product(w, t, w, t, None)),
    "k_is_48": ("K is not a multiple of 32", lambda x, s, w, t, o: product(x[:, :48], s, w[:, :, :48], t, o)),
    "too_few_scales": ("x_scale", lambda x, s, w, t, o: product(x, s[:11], w, t, o)),
    "row_major_weight": ("w", lambda x, s, w, t, o: product(x, s, w.mT.contiguous().mT, t, o)),
    "columns": ("x is not row-major", lambda x, s, w, t, o: product(x[:8].t().contiguous().t(), s[:8], w, t, o)),
    "long_offs": ("offs", lambda x, s, w, t, o: product(x, s, w, t, o.long())),
    "e5m2": ("dtype of x", lambda x, s, w, t, o: product(x.float().to(torch.float8_e5m2), s, w, t, o)),
    "contraction": ("contraction_dim is given", lambda *x: product(*x, contraction_dim=[1, 0])),
    "float_scales": ("scale dtype", lambda x, s, w, t, o: product(x, torch.ones_like(s, dtype=torch.float32), w, t, o)),
}


@pytest.mark.parametrize("name", list(NEAR))
def test_scaled_near_misses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason, fn = NEAR[name]
    if "meta kernel of _scaled_grouped_mm_v2" not in torch_compat.trace_scaled_mm_v2():
        pytest.skip("this torch's own meta kernel refuses such calls, before any rule sees them")
    found = on_cuda(fn, inputs, monkeypatch, **ALWAYS)
    assert "mxfp8_scaled_grouped_mm" not in found.counts()
    assert refusal(found, "mxfp8_scaled_grouped_mm").reason == reason


# ---- GPUs -----------------------------------------------------------------------------------------------------------------


def weights_only(device: str) -> tuple[Any, ...]:
    weight = MXFP8Weight.quantize(torch.randn(4, 48, 64).bfloat16()).to(device)
    return torch.randn(12, 64, device=device).bfloat16(), weight, torch.tensor([3, 3, 10, 12], dtype=torch.int32, device=device)


def both(device: str, swizzled: bool = True) -> tuple[Any, ...]:
    weight = MXFP8Weight.quantize(torch.randn(4, 48, 64).bfloat16(), activations="mxfp8", swizzled=swizzled).to(device)
    return torch.randn(12, 64, device=device).bfloat16(), weight, torch.tensor([3, 3, 10, 12], dtype=torch.int32, device=device)


def grouped_mm(x: Any, w: Any, offs: Any) -> torch.Tensor:
    return torch._grouped_mm(x, w.transpose(-2, -1), offs)


@pytest.mark.parametrize(("capability", "make"), [((9, 0), weights_only), ((10, 0), both)], ids=["hopper", "blackwell"])
def test_a_kernel_that_has_not_run_waits_for_always(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], make: Any
) -> None:
    monkeypatch.setattr("inductor_ext.patterns.support.grouped_product.HAS_RUN", frozenset())
    found = on_cuda(grouped_mm, make, monkeypatch, capability)
    only = refusal(found, "mxfp8_grouped_mm")
    assert only.reason == "the kernel has not been run on this GPU yet" and not found.rewrites
    assert only.wanted == 'rules={"mxfp8_grouped_mm": "always"}' and only.found == f"sm_{capability[0]}0a"
    assert on_cuda(grouped_mm, make, monkeypatch, capability, **ALWAYS).counts() == {"mxfp8_grouped_mm": 1}
    monkeypatch.setattr("inductor_ext.patterns.support.grouped_product.HAS_RUN", frozenset({only.found}))
    assert on_cuda(grouped_mm, make, monkeypatch, capability).counts() == {"mxfp8_grouped_mm": 1}


@pytest.mark.parametrize(
    ("capability", "make", "wanted"),
    [
        ((9, 0), both, "plain scales"),
        ((10, 0), weights_only, "x in MXFP8 too"),
        ((10, 0), lambda d: both(d, swizzled=False), "scales in tiles of 128 x 4"),
        ((8, 9), weights_only, "one of "),
    ],
    ids=["swizzled_on_hopper", "bf16_on_blackwell", "plain_on_blackwell", "ada"],
)
def test_no_kernel_for_this_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], make: Any, wanted: str) -> None:
    """PyTorch's operators compute it then, forced or not."""
    found = on_cuda(grouped_mm, make, monkeypatch, capability, **ALWAYS)
    only = refusal(found, "mxfp8_grouped_mm")
    assert only.reason == "no kernel for this GPU does it" and only.wanted.startswith(wanted) and not found.rewrites


def many_rows(device: str, activations: str = "bf16") -> tuple[Any, ...]:
    weight = MXFP8Weight.quantize(torch.randn(2, 16, 128).bfloat16(), activations=activations).to(device)
    return torch.randn(4097, 128, device=device).bfloat16(), weight, torch.tensor([7, 4097], dtype=torch.int32, device=device)


def test_many_rows_in_bf16_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured: its product of a bf16 copy is faster there. FP8 tokens, and who asks for it, take the kernel."""
    only = refusal(on_cuda(grouped_mm, many_rows, monkeypatch), "mxfp8_grouped_mm")
    assert only.reason == "it would not be faster" and only.found == "2048 rows in bf16"
    assert only.wanted == 'at most 2048 rows an expert, or FP8 tokens (activations="fp8")'
    taken = {"mxfp8_grouped_mm": 1}
    assert on_cuda(grouped_mm, many_rows, monkeypatch, **ALWAYS).counts() == taken
    in_fp8 = on_cuda(grouped_mm, lambda d: many_rows(d, "fp8"), monkeypatch)
    assert in_fp8.counts()["mxfp8_grouped_mm"] == 1


def test_every_target_with_a_kernel_is_known() -> None:
    assert set(grouped.KERNELS) == {"sm_90a", "sm_100a"} and set(grouped.KERNELS) >= grouped.HAS_RUN


def test_where_pytorch_would_lose_the_context_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scaled._warn.cache_clear()
    monkeypatch.setattr("inductor_ext.patterns.support.grouped_product.HAS_RUN", frozenset())
    with caplog.at_level(logging.WARNING, "inductor_ext"):
        found = on_cuda(product, inputs, monkeypatch)
    assert refusal(found, "mxfp8_scaled_grouped_mm").reason == "the kernel has not been run on this GPU yet"
    (said,) = [record.getMessage() for record in caplog.records if "MX tensor core" in record.getMessage()]
    assert "(compute capability 9.0) has no MX tensor core" in said and "loses its CUDA context" in said
    assert 'wanted rules={"mxfp8_scaled_grouped_mm": "always"}, found sm_90a' in said


def test_no_warning_where_pytorch_can(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    scaled._warn.cache_clear()
    monkeypatch.setattr("inductor_ext.patterns.support.grouped_product.HAS_RUN", frozenset())
    with caplog.at_level(logging.WARNING, "inductor_ext"):
        found = on_cuda(product, tiles, monkeypatch, (10, 0))
        assert refusal(found, "mxfp8_scaled_grouped_mm").found == "sm_100a"
        on_cuda(product, inputs, monkeypatch, **ALWAYS)
    assert "MX tensor core" not in caplog.text


def test_no_warning_for_another_recipe(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """PyTorch has kernels for Hopper that take a scale of each row."""
    scaled._warn.cache_clear()
    with caplog.at_level(logging.WARNING, "inductor_ext"):
        found = on_cuda(lambda *x: product(*x, **scaled._other("RowWise")), scaled._row_wise, monkeypatch)
    assert refusal(found, "mxfp8_scaled_grouped_mm").reason == "scaling recipe"
    assert "MX tensor core" not in caplog.text


def turned(device: str) -> tuple[Any, ...]:
    """As many experts as N and K, so that shapes do not tell what was turned."""
    quantize = torch.ops.inductor_ext.mxfp8_quantize
    x, x_scale = quantize(torch.randn(40, 32, device=device).bfloat16(), None, "rceil", False)
    w, w_scale = quantize(torch.randn(32, 32, 32, device=device).bfloat16(), None, "rceil", False)
    return x, x_scale, w, w_scale, torch.arange(32, device=device, dtype=torch.int32)


def test_a_weight_turned_another_way_is_a_near_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torch.nn.functional.ScalingType.BlockWise1x32

    def fn(x: Any, s: Any, w: Any, t: Any, o: Any) -> torch.Tensor:
        return torch.nn.functional.scaled_grouped_mm(x, w.permute(1, 2, 0), s, kind, t, kind, offs=o)

    found = on_cuda(fn, turned, monkeypatch, **ALWAYS)
    assert refusal(found, "mxfp8_scaled_grouped_mm").reason == "w"


def test_swizzled_scales_on_hopper_are_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's kernel cannot run there, and ours wants plain scales: the op multiplies in bf16, in every mode."""
    found = on_cuda(product, tiles, monkeypatch)
    (event,) = found.rewrites
    assert "PyTorch's bf16 product of the dequantised operands runs instead" in event.why
    with FakeTensorMode() as mode:
        x, x_scale, w, *_ = (mode.from_tensor(each) for each in tiles("cpu"))
        assert grouped.KERNELS["sm_90a"].unsupported(x, x_scale, w, BF16, True) is not None, "no kernel: `stock` runs"


def test_pytorchs_own_kernels_are_not_replaced() -> None:
    torch_compat.trace_scaled_mm_v2()
    keys = [torch._C._dispatch_dump(f"aten::{op}") for op in ("_scaled_mm_v2", "_grouped_mm")]
    assert all("inductor_ext" not in dump and "torch_compat" not in dump for dump in keys)


# ---- generated code -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as fake:
        yield fake


def body(gpu: FakeGpu, fn: Any, make: Any) -> str:
    source = gpu.source(fn, make, backend=inductor_ext.backend(build="defer", rules=ALWAYS))
    lines = source.split("runner = ")[0].splitlines()
    return "\n".join(line for line in lines if not line.strip().startswith("#"))


def calls(source: str) -> list[str]:
    return [line.strip() for line in source.splitlines() if "inductor_ext_mxfp8_grouped_mm(" in line]


def two_layers(x: Any, w: Any, offs: Any, u: Any) -> Any:
    return grouped_mm(torch.sin(grouped_mm(torch.sin(x), w, offs)), u, offs)


def layer_inputs() -> tuple[Any, ...]:
    x, _, offs = weights_only("cuda")
    return x, *(each for pair in ((square(), offs), (square(),)) for each in pair)


def square() -> MXFP8Weight:
    return MXFP8Weight.quantize(torch.randn(4, 64, 64).bfloat16()).to("cuda")


def test_the_output_is_a_planned_buffer(gpu: FakeGpu) -> None:
    source = body(gpu, grouped_mm, lambda: weights_only("cuda"))
    (call,) = calls(source)
    (buffer,) = re.findall(r"(buf\d+) = empty_strided_cuda\(\(12, 48\), \(48, 1\), torch.bfloat16\)", source)
    assert call.endswith(f"torch.bfloat16, False, 32, out={buffer})")
    assert len(re.findall(r"= empty_strided_cuda\(", source)) == 1, "and nothing else: no bf16 weight"
    assert "_grouped_mm(" not in source.replace(call, "") and ".run(" not in source


def test_buffers_are_reused(gpu: FakeGpu) -> None:
    """The second product writes where the first one's input was."""
    source = body(gpu, two_layers, layer_inputs)
    assert len(calls(source)) == 2
    assert len(re.findall(r"= empty_strided_cuda\(", source)) <= 2 and "# reuse" in source, source


def test_quantised_activations_are_not_dequantised(gpu: FakeGpu) -> None:
    source = body(gpu, grouped_mm, lambda: both("cuda", swizzled=False))
    (call,) = calls(source)
    (quantise,) = [line for line in source.splitlines() if "inductor_ext_mxfp8_quantize(" in line]
    data, scales = re.findall(r"out\d=(buf\d+)", quantise)
    assert call.startswith(f"extern_kernels.inductor_ext_mxfp8_grouped_mm({data}, {scales}, arg")
    assert "mxfp8_round" not in source and ".run(" not in source
    assert re.search(rf"{scales} = empty_strided_cuda\(\(12, 2\), \(2, 1\), torch.float8_e8m0fnu\)", source)


def test_stock_makes_a_bf16_weight() -> None:
    """The test of the test: without the rule there is a kernel and a buffer to be seen."""
    with fake_gpu() as fake:
        backend = inductor_ext.backend(build="defer", rules={"mxfp8_grouped_mm": "off"})
        source = fake.source(grouped_mm, lambda: weights_only("cuda"), backend=backend)
    assert re.search(r"empty_strided_cuda\(\(4, 48, 64\), .*torch.bfloat16\)", source) or ".run(" in source
