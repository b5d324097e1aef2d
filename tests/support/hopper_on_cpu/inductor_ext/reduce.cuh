// Stand-in for the reductions: bits of non-negative floats, NaN above infinity.
#pragma once

#include "vec.cuh"

namespace inductor_ext {

template <typename T>
struct Amax {
  uint32_t bits = 0;
  template <int N>
  void merge(const Raw<T, N>& x) {
    float v[N];
    x.unpack(v);
    for (float each : v) bits = max(bits, __float_as_uint(each) & 0x7fffffffu);
  }
  uint32_t float_bits() const { return bits; }
};

template <int Lanes>
uint32_t group_max(uint32_t bits) {
  for (int step = Lanes / 2; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, step));
  return bits;
}
template <int Lanes>
float group_sum(float value) {
  for (int step = Lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

}  // namespace inductor_ext
