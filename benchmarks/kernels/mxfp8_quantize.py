"""mxfp8_quantize against torchao's compiled ``to_mx``, Inductor's code of our reference, and a device copy of the same bytes.

    python -m benchmarks.kernels.mxfp8_quantize --out benchmarks/results/h200/mxfp8_quantize.json     (--quick: four works)

Every work is compared with the reference's bytes first. Times are CUDA-graph replays, in turn, medians of three rounds, over
enough buffers to find L2 cold. ``of copy`` is the time of a device-to-device copy of as many bytes as x, data and the scales
have, over ours. torchao is left out where it is not installed; its grouped scales are a second kernel, swizzling plain ones.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import timing
from benchmarks.kernels.shared import built, script
from inductor_ext import jit, settings
from inductor_ext.kernels.mxfp8_quantize.op import OP
from inductor_ext.moe import mx

BF16, FP32, U8 = torch.bfloat16, torch.float32, torch.uint8
ROUNDS = 3
#: shape, dtype, groups, swizzled
WORKS: tuple[tuple[tuple[int, ...], torch.dtype, int, bool], ...] = (
    ((65536, 2048), BF16, 0, False),
    ((65536, 2048), BF16, 0, True),
    ((65536, 2048), BF16, 128, True),
    ((64, 2048), BF16, 128, True),
    ((2048, 2048), BF16, 128, True),
    ((65536, 2048), BF16, 1024, True),  # more groups than a block of threads lists at once
    ((1, 2048), BF16, 0, False),
    ((512, 2048), BF16, 0, False),
    ((8192, 4096), BF16, 0, False),
    ((8192, 4096), FP32, 0, False),
    ((128, 1536, 2048), BF16, 0, False),
    ((128, 1536, 2048), BF16, 0, True),
)
QUICK = WORKS[:4]
Side = Callable[[], Any]


def inductors(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference with bytes for scales: Inductor has no code for e8m0."""
    blocks = x.unflatten(-1, (-1, mx.BLOCK))
    byte, factor = mx.block_scale(blocks.abs().amax(-1), "rceil")
    return (blocks.float() * factor.unsqueeze(-1)).clamp(-448.0, 448.0).to(mx.DATA).flatten(-2), byte


@functools.cache
def torchao() -> Callable[..., Any] | None:
    """x and offs to data and scales, as torchao does it; None where it is not installed."""
    try:
        from torchao.prototype.moe_training.kernels.mxfp8 import quant
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import to_mx
    except ImportError:
        return None

    def run(x: torch.Tensor, offs: torch.Tensor | None) -> Any:
        scales, data = to_mx(x, mx.DATA, mx.BLOCK, ScaleCalculationMode.RCEIL)
        return data, scales if offs is None else quant.triton_mx_block_rearrange_2d_M_groups(scales, offs)

    return run


def sides_of(shape: tuple[int, ...], dtype: torch.dtype, groups: int, swizzled: bool) -> tuple[int, dict[str, list[Side]]]:
    """Bytes that must move, and of each side calls over buffers of their own; ours compared with the reference."""
    torch._dynamo.reset()
    compiled = torch.compile(inductors, dynamic=False)
    theirs = torchao() if not swizzled or groups else None
    compiled_theirs = torch.compile(theirs, dynamic=False) if theirs is not None else None
    offs = None
    if groups:
        offs = (torch.rand(groups).softmax(0).cumsum(0) * shape[0]).int().cuda()
        offs[-1] = shape[0]
    sides: dict[str, list[Side]] = {"ours": [], "inductor": [], "torchao": []}
    moved = 0
    while not moved or len(sides["ours"]) < timing.sets_for(moved, 32):
        x = torch.randn(shape, device="cuda").to(dtype)
        data, scales = OP.fake(x, offs, "rceil", swizzled)
        moved = sum(each.numel() * each.element_size() for each in (x, data, scales))
        sides["ours"].append(lambda x=x, a=data, b=scales: OP._call(x, offs, "rceil", swizzled, out0=a, out1=b))
        if not swizzled:
            sides["inductor"].append(lambda x=x: compiled(x))
        if compiled_theirs is not None:
            sides["torchao"].append(lambda x=x: compiled_theirs(x, offs))
        if len(sides["ours"]) == 1:
            sides["ours"][0]()
            for found, wanted in zip((data, scales), OP.reference(x, offs, "rceil", swizzled), strict=True):
                assert torch.equal(found.view(U8), wanted.view(U8)), "the kernel's bytes are not the reference's"
    return moved, {name: calls for name, calls in sides.items() if calls}


def measure(shape: tuple[int, ...], dtype: torch.dtype, groups: int, swizzled: bool) -> dict[str, Any]:
    moved, sides = sides_of(shape, dtype, groups, swizzled)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name in list(sides):
            try:
                found[name].append(timing.graph_time(sides[name], replays=9) * 1e6)
            except Exception as error:  # theirs: a side that does not run or cannot be captured is no reason to stop
                if name == "ours":
                    raise
                print(f"{name} {shape}: {type(error).__name__}: {str(error)[:200]}")
                del sides[name], found[name]
    ours = statistics.median(found["ours"])
    row: dict[str, Any] = {
        "shape": "x".join(map(str, shape)), "dtype": str(dtype)[6:], "groups": groups,
        "scales": "swizzled" if swizzled else "plain", "ours_us": round(ours, 2),
    }  # fmt: skip
    for name in ("inductor", "torchao"):
        times = found.get(name)
        row[f"{name}_us"] = round(statistics.median(times), 2) if times else None
        row[f"{name}/ours"] = timing.ratio(times, found["ours"]) if times else None
    row["TB/s"] = round(moved / ours * 1e-6, 3)
    row["of_copy"] = timing.of_copy(moved, found["ours"])
    return row


def build(works: list[Any]) -> None:
    arch = jit.current_arch(settings.current())
    keys = dict.fromkeys((dtype, "rceil", swizzled) for _, dtype, _, swizzled in works)
    built(OP.spec_of_key(key, arch or "") for key in keys)


if __name__ == "__main__":
    script(measure, WORKS, quick=QUICK, build=build, width=150)
