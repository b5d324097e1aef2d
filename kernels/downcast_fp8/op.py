"""downcast_fp8: K and V scaled, clamped, cast to FP8 and stored into their caches at the same rows, in one launch.

    row = loc[t] * mult + offset                                        (loc absent: row = t * mult + offset)
    k_cache[row] = cast(k_program(k[t], k_scale));  v_cache[row] = cast(v_program(v[t], v_scale))

``k``, ``v`` [T, H, D] (or [T, C]), bf16, fp16 or fp32, with a free row stride: slices of one qkv buffer are read in place.
``k_cache``, ``v_cache`` [S, H, D], the FP8 ``dtype`` itself or uint8 holding its bytes; mutated. ``v`` and ``v_cache`` may be
None: one tensor is stored. ``k_scale``, ``v_scale``: one element on the same device, named ``s0`` in their program, or [H], one
for each head; or None. The caches may lie in blocks, [blocks, block, H, D] with a D of unit stride and the other strides free:
halves of [blocks, 2, block, H, D], or [blocks, H, block, D], permuted.
``loc`` [T] int32 or int64: it, ``at``, ``mult``, ``offset``, ``wrap`` and ``check`` are those of ``kernels/kv_store.py``.
Bit-exact; T = 0 launches nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from inductor_ext.kernels import kv_store, steps
from inductor_ext.op import Kernel, Op
from inductor_ext.signature import Call, Mutated, SymInt

NAME = "downcast_fp8"

PROGRAM_F32 = "f32 div:s0 max:-448.0 min:448.0"


def reference(
    k: torch.Tensor, v: torch.Tensor | None, k_cache: Mutated, v_cache: Mutated | None, k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None, loc: torch.Tensor | None, k_program: str, v_program: str, dtype: torch.dtype,
    mult: SymInt = 1, offset: SymInt = 0, wrap: bool = False, check: bool = False, at: torch.Tensor | None = None,
) -> None:  # fmt: skip
    if k.shape[0] == 0:
        return
    blocks = k_cache.dim() > k.dim()
    if loc is not None and at is not None:
        rows, keep = kv_store.rows_of_blocks(NAME, (k_cache.shape[0], k_cache.shape[1]), loc, at, wrap, check)
    else:
        slots = k_cache.shape[0] * k_cache.shape[1] if blocks else k_cache.shape[0]
        rows, keep = kv_store.rows_of(NAME, k.shape[0], slots, loc, mult, offset, wrap, check, k.device)
    for x, cache, scale, program in ((k, k_cache, k_scale, k_program), (v, v_cache, v_scale, v_program)):
        if x is not None and cache is not None:
            kv_store.store(cache, rows, keep, x, scale, program, dtype, blocks)


def check(
    k: torch.Tensor, v: Any, k_cache: torch.Tensor, v_cache: Any, k_scale: Any, v_scale: Any, loc: Any, k_program: str,
    v_program: str, dtype: torch.dtype, mult: Any, offset: Any, at: Any,
) -> None:  # fmt: skip
    if dtype not in steps.CPP_FP8:
        raise TypeError(f"{NAME}: dtype: wanted float8_e4m3fn or float8_e5m2, found {dtype}")
    kv_store.check_pair(NAME, v, v_cache)
    blocks = k_cache.dim() == k.dim() + 1
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x is None:
            continue
        if x.dtype not in steps.TOKEN_OF_DTYPE:
            raise TypeError(f"{NAME}: {name}: wanted bfloat16, float16 or float32, found {x.dtype}")
        if x.dtype != k.dtype:
            raise TypeError(f"{NAME}: v: wanted k's dtype {k.dtype}, found {x.dtype}")
        if cache.dtype not in (dtype, torch.uint8):
            raise TypeError(f"{NAME}: {name}_cache: wanted {dtype} or uint8, found {cache.dtype}")
        if x.shape[0] != k.shape[0]:
            raise ValueError(f"{NAME}: v: wanted k's {k.shape[0]} rows, found {x.shape[0]}")
        if blocks:
            _check_blocks(name, x, cache, k_cache.shape[:2])
        elif x.dim() < 2 or cache.dim() != x.dim() or tuple(cache.shape[1:]) != tuple(x.shape[1:]):
            wanted = f"[S, …] with {name}'s trailing sizes {tuple(x.shape[1:])}"
            raise ValueError(f"{NAME}: {name}_cache: wanted {wanted}, found shape {tuple(cache.shape)}")
    rows, heads = k.shape[0], [x.shape[1] if x is not None and x.dim() == 3 else None for x in (k, v)]
    of = f"k's {rows} rows"
    kv_store.check(NAME, v, k_scale, v_scale, loc, k_program, v_program, rows, of, (heads[0], heads[1]))
    kv_store.check_at(NAME, at, loc, mult, offset, rows, of, blocks)


def _check_blocks(name: str, x: torch.Tensor, cache: torch.Tensor, like: Any) -> None:
    """One cache in blocks; ``like``: the sizes of k's, blocks and rows of one."""
    if x.dim() not in (2, 3) or cache.dim() != x.dim() + 1 or cache.shape[2:] != x.shape[1:]:
        wanted = f"[blocks, block, …] with {name}'s one or two trailing sizes {tuple(x.shape[1:])}"
        raise ValueError(f"{NAME}: {name}_cache: wanted {wanted}, found shape {tuple(cache.shape)}")
    if cache.shape[:2] != like:
        raise ValueError(f"{NAME}: v_cache: wanted k_cache's {tuple(like)} first sizes, found shape {tuple(cache.shape)}")
    if cache.stride(-1) != 1 and cache.shape[-1] != 1:
        raise ValueError(f"{NAME}: {name}_cache: wanted a last dimension of unit stride, found strides {tuple(cache.stride())}")


def key(
    v: Any, k_scale: Any, v_scale: Any, loc: Any, k_program: str, v_program: str, k: Any, dtype: Any, k_cache: Any
) -> Any:  # fmt: skip
    """What an op is compiled for; at the end, unless they are plain, whether the caches lie in blocks, and whether k's and v's
    scales are one a head."""
    made = (  # as kv_store.key has it: a call of another function and its arguments take 0.2 µs of every call
        k.dtype, dtype, k_program, None if v is None else v_program,
        None if k_scale is None else k_scale.dtype, None if v_scale is None else v_scale.dtype,
        torch.int64 if loc is None else loc.dtype,
    )  # fmt: skip
    if k_cache.dim() == k.dim() and (k_scale is None or k_scale.numel() == 1) and (v_scale is None or v_scale.numel() == 1):
        return made
    return (*made, k_cache.dim() > k.dim(), kv_store.is_heads(k_scale), kv_store.is_heads(v_scale))


def exports(key: Any) -> tuple[tuple[str, str], ...]:
    k_dtype, dtype, end, layout = key[0], key[1], key[2:7], key[7:]
    types = [steps.CPP_TYPES[k_dtype], *kv_store.types(dtype, k_dtype, k_dtype, end)]
    if layout:
        types.append(f"inductor_ext::CacheLayout<{', '.join(str(each).lower() for each in layout)}>")
    entry = ("run_one" if end[1] is None else "run") + ("_at" if layout else "")
    return ((entry, f"inductor_ext::DowncastFp8<{', '.join(types)}>::{entry}"),)


def bind(module: Any, key: Any) -> Call:
    at = ", at" if key[7:] else ""
    if key[3] is None:
        function = module.run_one_at if at else module.run_one
        return kv_store.run(function, f"k, k_cache, k_scale, loc{at}, mult, offset, wrap", key[2:7])
    function = module.run_at if at else module.run
    return kv_store.run(function, f"k, v, k_cache, v_cache, k_scale, v_scale, loc{at}, mult, offset, wrap", key[2:7])


OP = Op(
    NAME,
    "scale, clamp, cast and scatter K and V into FP8 caches, in one launch",
    reference=reference,
    checks=[check],
    kernel=Kernel(
        source="downcast_fp8/downcast_fp8.cuh",
        key=Call(key, f"{kv_store.KEY}, k, dtype, k_cache"),
        exports=exports,
        bind=bind,
        examples=[
            (torch.bfloat16, torch.float8_e4m3fn, PROGRAM_F32, PROGRAM_F32, torch.float32, torch.float32, loc, *layout)
            for loc, *layout in ((torch.int32,), (torch.int64,), (torch.int64, True, False, False))
        ],
    ),
)
