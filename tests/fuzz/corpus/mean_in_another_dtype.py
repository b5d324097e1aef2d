"""the dtype= of a norm's mean is not read"""

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
    m = h.pow(2).mean(-1, keepdim=True, dtype=torch.bfloat16)
    n = h * torch.rsqrt(m + 1e-6)
    y = w * n.to(x.dtype)
    a = y.abs().amax(-1, keepdim=True)
    s = (a / 448.0).float()
    z = (y.float() / s).clamp(-448.0, 448.0)
    o = z.to(E4)
    return (
        o,
        s,
    )
