"""moe_combine: the end of a mixture of experts: each token's rows come back from expert order, weighted and summed.

    out[t] = Σ_j round(y[inverse[t, j]] * weights[t, j])        j < k

y [S, H] are the experts' rows, bf16, fp16 or fp32, one pitch between rows; inverse [T, k], int64 or int32, says which row of y
is the t-th token's j-th: the inverse of the permutation that sorted the rows by expert. weights [T, k], or None for 1, in the
tokens' order; a product is rounded to the dtype that ``y * weights`` has in PyTorch, the sum is fp32 and rounded once, to
``dtype`` (bf16, fp16 or fp32). out [T, H], contiguous. k is 1 to 64; T = 0 works; any H, in 16-byte accesses if 8 divides it.

With expert_ids [T, k], int64 or int32, a row whose expert is ``experts`` or later counts as zero, whatever its weight, and is
never read: it is a row that grouped matmuls leave uninitialised, since its expert is on another rank.

A negative index counts from the end, as in PyTorch. An index outside y: IndexError on a CPU; the kernel does not read there,
and the token becomes NaN.
"""

from __future__ import annotations

from typing import Any

import torch

from inductor_ext.kernels import steps
from inductor_ext.op import Kernel, Op
from inductor_ext.signature import Call

#: Architectures on which the kernel has run and was compared with the reference. The rule asks in mode ``auto``.
HAS_RUN: frozenset[str] = frozenset({"sm_90a"})

MAX_TOP_K = 64
_CPP_INTEGERS = {torch.int64: "int64_t", torch.int32: "int32_t"}


def product_dtype(y: torch.Tensor, weights: torch.Tensor | None) -> torch.dtype:
    """What PyTorch makes of ``y * weights``, neither being 0-d."""
    return y.dtype if weights is None else torch.promote_types(y.dtype, weights.dtype)


def reference(
    y: torch.Tensor,
    weights: torch.Tensor | None,
    inverse: torch.Tensor,
    expert_ids: torch.Tensor | None,
    experts: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    rows = y[inverse.reshape(-1)].view(*inverse.shape, y.shape[1])
    if weights is not None:
        rows = rows * weights.unsqueeze(-1)
    if expert_ids is not None:
        rows = torch.where((expert_ids >= experts).unsqueeze(-1), 0.0, rows)
    if rows.dtype == dtype:
        return rows.sum(1)
    return rows.sum(1, dtype=torch.float32).to(dtype)


def check(
    y: torch.Tensor,
    weights: torch.Tensor | None,
    inverse: torch.Tensor,
    expert_ids: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    """TypeError or ValueError naming the argument that is wrong."""
    if y.dtype not in steps.TOKEN_OF_DTYPE:
        raise TypeError(f"moe_combine: y: wanted bfloat16, float16 or float32, found {y.dtype}")
    if y.dim() != 2:
        raise ValueError(f"moe_combine: y: wanted rows, [S, H], found shape {tuple(y.shape)}")
    if inverse.dtype not in _CPP_INTEGERS:
        raise TypeError(f"moe_combine: inverse: wanted int64 or int32, found {inverse.dtype}")
    if inverse.dim() != 2 or not 1 <= inverse.shape[1] <= MAX_TOP_K:
        wanted = f"[T, k], k from 1 to {MAX_TOP_K}"
        raise ValueError(f"moe_combine: inverse: wanted {wanted}, found shape {tuple(inverse.shape)}")
    if weights is not None and weights.dtype not in steps.TOKEN_OF_DTYPE:
        raise TypeError(f"moe_combine: weights: wanted bfloat16, float16 or float32, found {weights.dtype}")
    if expert_ids is not None and expert_ids.dtype not in _CPP_INTEGERS:
        raise TypeError(f"moe_combine: expert_ids: wanted int64 or int32, found {expert_ids.dtype}")
    for name, each in (("inverse", inverse), ("weights", weights), ("expert_ids", expert_ids)):
        if each is not None and each.shape != inverse.shape:
            wanted = f"the shape of inverse, {tuple(inverse.shape)}"
            raise ValueError(f"moe_combine: {name}: wanted {wanted}, found {tuple(each.shape)}")
        if each is not None and each.device != y.device:
            raise ValueError(f"moe_combine: {name}: wanted {y.device}, as y, found {each.device}")
    if dtype not in steps.TOKEN_OF_DTYPE:
        raise TypeError(f"moe_combine: dtype: wanted bfloat16, float16 or float32, found {dtype}")


def key(
    y: torch.Tensor, weights: torch.Tensor | None, inverse: torch.Tensor, expert_ids: torch.Tensor | None, dtype: torch.dtype
) -> Any:
    ids = inverse.dtype if expert_ids is None else expert_ids.dtype
    return y.dtype, None if weights is None else weights.dtype, inverse.dtype, ids, dtype


def exports(key: Any) -> str:
    y, weights, inverse, ids, dtype = key
    weights = weights or y
    floats = (steps.CPP_TYPES[each] for each in (y, weights, torch.promote_types(y, weights), dtype))
    return f"inductor_ext::MoeCombine<{', '.join((*floats, _CPP_INTEGERS[inverse], _CPP_INTEGERS[ids]))}>::run"


def moe(_target: str) -> tuple[Any, ...]:
    """What Hugging Face's models take: routing weights in the model's dtype (Qwen, GLM, …) or in fp32 (Mixtral, …)."""
    bf16, i64 = torch.bfloat16, torch.int64
    return tuple((bf16, weights, i64, i64, bf16) for weights in (bf16, torch.float32, None))


OP = Op(
    "moe_combine",
    "a mixture of experts' rows back in the tokens' order, weighted and summed",
    reference=reference,
    fake=lambda y, inverse, dtype: y.new_empty((inverse.shape[0], y.shape[1]), dtype=dtype),
    checks=[check],
    kernel=Kernel(
        source="moe_combine/moe_combine.cuh",
        key=key,
        exports=exports,
        bind=lambda module, key: Call(module.run, "y, weights, inverse, expert_ids, experts, out"),
        examples=moe,
    ),
)
