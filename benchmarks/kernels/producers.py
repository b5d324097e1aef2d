"""Producers fused with their FP8 quantisation, and RoPE with q's and k's norms, against stock Inductor and a device copy.

    python -m benchmarks.kernels.producers --out benchmarks/results/h200/producers.json        (--only rope: those alone)
    python -m benchmarks.kernels.producers --only 'static.*, (16|7168), ' --out producers_static.json          (a minute or two)
    python -m benchmarks.kernels.producers --only '^(layer_norm|any rms_norm|activation)' --out producers_any.json
        (norm_quantize and act_quantize: what the other ops do not take; with '…[^,]*, 4096, ' a few minutes)
    python -m benchmarks.kernels.producers --only '^concatenated' --out producers_concatenated.json            (a minute or two)

Stock is ``torch.compile`` of the same eager lines. All are CUDA-graph replays, timed in turn, three rounds, over enough buffers
to find L2 cold. ``of copy`` is the time of a device-to-device copy of as many bytes as the work must move, over ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks import timing
from benchmarks.kernels.shared import script
from inductor_ext.kernels.act_cat_quantize.op import OP as CONCATENATED
from inductor_ext.kernels.act_mul_quantize.op import OP as ACT_MUL
from inductor_ext.kernels.act_quantize.op import FORMS
from inductor_ext.kernels.act_quantize.op import OP as ACTIVATION
from inductor_ext.kernels.norm_quantize.op import OP as ANY_NORM
from inductor_ext.kernels.qk_norm_rope.op import OP as QK_NORM_ROPE
from inductor_ext.kernels.qk_norm_rope.op import rotate_half
from inductor_ext.kernels.rms_norm_quantize.op import OP as RMS_NORM
from inductor_ext.kernels.rms_norm_quantize.op import TORCHAO_PROGRAM, TORCHAO_SCALE, normalise

E4, BF16 = torch.float8_e4m3fn, torch.bfloat16
SHAPES = ((1, 1024), (16, 1024), (128, 1024), (1024, 1024), (7168, 1024), (65536, 1024), (1, 4096), (128, 4096), (65536, 8192))
TENSOR_SHAPES = ((1, 1024), (16, 1024), (128, 1024), (1024, 1024), (7168, 1024), (65536, 1024), (1, 4096), (7168, 4096))
ACT_MUL_SHAPES = ((1, 3072), (16, 3072), (128, 3072), (1024, 3072), (7168, 3072), (1, 14336), (128, 14336), (7168, 14336))
#: Rows and columns of encoders (BERT, ViT, Whisper), of diffusion transformers, and of few tokens.
ANY_SHAPES = ((1, 1024), (128, 1024), (4096, 1024), (16384, 1024), (4096, 3072), (16384, 3072), (4096, 8192))
ANY_ACT_SHAPES = ((1, 4096), (128, 4096), (4096, 4096), (16384, 4096), (4096, 12288), (16384, 12288))
#: Rows, attention's columns and the MLP's: Flux's single blocks, a vision model's sizes, few tokens.
CAT_SHAPES = ((7168, 3072, 12288), (4096, 1152, 4304), (128, 3072, 12288))
ROPE_TOKENS, ROPE_HEADS = (1, 16, 128, 1024, 7168), ((16, 8, 128), (32, 8, 128))  # heads of q, of k, their columns
LONGEST = 512  # tokens of a sequence
Calls = tuple[int, Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]]


def quantise(y: torch.Tensor, granularity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """torchao's recipe, row-wise or tensor-wise."""
    amax = y.abs().amax(-1, keepdim=True) if granularity == "row" else y.abs().amax()
    scale = (amax / 448.0).float()
    return (y.float() / scale).clamp(-448.0, 448.0).to(E4), scale


def scale_like(rows: int, granularity: str) -> torch.Tensor:
    return torch.empty({"row": (rows, 1), "tensor": (), "static": (0,)}[granularity], device="cuda")


class Quantisation:
    """How a result is quantised: "row", "tensor", or "static" with the scales of as many layers as read it."""

    def __init__(self, granularity: str, count: int = 1) -> None:
        static = granularity == "static"
        self.granularity, self.count, self.scale_bytes = granularity, count, 0 if static else 4
        self.program = ("" if static else TORCHAO_SCALE, TORCHAO_PROGRAM, E4)

    def eager(self, y: torch.Tensor, scales: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if self.granularity != "static":
            return quantise(y, self.granularity)
        return tuple((y.float() / scale).clamp(-448.0, 448.0).to(E4) for scale in scales)

    def scales(self) -> list[torch.Tensor]:
        given = self.count if self.granularity == "static" else 0
        return [torch.full((), 0.01 * (i + 1), device="cuda") for i in range(given)]

    def outputs(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.count, rows, columns) if self.count > 1 else (rows, columns)
        return torch.empty(shape, device="cuda", dtype=E4), scale_like(rows, self.granularity)


def rms_norm(rows: int, columns: int, residual: bool, granularity: str = "row", count: int = 1) -> Calls:
    """Bytes that must move, and what makes one (stock, ours) pair of calls over buffers of its own."""
    how = Quantisation(granularity, count)

    def norm(x: torch.Tensor, weight: torch.Tensor, *scales: torch.Tensor) -> Any:
        return how.eager(normalise(x, weight, 1e-6, "cast mul"), scales)

    def norm_with_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *scales: torch.Tensor) -> Any:
        total = x + residual
        return *norm(total, weight, *scales), total

    compiled = torch.compile(norm_with_residual if residual else norm, dynamic=False)

    def make() -> tuple[Callable[[], Any], Callable[[], Any]]:
        x, other = (torch.randn(rows, columns, device="cuda").to(BF16) for _ in range(2))
        weight, scales = torch.rand(columns, device="cuda").to(BF16), how.scales()
        out, scale = how.outputs(rows, columns)
        total = torch.empty_like(x) if residual else x.new_empty(0)
        tensors = (x, other, weight) if residual else (x, weight)
        call = (x, other if residual else None, weight, 1e-6, "cast mul", granularity, *how.program, scales)
        return lambda: compiled(*tensors, *scales), lambda: RMS_NORM._call(*call, out0=out, out1=scale, out2=total)

    return rows * (columns * ((6 if residual else 2) + count) + how.scale_bytes), make


def act_mul(rows: int, columns: int, halves: bool, granularity: str = "row") -> Calls:
    """The same of a gated activation; gate and up are the halves of one buffer, or two."""
    how = Quantisation(granularity)

    def silu_mul(gate: torch.Tensor, up: torch.Tensor, *scales: torch.Tensor) -> Any:
        return how.eager(torch.nn.functional.silu(gate) * up, scales)

    def silu_mul_halves(gate_up: torch.Tensor, *scales: torch.Tensor) -> Any:
        return silu_mul(*gate_up.chunk(2, dim=-1), *scales)

    compiled = torch.compile(silu_mul_halves if halves else silu_mul, dynamic=False)

    def make() -> tuple[Callable[[], Any], Callable[[], Any]]:
        both, scales = torch.randn(rows, 2 * columns, device="cuda").to(BF16), how.scales()
        gate, up = both.chunk(2, dim=-1) if halves else both.view(2, rows, columns)
        out, scale = how.outputs(rows, columns)
        call = (gate, up, "silu", granularity, *how.program, scales)
        tensors = (both,) if halves else (gate, up)
        return lambda: compiled(*tensors, *scales), lambda: ACT_MUL._call(*call, out0=out, out1=scale)

    return rows * (columns * 5 + how.scale_bytes), make


#: norm_quantize's norms: kind, the steps behind the root, whether there is a residual, and whether y is written too.
ANY_NORMS: dict[str, tuple[str, str, bool, bool]] = {
    "layer_norm + quantise": ("layer", "mul add cast", False, False),
    "layer_norm + residual + quantise": ("layer", "mul add cast", True, False),
    "layer_norm + residual + quantise, y too": ("layer", "mul add cast", True, True),
    "layer_norm modulated + quantise": ("layer", "cast factor+1r cast shift", False, False),
    "any rms_norm + fp32 residual + quantise": ("rms", "wide cast mul", True, False),
    "any rms_norm + residual + quantise, y too": ("rms", "cast mul", True, True),
    "any rms_norm without weight + quantise": ("rms", "cast", False, False),
}


def any_norm(rows: int, columns: int, work: str, granularity: str = "row") -> Calls:
    """Bytes and calls of one of `ANY_NORMS`; stock is what models write: layer_norm, modulation, a sum in fp32."""
    kind, norm, has_residual, keep = ANY_NORMS[work]
    how, modulated, wide = Quantisation(granularity), "factor" in norm, norm.startswith("wide")

    def normed(x: torch.Tensor, one: Any, two: Any) -> torch.Tensor:
        if kind == "rms":
            h = x.float()
            n = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16)
            return n if one is None else n * one
        if modulated:
            return torch.nn.functional.layer_norm(x, (columns,), None, None, 1e-6) * (1 + one) + two
        return torch.nn.functional.layer_norm(x, (columns,), one, two, 1e-6)

    def stock(x: torch.Tensor, residual: Any, one: Any, two: Any) -> Any:
        total = x if residual is None else x.float() + residual.float() if wide else x + residual
        y = normed(total, one, two)
        handed_on = () if residual is None else (total.to(BF16),)
        return *how.eager(y, ()), *handed_on, *((y,) if keep else ())

    compiled = torch.compile(stock, dynamic=False)

    def make() -> tuple[Callable[[], Any], Callable[[], Any]]:
        x, other = (torch.randn(1, rows, columns, device="cuda").to(BF16) for _ in range(2))
        residual = other if has_residual else None
        one, two = (torch.rand((1, 1, columns) if modulated else (columns,), device="cuda").to(BF16) for _ in range(2))
        given = (None if norm == "cast" else one, None if kind == "rms" else two)
        operands = (None, None, *given) if modulated else (*given, None, None)
        out, scale = how.outputs(rows, columns)
        out, scale = out.view(x.shape), scale.view(1, rows, 1) if granularity == "row" else scale
        total = torch.empty_like(x) if has_residual else x.new_empty(0)
        y = torch.empty_like(x) if keep else x.new_empty(0)
        call = (x, residual, *operands, 1e-6, kind, norm, keep, granularity, *how.program, [])
        return (
            lambda: compiled(x, residual, *given),
            lambda: ANY_NORM._call(*call, out0=out, out1=scale, out2=total, out3=y),
        )

    return rows * (columns * (3 + 4 * has_residual + 2 * keep) + 4), make


def activation(rows: int, columns: int, form: str, pairs: bool = False, granularity: str = "row") -> Calls:
    """The same of an activation in one of act_quantize's forms; gate and up are halves of one buffer, or its pairs."""
    how, of_two = Quantisation(granularity), FORMS[form].inputs == 2

    def stock(both: torch.Tensor) -> Any:
        inputs = (both[..., ::2], both[..., 1::2]) if pairs else both.chunk(2, -1) if of_two else (both,)
        return how.eager(FORMS[form].fn(*inputs), ())

    compiled = torch.compile(stock, dynamic=False)

    def make() -> tuple[Callable[[], Any], Callable[[], Any]]:
        both = torch.randn(rows, columns * (2 if of_two else 1), device="cuda").to(BF16)
        gate, up = both.chunk(2, -1) if of_two and not pairs else (both, None)
        out, scale = how.outputs(rows, columns)
        call = (gate, up, form, pairs, granularity, *how.program, [])
        return lambda: compiled(both), lambda: ACTIVATION._call(*call, out0=out, out1=scale)

    return rows * (columns * (5 if of_two else 3) + how.scale_bytes), make


def concatenated(rows: int, copied: int, columns: int, heads_first: bool, form: str = "gelu_tanh") -> Calls:
    """The same of attention's output beside an activation; ``heads_first``: [B, H, S, D], of heads of 128, or [B, S, H, D]."""
    how, length, head = Quantisation("row"), min(rows, LONGEST), 128
    shape = (rows // length, copied // head, length, head) if heads_first else (rows // length, length, copied // head, head)

    def stock(heads: torch.Tensor, h: torch.Tensor) -> Any:
        x = heads.transpose(1, 2) if heads_first else heads
        return how.eager(torch.cat((x.flatten(2), FORMS[form].fn(h)), -1), ())

    compiled = torch.compile(stock, dynamic=False)

    def make() -> tuple[Callable[[], Any], Callable[[], Any]]:
        heads = torch.randn(shape, device="cuda").to(BF16)
        h = torch.randn(rows // length, length, columns, device="cuda").to(BF16)
        out, scale = (each.view(*h.shape[:2], -1) for each in how.outputs(rows, copied + columns))
        x = heads.transpose(1, 2) if heads_first else heads
        call = (x, h, None, form, False, True, "row", *how.program, [])
        return lambda: compiled(heads, h), lambda: CONCATENATED._call(*call, out0=out, out1=scale)

    return rows * ((copied + columns) * 3 + how.scale_bytes), make


def qk_rope(tokens: int, heads: tuple[int, int, int], normed: bool) -> Calls:
    """RoPE of q and k, columns of one qkv buffer, with the norm of each head or without; stock is Hugging Face's lines."""
    count, kv_count, columns = heads
    length = min(tokens, LONGEST)
    sizes = [count * columns, kv_count * columns, kv_count * columns]

    def stock(qkv: torch.Tensor, q_weight: Any, k_weight: Any, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        q, k, _ = (each.unflatten(-1, (-1, columns)) for each in qkv.split(sizes, -1))
        if normed:
            q, k = normalise(q, q_weight, 1e-6, "cast mul"), normalise(k, k_weight, 1e-6, "cast mul")
        q, k, cos, sin = q.transpose(1, 2), k.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

    compiled = torch.compile(stock, dynamic=False)

    def make() -> tuple[Callable[[], Any], Callable[[], Any]]:
        qkv = torch.randn(tokens // length, length, sum(sizes), device="cuda").to(BF16)
        weights = [torch.rand(columns, device="cuda").to(BF16) if normed else None for _ in range(2)]
        angles = torch.randn(1, length, columns, device="cuda")
        tables = angles.cos().to(BF16), angles.sin().to(BF16)
        q, k, _ = (each.unflatten(-1, (-1, columns)) for each in qkv.split(sizes, -1))
        outs = [torch.empty(each.shape, device="cuda", dtype=BF16) for each in (q, k)]
        call = (q, k, *weights, *tables, 1e-6, "cast mul" if normed else "", BF16)
        return lambda: compiled(qkv, *weights, *tables), lambda: QK_NORM_ROPE._call(*call, out0=outs[0], out1=outs[1])

    return 4 * tokens * (count + kv_count) * columns + 4 * length * columns, make


def measure(work: str, rows: int, columns: int, calls: Calls) -> dict[str, Any]:
    torch._dynamo.reset()
    moved, make = calls
    pairs = [make() for _ in range(timing.sets_for(moved, 32))]
    sides = {"stock": [pair[0] for pair in pairs], "ours": [pair[1] for pair in pairs]}
    found = timing.in_turn(sides, replays=9)
    return {
        "work": work, "rows": rows, "columns": columns, **timing.medians(found),
        "ratio": timing.ratio(found["stock"], found["ours"]), "of_copy": timing.of_copy(moved, found["ours"]),
    }  # fmt: skip


def works() -> Iterator[tuple[str, int, int, Calls]]:
    kinds = ("", "row", SHAPES), (", one scale", "tensor", TENSOR_SHAPES), (", static", "static", SHAPES)
    for suffix, granularity, shapes in kinds:
        for shape in shapes:
            yield f"rms_norm + quantise{suffix}", *shape, rms_norm(*shape, False, granularity)
            yield f"rms_norm + residual + quantise{suffix}", *shape, rms_norm(*shape, True, granularity)
        for shape in ACT_MUL_SHAPES:
            yield f"silu·mul + quantise, halves{suffix}", *shape, act_mul(*shape, True, granularity)
            yield f"silu·mul + quantise, two buffers{suffix}", *shape, act_mul(*shape, False, granularity)
    for residual, count in ((True, 2), (True, 3), (False, 3)):
        work = f"rms_norm + {'residual + ' if residual else ''}quantise, static ×{count}"
        for shape in SHAPES:
            yield work, *shape, rms_norm(*shape, residual, "static", count)
    yield from any_works()
    for rows, copied, columns in CAT_SHAPES:
        for where in ("heads before positions", "heads after positions"):
            calls = concatenated(rows, copied, columns, heads_first=where == "heads before positions")
            yield f"concatenated with gelu_tanh + quantise, {where}", rows, copied + columns, calls
    for heads in ROPE_HEADS:
        for tokens in ROPE_TOKENS:
            columns = (heads[0] + heads[1]) * heads[2]
            yield "rope of q and k", tokens, columns, qk_rope(tokens, heads, normed=False)
            yield "rope of q and k, normalised", tokens, columns, qk_rope(tokens, heads, normed=True)


def any_works() -> Iterator[tuple[str, int, int, Calls]]:
    """Those of norm_quantize and act_quantize."""
    for suffix, granularity in (("", "row"), (", one scale", "tensor")):
        for work in ANY_NORMS:
            for shape in ANY_SHAPES:
                yield f"{work}{suffix}", *shape, any_norm(*shape, work, granularity)
        for form in ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu_squared", "fp32 silu mul"):
            for shape in ANY_ACT_SHAPES:
                yield f"activation {form} + quantise{suffix}", *shape, activation(*shape, form, False, granularity)
        for shape in ANY_ACT_SHAPES:
            work = f"activation clamped_swiglu of pairs + quantise{suffix}"
            yield work, *shape, activation(*shape, "clamped_swiglu", True, granularity)


if __name__ == "__main__":
    script(measure, works)
