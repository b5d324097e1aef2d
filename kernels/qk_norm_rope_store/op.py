"""qk_norm_rope_store: qk_norm_rope whose K goes straight into the KV cache, and V with it, in one launch.

    q_out, k_out = qk_norm_rope(q, k, …)                                     as ``kernels/qk_norm_rope`` computes them
    row = loc[t] * mult + offset                                             as ``kernels/kv_store.py`` finds it; t = b * S + s
    k_cache[0, row] = cast(k_program(k_out[b, s], k_scale));  v_cache[0, row] = cast(v_program(v[b, s], v_scale))

k, v [B, S, Hkv, D] and q [B, S, H, D] with unit last stride, the others free: columns of one qkv buffer. q may be None; v and
v_cache too. Weights, cos, sin, eps, norm, dtype, pairs and rotary are those of qk_norm_rope.
k_cache, v_cache [N, S', Hkv, D], any strides but a unit last one; mutated. N is 1, with loc [B * S]; or B, each sequence's
tokens going to rows of its own, k_cache[b, loc[s] * mult + offset], with loc [S]: a cache [B, Hkv, S', D], permuted.
``cache_dtype`` is float8_e4m3fn or float8_e5m2 (a cache of uint8 holds its bytes), or ``dtype``, with no programs: a copy.
``loc`` None, negative, repeated or past the end, ``wrap`` and ``check`` mean what they do there.
Outputs: q_out [B, S, H, D], and k_out [B, S, Hkv, D] with ``keep_k``; [0] where there is none.

The bytes, of the cache too, are those of the two ops one after the other.
"""

from __future__ import annotations

from typing import Any

import torch

from inductor_ext.kernels import kv_store, steps
from inductor_ext.kernels.downcast_fp8.op import PROGRAM_F32
from inductor_ext.kernels.qk_norm_rope import op as qk_norm_rope
from inductor_ext.op import Kernel, Op
from inductor_ext.signature import Call, Mutated, SymInt

NAME = "qk_norm_rope_store"

#: GPUs on which it was measured against two launches. On others the rule waits for ``always``.
MEASURED = frozenset({"sm_90a"})


def reference(
    k: torch.Tensor, q: torch.Tensor | None, v: torch.Tensor | None, k_weight: torch.Tensor | None,
    q_weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, k_cache: Mutated, v_cache: Mutated | None,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, loc: torch.Tensor | None, eps: float, norm: str,
    dtype: torch.dtype, k_program: str, v_program: str, cache_dtype: torch.dtype, keep_k: bool, mult: SymInt, offset: SymInt,
    wrap: bool, check: bool, pairs: bool = False, rotary: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    turned, q_out = qk_norm_rope.reference(k, q, k_weight, q_weight, cos, sin, eps, norm, dtype, pairs, rotary)
    sequences, tokens = k_cache.shape[0], _tokens(k, k_cache)
    rows, keep = kv_store.rows_of(NAME, tokens, k_cache.shape[1], loc, mult, offset, wrap, check, k.device)
    for x, cache, scale, program in ((turned, k_cache, k_scale, k_program), (v, v_cache, v_scale, v_program)):
        if x is not None and cache is not None:
            for into, each in zip(cache, x.reshape(sequences, tokens, *x.shape[2:])):
                kv_store.store(into, rows, keep, each, scale, program, cache_dtype)
    return q_out, turned if keep_k else k.new_empty((0,), dtype=dtype)


def fake(k: torch.Tensor, q: torch.Tensor | None, dtype: torch.dtype, keep_k: bool) -> Any:
    return tuple(k.new_empty((0,) if x is None else x.shape, dtype=dtype) for x in (q, k if keep_k else None))


def _tokens(k: torch.Tensor, k_cache: torch.Tensor) -> Any:
    """How many of them ``loc`` is for."""
    return k.shape[0] * k.shape[1] if k_cache.shape[0] == 1 else k.shape[1]


def check(
    k: torch.Tensor, q: Any, v: Any, k_weight: Any, q_weight: Any, cos: torch.Tensor, sin: torch.Tensor,
    k_cache: torch.Tensor, v_cache: Any, k_scale: Any, v_scale: Any, loc: Any, norm: str, dtype: torch.dtype,
    k_program: str, v_program: str, cache_dtype: torch.dtype, pairs: bool, rotary: int,
) -> None:  # fmt: skip
    qk_norm_rope.check(NAME, (("k", k, k_weight), ("q", q, q_weight)), cos, sin, norm, dtype, pairs, rotary)
    kv_store.check_pair(NAME, v, v_cache)
    if cache_dtype not in (*steps.CPP_FP8, dtype):
        raise TypeError(f"{NAME}: cache_dtype: wanted float8_e4m3fn, float8_e5m2 or {dtype}, found {cache_dtype}")
    if v is not None and (v.dtype != k.dtype or tuple(v.shape) != tuple(k.shape)):
        raise ValueError(f"{NAME}: v: wanted {k.dtype} of k's shape {tuple(k.shape)}, found {v.dtype} of {tuple(v.shape)}")
    if v is not None and cache_dtype is dtype and v.dtype != dtype:
        raise TypeError(f"{NAME}: v: wanted {dtype}, to be copied, found {v.dtype}")
    for name, cache, scale, program in (("k", k_cache, k_scale, k_program), ("v", v_cache, v_scale, v_program)):
        if cache is None:
            continue
        _check_cache(f"{name}_cache", cache, k, k_cache.shape[:2], cache_dtype)
        if cache_dtype is dtype and (program or scale is not None):
            raise ValueError(f"{NAME}: {name}_program: wanted none, and no scale, for a cache of {dtype}, found {program!r}")
    tokens = _tokens(k, k_cache)
    kv_store.check(NAME, v, k_scale, v_scale, loc, k_program, v_program, tokens, f"{tokens} tokens")


def _check_cache(name: str, cache: torch.Tensor, k: torch.Tensor, like: Any, dtype: torch.dtype) -> None:
    """One cache; ``like``: the sizes N and S' of k's."""
    wanted = (dtype, torch.uint8) if dtype in steps.CPP_FP8 else (dtype,)
    if cache.dtype not in wanted:
        raise TypeError(f"{NAME}: {name}: wanted {' or '.join(map(str, wanted))}, found {cache.dtype}")
    if cache.dim() != 4 or cache.shape[2:] != k.shape[2:] or cache.shape[0] not in (1, k.shape[0]):
        sizes = f"[1 or {k.shape[0]}, S, {k.shape[2]}, {k.shape[3]}]"
        raise ValueError(f"{NAME}: {name}: wanted shape {sizes}, found {tuple(cache.shape)}")
    if cache.shape[:2] != like:
        raise ValueError(f"{NAME}: {name}: wanted k_cache's {tuple(like)} first sizes, found shape {tuple(cache.shape)}")
    if cache.stride(3) != 1 and cache.shape[3] != 1:
        raise ValueError(f"{NAME}: {name}: wanted a last dimension of unit stride, found strides {tuple(cache.stride())}")


def key(*of: Any) -> Any:
    """What an op is compiled for, with what is turned with what, if it is not halves of whole heads, at the end."""
    *end, turn = of
    return (*kv_store.key(*end), *turn)


def exports(key: Any) -> str:
    *rotation, cache_dtype = key[:6]
    end, turn = key[6:11], key[11:]
    k_dtype, dtype, loc = rotation[0], rotation[-1], end[-1]
    if cache_dtype in steps.CPP_FP8:
        store = kv_store.types(cache_dtype, dtype, k_dtype, end)
    else:
        copied = "inductor_ext::Steps<>"
        store = steps.CPP_TYPES[cache_dtype], "false", copied, copied, kv_store.loc_type(loc)
    named = ", ".join((*qk_norm_rope.types(*rotation), *store, *turn))
    return f"inductor_ext::QkNormRopeStore<{named}>::{'turn' if turn else 'run'}"


def bind(module: Any, key: Any) -> Call:
    tensors = "k, q, v, k_weight, q_weight, cos, sin, k_cache, v_cache, k_scale, v_scale, loc"
    rotary = ", rotary" if key[11:] else ""
    return kv_store.run(module.run, f"{tensors}, eps{rotary}, mult, offset, wrap, keep_k", key[6:11], ", out0, out1")


def _examples() -> list[Any]:
    """Qwen3 and Llama, into FP8 caches with a scale each, and into bf16 caches."""
    fp8 = torch.float8_e4m3fn, PROGRAM_F32, PROGRAM_F32, torch.float32, torch.float32, torch.int64
    bf16 = torch.bfloat16, "", "", None, None, torch.int64
    return [(*rotation, *cache) for rotation in (qk_norm_rope.QWEN3, qk_norm_rope.LLAMA) for cache in (fp8, bf16)]


OP = Op(
    NAME,
    "qk_norm_rope that stores K, rotated, and V into their caches itself",
    reference=reference,
    fake=fake,
    checks=[check],
    kernel=Kernel(
        source="qk_norm_rope_store/qk_norm_rope_store.cuh",
        key=Call(
            key,
            f"{kv_store.KEY}, k.dtype, None if k_weight is None else k_weight.dtype, cos.dtype, norm, dtype, cache_dtype, "
            "turn(k, cos, pairs, rotary)",
            turn=qk_norm_rope.turn,
        ),
        exports=exports,
        bind=bind,
        examples=_examples(),
    ),
)
