"""Which kernels Inductor's autotuner measures for one FP8 matrix product, beside PyTorch's and Triton's.

A short list, since each costs a build and a measurement: what the table has for the nearest shapes around this M, then tiles
that fit by arithmetic. The table's first, so that they are among them when the list is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.kernels.scaled_mm import choice
from inductor_ext.kernels.scaled_mm.config import CPP_TYPES, Config, parse
from inductor_ext.kernels.scaled_mm.product import ALIGNMENT, FP8, target_of
from inductor_ext.kernels.scaled_mm.ready import static_b
from inductor_ext.op import Autotune, Candidate, Operand, Problem

#: Kernels measured for one problem, at most so many of them from the table, which looks at so many measured shapes.
MOST, MOST_OF_TABLE, NEIGHBOURS = 8, 5, 3

_TENSOR_WISE, _ROW_WISE = 0, 1  # torch.nn.functional.ScalingType
_SMS = 132
_WIDE = ("128x128p", "128x128p@2x1", "128x160p", "128x192c", "128x256c@2x1", "256x128c@2x1")


def candidates(problem: Problem) -> list[Candidate]:
    """The kernels worth measuring; none for a product that the op cannot compute."""
    if not _computable(problem):
        return []
    a, b, scale_a, scale_b = problem.operands[:4]
    m, k, n = a.shape[0], a.shape[1], b.shape[1]
    fast = bool(problem.options.get("use_fast_accum"))
    rowwise = _numel(scale_a) != 1 or _numel(scale_b) != 1
    ahead = static_b(problem.node.args[0], problem.node.args[1])
    found: dict[str, Candidate] = {}
    for config in _configs(target_of(problem.device), m, n, k, rowwise, fast):
        if config.supports(not fast) and config.name not in found:
            options = {"config": config.name, "use_fast_accum": fast, "static_b": ahead}
            found[config.name] = Candidate(config.name, (config.name, a.dtype, b.dtype, problem.out.dtype, fast), options)
    return list(found.values())[:MOST]


def arguments(
    a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Any = None, *, out: Any, config: str, use_fast_accum: bool, static_b: bool
) -> tuple[Any, ...]:
    """Those of the op, for generated code that names a candidate."""
    return [a], [b], [scale_a], [scale_b], [bias], out.dtype, use_fast_accum, static_b, config


AUTOTUNE = Autotune(stock="_scaled_mm", candidates=candidates, arguments=arguments)


# ---- which configurations --------------------------------------------------------------------------------------------


def _configs(target: str, m: int, n: int, k: int, rowwise: bool, fast: bool) -> Iterator[Config]:
    table = choice.table(target)
    if table is not None:
        yield from list(dict.fromkeys(_measured(table, choice.kind(rowwise, fast), m, n, k)))[:MOST_OF_TABLE]
    if target == "sm_90a":
        yield from map(parse, _hopper(m, n, k))
    elif target == "sm_100a":
        yield from map(parse, ("blackwell:128x64", "blackwell:128x128", "blackwell:128x256"))
        yield from map(parse, ("blackwell:256x128@2x1", "blackwell:256x256@2x1") if m > 128 else ())


def _measured(table: choice.Table, kind: str, m: int, n: int, k: int) -> Iterator[Config]:
    """What the nearest shapes take at the measured M on either side of this one, nearest first."""
    shapes = table.kinds.get(kind, {})
    near = sorted(shapes, key=lambda shape: (abs(math.log(shape[0] / n)) + abs(math.log(shape[1] / k)), shape))
    for shape in near[:NEIGHBOURS]:
        rows = shapes[shape]
        at = next((i for i, row in enumerate(rows) if row.m >= m), len(rows) - 1)
        for i in (at, at - 1, at + 1):
            if 0 <= i < len(rows):
                yield rows[i].config


def _hopper(m: int, n: int, k: int) -> Iterator[str]:
    if m <= 128:
        tokens = next(t for t in (8, 16, 32, 64, 128) if m <= t)
        for width in (64, 128):
            whole = -(-n // width)
            # Enough CTAs for every SM, each with at least two stages of K; then half as many, which add up fewer parts.
            splits = [s for s in (1, 2, 4, 8) if s <= tokens and k // 128 >= 2 * s]
            enough = next((s for s in splits if whole * s >= _SMS), splits[-1] if splits else 1)
            for split in dict.fromkeys((enough, max(1, enough // 2)) if m <= 64 else (enough,)):
                yield f"stream:{tokens}x{width}/{split}"
    if m > 32:
        yield "tile:64x128p"
    if m > 64:
        yield from (f"tile:{wide}" for wide in _WIDE)


# ---- what the op can compute -----------------------------------------------------------------------------------------


def _computable(problem: Problem) -> bool:
    if len(problem.operands) < 4 or problem.out.dtype not in CPP_TYPES or problem.out.dtype in FP8:
        return False
    a, b, scale_a, scale_b, *bias = problem.operands
    if len(a.shape) != 2 or len(b.shape) != 2 or a.dtype not in FP8 or b.dtype not in FP8 or not all((*a.shape, *b.shape)):
        return False
    (m, k), n = a.shape, b.shape[1]
    return (
        torch.float8_e4m3fn in (a.dtype, b.dtype)
        and k % ALIGNMENT == 0
        and n % ALIGNMENT == 0
        and a.stride[1] == 1
        and b.stride[0] == 1
        and _aligned(a.stride[0], a.offset, b.stride[1], b.offset)
        and _supported_call(problem.node)
        and _is_scale(scale_a, ((m,), (m, 1)))
        and _is_scale(scale_b, ((n,), (1, n), (n, 1)) if _is_v2(problem.node) else ((n,), (1, n)))
        and all(added.dtype is problem.out.dtype and _numel(added) == n and added.stride[-1] == 1 for added in bias)
    )


def _aligned(*elements: int) -> bool:
    return all(each % ALIGNMENT == 0 for each in elements)


def _is_scale(scale: Operand, vectors: Iterable[tuple[int, ...]]) -> bool:
    """One element, or a vector whose elements lie side by side."""
    if scale.dtype is not torch.float32:
        return False
    strides = [stride for size, stride in zip(scale.shape, scale.stride) if size != 1]
    return _numel(scale) == 1 or (scale.shape in tuple(vectors) and strides == [1])


def _is_v2(node: Node) -> bool:
    return node.target is torch.ops.aten._scaled_mm_v2.default


def _supported_call(node: Node) -> bool:
    """No option that the op does not have. Inductor's caller of PyTorch's operator does not show them."""
    given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args)) | node.kwargs  # type: ignore[union-attr]
    if given.get("scale_result") is not None or given.get("contraction_dim"):
        return False
    recipes = [*given.get("recipe_a", ()), *given.get("recipe_b", ())]
    swizzles = [*given.get("swizzle_a", ()), *given.get("swizzle_b", ())]
    return all(recipe in (_TENSOR_WISE, _ROW_WISE) for recipe in recipes) and not any(swizzles)


def _numel(operand: Operand) -> int:
    count = 1
    for size in operand.shape:
        count *= size
    return count
