// The end of a kernel that holds a row in registers: its maximum, its scale, and the row as FP8.
//
//   scale = scale_program(max |y|);  out = cast(program(y, scale))        NaN propagates
//
// With MxScale in the place of the scale program it is MXFP8, a scale for each 32 elements (quantize_blocks.cuh).
// A row is held by `Threads` threads: 8 or 32 lanes of a warp, (kWholeBlock) a block, or (kPartOfBlock) a part of one; thread t has
// vectors t, t + threads, …
#pragma once

#include "inductor_ext/fp8.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/quantize_blocks.cuh"
#include "inductor_ext/quantize_once.cuh"
#include "inductor_ext/quantize_tensor.cuh"
#include "inductor_ext/reduce.cuh"
#include "inductor_ext/steps.cuh"
#include "inductor_ext/tensor.h"

namespace inductor_ext {

constexpr int kWholeBlock = 0;
constexpr int kPartOfBlock = -1;  // a block has as many rows as it has parts, of whole warps
constexpr int kRowsBlock = 128;  // threads of a block that has several rows

// Where a thread is: its row, negative for none, its place among the threads of that row, and how many those are.
//
// Rows are taken from the last to the first: what the kernel ahead wrote last is still in L2, and what this one writes last is
// what the next one, a product that begins with the first rows, reads first.
template <int Threads>
struct RowPlace {
  int64_t row;
  int lane, threads;

  __device__ static __forceinline__ RowPlace of(int64_t rows, int64_t block) {
    if constexpr (Threads == kWholeBlock) {
      return {rows - 1 - block, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
    } else {
      const int64_t before = block * (kRowsBlock / Threads);
      return {rows - 1 - before - threadIdx.x / Threads, static_cast<int>(threadIdx.x % Threads), Threads};
    }
  }
  // In a block of any size, `threads` to a row where Threads does not say it.
  __device__ static __forceinline__ RowPlace of(int64_t rows, int64_t block, int threads) {
    if constexpr (Threads > 0) threads = Threads;
    const int part = threadIdx.x / threads;
    return {rows - 1 - block * (blockDim.x / threads) - part, static_cast<int>(threadIdx.x) - part * threads, threads};
  }
};

// Whether this thread has vector u of its row. kWhole: a row is all vectors of its threads, so that each has all or, beside the
// rows, none.
template <bool kWhole, int Threads>
__device__ __forceinline__ bool has_vector(const RowPlace<Threads>& place, int u, int cols) {
  if constexpr (kWhole) return Threads == kWholeBlock || place.row >= 0;
  return place.row >= 0 && u * place.threads + place.lane < cols;
}

template <int Threads>
__device__ __forceinline__ float row_sum(float value, float* shared, int threads) {
  if constexpr (Threads == kWholeBlock) {
    return block_sum(value, shared);
  } else if constexpr (Threads == kPartOfBlock) {
    return part_sum(value, threads, shared);
  } else {
    return group_sum<Threads>(value);
  }
}

// Rows of `threads` threads that a block of 1024 has; a part of several warps meets at a barrier of its own, of which there are 15.
__host__ __device__ constexpr int parts_of_block(int threads) { return threads == 32 ? 32 : 1024 / threads < 15 ? 1024 / threads : 15; }

// `shared` has 32 words. Every thread of the block calls this; those without a row take part in the maximum only. kWhole: a row is
// all vectors of its threads.
template <int Threads, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, bool kWhole = false, typename In,
          int E, int U>
__device__ __forceinline__ void quantize_row(const Raw<In, E> (&y)[U], const RowPlace<Threads>& at, const Consts& consts,
                                             uint32_t* shared, int64_t cols, ScaleT* scale_of_row, uint8_t* out) {
  if constexpr (kIsMx<ScaleProgram>) {
    const bool active = at.row >= 0;
    quantize_blocks(y, active, at.lane, at.threads, cols, ScaleProgram{}, reinterpret_cast<uint8_t*>(scale_of_row), out);
  } else {
    Amax<In> amax;
#pragma unroll
    for (int u = 0; u < U; ++u) amax.merge(y[u]);
    uint32_t bits = amax.float_bits();
    if constexpr (Threads == kWholeBlock) {
      bits = block_max(bits, shared);
    } else if constexpr (Threads == kPartOfBlock) {
      bits = part_max(bits, at.threads, shared);
    } else {
      bits = group_max<Threads>(bits);
    }
    if (at.row < 0) return;

    const float scale = scale_of<ScaleProgram>(consts, bits);
    if (at.lane == 0) *scale_of_row = from_float<ScaleT>(scale);
    const auto prepared = prepare_scaled<Chain>(consts, scale, bits);
    const int width = static_cast<int>(cols);
    out += at.lane * E;
#pragma unroll
    for (int u = 0; u < U; ++u, out += at.threads * E) {
      if (kWhole || u * at.threads + at.lane < width) downcast_vector<In, Fp8, Saturated, Chain>(y[u], prepared, out);
    }
  }
}

// The same rows of a tensor with one scale: y goes to memory and its maximum, of all rows of the block, to `partial`; a second
// launch casts (quantize_tensor.cuh). `row(place, y)` computes a row's y. Blocks take rows in turn.
template <int Threads, typename In, int E, int U, typename F>
__device__ __forceinline__ void rows_of_tensor(int64_t rows, int64_t cols, int64_t blocks, In* y_out, float* partial, F&& row) {
  __shared__ uint32_t shared[32];
  Amax<In> amax;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const auto place = RowPlace<Threads>::of(rows, block);
    Raw<In, E> y[U];
    row(place, y);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      amax.merge(y[u]);
      const int i = u * place.threads + place.lane;
      if (place.row >= 0 && i < cols) y[u].store(y_out + (place.row * cols + i) * E);
    }
    if constexpr (Threads == kWholeBlock) __syncthreads();  // `row` may use shared memory again
  }
  const uint32_t bits = block_max(amax.float_bits(), shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = __uint_as_float(bits);
}

// Host: blocks of a first launch, of the `blocks` of rows that there are; each leaves a maximum.
inline unsigned tensor_blocks(unsigned blocks, unsigned threads, int device) {
  const unsigned resident = std::max(1024u / threads, 1u) * static_cast<unsigned>(sm_count(device));
  return std::min({blocks, resident, static_cast<unsigned>(kTensorMaxPartials)});
}

// Host: checks where a first launch leaves its maxima, and its y.
inline float* tensor_partials(const TensorView& partial, Device& device) {
  TensorMatcher().dtype<float>().contiguous().device(device).verify(partial, "partial");
  if (partial.numel() < kTensorMaxPartials) {
    TVM_FFI_THROW(ValueError) << "partial: wanted at least " << kTensorMaxPartials << " elements, found " << partial.numel();
  }
  return data<float>(partial);
}
template <typename In>
void* tensor_y(const TensorView& y, int64_t count, Device& device) {
  TensorMatcher().dtype<In>().contiguous().device(device).verify(y, "y");
  if (y.numel() < count) TVM_FFI_THROW(ValueError) << "y: wanted at least " << count << " elements, found " << y.numel();
  return data(y);
}

// Host: the second launch, for a kernel's own parameters with y, partial, out, scale, consts, rows and cols (in vectors or not).
template <typename In, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, typename Params>
void cast_rows(const Params& p, unsigned partials, int device, bool vectors) {
  const int64_t count = p.rows * p.cols;
  Fp8QuantizeTensorParams cast{p.y, p.out, p.scale, p.partial, count, 0, static_cast<int>(partials), p.consts};
  if (vectors) {
    cast_tensor<In, Fp8, Saturated, ScaleT, ScaleProgram, Chain, 8, false>(cast, device);
  } else {
    cast_tensor<In, Fp8, Saturated, ScaleT, ScaleProgram, Chain, 1, false>(cast, device);
  }
}

// Calls launch<Threads, E, U>(grid, block) with the row's shape for `cols` columns, at most 32 768, in vectors of eight or singly.
//
// Many rows: four vectors a thread, so that a block of few threads has enough bytes in flight and waits for few. So few rows
// that they leave SMs idle: one vector a thread, the shortest way through a row.
template <typename F>
void with_row_shape(int64_t rows, int64_t cols, bool vectors, int sms, F&& launch) {
  const auto several = [&](int lanes) { return static_cast<unsigned>(ceil_div(rows, kRowsBlock / lanes)); };
  const auto warps_for = [](int64_t threads) { return static_cast<unsigned>(ceil_div(threads, 32) * 32); };
  const unsigned whole = static_cast<unsigned>(rows);
  if (vectors) {
    const int64_t n = cols / 8;
    const bool few = rows <= 2 * sms;
    if (n <= 16) return launch.template operator()<8, 8, 2>(several(8), kRowsBlock);
    if (n <= 32 || (n <= 64 && !few)) return launch.template operator()<32, 8, 2>(several(32), kRowsBlock);
    if (n <= 128 && !few) return launch.template operator()<32, 8, 4>(several(32), kRowsBlock);
    if (n <= 1024 && few) return launch.template operator()<kWholeBlock, 8, 1>(whole, warps_for(n));
    return launch.template operator()<kWholeBlock, 8, 4>(whole, warps_for(ceil_div(n, 4)));
  }
  if (cols <= 256) return launch.template operator()<32, 1, 8>(several(32), kRowsBlock);
  if (cols <= 16384) return launch.template operator()<kWholeBlock, 1, 16>(whole, warps_for(ceil_div(cols, 16)));
  return launch.template operator()<kWholeBlock, 1, 32>(whole, warps_for(ceil_div(cols, 32)));
}

}  // namespace inductor_ext
