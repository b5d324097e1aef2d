// The two products of attention on compute capability 9.0, by a warpgroup: 64 queries' scores with a block of keys, and their
// weights times that block's values. bf16 or fp16, fp32 sums.
//
// Keys, values and queries lie in shared memory as the copy engine brings them: boxes of 64 elements, 128 bytes, of each row, one row
// after the other with 128-byte swizzle. Scores read the keys along their elements; sums of values read the values across: wgmma
// takes a 16-bit B whose rows are K as it is.
#pragma once

#include "inductor_ext/hopper.cuh"

namespace inductor_ext {

constexpr int kAttentionKeys = 128;                       // of a block
constexpr int kAttentionBox = kAttentionKeys * 128;       // bytes: 64 elements of each of 128 rows
constexpr int kAttentionSteps = kAttentionKeys / 16;      // wgmmas that a block's values take

// Rows of shared memory as B's K: `operand`, but that the next 64 columns are in the next box. Its leading offset is 1, and unused.
__device__ __forceinline__ uint64_t operand_across(const void* shared) {
  return operand(shared) + (uint64_t{(kAttentionBox >> 4) - 1} << 16);
}

// S[64, Keys] = Q[64, D] · K[Keys, D]ᵀ, in the first Keys / 2 of `s`, laid out as in `Wgmma`.
template <typename Elem, int D, int Keys>
struct Scores {
  using Type = typename CutlassType<Elem>::type;
  using Atom = decltype(cute::SM90::GMMA::ss_op_selector<Type, Type, float, cute::Shape<cute::Int<64>, cute::Int<Keys>, cute::Int<16>>>());

  static __device__ __forceinline__ void issue(const uint8_t* q, const uint8_t* k, float (&s)[kAttentionKeys / 2]) {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const int at = step / 4 * kAttentionBox + step % 4 * 32;
      const auto scale = step == 0 ? cute::SM90::GMMA::ScaleOut::Zero : cute::SM90::GMMA::ScaleOut::One;
      call(operand(q + at), operand(k + at), s, scale, std::make_index_sequence<Keys / 2>());
    }
  }

 private:
  template <size_t... I>
  static __device__ __forceinline__ void call(uint64_t q, uint64_t k, float (&s)[kAttentionKeys / 2], cute::SM90::GMMA::ScaleOut scale,
                                              std::index_sequence<I...>) {
    Atom::fma(q, k, s[I]..., scale);
  }
};

// The weights of 64 queries for a block of keys, as wgmma takes them from registers.
using Weights = uint32_t[kAttentionSteps][4];

// O[64, D] += P[64, 128] · V[128, D].
template <typename Elem, int D>
struct WeightedSum {
  using Type = typename CutlassType<Elem>::type;
  using Atom = decltype(cute::SM90::GMMA::rs_op_selector<Type, Type, float, cute::Shape<cute::Int<64>, cute::Int<D>, cute::Int<16>>,
                                                         cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN>());

  static __device__ __forceinline__ void issue(const Weights& p, const uint8_t* v, float (&o)[D / 2]) {
    const uint64_t values = operand_across(v);
#pragma unroll
    for (int step = 0; step < kAttentionSteps; ++step) call(p[step], values + step * (16 * 128 >> 4), o, std::make_index_sequence<D / 2>());
  }

 private:
  template <size_t... I>
  static __device__ __forceinline__ void call(const uint32_t (&p)[4], uint64_t v, float (&o)[D / 2], std::index_sequence<I...>) {
    Atom::fma(p[0], p[1], p[2], p[3], v, o[I]..., cute::SM90::GMMA::ScaleOut::One);
  }
};

}  // namespace inductor_ext
