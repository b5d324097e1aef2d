"""One scale for a tensor: stock Inductor, two launches and one, in turn, over inputs that L2 does not have.

    python -m benchmarks.kernels.one_scale --out benchmarks/results/h200/one_scale.json

``of copy`` is the time of a device-to-device copy of as many bytes as must move, over that of one launch; ``auto`` is what is
taken where nothing is forced: one launch, wherever it is possible.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import timing
from benchmarks.kernels.producers import BF16, E4, Calls, act_mul, quantise, rms_norm, scale_like
from benchmarks.kernels.shared import built, script
from inductor_ext import jit, settings
from inductor_ext.kernels.act_mul_quantize.op import OP as ACT_MUL
from inductor_ext.kernels.fp8_quantize.op import OP as QUANTIZE
from inductor_ext.kernels.rms_norm_quantize.op import OP as RMS_NORM
from inductor_ext.kernels.rms_norm_quantize.op import TORCHAO_PROGRAM, TORCHAO_SCALE

LAUNCHES = "INDUCTOR_EXT_TENSOR_LAUNCHES"
ROWS = (1, 16, 128, 1024, 7168, 65536)
SETS = 8  # of buffers, at most: tensors of a few KB are found in L2, as they are behind the kernel that made them


def alone(rows: int, columns: int) -> Calls:
    compiled = torch.compile(lambda x: quantise(x, "tensor"), dynamic=False)

    def make() -> tuple[Callable[[], Any], Callable[[], Any]]:
        x = torch.randn(rows, columns, device="cuda").to(BF16)
        out, scale = torch.empty(rows, columns, device="cuda", dtype=E4), scale_like(rows, "tensor")
        call = (x, "tensor", TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
        return lambda: compiled(x), lambda: QUANTIZE._call(*call, out0=out, out1=scale)

    return rows * columns * 3, make


def works() -> Iterator[tuple[str, int, int, Calls]]:
    for rows in ROWS:
        yield "norm", rows, 1024, rms_norm(rows, 1024, residual=False, granularity="tensor")
        yield "norm + residual", rows, 1024, rms_norm(rows, 1024, residual=True, granularity="tensor")
    for rows in (1, 128, 1024, 7168, 65536):
        yield "silu·mul", rows, 3072, act_mul(rows, 3072, halves=True, granularity="tensor")
    for rows in (128, 7168):
        yield "alone", rows, 2048, alone(rows, 2048)


def forced(call: Callable[[], Any], launches: int) -> Callable[[], Any]:
    def run() -> Any:
        os.environ[LAUNCHES] = str(launches)
        return call()

    return run


def measure(work: str, rows: int, columns: int, calls: Calls) -> dict[str, Any]:
    torch._dynamo.reset()
    moved, make = calls
    pairs = [make() for _ in range(timing.sets_for(moved, SETS))]
    sides = {"stock": [pair[0] for pair in pairs]}
    for name, launches in (("two", 2), ("one", 1), ("auto", 0)):
        sides[name] = [forced(pair[1], launches) for pair in pairs]
    found = timing.in_turn(sides, replays=5)
    return {
        "work": work, "rows": rows, "columns": columns, **timing.medians(found),
        "one/two": timing.ratio(found["two"], found["one"]), "auto/stock": timing.ratio(found["stock"], found["auto"]),
        "of_copy": timing.of_copy(moved, found["one"]),
    }  # fmt: skip


def build(_: Any) -> None:
    arch = jit.current_arch(settings.current())
    if arch is None:
        raise SystemExit("no GPU")
    rest = ("tensor", TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
    specs = [RMS_NORM.spec_of_key((BF16, residual, BF16, "cast mul", *rest), arch) for residual in (True, False)]
    built([*specs, ACT_MUL.spec_of_key((BF16, "silu", *rest), arch), QUANTIZE.spec_of_key((BF16, *rest), arch)])


if __name__ == "__main__":
    script(measure, works, build=build)
