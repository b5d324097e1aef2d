"""The step language: an elementwise chain as text, run by a reference and translated to C++.

A chain such as ``(x.float() / s).clamp(-448, 448)`` is ``"f32 div:s0 max:-448.0 min:448.0"``: the value starts as ``x`` and
every token changes it,

    f32 | bf16 | f16        convert to that dtype (rounds)
    mul:O  div:O            multiply by, divide by O
    max:O  min:O            ``clamp_min(O)``, ``clamp_max(O)``; NaN stays NaN
    recip                   1 / value

with O a number (a Python scalar in the graph), ``sN`` (tensor operand N, one element), ``rN`` (tensor operand N, one element
a row), ``scale`` (the dynamic scale of ``fp8_quantize``) or ``amax`` (the maximum that this scale is made of). An operand may
take steps of its own first: ``mul:scale|recip`` multiplies by the scale's reciprocal, which rounds otherwise than
``div:scale``. Scales are made of a few more steps (``include/inductor_ext/scale_steps.cuh``):

    f64                     convert to double, in which the steps up to the next convert (``f32``) are computed
    add:N                   add a number, in fp32 or double
    positive_or:N           ``where(value > 0, value, N)``, so NaN becomes N
    nonzero_or:N            ``where(value == 0, N, value)``, so NaN stays NaN
    abs log2 exp2 ceil floor  the operators of these names; pow2 is ``pow(2, value)`` of an integral value
    bits_up                 the next power of two by the bits: ``exponent + (mantissa != 0)``, shifted back
    ue8m0                   the same, the exponent clamped to 1 … 254 as e8m0 wants it

Each step is *the PyTorch operator of that name, in the dtype the value has there*: `evaluate` calls just those operators, so
the reference is the eager chain itself and bit-exactness needs no further argument; `to_cpp` names the same steps for
``include/inductor_ext/steps.cuh``.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

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
    "add": torch.add,
    "positive_or": lambda value, other: torch.where(value > 0, value, other),
    "nonzero_or": lambda value, other: torch.where(value == 0, other, value),
}


def bits_up(value: torch.Tensor) -> torch.Tensor:
    bits = value.view(torch.int32)
    return ((((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()) << 23).view(torch.float32)


def ue8m0(value: torch.Tensor) -> torch.Tensor:
    bits = value.view(torch.int32)
    return ((((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()).clamp(1, 254) << 23).view(torch.float32)


_UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "recip": torch.reciprocal,
    "abs": torch.abs,
    "log2": torch.log2,
    "exp2": torch.exp2,
    "pow2": lambda value: torch.pow(2.0, value),
    "ceil": torch.ceil,
    "floor": torch.floor,
    "bits_up": bits_up,
    "ue8m0": ue8m0,
}
#: Steps of fp32 alone.
FP32_STEPS = frozenset({"log2", "exp2", "pow2", "ceil", "floor", "bits_up", "ue8m0"})
#: Steps that may stand between ``f64`` and the convert back.
WIDE_STEPS = frozenset({"mul", "div", "max", "min", "add", "recip"})
#: Names of what a kernel computes itself.
SCALE, AMAX = "scale", "amax"

_NS = "inductor_ext::"
_CPP_OPERANDS = {"s": "Scalar", "r": "Row"}
_CPP_MADE = {SCALE: "Scale", AMAX: "OfAmax"}
_TOKENS = {**DTYPE_TOKENS, "f64": torch.float64}
_TOKEN_OF = {dtype: token for token, dtype in _TOKENS.items()}


@dataclasses.dataclass(frozen=True)
class Step:
    """``op`` is "to" or one of the steps above; ``operand`` a dtype, a float, "sN", "rN", "scale", "amax" or None.

    ``via`` are the steps that the operand takes before it is used.
    """

    op: str
    operand: torch.dtype | float | str | None = None
    via: tuple[Step, ...] = ()

    def __str__(self) -> str:
        if self.op == "to":
            return _TOKEN_OF[self.operand]
        return self.op if self.operand is None else "|".join([f"{self.op}:{self.operand}", *map(str, self.via)])

    @property
    def numbers(self) -> list[float]:
        """The numbers of the step and of the way to its operand, in the order in which they are numbered."""
        own = [self.operand] if isinstance(self.operand, float) else []
        return own + [number for step in self.via for number in step.numbers]


@functools.cache
def parse(text: str) -> tuple[Step, ...]:
    """Steps of a program's text. Raises ValueError naming the token that is not understood."""
    return tuple(_step(token, text) for token in text.split())


def _step(token: str, text: str) -> Step:
    first, *via = token.split("|")
    op, _, operand = first.partition(":")
    if token in _TOKENS:
        return Step("to", _TOKENS[token])
    if token in _UNARY:
        return Step(token)
    if op in _BINARY and operand:
        if not via:
            return Step(op, operand if _is_name(operand) else _number(operand, token))
        if _is_name(operand):
            return Step(op, operand, tuple(_step(each, text) for each in via))
    known = ", ".join([*_TOKENS, *_UNARY, *(f"{each}:O" for each in _BINARY)])
    raise ValueError(f"steps: {token!r} is none of {known} (in {text!r})")


def text_of(steps: Sequence[Step]) -> str:
    return " ".join(map(str, steps))


def evaluate(
    text: str,
    value: torch.Tensor,
    operands: Sequence[torch.Tensor] = (),
    scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the steps with PyTorch's own operators; operands broadcast against ``value`` as in the graph."""
    return _run(parse(text), value, operands, {SCALE: scale, AMAX: amax})


def _run(steps: Sequence[Step], value: Any, operands: Sequence[torch.Tensor], made: dict[str, Any]) -> Any:
    for step in steps:
        if step.op == "to":
            value = value.to(step.operand)
        elif step.op in _UNARY:
            value = _UNARY[step.op](value)
        else:
            other = step.operand
            if isinstance(other, str):
                other = made[other] if other in made else operands[int(other[1:])]
                other = _run(step.via, other, operands, made)
                other = other.to(value.dtype) if value.dim() == 0 else other  # as beside a value that has dimensions
            value = _BINARY[step.op](value, other)
    return value


def _names(steps: Sequence[Step]) -> Iterator[str]:
    for step in steps:
        if isinstance(step.operand, str):
            yield step.operand
        yield from _names(step.via)


def operand_names(text: str) -> list[str]:
    return sorted(set(_names(parse(text))) - {SCALE, AMAX})


def constants(*texts: str) -> list[float]:
    """Every number of the programs, in order: the run-time constants c0, c1, … of the kernel."""
    return [number for text in texts for step in parse(text) for number in step.numbers]


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
    scale: torch.dtype | None = None,
) -> str:
    """The C++ type of a program whose value starts in ``dtype``.

    ``operands[i]`` is the dtype of operand i on the device, or None for an operand that the host reads and passes as a
    constant: those are numbered after all numbers of the call's programs. Numbers are numbered from ``first_const``. ``scale``
    is the dtype of the scale, where an operand is made of it. With
    ``fp8`` the kernel casts the result to it by the hardware's cast, and the clamps that this makes itself are left out: only
    for a kernel that is `saturated`, which one that casts for two programs is only if both are.
    """
    steps = parse(text) if fp8 is None else _without_full_clamps(text, fp8)
    made = {SCALE: scale, AMAX: dtype}
    return _Cpp(operands, made, first_const, first_const + len(constants(text))).program(steps, dtype)


class _Cpp:
    """Writes C++ types, counting the constants."""

    def __init__(
        self, operands: Sequence[torch.dtype | None], made: dict[str, torch.dtype | None], const: int, host_const: int
    ) -> None:
        self.operands, self.made, self.const, self.host_const = operands, made, const, host_const

    def program(self, steps: Sequence[Step], dtype: torch.dtype) -> str:
        parts: list[str] = []
        wide: list[str] = []
        for step in steps:
            if step.op == "to" and step.operand is torch.float64:
                dtype = step.operand
            elif dtype is torch.float64:
                if step.op == "to":
                    assert isinstance(step.operand, torch.dtype)
                    parts.append(f"{_NS}Wide<{', '.join(wide)}>")
                    dtype, wide = step.operand, []
                else:
                    wide.append(self._wide(step))
            else:
                if step.op == "to":
                    assert isinstance(step.operand, torch.dtype)
                    dtype = step.operand
                parts.append(self._step(step, CPP_TYPES[dtype]))
        return f"{_NS}Steps<{', '.join(parts)}>"

    def _step(self, step: Step, of: str) -> str:
        name = _NS + "".join(map(str.capitalize, step.op.split("_")))
        if step.op == "to" or step.op in _UNARY:
            return f"{name}<{of}>"
        return f"{name}<{of}, {self._operand(step)}>"

    def _operand(self, step: Step) -> str:
        if isinstance(step.operand, float):
            return self._constant()
        name = str(step.operand)
        if name in self.made:
            operand, dtype = f"{_NS}{_CPP_MADE[name]}", self.made[name]
        else:
            kind, index = _CPP_OPERANDS[name[0]], int(name[1:])
            dtype = self.operands[index]
            if dtype is None:
                operand = f"{_NS}Const<{self.host_const + sum(other is None for other in self.operands[:index])}>"
            else:
                operand = f"{_NS}{kind}<{index}, {CPP_TYPES[dtype]}>"
        if not step.via:
            return operand
        assert dtype is not None, f"the dtype of {name} has to be known for {step}"
        return f"{_NS}Through<{operand}, {self.program(step.via, dtype)}>"

    def _constant(self) -> str:
        self.const += 1
        return f"{_NS}Const<{self.const - 1}>"

    def _wide(self, step: Step) -> str:
        """A step in double, its number compiled in: a call's constants are fp32."""
        name = f"{_NS}wide::{step.op.title()}"
        if step.operand is None:
            return name
        self._constant()
        return f"{name}<{struct.unpack('<Q', struct.pack('<d', step.operand))[0]:#x}ull>"


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
    return text in (SCALE, AMAX) or (text[0] in "sr" and text[1:].isdigit())


def _number(text: str, token: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"steps: wanted a number, sN, rN, scale or amax after the colon, found {token!r}") from None


# ---- what the op.py of every kernel that runs programs needs ---------------------------------------------------------


def quantisation_types(dtype: torch.dtype, scale_program: str, program: str, fp8: torch.dtype) -> tuple[str, ...]:
    """The C++ template arguments of a dynamic scale: Fp8, Saturated, ScaleT, ScaleProgram, Program; values are in ``dtype``.

    Both programs may name ``s0``, one fp32 element: `quantized.BOUND`.
    """
    bound = (torch.float32,)
    return (
        CPP_FP8[fp8],
        str(saturated(program, fp8)).lower(),
        CPP_TYPES[result_dtype(scale_program, dtype)],
        to_cpp(scale_program, dtype, bound),
        to_cpp(
            program,
            dtype,
            bound,
            first_const=len(constants(scale_program)),
            fp8=fp8,
            scale=result_dtype(scale_program, dtype),
        ),
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


def check_program(name: str, text: str, operands: int, *, made: Collection[str] = ()) -> None:
    """ValueError unless the program parses and uses only what exists: operands, constants, and of ``scale`` and ``amax`` what
    is in ``made``."""
    for step in _names(parse(text)):
        if step in (SCALE, AMAX) and step not in made:
            known = " and ".join(["numbers", "operands", *made])
            raise ValueError(f"{name}: wanted {known}, found {text!r}, which names a dynamic {step}")
    if operands > MAX_OPERANDS:
        raise ValueError(f"{name}: wanted at most {MAX_OPERANDS} operands, found {operands}")
    for operand in operand_names(text):
        if int(operand[1:]) >= operands:
            raise ValueError(f"{name}: {text!r} names {operand}, but {operands} operands were given")
    if len(constants(text)) > MAX_CONSTS:
        raise ValueError(f"{name}: wanted at most {MAX_CONSTS} numbers, found {len(constants(text))} in {text!r}")
    _check_wide(name, text, parse(text))


def _check_wide(name: str, text: str, steps: Sequence[Step]) -> None:
    """ValueError where something is computed in double that kernels do not compute there, or is left in double."""
    wide = False
    for step in steps:
        _check_wide(name, text, step.via)
        if step.op == "to":
            if wide and step.operand is not torch.float32:
                raise ValueError(f"{name}: wanted f32 behind f64, found {step} in {text!r}")
            wide = step.operand is torch.float64
        elif wide and (step.op not in WIDE_STEPS or isinstance(step.operand, str)):
            raise ValueError(f"{name}: wanted steps by a number behind f64, found {step} in {text!r}")
    if wide:
        raise ValueError(f"{name}: wanted f32 behind f64, found the end of {text!r}")


def check_numbers(name: str, *texts: str) -> None:
    """ValueError where two programs of one kernel have more numbers than it takes."""
    if (found := len(constants(*texts))) > MAX_CONSTS:
        raise ValueError(f"{name}: wanted at most {MAX_CONSTS} numbers in both programs together, found {found}")
