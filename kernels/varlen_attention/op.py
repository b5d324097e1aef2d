"""varlen_attention: attention without a cache, over batches or packed sequences, by the fastest library that is installed.

    out[t, h] = Σ_j softmax_j(scale · q[t, h] · k[j, h'] ) v[j, h']        h' = h // (H / Hkv)

over the keys j of t's own sequence with ``t - left ≤ j ≤ t + right``; -1 is no bound, so (-1, -1) is full attention and (-1, 0)
causal. Every query sees at least itself. ``softcap`` c > 0 puts ``c · tanh(score / c)`` in the place of a score.

* q [B, S, H, D], k and v [B, S, Hkv, D]: B sequences of S; ``cu_seqlens`` None.
* q [T, H, D], k and v [T, Hkv, D]: sequences packed one after another, ``cu_seqlens`` int32 [N + 1] their ends, from 0 on;
  ``max_seqlen`` at least the longest. Rows past ``cu_seqlens[-1]``, the padding of a CUDA graph, are zero if ``padded``;
  otherwise the caller says that there are none. ``padded`` costs libraries a memset of the output. Those rows of k and v have
  to be finite for them: tiles of the last sequence reach into them, and 0 · NaN is NaN in some.

bf16 or fp16 on a GPU, strides free but for the last, head_dim as the library allows. out has q's shape, contiguous, in a buffer
that Inductor plans. ``implementation`` names the library ("" for the first that can, `implementations.py`). Without a library,
and on a CPU, plain PyTorch: exact masks, fp32 scores and sums. D of v that is not D of q (MLA) is refused.

On compute capability 9.0 there is a kernel, "hopper" (``hopper.cuh``), for D of 64 and 128 without softcap: weights are rounded
to the dtype before they are multiplied with the values, as flash-attn does it, and sums are fp32. It zeroes the rows of the
padding alone, and what other sequences or the padding hold, NaN included, does not reach a sequence's output.
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import torch

from inductor_ext.kernels import steps
from inductor_ext.kernels.varlen_attention import implementations
from inductor_ext.kernels.varlen_attention.implementations import Problem
from inductor_ext.op import Kernel, Op
from inductor_ext.signature import Call, SymInt


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: SymInt, scale: float,
    left: int, right: int, softcap: float, padded: bool, implementation: str,
) -> torch.Tensor:  # fmt: skip
    if cu_seqlens is None:
        return _dense(q, k, v, scale, left, right, softcap)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    ends = cu_seqlens.tolist()
    for start, end in itertools.pairwise(ends):
        rows = slice(start, end)
        out[rows] = _dense(q[None, rows], k[None, rows], v[None, rows], scale, left, right, softcap)[0]
    return out


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, left: int, right: int, softcap: float
) -> torch.Tensor:
    """[B, S, H, D] in fp32, or fp64 where the operands are."""
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    share = q.shape[2] // k.shape[2] if k.shape[2] else 1
    query, key, value = (each.to(wide).transpose(1, 2) for each in (q, k, v))
    key, value = (each.repeat_interleave(share, 1) for each in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(q.shape[1], device=q.device)
    apart = at[None, :] - at[:, None]  # key - query
    if left >= 0:
        scores = scores.masked_fill(apart < -left, float("-inf"))
    if right >= 0:
        scores = scores.masked_fill(apart > right, float("-inf"))
    return (torch.softmax(scores, -1) @ value).transpose(1, 2).to(q.dtype).contiguous()


def check(q: Any, k: Any, v: Any, cu_seqlens: Any, left: int, right: int, softcap: float, implementation: str) -> None:
    """TypeError or ValueError naming the argument that is wrong."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise TypeError(f"varlen_attention: q: wanted bfloat16, float16 or float32, found {q.dtype}")
    dims, named = (4, "[B, S, H, D]") if cu_seqlens is None else (3, "[T, H, D] beside cu_seqlens")
    if q.dim() != dims:
        raise ValueError(f"varlen_attention: q: wanted {named}, found shape {tuple(q.shape)}")
    for name, each in (("k", k), ("v", v)):
        if each.dtype != q.dtype or each.device != q.device:
            wanted = f"{q.dtype} on {q.device}, as q"
            raise TypeError(f"varlen_attention: {name}: wanted {wanted}, found {each.dtype} on {each.device}")
        if each.dim() != dims or each.shape[:-2] != q.shape[:-2] or each.shape[-1] != q.shape[-1]:
            wanted = f"q's shape {tuple(q.shape)} but for the heads"
            raise ValueError(f"varlen_attention: {name}: wanted {wanted}, found shape {tuple(each.shape)}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if v.shape[-2] != kv_heads or kv_heads == 0 or heads % kv_heads:
        found = f"{heads}, {kv_heads} and {v.shape[-2]}"
        raise ValueError(f"varlen_attention: q, k, v: wanted heads of q a multiple of those of k and v, found {found}")
    if cu_seqlens is not None and (cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.device != q.device):
        found = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        raise ValueError(f"varlen_attention: cu_seqlens: wanted int32 [N + 1] on {q.device}, found {found}")
    for name, bound in (("left", left), ("right", right)):
        if bound < -1:
            raise ValueError(f"varlen_attention: {name}: wanted -1 for no bound, or 0 or more, found {bound}")
    if softcap < 0:
        raise ValueError(f"varlen_attention: softcap: wanted 0 for none, or more, found {softcap}")
    if implementation and implementations.named(implementation) is None:
        names = ", ".join(each.name for each in implementations.IMPLEMENTATIONS)
        raise ValueError(f"varlen_attention: implementation: wanted one of {names}, found {implementation!r}")


_running: dict[Any, tuple[str, Any]] = {}  # problem, wanted implementation, device → name, its `Run`, which has worked once


def library(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int, scale: float,
    left: int, right: int, softcap: float, padded: bool, implementation: str, out: torch.Tensor,
) -> None:  # fmt: skip
    """A call on a GPU: the library of an earlier call like it, or the first that does it without raising."""
    if q.device.index is not None and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):  # libraries launch on the current device's stream
            library(q, k, v, cu_seqlens, max_seqlen, scale, left, right, softcap, padded, implementation, out)
        return
    if padded and cu_seqlens is not None:
        out.zero_()
    if out.numel() == 0:
        return
    rest = (q, k, v, cu_seqlens, max_seqlen, scale, left, right, softcap, padded, out)
    key = (q.dtype, q.shape[-1], left, right, softcap > 0, cu_seqlens is None, implementation, q.device.index)
    if key in _running:
        _running[key][1](*rest)
        return
    problem = problem_of(q, left, right, softcap, cu_seqlens is not None, scale=scale)
    while True:
        wanted = implementations.named(implementation)
        usable = wanted is not None and wanted.load is not None and not implementations.missing(wanted, problem)
        found = wanted if usable else implementations.choose(problem, called=("as a library",))[0]
        if found is None or found.load is None:
            out.copy_(OP.reference(*rest[:-1], ""))
            return
        try:
            run = found.load(importlib.import_module(found.module) if found.module else torch)
            run(*rest)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a kernel that is compiled at its first call fails in ways of its own
            implementations.broken(found.name, error)
            continue
        _running[key] = found.name, run
        return


def problem_of(
    q: torch.Tensor, left: int, right: int, softcap: float, packed: bool, length: Any = 0, scale: float = 1.0
) -> Problem:
    """``length``: tokens of a sequence; a symbolic one counts as not known."""
    capability = torch.cuda.get_device_capability(q.device)
    known = length if isinstance(length, int) else 0
    return Problem(q.dtype, int(q.shape[-1]), left, right, softcap > 0, packed, capability, known, scale)


# ---- the kernel ------------------------------------------------------------------------------------------------------

_chosen: dict[Any, Any] = {}  # what decides about a key → the key


def key(
    q: torch.Tensor, cu_seqlens: torch.Tensor | None, scale: float, left: int, right: int, softcap: float, implementation: str
) -> Any:
    """(dtype, D) where the own kernel is what such a call takes, or None."""
    packed = cu_seqlens is not None
    length = 0 if packed or not isinstance(q.shape[1], int) else q.shape[1]
    decides = q.dtype, q.shape[-1], length, scale > 0, left, right, softcap > 0, packed, implementation, q.device
    if decides in _chosen:
        return _chosen[decides]
    found = None
    if q.device.type == "cuda" and isinstance(q.shape[-1], int):
        problem = problem_of(q, left, right, softcap, packed, length, scale)
        wanted = implementations.named(implementation)
        if wanted is None:
            wanted = implementations.choose(problem, called=("as a library", "as a kernel"))[0]
        if wanted is not None and wanted.called == "as a kernel" and not implementations.missing(wanted, problem):
            found = q.dtype, q.shape[-1]
    if q.device.type == "cuda" and torch.cuda.is_initialized():  # not for fake tensors of a GPU that is not there
        _chosen[decides] = found
    return found


def exports(key: Any) -> str:
    dtype, width = key
    return f"inductor_ext::VarlenAttention<{steps.CPP_TYPES[dtype]}, {width}>::run"


def bind(module: Any, key: Any) -> Call:
    run = module.run

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> None:
        if not run(q, k, v, *rest):
            # Strides or addresses that are no multiples of 16 bytes: the copy engine does not read them, and flash-attn 2 ends
            # the process's CUDA context over them.
            run(*(x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)), *rest)

    return Call(call, "q, k, v, cu_seqlens, scale, left, right, padded, out")


def examples(target: str) -> tuple[Any, ...]:
    """bf16 heads of both widths, on the one architecture that the kernel is for."""
    return tuple((torch.bfloat16, width) for width in implementations.HOPPER_HEADS) if target == "sm_90a" else ()


def qwen3(target: str) -> tuple[Any, ...]:
    return ((torch.bfloat16, 128),) if target == "sm_90a" else ()


OP = Op(
    "varlen_attention",
    "attention without a cache over batches or packed sequences: causal, full or a window, GQA, softcap",
    reference=reference,
    fake=lambda q: q.new_empty(q.shape),
    checks=[check],
    kernel=Kernel(
        source="varlen_attention/hopper.cuh",
        key=key,
        exports=exports,
        bind=bind,
        min_capability=(9, 0),
        examples=examples,
        presets={"qwen3": qwen3},
    ),
    library=library,
)
