"""scaled_mm_act_mul: the gate and up projections of an MLP in one launch that stores the gated activation alone.

    g = rounded((a · gate) * scale_a * scale_gate + bias_gate);  u likewise
    out = rounded(act(g)) * u                                    each step rounded to out_dtype, as eager does

Operands are those of ``scaled_mm`` (``kernels/scaled_mm/op.py``): one a [M, K]; gate and up [K, N] of one dtype and pitch, not
the same memory; out [M, N] bf16 or fp16, whose rows may have any stride that is a multiple of 16 bytes. ``act``: those of
``act_mul_quantize``, "silu", "gelu" or "gelu_tanh".

A tile of the kernel (``kernels/scaled_mm/tile.cuh``, ``Gate``) has as many channels of gate as of up, so that a thread holds
both numbers of a pair: half of what two products store is stored, and what quantises reads half of it. Which kernel, and
whether it is faster than products and ``act_mul_quantize``, is in ``table_<target>.json``
(``benchmarks/kernels/scaled_mm_act_mul.py``).
"""

from __future__ import annotations

from pathlib import Path

import torch

from inductor_ext.kernels.act_mul_quantize.op import ACTIVATIONS, CPP_ACTIVATIONS
from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm import product
from inductor_ext.kernels.scaled_mm.config import Config, parse
from inductor_ext.kernels.scaled_mm.op_table import OpTable

OUT_DTYPES = (torch.bfloat16, torch.float16)

#: What a problem takes that is not in the table, and the same with partial sums beside the sums.
DEFAULT, EXACT = "tile:128x128p", "tile:128x128c"
TABLE = OpTable(Path(__file__).parent, DEFAULT, EXACT)


def is_ours(config: Config) -> bool:
    """Whether half of a configuration's tile is stored in rows of 128 bytes."""
    return config.family == "tile" and config.n in (128, 256) and config.accumulators <= 128


def check(gate: torch.Tensor, up: torch.Tensor, act: str, out_dtype: torch.dtype, config: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"scaled_mm_act_mul: act: wanted one of {', '.join(ACTIVATIONS)}, found {act!r}")
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"scaled_mm_act_mul: out_dtype: wanted bfloat16 or float16, found {out_dtype}")
    if up.shape != gate.shape or up.dtype is not gate.dtype or up.stride() != gate.stride():
        wanted = f"{gate.dtype} of shape {tuple(gate.shape)} and strides {tuple(gate.stride())}, as gate"
        found = f"{up.dtype} of shape {tuple(up.shape)} and strides {tuple(up.stride())}"
        raise ValueError(f"scaled_mm_act_mul: up: wanted {wanted}, found {found}")
    if config and not is_ours(parse(config)):
        raise ValueError(f"scaled_mm_act_mul: config: wanted a tile of 128 or 256 channels, found {config!r}")


def _named(what: str, i: int) -> str:
    of = ("gate", "up")[i]
    return {"b": of, "scale_b": f"scale_{of}", "bias": f"bias_{of}"}.get(what, what)


def reference(
    a: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, scale_a: torch.Tensor, scale_gate: torch.Tensor,
    scale_up: torch.Tensor, bias_gate: torch.Tensor | None, bias_up: torch.Tensor | None, act: str, out_dtype: torch.dtype,
    use_fast_accum: bool, static_b: bool, config: str,
) -> torch.Tensor:  # fmt: skip
    operands = [a], [gate, up], [scale_a], [scale_gate, scale_up], [bias_gate, bias_up]
    g, u = scaled_mm.reference(*operands, out_dtype, use_fast_accum, static_b, config).chunk(2, 1)
    return ACTIVATIONS[act](g) * u


OP = product.ended(
    "scaled_mm_act_mul",
    "the FP8 products of gate and up, and the gated activation of both, in one kernel",
    reference=reference,
    check=check,
    operands="[a], [gate, up], [scale_a], [scale_gate, scale_up], [bias_gate, bias_up]",
    named=_named,
    product="a, (gate,), (scale_a, scale_gate, scale_up)",
    end=lambda act: f"Gate<inductor_ext::{CPP_ACTIVATIONS[act]}>",
    compiled="act",
    run=("run_act_mul", "a, gate, up, scale_a, scale_gate, scale_up, bias_gate, bias_up"),
    table=TABLE,
    examples=[(DEFAULT, True, "silu"), ("tile:64x256p", True, "gelu_tanh")],
    qwen3=[(3072, 1024)],
    qwen3_end=("silu",),
)
