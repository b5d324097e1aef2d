"""qk_norm_rope_store: qk_norm_rope whose K goes straight into the KV cache, and V with it, in one launch.

    q_out, k_out = qk_norm_rope(q, k, …)                                     as ``kernels/qk_norm_rope`` computes them
    row = loc[t] * mult + offset                                             as ``kernels/downcast_fp8`` finds it; t = b * S + s
    k_cache[0, row] = cast(k_program(k_out[b, s], k_scale));  v_cache[0, row] = cast(v_program(v[b, s], v_scale))

k, v [B, S, Hkv, D] and q [B, S, H, D] with unit last stride, the others free: columns of one qkv buffer. q may be None; v and
v_cache too. Weights, cos, sin, eps, norm and dtype are those of qk_norm_rope.
k_cache, v_cache [N, S', Hkv, D], any strides but a unit last one; mutated. N is 1, with loc [B * S]; or B, each sequence's
tokens going to rows of its own, k_cache[b, loc[s] * mult + offset], with loc [S]: a cache [B, Hkv, S', D], permuted.
``cache_dtype`` is float8_e4m3fn or float8_e5m2 (a cache of uint8 holds its bytes), or ``dtype``, with no programs: a copy.
``loc`` None, negative, repeated or past the end, ``wrap`` and ``check`` mean what they do in downcast_fp8.
Outputs: q_out [B, S, H, D], and k_out [B, S, Hkv, D] with ``keep_k``; [0] where there is none.

The bytes, of the cache too, are those of the two ops one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from inductor_ext import settings
from inductor_ext.kernels import steps
from inductor_ext.kernels.downcast_fp8 import op as downcast_fp8
from inductor_ext.kernels.qk_norm_rope import op as qk_norm_rope
from inductor_ext.kernels.rms_norm_quantize.op import CPP_NORMS
from inductor_ext.op import Kernel, Op

NAME = "qk_norm_rope_store"

#: GPUs on which it was measured against two launches. On others the rule waits for ``always``.
MEASURED = frozenset({"sm_90a"})


def fake(
    k: torch.Tensor, q: Any, v: Any, k_weight: Any, q_weight: Any, cos: torch.Tensor, sin: torch.Tensor,
    k_cache: torch.Tensor, v_cache: Any, k_scale: Any, v_scale: Any, loc: Any, eps: float, norm: str, dtype: torch.dtype,
    k_program: str, v_program: str, cache_dtype: torch.dtype, keep_k: bool, mult: Any, offset: Any, wrap: bool,
    check: bool,
) -> Any:  # fmt: skip
    _check(k, q, v, k_weight, q_weight, cos, sin, k_cache, v_cache, k_scale, v_scale, loc, norm, dtype, k_program, v_program,
           cache_dtype)  # fmt: skip
    return tuple(k.new_empty((0,) if x is None else x.shape, dtype=dtype) for x in (q, k if keep_k else None))


def reference(
    k: torch.Tensor, q: Any, v: Any, k_weight: Any, q_weight: Any, cos: torch.Tensor, sin: torch.Tensor,
    k_cache: torch.Tensor, v_cache: Any, k_scale: Any, v_scale: Any, loc: Any, eps: float, norm: str, dtype: torch.dtype,
    k_program: str, v_program: str, cache_dtype: torch.dtype, keep_k: bool, mult: int, offset: int, wrap: bool,
    check: bool,
) -> Any:  # fmt: skip
    _check(k, q, v, k_weight, q_weight, cos, sin, k_cache, v_cache, k_scale, v_scale, loc, norm, dtype, k_program, v_program,
           cache_dtype)  # fmt: skip
    turned, q_out = qk_norm_rope.reference(k, q, k_weight, q_weight, cos, sin, eps, norm, dtype)
    sequences = k_cache.shape[0]
    tokens = loc.shape[0] if loc is not None else k.shape[0] * k.shape[1] if sequences == 1 else k.shape[1]
    rows, keep = downcast_fp8.rows_of(NAME, tokens, k_cache.shape[1], loc, mult, offset, wrap, check, k.device)
    for x, cache, scale, program in ((turned, k_cache, k_scale, k_program), (v, v_cache, v_scale, v_program)):
        if x is None:
            continue
        each = x.reshape(sequences, tokens, *x.shape[2:])
        for n in range(sequences):
            values = steps.evaluate(program, each[n], [] if scale is None else [scale]).to(cache_dtype)
            downcast_fp8.store_rows(cache[n], rows, keep, values)
    return q_out, turned if keep_k else k.new_empty((0,), dtype=dtype)


def _check(
    k: torch.Tensor, q: Any, v: Any, k_weight: Any, q_weight: Any, cos: torch.Tensor, sin: torch.Tensor,
    k_cache: torch.Tensor, v_cache: Any, k_scale: Any, v_scale: Any, loc: Any, norm: str, dtype: torch.dtype,
    k_program: str, v_program: str, cache_dtype: torch.dtype,
) -> None:  # fmt: skip
    qk_norm_rope.check(NAME, (("k", k, k_weight), ("q", q, q_weight)), cos, sin, norm, dtype)
    if (v is None) != (v_cache is None):
        raise ValueError(f"{NAME}: wanted both v and v_cache or neither")
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
        steps.check_program(f"{NAME}: {name}", program, 0 if scale is None else 1)
        if scale is not None and scale.numel() != 1:
            raise ValueError(f"{NAME}: {name}_scale: wanted one element, found shape {tuple(scale.shape)}")
    numbers = len(steps.constants(k_program, *([] if v is None else [v_program])))
    if numbers > steps.MAX_CONSTS:
        raise ValueError(f"{NAME}: wanted at most {steps.MAX_CONSTS} numbers in both programs together, found {numbers}")
    if loc is None:
        return
    if loc.dim() != 1 or loc.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{NAME}: loc: wanted a 1-d int32 or int64 tensor, found {loc.dtype} {tuple(loc.shape)}")
    if not loc.is_contiguous():
        raise ValueError(f"{NAME}: loc: wanted a contiguous tensor, found strides {tuple(loc.stride())}")
    tokens = k.shape[0] * k.shape[1] if k_cache.shape[0] == 1 else k.shape[1]
    if loc.shape[0] != tokens:
        raise ValueError(f"{NAME}: loc: wanted one index for each of {tokens} tokens, found {loc.shape[0]}")


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


def key(
    k: Any, q: Any, v: Any, k_weight: Any, q_weight: Any, cos: Any, sin: Any, k_cache: Any, v_cache: Any, k_scale: Any,
    v_scale: Any, loc: Any, eps: float, norm: str, dtype: Any, k_program: str, v_program: str, cache_dtype: Any, keep_k: bool,
    mult: Any, offset: Any, wrap: bool, check: bool,
) -> Any:  # fmt: skip
    rotation = (k.dtype, None if k_weight is None else k_weight.dtype, cos.dtype, norm, dtype)
    return (
        *rotation, cache_dtype, k_program, None if v is None else v_program,
        None if k_scale is None else k_scale.dtype, None if v_scale is None else v_scale.dtype,
        torch.int64 if loc is None else loc.dtype,
    )  # fmt: skip


def exports(key: Any) -> tuple[tuple[str, str], ...]:
    k_dtype, weight_dtype, table_dtype, norm, dtype, cache_dtype, k_program, v_program, k_scale, v_scale, loc = key
    first = len(steps.constants(k_program))
    v_program = "" if v_program is None else v_program
    programs = ("inductor_ext::Steps<>", "inductor_ext::Steps<>")
    fp8 = cache_dtype if cache_dtype in steps.CPP_FP8 else None
    saturated = fp8 is not None and all(steps.saturated(each, fp8) for each in (k_program, v_program or k_program))
    if fp8 is not None:
        cast = fp8 if saturated else None  # one cast for both
        programs = (
            steps.to_cpp(k_program, dtype, (k_scale,), fp8=cast),
            steps.to_cpp(v_program, k_dtype, (v_scale,), first, cast) if v_program else "inductor_ext::Steps<>",
        )
    types = ", ".join(
        (
            *(steps.CPP_TYPES[each] for each in (k_dtype, weight_dtype or k_dtype, table_dtype, dtype)),
            f"inductor_ext::{CPP_NORMS[norm] if norm else 'NoNorm'}",
            steps.CPP_TYPES[cache_dtype] if fp8 is None else steps.CPP_FP8[fp8],
            str(saturated).lower(),
            *programs,
            "int32_t" if loc == torch.int32 else "int64_t",
        )
    )
    return (("run", f"inductor_ext::QkNormRopeStore<{types}>::run"),)


def bind(module: Any, key: Any) -> Callable[..., None]:
    k_program, v_program = key[6], key[7]
    always = settings.checks_enabled()  # once a kernel: reading the environment takes 0.6 µs
    constants = steps.padded_constants(k_program, *([] if v_program is None else [v_program]))
    run = module.run

    def call(
        k: Any, q: Any, v: Any, k_weight: Any, q_weight: Any, cos: Any, sin: Any, k_cache: Any, v_cache: Any, k_scale: Any,
        v_scale: Any, loc: Any, eps: float, _n: str, _d: Any, _k: str, _v: str, _c: Any, keep_k: bool, mult: int, offset: int,
        wrap: bool, check: bool, q_out: Any, k_out: Any,
    ) -> None:  # fmt: skip
        run(k, q, v, k_weight, q_weight, cos, sin, k_cache, v_cache, k_scale, v_scale, loc, eps, mult, offset, wrap, keep_k,
            check or always, *constants, q_out, k_out)  # fmt: skip

    return call


def _examples() -> tuple[Any, ...]:
    """Qwen3 and Llama, into FP8 caches with a scale each, and into bf16 caches."""
    bf16, e4, program = torch.bfloat16, torch.float8_e4m3fn, downcast_fp8.PROGRAM_F32
    found = []
    for weight, norm in ((bf16, "cast mul"), (None, "")):
        rotation = (bf16, weight, bf16, norm, bf16)
        found.append((*rotation, e4, program, program, torch.float32, torch.float32, torch.int64))
        found.append((*rotation, bf16, "", "", None, None, torch.int64))
    return tuple(found)


OP = Op(
    schema=(
        "qk_norm_rope_store(Tensor k, Tensor? q, Tensor? v, Tensor? k_weight, Tensor? q_weight, Tensor cos, Tensor sin, "
        "Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor? k_scale, Tensor? v_scale, Tensor? loc, float eps, str norm, "
        "ScalarType dtype, str k_program, str v_program, ScalarType cache_dtype, bool keep_k, SymInt mult, SymInt offset, "
        "bool wrap, bool check) -> (Tensor, Tensor)"
    ),
    doc="qk_norm_rope that stores K, rotated, and V into their caches itself",
    fake=fake,
    reference=reference,
    kernel=Kernel(
        source="qk_norm_rope_store/qk_norm_rope_store.cuh",
        key=key,
        exports=exports,
        bind=bind,
        examples=_examples(),
    ),
)
