// Stand-in: FP8 to bf16 from the formats' definitions, copies that come later.
#pragma once

#include "hopper_on_cpu.h"

namespace inductor_ext {

// To nearest even. A subnormal bf16 is a multiple of 2^-133.
inline uint32_t to_bf16(double v) {
  if (std::isnan(v)) return 0x7fff;
  const uint32_t sign = std::signbit(v) ? 0x8000 : 0;
  v = std::fabs(v);
  if (std::isinf(v)) return sign | 0x7f80;
  int exponent = v == 0 ? -126 : std::max(std::ilogb(v), -126);
  double mantissa = std::nearbyint(std::ldexp(v, 7 - exponent));  // 128 to 256, or less where it is subnormal
  if (mantissa == 256) mantissa = 128, ++exponent;
  if (exponent > 127) return sign | 0x7f80;
  const uint32_t bits = static_cast<uint32_t>(mantissa);
  return sign | (bits < 128 ? bits : static_cast<uint32_t>(exponent + 127) << 7 | (bits & 127));
}
inline double e4m3_value(uint8_t byte) {
  const int code = byte & 0x7f;
  const double size = code == 0x7f ? std::nan("") : code < 8 ? code * 0x1p-9 : std::ldexp(1.0 + code % 8 / 8.0, code / 8 - 7);
  return byte & 0x80 ? -size : size;
}

inline uint32_t scaled_pair(uint16_t pair, uint32_t factor) {
  const double low = hopper_on_cpu::of_bf16(factor & 0xffff), high = hopper_on_cpu::of_bf16(factor >> 16);
  return to_bf16(e4m3_value(pair & 0xff) * low) | to_bf16(e4m3_value(pair >> 8) * high) << 16;
}

inline float upper(uint32_t pair) { return hopper_on_cpu::of_bf16(pair >> 16); }

inline void copy_word(uint32_t to, const uint8_t* from, int bytes) {
  if (bytes < 0 || bytes > 4) hopper_on_cpu::fail("cp.async: bytes outside of 0 to 4");
  if (bytes > 0) hopper_on_cpu::check_access(from, bytes, 1);
  if (reinterpret_cast<uintptr_t>(from) % 4 != 0 || to % 4 != 0) hopper_on_cpu::fail("cp.async: misaligned");
  const unsigned thread = threadIdx.x;
  ++hopper_on_cpu::cta->unfinished[thread];
  hopper_on_cpu::later([=] {
    std::memset(shared + to, 0, 4);
    std::memcpy(shared + to, from, bytes);
    --hopper_on_cpu::cta->unfinished[thread];
  });
}

inline void keep(int&) {}

}  // namespace inductor_ext
