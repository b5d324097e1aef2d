"""products that become columns of one buffer are returned beside that buffer"""

import torch

from tests.fuzz.values import E4

RULES = {"scaled_mm_siblings": "always"}


def inputs():
    a = torch.randn(1, 64).to(E4)
    s = torch.rand(1, 1) + 0.5
    w = torch.randn(32, 64).to(E4)
    t = torch.rand(32, 1) + 0.5
    u = torch.randn(32, 64).to(E4)
    r = torch.rand(32, 1) + 0.5
    return (
        a,
        s,
        w,
        t,
        u,
        r,
    )


def f(a, s, w, t, u, r):
    p = torch._scaled_mm(a, w.t(), s, t.t(), out_dtype=torch.bfloat16)
    q = torch._scaled_mm(a, u.t(), s, r.t(), out_dtype=torch.bfloat16)
    both = torch.cat([p, q], 1)
    return (
        both,
        p,
    )
