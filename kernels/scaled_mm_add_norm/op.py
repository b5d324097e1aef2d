"""scaled_mm_add_norm: one FP8 matrix product, a residual added to it, and RMSNorm of the sum, quantised to FP8 by rows.

    total        = rounded((a · b) * scale_a * scale_b + bias) + residual       scaled_mm_add
    y            = norm(total, weight), rounded;  scale = scale_program(max |y|) of each row
    quantised    = cast(program(y, scale), dtype)                               rms_norm_quantize, row-wise

Operands are those of ``scaled_mm_add`` (``kernels/scaled_mm_add/op.py``); ``norm`` and the programs are those of
``rms_norm_quantize`` (``kernels/rms_norm_quantize/op.py``). residual, total [M, N] and weight [N] bf16, quantised [M, N]
contiguous, scale [M, 1] of the dtype that the scale's program ends in. N is 256, 512 or 1024.

Each CTA of a cluster along N has 128 columns of the same rows: two numbers of a row, its sum of squares and its maximum, go
from each to each through shared memory, and the launch that would read the sum again goes. Each step is rounded as the two
operators round it; only the norm's sum is taken in another order. Kernels are the tile family's (``AddNorm`` in
``kernels/scaled_mm/tile.cuh``). Which one, and where it is faster than two launches, says ``table_<target>.json``, by
``benchmarks/kernels/scaled_mm_add_norm.py``: `table`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from inductor_ext.kernels import steps
from inductor_ext.kernels.rms_norm_quantize import op as rms_norm_quantize
from inductor_ext.kernels.rms_norm_quantize.op import CPP_NORMS, NORMS, TORCHAO_PROGRAM, TORCHAO_SCALE
from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm.config import Config, parse
from inductor_ext.kernels.scaled_mm.op_table import OpTable
from inductor_ext.kernels.scaled_mm_add import op as scaled_mm_add
from inductor_ext.op import Kernel, Op

OUT_DTYPE = torch.bfloat16

#: Columns of a tile, and how many CTAs of a cluster may share a row: 16 would be no portable cluster.
TILE, CTAS = 128, (2, 4, 8)
WIDTHS = tuple(TILE * ctas for ctas in CTAS)


def fake(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None,
    residual: torch.Tensor, weight: torch.Tensor, eps: float, norm: str, scale_program: str, program: str, dtype: torch.dtype,
    out_dtype: torch.dtype, use_fast_accum: bool, static_b: bool, config: str,
) -> Any:  # fmt: skip
    _check(b, weight, norm, out_dtype, config)
    product = a, b, scale_a, scale_b, bias, residual, out_dtype, use_fast_accum, static_b, config
    total = scaled_mm_add.fake(*product)
    given = total, None, weight, eps, norm, "row", scale_program, program, dtype
    quantised, scale, _ = rms_norm_quantize.fake(*given, scales=[])
    return total, quantised, scale


def reference(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None,
    residual: torch.Tensor, weight: torch.Tensor, eps: float, norm: str, scale_program: str, program: str, dtype: torch.dtype,
    out_dtype: torch.dtype, use_fast_accum: bool, static_b: bool, config: str,
) -> Any:  # fmt: skip
    _check(b, weight, norm, out_dtype, config)
    product = a, b, scale_a, scale_b, bias, residual, out_dtype, use_fast_accum, static_b, config
    total = scaled_mm_add.reference(*product)
    given = total, None, weight, eps, norm, "row", scale_program, program, dtype
    quantised, scale, _ = rms_norm_quantize.reference(*given, scales=[])
    return total, quantised, scale


def _check(b: torch.Tensor, weight: torch.Tensor, norm: str, out_dtype: torch.dtype, config: str) -> None:
    """What is asked besides what ``scaled_mm_add`` and ``rms_norm_quantize`` ask: they check operands and programs."""
    if norm not in NORMS:
        raise ValueError(f"scaled_mm_add_norm: norm: wanted one of {', '.join(NORMS)}, found {norm!r}")
    if out_dtype is not OUT_DTYPE:
        raise TypeError(f"scaled_mm_add_norm: out_dtype: wanted {OUT_DTYPE}, found {out_dtype}")
    if b.dim() != 2 or b.shape[1] not in WIDTHS:
        wanted = f"[K, N], N one of {', '.join(map(str, WIDTHS))}"
        raise ValueError(f"scaled_mm_add_norm: b: wanted {wanted}, found shape {tuple(b.shape)}")
    if weight.dtype is not OUT_DTYPE:
        raise TypeError(f"scaled_mm_add_norm: weight: wanted {OUT_DTYPE}, as the output, found {weight.dtype}")
    if weight.dim() != 1 or weight.shape[0] != b.shape[1] or weight.stride(0) != 1:
        found = f"shape {tuple(weight.shape)}, strides {tuple(weight.stride())}"
        raise ValueError(f"scaled_mm_add_norm: weight: wanted {b.shape[1]} elements in a row, found {found}")
    if config and not is_ours(parse(config), b.shape[1]):
        wanted = f"a tile of 64 or 128 by {TILE} in clusters of 1x{b.shape[1] // TILE}"
        raise ValueError(f"scaled_mm_add_norm: config: wanted {wanted}, found {config!r}")


# ---- which kernel ----------------------------------------------------------------------------------------------------


def is_ours(config: Config, n: int) -> bool:
    """Whether a cluster of this configuration has whole rows of N columns, in few enough registers."""
    return config.family == "tile" and config.n == TILE and config.m <= 128 and config.cluster == (1, n // TILE)


@functools.cache
def table(n: int) -> OpTable:
    """What was measured of rows of N: those of another width have other clusters, and are told apart by them.

    With partial sums beside the sums and the rows, 128 × 128 pingpong would spill 172 bytes.
    """
    cluster = f"1x{n // TILE}"
    default, exact = (f"tile:128x{TILE}{kind}@{cluster}" for kind in "pc")
    return OpTable(Path(__file__).parent, default, exact, f"clusters of {cluster}")


class Key(NamedTuple):
    """All that is compiled in."""

    config: str
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    fast: bool
    norm: str
    scale_program: str
    program: str
    dtype: torch.dtype


def key(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: Any, residual: Any, weight: Any,
    eps: float, norm: str, scale_program: str, program: str, dtype: torch.dtype, out_dtype: torch.dtype, fast: bool,
    static_b: bool, config: str,
) -> Hashable:  # fmt: skip
    config = config or table(b.shape[1]).name(a, b, (scale_a, scale_b), fast)
    return Key(config, a.dtype, b.dtype, fast, norm, scale_program, program, dtype) if config else None


def keys(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: Any, residual: Any, weight: Any,
    eps: float, norm: str, scale_program: str, program: str, dtype: torch.dtype, out_dtype: torch.dtype, fast: bool,
    static_b: bool, config: str,
) -> list[Hashable]:  # fmt: skip
    """Every key that some M in its range leads to."""
    names = [config] if config else table(b.shape[1]).names(a, b, (scale_a, scale_b), fast)
    return [Key(name, a.dtype, b.dtype, fast, norm, scale_program, program, dtype) for name in names if name]


def end_of(norm: str, scale_program: str, program: str, dtype: torch.dtype) -> str:
    """The class of ``ends.cuh``."""
    types = f"inductor_ext::{CPP_NORMS[norm]}", *steps.quantisation_types(OUT_DTYPE, scale_program, program, dtype)
    return f"inductor_ext::AddNorm<{', '.join(types)}>"


def exports(key: Any) -> tuple[tuple[str, str], ...]:
    end = end_of(key.norm, key.scale_program, key.program, key.dtype)
    made = parse(key.config).cpp(key.a_dtype, key.b_dtype, OUT_DTYPE, not key.fast, end=end)
    return (("run", f"{made}::run_add_norm"),)


def bind(module: Any, key: Any) -> Callable[..., None]:
    kernel = module.run
    first, second = parse(key.config).launch_options()
    constants = steps.padded_constants(key.scale_program, key.program)

    def run(
        a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Any, residual: Any, weight: Any, eps: float, _norm: str,
        _scale_program: str, _program: str, _dtype: Any, _out_dtype: Any, _fast: bool, static_b: bool, _config: str, total: Any,
        quantised: Any, scale: Any,
    ) -> None:  # fmt: skip
        outputs = total, quantised, scale
        kernel(a, b, scale_a, scale_b, bias, residual, weight, eps, *outputs, *constants, static_b, first, second)

    return run


def _example(config: str, fast: bool = True, norm: str = "cast mul") -> Key:
    e4 = torch.float8_e4m3fn
    return Key(config, e4, e4, fast, norm, TORCHAO_SCALE, TORCHAO_PROGRAM, e4)


def examples(target: str) -> tuple[Hashable, ...]:
    if target != "sm_90a":
        return ()
    return _example(table(1024).default), _example(table(1024).exact, False, "mul+1 cast")


def qwen3(target: str) -> list[Hashable]:
    """Every kernel that the o and down of Qwen3-0.6B may take, for any M."""
    return [_example(name) for name in table(1024).preset(target, ((1024, 2048), (1024, 3072)))]


OP = Op(
    schema=(
        "scaled_mm_add_norm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, Tensor residual, Tensor weight, "
        "float eps, str norm, str scale_program, str program, ScalarType dtype, ScalarType out_dtype, bool use_fast_accum, "
        "bool static_b, str config) -> (Tensor, Tensor, Tensor)"
    ),
    doc="an FP8 matrix product, a residual added to it, and the sum's RMSNorm in FP8, in one kernel",
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
