"""scaled_mm_add: one FP8 matrix product with scales, and a residual added to it.

    out = rounded((a · b) * scale_a * scale_b + bias) + residual

Operands are those of ``scaled_mm`` (``kernels/scaled_mm/op.py``), one of each; ``residual`` and ``out`` [M, N] are of
``out_dtype``, and their rows may have any stride that is a multiple of 16 bytes. The product is rounded to ``out_dtype`` before
the residual is added, as two operators do it. The residual is read while its tile is multiplied: a norm after it then reads one
tensor where it read two and wrote one.

Kernels are the tile family's (``kernels/scaled_mm/tile.cuh``, ``AddResidual``). Which one, and whether it is faster than a
product and a norm that adds, is in ``table_<target>.json`` (``benchmarks/kernels/scaled_mm_add.py``): on an H200 it is where
the product is small, as those of Qwen3-0.6B are, and not where arithmetic takes longer than the addition's traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm.config import parse
from inductor_ext.kernels.scaled_mm.op_table import OpTable
from inductor_ext.op import Kernel, Op

#: What a problem takes that is not in the table: 128 × 128 fills most grids.
DEFAULT = "tile:128x128p"
TABLE = OpTable(Path(__file__).parent, DEFAULT, DEFAULT)

#: Of a thread, for one tile: 192 spill 72 bytes beside the residual.
MAX_ACCUMULATORS = 160


def _check(residual: torch.Tensor, out: torch.Tensor) -> None:
    if residual.dtype != out.dtype or residual.dim() != 2:
        wanted = f"{out.dtype} of two dimensions, as the output"
        raise TypeError(f"scaled_mm_add: residual: wanted {wanted}, found {residual.dtype} of shape {tuple(residual.shape)}")
    if residual.shape[0] != out.shape[0] or residual.shape[1] != out.shape[1]:
        raise ValueError(f"scaled_mm_add: residual: wanted shape {tuple(out.shape)}, found {tuple(residual.shape)}")


def fake(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
    static_b: bool,
    config: str,
) -> torch.Tensor:
    out = scaled_mm.fake([a], [b], [scale_a], [scale_b], [bias], out_dtype, use_fast_accum, static_b, config)
    _check(residual, out)
    return out


def reference(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
    static_b: bool,
    config: str,
) -> torch.Tensor:
    out = scaled_mm.reference([a], [b], [scale_a], [scale_b], [bias], out_dtype, use_fast_accum, static_b, config)
    _check(residual, out)
    return out + residual


def key(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: Any,
    residual: Any,
    out_dtype: Any,
    fast: bool,
    static_b: bool,
    config: str,
) -> Hashable:
    config = config or TABLE.name(a, b, (scale_a, scale_b), fast)
    return (config, a.dtype, b.dtype, out_dtype, fast) if config else None


def keys(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: Any,
    residual: Any,
    out_dtype: Any,
    fast: bool,
    static_b: bool,
    config: str,
) -> list[Hashable]:
    """Every key that some M in its range leads to."""
    names = [config] if config else TABLE.names(a, b, (scale_a, scale_b), fast)
    return [(name, a.dtype, b.dtype, out_dtype, fast) for name in names if name]


def exports(key: Any) -> tuple[tuple[str, str], ...]:
    name, a_dtype, b_dtype, out_dtype, fast = key
    made = parse(name).cpp(a_dtype, b_dtype, out_dtype, not fast, end="inductor_ext::AddResidual")
    return (("run", f"{made}::run_add"),)


def bind(module: Any, key: Any) -> Callable[..., None]:
    kernel = module.run
    first, second = parse(key[0]).launch_options()

    def run(
        a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Any, residual: Any, _dtype: Any, _fast: Any, static_b: bool,
        _config: str, out: Any,
    ) -> None:  # fmt: skip
        kernel(a, b, scale_a, scale_b, bias, residual, out, static_b, first, second)

    return run


def examples(target: str) -> tuple[Hashable, ...]:
    e4 = torch.float8_e4m3fn
    return ((DEFAULT, e4, e4, torch.bfloat16, True),) if target == "sm_90a" else ()


def qwen3(target: str) -> list[Hashable]:
    """Every kernel that the o and down of Qwen3-0.6B may take, for any M."""
    e4 = torch.float8_e4m3fn
    return [(name, e4, e4, torch.bfloat16, True) for name in TABLE.preset(target, ((1024, 2048), (1024, 3072)))]


OP = Op(
    schema=(
        "scaled_mm_add(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, Tensor residual, "
        "ScalarType out_dtype, bool use_fast_accum, bool static_b, str config) -> Tensor"
    ),
    doc="an FP8 matrix product and a residual added to it, in one kernel",
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
