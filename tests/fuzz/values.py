"""What printed programs may use besides torch: dtypes by short names, and inputs with uncomfortable values or layouts."""

from __future__ import annotations

import torch

__all__ = ["E4", "E5", "codes", "mx", "offset", "padded", "sdpa", "special", "strided", "transposed"]

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2

_SPECIAL = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, 3e38, -3e38, 65504.0, 448.0, -464.0, 2.0**-9)


def codes(*shape: int) -> torch.Tensor:
    """An FP8 cache with something in it."""
    return torch.randint(0, 120, shape, dtype=torch.uint8).view(E4)


def special(x: torch.Tensor, step: int = 5, first: int = 0) -> torch.Tensor:
    """``x`` with NaN, infinities, zeros, subnormals and large numbers in every ``step``-th place."""
    x = x.clone(memory_format=torch.contiguous_format)
    flat = x.view(-1)
    at = torch.arange(0, flat.numel(), step, device=flat.device)
    if x.is_floating_point() and at.numel():
        values = torch.tensor(_SPECIAL, device=flat.device)
        flat[at] = values[(torch.arange(at.numel(), device=flat.device) + first) % len(_SPECIAL)].to(x.dtype)
    return x


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, every other element of a row in memory."""
    wide = torch.zeros(*x.shape, 2, dtype=x.dtype, device=x.device)
    wide[..., 0] = x
    return wide[..., 0]


def padded(x: torch.Tensor) -> torch.Tensor:
    """The same values in rows of a wider buffer."""
    if not x.dim():
        return x
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 16, dtype=x.dtype, device=x.device)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def offset(x: torch.Tensor) -> torch.Tensor:
    """The same values, not aligned: one element into a buffer."""
    wide = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    wide[1:] = x.reshape(-1)
    return wide[1:].view(x.shape)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values, the last two dimensions the other way round in memory."""
    return x.transpose(-2, -1).contiguous().transpose(-2, -1) if x.dim() > 1 else x


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None, causal: bool = False
) -> torch.Tensor:
    """As the dispatcher sends it: on a CPU to its flash attention, on a GPU to cuDNN's. Neither checks shapes."""
    if (
        q.dim() != 4
        or q.shape[:2] != k.shape[:2]
        or k.shape != v.shape
        or q.shape[3] != k.shape[3]
        or 0 in (*q.shape, *k.shape)
    ):
        raise ValueError(f"sdpa: wanted [B, H, S, D] alike, found {[list(each.shape) for each in (q, k, v)]}")
    if q.is_cuda and any(each.stride(-1) != 1 or each.data_ptr() % 16 for each in (q, k, v)):
        raise ValueError("sdpa: wanted unit stride and 16 bytes' alignment, without which cuDNN fails or ends the process")
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)[0]
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, bias, False, 0.0, causal)[0]


def mx(weight: torch.Tensor, **options: object) -> torch.Tensor:
    """A weight of experts in MXFP8."""
    from inductor_ext.moe import MXFP8Weight

    made = MXFP8Weight.quantize(weight.cpu(), **options)
    return made if weight.device.type == "cpu" else made.to(weight.device)
