"""a cache that is copied between two stores: the copy is the cache as it is at the end"""

import torch

from tests.fuzz.values import E4, codes


def inputs():
    k = torch.randn(5, 2, 8).bfloat16()
    v = torch.randn(5, 2, 8).bfloat16()
    c = codes(4, 16, 2, 8)
    i = torch.tensor([0, 1, 2, 9, 11])
    return (
        k,
        v,
        c,
        i,
    )


def f(k, v, c, i):
    p_f = k.float() / 0.25
    p_c = p_f.clamp(-448.0, 448.0)
    p = p_c.to(E4)
    c.view(-1, 2, 8)[i] = p
    old = c.clone()
    r_f = v.float() / 0.25
    r_c = r_f.clamp(-448.0, 448.0)
    r = r_c.to(E4)
    c.view(-1, 2, 8)[i + 1] = r
    return (old,)
