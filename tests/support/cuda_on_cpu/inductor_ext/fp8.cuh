// Stand-in for the conversion to FP8: nearest even, saturating, NaN stays NaN; by looking for it among the 127 magnitudes.
#pragma once

#include "vec.cuh"

namespace inductor_ext {

inline double e4m3_value(int code) { return code < 8 ? code * 0x1p-9 : std::ldexp(1.0 + code % 8 / 8.0, code / 8 - 7); }

inline uint8_t e4m3(float v) {
  const uint8_t sign = std::signbit(v) ? 0x80 : 0;
  if (std::isnan(v)) return 0x7f;
  const double size = std::fabs(static_cast<double>(v));
  int code = 0;
  while (code < 126) {
    const double middle = (e4m3_value(code) + e4m3_value(code + 1)) / 2;
    if (size < middle || (size == middle && code % 2 == 0)) break;
    ++code;
  }
  return sign | code;
}

template <typename Fp8, bool Saturated, int N>
Bytes<N> cast_fp8(const float (&v)[N]) {
  static_assert(Saturated && std::is_same_v<Fp8, __nv_fp8_e4m3>, "what the tests need");
  Bytes<N> result;
  for (int i = 0; i < N; ++i) result.bytes[i] = e4m3(v[i]);
  return result;
}

template <typename In, typename Fp8, bool Saturated, typename Chain, int N>
void downcast_vector(const Raw<In, N>& raw, const typename Chain::Prepared& prepared, uint8_t* out) {
  float v[N];
  raw.unpack(v);
  Chain::apply(prepared, v);
  cast_fp8<Fp8, Saturated>(v).store(out);
}

}  // namespace inductor_ext
