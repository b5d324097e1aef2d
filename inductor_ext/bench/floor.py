"""The time that a step's shapes alone ask for: the sum, over layers, of what perfectly fused kernels would take.

    GEMM          qkv, o, gate and up, down as four products: the longer of 2·M·N·K / peak and of bytes / bandwidth
    attention     2·2·H·D·(L·(L + 1) / 2) operations a text (causal; L·L where each token sees all), or reading q, k, v
                  and writing the output, whichever is longer; decoding: reading the FP8 K and V of all of its context
    memory-bound  one pass over memory for: residual + norm + quantise (twice a layer), QK-norm and RoPE in place, the
                  attention output's quantisation, the activation + quantise; once a step the embedding and the last norm

Padding is computed, so it counts. The rates are what one H200 sustains, not its nominal peaks.
"""

from __future__ import annotations

import dataclasses

from inductor_ext.bench.breakdown import ATTENTION, GEMM, MEMORY
from inductor_ext.bench.families import ModelShape, linears
from inductor_ext.bench.workload import Workload


@dataclasses.dataclass(frozen=True)
class Rates:
    """Operations and bytes a second."""

    gpu: str = "H200"
    fp8_flops: float = 1300e12  # torch._scaled_mm, 8192³: 1302 TFLOP/s of the nominal 1979
    bf16_flops: float = 700e12  # nvjet, 7168 × 28672 × 4096: 682 TFLOP/s
    attention_flops: float = 600e12  # flash-attn 4, causal, bf16, 1 × 7168: 603 TFLOP/s
    bandwidth: float = 4.15e12  # a device-to-device copy, of the nominal 4.8 TB/s


def floor_us(shape: ModelShape, workload: Workload, fp8: str, rates: Rates | None = None) -> dict[str, float]:
    """µs of each class of kernels for one step."""
    rates = rates or Rates()
    found = {
        GEMM: shape.layers * _gemms(shape, workload.rows, fp8, rates),
        ATTENTION: shape.layers * _attention(shape, workload, rates),
        MEMORY: (shape.layers * _layer_bytes(shape, fp8) + _once_bytes(shape)) * workload.rows / rates.bandwidth,
    }
    return {name: seconds * 1e6 for name, seconds in found.items()}


def _gemms(shape: ModelShape, rows: int, fp8: str, rates: Rates) -> float:
    size, peak = (2, rates.bf16_flops) if fp8 == "none" else (1, rates.fp8_flops)
    seconds = 0.0
    for each in linears(shape):
        n, k, m = each.n, each.k, rows * each.times
        moved = size * (n * k * each.weights + m * k) + 2 * m * n
        seconds += max(2 * m * n * k / peak, moved / rates.bandwidth)
    return seconds


def _attention(shape: ModelShape, workload: Workload, rates: Rates) -> float:
    if workload.context:
        pairs = workload.items * workload.context
        moved = pairs * 2 * shape.kv_heads * shape.head_dim
        return max(4 * shape.heads * shape.head_dim * pairs / rates.attention_flops, moved / rates.bandwidth)
    lengths = workload.lengths if workload.packed else (max(workload.lengths),) * workload.items
    pairs = sum(length * (length + 1) // 2 if shape.kind.causal else length * length for length in lengths)
    moved = 2 * workload.rows * 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    return max(4 * shape.heads * shape.head_dim * pairs / rates.attention_flops, moved / rates.bandwidth)


def _layer_bytes(shape: ModelShape, fp8: str) -> int:
    """Bytes a token that a layer's memory-bound kernels read and write; a row's scale is 4 of them."""
    hidden, inner = shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    quantised = fp8 != "none"
    out, scale = (1, 4 if fp8 == "row" else 0) if quantised else (2, 0)
    norms = 2 * ((2 + 2 + 2 + out) * hidden + scale)  # x and the residual in; their sum and the norm out
    rope = (2 + 2) * (q + kv) if shape.kind.rotates else 0
    attention_out = (2 + out) * q + scale if quantised else 0
    act = ((2 if shape.kind.gated else 1) * 2 + out) * inner * max(shape.top_k, 1) + scale
    return norms + rope + attention_out + act


def _once_bytes(shape: ModelShape) -> int:
    return (2 + 2) * shape.hidden + 8 + (2 + 2) * shape.hidden
