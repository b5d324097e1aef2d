"""Tensors of more than 2^31 elements, where an op takes them: rows from the start, around 2^31 and the end, and the reference.

Every case names its tensors' sizes; the largest ones take 13 GB. Rows are independent of each other in these ops, or made so by
what they are given, so that the reference is asked for a few of them alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.trust import running
from benchmarks.trust.calls import op_named
from benchmarks.trust.operands import ATTENTION, BF16, E4, FP32, I32, PRODUCT, ROUNDED, U8, Args
from inductor_ext.kernels import steps
from inductor_ext.kernels.downcast_fp8.op import PROGRAM_F32 as STATIC
from inductor_ext.kernels.fp8_quantize.op import TORCHAO_PROGRAM, TORCHAO_SCALE
from inductor_ext.kernels.rms_norm_quantize.op import normalise
from inductor_ext.moe import mx

HALF = 1 << 31  # the first element that 32 bits with a sign do not reach
#: (what, found, wanted, limit of `running.difference`)
Found = Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]


@dataclasses.dataclass(frozen=True)
class Case:
    """``make(device)`` gives the op's arguments; ``check(args, outs)`` what is compared once it has run."""

    op: str
    what: str
    make: Callable[[str], Args]
    check: Callable[[Args, Sequence[torch.Tensor]], Found]


def edges(rows: int, columns: int) -> list[int]:
    """The first rows, those around 2^31 elements and 2^32, and the last ones."""
    around = [each // columns + step for each in (HALF, 2 * HALF) for step in (-1, 0, 1)]
    return sorted({row for row in (0, 1, *around, rows - 2, rows - 1) if 0 <= row < rows})


def pick(x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Some rows, copied."""
    one_byte = x.element_size() == 1
    found = torch.stack([(x.view(U8) if one_byte else x)[row] for row in rows])
    return found.view(x.dtype) if one_byte else found


def normal(device: str, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def fp8(device: str, *shape: int) -> torch.Tensor:
    """Numbers up to 240 of either sign, made a byte at a time: two billion random floats are four times the memory."""
    made = torch.empty(shape, dtype=U8, device=device).random_(0, 120)
    return made.add_(torch.empty_like(made).random_(0, 2).mul_(128)).view(E4)


# ---- casts -----------------------------------------------------------------------------------------------------------

ROWS, COLUMNS = 524_299, 4096  # 2^31 elements and eleven rows


def _fp8_downcast(device: str) -> Args:
    return normal(device, ROWS, COLUMNS) * 100, [torch.full((), 0.37, device=device)], STATIC, E4


def _fp8_downcast_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    rows = edges(*args[0].shape)
    wanted = op_named("fp8_downcast").reference(pick(args[0], rows), *args[1:])
    yield f"rows {rows}", pick(outs[0], rows), wanted, 0.0


def _pitched(device: str) -> Args:
    """Columns in the middle of a buffer: fewer elements, addresses past 2^31."""
    return normal(device, ROWS, COLUMNS)[:, 8:1008], [torch.full((), 0.37, device=device)], STATIC, E4


def _quantize(granularity: str) -> Callable[[str], Args]:
    def make(device: str) -> Args:
        x = normal(device, ROWS, COLUMNS)
        x[-1, -1] = 77.0  # of all of it the maximum is the last element
        return x, granularity, TORCHAO_SCALE, TORCHAO_PROGRAM, E4

    return make


def _quantize_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    x, granularity = args[:2]
    rows = edges(*x.shape)
    some = pick(x, rows)  # with the last row, and so with the maximum
    wanted, scale = op_named("fp8_quantize").reference(some, *args[1:])
    yield f"rows {rows}", pick(outs[0], rows), wanted, 0.0
    yield "scale", pick(outs[1], rows) if granularity == "row" else outs[1], scale, 0.0


def _mxfp8(swizzled: bool) -> Callable[[str], Args]:
    return lambda device: (normal(device, ROWS, COLUMNS), None, "rceil", swizzled)


def _mxfp8_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    x, _, rounding, swizzled = args
    rows = edges(*x.shape)
    wanted, scales = mx.quantize(pick(x, rows), rounding)
    yield f"rows {rows}", pick(outs[0], rows), wanted, 0.0
    if swizzled:
        row = torch.tensor(rows, device=x.device)[:, None]
        at = mx.swizzled_offset(row, torch.arange(COLUMNS // mx.BLOCK, device=x.device)[None], outs[1].shape[-1])
        found = outs[1].view(U8).view(-1)[at].view(mx.SCALE)
    else:
        found = pick(outs[1], rows)
    yield "scales", found, scales, 0.0


# ---- stores ----------------------------------------------------------------------------------------------------------

SLOTS = (1 << 21) + 99  # of [8, 128]: 2^31 elements and some
FRESH = 0x55


def _locs(device: str, tokens: int) -> torch.Tensor:
    """Slots at the start, around 2^31 elements, and at the end; a padding and one past the end."""
    middle = HALF // 1024
    chosen = [0, 1, middle - 1, middle, SLOTS - 1, SLOTS - 2, -1, SLOTS]
    return torch.tensor([*chosen, *range(100, 100 + tokens - len(chosen))], device=device)


def _downcast_fp8(wrap: bool) -> Callable[[str], Args]:
    def make(device: str) -> Args:
        tokens, scale = 300, torch.full((), 0.37, device=device)
        k, v = (normal(device, tokens, 8, 128) * 90 for _ in range(2))
        caches = [torch.full((SLOTS, 8, 128), FRESH, dtype=U8, device=device).view(E4) for _ in range(2)]
        loc = _locs(device, tokens)
        if wrap:  # the same rows from the end; -1 is before the first, and what was past the end stays there
            loc = torch.where(loc < SLOTS, loc - SLOTS, loc)
        return k, v, *caches, scale, scale, loc, STATIC, STATIC, E4, 1, 0, wrap, False

    return make


def _cache_check(caches: Sequence[Any], values: Sequence[Any], scale: Any, loc: Any, wrap: bool) -> Found:
    slots = caches[0].shape[0]
    rows = torch.where(loc < 0, loc + slots, loc) if wrap else loc
    kept = (rows >= 0) & (rows < slots)
    for name, cache, x in zip("kv", caches, values):
        wanted = steps.evaluate(STATIC, x[kept], [scale]).to(E4)
        yield f"{name}, {int(kept.sum())} slots to {slots - 1}", pick(cache, rows[kept].tolist()), wanted, 0.0
        count = sum(int((part != FRESH).any(-1).any(-1).sum()) for part in cache.view(U8).split(1 << 18))
        touched = torch.tensor([count])
        stored = torch.tensor([int((wanted.view(U8) != FRESH).any(-1).any(-1).sum())])
        yield f"{name}, slots written", touched, stored, 0.0


def _downcast_fp8_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    k, v, k_cache, v_cache, scale, _, loc = args[:7]
    yield from _cache_check((k_cache, v_cache), (k, v), scale, loc, args[-2])


def _qk_norm_rope_store(device: str) -> Args:
    tokens, scale = 300, torch.full((), 0.37, device=device)
    k, q, v = normal(device, 1, tokens, 32 * 128).unflatten(2, (32, 128)).split([8, 16, 8], 2)
    cos, sin = (normal(device, 1, tokens, 128) for _ in range(2))
    caches = [torch.full((1, SLOTS, 8, 128), FRESH, dtype=U8, device=device).view(E4) for _ in range(2)]
    return (
        k, q, v, None, None, cos, sin, *caches, scale, scale, _locs(device, tokens), 1e-6, "", BF16, STATIC, STATIC, E4,
        True, 1, 0, False, False,
    )  # fmt: skip


def _qk_norm_rope_store_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    v, k_cache, v_cache, scale, loc = args[2], args[7], args[8], args[9], args[11]
    values = outs[1][0], v[0]
    yield from _cache_check((k_cache[0], v_cache[0]), values, scale, loc, False)


def _qk_norm_rope(device: str) -> Args:
    tokens = HALF // (128 * 128) + 9
    cos, sin = (normal(device, 1, tokens, 128) for _ in range(2))
    return normal(device, 1, tokens, 128, 128), None, None, None, cos, sin, 1e-6, "", BF16


def _qk_norm_rope_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    q, cos, sin = args[0], args[4], args[5]
    rows = edges(q.shape[1], 128 * 128)
    some = [pick(each[0], rows)[None] for each in (q, cos, sin)]
    wanted = op_named("qk_norm_rope").reference(some[0], None, None, None, *some[1:], 1e-6, "", BF16)
    yield f"tokens {rows}", pick(outs[0][0], rows)[None], wanted[0], 0.0


# ---- norms and activations -------------------------------------------------------------------------------------------


def _rms_norm(granularity: str) -> Callable[[str], Args]:
    def make(device: str) -> Args:
        weight = torch.rand(COLUMNS, device=device).to(BF16)
        programs = (TORCHAO_SCALE, TORCHAO_PROGRAM) if granularity != "mx" else ("rceil", "")
        x, residual = normal(device, ROWS, COLUMNS), normal(device, ROWS, COLUMNS)
        if granularity == "tensor":  # one number that is nearly all of its row normalises to the largest of all
            x[-1, 0], weight[0] = 2000.0, 1.0
        return x, residual, weight, 1e-6, "cast mul", granularity, *programs, E4, []

    return make


def _rms_norm_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    x, residual, weight, eps, norm, granularity = args[:6]
    rows = edges(*x.shape)
    some, other = pick(x, rows), pick(residual, rows)
    wanted, scale, total = op_named("rms_norm_quantize").reference(some, other, *args[2:])
    yield f"rows {rows}", pick(outs[0], rows), wanted, ROUNDED
    yield "scale", outs[1] if granularity == "tensor" else pick(outs[1], rows), scale, ROUNDED
    yield "total", pick(outs[2], rows), total, 0.0
    if granularity == "tensor":  # the reference's scale is that of all rows only if the last one has the maximum
        largest = normalise(total[-1:], weight, eps, norm).abs().max().reshape(1)
        yield "the last row's maximum", (largest > 0.9 * COLUMNS**0.5).int(), torch.ones_like(largest).int(), 0.0


def _act_mul(granularity: str) -> Callable[[str], Args]:
    def make(device: str) -> Args:
        gate, up = normal(device, ROWS, 2 * COLUMNS).chunk(2, -1)
        gate[-1, -1], up[-1, -1] = 50.0, 50.0
        return gate, up, "silu", granularity, TORCHAO_SCALE, TORCHAO_PROGRAM, E4, []

    return make


def _act_mul_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    gate, up, granularity = args[0], args[1], args[3]
    rows = edges(ROWS, COLUMNS)
    wanted, scale = op_named("act_mul_quantize").reference(pick(gate, rows), pick(up, rows), *args[2:])
    yield f"rows {rows}", pick(outs[0], rows), wanted, ROUNDED
    yield "scale", outs[1] if granularity == "tensor" else pick(outs[1], rows), scale, ROUNDED


def _act_cat(device: str) -> Args:
    """Heads that lie before rows, so that a row's last head is 2^30 elements from its first."""
    heads = normal(device, 2, ROWS, COLUMNS // 2).transpose(0, 1)
    heads[-1, -1, -1] = 50.0
    return heads, normal(device, ROWS, 64), None, "relu_squared", False, True, "row", TORCHAO_SCALE, TORCHAO_PROGRAM, E4, []


def _act_cat_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    rows = edges(ROWS, COLUMNS)
    wanted, scale = op_named("act_cat_quantize").reference(pick(args[0], rows), pick(args[1], rows), *args[2:])
    yield f"rows {rows}", pick(outs[0], rows), wanted, 0.0
    yield "scale", pick(outs[1], rows), scale, 0.0


# ---- products --------------------------------------------------------------------------------------------------------


LONG, WIDE = 32784, 65552  # 2^31 elements and some, both multiples of 16


def _product(config: str, m: int, n: int, k: int, fast: bool = True) -> Callable[[str], Args]:
    """With exact accumulation where K is long: what 14 bits lose of a sum grows with it."""

    def make(device: str) -> Args:
        a, b = fp8(device, m, k), fp8(device, n, k).t()
        scales = [torch.rand(shape, device=device) * 0.01 for shape in ((m, 1), (1, n))]
        return [a], [b], [scales[0]], [scales[1]], [None], BF16, fast, False, config

    return make


def _product_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    a, b, scale_a, scale_b = (each[0] for each in args[:4])
    yield from _rows_of_product(outs[0], a, b, scale_a, scale_b)


def _rows_of_product(out: Any, a: Any, b: Any, scale_a: Any, scale_b: Any, then: Any = lambda x, rows: x) -> Found:
    m, n = out.shape
    rows = sorted({*edges(m, n), *edges(m, a.shape[1])})
    columns = torch.tensor([0, 1, n // 2, n - 2, n - 1], device=out.device)
    columns = torch.unique(torch.cat([columns, torch.tensor(edges(n, b.shape[0]), device=out.device)]))
    right = pick(b.t(), columns.tolist()).float().t()
    product = (pick(a, rows).float() @ right) * pick(scale_a, rows) * scale_b[:, columns]
    found = pick(out, rows)[:, columns]
    yield f"rows {rows}, columns {columns.tolist()}", found, then(product.to(BF16), (rows, columns)), PRODUCT


def _add(device: str) -> Args:
    (a,), (b,), (scale_a,), (scale_b,), _, *rest = _product("tile:128x128p", LONG, WIDE, 32)(device)
    return a, b, scale_a, scale_b, None, normal(device, LONG, WIDE), *rest


def _add_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    a, b, scale_a, scale_b, _, residual = args[:6]
    then = lambda x, at: x + pick(residual, at[0])[:, at[1]]  # noqa: E731
    yield from _rows_of_product(outs[0], a, b, scale_a, scale_b, then)


def _grouped(device: str) -> Args:
    """Weights of 2^31 elements and some: 129 experts, of which the first and the last two have tokens."""
    n = 4104
    experts = HALF // (n * COLUMNS) + 2
    w = fp8(device, experts, n, COLUMNS)
    scale = torch.full((experts, n, COLUMNS // mx.BLOCK), 127 - 6, dtype=U8, device=device).view(mx.SCALE)
    counts, busy = torch.zeros(experts, dtype=I32, device=device), _busy(experts)
    for expert in busy:
        counts[expert] = 3
    return normal(device, 3 * len(busy), COLUMNS), None, w, scale, counts.cumsum(0).to(I32), BF16, False, 32


def _busy(experts: int) -> list[int]:
    return sorted({0, 1, experts - 2, experts - 1})


def _grouped_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    x, w = args[0], args[2]
    for i, expert in enumerate(_busy(len(w))):
        rows = slice(3 * i, 3 * i + 3)
        wanted = (x[rows].float() @ (w[expert].float() * 2.0**-6).t()).to(BF16)
        yield f"expert {expert}", outs[0][rows], wanted, PRODUCT


def _grouped_tokens(device: str) -> Args:
    """Tokens of 2^31 elements and some, for two experts."""
    w = fp8(device, 2, 72, COLUMNS)
    scale = torch.full((2, 72, COLUMNS // mx.BLOCK), 127 - 6, dtype=U8, device=device).view(mx.SCALE)
    return normal(device, ROWS, COLUMNS), None, w, scale, torch.tensor([5, ROWS], device=device).to(I32), BF16, False, 32


def _grouped_tokens_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    rows = [row for row in edges(ROWS, COLUMNS) if row >= 5]
    wanted = (pick(args[0], rows).float() @ (args[2][1].float() * 2.0**-6).t()).to(BF16)
    yield f"tokens {rows}", pick(outs[0], rows), wanted, PRODUCT


# ---- experts' rows, attention ----------------------------------------------------------------------------------------


def _moe_combine(device: str) -> Args:
    at = torch.tensor([edges(ROWS, COLUMNS)], device=device)
    y = normal(device, ROWS, COLUMNS)
    return y, torch.rand(at.shape, device=device).to(BF16), at, None, 0, BF16


def _moe_combine_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    y, weights, at = args[:3]
    wanted = (pick(y, at[0].tolist()) * weights[0, :, None]).sum(0, dtype=FP32).to(BF16)
    yield f"rows {at[0].tolist()}", outs[0][0], wanted, PRODUCT


LENGTH, SEQUENCES, HEADS = 64, 2050, 128  # [T, H, D] of 2^31 elements and 2 sequences


def _attention(device: str) -> Args:
    tokens = LENGTH * SEQUENCES
    q, (k, v) = normal(device, tokens, HEADS, 128), (normal(device, tokens, 8, 128) for _ in range(2))
    ends = torch.arange(SEQUENCES + 1, device=device, dtype=I32) * LENGTH
    return q, k, v, ends, LENGTH, 128**-0.5, -1, 0, 0.0, False, "hopper"


def _attention_check(args: Args, outs: Sequence[torch.Tensor]) -> Found:
    q, k, v = args[:3]
    for sequence in edges(SEQUENCES, LENGTH * HEADS * 128):
        rows = slice(sequence * LENGTH, (sequence + 1) * LENGTH)
        some = [each[rows][None] for each in (q, k, v)]
        wanted = op_named("varlen_attention").reference(*some, None, 0, *args[5:-1], "")[0]
        yield f"sequence {sequence}", outs[0][rows], wanted, ATTENTION


CASES = (
    Case("fp8_downcast", f"[{ROWS}, {COLUMNS}]", _fp8_downcast, _fp8_downcast_check),
    Case("fp8_downcast", "rows of a buffer of 2^31 elements", _pitched, _fp8_downcast_check),
    Case("fp8_quantize", f"row, [{ROWS}, {COLUMNS}]", _quantize("row"), _quantize_check),
    Case("fp8_quantize", f"tensor, [{ROWS}, {COLUMNS}]", _quantize("tensor"), _quantize_check),
    Case("mxfp8_quantize", f"plain, [{ROWS}, {COLUMNS}]", _mxfp8(False), _mxfp8_check),
    Case("mxfp8_quantize", f"swizzled, [{ROWS}, {COLUMNS}]", _mxfp8(True), _mxfp8_check),
    Case("downcast_fp8", f"caches of {SLOTS} slots of [8, 128]", _downcast_fp8(False), _downcast_fp8_check),
    Case("downcast_fp8", "the same, counted from the end", _downcast_fp8(True), _downcast_fp8_check),
    Case("qk_norm_rope_store", f"caches of {SLOTS} slots of [8, 128]", _qk_norm_rope_store, _qk_norm_rope_store_check),
    Case("qk_norm_rope", "131 081 tokens of [128, 128]", _qk_norm_rope, _qk_norm_rope_check),
    Case("rms_norm_quantize", f"row, [{ROWS}, {COLUMNS}]", _rms_norm("row"), _rms_norm_check),
    Case("rms_norm_quantize", f"tensor, [{ROWS}, {COLUMNS}]", _rms_norm("tensor"), _rms_norm_check),
    Case("rms_norm_quantize", f"mx, [{ROWS}, {COLUMNS}]", _rms_norm("mx"), _rms_norm_check),
    Case("act_mul_quantize", f"row, [{ROWS}, {COLUMNS}]", _act_mul("row"), _act_mul_check),
    Case("act_mul_quantize", f"tensor, [{ROWS}, {COLUMNS}]", _act_mul("tensor"), _act_mul_check),
    Case("act_cat_quantize", f"heads [{ROWS}, 2, {COLUMNS // 2}]", _act_cat, _act_cat_check),
    Case("scaled_mm", "out [32784, 65552], tiles", _product("tile:128x128p", LONG, WIDE, 32), _product_check),
    Case("scaled_mm", "out [32784, 65552], streams", _product("stream:64x64/4", LONG, WIDE, 32), _product_check),
    Case("scaled_mm", "b [32784, 65552], streams", _product("stream:16x64/8", 16, WIDE, LONG, False), _product_check),
    Case("scaled_mm", "b [32784, 65552], tiles", _product("tile:128x128p", 130, WIDE, LONG, False), _product_check),
    Case("scaled_mm", "a [65552, 32784], tiles", _product("tile:128x128p", WIDE, 144, LONG, False), _product_check),
    Case("scaled_mm_add", "residual and out [32784, 65552]", _add, _add_check),
    Case("mxfp8_grouped_mm", "w [129, 4104, 4096]", _grouped, _grouped_check),
    Case("mxfp8_grouped_mm", f"x [{ROWS}, {COLUMNS}]", _grouped_tokens, _grouped_tokens_check),
    Case("moe_combine", f"y [{ROWS}, {COLUMNS}]", _moe_combine, _moe_combine_check),
    Case("varlen_attention", f"q [{LENGTH * SEQUENCES}, {HEADS}, 128]", _attention, _attention_check),
)


def run(cases: Sequence[Case], device: str, emit: running.Emit) -> None:
    fallbacks = running.Fallbacks()
    for case in cases:
        start = time.perf_counter()
        try:
            said = _ran(case, device)
        except Exception as error:
            said = f"{type(error).__name__}: {str(error)[:400]}"
        if device == "cuda":
            torch.cuda.empty_cache()
        emit(case.op, case.what, fallbacks.taken() or said, time.perf_counter() - start)


def _ran(case: Case, device: str) -> str:
    op, args = op_named(case.op), case.make(device)
    outs = running.outputs(op, args)
    if device == "cuda":
        running.check_has_kernel(op, args)
    running.launch(op, args, outs)
    if device == "cuda":
        torch.cuda.synchronize()
    compared = ((what, running.difference(found, wanted, limit)) for what, found, wanted, limit in case.check(args, outs))
    return "; ".join(f"{what}: {said}" for what, said in itertools.islice(compared, 100) if said)
