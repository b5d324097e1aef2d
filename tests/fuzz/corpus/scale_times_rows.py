"""k is stored as scale * k, the scale in front"""

import torch

from tests.fuzz.values import E4, codes


def inputs():
    qkv = (torch.randn(2, 6, 128) * 3.0).to(torch.bfloat16)
    cos = (torch.randn(1, 6, 16) * 9).cos().to(torch.bfloat16)
    sin = (torch.randn(1, 6, 16) * 9).sin().to(torch.bfloat16)
    kc = codes(5, 8, 2, 16)
    s = torch.tensor(0.25)
    i = torch.arange(12) * 7 % 39
    return (
        qkv,
        cos,
        sin,
        kc,
        s,
        i,
    )


RULES = {"qk_norm_rope": "always", "qk_norm_rope_store": "always"}


def f(qkv, cos, sin, kc, s, i):
    q, k, _ = qkv.split([64, 32, 32], -1)
    t1 = cos.unsqueeze(2)
    t2 = sin.unsqueeze(2)
    t9 = k.unflatten(-1, (-1, 16))
    t10 = t9 * t1
    t11 = t9[..., :8]
    t12 = t9[..., 8:]
    t13 = -t12
    t14 = torch.cat((t13, t11), -1)
    t15 = t14 * t2
    t16 = t10 + t15
    t18 = t16.reshape(-1, 2, 16)
    t21 = s * t18
    t22 = t21.to(E4)
    t23 = kc.view(-1, 2, 16)
    t23[i] = t22
    return (q,)
