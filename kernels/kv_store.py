"""What the ops that store K and V into their caches share: what a scale, a program and ``loc`` may be, and where a row goes.

    row = loc[t] * mult + offset                          (loc absent: row = t * mult + offset)
    cache[row] = cast(program(x[t], scale), dtype)        scale: one element, named ``s0`` in the program, or None

A cache may lie in blocks, [blocks, block, …]: its row r is row r % block of block r // block. With ``at`` [T], of loc's dtype,
loc[t] is a block and at[t] a row of it, each inside its own range and negative in its own right; mult is 1 then and offset 0.

A negative ``loc[t]`` is padding and its row is skipped; with ``wrap`` a negative row counts from the end, as in ``index_put``.
A row at or past the end is never written; ``check`` makes it an IndexError, and so does ``INDUCTOR_EXT_CHECKS=1`` (on a GPU a
host sync a call, and nothing while a CUDA graph is captured). Where ``loc`` repeats, one of the rows is stored whole.
"""

from __future__ import annotations

from typing import Any

import torch

from inductor_ext import settings
from inductor_ext.kernels import steps
from inductor_ext.signature import Call

#: The arguments that `key` reads: what both ops are compiled for.
KEY = "v, k_scale, v_scale, loc, k_program, v_program"


def check_pair(op: str, v: Any, v_cache: Any) -> None:
    if (v is None) != (v_cache is None):
        raise ValueError(f"{op}: v, v_cache: wanted both v and v_cache or neither, found one of them")


def check(
    op: str, v: Any, k_scale: Any, v_scale: Any, loc: Any, k_program: str, v_program: str, tokens: Any, of: str,
    heads: tuple[Any, Any] = (None, None),
) -> None:  # fmt: skip
    """The error of ``op``, if there is one. ``of``: in words, the ``tokens`` that are stored. ``heads``: how many k and v have,
    where a scale may be one a head."""
    programs = [("k", k_scale, k_program, heads[0])] + ([("v", v_scale, v_program, heads[1])] if v is not None else [])
    for name, scale, program, count in programs:
        steps.check_program(f"{op}: {name}_program", program, 0 if scale is None else 1)
        if scale is None or scale.numel() == 1:
            continue
        if count is None or tuple(scale.shape) != (count,) or count == 0:
            wanted = "one element" if count is None else f"one element, or shape ({count},): one for each head"
            raise ValueError(f"{op}: {name}_scale: wanted {wanted}, found shape {tuple(scale.shape)}")
    steps.check_numbers(f"{op}: k_program, v_program", *(program for _, _, program, _ in programs))
    check_index(op, "loc", loc, tokens, of)


def check_index(op: str, name: str, loc: Any, tokens: Any, of: str) -> None:
    if loc is None:
        return
    if loc.dim() != 1 or loc.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: {name}: wanted a 1-d int32 or int64 tensor, found {loc.dtype} {tuple(loc.shape)}")
    if not loc.is_contiguous():
        raise ValueError(f"{op}: {name}: wanted a contiguous tensor, found strides {tuple(loc.stride())}")
    if loc.shape[0] != tokens:
        raise ValueError(f"{op}: {name}: wanted one index for each of {of}, found {loc.shape[0]}")


def check_at(op: str, at: Any, loc: Any, mult: Any, offset: Any, tokens: Any, of: str, blocks: bool) -> None:
    """The error of ``op`` for ``at``; ``blocks``: whether the caches lie in blocks."""
    if at is None:
        return
    if not blocks:
        raise ValueError(f"{op}: at: wanted None for caches that are not in blocks, found shape {tuple(at.shape)}")
    check_index(op, "at", at, tokens, of)
    if loc is None or loc.dtype != at.dtype:
        found = "no loc" if loc is None else f"loc of {loc.dtype}"
        raise ValueError(f"{op}: at: wanted a loc of its dtype {at.dtype}, found {found}")
    if mult != 1 or offset != 0:
        raise ValueError(f"{op}: mult, offset: wanted 1 and 0 with at, found {mult} and {offset}")


# ---- the reference: masks instead of branches, so that it is safe on a CUDA device too ---------------------------------


def rows_of_blocks(
    op: str, sizes: tuple[int, int], loc: torch.Tensor, at: torch.Tensor, wrap: bool, check: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows_of` tokens that are told a block and a row of it; ``sizes``: how many blocks there are, and rows of one."""
    keep, inside, found = torch.ones_like(loc, dtype=torch.bool), torch.ones_like(loc, dtype=torch.bool), []
    for index, size in zip((loc.long(), at.long()), sizes):
        keep = keep if wrap else keep & (index >= 0)
        index = torch.where(index < 0, index + size, index) if wrap else index
        inside = inside & (index >= 0) & (index < size)
        found.append(index)
    if (check or settings.checks_enabled()) and not bool((inside | ~keep).all()):
        token = int((~inside & keep).nonzero()[0])
        wanted = f"blocks in [0, {sizes[0]}) and rows of them in [0, {sizes[1]})"
        of_token = f"block {int(found[0][token])} and row {int(found[1][token])} for token {token}"
        raise IndexError(f"{op}: loc, at: wanted {wanted}, found {of_token}")
    return found[0] * sizes[1] + found[1], keep & inside


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


def store(
    cache: torch.Tensor, rows: torch.Tensor, keep: torch.Tensor, x: torch.Tensor, scale: Any, program: str, dtype: torch.dtype,
    blocks: bool = False,
) -> None:  # fmt: skip
    """``cache[rows[t]] = cast(program(x[t], scale))`` for the tokens to ``keep``; of repeated rows the last one stands.

    ``blocks``: the cache lies in blocks. A scale of more than one element is one a head.
    """
    scale = scale if scale is None or scale.numel() == 1 else scale.unsqueeze(-1)
    values = steps.evaluate(program, x, [] if scale is None else [scale]).to(dtype)
    if values.element_size() == 1:
        cache, values = cache.view(torch.uint8), values.view(torch.uint8)
    rows, values = rows[keep], values[keep]
    order = torch.argsort(rows, stable=True)
    rows, values = rows[order], values[order]
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = rows[1:] != rows[:-1]
    rows, values = rows[last], values[last]
    if blocks:
        cache[rows // max(cache.shape[1], 1), rows % max(cache.shape[1], 1)] = values
    else:
        cache[rows] = values


# ---- kernels ---------------------------------------------------------------------------------------------------------


def key(v: Any, k_scale: Any, v_scale: Any, loc: Any, k_program: str, v_program: str, *of: Any) -> Any:
    """The end of a key, behind what an op is compiled for besides."""
    return (
        *of, k_program, None if v is None else v_program,
        None if k_scale is None else k_scale.dtype, None if v_scale is None else v_scale.dtype,
        torch.int64 if loc is None else loc.dtype,
    )  # fmt: skip


def is_heads(scale: Any) -> bool:
    """Whether a scale is one a head."""
    return scale is not None and scale.numel() != 1


def types(fp8: torch.dtype, k_dtype: torch.dtype, v_dtype: torch.dtype, end: tuple[Any, ...]) -> tuple[str, ...]:
    """The template arguments Fp8, Saturated, KProgram, VProgram and Loc for the ``end`` of a key and what is stored.

    Without v the program is k's, which nothing runs then. One cast serves both: it is the hardware's if both saturate.
    """
    k_program, v_program, k_scale, v_scale, loc = end
    numbers = len(steps.constants(k_program))
    if v_program is None:
        v_program, v_scale, numbers = k_program, k_scale, 0
    saturated = steps.saturated(k_program, fp8) and steps.saturated(v_program, fp8)
    cast = fp8 if saturated else None
    return (
        steps.CPP_FP8[fp8],
        str(saturated).lower(),
        steps.to_cpp(k_program, k_dtype, (k_scale,), fp8=cast),
        steps.to_cpp(v_program, v_dtype, (v_scale,), numbers, cast),
        loc_type(loc),
    )


def loc_type(loc: torch.dtype) -> str:
    return "int32_t" if loc == torch.int32 else "int64_t"


def run(function: Any, takes: str, end: tuple[Any, ...], outs: str = "") -> Call:
    """A call of a kernel: what it ``takes``, whether rows are checked, and the programs' constants, then ``outs``."""
    constants = steps.padded_constants(*(program for program in end[:2] if program is not None))
    checks = "True" if settings.checks_enabled() else "check"  # asked once a kernel: reading the environment takes 0.6 µs
    return Call(function, f"{takes}, {checks}, *constants{outs}", constants=constants)
