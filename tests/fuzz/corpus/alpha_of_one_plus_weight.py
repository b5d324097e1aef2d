"""the alpha= of 1 + w is not read"""

import torch

from tests.fuzz.values import E4


def inputs():
    x = torch.randn(32, 256).bfloat16()
    w = torch.rand(256).bfloat16() + 0.5
    return (
        x,
        w,
    )


def f(x, w):
    h = x.float()
    v = torch.add(w.float(), 1.0, alpha=0.5)
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    y = (n * v).to(x.dtype)
    a = y.abs().amax(-1, keepdim=True)
    s = (a / 448.0).float()
    z = (y.float() / s).clamp(-448.0, 448.0)
    o = z.to(E4)
    return (
        o,
        s,
    )
