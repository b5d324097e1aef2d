"""Checks of fp8_downcast that take minutes of a GPU: every division that could round otherwise, and chains of steps.

Shapes, layouts, streams, graphs and the other two ops are checked by tests/kernels/test_gpu.py and by benchmarks.trust.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.kernels.downcast_units import E4, E5, F32, IN_DTYPES, SHORT, chains, static, static_unit, steps


def checks(modules: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Of each check its name and what is wrong, "" where nothing is."""
    yield from division(modules["division"])
    for x in IN_DTYPES:
        for fp8 in (E4, E5):
            yield from static_chains(modules[static_unit(x, fp8).name], x, fp8)


def differing(found: torch.Tensor, wanted: torch.Tensor) -> int:
    """How many FP8 elements differ, all NaN being equal."""
    a, b = found.view(torch.uint8), wanted.view(torch.uint8)
    first_nan = 0x7F if wanted.dtype == E4 else 0x7D
    nan = ((a & 0x7F) >= first_nan) & ((b & 0x7F) >= first_nan)
    return int(((a != b) & ~nan).sum())


def poisoned(x: torch.Tensor, fp8: torch.dtype) -> torch.Tensor:
    out = torch.empty_like(x, dtype=fp8)
    out.view(torch.uint8).fill_(0x55)
    return out


def adversarial(dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Over ten million values: every 16-bit pattern, or random bits, FP8 ties and bounds times ``scale`` and neighbours."""
    generator = torch.Generator("cuda").manual_seed(int(scale * 1000) + 1)
    if dtype != F32:
        patterns = torch.arange(-32768, 32768, dtype=torch.int32, device="cuda").to(torch.int16).view(dtype)
        random = torch.randn(10_000_000 // 8 * 8, generator=generator, device="cuda").mul(100 * scale).to(dtype)
        return torch.cat([patterns, random])
    bits = (
        torch.randint(-(2**31), 2**31, (8_000_000,), generator=generator, device="cuda", dtype=torch.int64)
        .to(torch.int32)
        .view(F32)
    )
    bytes_ = torch.arange(256, dtype=torch.uint8, device="cuda")
    ties = []
    for fp8 in (E4, E5):
        values = bytes_.view(fp8).float()
        values = values[values.isfinite()].sort().values
        ties += [values, (values[1:] + values[:-1]) / 2]
    edges = torch.tensor(
        [448, 464, 480, 57344, 61440, 65536, 0.0, 1e-45, 1e-40, 3.4e38, float("inf"), float("nan")], device="cuda"
    )
    edges = torch.cat([*ties, edges, -edges]) * scale
    near = torch.cat([(edges.view(torch.int32) + step).view(F32) for step in range(-4, 5)])
    normal = torch.randn(4_000_000, generator=generator, device="cuda") * (100 * scale)
    return torch.cat([bits, near, normal, -normal * 1e-3])


def division(module: Any) -> Iterator[tuple[str, str]]:
    wrong = torch.zeros(1, dtype=torch.int64, device="cuda")
    first = torch.zeros(4, device="cuda")
    for name, seeds in (
        ("near_midpoints", [()]),
        ("all_bf16", [()]),
        ("all_f16", [()]),
        ("random_bits", [(s << 40,) for s in range(4)]),
    ):
        for seed in seeds:
            getattr(module, name)(wrong, first, *seed)
        yield f"near division: {name}", f"{int(wrong)} differ; v, d, q, wanted {first.tolist()}" if int(wrong) else ""
        wrong.zero_()


def static_chains(module: Any, dtype: torch.dtype, fp8: torch.dtype) -> Iterator[tuple[str, str]]:
    for name, text in chains(fp8).items():
        if name == "row_div":
            continue
        scales = [0.0123, 1.0, 0.0, 1e-30, 1e-41, 3e38, float("inf"), float("nan"), -0.7] if "s0" in text else [1.0]
        for scale in scales:
            x = adversarial(dtype, scale if 1e-3 < abs(scale) < 10 else 1.0)
            s = torch.tensor(scale, device="cuda")
            out = poisoned(x, fp8)
            static(module, name, fp8, x, out, s if "s0" in text else None)
            wrong = differing(out, steps.evaluate(text, x, [s]).to(fp8))
            what = f"downcast {SHORT[dtype]}->{SHORT[fp8]} {name} scale {scale}"
            yield what, f"{wrong} of {x.numel()} differ" if wrong else ""
