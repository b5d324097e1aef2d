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

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

from inductor_ext.kernels.act_mul_quantize.op import ACTIVATIONS, CPP_ACTIVATIONS
from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm.config import Config, parse
from inductor_ext.kernels.scaled_mm.op_table import OpTable
from inductor_ext.op import Kernel, Op

OUT_DTYPES = (torch.bfloat16, torch.float16)

#: What a problem takes that is not in the table, and the same with partial sums beside the sums.
DEFAULT, EXACT = "tile:128x128p", "tile:128x128c"
TABLE = OpTable(Path(__file__).parent, DEFAULT, EXACT)


def fake(
    a: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, scale_a: torch.Tensor, scale_gate: torch.Tensor,
    scale_up: torch.Tensor, bias_gate: torch.Tensor | None, bias_up: torch.Tensor | None, act: str, out_dtype: torch.dtype,
    use_fast_accum: bool, static_b: bool, config: str,
) -> torch.Tensor:  # fmt: skip
    _check(gate, up, act, out_dtype, config)
    rest = (out_dtype, use_fast_accum, static_b, config)
    both = scaled_mm.fake([a], [gate, up], [scale_a], [scale_gate, scale_up], [bias_gate, bias_up], *rest)
    return both.new_empty((a.shape[0], gate.shape[1]))


def reference(
    a: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, scale_a: torch.Tensor, scale_gate: torch.Tensor,
    scale_up: torch.Tensor, bias_gate: torch.Tensor | None, bias_up: torch.Tensor | None, act: str, out_dtype: torch.dtype,
    use_fast_accum: bool, static_b: bool, config: str,
) -> torch.Tensor:  # fmt: skip
    _check(gate, up, act, out_dtype, config)
    rest = (out_dtype, use_fast_accum, static_b, config)
    both = scaled_mm.reference([a], [gate, up], [scale_a], [scale_gate, scale_up], [bias_gate, bias_up], *rest)
    g, u = both.chunk(2, 1)
    return ACTIVATIONS[act](g) * u


def _check(gate: torch.Tensor, up: torch.Tensor, act: str, out_dtype: torch.dtype, config: str) -> None:
    """What is asked besides what ``scaled_mm`` asks: it checks the operands."""
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


# ---- which kernel ----------------------------------------------------------------------------------------------------


def is_ours(config: Config) -> bool:
    """Whether half of a configuration's tile is stored in rows of 128 bytes."""
    return config.family == "tile" and config.n in (128, 256) and config.accumulators <= 128


def key(
    a: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, scale_a: torch.Tensor, scale_gate: torch.Tensor,
    scale_up: torch.Tensor, bias_gate: Any, bias_up: Any, act: str, out_dtype: torch.dtype, fast: bool, static_b: bool,
    config: str,
) -> Hashable:  # fmt: skip
    config = config or TABLE.name(a, gate, (scale_a, scale_gate, scale_up), fast)
    return (config, a.dtype, gate.dtype, out_dtype, fast, act) if config else None


def keys(
    a: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, scale_a: torch.Tensor, scale_gate: torch.Tensor,
    scale_up: torch.Tensor, bias_gate: Any, bias_up: Any, act: str, out_dtype: torch.dtype, fast: bool, static_b: bool,
    config: str,
) -> list[Hashable]:  # fmt: skip
    """Every key that some M in its range leads to."""
    names = [config] if config else TABLE.names(a, gate, (scale_a, scale_gate, scale_up), fast)
    return [(name, a.dtype, gate.dtype, out_dtype, fast, act) for name in names if name]


def exports(key: Any) -> tuple[tuple[str, str], ...]:
    name, a_dtype, b_dtype, out_dtype, fast, act = key
    end = f"inductor_ext::Gate<inductor_ext::{CPP_ACTIVATIONS[act]}>"
    return (("run", f"{parse(name).cpp(a_dtype, b_dtype, out_dtype, not fast, end=end)}::run_act_mul"),)


def bind(module: Any, key: Any) -> Callable[..., None]:
    kernel = module.run
    first, second = parse(key[0]).launch_options()

    def run(
        a: Any, gate: Any, up: Any, scale_a: Any, scale_gate: Any, scale_up: Any, bias_gate: Any, bias_up: Any, _act: str,
        _dtype: Any, _fast: bool, static_b: bool, _config: str, out: Any,
    ) -> None:  # fmt: skip
        kernel(a, gate, up, scale_a, scale_gate, scale_up, bias_gate, bias_up, out, static_b, first, second)

    return run


def examples(target: str) -> tuple[Hashable, ...]:
    e4, bf16 = torch.float8_e4m3fn, torch.bfloat16
    if target != "sm_90a":
        return ()
    return ((DEFAULT, e4, e4, bf16, True, "silu"), ("tile:64x256p", e4, e4, bf16, True, "gelu_tanh"))


def qwen3(target: str) -> list[Hashable]:
    """Every kernel that the gate and up of Qwen3-0.6B may take, for any M."""
    e4 = torch.float8_e4m3fn
    return [(name, e4, e4, torch.bfloat16, True, "silu") for name in TABLE.preset(target, ((3072, 1024),))]


OP = Op(
    schema=(
        "scaled_mm_act_mul(Tensor a, Tensor gate, Tensor up, Tensor scale_a, Tensor scale_gate, Tensor scale_up, "
        "Tensor? bias_gate, Tensor? bias_up, str act, ScalarType out_dtype, bool use_fast_accum, bool static_b, "
        "str config) -> Tensor"
    ),
    doc="the FP8 products of gate and up, and the gated activation of both, in one kernel",
    fake=fake,
    reference=reference,
    kernel=Kernel(
        source=scaled_mm.source,
        key=key,
        exports=exports,
        bind=bind,
        min_capability=(9, 0),
        examples=examples,
        keys=keys,
        presets={"qwen3": qwen3},
    ),
)
