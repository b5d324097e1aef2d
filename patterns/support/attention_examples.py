"""What the examples of attention rules share: heads as projections leave them, and attention as the dispatcher sends it."""

from __future__ import annotations

from typing import Any

import torch

from inductor_ext.calls import aten

H, HKV, S, D = 4, 2, 24, 16


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any = None, causal: bool = False) -> Any:
    """As the dispatcher sends it: on a CPU to its flash attention, on a GPU to cuDNN's."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)[:2]
    return aten._scaled_dot_product_cudnn_attention(q, k, v, bias, False, 0.0, causal)[:2]


def sdpa_scaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)[0]
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, scale=scale)[0]


def heads(device: str, count: int, width: int = D, tokens: int = S) -> torch.Tensor:
    """[B, count, S, D] as a projection leaves it. A CPU's fp32 shows any error; a GPU's kernels take 16 bits."""
    x = torch.randn(2, tokens, count, width, device=device).transpose(1, 2)
    return x if device == "cpu" else x.bfloat16()


def qkv(device: str) -> tuple[torch.Tensor, ...]:
    return heads(device, H), heads(device, HKV), heads(device, HKV)


def equal_heads(device: str) -> tuple[torch.Tensor, ...]:
    return tuple(heads(device, H) for _ in range(3))


def repeated(x: torch.Tensor) -> torch.Tensor:
    """transformers' repeat_kv."""
    b, count, tokens, width = x.shape
    return x[:, :, None].expand(b, count, H // count, tokens, width).reshape(b, H, tokens, width)


def additive(allowed: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.where(allowed, 0.0, -65536.0).to(q.dtype).expand(q.shape[0], 1, q.shape[2], q.shape[2])


def projected(device: str) -> tuple[torch.Tensor, ...]:
    """[B, S, heads · D], as q_proj, k_proj and v_proj give it."""
    return tuple(each.transpose(1, 2).flatten(2) for each in qkv(device))


def split(*projected: torch.Tensor) -> list[torch.Tensor]:
    return [x.view(*x.shape[:2], count, D).transpose(1, 2) for x, count in zip(projected, (H, HKV, HKV))]
