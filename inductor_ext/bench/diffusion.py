"""A diffusion transformer of single-stream blocks, as Flux has them, in plain PyTorch: transformers has none.

shift, scale, gate = linear(silu(temb))                                  a vector of each for every picture
y = layer_norm(x) * (1 + scale) + shift                                  no weight, no bias
q, k, v, h = linears of y;  q, k = rotated(rms_norm(q)), rotated(rms_norm(k))       neighbouring columns are a pair
x = x + gate * linear(cat(attention(q, k, v), gelu(h)))
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F


class Output(NamedTuple):
    last_hidden_state: torch.Tensor


class DiffusionTransformer(torch.nn.Module):
    """Blocks on [items, positions, hidden]; ``inner``: the width of their MLPs."""

    def __init__(self, layers: int, hidden: int, heads: int, head_dim: int, inner: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(hidden, heads, head_dim, inner) for _ in range(layers))

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Output:
        for block in self.blocks:
            hidden_states = block(hidden_states, temb, cos, sin)
        return Output(hidden_states)


class Block(torch.nn.Module):
    def __init__(self, hidden: int, heads: int, head_dim: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = torch.nn.Linear(hidden, 3 * hidden)
        self.norm = torch.nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.q, self.k, self.v = (torch.nn.Linear(hidden, heads * head_dim) for _ in range(3))
        self.norm_q, self.norm_k = (torch.nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))
        self.up = torch.nn.Linear(hidden, inner)
        self.out = torch.nn.Linear(heads * head_dim + inner, hidden)

    def forward(self, x: torch.Tensor, temb: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.modulation(F.silu(temb))[:, None].chunk(3, -1)
        y = self.norm(x) * (1 + scale) + shift
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q(y), self.k(y), self.v(y)))
        q, k = (_rotated(norm(each), cos, sin) for norm, each in ((self.norm_q, q), (self.norm_k, k)))
        attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + gate * self.out(torch.cat((attention, F.gelu(self.up(y), approximate="tanh")), -1))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-b, a), -1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)
