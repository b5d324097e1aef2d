// RMSNorm, with or without a residual added before it, and FP8 with a dynamic scale a row, in one pass over memory.
//
//   total = round(x + residual);  r = rsqrt(mean(total²) + eps);  y = norm(total * r, weight), rounded to x's dtype
//   scale = scale_program(max |y|);  out = cast(program(y, scale))
//
//   x, residual [R, C] (leading dims may be several), unit last stride, row pitch free; weight [C] contiguous
//   out [R, C], scale R elements, total [R, C] like x, all with a row pitch of C; without a residual total is not touched
//   C up to 32 768; c0..c7 are the constants of both programs
//   MXFP8 (MxScale): C a multiple of 32, scale [R, C / 32]
//
// With one scale for the whole tensor one launch keeps y on the chip (quantize_once.cuh), or y goes to memory and a second launch
// reads it, mostly from L2, and casts: rows that are not whole aligned vectors, or of more than 16 384 columns.
//
// A row stays in registers from its first load to its cast: as `total` until the mean is known, as y until the maximum is.
#pragma once

#include <tvm/ffi/function.h>

#include "inductor_ext/launch.cuh"
#include "inductor_ext/norm.cuh"
#include "inductor_ext/quantize_row.cuh"
#include "inductor_ext/tensor.h"

namespace inductor_ext {

struct RmsNormQuantizeParams {
  const void* x;
  const void* residual;
  const void* weight;
  uint8_t* out;
  void* scale;
  void* total;
  int64_t rows, cols;  // cols in vectors
  int64_t x_pitch, residual_pitch;
  float eps, per_column;  // 1 / C
  Consts consts;
  // of a tensor with one scale: y [R, C], a maximum a block, and how many blocks of rows there are
  void* y;
  float* partial;
  int64_t blocks;
  OnceParams once;
  int row_threads;
};

// What a launch does besides y, the first time it computes it and in every other case: the sum is written, or read where it was
// written; the next kernel may start.
enum class Pass { kOnly, kFirst, kAgain };

// y of one row, and its total to memory.
template <typename In, typename W, bool HasResidual, typename Norm, Pass kPass = Pass::kOnly, int Threads, int E, int U>
__device__ __forceinline__ void rms_norm_row(const RmsNormQuantizeParams& p, const RowPlace<Threads>& place, float* shared_sum,
                                             Raw<In, E> (&raw)[U]) {
  const int64_t row = place.row;
  const bool active = row >= 0;
  const In* x = static_cast<const In*>(p.x) + row * p.x_pitch;
  const In* residual = static_cast<const In*>(p.residual) + row * p.residual_pitch;
  In* total = static_cast<In*>(p.total) + row * p.cols * E;

  Raw<W, E> weight[U];
  const auto load_weight = [&](int u, int i) {
    weight[u].zero();
    if (active && i < p.cols) weight[u].load(static_cast<const W*>(p.weight) + i * E);
  };
  constexpr bool kWeightFirst = U * E <= 8;  // else its registers are the residual's until the sum is made
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int i = u * place.threads + place.lane;
    raw[u].zero();
    if constexpr (HasResidual && kPass == Pass::kAgain) {
      if (active && i < p.cols) raw[u] = reinterpret_cast<const Aligned<In, E>*>(total + i * E)->raw;
    } else {
      if (active && i < p.cols) raw[u].load(x + i * E);
    }
    if (kWeightFirst) load_weight(u, i);
  }
  if constexpr (HasResidual && kPass != Pass::kAgain) {
    Raw<In, E> other[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int i = u * place.threads + place.lane;
      other[u].zero();
      if (active && i < p.cols) other[u].load(residual + i * E);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int i = u * place.threads + place.lane;
      float a[E], b[E];
      raw[u].unpack(a), other[u].unpack(b);
#pragma unroll
      for (int e = 0; e < E; ++e) a[e] = __fadd_rn(a[e], b[e]);
      raw[u].pack(a);
      if (active && i < p.cols) raw[u].store(total + i * E);
    }
  }
  if constexpr (kPass == Pass::kOnly) allow_next_kernel();

  float sum = 0.f;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    float v[E];
    raw[u].unpack(v);
#pragma unroll
    for (int e = 0; e < E; ++e) sum = fmaf(v[e], v[e], sum);
    if (!kWeightFirst) load_weight(u, u * place.threads + place.lane);
  }
  sum = row_sum<Threads>(sum, shared_sum, place.threads);
  const float factor = rsqrtf(sum * p.per_column + p.eps);

#pragma unroll
  for (int u = 0; u < U; ++u) {
    float v[E];
    raw[u].unpack(v);
#pragma unroll
    for (int e = 0; e < E; ++e) v[e] = __fmul_rn(v[e], factor);
    if constexpr (std::is_same_v<Norm, CastThenWeight> && std::is_same_v<W, In>) {
      raw[u].pack(v);
      raw[u].multiply(weight[u]);
    } else {
      float w[E];
      weight[u].unpack(w);
      Norm::template apply<In>(v, w);
      raw[u].pack(v);
    }
  }
}

template <typename In, typename W, bool HasResidual, typename Norm, typename Fp8, bool Saturated, typename ScaleT,
          typename ScaleProgram, typename Chain, int Threads, int E, int U>
__global__ void __launch_bounds__(Threads == kWholeBlock ? 1024 : kRowsBlock)
    rms_norm_quantize_kernel(const __grid_constant__ RmsNormQuantizeParams p) {
  __shared__ uint32_t shared_max[32];
  __shared__ float shared_sum[32];
  const auto place = RowPlace<Threads>::of(p.rows, blockIdx.x);
  Raw<In, E> y[U];
  wait_for_previous_kernel();
  rms_norm_row<In, W, HasResidual, Norm>(p, place, shared_sum, y);
  quantize_row<Threads, Fp8, Saturated, ScaleT, ScaleProgram, Chain>(
      y, place, p.consts, shared_max, p.cols, static_cast<ScaleT*>(p.scale) + place.row * scales_of_row<ScaleProgram>(p.cols * E),
      p.out + place.row * p.cols * E);
}

template <typename In, typename W, bool HasResidual, typename Norm, int Threads, int E, int U>
__global__ void __launch_bounds__(Threads == kWholeBlock ? 1024 : kRowsBlock)
    rms_norm_amax_kernel(const __grid_constant__ RmsNormQuantizeParams p) {
  __shared__ float shared_sum[32];
  wait_for_previous_kernel();
  rows_of_tensor<Threads, In, E, U>(p.rows, p.cols, p.blocks, static_cast<In*>(p.y), p.partial,
                                    [&](const RowPlace<Threads>& place, Raw<In, E>(&y)[U]) {
                                      rms_norm_row<In, W, HasResidual, Norm>(p, place, shared_sum, y);
                                    });
}

// One scale in one launch. Rows lie in the same threads as in two, so that the mean has the same order of summation.
template <typename In, typename W, bool HasResidual, typename Norm, int Threads, int E, int U>
struct RmsNormOnce : OnceWork<In> {
  const RmsNormQuantizeParams& p;
  float* shared_sum;  // 2 × 32: a warp may be a turn ahead of the others of its row
  int half = 0;

  __device__ __forceinline__ RmsNormOnce(const RmsNormQuantizeParams& p, float* shared_sum) : p(p), shared_sum(shared_sum) {}
  __device__ __forceinline__ RowPlace<Threads> place(uint32_t block) const { return RowPlace<Threads>::of(p.rows, block, p.row_threads); }
  __device__ __forceinline__ void y(uint32_t block, bool again, Raw<In, E> (&raw)[U]) {
    half ^= 32;
    if (again) {
      rms_norm_row<In, W, HasResidual, Norm, Pass::kAgain>(p, place(block), shared_sum + half, raw);
    } else {
      rms_norm_row<In, W, HasResidual, Norm, Pass::kFirst>(p, place(block), shared_sum + half, raw);
    }
  }
  __device__ __forceinline__ int64_t at(uint32_t block, int u) const {
    const auto found = place(block);
    const int i = u * found.threads + found.lane;
    return found.row >= 0 && i < p.cols ? (found.row * p.cols + i) * E : -1;
  }
};

template <int U>
constexpr int kNormOnceThreads = U == 1 ? 1024 : kOnceThreads;  // 64 registers a thread, and 128 for four vectors of fp32

template <typename In, typename W, bool HasResidual, typename Norm, typename Fp8, bool Saturated, typename ScaleT,
          typename ScaleProgram, typename Chain, int Threads, int E, int U>
__global__ void __launch_bounds__(kNormOnceThreads<U>, U == 1 || sizeof(In) == 4 ? 1 : 2)
    rms_norm_quantize_once_kernel(const __grid_constant__ RmsNormQuantizeParams p) {
  __shared__ float shared_sum[64];
  quantize_once<In, Fp8, Saturated, ScaleT, ScaleProgram, Chain, E, U>(
      p.once, dynamic_shared_memory<Aligned<In, E>>(), RmsNormOnce<In, W, HasResidual, Norm, Threads, E, U>(p, shared_sum));
}

inline void check_size(const TensorView& view, const char* name, int64_t wanted) {
  if (view.numel() != wanted) TVM_FFI_THROW(ValueError) << name << ": wanted " << wanted << " elements, found shape " << shape_of(view);
}

// Host: checks what every mode is given, and puts it into `p`.
template <typename In, typename W, bool HasResidual, typename Fp8>
Rows take_norm(RmsNormQuantizeParams& p, const TensorView& x, const Optional<TensorView>& residual, const TensorView& weight, double eps,
               const TensorView& out, const TensorView& total, Device& device) {
  TensorMatcher().dtype<In>().device(device).verify(x, "x");
  const Rows rows = rows_of(x, "x");
  TensorMatcher({rows.cols}).template dtype<W>().contiguous().device(device).verify(weight, "weight");
  TensorMatcher().dtype<Fp8>().contiguous().device(device).verify(out, "out");
  if constexpr (HasResidual) {
    const TensorView& added = residual.value();
    TensorMatcher().dtype<In>().device(device).verify(added, "residual");
    const Rows other = rows_of(added, "residual");
    if (other.rows != rows.rows || other.cols != rows.cols) {
      TVM_FFI_THROW(ValueError) << "residual: wanted the shape of x, " << shape_of(x) << ", found " << shape_of(added);
    }
    TensorMatcher().dtype<In>().contiguous().device(device).verify(total, "total");
    check_size(total, "total", rows.rows * rows.cols);
    p.residual = data(added), p.residual_pitch = other.pitch, p.total = data(total);
  }
  if (rows.cols == 0 || rows.cols > 32768) {
    TVM_FFI_THROW(ValueError) << "x: wanted 1 to 32768 columns, found shape " << shape_of(x);
  }
  p.x = data(x), p.weight = data(weight), p.out = data<uint8_t>(out);
  p.rows = rows.rows, p.cols = rows.cols, p.x_pitch = rows.pitch;
  p.eps = static_cast<float>(eps), p.per_column = 1.0f / static_cast<float>(rows.cols);
  return rows;
}

// Host: whether whole vectors of eight can be loaded and stored.
template <typename In, bool HasResidual>
bool norm_in_vectors(const RmsNormQuantizeParams& p) {
  const auto rows_aligned = [](const void* pointer, int64_t pitch) { return aligned(pointer, 16) && pitch * sizeof(In) % 16 == 0; };
  return p.cols % 8 == 0 && rows_aligned(p.x, p.x_pitch) && aligned(p.weight, 16) && aligned(p.out, 8) &&
         (!HasResidual || (rows_aligned(p.residual, p.residual_pitch) && aligned(p.total, 16)));
}

template <typename In, typename W, bool HasResidual, typename Norm, bool Rowwise, typename Fp8, bool Saturated, typename ScaleT,
          typename ScaleProgram, typename Program>
struct RmsNormQuantize {
  static_assert(!Program::kRow && !ScaleProgram::kRow, "rms_norm_quantize has no tensor operands");
  using Chain = ToFp8<Program>;

  // For a tensor with one scale `partial` is given. True: nothing has been done, for want of `y`.
  static bool run(TensorView x, Optional<TensorView> residual, TensorView weight, double eps, TensorView out, TensorView scale,
                  TensorView total, Optional<TensorView> y, Optional<TensorView> partial, double c0, double c1, double c2, double c3, double c4, double c5, double c6, double c7) {
    Device device;
    RmsNormQuantizeParams p{};
    const Rows rows = take_norm<In, W, HasResidual, Fp8>(p, x, residual, weight, eps, out, total, device);
    TensorMatcher().dtype<ScaleT>().contiguous().device(device).verify(scale, "scale");
    check_size(out, "out", rows.rows * rows.cols), check_size(scale, "scale", Rowwise ? rows.rows * scales_of_row<ScaleProgram>(rows.cols) : 1);
    if (kIsMx<ScaleProgram> && rows.cols % mx::kBlock != 0) {
      TVM_FFI_THROW(ValueError) << "x: wanted rows of a multiple of " << mx::kBlock << " elements, found shape " << shape_of(x);
    }
    if (rows.rows == 0 && !Rowwise) TVM_FFI_THROW(ValueError) << "x: wanted at least one row, since an empty tensor has no maximum";
    if (rows.rows == 0) return false;

    const double constants[kMaxConsts] = {c0, c1, c2, c3, c4, c5, c6, c7};
    p.scale = data(scale), p.consts = Consts::of(constants);
    if constexpr (!Rowwise) {
      p.partial = tensor_partials(*partial, device);
      if (y.has_value()) p.y = tensor_y<In>(*y, rows.rows * rows.cols, device);
      p.once = OnceParams{p.out, p.scale, p.partial, 0, 0, p.consts};
    }
    const bool vectors = norm_in_vectors<In, HasResidual>(p);
    DeviceGuard guard(device.id());
    cudaStream_t stream = env_stream(device.id());
    if (vectors) p.cols /= 8;
    bool wants_y = false;
    with_row_shape(rows.rows, rows.cols, vectors, sm_count(device.id()), Start{p, stream, device.id(), wants_y});
    return wants_y;
  }

 private:
  struct Start {
    RmsNormQuantizeParams& p;
    cudaStream_t stream;
    int device;
    bool& wants_y;
    template <int Threads, int E, int U>
    bool once(unsigned block) const {
      if constexpr (E == 8) {
        constexpr int kThreads = Threads == kWholeBlock ? kPartOfBlock : Threads;
        p.row_threads = Threads == kWholeBlock ? static_cast<int>(block) : Threads;
        if (p.y != nullptr || p.row_threads > kNormOnceThreads<U>) return false;
        const int64_t of_warp = std::max(32 / p.row_threads, 1), of_block = std::max(kOnceThreads / p.row_threads, 1);
        const int64_t parts = std::min(of_block, ceil_div(p.rows, of_warp) * of_warp);  // rows of a block
        const auto threads = static_cast<unsigned>(parts * p.row_threads);
        static OncePlans plans;
        auto* kernel = rms_norm_quantize_once_kernel<In, W, HasResidual, Norm, Fp8, Saturated, ScaleT, ScaleProgram, Chain, kThreads, E, U>;
        return launch_once(kernel, plans, p, ceil_div(p.rows, parts), threads, threads * U * sizeof(Aligned<In, E>), device);
      }
      return false;
    }
    template <int Threads, int E, int U>
    void operator()(unsigned grid, unsigned block) const {
      if constexpr (Rowwise) {
        auto* kernel = rms_norm_quantize_kernel<In, W, HasResidual, Norm, Fp8, Saturated, ScaleT, ScaleProgram, Chain, Threads, E, U>;
        Launch(grid, block).stream(stream).programmatic().run(kernel, p);
      } else {
        if (once<Threads, E, U>(block)) return;
        wants_y = p.y == nullptr;
        if (wants_y) return;
        p.blocks = grid;
        const unsigned partials = tensor_blocks(grid, block, device);
        Launch(partials, block).stream(stream).programmatic().run(rms_norm_amax_kernel<In, W, HasResidual, Norm, Threads, E, U>, p);
        cast_rows<In, Fp8, Saturated, ScaleT, ScaleProgram, Chain>(p, partials, device, E == 8);
      }
    }
  };
};

}  // namespace inductor_ext
