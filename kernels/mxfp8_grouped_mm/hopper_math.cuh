// The few instructions that mxfp8_grouped_mm's kernel for compute capability 9.0 names itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace inductor_ext {

// Two e4m3 times a factor of two equal bf16. Each step but the last is exact, and the last one is where the product is a bf16.
__device__ __forceinline__ uint32_t scaled_pair(uint16_t pair, uint32_t factor) {
  uint32_t halves, scaled;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  const float2 wide = __half22float2(reinterpret_cast<const __half2&>(halves));
  const __nv_bfloat162 narrow = __floats2bfloat162_rn(wide.x, wide.y);
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(scaled) : "r"(reinterpret_cast<const uint32_t&>(narrow)), "r"(factor));
  return scaled;
}

// The upper of two bf16 as fp32.
__device__ __forceinline__ float upper(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Four bytes, the first `bytes` of them from memory and the others zero.
__device__ __forceinline__ void copy_word(uint32_t shared, const uint8_t* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
}

// Kept in its register: what follows from threadIdx alone would else be computed again for every stage.
__device__ __forceinline__ void keep(int& value) { asm volatile("" : "+r"(value)); }

}  // namespace inductor_ext
