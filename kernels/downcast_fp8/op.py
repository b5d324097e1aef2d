"""downcast_fp8: K and V scaled, clamped, cast to FP8 and stored into their caches at the same rows, in one launch.

    row = loc[t] * mult + offset                                        (loc absent: row = t * mult + offset)
    k_cache[row] = cast(k_program(k[t], k_scale));  v_cache[row] = cast(v_program(v[t], v_scale))

``k``, ``v`` [T, H, D] (or [T, C]), bf16, fp16 or fp32, with a free row stride: slices of one qkv buffer are read in place.
``k_cache``, ``v_cache`` [S, H, D], the FP8 ``dtype`` itself or uint8 holding its bytes; mutated. ``v`` and ``v_cache`` may be
None: one tensor is stored. ``k_scale``, ``v_scale``: one element on the same device, named ``s0`` in their program, or None.
``loc`` [T] int32 or int64: it, ``mult``, ``offset``, ``wrap`` and ``check`` are those of ``kernels/kv_store.py``. Bit-exact;
T = 0 launches nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from inductor_ext.kernels import kv_store, steps
from inductor_ext.op import Kernel, Op
from inductor_ext.signature import Call, Mutated, SymInt

PROGRAM_F32 = "f32 div:s0 max:-448.0 min:448.0"


def reference(
    k: torch.Tensor, v: torch.Tensor | None, k_cache: Mutated, v_cache: Mutated | None, k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None, loc: torch.Tensor | None, k_program: str, v_program: str, dtype: torch.dtype,
    mult: SymInt = 1, offset: SymInt = 0, wrap: bool = False, check: bool = False,
) -> None:  # fmt: skip
    if k.shape[0] == 0:
        return
    rows, keep = kv_store.rows_of("downcast_fp8", k.shape[0], k_cache.shape[0], loc, mult, offset, wrap, check, k.device)
    for x, cache, scale, program in ((k, k_cache, k_scale, k_program), (v, v_cache, v_scale, v_program)):
        if x is not None and cache is not None:
            kv_store.store(cache, rows, keep, x, scale, program, dtype)


def check(
    k: torch.Tensor, v: Any, k_cache: torch.Tensor, v_cache: Any, k_scale: Any, v_scale: Any, loc: Any, k_program: str,
    v_program: str, dtype: torch.dtype,
) -> None:  # fmt: skip
    if dtype not in steps.CPP_FP8:
        raise TypeError(f"downcast_fp8: dtype: wanted float8_e4m3fn or float8_e5m2, found {dtype}")
    kv_store.check_pair("downcast_fp8", v, v_cache)
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x is None:
            continue
        if x.dtype not in steps.TOKEN_OF_DTYPE:
            raise TypeError(f"downcast_fp8: {name}: wanted bfloat16, float16 or float32, found {x.dtype}")
        if x.dtype != k.dtype:
            raise TypeError(f"downcast_fp8: v: wanted k's dtype {k.dtype}, found {x.dtype}")
        if cache.dtype not in (dtype, torch.uint8):
            raise TypeError(f"downcast_fp8: {name}_cache: wanted {dtype} or uint8, found {cache.dtype}")
        if x.dim() < 2 or cache.dim() != x.dim() or tuple(cache.shape[1:]) != tuple(x.shape[1:]):
            wanted = f"[S, …] with {name}'s trailing sizes {tuple(x.shape[1:])}"
            raise ValueError(f"downcast_fp8: {name}_cache: wanted {wanted}, found shape {tuple(cache.shape)}")
        if x.shape[0] != k.shape[0]:
            raise ValueError(f"downcast_fp8: v: wanted k's {k.shape[0]} rows, found {x.shape[0]}")
    rows = k.shape[0]
    kv_store.check("downcast_fp8", v, k_scale, v_scale, loc, k_program, v_program, rows, f"k's {rows} rows")


def exports(key: Any) -> tuple[tuple[str, str], ...]:
    k_dtype, dtype, *end = key
    types = steps.CPP_TYPES[k_dtype], *kv_store.types(dtype, k_dtype, k_dtype, end)
    entry = "run_one" if end[1] is None else "run"
    return ((entry, f"inductor_ext::DowncastFp8<{', '.join(types)}>::{entry}"),)


def bind(module: Any, key: Any) -> Call:
    if key[3] is None:
        return kv_store.run(module.run_one, "k, k_cache, k_scale, loc, mult, offset, wrap", key[2:])
    return kv_store.run(module.run, "k, v, k_cache, v_cache, k_scale, v_scale, loc, mult, offset, wrap", key[2:])


OP = Op(
    "downcast_fp8",
    "scale, clamp, cast and scatter K and V into FP8 caches, in one launch",
    reference=reference,
    checks=[check],
    kernel=Kernel(
        source="downcast_fp8/downcast_fp8.cuh",
        key=Call(kv_store.key, f"{kv_store.KEY}, k.dtype, dtype"),
        exports=exports,
        bind=bind,
        examples=[
            (torch.bfloat16, torch.float8_e4m3fn, PROGRAM_F32, PROGRAM_F32, torch.float32, torch.float32, loc)
            for loc in (torch.int32, torch.int64)
        ],
    ),
)
