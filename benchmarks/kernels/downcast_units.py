"""The kernel instances that ``downcast.py`` checks and times, and thin callers for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.local_build import Unit
from inductor_ext.kernels import steps

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
IN_DTYPES = (BF16, F16, F32)
SHORT = {BF16: "bf16", F16: "f16", F32: "f32", E4: "e4m3", E5: "e5m2"}


def clamp(fp8: torch.dtype) -> str:
    limit = steps.FP8_MAX[fp8]
    return f"max:{-limit} min:{limit}"


def chains(fp8: torch.dtype) -> dict[str, str]:
    """Static chains: name -> program text."""
    return {
        "f32_div": f"f32 div:s0 {clamp(fp8)}",
        "mul": f"mul:s0 {clamp(fp8)}",  # in x's dtype
        "f32_mul_const": f"f32 mul:0.37 {clamp(fp8)}",
        "div_const": f"div:448.0 {clamp(fp8)}",  # in x's dtype
        "div": f"div:s0 {clamp(fp8)}",
        "no_clamp": "mul:3.0",
        "odd_bounds": "f32 mul:s0 min:33.3 max:-7.7",
        "row_div": f"f32 div:r0 {clamp(fp8)}",
        "div_then_mul": f"f32 div:s0 mul:1e20 {clamp(fp8)}",  # every bit of the quotient counts
        "div_in_bf16": f"f32 div:s0 bf16 {clamp(fp8)}",
    }


SCALE_DTYPE = F32


def static_unit(x: torch.dtype, fp8: torch.dtype, names: tuple[str, ...] = ()) -> Unit:
    exports = []
    for name, text in chains(fp8).items():
        if names and name not in names:
            continue
        saturated = str(steps.saturated(text, fp8)).lower()
        program = steps.to_cpp(text, x, [SCALE_DTYPE])
        exports.append(
            (name, f"inductor_ext::Fp8Downcast<{steps.CPP_TYPES[x]}, {steps.CPP_FP8[fp8]}, {saturated}, {program}>::run")
        )
    name = f"downcast_{SHORT[x]}_{SHORT[fp8]}"
    return Unit(name, "fp8_downcast/fp8_downcast.cuh", tuple(exports))


def static(module: Any, name: str, fp8: torch.dtype, x: torch.Tensor, out: torch.Tensor, scale: Any = None) -> None:
    getattr(module, name)(x, out, scale, None, None, None, *steps.padded_constants(chains(fp8)[name]))


def recipes(fp8: torch.dtype) -> dict[str, tuple[str, str]]:
    """Dynamic scales: name -> (scale program, program)."""
    limit = steps.FP8_MAX[fp8]
    return {
        "torchao": (f"div:{limit} f32", f"f32 div:scale {clamp(fp8)}"),
        "recip": (f"f32 max:1e-12 recip mul:{limit}", f"f32 mul:scale {clamp(fp8)}"),
    }


def quantize_unit(x: torch.dtype, fp8: torch.dtype, name: str) -> Unit:
    scale_text, text = recipes(fp8)[name]
    types = ", ".join((
        steps.CPP_TYPES[x], steps.CPP_FP8[fp8], str(steps.saturated(text, fp8)).lower(),
        steps.CPP_TYPES[steps.result_dtype(scale_text, x)], steps.to_cpp(scale_text, x),
        steps.to_cpp(text, x, first_const=len(steps.constants(scale_text))),
    ))  # fmt: skip
    exports = tuple((kind.lower(), f"inductor_ext::Fp8Quantize{kind}<{types}>::run") for kind in ("Row", "Tensor"))
    return Unit(f"quantize_{name}_{SHORT[x]}_{SHORT[fp8]}", "fp8_quantize/fp8_quantize.cuh", exports)


def quantize(module: Any, kind: str, name: str, fp8: torch.dtype, x: Any, out: Any, scale: Any, *workspace: Any) -> None:
    getattr(module, kind)(x, out, scale, *workspace, None, *steps.padded_constants(*recipes(fp8)[name]))


def store_unit(x: torch.dtype, fp8: torch.dtype, loc: torch.dtype, chain: str = "f32_div") -> Unit:
    text = chains(fp8)[chain]
    program = steps.to_cpp(text, x, [F32])
    integer = "int32_t" if loc == torch.int32 else "int64_t"
    saturated = str(steps.saturated(text, fp8)).lower()
    types = f"{steps.CPP_TYPES[x]}, {steps.CPP_FP8[fp8]}, {saturated}, {program}, {program}, {integer}"
    exports = tuple((entry, f"inductor_ext::DowncastFp8<{types}>::{entry}") for entry in ("run", "run_one"))
    return Unit(f"store_{SHORT[x]}_{SHORT[fp8]}_{integer[:5]}", "downcast_fp8/downcast_fp8.cuh", exports)


def store(
    module: Any, fp8: torch.dtype, k: Any, v: Any, k_cache: Any, v_cache: Any, k_scale: Any, v_scale: Any, loc: Any,
    mult: int = 1, offset: int = 0, wrap: bool = False, check: bool = False, chain: str = "f32_div",
) -> None:  # fmt: skip
    constants = steps.padded_constants(chains(fp8)[chain])
    if v is None:
        module.run_one(k, k_cache, k_scale, loc, mult, offset, wrap, check, *constants)
    else:
        module.run(k, v, k_cache, v_cache, k_scale, v_scale, loc, mult, offset, wrap, check, *constants)


#: Whether a division that is only followed by clamps and the cast to FP8 may be NearDivisor's.
DIVISION = Unit(
    "division",
    "inductor_ext/divide.cuh",
    tuple((name, name) for name in ("near_midpoints", "all_bf16", "all_f16", "random_bits")),
    text=Path(__file__).with_name("divisions.cu").read_text(),
)
