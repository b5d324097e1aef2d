// FP8 with a dynamic scale: amax, scale and cast in one pass over memory for rows; for a whole tensor in one launch that keeps
// x on the chip (quantize_once.cuh), or in two.
//
//   amax = max |x|   over the row or the tensor, NaN propagates, exact in x's dtype
//   scale = scale_program(amax);   out = cast(program(x, scale))
//
//   Fp8QuantizeRow     x [R, C] (leading dims may be several), unit last stride, row pitch free; out likewise; scale R elements
//   Fp8QuantizeTensor  x dense in any permutation, out alike; scale one element; workspace at least 1024 floats
//   bound    one fp32 element, which both programs may name as s0; c0..c7 are the constants of both.
//
// Rows: a row stays in registers between its maximum and its cast. 8 lanes take a row of at most 128 columns, a warp up to 1024,
// a block of 128 to 1024 threads up to 4096, 8192, 16384 and 32768; wider rows are read twice (the second time mostly from L2).
#pragma once

#include <tvm/ffi/function.h>

#include <algorithm>

#include "inductor_ext/fp8.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/quantize_once.cuh"
#include "inductor_ext/quantize_tensor.cuh"
#include "inductor_ext/reduce.cuh"
#include "inductor_ext/steps.cuh"
#include "inductor_ext/tensor.h"

namespace inductor_ext {

// ---- rows -------------------------------------------------------------------------------------------------------------------

struct Fp8QuantizeRowParams {
  const void* x;
  uint8_t* out;
  void* scale;
  int64_t rows, cols;  // cols in vectors
  int64_t x_pitch, out_pitch;
  Consts consts;
};

// Threads to a row: lanes of a warp (8 or 32) or a whole block.
template <int Threads>
constexpr int kQuantizeBlock = Threads <= 32 ? 128 : Threads;

template <typename In, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int Threads, int E,
          int U>
__global__ void __launch_bounds__(kQuantizeBlock<Threads>) fp8_quantize_row_kernel(const __grid_constant__ Fp8QuantizeRowParams p) {
  constexpr int kBlock = kQuantizeBlock<Threads>;
  __shared__ uint32_t shared[kBlock / 32];
  const int lane = threadIdx.x % Threads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kBlock / Threads) + threadIdx.x / Threads;
  const bool active = row < p.rows;
  const In* x = static_cast<const In*>(p.x) + row * p.x_pitch;

  Raw<In, E> raw[U];
  wait_for_previous_kernel();
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int i = u * Threads + lane;
    raw[u].zero();
    if (active && i < p.cols) raw[u].load(x + i * E);
  }
  allow_next_kernel();
  Amax<In> amax;
#pragma unroll
  for (int u = 0; u < U; ++u) amax.merge(raw[u]);
  uint32_t bits = amax.float_bits();
  if constexpr (Threads <= 32) {
    bits = group_max<Threads>(bits);
  } else {
    bits = block_max<Threads>(bits, shared);
  }
  if (!active) return;

  const float scale = scale_of<ScaleProgram>(p.consts, bits);
  if (lane == 0) static_cast<ScaleT*>(p.scale)[row] = from_float<ScaleT>(scale);
  const auto prepared = prepare_scaled<Chain>(p.consts, scale, bits);
  uint8_t* out = p.out + row * p.out_pitch;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int i = u * Threads + lane;
    if (i < p.cols) downcast_vector<In, Fp8, Saturated, Chain>(raw[u], prepared, out + i * E);
  }
}

// Rows too wide for registers: one block a row, two passes.
constexpr int kWideThreads = 1024;

template <typename In, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int E>
__global__ void __launch_bounds__(kWideThreads) fp8_quantize_wide_row_kernel(const __grid_constant__ Fp8QuantizeRowParams p) {
  __shared__ uint32_t shared[kWideThreads / 32];
  const int64_t row = blockIdx.x;
  const In* x = static_cast<const In*>(p.x) + row * p.x_pitch;
  Amax<In> amax;
  wait_for_previous_kernel();
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < p.cols; i += kWideThreads) {
    Raw<In, E> raw;
    raw.load(x + i * E);
    amax.merge(raw);
  }
  allow_next_kernel();
  const uint32_t bits = block_max<kWideThreads>(amax.float_bits(), shared);
  const float scale = scale_of<ScaleProgram>(p.consts, bits);
  if (threadIdx.x == 0) static_cast<ScaleT*>(p.scale)[row] = from_float<ScaleT>(scale);
  const auto prepared = prepare_scaled<Chain>(p.consts, scale, bits);
  uint8_t* out = p.out + row * p.out_pitch;
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < p.cols; i += kWideThreads) {
    Raw<In, E> raw;
    raw.load(x + i * E);
    downcast_vector<In, Fp8, Saturated, Chain>(raw, prepared, out + i * E);
  }
}

template <typename In, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Program>
struct Fp8QuantizeRow {
  static_assert(!Program::kRow && !ScaleProgram::kRow, "fp8_quantize has no operands of a value a row");
  using Chain = ToFp8<Program>;

  static void run(TensorView x, TensorView out, TensorView scale, Optional<TensorView> bound, double c0, double c1, double c2, double c3,
                  double c4, double c5, double c6, double c7) {
    Device device;
    TensorMatcher().dtype<In>().device(device).verify(x, "x");
    TensorMatcher().dtype<Fp8>().device(device).verify(out, "out");
    TensorMatcher().dtype<ScaleT>().contiguous().device(device).verify(scale, "scale");
    const Rows x_rows = rows_of(x, "x"), out_rows = rows_of(out, "out");
    if (x_rows.rows != out_rows.rows || x_rows.cols != out_rows.cols) {
      TVM_FFI_THROW(ValueError) << "out: wanted the shape of x, " << shape_of(x) << ", found " << shape_of(out);
    }
    if (scale.numel() != x_rows.rows) {
      TVM_FFI_THROW(ValueError) << "scale: wanted one element for each of " << x_rows.rows << " rows, found shape " << shape_of(scale);
    }
    if (x_rows.cols == 0) {
      TVM_FFI_THROW(ValueError) << "x: wanted at least one column, since an empty row has no maximum, found shape " << shape_of(x);
    }
    const void* bound_data = take_bound<ScaleProgram, Program>(bound, device);
    if (x_rows.rows == 0) return;

    const double constants[kMaxConsts] = {c0, c1, c2, c3, c4, c5, c6, c7};
    Fp8QuantizeRowParams p{data(x),      data<uint8_t>(out), data(scale),    x_rows.rows,
                           x_rows.cols, x_rows.pitch,       out_rows.pitch, Consts::of(constants, bound_data)};
    const bool vectors = x_rows.cols % 8 == 0 && aligned(p.x, 16) && aligned(p.out, 8) && p.x_pitch * sizeof(In) % 16 == 0 &&
                         p.out_pitch % 8 == 0;
    DeviceGuard guard(device.id());
    cudaStream_t stream = env_stream(device.id());
    const int64_t cols = x_rows.cols;
    if (vectors) {
      p.cols /= 8;
      if (cols <= 128) return launch<8, 8, 2>(p, stream);
      if (cols <= 512) return launch<32, 8, 2>(p, stream);
      if (cols <= 1024) return launch<32, 8, 4>(p, stream);
      if (cols <= 4096) return launch<128, 8, 4>(p, stream);
      if (cols <= 8192) return launch<256, 8, 4>(p, stream);
      if (cols <= 16384) return launch<512, 8, 4>(p, stream);
      if (cols <= 32768) return launch<1024, 8, 4>(p, stream);
      return launch_wide<8>(p, stream);
    }
    if (cols <= 256) return launch<32, 1, 8>(p, stream);
    if (cols <= 4096) return launch<256, 1, 16>(p, stream);
    if (cols <= 16384) return launch<1024, 1, 16>(p, stream);
    return launch_wide<1>(p, stream);
  }

 private:
  template <int Threads, int E, int U>
  static void launch(const Fp8QuantizeRowParams& p, cudaStream_t stream) {
    constexpr int kBlock = kQuantizeBlock<Threads>;
    Launch(static_cast<unsigned>(ceil_div(p.rows, kBlock / Threads)), kBlock)
        .stream(stream)
        .programmatic()
        .run(fp8_quantize_row_kernel<In, Fp8, Saturated, ScaleT, ScaleProgram, Chain, Threads, E, U>, p);
  }
  template <int E>
  static void launch_wide(const Fp8QuantizeRowParams& p, cudaStream_t stream) {
    Launch(static_cast<unsigned>(p.rows), kWideThreads)
        .stream(stream)
        .programmatic()
        .run(fp8_quantize_wide_row_kernel<In, Fp8, Saturated, ScaleT, ScaleProgram, Chain, E>, p);
  }
};

// ---- whole tensor -----------------------------------------------------------------------------------------------------------

template <typename In, int E>
__global__ void __launch_bounds__(kTensorThreads) fp8_quantize_amax_kernel(const __grid_constant__ Fp8QuantizeTensorParams p) {
  constexpr int kTile = kTensorThreads * kTensorUnroll;
  __shared__ uint32_t shared[kTensorThreads / 32];
  wait_for_previous_kernel();
  allow_next_kernel();  // after the wait: the second launch reads x before its own wait
  const In* x = static_cast<const In*>(p.x);
  Amax<In> amax;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kTile; tile < p.count; tile += static_cast<int64_t>(gridDim.x) * kTile) {
    Raw<In, E> raw[kTensorUnroll];
#pragma unroll
    for (int u = 0; u < kTensorUnroll; ++u) {
      const int64_t i = tile + u * kTensorThreads + threadIdx.x;
      raw[u].zero();
      if (i < p.count) raw[u].load(x + i * E);
    }
#pragma unroll
    for (int u = 0; u < kTensorUnroll; ++u) amax.merge(raw[u]);
  }
  if (blockIdx.x == 0 && threadIdx.x < p.tail) {
    Raw<In, 1> one;
    one.load(x + p.count * E + threadIdx.x);
    amax.merge(one);
  }
  const uint32_t bits = block_max<kTensorThreads>(amax.float_bits(), shared);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = __uint_as_float(bits);
}

struct Fp8QuantizeOnceParams {
  const void* x;
  int64_t count;  // vectors
  int tail;       // elements behind the last vector
  OnceParams once;
};

template <typename In, int E, int U>
struct Fp8QuantizeOnce : OnceWork<In> {
  const Fp8QuantizeOnceParams& p;
  const In* x;

  __device__ __forceinline__ explicit Fp8QuantizeOnce(const Fp8QuantizeOnceParams& p) : p(p), x(static_cast<const In*>(p.x)) {}
  __device__ __forceinline__ int64_t vector(uint32_t block, int u) const {
    return (static_cast<int64_t>(p.once.blocks - 1 - block) * U + u) * blockDim.x + threadIdx.x;  // the last first: what was written last is in L2
  }
  __device__ __forceinline__ void y(uint32_t block, bool, Raw<In, E> (&raw)[U]) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t i = vector(block, u);
      raw[u].zero();
      if (i < p.count) raw[u].load(x + i * E);
    }
  }
  __device__ __forceinline__ int64_t at(uint32_t block, int u) const {
    const int64_t i = vector(block, u);
    return i < p.count ? i * E : -1;
  }
  __device__ __forceinline__ bool has_rest() const { return blockIdx.x == 0 && static_cast<int>(threadIdx.x) < p.tail; }
  __device__ __forceinline__ Raw<In, 1> one() const {
    Raw<In, 1> raw;
    raw.load(x + p.count * E + threadIdx.x);
    return raw;
  }
  __device__ __forceinline__ void rest(Amax<In>& amax) const {
    if (has_rest()) amax.merge(one());
  }
  template <typename F>
  __device__ __forceinline__ void cast_rest(F&& cast) const {
    if (has_rest()) cast(one(), p.count * E + threadIdx.x);
  }
};

template <typename In, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int E, int U>
__global__ void __launch_bounds__(kOnceThreads) fp8_quantize_once_kernel(const __grid_constant__ Fp8QuantizeOnceParams p) {
  quantize_once<In, Fp8, Saturated, ScaleT, ScaleProgram, Chain, E, U>(p.once, dynamic_shared_memory<Aligned<In, E>>(),
                                                                       Fp8QuantizeOnce<In, E, U>(p));
}

template <typename In, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Program>
struct Fp8QuantizeTensor {
  static_assert(!Program::kRow && !ScaleProgram::kRow, "fp8_quantize has no operands of a value a row");
  using Chain = ToFp8<Program>;

  static void run(TensorView x, TensorView out, TensorView scale, TensorView workspace, Optional<TensorView> bound, double c0, double c1,
                  double c2, double c3, double c4, double c5, double c6, double c7) {
    Device device;
    TensorMatcher().dtype<In>().device(device).verify(x, "x");
    TensorMatcher().dtype<Fp8>().device(device).verify(out, "out");
    TensorMatcher().dtype<ScaleT>().device(device).verify(scale, "scale");
    TensorMatcher().dtype<float>().contiguous().device(device).verify(workspace, "workspace");
    const PairRows shape = pair_rows(x, "x", out, "out");
    if (shape.rows == 0) TVM_FFI_THROW(ValueError) << "x: wanted at least one element, since an empty tensor has no maximum";
    if (shape.rows != 1) {
      TVM_FFI_THROW(ValueError) << "x and out: wanted dense tensors with the same strides, found strides " << strides_of(x) << " and "
                                << strides_of(out) << " of shape " << shape_of(x);
    }
    if (scale.numel() != 1) TVM_FFI_THROW(ValueError) << "scale: wanted one element, found shape " << shape_of(scale);
    if (workspace.numel() < kTensorMaxPartials) {
      TVM_FFI_THROW(ValueError) << "workspace: wanted at least " << kTensorMaxPartials << " elements, found shape " << shape_of(workspace);
    }
    const double constants[kMaxConsts] = {c0, c1, c2, c3, c4, c5, c6, c7};
    const Consts consts = Consts::of(constants, take_bound<ScaleProgram, Program>(bound, device));
    Fp8QuantizeTensorParams p{data(x), data<uint8_t>(out), data(scale), data<float>(workspace), shape.cols, 0, 0, consts};
    DeviceGuard guard(device.id());
    if (aligned(p.x, 16) && aligned(p.out, 8)) {
      p.count = shape.cols / 8, p.tail = shape.cols % 8;
      if (once(p, device.id())) return;
      launch<8>(p, device.id());
    } else {
      launch<1>(p, device.id());
    }
  }

 private:
  static bool once(const Fp8QuantizeTensorParams& p, int device) {
    // So few vectors that they leave SMs idle: one a thread.
    return p.count < int64_t{4} * kOnceThreads * sm_count(device) ? once<1>(p, device) : once<4>(p, device);
  }
  template <int U>
  static bool once(const Fp8QuantizeTensorParams& p, int device) {
    static OncePlans plans;
    Fp8QuantizeOnceParams params{p.x, p.count, static_cast<int>(p.tail), OnceParams{p.out, p.scale, p.partial, 0, 0, p.consts}};
    auto* kernel = fp8_quantize_once_kernel<In, Fp8, Saturated, ScaleT, ScaleProgram, Chain, 8, U>;
    const int64_t blocks = std::max<int64_t>(ceil_div(p.count, kOnceThreads * U), 1);
    return launch_once(kernel, plans, params, blocks, kOnceThreads, kOnceThreads * U * sizeof(Aligned<In, 8>), device);
  }
  template <int E>
  static void launch(Fp8QuantizeTensorParams& p, int device) {
    const int64_t tiles = std::max<int64_t>(ceil_div(p.count, kTensorThreads * kTensorUnroll), 1);
    const int sms = sm_count(device);
    p.partials = static_cast<int>(std::min<int64_t>({tiles, 4 * sms, kTensorMaxPartials}));
    Launch(p.partials, kTensorThreads).stream(env_stream(device)).programmatic().run(fp8_quantize_amax_kernel<In, E>, p);
    cast_tensor<In, Fp8, Saturated, ScaleT, ScaleProgram, Chain, E, true>(p, device);
  }
};

}  // namespace inductor_ext
