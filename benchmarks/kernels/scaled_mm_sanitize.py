"""The kernels of scaled_mm, rms_norm_quantize, act_mul_quantize and qk_norm_rope once each, small, for compute-sanitizer.

compute-sanitizer --tool memcheck python -m benchmarks.kernels.scaled_mm_sanitize     (racecheck, initcheck, synccheck)
"""

from __future__ import annotations

import torch

from inductor_ext import registry
from inductor_ext.kernels.rms_norm_quantize.op import TORCHAO_PROGRAM, TORCHAO_SCALE

E4, BF16 = torch.float8_e4m3fn, torch.bfloat16
CONFIGS = (
    *("stream:8x64/1", "stream:16x64/8", "stream:64x64/4", "stream:64x128/1"),
    *("tile:64x128p", "tile:128x160p", "tile:128x128c", "tile:128x128p@2x1"),
)


def product(config: str, m: int, n: int, k: int, fast: bool) -> None:
    """Operands come from the host, so that initcheck sees every byte written."""
    a, b = torch.randn(m, k).to(E4).cuda(), torch.randn(n, k).to(E4).cuda().t()
    scales = torch.rand(m, 1).cuda(), torch.rand(1, n).cuda()
    out = torch.zeros(m, n + 32, dtype=BF16).cuda()[:, 16 : 16 + n]
    lists = [a], [b], [scales[0]], [scales[1]], [torch.rand(n).to(BF16).cuda()]
    torch.ops.inductor_ext.scaled_mm.out(*lists, BF16, fast, True, config, out=out)


def rotations(tokens: int, columns: int, normed: bool) -> None:
    """q and k are columns of one buffer, and end where it ends."""
    k, q = torch.randn(2, tokens, 9 * columns).to(BF16).cuda().unflatten(-1, (9, columns)).split([2, 7], 2)
    weights = [torch.rand(columns).to(BF16).cuda() if normed else None for _ in range(2)]
    cos, sin = (torch.randn(1, tokens, columns).to(BF16).cuda() for _ in range(2))
    torch.ops.inductor_ext.qk_norm_rope(q, k, *weights, cos, sin, 1e-6, "cast mul" if normed else "", BF16)


def main() -> None:
    registry.ops()
    for config in CONFIGS:
        for m, n, k in ((5, 80, 144), (130, 272, 528), (300, 1040, 1040)):
            product(config, m, n, k, True)
    for config in ("stream:64x64/4", "tile:128x128c"):
        product(config, 130, 272, 528, False)
    for columns in (64, 100, 1024, 4096, 16384):
        for residual in (True, False):
            x, other = (torch.randn(9, columns).to(BF16).cuda() for _ in range(2))
            weight = torch.rand(columns).to(BF16).cuda()
            granularity = "tensor" if columns == 4096 else "row"
            rest = (weight, 1e-6, "cast mul", granularity, TORCHAO_SCALE, TORCHAO_PROGRAM, E4, [])
            torch.ops.inductor_ext.rms_norm_quantize(x, other if residual else None, *rest)
            scales = [torch.full((), 0.02 * (i + 1)).cuda() for i in range(3)]
            rest = (weight, 1e-6, "cast mul", "static", "", TORCHAO_PROGRAM, E4, scales)
            torch.ops.inductor_ext.rms_norm_quantize(x, other if residual else None, *rest)
    for columns in (64, 100, 3072, 16384):
        gate, up = torch.randn(9, 2 * columns).to(BF16).cuda().chunk(2, dim=-1)
        granularity = "tensor" if columns == 3072 else "row"
        torch.ops.inductor_ext.act_mul_quantize(gate, up, "silu", granularity, TORCHAO_SCALE, TORCHAO_PROGRAM, E4, [])
        scale = torch.full((), 0.02).cuda()
        torch.ops.inductor_ext.act_mul_quantize(gate, up, "silu", "static", "", TORCHAO_PROGRAM, E4, [scale])
    for columns in (30, 64, 72, 80, 128, 136, 192, 256):
        for tokens in (3, 1200):
            rotations(tokens, columns, normed=True)
            rotations(tokens, columns, normed=False)
    torch.cuda.synchronize()
    print("sanitize: ran")


if __name__ == "__main__":
    main()
