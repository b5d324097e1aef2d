"""the reciprocal of a scale of integers is taken twice"""

import torch
import torch.nn.functional as F

from tests.fuzz.values import E4


def inputs():
    x = torch.randn(4, 64).bfloat16() * 5
    u = torch.randn(4, 64).bfloat16()
    s = torch.tensor(900)
    return (
        x,
        u,
        s,
    )


def f(x, u, s):
    y = u * F.silu(x)
    r = 1.0 / s
    z = (y.float() * r).clamp(-448.0, 448.0)
    o = z.to(E4)
    return (o,)
