"""an index beyond the cache raises in eager; the row is skipped"""

import torch

from tests.fuzz.values import E4, codes


def inputs():
    k = torch.randn(3, 2, 16).bfloat16()
    c = codes(4, 16, 2, 16)
    i = torch.tensor([1, 64, 3])
    return (
        k,
        c,
        i,
    )


def f(k, c, i):
    p_f = k.float() / 0.25
    p_c = p_f.clamp(-448.0, 448.0)
    p = p_c.to(E4)
    c.view(-1, 2, 16)[i] = p
    return ()
