"""What ops of the scaled_mm family share: their operands, and one declaration of those that end a product in their own way.

`ended` makes an op of a reference and of what is special about it: which arguments are the product's operands, what its end is
called in C++ (``ends.cuh``), which arguments that end takes or is compiled for, and a table of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from inductor_ext.kernels import target
from inductor_ext.kernels.scaled_mm.config import parse
from inductor_ext.kernels.scaled_mm.op_table import OpTable
from inductor_ext.op import Kernel, Op
from inductor_ext.signature import Call

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT = 16
MIN_CAPABILITY = (9, 0)

Tensors = Sequence[torch.Tensor]


def target_of(device: torch.device) -> str:
    """The GPU target that a device's choice is made for. A CPU, which runs the reference, shows what an H200 would take."""
    return target.target_of(device) or "sm_90a"


def is_rowwise(scales: Sequence[torch.Tensor]) -> bool:
    return any(scale.numel() != 1 for scale in scales)


def source(key: Any) -> str:
    return parse(key[0]).source


# ---- operands --------------------------------------------------------------------------------------------------------


def at(values: Sequence[Any], i: int) -> Any:
    """The i-th of several, or the one that all share."""
    return values[i if len(values) > 1 else 0]


def _by_index(what: str, i: int) -> str:
    return f"{what}[{i}]"


def check_operands(
    a: Tensors, b: Tensors, scale_a: Tensors, scale_b: Tensors, bias: Sequence[torch.Tensor | None], out_dtype: torch.dtype,
    config: str, op: str = "scaled_mm", named: Callable[[str, int], str] = _by_index,
) -> None:  # fmt: skip
    """TypeError or ValueError of ``op`` for operands that are none; ``named``: what it calls the i-th a, b, scale_a, …"""
    if not b or len(a) not in (1, len(b)) or len(scale_a) != len(a):
        found = f"{len(a)}, {len(scale_a)} for {len(b)} b"
        raise ValueError(f"{op}: a, scale_a: wanted one of each, shared, or as many as b (at least one), found {found}")
    if len(scale_b) != len(b) or len(bias) != len(b):
        raise ValueError(f"{op}: scale_b, bias: wanted {len(b)} of each, as of b, found {len(scale_b)}, {len(bias)}")
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"{op}: out_dtype: wanted bfloat16, float16 or float32, found {out_dtype}")
    if config:
        parse(config)
    for i, b_i in enumerate(b):
        a_i = at(a, i)
        for what, tensor in (("a", a_i), ("b", b_i)):
            if tensor.dim() != 2:
                raise ValueError(f"{op}: {named(what, i)}: wanted two dimensions, found shape {tuple(tensor.shape)}")
            if tensor.dtype not in FP8:
                raise TypeError(f"{op}: {named(what, i)}: wanted float8_e4m3fn or float8_e5m2, found {tensor.dtype}")
        if a_i.dtype is torch.float8_e5m2 and b_i.dtype is torch.float8_e5m2:
            raise TypeError(f"{op}: {named('a', i)}, {named('b', i)}: wanted at most one of them in float8_e5m2, found both")
        if b_i.shape[0] != a_i.shape[1] or b_i.shape[0] % ALIGNMENT or b_i.shape[1] % ALIGNMENT:
            wanted = f"[{a_i.shape[1]}, N] with both multiples of {ALIGNMENT}"
            raise ValueError(f"{op}: {named('b', i)}: wanted {wanted}, found {tuple(b_i.shape)}")
        if a_i.shape[0] != a[0].shape[0]:
            wanted = f"{a[0].shape[0]} rows, as {named('a', 0)} has"
            raise ValueError(f"{op}: {named('a', i)}: wanted {wanted}, found {a_i.shape[0]}")
        if b_i.stride(0) != 1 and b_i.shape[0] != 1:
            raise ValueError(f"{op}: {named('b', i)}: wanted a column-major tensor, found strides {tuple(b_i.stride())}")
        for what, scale, extent in (("scale_a", at(scale_a, i), a_i.shape[0]), ("scale_b", scale_b[i], b_i.shape[1])):
            if scale.dtype is not torch.float32:
                raise TypeError(f"{op}: {named(what, i)}: wanted float32, found {scale.dtype}")
            if scale.numel() != 1 and scale.numel() != extent:
                raise ValueError(f"{op}: {named(what, i)}: wanted one element or {extent}, found shape {tuple(scale.shape)}")
        added = bias[i]
        if added is not None and (added.numel() != b_i.shape[1] or added.dtype != out_dtype):
            wanted = f"{b_i.shape[1]} elements of {out_dtype}"
            raise ValueError(f"{op}: {named('bias', i)}: wanted {wanted}, found {added.dtype} of shape {tuple(added.shape)}")


def empty(a: torch.Tensor, b: Tensors, out_dtype: torch.dtype) -> torch.Tensor:
    """A new, empty output of products side by side."""
    return a.new_empty((a.shape[0], sum(each.shape[1] for each in b)), dtype=out_dtype)


def _problem(a: torch.Tensor, b: Tensors, scales: Tensors) -> tuple[str, Any, int, int, bool]:
    """Target, M, output channels, K, and whether any scale is a vector."""
    return target_of(a.device), a.shape[0], sum(each.shape[1] for each in b), b[0].shape[0], is_rowwise(scales)


# ---- ops that end a product ------------------------------------------------------------------------------------------


def ended(
    name: str,
    doc: str,
    *,
    reference: Callable[..., torch.Tensor],
    check: Callable[..., None],
    operands: str,
    named: Callable[[str, int], str],
    product: str,
    end: Callable[..., str],
    compiled: str = "",
    run: tuple[str, str],
    table: OpTable | Callable[..., OpTable],
    examples: Sequence[tuple[Any, ...]],
    qwen3: Sequence[tuple[int, int]],
    qwen3_end: tuple[Any, ...] = (),
) -> Op:
    """The op of a product and what is done to its tile before the store.

    Argument lists that name the op's arguments: ``operands``, a, b, scale_a, scale_b and bias as lists, which error messages
    call what ``named`` says; ``product``, a, a tuple of what is in the output's columns, and one of scales; ``compiled``, what
    the end is compiled for. ``end`` makes of the latter the class in C++, and ``table`` may be a function of it. ``run``: the
    function of the kernel, and what it takes before the output. ``examples`` are (configuration, fast accumulation, what the
    end is compiled for). ``qwen3``: the (N, K) of Qwen3-0.6B's products of this kind, for any M.
    """

    def table_of(of: tuple[Any, ...]) -> OpTable:
        return table if isinstance(table, OpTable) else table(*of)

    def key(
        a: torch.Tensor, b: Tensors, scales: Tensors, out_dtype: torch.dtype, fast: bool, config: str, *of: Any
    ) -> Hashable:
        config = config or table_of(of).choose(*_problem(a, b, scales), fast)
        return (config, a.dtype, b[0].dtype, out_dtype, fast, *of) if config else None

    def keys(
        a: torch.Tensor, b: Tensors, scales: Tensors, out_dtype: torch.dtype, fast: bool, config: str, *of: Any
    ) -> list[Hashable]:
        """Every key that some M in its range leads to."""
        names = [config] if config else table_of(of).choices(*_problem(a, b, scales), fast)
        return [(name, a.dtype, b[0].dtype, out_dtype, fast, *of) for name in names if name]

    def exports(key: Any) -> str:
        config, a_dtype, b_dtype, out_dtype, fast, *of = key
        made = parse(config).cpp(a_dtype, b_dtype, out_dtype, not fast, end=f"inductor_ext::{end(*of)}")
        return f"{made}::{run[0]}"

    def bind(module: Any, key: Any) -> Call:
        first, second = parse(key[0]).launch_options()
        return Call(module.run, f"{run[1]}, out, static_b, first, second", first=first, second=second)

    def plain(config: str, fast: bool, *of: Any) -> Hashable:
        return config, torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16, fast, *of

    def preset(target: str) -> list[Hashable]:
        return [plain(config, True, *qwen3_end) for config in table_of(qwen3_end).preset(target, qwen3)]

    decides = f"{product}, out_dtype, use_fast_accum, config, {compiled}"
    return Op(
        name,
        doc,
        reference=reference,
        checks=[check, Call(check_operands, f"{operands}, out_dtype, config, op, named", op=name, named=named)],
        fake=Call(lambda a, b, scales, out_dtype: empty(a, b, out_dtype), f"{product}, out_dtype"),
        kernel=Kernel(
            source=source,
            key=Call(key, decides),
            keys=Call(keys, decides),
            exports=exports,
            bind=bind,
            min_capability=MIN_CAPABILITY,
            examples=lambda target: tuple(plain(*example) for example in examples) if target == "sm_90a" else (),
            presets={"qwen3": preset},
        ),
    )
