// Division by a number that is known when a kernel is launched: a product and a shift, prepared on the host.
#pragma once

#include <cstdint>

namespace inductor_ext {

// i / divisor and what is left of i, for i and divisor below 2^31.
struct Divisor {
  uint32_t divisor, multiplier, shift;

  static Divisor of(int64_t divisor) {
    uint32_t shift = 0;
    while (int64_t{1} << shift < divisor) ++shift;
    const uint64_t multiplier = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1;
    return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(multiplier), shift};
  }
  __device__ __forceinline__ uint32_t divide(uint32_t i, uint32_t* left) const {
    const uint32_t quotient = (__umulhi(i, multiplier) + i) >> shift;
    *left = i - quotient * divisor;
    return quotient;
  }
};

}  // namespace inductor_ext
