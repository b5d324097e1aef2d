// The second launch of a tensor's FP8 quantisation: the scale from the maxima that the blocks of a first launch have left, and the
// cast.
//
//   scale = scale_program(max of partial[0 … partials - 1]);  out = cast(program(x, scale))
#pragma once

#include <algorithm>

#include "inductor_ext/fp8.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/reduce.cuh"
#include "inductor_ext/steps.cuh"
#include "inductor_ext/tensor.h"

namespace inductor_ext {

template <typename ScaleProgram>
__device__ __forceinline__ float scale_of(const Consts& consts, uint32_t amax_bits) {
  Env env{consts, &consts.bound};
  float value[1] = {__uint_as_float(amax_bits)};
  ScaleProgram::apply(ScaleProgram::prepare(env), value);
  return value[0];
}

template <typename Chain>
__device__ __forceinline__ typename Chain::Prepared prepare_scaled(const Consts& consts, float scale, uint32_t amax_bits) {
  Env env{consts, &consts.bound};
  env.scale = scale, env.amax = __uint_as_float(amax_bits);
  return Chain::prepare(env);
}

// The one element that the programs of a dynamic scale name as s0, such as a bound of the scale, where they do.
template <typename... Programs>
const void* take_bound(const Optional<TensorView>& bound, Device& device) {
  bool named = false;
  (VisitOperands<Programs>::with([&](int, bool, auto) { named = true; }), ...);
  if (named != bound.has_value()) {
    TVM_FFI_THROW(ValueError) << "bound: wanted " << (named ? "a tensor, which the programs name" : "none, since no program names it")
                              << ", found " << (named ? "none" : "a tensor");
  }
  if (!named) return nullptr;
  const TensorView given = *bound;
  TensorMatcher().dtype<float>().device(device).verify(given, "bound");
  if (given.numel() != 1) TVM_FFI_THROW(ValueError) << "bound: wanted one element, found shape " << shape_of(given);
  return data(given);
}

struct Fp8QuantizeTensorParams {
  const void* x;
  uint8_t* out;
  void* scale;
  float* partial;  // one maximum a block of the first launch
  int64_t count;   // vectors
  int64_t tail;    // elements behind the last vector
  int partials;
  Consts consts;
};

constexpr int kTensorThreads = 512;
constexpr int kTensorMaxPartials = 1024;  // the workspace's least size
constexpr int kTensorUnroll = 4;

// Tiles are taken from the end backwards: what the first launch read or wrote last is still in L2. Where x was there before the
// first launch (Before), the loads of the first tile start before that has ended.
template <typename In, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int E, bool Before>
__global__ void __launch_bounds__(kTensorThreads) fp8_quantize_tensor_kernel(const __grid_constant__ Fp8QuantizeTensorParams p) {
  constexpr int kTile = kTensorThreads * kTensorUnroll;
  __shared__ uint32_t shared[kTensorThreads / 32];
  const In* x = static_cast<const In*>(p.x);
  const int64_t tiles = (p.count + kTile - 1) / kTile;
  int64_t tile = tiles - 1 - blockIdx.x;

  Raw<In, E> raw[kTensorUnroll];
  auto load = [&] {
#pragma unroll
    for (int u = 0; u < kTensorUnroll; ++u) {
      const int64_t i = tile * kTile + u * kTensorThreads + threadIdx.x;
      if (i < p.count) raw[u].load(x + i * E);
    }
  };
  if (Before && tile >= 0) load();
  wait_for_previous_kernel();
  if (!Before && tile >= 0) load();
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kTensorMaxPartials; i += kTensorThreads) {
    const int j = i + threadIdx.x;
    if (j < p.partials) bits = max(bits, __float_as_uint(__ldcg(p.partial + j)));
  }
  bits = block_max<kTensorThreads>(bits, shared);
  const float scale = scale_of<ScaleProgram>(p.consts, bits);
  if (blockIdx.x == 0 && threadIdx.x == 0) *static_cast<ScaleT*>(p.scale) = from_float<ScaleT>(scale);
  const auto prepared = prepare_scaled<Chain>(p.consts, scale, bits);
  allow_next_kernel();

  while (tile >= 0) {
#pragma unroll
    for (int u = 0; u < kTensorUnroll; ++u) {
      const int64_t i = tile * kTile + u * kTensorThreads + threadIdx.x;
      if (i < p.count) downcast_vector<In, Fp8, Saturated, Chain>(raw[u], prepared, p.out + i * E);
    }
    tile -= gridDim.x;
    if (tile >= 0) load();
  }
  if (blockIdx.x == 0 && threadIdx.x < p.tail) {
    const int64_t i = p.count * E + threadIdx.x;
    Raw<In, 1> one;
    one.load(x + i);
    downcast_vector<In, Fp8, Saturated, Chain>(one, prepared, p.out + i);
  }
}

// `p` with count, tail and partials set; E elements a vector.
template <typename In, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int E, bool Before>
void cast_tensor(const Fp8QuantizeTensorParams& p, int device) {
  const int64_t tiles = std::max<int64_t>(ceil_div(p.count, kTensorThreads * kTensorUnroll), 1);
  Launch(static_cast<unsigned>(std::min<int64_t>(tiles, 4 * sm_count(device))), kTensorThreads)
      .stream(env_stream(device))
      .programmatic()
      .run(fp8_quantize_tensor_kernel<In, Fp8, Saturated, ScaleT, ScaleProgram, Chain, E, Before>, p);
}

}  // namespace inductor_ext
