"""a mask of no heads, which PyTorch's kernel takes without a check where it is called by itself: left alone"""

import torch

from tests.fuzz.values import sdpa

RULES = {"causal_attention": "always"}


def inputs():
    return tuple(torch.randn(2, 4, 24, 16) for _ in range(3))


def f(q, k, v):
    at = torch.arange(24, device=q.device)
    bias = torch.where(at[None, None, None, :] <= at[None, None, :, None], 0.0, -65536.0)
    return (sdpa(q, k, v, bias.expand(2, 0, 24, 24)),)
