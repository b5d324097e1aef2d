// The end of a kernel that holds a row in registers: the row as MXFP8, e4m3 data and an e8m0 scale for each 32 elements (mx.cuh).
//
// Thread `lane` of the row's `threads` has vectors lane, lane + threads, … of E elements; `threads` is a multiple of 32 / E. So a
// block is in 32 / E neighbouring lanes, and a warp's scales of one vector each are side by side.
#pragma once

#include "inductor_ext/fp8.cuh"
#include "inductor_ext/mx.cuh"
#include "inductor_ext/reduce.cuh"

namespace inductor_ext {

// In the place of a scale program (steps.cuh): the scales are those of blocks, and `Rounding` is mx::Rceil or mx::Floor.
template <typename Rounding>
struct MxScale {
  static constexpr bool kRow = false;
};
template <typename ScaleProgram>
constexpr bool kIsMx = false;
template <typename Rounding>
constexpr bool kIsMx<MxScale<Rounding>> = true;

// How many scales a row of `cols` elements has.
template <typename ScaleProgram>
constexpr __host__ __device__ __forceinline__ int64_t scales_of_row(int64_t cols) {
  return kIsMx<ScaleProgram> ? cols / mx::kBlock : 1;
}

// Every thread of a warp calls this, those that are not `active`, and have zeros, too. `cols` in vectors.
template <typename Rounding, typename In, int E, int U>
__device__ __forceinline__ void quantize_blocks(const Raw<In, E> (&y)[U], bool active, int lane, int threads, int64_t cols, MxScale<Rounding>,
                                                uint8_t* scales, uint8_t* out) {
  constexpr int kLanes = mx::kBlock / E;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    Amax<In> amax;
    amax.merge(y[u]);
    const uint32_t byte = Rounding::byte(group_max<kLanes>(amax.float_bits()));
    const float factor = mx::as_float(Rounding::factor(byte));
    float v[E];
    y[u].unpack(v);
#pragma unroll
    for (int e = 0; e < E; ++e) v[e] = __fmul_rn(v[e], factor);
    const int i = u * threads + lane;
    if (active && i < cols) {
      cast_fp8<__nv_fp8_e4m3, true>(v).store(out + i * E);
      if (i % kLanes == 0) scales[i / kLanes] = static_cast<uint8_t>(byte);
    }
  }
}

}  // namespace inductor_ext
