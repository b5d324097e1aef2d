"""a convert to integers in the middle of a norm is taken for the one to its input's dtype"""

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
    m = h.pow(2).mean(-1, keepdim=True)
    n = h * torch.rsqrt(m + 1e-6)
    y = w * n.to(torch.int8)
    a = y.abs().amax(-1, keepdim=True)
    s = (a / 448.0).float()
    z = (y.float() / s).clamp(-448.0, 448.0)
    o = z.to(E4)
    return (
        o,
        s,
    )
