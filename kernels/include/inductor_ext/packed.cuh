// Two values of 16 bits in a register, an instruction for both.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace inductor_ext::packed {

__device__ constexpr uint32_t twice(uint32_t half) { return half & 0xffffu | half << 16; }

// bf16. A NaN beside a number: the number, and where the name says so a NaN.
__device__ __forceinline__ uint32_t maximum(uint32_t a, uint32_t b) {
  asm("max.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
__device__ __forceinline__ uint32_t maximum_or_nan(uint32_t a, uint32_t b) {
  asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
__device__ __forceinline__ uint32_t minimum_or_nan(uint32_t a, uint32_t b) {
  asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

// Integers of 16 bits, a step of Hopper's VIADDMNMX each: max(a, b) of unsigned ones; a + b; a + b within [0, most].
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
__device__ __forceinline__ uint32_t sum(uint32_t a, uint32_t b) { return __viaddmax_s16x2(a, b, 0x80008000u); }
__device__ __forceinline__ uint32_t sum_within(uint32_t a, uint32_t b, uint32_t most) { return __viaddmin_s16x2_relu(a, b, most); }

}  // namespace inductor_ext::packed
