"""What a result says: kernels by class, the floor, the tables, the chart and the page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from inductor_ext.bench import breakdown, chart, families, floor, page, tables
from inductor_ext.bench.breakdown import ATTENTION, GAPS, GEMM, MEMORY, MEMSET, OTHER
from inductor_ext.bench.model import MODELS
from inductor_ext.bench.workload import Workload
from inductor_ext.cli import app

KERNELS = {
    "nvjet_qqtst_128x128_128x6_2x1_v_bz_ovscale_TNT": GEMM,
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int, int>, Main> >(Params)": GEMM,
    "void inductor_ext::scaled_mm_tile_kernel<inductor_ext::Problem<__nv_bfloat16>, 128, 128>(inductor_ext::TileParams)": GEMM,
    "void inductor_ext::scaled_mm_stream_kernel<__nv_bfloat16, 64>(inductor_ext::StreamParams)": GEMM,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasLt::cublasSplitKParams<float>)": GEMM,
    "triton_tem_fused__scaled_mm_3": GEMM,
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0": ATTENTION,
    "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__tensorptrbf16": ATTENTION,
    "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>, false, true>(flash::Flash_fwd_params)": ATTENTION,
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>)": ATTENTION,
    "triton_tem_fused_flex_attention_0": ATTENTION,
    "triton_per_fused__scaled_dot_product_cudnn_attention_amax_div_1": MEMORY,
    "triton_red_fused__scaled_mm_add_mean_mul_pow_rsqrt_4": MEMORY,
    "void inductor_ext::fp8_quantize_row_kernel<__nv_bfloat16, 8>(inductor_ext::Fp8QuantizeRowParams)": MEMORY,
    "void inductor_ext::rms_norm_quantize_kernel<128>(inductor_ext::RmsNormQuantizeParams)": MEMORY,
    "void at::native::vectorized_elementwise_kernel<8, at::native::FillFunctor<int>, std::array<char*, 1ul> >(int)": MEMORY,
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, unsigned int, 4, 64, 64>(float*)": MEMORY,
    "void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long, unsigned int>(int)": MEMORY,
    "Memset (Device)": MEMSET,
    "Memcpy DtoD (Device -> Device)": MEMSET,
    "somebody_elses_kernel": OTHER,
}


@pytest.mark.parametrize(("name", "wanted"), KERNELS.items(), ids=[name[:40] for name in KERNELS])
def test_class_of_a_kernel(name: str, wanted: str) -> None:
    assert breakdown.class_of(name) == wanted


def test_breakdown_adds_up() -> None:
    found = breakdown.classify([("nvjet_a", 2, 30.0), ("nvjet_b", 1, 10.0), ("Memset (Device)", 3, 5.0)], 60.0)
    assert found[GEMM] == breakdown.Part(3, 40.0) and found[MEMSET] == breakdown.Part(3, 5.0)
    assert found[GAPS].us == 15.0 and OTHER not in found
    assert breakdown.classify([], 60.0) == {}


def test_floor_of_the_published_case() -> None:
    """Qwen3-0.6B, 14 × 512, by hand: 6.31e12 operations; 48 KiB of memory-bound bytes a token and layer."""
    found = floor.floor_us(MODELS["Qwen3-0.6B"], Workload((512,) * 14), "row")
    params = 28 * (4096 * 1024 + 1024 * 2048 + 6144 * 1024 + 1024 * 3072)
    assert found[GEMM] == pytest.approx(2 * params * 7168 / 1300e12 * 1e6)
    layer = 2 * (7 * 1024 + 4) + 4 * 24 * 128 + (3 * 2048 + 4) + (5 * 3072 + 4)
    assert found[MEMORY] == pytest.approx((28 * layer + 8 * 1024 + 8) * 7168 / 4.15e12 * 1e6)
    operations = 4 * 16 * 128 * 14 * 512 * 513 / 2
    assert found[ATTENTION] == pytest.approx(28 * max(operations / 600e12, 7168 * 48 * 128 * 2 / 4.15e12) * 1e6)


def test_floor_of_one_token_is_the_weights_bytes() -> None:
    shape = dataclasses.replace(MODELS["Qwen3-8B"], layers=1)
    weights = sum(each.n * each.k for each in families.linears(shape))
    found = floor.floor_us(shape, Workload((1,)), "row")
    assert found[GEMM] == pytest.approx(weights / 4.15e12 * 1e6, rel=1e-2)
    assert floor.floor_us(shape, Workload((1,)), "none")[GEMM] == pytest.approx(2 * found[GEMM], rel=1e-2)


def test_padding_counts_and_packing_saves_it() -> None:
    shape = MODELS["tiny"]
    padded, packed = (floor.floor_us(shape, Workload((16, 512), pack), "row") for pack in (False, True))
    assert all(padded[name] > packed[name] for name in padded)


def side(name: str, ms: float | None, parts: dict[str, float], **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "backend": "inductor_ext" if name.startswith(("ours", "+", "no rules")) else "inductor",
        "step_ms": ms,
        "of_stock": ms and round(10.0 / ms, 4),
        "items_per_s": ms and 14 / ms * 1e3,
        "tokens_per_s": ms and round(7168 / ms * 1e3),
        "compile_s": 60.0,
        "rewrites": {},
        "cosine_to_bf16": {"inputs": 8, "mean": 0.9991, "min": 0.9985},
        "breakdown": {key: {"launches": 2, "us": us} for key, us in parts.items()},
        "kernels": [["nvjet", 2, 5000.0]],
        "error": "",
        **more,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    stock = side("stock", 10.0, {GEMM: 5000.0, ATTENTION: 2000.0, MEMORY: 2000.0, MEMSET: 100.0, GAPS: 900.0})
    parts = {GEMM: 5000.0, ATTENTION: 2000.0, MEMORY: 1200.0, MEMSET: 0.0, GAPS: -200.0}
    cosine = {"inputs": 8, "mean": 0.9990, "min": 0.9984, "less_stock": -0.0001, "standard_error": 0.00005}
    ours = side("ours", 8.0, parts, rewrites={"scaled_mm": 4}, cosine_to_bf16=cosine)
    lower = floor.floor_us(MODELS["Qwen3-0.6B"], Workload((512,) * 14), "row")
    return {
        "environment": {"GPU": "NVIDIA H200", "torch": "2.11.0", "date": "2026-11-21"},
        "what": "Qwen3-0.6B shape, 28 layers, 14 × 512 tokens",
        "quantisation": "FP8 row by torchao",
        "device": "cuda",
        "attention": {"ours": "sdpa", "others": "sdpa"},
        "how_timed": "median",
        "compiled_together": False,
        "floor": {"rates": {"gpu": "H200"}, "us": lower, "ms": sum(lower.values()) / 1e3},
        "sides": [stock, ours],
    }


def test_tables(result: dict[str, Any]) -> None:
    times, kernels, rewrites = tables.tables(result)
    assert times.rows[1][:3] == ["ours", "8.000", "1.25×"] and times.rows[2][0] == "floor (H200)"
    assert times.rows[0][-1] == "–" and times.rows[1][-1] == "-0.000100 ± 0.000050"
    assert kernels.rows[1][0] == "ours" and kernels.rows[1][-2:] == ["-200", "10"]
    assert rewrites.rows == [["ours", "4"]]
    assert all(len(row) == len(section.columns) for section in (times, kernels, rewrites) for row in section.rows)


def test_ablation_says_what_each_rule_saved(result: dict[str, Any]) -> None:
    result["sides"] = [side("stock", 10.0, {}), side("no rules", 10.1, {}), side("+ scaled_mm", 9.0, {})]
    times = tables.tables(result)[0]
    assert times.columns[-1] == "saved, ms"
    assert [row[-1] for row in times.rows] == ["–", "-0.100", "+1.100", "–"]
    assert all(len(row) == len(times.columns) for row in times.rows)


def test_a_side_that_failed_is_shown_and_not_drawn(result: dict[str, Any]) -> None:
    result["sides"][1] = side("ours", None, {}, error="the process of 'ours' ended with 1", cosine_to_bf16=None, compile_s=None)
    assert tables.tables(result)[0].rows[1][1] == "failed"
    assert [bar.name for bar in chart.bars(result)] == ["stock", "floor"]
    assert "the process of &#39;ours&#39; ended with 1" in page.page(result)


def test_bars_are_the_steps(result: dict[str, Any]) -> None:
    stock, ours, lower = chart.bars(result)
    assert stock.ms == pytest.approx(10.0) and "1.25× stock" in ours.label
    assert ours.ms == pytest.approx(8.2)  # overlapping kernels: no bar is negative
    assert lower.ms == pytest.approx(result["floor"]["ms"])


def test_page_is_self_contained(result: dict[str, Any]) -> None:
    text = page.page(result)
    assert text.count("<rect") == 5 + 5 + 3 and "--accent" in text  # the report's style
    assert "http" not in text and "<script" not in text and "<img" not in text


def test_png(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chart.write_png(result, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_from_draws_an_old_result(result: dict[str, Any], tmp_path: Path) -> None:
    data, html = tmp_path / "result.json", tmp_path / "page.html"
    data.write_text(json.dumps(result))
    shown = CliRunner().invoke(app, ["bench", "model", "--from", str(data), "--html", str(html)])
    assert shown.exit_code == 0, shown.output
    assert "Kernels of one step" in shown.stdout and "floor (H200)" in shown.stdout
    assert "<svg" in html.read_text()


def test_png_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    shown = CliRunner().invoke(app, ["bench", "model", "--png", str(tmp_path / "x.png")])
    assert shown.exit_code == 1 and "inductor-ext[bench]" in shown.stderr and "--from FILE.json" in shown.stderr
