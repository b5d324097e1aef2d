// Rotate-half RoPE of the vectors of a head's two halves: what qk_norm_rope and scaled_mm_rope share.
//
//   low half:  y * cos + (-other) * sin = y * cos + other * (-sin)        high half:  y * cos + other * sin
#pragma once

#include <type_traits>

#include "inductor_ext/vec.cuh"

namespace inductor_ext {

// (-y) * sin = y * (-sin), whatever the rounding: it is the table of the low half that is negated.
template <typename T, int N>
__device__ __forceinline__ void negate(Raw<T, N>& raw) {
#pragma unroll
  for (int i = 0; i < Raw<T, N>::kWords; ++i) raw.words[i] ^= sizeof(T) == 4 ? 0x80000000u : 0x80008000u;
}

// y * cos + other * sin, each product and the sum rounded to the wider dtype of In and Table, then to Out. Of one dtype, two
// elements at a time: three instructions a pair where fp32 takes eleven.
template <typename Out, typename In, typename Table, int N>
__device__ __forceinline__ Raw<Out, N> rotated(const Raw<In, N>& y, const Raw<In, N>& other, const Raw<Table, N>& cos,
                                               const Raw<Table, N>& sin) {
  if constexpr (std::is_same_v<In, Table> && std::is_same_v<In, Out>) {
    Raw<Out, N> one = y, two = other;
    one.multiply(cos), two.multiply(sin);
    one.add(two);
    return one;
  } else {
    float a[N], b[N];
    if constexpr (std::is_same_v<In, Table>) {
      Raw<In, N> one = y, two = other;
      one.multiply(cos), two.multiply(sin);
      one.unpack(a), two.unpack(b);
    } else {
      static_assert(std::is_same_v<Table, float>, "tables are of x's dtype, or make everything fp32");
      float c[N], s[N];
      y.unpack(a), other.unpack(b), cos.unpack(c), sin.unpack(s);
#pragma unroll
      for (int e = 0; e < N; ++e) a[e] = __fmul_rn(a[e], c[e]), b[e] = __fmul_rn(b[e], s[e]);
    }
#pragma unroll
    for (int e = 0; e < N; ++e) a[e] = __fadd_rn(a[e], b[e]);
    Raw<Out, N> sum;
    sum.pack(a);
    return sum;
  }
}

}  // namespace inductor_ext
