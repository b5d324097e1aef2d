"""The step language: an elementwise chain as text, run by a reference and translated to C++.

A chain such as ``(x.float() / s).clamp(-448, 448)`` is ``"f32 div:s0 max:-448.0 min:448.0"``: the value starts as ``x`` and
every token changes it,

    f32 | bf16 | f16        convert to that dtype (rounds)
    mul:O  div:O            multiply by, divide by O
    max:O  min:O            ``clamp_min(O)``, ``clamp_max(O)``; NaN stays NaN
    recip                   1 / value (scale programs only)

with O a number (a Python scalar in the graph), ``sN`` (tensor operand N, one element), ``rN`` (tensor operand N, one element
a row) or ``scale`` (the dynamic scale of ``fp8_quantize``). Each step is *the PyTorch operator of that name, in the dtype the
value has there*: `evaluate` calls just those operators, so the reference is the eager chain itself and bit-exactness needs no
further argument; `to_cpp` names the same steps for ``include/inductor_ext/steps.cuh``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch

from inductor_ext import torch_compat

DTYPE_TOKENS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TOKEN_OF_DTYPE = {dtype: token for token, dtype in DTYPE_TOKENS.items()}
CPP_TYPES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
CPP_FP8 = {torch.float8_e4m3fn: "__nv_fp8_e4m3", torch.float8_e5m2: "__nv_fp8_e5m2"}
FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}

MAX_CONSTS = 8
MAX_OPERANDS = 4

_BINARY: dict[str, Callable[..., torch.Tensor]] = {
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.clamp_min,
    "min": torch.clamp_max,
}
_NS = "inductor_ext::"
_CPP_OPERANDS = {"s": "Scalar", "r": "Row"}
_CPP_NAMES = {"mul": "Mul", "div": "Div", "max": "Max", "min": "Min"}


@dataclasses.dataclass(frozen=True)
class Step:
    """``op`` is "to", "recip", "mul", "div", "max" or "min"; ``operand`` a dtype, a float, "sN", "rN", "scale" or None."""

    op: str
    operand: torch.dtype | float | str | None = None

    def __str__(self) -> str:
        if self.op == "to":
            return TOKEN_OF_DTYPE[self.operand]
        return self.op if self.operand is None else f"{self.op}:{self.operand}"


@functools.cache
def parse(text: str) -> tuple[Step, ...]:
    """Steps of a program's text. Raises ValueError naming the token that is not understood."""
    steps = []
    for token in text.split():
        op, _, operand = token.partition(":")
        if token in DTYPE_TOKENS:
            steps.append(Step("to", DTYPE_TOKENS[token]))
        elif token == "recip":
            steps.append(Step("recip"))
        elif op in _BINARY and operand:
            steps.append(Step(op, operand if _is_name(operand) else _number(operand, token)))
        else:
            raise ValueError(f"steps: {token!r} is none of f32, bf16, f16, recip, mul:O, div:O, max:O, min:O (in {text!r})")
    return tuple(steps)


def text_of(steps: Sequence[Step]) -> str:
    return " ".join(map(str, steps))


def evaluate(
    text: str, value: torch.Tensor, operands: Sequence[torch.Tensor] = (), scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Run the steps with PyTorch's own operators; operands broadcast against ``value`` as in the graph."""
    for step in parse(text):
        if step.op == "to":
            value = value.to(step.operand)
        elif step.op == "recip":
            value = torch.reciprocal(value)
        else:
            other = step.operand
            if other == "scale":
                other = scale
            elif isinstance(other, str):
                other = operands[int(other[1:])]
            value = _BINARY[step.op](value, other)
    return value


def operand_names(text: str) -> list[str]:
    return sorted({s.operand for s in parse(text) if isinstance(s.operand, str) and s.operand != "scale"})


def constants(*texts: str) -> list[float]:
    """Every number of the programs, in order: the run-time constants c0, c1, … of the kernel."""
    return [s.operand for text in texts for s in parse(text) if isinstance(s.operand, float)]


def result_dtype(text: str, dtype: torch.dtype) -> torch.dtype:
    for step in parse(text):
        if step.op == "to":
            dtype = step.operand
    return dtype


def saturated(text: str, fp8: torch.dtype) -> bool:
    """Whether the kernel may use the hardware's cast, which gives the largest finite number past the range: the last steps
    clamp to constants inside the finite range of ``fp8``, or PyTorch's own cast does the same."""
    if fp8 is torch.float8_e4m3fn and torch_compat.e4m3fn_saturates():
        return True
    low = high = None
    for step in reversed(parse(text)):
        if step.op == "to":
            continue
        if not isinstance(step.operand, float) or step.op not in ("max", "min"):
            break
        if step.op == "max":
            low = step.operand if low is None else low
        else:
            high = step.operand if high is None else high
    limit = FP8_MAX[fp8]
    return low is not None and high is not None and -limit <= low <= high <= limit


def to_cpp(
    text: str,
    dtype: torch.dtype,
    operands: Sequence[torch.dtype | None] = (),
    first_const: int = 0,
    fp8: torch.dtype | None = None,
) -> str:
    """The C++ type of a program whose value starts in ``dtype``.

    ``operands[i]`` is the dtype of operand i on the device, or None for an operand that the host reads and passes as a
    constant: those are numbered after all numbers of the call's programs. Numbers are numbered from ``first_const``. With
    ``fp8`` the kernel casts the result to it by the hardware's cast, and the clamps that this makes itself are left out: only
    for a kernel that is `saturated`, which one that casts for two programs is only if both are.
    """
    parts, const = [], first_const
    host_const = first_const + len(constants(text))
    for step in parse(text) if fp8 is None else _without_full_clamps(text, fp8):
        if step.op in ("to", "recip"):
            dtype = step.operand if step.op == "to" else dtype
            parts.append(f"{_NS}{step.op.capitalize()}<{CPP_TYPES[dtype]}>")
            continue
        if isinstance(step.operand, float):
            operand, const = f"{_NS}Const<{const}>", const + 1
        elif step.operand == "scale":
            operand = f"{_NS}Scale"
        else:
            name = str(step.operand)
            kind, index = _CPP_OPERANDS[name[0]], int(name[1:])
            if operands[index] is None:
                operand = f"{_NS}Const<{host_const + sum(other is None for other in operands[:index])}>"
            else:
                operand = f"{_NS}{kind}<{index}, {CPP_TYPES[operands[index]]}>"
        parts.append(f"{_NS}{_CPP_NAMES[step.op]}<{CPP_TYPES[dtype]}, {operand}>")
    return f"{_NS}Steps<{', '.join(parts)}>"


def _without_full_clamps(text: str, fp8: torch.dtype) -> Sequence[Step]:
    """The steps less the clamps at their end that are of just the finite range of ``fp8``, below and above.

    The hardware's cast (`saturated` programs use it) gives the bounds for what is outside, infinities too, and keeps NaN:
    what the clamps do, four instructions for two elements. Rounding to 16 bits in between is monotone and keeps the bounds.
    """
    steps, limit = list(parse(text)), FP8_MAX[fp8]
    end = len(steps)
    while end and (steps[end - 1].op == "to" or steps[end - 1] in (Step("max", -limit), Step("min", limit))):
        end -= 1
    clamps = {step.op for step in steps[end:]} - {"to"}
    if clamps != {"max", "min"}:
        return steps
    return steps[:end] + [step for step in steps[end:] if step.op == "to"]


def _is_name(text: str) -> bool:
    return text == "scale" or (text[0] in "sr" and text[1:].isdigit())


def _number(text: str, token: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"steps: wanted a number, sN, rN or scale after the colon, found {token!r}") from None


# ---- what the op.py of every kernel that runs programs needs ---------------------------------------------------------


def quantisation_types(dtype: torch.dtype, scale_program: str, program: str, fp8: torch.dtype) -> tuple[str, ...]:
    """The C++ template arguments of a dynamic scale: Fp8, Saturated, ScaleT, ScaleProgram, Program; values are in ``dtype``."""
    return (
        CPP_FP8[fp8],
        str(saturated(program, fp8)).lower(),
        CPP_TYPES[result_dtype(scale_program, dtype)],
        to_cpp(scale_program, dtype),
        to_cpp(program, dtype, first_const=len(constants(scale_program)), fp8=fp8),
    )


@functools.cache
def padded_constants(*texts: str) -> tuple[float, ...]:
    """The constants of the programs, padded with zeros to the kernels' fixed c0 … c7."""
    values = constants(*texts)
    return tuple(values + [0.0] * (MAX_CONSTS - len(values)))


def call_constants(text: str, operands: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """`padded_constants` of a CUDA call, with the values of operands that live on the CPU after the program's numbers."""
    values = constants(text) + [operand.item() for operand in operands if not operand.is_cuda]
    return tuple(values + [0.0] * (MAX_CONSTS - len(values)))


def check_program(name: str, text: str, operands: int, *, scale: bool = False) -> None:
    """ValueError unless the program parses and uses only what exists: operands, constants, ``scale`` where there is one."""
    if not scale and any(step.operand == "scale" for step in parse(text)):
        raise ValueError(f"{name}: wanted numbers and operands, found {text!r}, which names a dynamic scale")
    if operands > MAX_OPERANDS:
        raise ValueError(f"{name}: wanted at most {MAX_OPERANDS} operands, found {operands}")
    for operand in operand_names(text):
        if int(operand[1:]) >= operands:
            raise ValueError(f"{name}: {text!r} names {operand}, but {operands} operands were given")
    if len(constants(text)) > MAX_CONSTS:
        raise ValueError(f"{name}: wanted at most {MAX_CONSTS} numbers, found {len(constants(text))} in {text!r}")


def check_numbers(name: str, *texts: str) -> None:
    """ValueError where two programs of one kernel have more numbers than it takes."""
    if (found := len(constants(*texts))) > MAX_CONSTS:
        raise ValueError(f"{name}: wanted at most {MAX_CONSTS} numbers in both programs together, found {found}")
