"""Causal attention without a cache by every library that is installed, against PyTorch's as Hugging Face models call it.

    python -m benchmarks.kernels.attention --out benchmarks/results/h200/attention.json

``stock`` is `scaled_dot_product_attention` with a mask [B, 1, S, S] that is in memory already, and K and V repeated for GQA in
the call, as transformers does. ``batch`` is B sequences of S; ``packed`` the same tokens with ``cu_seqlens``, ``padded`` with
the memset of the output besides. All are CUDA-graph replays over enough buffers to find L2 cold, timed in turn, three rounds.
``distance`` is ‖a - b‖ / ‖b‖ to the fp32 reference; ``TFLOP/s`` counts half of the square.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import timing
from benchmarks.kernels.shared import show
from inductor_ext import registry
from inductor_ext.kernels.varlen_attention import implementations
from inductor_ext.kernels.varlen_attention.op import OP, problem_of

HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128
SHAPES = ((56, 128), (14, 512), (7, 1024), (1, 7168), (1, 16), (1, 128), (64, 16))
SCALE = HEAD_DIM**-0.5
aten = torch.ops.aten
Call = Callable[[], Any]


def tensors(batch: int, length: int) -> tuple[torch.Tensor, ...]:
    """q, k, v [B, S, H, D], as projections leave them."""
    shapes = [(batch, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return tuple(torch.randn(shape, device="cuda").bfloat16() for shape in shapes)


def stock(batch: int, length: int) -> Callable[[], tuple[Call, Any]]:
    allowed = torch.ones(length, length, device="cuda", dtype=torch.bool).tril()
    mask = torch.where(allowed, 0.0, -65536.0).bfloat16().expand(batch, 1, length, length).contiguous()

    def make() -> tuple[Call, Any]:
        q, k, v = qkv = tensors(batch, length)

        def call() -> torch.Tensor:
            keys, values = (
                x.transpose(1, 2)[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).reshape(batch, HEADS, length, HEAD_DIM)
                for x in (k, v)
            )
            sdpa = torch.nn.functional.scaled_dot_product_attention
            return sdpa(q.transpose(1, 2), keys, values, attn_mask=mask, scale=SCALE).transpose(1, 2)

        return call, qkv

    return make


def as_aten(batch: int, length: int, cudnn: bool) -> Callable[[], tuple[Call, Any]]:
    """PyTorch's operators as the rule emits them: no mask, K and V as they are."""

    def make() -> tuple[Call, Any]:
        qkv = tensors(batch, length)
        q, k, v = (x.transpose(1, 2) for x in qkv)
        if cudnn:
            run = lambda: aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, True, scale=SCALE)  # noqa: E731
        else:
            run = lambda: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=SCALE)  # noqa: E731
        return lambda: run()[0].transpose(1, 2), qkv

    return make


def by_op(batch: int, length: int, name: str, packed: bool, padded: bool = False) -> Callable[[], tuple[Call, Any]]:
    ends = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * length if packed else None

    def make() -> tuple[Call, Any]:
        qkv = tensors(batch, length)
        q, k, v = (x.flatten(0, 1) if packed else x for x in qkv)
        out = torch.empty_like(q)
        args = (q, k, v, ends, length if packed else 0, SCALE, -1, 0, 0.0, padded, name)

        def call() -> torch.Tensor:
            OP._call(*args, out=out)
            return out.view(batch, length, HEADS, HEAD_DIM)

        return call, qkv

    return make


def sides(batch: int, length: int) -> dict[tuple[str, str], Callable[[], tuple[Call, Any]]]:
    """(library, how) → what makes a call over buffers of its own, for everything that is there."""
    found: dict[tuple[str, str], Any] = {("stock", "batch"): stock(batch, length)}
    for each in implementations.IMPLEMENTATIONS:
        for packed in (False, True):
            problem = problem_of(torch.empty(1, HEAD_DIM, device="cuda", dtype=torch.bfloat16), -1, 0, 0.0, packed)
            if implementations.missing(each, problem):
                continue
            how = "packed" if packed else "batch"
            if not packed and each.name in ("cudnn", "torch"):
                found[each.name, "batch"] = as_aten(batch, length, each.name == "cudnn")
            else:
                found[each.name, how] = by_op(batch, length, each.name, packed)
                if packed:
                    found[each.name, "padded"] = by_op(batch, length, each.name, packed, True)
    return found


def distance(call: Call, qkv: tuple[torch.Tensor, ...]) -> float:
    wanted = OP.reference(*(x.float() for x in qkv), None, 0, SCALE, -1, 0, 0.0, False, "")
    return float((call().float() - wanted).norm() / wanted.norm())


def measure(batch: int, length: int) -> list[dict[str, Any]]:
    moved = 2 * batch * length * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS)
    count = timing.sets_for(moved, 8)
    calls: dict[Any, list[Call]] = {}
    apart: dict[Any, float] = {}
    for side, make in sides(batch, length).items():
        made = [make() for _ in range(count)]
        calls[side] = [call for call, _ in made]
        apart[side] = distance(*made[0])
    times = timing.in_turn(calls, replays=7)
    operations = 4 * batch * HEADS * HEAD_DIM * length * (length + 1) / 2
    rows = []
    for side, found in times.items():
        us = statistics.median(found)
        rows.append(
            {
                "sequences": f"{batch} × {length}",
                "library": side[0],
                "how": side[1],
                "us": round(us, 2),
                "of_stock": round(timing.ratio(times["stock", "batch"], found), 2),
                "TFLOP/s": round(operations / us * 1e-6),
                "distance": f"{apart[side]:.1e}",
            }
        )
    return rows


def main(out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("attention.json")) -> None:
    registry.ops()
    rows = [row for shape in SHAPES for row in measure(*shape)]
    timing.write_json(out, {"libraries": implementations.versions(), "rows": rows})
    show(rows, 120)


if __name__ == "__main__":
    typer.run(main)
