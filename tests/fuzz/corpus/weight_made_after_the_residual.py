"""a norm's weight is computed after its residual sum, where the op is put"""

import torch

from tests.fuzz.values import E4


def inputs():
    x = torch.randn(4, 32).bfloat16()
    r = torch.randn(4, 32).bfloat16()
    w = torch.rand(32).bfloat16()
    return (
        x,
        r,
        w,
    )


def f(x, r, w):
    t = x + r
    h = t.float()
    m = (h * h).mean(-1, keepdim=True)
    v = 1.0 - w
    y = (h * torch.rsqrt(m + 1e-6) * v).to(t.dtype)
    a = y.abs().amax(-1, keepdim=True)
    s = (a / 448.0).float()
    z = (y.float() / s).clamp(-448.0, 448.0)
    o = z.to(E4)
    return (
        o,
        s,
    )
