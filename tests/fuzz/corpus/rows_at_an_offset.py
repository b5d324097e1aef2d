"""rows of a grouped product that begin between multiples of 16 bytes, which the kernels refuse: left alone"""

import torch

from tests.fuzz.values import mx, offset

RULES = {"mxfp8_grouped_mm": "always"}


def inputs():
    x = offset((torch.randn(12, 64)).to(torch.bfloat16))
    w = mx((torch.randn(4, 48, 64) * 0.1).bfloat16())
    offs = torch.tensor([0, 0, 0, 12], dtype=torch.int32)
    return x, w, offs


def f(x, w, offs):
    return (torch._grouped_mm(x, w.transpose(-2, -1), offs=offs),)
