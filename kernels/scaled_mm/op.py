"""scaled_mm: FP8 matrix products with scales, several of them side by side in one output.

    out[:, columns of i] = (a_i · b_i) * scale_a_i * scale_b_i + bias_i        for i in 0 … len(b) - 1

``a_i`` [M, K_i] row-major and ``b_i`` [K_i, N_i] column-major, e4m3 × e4m3 or e4m3 × e5m2 either way round; ``scale_a_i`` one
fp32 element or [M, 1] (or [M]), ``scale_b_i`` one or [1, N_i] (or [N_i, 1], [N_i]), in any combination; ``bias_i`` [N_i] of
``out_dtype`` or None; ``out`` [M, ΣN_i] bf16, fp16 or fp32, whose rows may have any stride. ``a`` and ``scale_a`` have one
element, shared by all, or as many as ``b``. K_i and N_i are multiples of 16, rows of a and columns of b start at multiples of
16 bytes.

``use_fast_accum=False`` adds the tensor core's partial sums to fp32 every 128 elements of K, as PyTorch asks cuBLAS to; True
leaves them in the tensor core, which keeps 14 bits or so. ``static_b`` promises that nothing still running in the stream
writes b: its first tiles are then loaded while the kernel ahead ends. ``config`` names a kernel (``config.py``); "" takes the
table's choice (``choice.py``), which may be PyTorch's own operator.

Sums are taken in another order than cuBLAS takes them: results differ from ``torch._scaled_mm``'s in the last place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from inductor_ext.kernels.scaled_mm import choice
from inductor_ext.kernels.scaled_mm.autotune import AUTOTUNE
from inductor_ext.kernels.scaled_mm.choice import bounds
from inductor_ext.kernels.scaled_mm.config import parse
from inductor_ext.kernels.scaled_mm.product import (
    ALIGNMENT,
    FP8,
    MIN_CAPABILITY,
    OUT_DTYPES,
    Tensors,
    at,
    check_operands,
    empty,
    is_rowwise,
    source,
    target_of,
)
from inductor_ext.op import Kernel, Op
from inductor_ext.signature import Call

__all__ = ["ALIGNMENT", "FP8", "OP", "OUT_DTYPES", "bounds", "decide", "is_rowwise", "target_of", "untuned"]

#: Problems in one launch; more are cut into several.
MAX_GROUP = 4


def reference(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], scale_a: Sequence[torch.Tensor], scale_b: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None], out_dtype: torch.dtype, use_fast_accum: bool, static_b: bool, config: str,
) -> torch.Tensor:  # fmt: skip
    """The sum in fp32 on a CPU; on a GPU, PyTorch's own operator."""
    parts = []
    for i, b_i in enumerate(b):
        a_i, scale = at(a, i), at(scale_a, i)
        row, column = _column(scale, a_i.shape[0]), _row(scale_b[i], b_i.shape[1])
        if a_i.device.type == "cuda":
            parts.append(_stock(a_i, b_i, row, column, bias[i], out_dtype, use_fast_accum))
            continue
        product, added = (a_i.float() @ b_i.float()) * row * column, bias[i]
        parts.append((product if added is None else product + added.float()).to(out_dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _stock(a: Any, b: Any, row: Any, column: Any, bias: Any, out_dtype: torch.dtype, fast: bool) -> torch.Tensor:
    if (row.dim() == 0) != (column.dim() == 0):  # torch wants both alike
        row, column = row.expand(a.shape[0], 1).contiguous(), column.expand(1, b.shape[1]).contiguous()
    if row.dim() > 0 and out_dtype is not torch.bfloat16:  # torch has row-wise scales for bf16 only; scale afterwards
        one = a.new_ones((), dtype=torch.float32)
        product = torch._scaled_mm(a, b, one, one, out_dtype=torch.float32, use_fast_accum=fast) * row * column
        return (product if bias is None else product + bias.float()).to(out_dtype)
    return torch._scaled_mm(a, b, row, column, bias=bias, out_dtype=out_dtype, use_fast_accum=fast)


def _column(scale: torch.Tensor, m: int) -> torch.Tensor:
    return scale.reshape(()) if scale.numel() == 1 else scale.reshape(m, 1)


def _row(scale: torch.Tensor, n: int) -> torch.Tensor:
    return scale.reshape(()) if scale.numel() == 1 else scale.reshape(1, n)


# ---- which kernel ----------------------------------------------------------------------------------------------------


def untuned(target: str, m: int) -> str:
    """A configuration for a GPU without a table, for those who ask for one; "" where there is none."""
    if target == "sm_100a":
        return "blackwell:128x128" if m <= 128 else "blackwell:256x128@2x1"
    return ""


def decide(target: str, m: int, ns: tuple[int, ...], k: int, rowwise: bool, fast: bool) -> choice.Choice | None:
    """The choice for one problem, or for one launch that replaces several; None without a table for ``target``."""
    if len(ns) == 1:
        return choice.choose(target, m, ns[0], k, rowwise, fast)
    return _decide_group(target, m, ns, k, rowwise, fast)


@functools.lru_cache(maxsize=4096)
def _decide_group(target: str, m: int, ns: tuple[int, ...], k: int, rowwise: bool, fast: bool) -> choice.Choice | None:
    """One launch pays where it takes less than the launches it replaces, each by whatever is fastest for it."""
    together = choice.choose(target, m, sum(ns), k, rowwise, fast)
    apart = [choice.choose(target, m, n, k, rowwise, fast) for n in ns]
    if together is None or None in apart:
        return None
    separate = sum(min(each.ours_us, each.stock_us) if each.use else each.stock_us for each in apart if each is not None)
    gain = separate / together.ours_us
    why = f"one launch of {together.ours_us:.1f} µs for {len(ns)} of {separate:.1f} µs together ({together.config.name})"
    return choice.Choice(together.config, together.ours_us, separate, gain >= 1.0, why)


def _problem(a: Tensors, b: Tensors, scale_a: Tensors, scale_b: Tensors) -> tuple[str, tuple[int, ...], int, bool]:
    """Target, output channels, longest K, and whether any scale is a vector."""
    ns = tuple(each.shape[1] for each in b)
    k = max(each.shape[0] for each in b)
    return target_of(a[0].device), ns, k, is_rowwise(scale_a) or is_rowwise(scale_b)


def key(
    a: Tensors, b: Tensors, scale_a: Tensors, scale_b: Tensors, out_dtype: torch.dtype, use_fast_accum: bool, config: str
) -> Hashable:
    if not config:
        first_a, first_b = a[0], b[0]
        if len(b) == 1:  # the hot path of a dynamic M: half the time of the general one
            k, n = first_b.shape
            rowwise = scale_b[0].numel() != 1 or scale_a[0].numel() != 1
            chosen = choice.choose(target_of(first_a.device), first_a.shape[0], n, k, rowwise, use_fast_accum)
        else:
            target, ns, k, rowwise = _problem(a, b, scale_a, scale_b)
            chosen = decide(target, first_a.shape[0], ns, k, rowwise, use_fast_accum)
        if chosen is None or not (chosen.use or len(b) > 1):  # several in one buffer have no way back without a copy
            return None
        config = chosen.config.name
    return config, a[0].dtype, b[0].dtype, out_dtype, use_fast_accum


def keys(
    a: Tensors, b: Tensors, scale_a: Tensors, scale_b: Tensors, out_dtype: torch.dtype, use_fast_accum: bool, config: str
) -> list[Hashable]:
    """Every key that some M in its range leads to."""
    m = a[0].shape[0]
    if config or isinstance(m, int):
        return [key(a, b, scale_a, scale_b, out_dtype, use_fast_accum, config)]
    target, ns, k, rowwise = _problem(a, b, scale_a, scale_b)
    found = choice.possible(target, sum(ns), k, rowwise, use_fast_accum, *bounds(m))
    names = dict.fromkeys(each.config.name for each in found if len(ns) > 1 or each.use)
    return [(name, a[0].dtype, b[0].dtype, out_dtype, use_fast_accum) for name in names]


# ---- the kernel ------------------------------------------------------------------------------------------------------


def stock(
    a: Tensors, b: Tensors, scale_a: Tensors, scale_b: Tensors, bias: Sequence[torch.Tensor | None], out_dtype: torch.dtype,
    use_fast_accum: bool, out: torch.Tensor,
) -> None:  # fmt: skip
    """PyTorch's operator into ``out``; what it cannot do goes through the reference and a copy."""
    row, column = _column(scale_a[0], a[0].shape[0]), _row(scale_b[0], b[0].shape[1])
    alike = (row.dim() == 0) == (column.dim() == 0) and (row.dim() == 0 or out_dtype is torch.bfloat16)
    if len(b) == 1 and alike and out.is_contiguous():
        aten_out = torch.ops.aten._scaled_mm.out
        aten_out(a[0], b[0], row, column, bias[0], None, out_dtype, use_fast_accum, out=out)
    else:
        out.copy_(OP.reference(a, b, scale_a, scale_b, bias, out_dtype, use_fast_accum, False, ""))


def exports(key: Any) -> tuple[tuple[str, str], ...]:
    name, a_dtype, b_dtype, out_dtype, fast = key
    made = parse(name).cpp(a_dtype, b_dtype, out_dtype, not fast)
    return ("run", f"{made}::run"), ("run_group", f"{made}::run_group")


def bind(module: Any, key: Any) -> Callable[..., None]:
    one, group = module.run, module.run_group
    first, second = parse(key[0]).launch_options()

    def run(a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Any, static_b: bool, out: Any) -> None:
        if len(b) == 1:
            one(a[0], b[0], scale_a[0], scale_b[0], bias[0], out, static_b, first, second)
            return
        if len(b) <= MAX_GROUP:
            group(a, b, scale_a, scale_b, bias, out, static_b, first, second)
            return
        column = 0
        for start in range(0, len(b), MAX_GROUP):
            part = slice(start, start + MAX_GROUP)
            left, scale_left = (a, scale_a) if len(a) == 1 else (a[part], scale_a[part])
            width = sum(each.shape[1] for each in b[part])
            columns = out.narrow(1, column, width)
            group(left, b[part], scale_left, scale_b[part], bias[part], columns, static_b, first, second)
            column += width

    return run


def examples(target: str) -> tuple[Hashable, ...]:
    """What CI compiles: each family, both accumulations, each dtype. `PRESETS` says what a model needs."""
    e4, e5, bf16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
    if target == "sm_100a":
        return (("blackwell:128x128", e4, e4, bf16, True), ("blackwell:256x128@2x1", e4, e4, bf16, True))
    if target != "sm_90a":
        return ()
    return (
        ("stream:16x64/8", e4, e4, bf16, True),
        ("stream:64x128/2", e4, e5, torch.float32, False),
        ("tile:128x128p", e4, e4, bf16, True),
        ("tile:128x160p", e5, e4, torch.float16, True),
        ("tile:128x128c@2x1", e4, e4, bf16, False),
    )


#: (N, K) of Qwen3-0.6B's projections, apart and side by side.
QWEN3 = ((2048, 1024), (1024, 1024), (4096, 1024), (1024, 2048), (3072, 1024), (6144, 1024), (1024, 3072))


def qwen3(target: str) -> list[Hashable]:
    """Every kernel that Qwen3-0.6B may take, for any M: torchao's recipes, row-wise and tensor-wise."""
    e4 = torch.float8_e4m3fn
    choices = [each for n, k in QWEN3 for rowwise in (True, False) for each in choice.possible(target, n, k, rowwise, True)]
    return [(name, e4, e4, torch.bfloat16, True) for name in dict.fromkeys(each.config.name for each in choices)]


OP = Op(
    "scaled_mm",
    "FP8 matrix products with tensor-wise or row-wise scales, side by side in one planned buffer",
    reference=reference,
    checks=[Call(check_operands, "a, b, scale_a, scale_b, bias, out_dtype, config")],
    fake=Call(empty, "a[0], b, out_dtype"),
    kernel=Kernel(
        source=source,
        key=key,
        exports=exports,
        bind=bind,
        min_capability=MIN_CAPABILITY,
        examples=examples,
        keys=keys,
        stock=stock,
        presets={"qwen3": qwen3},
    ),
    autotune=AUTOTUNE,
)
