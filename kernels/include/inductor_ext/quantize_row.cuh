// The end of a kernel that holds a row in registers: its maximum, its scale, and the row as FP8.
//
//   scale = scale_program(max |y|);  out = cast(program(y, scale))        NaN propagates
//
// A row is held by `Threads` threads: lanes of a warp (8 or 32) or a whole block; thread t has vectors t, t + Threads, …
#pragma once

#include "fp8.cuh"
#include "reduce.cuh"
#include "steps.cuh"

namespace inductor_ext {

// Threads of a block whose rows have `Threads` each.
template <int Threads>
constexpr int kRowBlock = Threads <= 32 ? 128 : Threads;

// `shared` has one word a warp. Every thread of the block calls this; rows that are not `active` take part in the maximum only.
template <int Threads, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, typename In, int E, int U>
__device__ __forceinline__ void quantize_row(const Raw<In, E> (&y)[U], const Consts& consts, uint32_t* shared, bool active, int64_t cols,
                                             ScaleT* scale_of_row, uint8_t* out) {
  Amax<In> amax;
#pragma unroll
  for (int u = 0; u < U; ++u) amax.merge(y[u]);
  uint32_t bits = amax.float_bits();
  if constexpr (Threads <= 32) {
    bits = group_max<Threads>(bits);
  } else {
    bits = block_max<Threads>(bits, shared);
  }
  if (!active) return;

  const int lane = threadIdx.x % Threads;
  Env env{consts, nullptr};
  float scale[1] = {__uint_as_float(bits)};
  ScaleProgram::apply(ScaleProgram::prepare(env), scale);
  if (lane == 0) *scale_of_row = from_float<ScaleT>(scale[0]);
  env.scale = scale[0];
  const auto prepared = Chain::prepare(env);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int i = u * Threads + lane;
    if (i < cols) downcast_vector<In, Fp8, Saturated, Chain>(y[u], prepared, out + i * E);
  }
}

// Calls launch<Threads, E, U>() for the fewest threads that hold a row of `cols` columns, at most 32 768.
template <typename F>
void with_row_shape(int64_t cols, bool vectors, F&& launch) {
  if (vectors) {
    if (cols <= 128) return launch.template operator()<8, 8, 2>();
    if (cols <= 512) return launch.template operator()<32, 8, 2>();
    if (cols <= 1024) return launch.template operator()<32, 8, 4>();
    if (cols <= 4096) return launch.template operator()<256, 8, 2>();
    if (cols <= 8192) return launch.template operator()<512, 8, 2>();
    if (cols <= 16384) return launch.template operator()<1024, 8, 2>();
    return launch.template operator()<1024, 8, 4>();
  }
  if (cols <= 256) return launch.template operator()<32, 1, 8>();
  if (cols <= 4096) return launch.template operator()<256, 1, 16>();
  if (cols <= 16384) return launch.template operator()<1024, 1, 16>();
  return launch.template operator()<1024, 1, 32>();
}

}  // namespace inductor_ext
