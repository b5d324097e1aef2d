"""Calls of the ops that quantise: FP8 and MXFP8, of what is given, of a norm, of an activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.trust.operands import BF16, E4, E5, FP16, FP32, ROUNDED, Args, Call, Maker
from inductor_ext.kernels import norms
from inductor_ext.kernels.act_quantize import op as act_quantize
from inductor_ext.kernels.downcast_fp8.op import PROGRAM_F32 as STATIC
from inductor_ext.kernels.fp8_quantize.op import TORCHAO_PROGRAM, TORCHAO_SCALE

# ---- FP8 casts -------------------------------------------------------------------------------------------------------

def _fp8_downcast() -> Iterator[Call]:
    def static(shape: Callable[[Maker], torch.Tensor], dtype: torch.dtype = E4) -> Callable[[Maker], Args]:
        return lambda m: (shape(m), [m.rand()], STATIC, dtype)

    layouts: dict[str, Callable[[Maker], torch.Tensor]] = {
        "tails": lambda m: m.randn(7, 13, size=300),
        "one row": lambda m: m.randn(1, 4099, size=300),
        "no row": lambda m: m.randn(0, 64),
        "0-d": lambda m: m.randn(size=300),
        "slice of qkv": lambda m: m.randn(50, 3, 8, 64, size=300)[:, 1],
        "odd slice": lambda m: m.randn(33, 301, size=300)[:, 1:98],
        "transposed": lambda m: m.randn(64, 96, size=300).t(),
        "odd address": lambda m: m.randn(4097, size=300)[1:],
    }
    for what, layout in layouts.items():
        yield Call("fp8_downcast", what, static(layout))
    yield Call("fp8_downcast", "fp32 to e5m2", lambda m: (m.randn(129, 257, dtype=FP32, size=3e4), [m.rand()], "div:s0", E5))
    by_row = "f32 mul:r0 max:-448.0 min:448.0"
    for rows, cols in ((33, 72), (7, 33), (5, 1)):
        made = lambda m, r=rows, c=cols: (m.randn(r, c, dtype=FP16, size=99), [m.rand(r, 1)], by_row, E4)  # noqa: E731
        yield Call("fp8_downcast", f"a scale a row, [{rows}, {cols}]", made)

    def mixed(m: Maker) -> Args:
        operands = [m.rand(), torch.tensor(1.7), m.rand(33, 1)]
        return m.randn(33, 72, size=99), operands, "f32 mul:s0 div:s1 mul:r2 max:-448.0 min:448.0", E4

    yield Call("fp8_downcast", "scales on host and device", mixed)


def _fp8_quantize() -> Iterator[Call]:
    def quantised(shape: Callable[[Maker], torch.Tensor], granularity: str) -> Callable[[Maker], Args]:
        return lambda m: (shape(m), granularity, TORCHAO_SCALE, TORCHAO_PROGRAM, E4)

    rows: dict[str, Callable[[Maker], torch.Tensor]] = {
        "row, tails": lambda m: m.randn(37, 130),
        "row, one of 7": lambda m: m.randn(1, 7),
        "row, none": lambda m: m.randn(0, 128),
        "row, wide and odd": lambda m: m.randn(3, 20001),
        "row, wide": lambda m: m.randn(5, 16392),
        "row, groups": lambda m: m.randn(5, 6, 128),
        "row, slice of qkv": lambda m: m.randn(64, 3 * 256)[:, 256:512],
        "row, odd slice": lambda m: m.randn(64, 301, dtype=FP16)[:, 1:98],
        "row, 1 024 columns": lambda m: m.randn(9, 1032, dtype=FP32),
    }
    tensors: dict[str, Callable[[Maker], torch.Tensor]] = {
        "tensor, one element": lambda m: m.randn(1),
        "tensor, tails": lambda m: m.randn(333, 1001),
        "tensor, transposed": lambda m: m.randn(100, 99).t(),
        "tensor, odd address": lambda m: m.randn(4097)[1:],
        "tensor, more than a chip holds": lambda m: m.randn(4097, 4096),
        "tensor, fp32": lambda m: m.randn(129, 515, dtype=FP32),
    }
    for granularity, layouts in (("row", rows), ("tensor", tensors)):
        for what, layout in layouts.items():
            yield Call("fp8_quantize", what, quantised(layout, granularity))

    def bounded(granularity: str) -> Callable[[Maker], Args]:
        programs = "f32 min:s0 div:448.0", "f32 div:scale max:-448.0 min:448.0"
        return lambda m: (m.randn(37, 136), granularity, *programs, E4, torch.full((1,), 1.5, device="cuda"))

    for granularity in ("row", "tensor"):
        yield Call("fp8_quantize", f"{granularity}, bounded", bounded(granularity))


def _mxfp8_quantize() -> Iterator[Call]:
    yield Call("mxfp8_quantize", "plain", lambda m: (m.randn(37, 96), None, "rceil", False))
    yield Call("mxfp8_quantize", "plain, one row", lambda m: (m.randn(1, 32), None, "rceil", False))
    yield Call("mxfp8_quantize", "plain, no row", lambda m: (m.randn(0, 64), None, "rceil", False))
    yield Call("mxfp8_quantize", "plain, slice", lambda m: (m.randn(33, 288)[:, 96:192], None, "rceil", False))
    yield Call("mxfp8_quantize", "plain, fp16 floor", lambda m: (m.randn(130, 160, dtype=FP16), None, "floor", False))
    yield Call("mxfp8_quantize", "swizzled", lambda m: (m.randn(150, 96), None, "rceil", True))
    yield Call("mxfp8_quantize", "swizzled weights", lambda m: (m.randn(3, 72, 160), None, "rceil", True))
    yield Call("mxfp8_quantize", "swizzled, odd slice", lambda m: (m.randn(33, 289)[:, 1:161], None, "rceil", True))
    yield Call("mxfp8_quantize", "groups", lambda m: (m.randn(301, 96, dtype=FP32), m.ends(290, 5), "floor", True))


# ---- norms and activations -------------------------------------------------------------------------------------------

def _rms_norm_quantize() -> Iterator[Call]:
    def normed(
        shape: Sequence[int], granularity: str = "row", *, residual: bool = True, norm: str = "cast mul",
        dtype: torch.dtype = BF16, weight: torch.dtype = BF16, scales: int = 0, sliced: int = 0,
    ) -> Callable[[Maker], Args]:  # fmt: skip
        def make(m: Maker) -> Args:
            wide = (*shape[:-1], shape[-1] + 2 * sliced)
            x, other = (m.randn(*wide, dtype=dtype)[..., sliced : sliced + shape[-1]] for _ in range(2))
            programs = ("rceil", "") if granularity == "mx" else ("", TORCHAO_PROGRAM) if granularity == "static" else (
                TORCHAO_SCALE, TORCHAO_PROGRAM)  # fmt: skip
            if granularity == "static" and not scales:
                programs = ("", "f32 mul:32.0 max:-448.0 min:448.0")
            made = [m.rand() * 0.02 for _ in range(scales)]
            weights = m.rand(shape[-1], dtype=weight)
            return x, other if residual else None, weights, 1e-6, norm, granularity, *programs, E4, made

        return make

    for cols in (64, 100, 1024, 4096, 16384, 20001):
        yield Call("rms_norm_quantize", f"row, {cols} columns", normed((9, cols)), ROUNDED)
    yield Call("rms_norm_quantize", "row, one row without a residual", normed((1, 1000), residual=False), ROUNDED)
    yield Call("rms_norm_quantize", "row, no row", normed((0, 128)), ROUNDED)
    yield Call("rms_norm_quantize", "row, slices", normed((3, 11, 72), sliced=8, residual=False), ROUNDED)
    yield Call("rms_norm_quantize", "row, odd slices", normed((33, 129), sliced=1, residual=False), ROUNDED)
    kinds = {"norm": "mul+1 cast", "dtype": FP32, "weight": FP32}
    yield Call("rms_norm_quantize", "row, fp32", normed((9, 520), **kinds), ROUNDED)
    for shape in ((9, 4096), (33, 100), (1, 7)):
        yield Call("rms_norm_quantize", f"tensor, {list(shape)}", normed(shape, "tensor"), ROUNDED)
    big = normed((8193, 2048), "tensor", residual=False)
    yield Call("rms_norm_quantize", "tensor, more than a chip holds", big, ROUNDED)
    for count in (0, 1, 3):
        made = normed((9, 100 if count == 1 else 1024), "static", scales=count, residual=count > 0)
        yield Call("rms_norm_quantize", f"static, {count} scales", made, ROUNDED)
    yield Call("rms_norm_quantize", "mx", normed((9, 96), "mx"), ROUNDED)
    yield Call("rms_norm_quantize", "mx, one row of 4 096", normed((1, 4096), "mx"), ROUNDED)


def _act_mul_quantize() -> Iterator[Call]:
    def gated(
        rows: int, cols: int, granularity: str = "row", act: str = "silu", *, scales: int = 0, dtype: torch.dtype = BF16,
        halves: bool = True,
    ) -> Callable[[Maker], Args]:  # fmt: skip
        def make(m: Maker) -> Args:
            pair = m.randn(rows, 2 * cols, dtype=dtype).chunk(2, -1) if halves else [
                m.randn(rows, cols, dtype=dtype) for _ in range(2)]  # fmt: skip
            programs = ("rceil", "") if granularity == "mx" else ("", TORCHAO_PROGRAM) if granularity == "static" else (
                TORCHAO_SCALE, TORCHAO_PROGRAM)  # fmt: skip
            return *pair, act, granularity, *programs, E4, [m.rand() * 0.02 for _ in range(scales)]

        return make

    for cols in (64, 100, 3072, 16384, 20001):
        yield Call("act_mul_quantize", f"row, {cols} columns, halves of a buffer", gated(9, cols), ROUNDED)
    yield Call("act_mul_quantize", "row, one row", gated(1, 33, halves=False), ROUNDED)
    yield Call("act_mul_quantize", "row, no row", gated(0, 128), ROUNDED)
    yield Call("act_mul_quantize", "row, tanh", gated(9, 136, act="gelu_tanh"), ROUNDED)
    yield Call("act_mul_quantize", "row, erf, fp32", gated(9, 136, act="gelu", dtype=FP32), ROUNDED)
    yield Call("act_mul_quantize", "tensor", gated(9, 3072, "tensor"), ROUNDED)
    yield Call("act_mul_quantize", "tensor, tails", gated(33, 101, "tensor"), ROUNDED)
    yield Call("act_mul_quantize", "tensor, more than a chip holds", gated(8193, 2048, "tensor"), ROUNDED)
    yield Call("act_mul_quantize", "static", gated(9, 100, "static", scales=1), ROUNDED)
    yield Call("act_mul_quantize", "static, two scales", gated(9, 1024, "static", scales=2), ROUNDED)
    yield Call("act_mul_quantize", "mx", gated(9, 96, "mx"), ROUNDED)


def _norm_quantize() -> Iterator[Call]:
    """Any norm: LayerNorm, its residual, modulation, y beside it."""
    dynamic, static = (TORCHAO_SCALE, TORCHAO_PROGRAM), ("", TORCHAO_PROGRAM)

    def normed(
        shape: Sequence[int], kind: str, norm: str, granularity: str = "row", *, residual: bool = False, keep: bool = False,
        dtype: torch.dtype = BF16, sliced: int = 0,
    ) -> Callable[[Maker], Args]:  # fmt: skip
        def make(m: Maker) -> Args:
            wide = (*shape[:-1], shape[-1] + 2 * sliced)
            x, other = (m.randn(*wide, dtype=dtype)[..., sliced : sliced + shape[-1]] for _ in range(2))
            reads = norms.operands_of(norm.removeprefix("wide "))
            vectors = [m.rand(shape[-1], dtype=dtype) if name in reads else None for name in ("weight", "bias")]
            samples = [m.randn(shape[0], 1, shape[-1], dtype=dtype) if name in reads else None for name in ("factor", "shift")]
            programs = ("rceil", "") if granularity == "mx" else static if granularity == "static" else dynamic
            scales = [m.rand() * 0.02] if granularity == "static" else []
            given = x, other if residual else None, *vectors, *samples
            return *given, 1e-5, kind, norm, keep, granularity, *programs, E4, scales

        return make

    for cols in (64, 100, 1024, 4096, 16384, 20001):
        yield Call("norm_quantize", f"layer, {cols} columns", normed((9, cols), "layer", "mul add cast"), ROUNDED)
    yield Call("norm_quantize", "layer, no row", normed((0, 128), "layer", "mul add cast"), ROUNDED)
    yield Call("norm_quantize", "layer, one row, plain", normed((1, 1000), "layer", "cast"), ROUNDED)
    yield Call("norm_quantize", "layer, odd slices", normed((33, 129), "layer", "mul cast", sliced=1), ROUNDED)
    yield Call("norm_quantize", "layer, fp32", normed((9, 520), "layer", "mul add cast", dtype=FP32), ROUNDED)
    modulated = "cast factor+1r cast shift"
    yield Call("norm_quantize", "layer, modulated", normed((3, 11, 136), "layer", modulated, residual=True), ROUNDED)
    both = {"residual": True, "keep": True}
    yield Call("norm_quantize", "layer, residual, y too", normed((9, 1024), "layer", "mul add cast", **both), ROUNDED)
    yield Call("norm_quantize", "rms, fp32 sum", normed((9, 1024), "rms", "wide cast mul", residual=True), ROUNDED)
    yield Call("norm_quantize", "rms, y too", normed((9, 100), "rms", "mul+1 cast", **both), ROUNDED)
    for granularity in ("tensor", "static", "mx"):
        yield Call("norm_quantize", f"layer, {granularity}", normed((33, 96), "layer", "mul add cast", granularity), ROUNDED)


def _act_quantize() -> Iterator[Call]:
    """Every form of an activation."""

    def activated(
        rows: int, cols: int, form: str, granularity: str = "row", *, pairs: bool = False, dtype: torch.dtype = BF16
    ) -> Callable[[Maker], Args]:
        def make(m: Maker) -> Args:
            two = act_quantize.FORMS[form].inputs == 2
            gate = m.randn(rows, (2 if pairs else 1) * cols, dtype=dtype, size=3)
            up = m.randn(rows, cols, dtype=dtype, size=3) if two and not pairs else None
            programs = ("rceil", "") if granularity == "mx" else ("", TORCHAO_PROGRAM) if granularity == "static" else (
                TORCHAO_SCALE, TORCHAO_PROGRAM)  # fmt: skip
            scales = [m.rand() * 0.02] if granularity == "static" else []
            return gate, up, form, pairs, granularity, *programs, E4, scales

        return make

    for form in act_quantize.FORMS:
        yield Call("act_quantize", f"row, {form}", activated(9, 136, form), ROUNDED)
    for cols in (100, 4096, 20001):
        yield Call("act_quantize", f"row, {cols} columns", activated(9, cols, "gelu"), ROUNDED)
    yield Call("act_quantize", "row, no row", activated(0, 128, "gelu"), ROUNDED)
    for rows, cols in ((2311, 1000), (1301, 1736)):  # enough for 132 SMs: a row to a warp, to a part of a block
        yield Call("act_quantize", f"row, {rows} of {cols} off a table", activated(rows, cols, "gelu"), ROUNDED)
    yield Call("act_quantize", "row, pairs", activated(9, 1024, "clamped_swiglu", pairs=True), ROUNDED)
    yield Call("act_quantize", "row, pairs, tails", activated(7, 33, "clamped_swiglu", pairs=True, dtype=FP16), ROUNDED)
    for granularity in ("tensor", "static", "mx"):
        yield Call("act_quantize", granularity, activated(33, 96, "gelu_tanh", granularity), ROUNDED)


def _act_cat_quantize() -> Iterator[Call]:
    """Columns beside an activation: where they come from, which is first, and which forms."""

    def beside(
        x: Callable[[Maker], torch.Tensor], cols: int, form: str = "gelu_tanh", *, leading: tuple[int, ...] = (9,),
        x_first: bool = True, pairs: bool = False, granularity: str = "row", dtype: torch.dtype = BF16,
    ) -> Callable[[Maker], Args]:  # fmt: skip
        def make(m: Maker) -> Args:
            two = act_quantize.FORMS[form].inputs == 2
            gate = m.randn(*leading, (2 if pairs else 1) * cols, dtype=dtype, size=3)
            up = m.randn(*leading, cols, dtype=dtype, size=3) if two and not pairs else None
            programs = ("rceil", "") if granularity == "mx" else (TORCHAO_SCALE, TORCHAO_PROGRAM)
            return x(m), gate, up, form, pairs, x_first, granularity, *programs, E4, []

        return make

    def columns(count: int, rows: int = 9, dtype: torch.dtype = BF16) -> Callable[[Maker], torch.Tensor]:
        return lambda m: m.randn(rows, count, dtype=dtype, size=3)

    for form in ("gelu_tanh", "gelu", "quick_gelu", "silu", "silu mul", "fp32 silu mul"):
        yield Call("act_cat_quantize", f"row, {form}", beside(columns(136), 520, form), ROUNDED)
    exact = beside(columns(136), 520, "relu_squared", x_first=False)
    yield Call("act_cat_quantize", "row, the activation first", exact)
    yield Call("act_cat_quantize", "row, pairs", beside(columns(64), 1024, "clamped_swiglu", pairs=True), ROUNDED)
    tails = beside(columns(37, dtype=FP16), 100, dtype=FP16)
    yield Call("act_cat_quantize", "row, tails", tails, ROUNDED)
    yield Call("act_cat_quantize", "row, no row", beside(columns(64, rows=0), 128, leading=(0,)), ROUNDED)
    yield Call("act_cat_quantize", "row, 3072 + 12288 columns", beside(columns(3072), 12288), ROUNDED)
    yield Call("act_cat_quantize", "row, off a table", beside(columns(264, rows=1301), 1472, leading=(1301,)), ROUNDED)
    yield Call("act_cat_quantize", "row, 20001 columns", beside(columns(1), 20000), ROUNDED)

    layouts: dict[str, Callable[[Maker], torch.Tensor]] = {
        "heads before positions": lambda m: m.randn(3, 4, 7, 64, size=3).transpose(1, 2),
        "heads that are no vectors": lambda m: m.randn(3, 4, 7, 20, size=3).transpose(1, 2),
        "slices of positions": lambda m: m.randn(3, 12, 256, size=3)[:, 2:9],
        "an odd address": lambda m: m.randn(3, 7, 257, size=3)[..., 1:],
    }
    for what, layout in layouts.items():
        yield Call("act_cat_quantize", f"row, {what}", beside(layout, 1024, "relu_squared", leading=(3, 7)))
    yield Call("act_cat_quantize", "mx", beside(columns(96), 512, granularity="mx"), ROUNDED)


def calls() -> Iterator[Call]:
    yield from _fp8_downcast()
    yield from _fp8_quantize()
    yield from _mxfp8_quantize()
    yield from _rms_norm_quantize()
    yield from _norm_quantize()
    yield from _act_mul_quantize()
    yield from _act_quantize()
    yield from _act_cat_quantize()
