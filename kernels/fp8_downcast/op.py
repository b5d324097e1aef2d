"""fp8_downcast: an elementwise chain with static scales, ending in FP8, in one pass over memory.

    out = cast(program(x), dtype)            x, out: same shape; program: see ``kernels/steps.py``

``x`` is bf16, fp16 or fp32, any shape and any dense layout (or rows with a free pitch). Operands are scalars (one element,
``sN`` in the program) or hold one value a row (``rN``): ``x.shape[:-1] + (1,)``; ``mul:s0|recip`` multiplies by one's
reciprocal. ``dtype`` is float8_e4m3fn or float8_e5m2,
cast as PyTorch casts: round to nearest even; unless the program clamps, e5m2 overflows to infinity, e4m3fn to NaN (torch 2.11)
or ±448 (from 2.13 on). Bit-exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from inductor_ext.kernels import steps
from inductor_ext.op import Kernel, Op
from inductor_ext.signature import Call

STATIC_F32 = "f32 div:s0 max:-448.0 min:448.0"


def reference(x: torch.Tensor, operands: Sequence[torch.Tensor], program: str, dtype: torch.dtype) -> torch.Tensor:
    return steps.evaluate(program, x, operands).to(dtype)


def check(x: torch.Tensor, operands: Sequence[torch.Tensor], program: str, dtype: torch.dtype) -> None:
    if x.dtype not in steps.TOKEN_OF_DTYPE:
        raise TypeError(f"fp8_downcast: x: wanted bfloat16, float16 or float32, found {x.dtype}")
    if dtype not in steps.CPP_FP8:
        raise TypeError(f"fp8_downcast: dtype: wanted float8_e4m3fn or float8_e5m2, found {dtype}")
    steps.check_program("fp8_downcast: program", program, len(operands))
    for step in steps.parse(program):
        if step.via and operands[int(str(step.operand)[1:])].device != x.device:
            wanted = "an operand with steps of its own on the device of x"
            raise ValueError(f"fp8_downcast: program, operands: {step} wanted {wanted}, found one on the host")
    numbers = len(steps.constants(program)) + sum(operand.device != x.device for operand in operands)
    if numbers > steps.MAX_CONSTS:
        wanted = f"at most {steps.MAX_CONSTS} numbers and host operands"
        raise ValueError(f"fp8_downcast: program, operands: wanted {wanted}, found {numbers}")


def key(x: torch.Tensor, operands: Sequence[torch.Tensor], program: str, dtype: torch.dtype) -> Any:
    if len(operands) == 1 and operands[0].is_cuda:  # every static chain of a real model: keep the hot path short
        return x.dtype, program, dtype, operands[0].dtype
    return x.dtype, program, dtype, tuple(None if o.device != x.device else o.dtype for o in operands)


def exports(key: Any) -> str:
    x_dtype, program, dtype, operands = key
    operands = operands if isinstance(operands, tuple) else (operands,)
    saturated = str(steps.saturated(program, dtype)).lower()
    chain = steps.to_cpp(program, x_dtype, operands, fp8=dtype)
    return f"inductor_ext::Fp8Downcast<{steps.CPP_TYPES[x_dtype]}, {steps.CPP_FP8[dtype]}, {saturated}, {chain}>::run"


def bind(module: Any, key: Any) -> Any:
    run, program, given = module.run, key[1], key[3]
    constants = steps.padded_constants(program)
    if not isinstance(given, tuple):
        return Call(run, "x, out, operands[0], None, None, None, *constants", constants=constants)

    def many(x: torch.Tensor, operands: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        device = [scale if scale.is_cuda else None for scale in operands] + [None] * (steps.MAX_OPERANDS - len(operands))
        run(x, out, *device, *(constants if None not in given else steps.call_constants(program, operands)))

    return many


OP = Op(
    "fp8_downcast",
    "scale, clamp and cast to FP8 with static scales, in one pass",
    reference=reference,
    fake=lambda x, dtype: torch.empty_like(x, dtype=dtype),
    checks=[check],
    kernel=Kernel(
        source="fp8_downcast/fp8_downcast.cuh",
        key=key,
        exports=exports,
        bind=bind,
        examples=[(x_dtype, STATIC_F32, torch.float8_e4m3fn, torch.float32) for x_dtype in (torch.bfloat16, torch.float16)],
    ),
)
