"""Attention without a cache by every library that is installed, against PyTorch's as Hugging Face models call it.

    python -m benchmarks.kernels.attention --out benchmarks/results/h200/attention.json

``stock`` is `scaled_dot_product_attention` with a mask [B, 1, S, S] that is in memory already (none where attention is full),
and K and V repeated for GQA in the call, as transformers does. ``batch`` is B sequences of S; ``packed`` the same tokens with
``cu_seqlens``, ``padded`` with zeros for the rows behind them besides. All are CUDA-graph replays over enough buffers to find
L2 cold, timed in turn, three rounds. ``distance`` is ‖a - b‖ / ‖b‖ to the fp32 reference; ``TFLOP/s`` counts half of the square
where attention is causal.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import timing
from benchmarks.kernels.shared import script
from inductor_ext.kernels.varlen_attention import implementations
from inductor_ext.kernels.varlen_attention.op import OP, problem_of

aten = torch.ops.aten
Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """``batch`` sequences of ``length`` tokens. Heads are Qwen3-0.6B's if nothing else is said."""

    batch: int
    length: int
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    causal: bool = True

    @property
    def right(self) -> int:
        return 0 if self.causal else -1

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """q, k, v [B, S, H, D], as projections leave them."""
        shapes = [(self.batch, self.length, heads, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        return tuple(torch.randn(shape, device="cuda").bfloat16() for shape in shapes)

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        return f"{self.batch} × {self.length}, {heads}, {'causal' if self.causal else 'full'}"


SHAPES = (
    Shape(56, 128), Shape(14, 512), Shape(7, 1024), Shape(1, 7168), Shape(1, 16), Shape(1, 128), Shape(64, 16),
    Shape(14, 512, causal=False), Shape(14, 512, heads=32), Shape(14, 512, heads=16, kv_heads=16),
    Shape(14, 512, heads=32, head_dim=64), Shape(1, 16, heads=32, head_dim=64), Shape(1, 7168, heads=32, head_dim=64),
    Shape(14, 512, heads=12, kv_heads=12, head_dim=64, causal=False),
)  # fmt: skip


def stock(shape: Shape) -> Callable[[], tuple[Call, Any]]:
    batch, length = shape.batch, shape.length
    allowed = torch.ones(length, length, device="cuda", dtype=torch.bool).tril()
    mask = torch.where(allowed, 0.0, -65536.0).bfloat16().expand(batch, 1, length, length).contiguous()
    repeats = shape.heads // shape.kv_heads

    def make() -> tuple[Call, Any]:
        q, k, v = qkv = shape.tensors()

        def call() -> torch.Tensor:
            keys, values = (x.transpose(1, 2) for x in (k, v))
            if repeats > 1:
                keys, values = (x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for x in (keys, values))
            given = mask if shape.causal else None
            sdpa = torch.nn.functional.scaled_dot_product_attention
            return sdpa(q.transpose(1, 2), keys, values, attn_mask=given, scale=shape.scale).transpose(1, 2)

        return call, qkv

    return make


def as_aten(shape: Shape, cudnn: bool) -> Callable[[], tuple[Call, Any]]:
    """PyTorch's operators as the rule emits them: no mask, K and V as they are."""

    def make() -> tuple[Call, Any]:
        qkv = shape.tensors()
        q, k, v = (x.transpose(1, 2) for x in qkv)
        rest = 0.0, shape.causal
        if cudnn:
            run = lambda: aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, *rest, scale=shape.scale)  # noqa: E731
        else:
            run = lambda: aten._scaled_dot_product_flash_attention(q, k, v, *rest, scale=shape.scale)  # noqa: E731
        return lambda: run()[0].transpose(1, 2), qkv

    return make


def by_op(shape: Shape, name: str, packed: bool, padded: bool = False) -> Callable[[], tuple[Call, Any]]:
    batch, length = shape.batch, shape.length
    ends = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * length if packed else None

    def make() -> tuple[Call, Any]:
        qkv = shape.tensors()
        q, k, v = (x.flatten(0, 1) if packed else x for x in qkv)
        out = torch.empty_like(q)
        args = (q, k, v, ends, length if packed else 0, shape.scale, -1, shape.right, 0.0, padded, name)

        def call() -> torch.Tensor:
            OP._call(*args, out=out)
            return out.view(qkv[0].shape)

        return call, qkv

    return make


def sides(shape: Shape) -> dict[tuple[str, str], Callable[[], tuple[Call, Any]]]:
    """(library, how) → what makes a call over buffers of its own, for everything that is there."""
    found: dict[tuple[str, str], Any] = {("stock", "batch"): stock(shape)}
    for each in implementations.IMPLEMENTATIONS:
        for packed in (False, True):
            row = torch.empty(1, shape.head_dim, device="cuda", dtype=torch.bfloat16)
            problem = problem_of(row, -1, shape.right, 0.0, packed)
            if implementations.missing(each, problem):
                continue
            how = "packed" if packed else "batch"
            if not packed and each.name in ("cudnn", "torch"):
                found[each.name, "batch"] = as_aten(shape, each.name == "cudnn")
            else:
                found[each.name, how] = by_op(shape, each.name, packed)
                if packed:
                    found[each.name, "padded"] = by_op(shape, each.name, packed, True)
    return found


def distance(call: Call, qkv: tuple[torch.Tensor, ...], shape: Shape) -> float:
    wanted = OP.reference(*(x.float() for x in qkv), None, 0, shape.scale, -1, shape.right, 0.0, False, "")
    return float((call().float() - wanted).norm() / wanted.norm())


def measure(shape: Shape) -> list[dict[str, Any]]:
    moved = 2 * shape.batch * shape.length * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    count = timing.sets_for(moved, 8)
    calls: dict[Any, list[Call]] = {}
    apart: dict[Any, float] = {}
    for side, make in sides(shape).items():
        made = [make() for _ in range(count)]
        calls[side] = [call for call, _ in made]
        apart[side] = distance(*made[0], shape)
    times = timing.in_turn(calls, replays=7)
    pairs = shape.length * (shape.length + 1) / 2 if shape.causal else shape.length**2
    operations = 4 * shape.batch * shape.heads * shape.head_dim * pairs
    rows = []
    for side, found in times.items():
        us = statistics.median(found)
        rows.append(
            {
                "sequences": str(shape),
                "library": side[0],
                "how": side[1],
                "us": round(us, 2),
                "of_stock": round(timing.ratio(times["stock", "batch"], found), 2),
                "TFLOP/s": round(operations / us * 1e-6),
                "GFLOP": float(f"{operations * 1e-9:.4g}"),
                "distance": f"{apart[side]:.1e}",
            }
        )
    return rows


def by_shape(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row for the sequences, with µs and the speed relative to stock of each side; and how far each is from fp32 at most."""
    shapes: dict[str, dict[str, Any]] = {}
    apart: dict[str, float] = {}
    for row in rows:
        side = f"{row['library']}, {row['how']}"
        shape = shapes.setdefault(row["sequences"], {"sequences": row["sequences"], "GFLOP": row["GFLOP"]})
        shape[side] = [row["us"], row["of_stock"]]
        apart[side] = max(apart.get(side, 0.0), float(row["distance"]))
    each = {"libraries": implementations.versions(), "of each side": ["µs", "of stock's speed"]}
    return {**each, "shapes": list(shapes.values()), "distance": apart}


if __name__ == "__main__":
    script(measure, [(shape,) for shape in SHAPES], payload=by_shape, width=120, without=("GFLOP",))
