// Stand-in for two values of 16 bits in a register.
#pragma once

#include "vec.cuh"

namespace inductor_ext::packed {

constexpr uint32_t twice(uint32_t half) { return (half & 0xffffu) | half << 16; }

template <typename F>
uint32_t of_halves(uint32_t a, uint32_t b, F&& each) {
  return each(a & 0xffffu, b & 0xffffu) & 0xffffu | each(a >> 16, b >> 16) << 16;
}
template <typename F>
uint32_t of_floats(uint32_t a, uint32_t b, F&& each) {
  return of_halves(a, b, [&](uint32_t x, uint32_t y) -> uint32_t {
    return from_float<__nv_bfloat16>(each(__uint_as_float(x << 16), __uint_as_float(y << 16))).bits;
  });
}
inline float or_nan(float x, float y, float result) { return x != x || y != y ? NAN : result; }
inline uint32_t maximum(uint32_t a, uint32_t b) { return of_floats(a, b, [](float x, float y) { return std::fmax(x, y); }); }
inline uint32_t maximum_or_nan(uint32_t a, uint32_t b) { return of_floats(a, b, [](float x, float y) { return or_nan(x, y, std::fmax(x, y)); }); }
inline uint32_t minimum_or_nan(uint32_t a, uint32_t b) { return of_floats(a, b, [](float x, float y) { return or_nan(x, y, std::fmin(x, y)); }); }

inline uint32_t larger(uint32_t a, uint32_t b) { return of_halves(a, b, [](uint32_t x, uint32_t y) { return x < y ? y : x; }); }
inline uint32_t sum(uint32_t a, uint32_t b) { return of_halves(a, b, [](uint32_t x, uint32_t y) { return x + y; }); }
inline uint32_t sum_within(uint32_t a, uint32_t b, uint32_t most) {
  return of_halves(sum(a, b), most, [](uint32_t x, uint32_t y) -> uint32_t {
    const int16_t value = static_cast<int16_t>(x), limit = static_cast<int16_t>(y);
    return value < 0 ? 0 : value < limit ? value : limit;
  });
}

}  // namespace inductor_ext::packed
