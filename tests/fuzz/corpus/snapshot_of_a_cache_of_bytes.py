"""a cache of bytes, stored to as FP8, is copied between two stores"""

import torch

from tests.fuzz.values import E4, codes


def inputs():
    k = torch.randn(1, 2, 8).half() * 30
    v = torch.randn(1, 2, 8).half() * 30
    c = codes(64, 2, 8).view(torch.uint8)
    i = torch.tensor([7])
    return (
        k,
        v,
        c,
        i,
    )


def f(k, v, c, i):
    c.view(E4)[i] = (k * 0.25).to(E4)
    old = c.clone()
    c.view(E4)[i] = (v * 0.25).to(E4)
    return (old,)
