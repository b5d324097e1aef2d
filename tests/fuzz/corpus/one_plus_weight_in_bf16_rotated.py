"""the same in front of a rotation"""

import torch

RULES = {"qk_norm_rope": "always"}


def inputs():
    q = torch.randn(2, 9, 256).bfloat16()
    w = (torch.randn(64) * 0.3).bfloat16()
    cos = torch.rand(2, 9, 64).bfloat16()
    sin = torch.rand(2, 9, 64).bfloat16()
    return (
        q,
        w,
        cos,
        sin,
    )


def f(q, w, cos, sin):
    h = q.view(2, 9, 4, 64).float()
    v = 1.0 + w
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    y = (n * v).to(q.dtype).transpose(1, 2)
    half = torch.cat((-y[..., 32:], y[..., :32]), -1)
    o = y * cos[:, None] + half * sin[:, None]
    return (o,)
