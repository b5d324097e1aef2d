"""V's rows are old rows of the K cache, which the same launch writes"""

import torch

RULES = {"qk_norm_rope": "always", "qk_norm_rope_store": "always"}


def inputs():
    qkv = torch.randn(2, 6, 128).bfloat16()
    cos = torch.rand(2, 6, 64).bfloat16()
    sin = torch.rand(2, 6, 64).bfloat16()
    kc = torch.randn(64, 2, 64).bfloat16()
    vc = torch.randn(64, 2, 64).bfloat16()
    i = torch.arange(12) * 3
    return (
        qkv,
        cos,
        sin,
        kc,
        vc,
        i,
    )


def f(qkv, cos, sin, kc, vc, i):
    x = qkv.view(2, 6, 2, 64).transpose(1, 2)
    half = torch.cat((-x[..., 32:], x[..., :32]), -1)
    k = x * cos[:, None] + half * sin[:, None]
    old = kc[4:16].clone()
    kc[i] = k.transpose(1, 2).reshape(12, 2, 64)
    vc[i] = old
    return (k,)
