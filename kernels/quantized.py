"""The FP8 at the end of ops that compute a y: how it is scaled, and one declaration of such ops.

    "row"     amax = max |y| over the last dimension, [..., 1];  scale = scale_program(amax);  out = cast(program(y), dtype)
    "tensor"  the same with one maximum for all, []
    "mx"      MXFP8: scale [..., C / 32] e8m0 and out as ``moe/mx.py`` has them; scale_program is the rounding, program ""
    "static"  scales are inputs, ``kernels/static_scale.py``: out [..., C], or [N, ..., C] for N of them; scale is [0]

Programs are those of ``kernels/steps.py``. Those of "row" and "tensor" may name one tensor, ``s0``: a bound of the scale that
is computed elsewhere, one fp32 element, which is in ``scales`` then. `producer` makes an op of a reference and of what is
special about it; its outputs are out, contiguous, then scale, then its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from inductor_ext.kernels import static_scale, steps
from inductor_ext.moe import mx
from inductor_ext.op import Kernel, Op
from inductor_ext.signature import Call

GRANULARITIES = ("row", "tensor")
MX, STATIC = "mx", static_scale.GRANULARITY
TORCHAO_SCALE = "div:448.0 f32"
TORCHAO_PROGRAM = "f32 div:scale max:-448.0 min:448.0"
WORKSPACE_FLOATS = 1024  # partial maxima, one a CTA
BOUND = "s0"  # what programs of a dynamic scale call the tensor that bounds it

_E4 = torch.float8_e4m3fn


def check_programs(
    op: str, scale_program: str, program: str, x: torch.Tensor, name: str, bounds: Sequence[torch.Tensor]
) -> None:
    """The error of the programs of ``op`` for a dynamic scale and of its argument ``name``, the bounds, if there is one."""
    steps.check_program(f"{op}: scale_program", scale_program, len(bounds))
    steps.check_program(f"{op}: program", program, len(bounds), made=(steps.SCALE, steps.AMAX))
    steps.check_numbers(f"{op}: scale_program, program", scale_program, program)
    named = {*steps.operand_names(scale_program), *steps.operand_names(program)}
    if named != {BOUND for _ in bounds} or len(bounds) > 1:
        wanted = f"one tensor if the programs name {BOUND}, else none"
        raise ValueError(f"{op}: {name}: wanted {wanted}, found {len(bounds)} for {', '.join(sorted(named)) or 'none'}")
    for bound in bounds:
        if bound.dtype is not torch.float32:
            raise TypeError(f"{op}: {name}: wanted a float32 bound, found {bound.dtype}")
        if any(size != 1 for size in bound.shape):
            raise ValueError(f"{op}: {name}: wanted a bound of one element, found shape {tuple(bound.shape)}")
        if bound.device != x.device:
            raise ValueError(f"{op}: {name}: wanted a bound on {x.device}, found one on {bound.device}")


def is_bounded(scale_program: str, program: str) -> bool:
    return BOUND in (*steps.operand_names(scale_program), *steps.operand_names(program))


def check(
    op: str, name: str, y: torch.Tensor, granularity: str, scale_program: str, program: str, dtype: torch.dtype,
    scales: Sequence[torch.Tensor],
) -> None:  # fmt: skip
    """The error of ``op``, if there is one; its argument ``name`` has the shape and dtype of ``y``."""
    if y.dtype not in steps.TOKEN_OF_DTYPE:
        raise TypeError(f"{op}: {name}: wanted bfloat16, float16 or float32, found {y.dtype}")
    if granularity not in (*GRANULARITIES, MX, STATIC):
        raise ValueError(f"{op}: granularity: wanted row or tensor or mx or static, found {granularity!r}")
    if dtype not in steps.CPP_FP8:
        raise TypeError(f"{op}: dtype: wanted float8_e4m3fn or float8_e5m2, found {dtype}")
    if granularity in GRANULARITIES:
        return check_programs(op, scale_program, program, y, "scales", scales)
    static_scale.check(op, y, granularity, scale_program, program, scales)
    if granularity == STATIC:
        return
    if scale_program not in mx.ROUNDINGS or program:
        found = f"{scale_program!r} and {program!r}"
        raise ValueError(f"{op}: scale_program and program: wanted rceil or floor and nothing for mx, found {found}")
    if dtype is not mx.DATA:
        raise TypeError(f"{op}: dtype: wanted float8_e4m3fn for mx, found {dtype}")
    if y.dim() == 0 or y.shape[-1] % mx.BLOCK != 0:
        wanted = f"rows of a multiple of {mx.BLOCK} elements for mx"
        raise ValueError(f"{op}: {name}: wanted {wanted}, found shape {tuple(y.shape)}")


def outputs(
    y: torch.Tensor, granularity: str, scale_program: str, dtype: torch.dtype, scales: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """New, empty out and scale for a y like ``y``."""
    if granularity == STATIC:
        return static_scale.outputs(y, dtype, scales)
    if granularity == MX:
        shape, of = (*y.shape[:-1], y.shape[-1] // mx.BLOCK), mx.SCALE
    else:
        shape, of = (*y.shape[:-1], 1) if granularity == "row" else (), steps.result_dtype(scale_program, y.dtype)
    return y.new_empty(y.shape, dtype=dtype), y.new_empty(shape, dtype=of)


def quantize(
    y: torch.Tensor, granularity: str, scale_program: str, program: str, dtype: torch.dtype, scales: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those outputs in PyTorch's operators, in y's layout."""
    if granularity == MX:
        return mx.quantize(y, scale_program)
    if granularity == STATIC:
        return static_scale.quantize(y, scale_program, program, dtype, scales)
    amax = y.abs().amax(-1, keepdim=True) if granularity == "row" else y.abs().amax()
    bounds = [bound.reshape(()) for bound in scales]
    scale = steps.evaluate(scale_program, amax, bounds)
    return steps.evaluate(program, y, bounds, scale=scale, amax=amax).to(dtype), scale


def check_not_empty(argument: str, y: torch.Tensor, granularity: str) -> None:
    """ValueError of an op's ``argument``, of y's shape, where there is no maximum."""
    if y.shape[-1] == 0 or (granularity == "tensor" and y.numel() == 0):
        wanted = "at least one column" if granularity != "tensor" else "at least one element"
        raise ValueError(f"{argument}: wanted {wanted}, found shape {tuple(y.shape)}")


# ---- ops -------------------------------------------------------------------------------------------------------------


def dynamic(granularity: str) -> tuple[Any, ...]:
    """The end of a key for torchao's recipe with one scale a row or one for all; `mxfp8` and `static` likewise."""
    return granularity, TORCHAO_SCALE, TORCHAO_PROGRAM, _E4


def mxfp8() -> tuple[Any, ...]:
    return MX, "rceil", "", mx.DATA


def static(count: int) -> tuple[Any, ...]:
    return STATIC, "", TORCHAO_PROGRAM, _E4, (count, torch.float32)


def producer(
    name: str,
    doc: str,
    *,
    reference: Callable[..., Any],
    check: Callable[..., None],
    fake: Callable[..., Any],
    operands: str,
    compiled: str,
    types: Callable[..., tuple[str, ...]],
    outs: str = "",
    kernel: str = "",
    examples: Sequence[tuple[Any, ...]],
    qwen3: Sequence[tuple[Any, ...]] = (),
) -> Op:
    """The op that computes a y and quantises it, from its own parts.

    Argument lists that name the op's arguments: ``operands``, what the kernel takes before out and scale, a tensor like y being
    first; ``compiled``, what it is compiled for, of which ``types`` makes template arguments; ``outs``, the op's own outputs.
    ``kernel`` is the folder of its source, whose name is that of the C++ type too; the op's own if it has one.
    """
    own, x = compiled.count(",") + 1, operands.partition(",")[0]
    outs, folder = f", {outs}" if outs else "", kernel or name

    def key(granularity: str, scale_program: str, program: str, dtype: torch.dtype, scales: Any, *of: Any) -> Any:
        made = *of, granularity, scale_program, program, dtype
        return (*made, static_scale.key(scales)) if granularity == STATIC else made

    def source(key: Any) -> str:
        return f"{folder}/{'static_scale' if key[own] == STATIC else folder}.cuh"

    def exports(key: Any) -> str:
        granularity, scale_program, program, dtype, *given = key[own:]
        struct = "".join(map(str.capitalize, folder.split("_")))
        of = types(*key[:own])
        if granularity == STATIC:
            struct += "Static"
            of += static_scale.quantisation_types(key[0], scale_program, program, dtype, *given)
        elif granularity == MX:
            scale = f"inductor_ext::MxScale<inductor_ext::mx::{scale_program.capitalize()}>"
            of += ("true", "__nv_fp8_e4m3", "true", "__nv_fp8_e8m0", scale, "inductor_ext::Steps<>")
        else:
            rowwise = str(granularity == "row").lower()
            of += (rowwise, *steps.quantisation_types(key[0], scale_program, program, dtype))
        return f"inductor_ext::{struct}<{', '.join(of)}>::run"

    def bind(module: Any, key: Any) -> Call:
        run, (granularity, *programs) = module.run, key[own:]
        constants = steps.padded_constants(*(() if granularity == MX else programs[:2]))
        bounded = granularity in GRANULARITIES and is_bounded(*programs[:2])
        if granularity == STATIC:
            missing = "None, " * (static_scale.MAX_SCALES - programs[-1][0])
            return Call(run, f"{operands}, out0{outs}, *scales, {missing}*constants", constants=constants)
        if granularity != "tensor":
            bound = "*scales" if bounded else "None"
            return Call(run, f"{operands}, out0, out1{outs}, None, None, {bound}, *constants", constants=constants)

        def with_one_scale(x: torch.Tensor, scales: Sequence[torch.Tensor], *operands: Any) -> None:
            """With y's memory, if the kernel asks for that."""
            partial = x.new_empty(WORKSPACE_FLOATS, dtype=torch.float32)
            given = (partial, scales[0] if bounded else None, *constants)
            if run(*operands, None, *given):
                run(*operands, x.new_empty(x.shape), *given)

        return Call(with_one_scale, f"{x}, scales, {operands}, out0, out1{outs}")

    return Op(
        name,
        doc,
        reference=reference,
        checks=[check],
        fake=fake,
        kernel=Kernel(
            source=source,
            key=Call(key, f"granularity, scale_program, program, dtype, scales, {compiled}"),
            exports=exports,
            bind=bind,
            examples=examples,
            presets={"qwen3": lambda _: qwen3},
        ),
    )
