"""downcast_fp8: K and V scaled, clamped, cast to FP8 and stored into their caches at the same rows, in one launch.

    row = loc[t] * mult + offset                                        (loc absent: row = t * mult + offset)
    k_cache[row] = cast(k_program(k[t], k_scale));  v_cache[row] = cast(v_program(v[t], v_scale))

``k``, ``v`` [T, H, D] (or [T, C]), bf16, fp16 or fp32, with a free row stride: slices of one qkv buffer are read in place.
``k_cache``, ``v_cache`` [S, H, D], the FP8 ``dtype`` itself or uint8 holding its bytes; mutated. ``v`` and ``v_cache`` may be
None: one tensor is stored. ``k_scale``, ``v_scale``: one element on the same device, named ``s0`` in their program, or None.
``loc`` [T] int32 or int64. A negative ``loc[t]`` is padding and its row is skipped; with ``wrap=True`` a negative row counts
from the end, as in ``index_put``. A row at or past S is never written; ``check=True`` makes it an IndexError, and so does
``INDUCTOR_EXT_CHECKS=1`` (on a GPU a host sync a call, and nothing while a CUDA graph is captured).
Where ``loc`` repeats, one of the rows is stored whole. Bit-exact; T = 0 launches nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from inductor_ext import settings
from inductor_ext.kernels import steps
from inductor_ext.op import Kernel, Op

PROGRAM_F32 = "f32 div:s0 max:-448.0 min:448.0"


def fake(*args: Any) -> None:
    _check(*args)


def _check(
    k: Any, v: Any, k_cache: Any, v_cache: Any, k_scale: Any, v_scale: Any, loc: Any, k_program: str, v_program: str,
    dtype: torch.dtype, mult: Any = 1, offset: Any = 0, wrap: bool = False, check: bool = False,
) -> None:  # fmt: skip
    if (v is None) != (v_cache is None):
        raise ValueError("downcast_fp8: wanted both v and v_cache or neither")
    if dtype not in steps.CPP_FP8:
        raise TypeError(f"downcast_fp8: dtype: wanted float8_e4m3fn or float8_e5m2, found {dtype}")
    for name, x, cache, scale, program in (
        ("k", k, k_cache, k_scale, k_program),
        ("v", v, v_cache, v_scale, v_program),
    ):
        if x is None:
            continue
        if x.dtype not in steps.TOKEN_OF_DTYPE:
            raise TypeError(f"downcast_fp8: {name}: wanted bfloat16, float16 or float32, found {x.dtype}")
        if x.dtype != k.dtype:
            raise TypeError(f"downcast_fp8: v: wanted k's dtype {k.dtype}, found {x.dtype}")
        if cache.dtype not in (dtype, torch.uint8):
            raise TypeError(f"downcast_fp8: {name}_cache: wanted {dtype} or uint8, found {cache.dtype}")
        if x.dim() < 2 or cache.dim() != x.dim() or tuple(cache.shape[1:]) != tuple(x.shape[1:]):
            raise ValueError(
                f"downcast_fp8: {name}_cache: wanted [S, …] with {name}'s trailing sizes {tuple(x.shape[1:])}, "
                f"found shape {tuple(cache.shape)}"
            )
        steps.check_program(f"downcast_fp8: {name}", program, 0 if scale is None else 1)
        if scale is not None and scale.numel() != 1:
            raise ValueError(f"downcast_fp8: {name}_scale: wanted one element, found shape {tuple(scale.shape)}")
        if x.shape[0] != k.shape[0]:
            raise ValueError(f"downcast_fp8: v: wanted k's {k.shape[0]} rows, found {x.shape[0]}")
    numbers = len(steps.constants(k_program, *([] if v is None else [v_program])))
    if numbers > steps.MAX_CONSTS:
        raise ValueError(f"downcast_fp8: wanted at most {steps.MAX_CONSTS} numbers in both programs together, found {numbers}")
    if loc is not None and (loc.dim() != 1 or loc.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"downcast_fp8: loc: wanted a 1-d int32 or int64 tensor, found {loc.dtype} {tuple(loc.shape)}")
    if loc is not None and not loc.is_contiguous():
        raise ValueError(f"downcast_fp8: loc: wanted a contiguous tensor, found strides {tuple(loc.stride())}")
    if loc is not None and loc.shape[0] != k.shape[0]:
        raise ValueError(f"downcast_fp8: loc: wanted one index for each of k's {k.shape[0]} rows, found {loc.shape[0]}")


def reference(
    k: torch.Tensor, v: Any, k_cache: torch.Tensor, v_cache: Any, k_scale: Any, v_scale: Any, loc: Any, k_program: str,
    v_program: str, dtype: torch.dtype, mult: int = 1, offset: int = 0, wrap: bool = False,
    check: bool = False,
) -> None:  # fmt: skip
    """Masks instead of branches, so that it is safe on a CUDA device too; of repeated rows the last one wins."""
    _check(k, v, k_cache, v_cache, k_scale, v_scale, loc, k_program, v_program, dtype, mult, offset, wrap)
    if k.shape[0] == 0:
        return
    rows, keep = rows_of("downcast_fp8", k.shape[0], k_cache.shape[0], loc, mult, offset, wrap, check, k.device)
    for x, cache, scale, program in ((k, k_cache, k_scale, k_program), (v, v_cache, v_scale, v_program)):
        if x is not None:
            values = steps.evaluate(program, x, [] if scale is None else [scale]).to(dtype)
            store_rows(cache, rows, keep, values)


def rows_of(
    op: str, tokens: int, slots: int, loc: Any, mult: int, offset: int, wrap: bool, check: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of every token, and whether it is stored. IndexError of ``op`` for rows past the end, with checks on."""
    index = torch.arange(tokens, device=device) if loc is None else loc.long()
    rows = index * mult + offset
    keep = torch.ones_like(rows, dtype=torch.bool)
    if wrap:
        rows = torch.where(rows < 0, rows + slots, rows)
    elif loc is not None:
        keep = index >= 0
    inside = (rows >= 0) & (rows < slots)
    if (check or settings.checks_enabled()) and not bool((inside | ~keep).all()):
        token = int((~inside & keep).nonzero()[0])
        raise IndexError(f"{op}: loc: wanted rows in [0, {slots}), found {int(rows[token])} for token {token}")
    return rows, keep & inside


def store_rows(cache: torch.Tensor, rows: torch.Tensor, keep: torch.Tensor, values: torch.Tensor) -> None:
    """``cache[rows[t]] = values[t]`` for the tokens to ``keep``; of repeated rows the last one stands."""
    if values.element_size() == 1:
        cache, values = cache.view(torch.uint8), values.view(torch.uint8)
    _store_last(cache, rows[keep], values[keep])


def _store_last(cache: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    order = torch.argsort(rows, stable=True)
    rows, values = rows[order], values[order]
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = rows[1:] != rows[:-1]
    cache[rows[last]] = values[last]


def key(
    k: Any, v: Any, k_cache: Any, v_cache: Any, k_scale: Any, v_scale: Any, loc: Any, k_program: str, v_program: str,
    dtype: torch.dtype, mult: Any = 1, offset: Any = 0, wrap: bool = False, check: bool = False,
) -> Any:  # fmt: skip
    return (
        k.dtype, dtype, k_program, None if v is None else v_program,
        None if k_scale is None else k_scale.dtype, None if v_scale is None else v_scale.dtype,
        torch.int64 if loc is None else loc.dtype,
    )  # fmt: skip


def exports(key: Any) -> tuple[tuple[str, str], ...]:
    k_dtype, dtype, k_program, v_program, k_scale, v_scale, loc = key
    v_or_k = v_program if v_program is not None else k_program
    v_scale = v_scale if v_program is not None else k_scale
    saturated = steps.saturated(k_program, dtype) and steps.saturated(v_or_k, dtype)  # one cast for both
    cast = dtype if saturated else None
    types = ", ".join(
        (
            steps.CPP_TYPES[k_dtype],
            steps.CPP_FP8[dtype],
            str(saturated).lower(),
            steps.to_cpp(k_program, k_dtype, (k_scale,), fp8=cast),
            steps.to_cpp(v_or_k, k_dtype, (v_scale,), 0 if v_program is None else len(steps.constants(k_program)), cast),
            "int32_t" if loc == torch.int32 else "int64_t",
        )
    )
    entry = "run_one" if v_program is None else "run"
    return ((entry, f"inductor_ext::DowncastFp8<{types}>::{entry}"),)


def bind(module: Any, key: Any) -> Callable[..., None]:
    k_program, v_program = key[2], key[3]
    always = settings.checks_enabled()  # once a kernel: reading the environment takes 0.6 µs
    if v_program is None:
        constants = steps.padded_constants(k_program)
        run_one = module.run_one

        def one(k: Any, v: Any, kc: Any, vc: Any, ks: Any, vs: Any, loc: Any, _k: str, _v: str, _d: Any, mult: int = 1,
                offset: int = 0, wrap: bool = False, check: bool = False) -> None:  # fmt: skip
            run_one(k, kc, ks, loc, mult, offset, wrap, check or always, *constants)

        return one
    constants = steps.padded_constants(k_program, v_program)
    run = module.run

    def both(k: Any, v: Any, kc: Any, vc: Any, ks: Any, vs: Any, loc: Any, _k: str, _v: str, _d: Any, mult: int = 1,
             offset: int = 0, wrap: bool = False, check: bool = False) -> None:  # fmt: skip
        run(k, v, kc, vc, ks, vs, loc, mult, offset, wrap, check or always, *constants)

    return both


OP = Op(
    schema=(
        "downcast_fp8(Tensor k, Tensor? v, Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor? k_scale, Tensor? v_scale, "
        "Tensor? loc, str k_program, str v_program, ScalarType dtype, SymInt mult=1, SymInt offset=0, bool wrap=False, "
        "bool check=False) -> ()"
    ),
    doc="scale, clamp, cast and scatter K and V into FP8 caches, in one launch",
    fake=fake,
    reference=reference,
    kernel=Kernel(
        source="downcast_fp8/downcast_fp8.cuh",
        key=key,
        exports=exports,
        bind=bind,
        examples=tuple(
            (torch.bfloat16, torch.float8_e4m3fn, PROGRAM_F32, PROGRAM_F32, torch.float32, torch.float32, loc)
            for loc in (torch.int32, torch.int64)
        ),
    ),
)
