// RoPE of vectors of a head: what qk_norm_rope and scaled_mm_rope share.
//
//   by halves  low:   y * cos + (-other) * sin = y * cos + other * (-sin)        high:  y * cos + other * sin
//   by pairs   even columns as low, odd ones as high: other is the neighbour
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

// Which columns of a head are turned with which, and where their cos and sin are. By halves of whole heads, with a number in the
// tables for each column, unless something else is said:
//   Pairs       columns 2i and 2i + 1 instead of i and i + half
//   HalfTables  tables of one number for both columns
//   Partial     there are columns behind the two halves, which are not turned
//   Joined      cos and sin are one table, a number of each in turn; of pairs, and of one number for both columns
template <bool Pairs, bool HalfTables, bool Partial, bool Joined = false>
struct Turn {
  static_assert(!Joined || (Pairs && HalfTables), "joined tables have one cos and sin a pair");
  static constexpr bool kPairs = Pairs, kHalfTables = HalfTables, kPartial = Partial, kJoined = Joined;
  static constexpr bool kPlain = !Pairs && !HalfTables && !Partial;
};
using Halves = Turn<false, false, false>;

// Every element two times.
template <typename T, int N>
__device__ __forceinline__ void twice(const Raw<T, N>& each, Raw<T, 2 * N>& out) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (sizeof(T) == 4) {
      out.words[2 * i] = out.words[2 * i + 1] = each.words[i];
    } else {
      const uint32_t one = i % 2 ? each.words[i / 2] >> 16 : each.words[i / 2] & 0xffffu;
      out.words[i] = one | one << 16;
    }
  }
}

// The table's numbers for columns i to i + N of both halves.
template <typename Turn, typename T, int N>
__device__ __forceinline__ void load_table(Raw<T, N>& low, Raw<T, N>& high, const T* table, int i, int half) {
  if constexpr (!Turn::kHalfTables) {
    load_half(low, table + i), load_half(high, table + half + i);
  } else if constexpr (!Turn::kPairs) {
    load_half(low, table + i);
    high = low;
  } else if constexpr (N == 1) {
    load_half(low, table + i / 2), load_half(high, table + (half + i) / 2);
  } else {
    Raw<T, N / 2> each;
    load_half(each, table + i / 2), twice(each, low);
    load_half(each, table + (half + i) / 2), twice(each, high);
  }
}

// cos and sin of columns i to i + N from a joined table, whose place for column i is i: what a pair has two of, it has one each of.
template <typename T, int N>
__device__ __forceinline__ void load_joined(Raw<T, N>& cos, Raw<T, N>& sin, const T* table, int i) {
  if constexpr (N == 1) {
    load_half(cos, table + (i & ~1)), load_half(sin, table + (i | 1));
  } else {
    Raw<T, N> both;
    load_half(both, table + i);
#pragma unroll
    for (int w = 0; w < Raw<T, N>::kWords; ++w) {
      if constexpr (sizeof(T) == 4) {
        cos.words[w] = both.words[w & ~1], sin.words[w] = both.words[w | 1];
      } else {
        const uint32_t one = both.words[w] & 0xffffu, two = both.words[w] >> 16;
        cos.words[w] = one | one << 16, sin.words[w] = two | two << 16;
      }
    }
  }
}

// cos and sin for columns i to i + N of both halves.
template <typename Turn, typename T, int N>
__device__ __forceinline__ void load_tables(Raw<T, N>& cos_low, Raw<T, N>& cos_high, Raw<T, N>& sin_low, Raw<T, N>& sin_high, const T* cos,
                                            const T* sin, int i, int half) {
  if constexpr (Turn::kJoined) {
    load_joined(cos_low, sin_low, cos, i), load_joined(cos_high, sin_high, cos, half + i);
  } else {
    load_table<Turn>(cos_low, cos_high, cos, i, half), load_table<Turn>(sin_low, sin_high, sin, i, half);
  }
}

// Negates what an even column, or one of the low half, is multiplied by; `i` is the first column of the vectors.
template <typename Turn, typename T, int N>
__device__ __forceinline__ void negate_sin(Raw<T, N>& low, Raw<T, N>& high, int i) {
  if constexpr (!Turn::kPairs) {
    negate(low);
  } else if constexpr (N == 1) {
    if (i % 2 == 0) negate(low), negate(high);
  } else {
#pragma unroll
    for (int w = 0; w < Raw<T, N>::kWords; ++w) {
      const uint32_t even = sizeof(T) == 2 ? 0x00008000u : w % 2 == 0 ? 0x80000000u : 0u;
      low.words[w] ^= even, high.words[w] ^= even;
    }
  }
}

// The neighbours of a vector's elements: column i ^ 1 where y has column i. Of single elements it is the next lane's, and all
// lanes of a warp have to ask.
template <typename T, int N>
__device__ __forceinline__ Raw<T, N> neighbours(const Raw<T, N>& y) {
  Raw<T, N> other;
  if constexpr (N == 1) {
    other.words[0] = __shfl_xor_sync(0xffffffffu, y.words[0], 1);
  } else {
#pragma unroll
    for (int w = 0; w < Raw<T, N>::kWords; ++w) {
      other.words[w] = sizeof(T) == 4 ? y.words[w ^ 1] : y.words[w] >> 16 | y.words[w] << 16;
    }
  }
  return other;
}

}  // namespace inductor_ext
