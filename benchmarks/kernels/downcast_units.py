"""The kernel instances that ``downcast.py`` checks and times, and thin callers for them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from local_build import KERNELS, Unit

_spec = importlib.util.spec_from_file_location("steps", KERNELS / "steps.py")
steps = importlib.util.module_from_spec(_spec)  # type: ignore[arg-type]
import sys  # noqa: E402

sys.modules["steps"] = steps
_spec.loader.exec_module(steps)  # type: ignore[union-attr]

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
    }


SCALE_DTYPE = F32


def static_unit(x: torch.dtype, fp8: torch.dtype, names: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> Unit:
    exports = []
    for name, text in chains(fp8).items():
        if names and name not in names:
            continue
        saturated = str(steps.saturated(text, fp8)).lower()
        program = steps.to_cpp(text, x, [SCALE_DTYPE])
        exports.append((name, f"inductor_ext::Fp8Downcast<{steps.CPP_TYPES[x]}, {steps.CPP_FP8[fp8]}, {saturated}, {program}>::run"))
    name = f"downcast_{SHORT[x]}_{SHORT[fp8]}" + ("_plain" if flags else "")
    return Unit(name, "fp8_downcast/fp8_downcast.cuh", tuple(exports), flags)


def static(module: Any, name: str, fp8: torch.dtype, x: torch.Tensor, out: torch.Tensor, scale: Any = None) -> None:
    getattr(module, name)(x, out, scale, None, None, None, *steps.padded_constants(chains(fp8)[name]))


def recipes(fp8: torch.dtype) -> dict[str, tuple[str, str]]:
    """Dynamic scales: name -> (scale program, program)."""
    limit = steps.FP8_MAX[fp8]
    return {
        "torchao": (f"div:{limit} f32", f"f32 div:scale {clamp(fp8)}"),
        "recip": (f"f32 max:1e-12 recip mul:{limit}", f"f32 mul:scale {clamp(fp8)}"),
    }


def quantize_unit(x: torch.dtype, fp8: torch.dtype, name: str, flags: tuple[str, ...] = ()) -> Unit:
    scale_text, text = recipes(fp8)[name]
    types = ", ".join((
        steps.CPP_TYPES[x], steps.CPP_FP8[fp8], str(steps.saturated(text, fp8)).lower(),
        steps.CPP_TYPES[steps.result_dtype(scale_text, x)], steps.to_cpp(scale_text, x),
        steps.to_cpp(text, x, first_const=len(steps.constants(scale_text))),
    ))  # fmt: skip
    exports = tuple((kind.lower(), f"inductor_ext::Fp8Quantize{kind}<{types}>::run") for kind in ("Row", "Tensor"))
    plain = "_plain" if flags else ""
    return Unit(f"quantize_{name}_{SHORT[x]}_{SHORT[fp8]}{plain}", "fp8_quantize/fp8_quantize.cuh", exports, flags)


def quantize(module: Any, kind: str, name: str, fp8: torch.dtype, x: Any, out: Any, scale: Any, *workspace: Any) -> None:
    getattr(module, kind)(x, out, scale, *workspace, *steps.padded_constants(*recipes(fp8)[name]))


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


DIVISION = Unit(
    "division",
    "inductor_ext/divide.cuh",
    (("compare", "compare"),),
    text=r"""
#include <tvm/ffi/function.h>
#include "inductor_ext/launch.cuh"
#include "inductor_ext/tensor.h"
// Counts v / d whose bits differ between Divisor::divide and __fdiv_rn. mode 0: any bits; 1: bf16 values over ordinary divisors;
// 2: both ordinary and the quotient next to a midpoint of two floats, where rounding is decided by the last bit.
__device__ uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
__device__ float ordinary(uint32_t bits, int range) {
  return __uint_as_float((bits & 0x807fffffu) | (127 - range + (bits >> 23) % (2 * range)) << 23);
}
__global__ void compare_kernel(int mode, uint64_t seed, unsigned long long* wrong, float* first) {
  const uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const uint64_t h = mix(seed + i);
  float d = mode == 0 ? __uint_as_float(static_cast<uint32_t>(h)) : ordinary(static_cast<uint32_t>(h), 64);
  inductor_ext::Divisor divisor = inductor_ext::Divisor::of(d);
  for (int round = 0; round < 8; ++round) {
    float v[8], expected[8];
    for (int j = 0; j < 8; ++j) {
      const uint64_t r = mix(h + round * 8 + j + 1);
      if (mode == 0) v[j] = __uint_as_float(static_cast<uint32_t>(r >> (j % 2)));
      if (mode == 1) v[j] = __uint_as_float(static_cast<uint32_t>(r) << 16);
      if (mode == 2) {
        float q = ordinary(static_cast<uint32_t>(r), 20);
        double mid = static_cast<double>(q) * (1.0 + 0x1p-24);
        v[j] = static_cast<float>(mid * d);
      }
      if (round == 7 && j % 3 == 0) v[j] = copysignf(0.0f, v[j]);
      expected[j] = __fdiv_rn(v[j], d);
    }
    float q[8];
    for (int j = 0; j < 8; ++j) q[j] = v[j];
    divisor.divide(q);
    for (int j = 0; j < 8; ++j) {
      const bool same = __float_as_uint(q[j]) == __float_as_uint(expected[j]) || (isnan(q[j]) && isnan(expected[j]));
      if (!same && atomicAdd(wrong, 1ull) == 0) first[0] = v[j], first[1] = d, first[2] = q[j], first[3] = expected[j];
    }
  }
}
static void compare(int64_t mode, int64_t seed, int64_t blocks, tvm::ffi::TensorView wrong, tvm::ffi::TensorView first) {
  inductor_ext::Launch(static_cast<unsigned>(blocks), 256)
      .stream(inductor_ext::env_stream(wrong.device().device_id))
      .run(compare_kernel, static_cast<int>(mode), static_cast<uint64_t>(seed),
           inductor_ext::data<unsigned long long>(wrong), inductor_ext::data<float>(first));
}
""",
)
