// The end of a mixture of experts: out[t] = sum over j < k of round(y[inverse[t, j]] * weights[t, j]), in one pass over memory.
//
//   y [S, H], unit last stride, row pitch free; inverse, weights, expert_ids [T, k] contiguous; out [T, H] contiguous
//   weights may be missing: 1. Rows of experts `experts` and later, where expert_ids is given, are zero and are not read.
//   Product is the dtype that a product is rounded to; the sum is fp32. 1 <= k <= 64
//
// The order of the sum is that of PyTorch's CUDA reduction of so few values (aten/src/ATen/native/cuda/Reduce.cuh: four values
// a step, each with a sum of its own): ((s0 + s1) + s2) + s3 with s_i the sum of the products i, i + 4, i + 8, …
//
// A thread asks for 128 bytes before it uses any: eight vectors of eight elements (four of fp32), of as many of its token's k rows
// as that is, or where k is small several vectors of each row. Kernels are made for 1, 2, 4, 6 and 8 rows, so that little of the
// work is for rows that are not there. With code for eight rows alone a vector of out was 600 instructions whatever k was; 4096
// tokens of 4096 columns are 496 warps of vectors for each SM of an H200, 42 us to issue: it took 46.1 with k = 2, Inductor's code
// 27.9, and a copy of as many bytes 25.8. Now they are 150 with k = 2, 295 with 4, 570 with 8 (sm_90a). Where k = 8 takes 56
// registers nine blocks are resident, with up to 147 KB on the way to an SM. Few tokens keep one vector a thread: more blocks,
// shorter code. (Not timed on a GPU since.)
//
// Which rows they are a block's first threads read, once, into shared memory. The factors come behind the rows: nobody waits for
// them before all rows have been asked for.
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
constexpr int64_t kNoRow = -1;   // adds zero; a sum begins at +0 and is never -0, so that changes nothing
constexpr int64_t kOutside = -2;  // no row of y: NaN

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

// The row of y at `slot`; kNoRow where its expert is not here.
template <typename Index, typename Id>
__device__ __forceinline__ int64_t combine_row(const MoeCombineParams& p, int64_t slot) {
  // Both are asked for before one is looked at: each costs the latency of memory.
  int64_t row = static_cast<const Index*>(p.inverse)[slot];
  const int64_t expert = p.expert_ids == nullptr ? p.experts - 1 : static_cast<int64_t>(static_cast<const Id*>(p.expert_ids)[slot]);
  if (row < 0) row += p.rows;
  if (expert >= p.experts) return kNoRow;
  return row < 0 || row >= p.rows ? kOutside : row;
}

// What that row is multiplied by. 0 for none, whose elements are zeros.
template <typename W>
__device__ __forceinline__ float combine_factor(const MoeCombineParams& p, int64_t slot, int64_t row) {
  if (row < 0) return row == kOutside ? __int_as_float(0x7fffffff) : 0.0f;
  return p.weights == nullptr ? 1.0f : to_float(static_cast<const W*>(p.weights)[slot]);
}

// Adds up the sums, and writes a vector of out.
template <typename Out, int Sums, int E>
__device__ __forceinline__ void combine_store(float (&sums)[Sums][E], Out* out, bool there) {
#pragma unroll
  for (int s = 1; s < Sums; ++s) {
#pragma unroll
    for (int e = 0; e < E; ++e) sums[0][e] = __fadd_rn(sums[0][e], sums[s][e]);
  }
  Raw<Out, E> result;
  result.pack(sums[0]);
  if (there) result.store(out);
}

// Rows of one vector that a thread asks for at once, at most.
template <typename Y>
constexpr int kCombineChunk = sizeof(Y) == 4 ? 4 : 8;

// In steps of `Rows` rows; with `Once` one step does it. `Vectors` of each row are a thread's, a token's threads apart.
template <typename Y, typename W, typename Product, typename Out, typename Index, typename Id, int E, int Rows, int Vectors, bool Once>
__global__ void __launch_bounds__(kCombineThreads) moe_combine_kernel(const __grid_constant__ MoeCombineParams p) {
  static_assert(Once || Rows % kCombineSums == 0, "product j goes to sum j % 4");
  constexpr int kSums = Rows < kCombineSums ? Rows : kCombineSums;  // the others stay +0
  constexpr int kPitch = Once ? Rows : kMaxTopK;
  static_assert(kPitch % Rows == 0, "whole steps");
  __shared__ int64_t shared_rows[kCombineThreads / kFewestLanes][kPitch];
  __shared__ float shared_factors[kCombineThreads / kFewestLanes][kPitch];
  const int lanes = 1 << p.shift;
  const int lane = threadIdx.x & (lanes - 1), place = threadIdx.x >> p.shift;  // of the token in the block
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kCombineThreads >> p.shift) + place;
  const int vector = static_cast<int>(blockIdx.y) * (lanes * Vectors) + lane;
  const int padded = Once ? Rows : (p.top_k + Rows - 1) / Rows * Rows;
  int64_t* const rows = shared_rows[place];
  float* const factors = shared_factors[place];
  const bool here = token < p.tokens;
  const int left = here ? static_cast<int>(p.vectors) - vector : 0;  // of the row, this thread's first vector among them
  // Of a token's rows each thread looks after some: of one step's, at most one.
  static_assert(!Once || Rows <= kFewestLanes, "a thread for each row");
  const auto mine = [&](auto&& f) {
    if constexpr (Once) {
      if (lane < Rows) f(lane);
    } else {
#pragma unroll 1
      for (int j = lane; j < padded; j += lanes) f(j);
    }
  };
  wait_for_previous_kernel();
  mine([&](int j) { rows[j] = here && j < p.top_k ? combine_row<Index, Id>(p, token * p.top_k + j) : kNoRow; });
  __syncthreads();

  const Y* const column = static_cast<const Y*>(p.y) + int64_t{vector} * E;
  Out* const out = static_cast<Out*>(p.out) + (token * p.vectors + vector) * E;
  float sums[Vectors][kSums][E] = {};
  for (int j = 0; Once ? j == 0 : j < padded; j += Rows) {
    Raw<Y, E> raw[Vectors][Rows];
#pragma unroll
    for (int u = 0; u < Rows; ++u) {
      const int64_t row = rows[j + u];
      const Y* const from = column + row * p.y_pitch;
      const int count = row >= 0 ? left : 0;
#pragma unroll
      for (int v = 0; v < Vectors; ++v) {
        raw[v][u].zero();
        if (v * lanes < count) raw[v][u].load(from + v * lanes * E);
      }
    }
    if (Once) allow_next_kernel();
    if (j == 0) {
      mine([&](int i) { factors[i] = combine_factor<W>(p, token * p.top_k + i, rows[i]); });
      __syncthreads();
    }
#pragma unroll
    for (int v = 0; v < Vectors; ++v) {
#pragma unroll
      for (int u = 0; u < Rows; ++u) {
        const float factor = factors[j + u];
        float values[E];
        raw[v][u].unpack(values);
#pragma unroll
        for (int e = 0; e < E; ++e) values[e] = __fmul_rn(values[e], factor);
        round_to<Product>(values);
#pragma unroll
        for (int e = 0; e < E; ++e) sums[v][u % kSums][e] = __fadd_rn(sums[v][u % kSums][e], values[e]);
      }
      if constexpr (Once) combine_store<Out>(sums[v], out + v * lanes * E, v * lanes < left);
    }
  }
  if constexpr (!Once) {
#pragma unroll
    for (int v = 0; v < Vectors; ++v) combine_store<Out>(sums[v], out + v * lanes * E, v * lanes < left);
  }
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
    const int sms = sm_count(device.id());
    constexpr int kChunk = kCombineChunk<Y>;
    if (!vectors) return launch<1, kChunk, 1, false>(p, stream);
    p.vectors /= 8;
    if (p.top_k > kChunk) return launch<8, kChunk, 1, false>(p, stream);
    if (p.top_k == 1) return launch_rows<1>(p, stream, sms);
    if (p.top_k == 2) return launch_rows<2>(p, stream, sms);
    if (p.top_k <= 4) return launch_rows<4>(p, stream, sms);
    if constexpr (kChunk == 8) p.top_k <= 6 ? launch<8, 6, 1, true>(p, stream) : launch<8, 8, 1, true>(p, stream);
  }

 private:
  // Several vectors a thread where that leaves some 16 blocks for each multiprocessor: about three waves.
  template <int Rows>
  static void launch_rows(MoeCombineParams& p, cudaStream_t stream, int sms) {
    constexpr int kVectors = kCombineChunk<Y> / Rows;
    const bool many = p.tokens * p.vectors >= int64_t{16} * sms * kCombineThreads * kVectors;
    many ? launch<8, Rows, kVectors, true>(p, stream) : launch<8, Rows, 1, true>(p, stream);
  }
  template <int E, int Rows, int Vectors, bool Once>
  static void launch(MoeCombineParams& p, cudaStream_t stream) {
    int lanes = kFewestLanes;  // a block has as many tokens as fit
    for (p.shift = 3; lanes < kCombineThreads && lanes * Vectors < p.vectors; lanes *= 2) ++p.shift;
    static_assert(kFewestLanes == 1 << 3, "where the shift begins");
    const int64_t blocks = ceil_div(p.tokens, kCombineThreads / lanes), pieces = ceil_div(p.vectors, lanes * Vectors);
    if (pieces > 65535) {
      TVM_FFI_THROW(ValueError) << "y: wanted rows of at most " << 65535 * lanes * Vectors << " vectors, found " << p.vectors;
    }
    Launch(dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(pieces)), kCombineThreads)
        .stream(stream)
        .programmatic()
        .run(moe_combine_kernel<Y, W, Product, Out, Index, Id, E, Rows, Vectors, Once>, p);
  }
};

}  // namespace inductor_ext
