// The end of a mixture of experts: out[t] = sum over j < k of round(y[inverse[t, j]] * weights[t, j]), in one pass over memory.
//
//   y [S, H], unit last stride, row pitch free; inverse, weights, expert_ids [T, k] contiguous; out [T, H] contiguous
//   weights may be missing: 1. Rows of experts `experts` and later, where expert_ids is given, are zero and are not read.
//   Product is the dtype that a product is rounded to; the sum is fp32. 1 <= k <= 64
//
// The order of the sum is that of PyTorch's CUDA reduction of so few values (aten/src/ATen/native/cuda/Reduce.cuh: four values
// a step, each with a sum of its own): ((s0 + s1) + s2) + s3 with s_i the sum of the products i, i + 4, i + 8, …
//
// A thread has one vector of one token's row, and asks for eight of its k rows (four of fp32) before it uses the first. Which
// rows those are, and their weights, the block's first threads read once, into shared memory.
#pragma once

#include <tvm/ffi/function.h>

#include <algorithm>

#include "inductor_ext/launch.cuh"
#include "inductor_ext/steps.cuh"
#include "inductor_ext/tensor.h"
#include "inductor_ext/vec.cuh"

namespace inductor_ext {

constexpr int kCombineThreads = 128;
constexpr int kFewestLanes = 8;  // threads of a token
constexpr int kMaxTopK = 64;
constexpr int kCombineSums = 4;
constexpr int64_t kNoRow = -1;  // adds zero; a sum begins at +0 and is never -0, so that changes nothing

struct MoeCombineParams {
  const void* y;
  const void* weights;     // null: 1
  const void* inverse;
  const void* expert_ids;  // null: every row counts
  void* out;
  int64_t tokens, rows, vectors;  // of out, of y, of a row
  int64_t y_pitch;
  int64_t experts;
  int top_k;
  int shift;  // a token has 2^shift of a block's threads
};

// What a block keeps of a row to add: where it is, kNoRow for none, and its factor.
struct alignas(16) CombineRow {
  int64_t row;
  float weight;
};

// The row of y at `slot`. A masked one is zero: no row, factor 0. One outside y is NaN: no row, factor NaN.
template <typename W, typename Index, typename Id>
__device__ __forceinline__ CombineRow combine_row(const MoeCombineParams& p, int64_t slot) {
  // All three are asked for before one is looked at: each costs the latency of memory.
  int64_t row = static_cast<const Index*>(p.inverse)[slot];
  const float weight = p.weights == nullptr ? 1.0f : to_float(static_cast<const W*>(p.weights)[slot]);
  const int64_t expert = p.expert_ids == nullptr ? p.experts - 1 : static_cast<int64_t>(static_cast<const Id*>(p.expert_ids)[slot]);
  if (row < 0) row += p.rows;
  if (expert >= p.experts) return {kNoRow, 0.0f};
  if (row < 0 || row >= p.rows) return {kNoRow, __int_as_float(0x7fffffff)};
  return {row, weight};
}

// Rows that a thread asks for before it uses the first.
template <typename Y>
constexpr int kCombineChunk = sizeof(Y) == 4 ? 4 : 8;

// `Once`: k is at most a chunk, and one step does it.
template <typename Y, typename W, typename Product, typename Out, typename Index, typename Id, int E, bool Once>
__global__ void __launch_bounds__(kCombineThreads) moe_combine_kernel(const __grid_constant__ MoeCombineParams p) {
  constexpr int kChunk = kCombineChunk<Y>;
  static_assert(kChunk % kCombineSums == 0, "product j goes to sum j % 4");
  constexpr int kPitch = Once ? kChunk : kMaxTopK;
  static_assert(kPitch % kChunk == 0, "whole chunks");
  __shared__ CombineRow shared_rows[kCombineThreads / kFewestLanes][kPitch];
  const int lanes = 1 << p.shift;
  const int lane = threadIdx.x & (lanes - 1), place = threadIdx.x >> p.shift;  // of the token in the block
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kCombineThreads >> p.shift) + place;
  const int64_t vector = static_cast<int64_t>(blockIdx.y) * lanes + lane;
  const int padded = Once ? kChunk : (p.top_k + kChunk - 1) / kChunk * kChunk;
  CombineRow* const mine = shared_rows[place];
  wait_for_previous_kernel();
  for (int j = lane; j < padded; j += lanes) {
    const bool there = token < p.tokens && j < p.top_k;
    mine[j] = there ? combine_row<W, Index, Id>(p, token * p.top_k + j) : CombineRow{kNoRow, 0.0f};
  }
  __syncthreads();
  if (token >= p.tokens || vector >= p.vectors) return;

  const Y* const column = static_cast<const Y*>(p.y) + vector * E;
  float sums[kCombineSums][E] = {};
  for (int j = 0; Once ? j == 0 : j < padded; j += kChunk) {
    CombineRow from[kChunk];
    Raw<Y, E> raw[kChunk];
#pragma unroll
    for (int u = 0; u < kChunk; ++u) from[u] = mine[j + u];
#pragma unroll
    for (int u = 0; u < kChunk; ++u) {
      raw[u].zero();
      if (from[u].row != kNoRow) raw[u].load(column + from[u].row * p.y_pitch);
    }
    if (Once) allow_next_kernel();
#pragma unroll
    for (int u = 0; u < kChunk; ++u) {
      float v[E];
      raw[u].unpack(v);
#pragma unroll
      for (int e = 0; e < E; ++e) v[e] = __fmul_rn(v[e], from[u].weight);
      round_to<Product>(v);
#pragma unroll
      for (int e = 0; e < E; ++e) sums[u % kCombineSums][e] = __fadd_rn(sums[u % kCombineSums][e], v[e]);
    }
  }
#pragma unroll
  for (int s = 1; s < kCombineSums; ++s) {
#pragma unroll
    for (int e = 0; e < E; ++e) sums[0][e] = __fadd_rn(sums[0][e], sums[s][e]);
  }
  Raw<Out, E> result;
  result.pack(sums[0]);
  result.store(static_cast<Out*>(p.out) + (token * p.vectors + vector) * E);
}

template <typename Y, typename W, typename Product, typename Out, typename Index, typename Id>
struct MoeCombine {
  static void run(TensorView y, Optional<TensorView> weights, TensorView inverse, Optional<TensorView> expert_ids, int64_t experts,
                  TensorView out) {
    Device device;
    Symbol rows("S"), columns("H"), tokens("T"), top_k("k"), pitch("pitch of y");
    TensorMatcher({rows, columns}).dtype<Y>().strides({pitch, 1}).device(device).verify(y, "y");
    TensorMatcher({tokens, top_k}).template dtype<Index>().contiguous().device(device).verify(inverse, "inverse");
    MoeCombineParams p{};
    if (weights.has_value()) {
      TensorMatcher({tokens, top_k}).template dtype<W>().contiguous().device(device).verify(weights.value(), "weights");
      p.weights = data(weights.value());
    }
    if (expert_ids.has_value()) {
      TensorMatcher({tokens, top_k}).template dtype<Id>().contiguous().device(device).verify(expert_ids.value(), "expert_ids");
      p.expert_ids = data(expert_ids.value());
    }
    TensorMatcher({tokens, columns}).template dtype<Out>().contiguous().device(device).verify(out, "out");
    if (top_k.value() < 1 || top_k.value() > kMaxTopK) {
      TVM_FFI_THROW(ValueError) << "inverse: wanted [T, k], k from 1 to " << kMaxTopK << ", found shape " << shape_of(inverse);
    }
    check_row_length(columns.value(), "y");
    p.y = data(y), p.inverse = data(inverse), p.out = data(out);
    p.tokens = tokens.value(), p.rows = rows.value(), p.vectors = columns.value();
    p.y_pitch = p.rows > 1 ? pitch.value() : p.vectors;
    p.experts = experts, p.top_k = static_cast<int>(top_k.value());
    if (p.tokens == 0 || p.vectors == 0) return;

    const bool vectors = p.vectors % 8 == 0 && aligned(p.y, 16) && p.y_pitch * sizeof(Y) % 16 == 0 && aligned(p.out, 16);
    DeviceGuard guard(device.id());
    const cudaStream_t stream = env_stream(device.id());
    if (vectors) p.vectors /= 8;
    const bool once = p.top_k <= kCombineChunk<Y>;
    if (vectors) {
      once ? launch<8, true>(p, stream) : launch<8, false>(p, stream);
    } else {
      launch<1, false>(p, stream);
    }
  }

 private:
  template <int E, bool Once>
  static void launch(MoeCombineParams& p, cudaStream_t stream) {
    int lanes = kFewestLanes;  // a block has as many tokens as fit
    for (p.shift = 3; lanes < kCombineThreads && lanes < p.vectors; lanes *= 2) ++p.shift;
    static_assert(kFewestLanes == 1 << 3, "where the shift begins");
    const int64_t blocks = ceil_div(p.tokens, kCombineThreads / lanes), pieces = ceil_div(p.vectors, lanes);
    if (pieces > 65535) TVM_FFI_THROW(ValueError) << "y: wanted rows of at most " << 65535 * lanes << " vectors, found " << p.vectors;
    Launch(dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(pieces)), kCombineThreads)
        .stream(stream)
        .programmatic()
        .run(moe_combine_kernel<Y, W, Product, Out, Index, Id, E, Once>, p);
  }
};

}  // namespace inductor_ext
