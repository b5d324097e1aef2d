// RMSNorm or LayerNorm, with or without a residual added before it, and FP8 with a dynamic scale a row, in one pass over memory.
//
//   total = round(x + residual);  r = rsqrt(mean(total²) + eps);  y = norm(total * r), rounded to x's dtype
//   scale = scale_program(max |y|);  out = cast(program(y, scale))
//
//   x, residual [R, C] (leading dims may be several), unit last stride, row pitch free; weight, bias [C] contiguous
//   factor, shift [S, C] likewise with a pitch, each of their rows for R / S consecutive rows of x
//   out [R, C], scale R elements, total and kept [R, C] like x, all with a row pitch of C; without a residual total is not touched
//   C up to 32 768; c0..c7 are the constants of both programs
//   MXFP8 (MxScale): C a multiple of 32, scale [R, C / 32]
//
// Sum::kWide norms the sum as it is in fp32, and total is its rounding. A centred row loses its mean first. kKeep writes y to `kept`.
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

struct NormQuantizeParams {
  const void* x;
  const void* residual;
  const void* operand[4];  // by NormOperand
  uint8_t* out;
  void* scale;
  void* total;
  void* kept;
  int64_t rows, cols;  // cols in vectors
  int64_t x_pitch, residual_pitch, operand_pitch[4];
  int64_t sample_rows;
  Divisor samples;  // by sample_rows, where there are fewer than 2^31 rows
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

enum class Sum { kNone, kRounded, kWide };

// All that a row is compiled for: the dtypes of x, of weight and bias, of factor and shift; how it is summed and normalised.
template <typename In_, typename W_, typename M_, Sum kSum_, bool kCentred_, typename Norm_, bool kKeep_>
struct NormRow {
  using In = In_;
  using W = W_;
  using M = M_;
  using Norm = AnyNorm<Norm_>;
  static constexpr Sum kSum = kSum_;
  static constexpr bool kResidual = kSum_ != Sum::kNone, kCentred = kCentred_, kKeep = kKeep_;
};

template <bool kSecond, typename A, typename B>
__device__ __forceinline__ auto& one_of(A& a, B& b) {
  if constexpr (kSecond) {
    return b;
  } else {
    return a;
  }
}

// One operand of a row's norm: [C] of U vectors, or nothing where the norm has none.
template <typename Row, NormOperand kOf, int E, int U>
struct RowOperand {
  using T = OperandType<Row, kOf>;
  static constexpr bool kThere = Row::Norm::reads(kOf);
  Raw<T, E> raw[kThere ? U : 1];

  __device__ __forceinline__ void load(const NormQuantizeParams& p, int64_t sample, int u, int i, bool there) {
    if constexpr (kThere) {
      raw[u].zero();
      if (!there) return;
      const T* first = static_cast<const T*>(p.operand[kOf]);
      if constexpr (kOf >= kFactor) first += sample * p.operand_pitch[kOf];
      raw[u].load(first + i * E);
    }
  }
};

template <typename Row, int E, int U>
struct RowOperands : RowOperand<Row, kWeight, E, U>, RowOperand<Row, kBias, E, U>, RowOperand<Row, kFactor, E, U>, RowOperand<Row, kShift, E, U> {
  template <NormOperand kOf>
  using Of = RowOperand<Row, kOf, E, U>;
  static constexpr bool kOfSample = Row::Norm::reads(kFactor) || Row::Norm::reads(kShift);

  // Which row of factor and shift is this row's. A division of 64 bits for every load took more instructions than all the rest.
  __device__ static __forceinline__ int64_t sample_of(const NormQuantizeParams& p, int64_t row) {
    if (!kOfSample || row < 0) return 0;
    if (p.rows >> 31) return row / p.sample_rows;
    uint32_t left;
    return p.samples.divide(static_cast<uint32_t>(row), &left);
  }
  template <bool kWhole, int Threads>
  __device__ __forceinline__ void load(const NormQuantizeParams& p, int64_t sample, const RowPlace<Threads>& place, int u) {
    const int i = u * place.threads + place.lane;
    const bool there = has_vector<kWhole>(place, u, static_cast<int>(p.cols));
    Of<kWeight>::load(p, sample, u, i, there), Of<kBias>::load(p, sample, u, i, there);
    Of<kFactor>::load(p, sample, u, i, there), Of<kShift>::load(p, sample, u, i, there);
  }

  struct Vector {
    const RowOperands& all;
    int u;
    template <NormOperand kOf>
    __device__ __forceinline__ const auto& raw() const { return static_cast<const Of<kOf>&>(all).raw[u]; }
  };
  __device__ __forceinline__ Vector vector(int u) const { return {*this, u}; }
};

template <typename Row>
constexpr int kSharedSum = Row::kCentred ? 64 : 32;

// What a row is made of, as memory holds it.
template <typename Row, Pass kPass, int E, int U>
struct RowInputs {
  using In = typename Row::In;
  static constexpr bool kTotal = Row::kSum == Sum::kRounded && kPass == Pass::kAgain;  // read where it was written
  static constexpr bool kResidual = Row::kResidual && !kTotal;
  Raw<In, E> x[U], residual[kResidual ? U : 1];

  template <bool kWhole, int Threads>
  __device__ __forceinline__ void load(const NormQuantizeParams& p, const RowPlace<Threads>& place) {
    const int cols = static_cast<int>(p.cols), first = place.lane * E, step = place.threads * E;
    const In* at = kTotal ? static_cast<const In*>(p.total) + place.row * p.cols * E + first : static_cast<const In*>(p.x) + place.row * p.x_pitch + first;
#pragma unroll
    for (int u = 0; u < U; ++u, at += step) {
      x[u].zero();
      if (!has_vector<kWhole>(place, u, cols)) continue;
      if constexpr (kTotal) {
        x[u] = reinterpret_cast<const Aligned<In, E>*>(at)->raw;
      } else {
        x[u].load(at);
      }
    }
    if constexpr (kResidual) {
      at = static_cast<const In*>(p.residual) + place.row * p.residual_pitch + first;
#pragma unroll
      for (int u = 0; u < U; ++u, at += step) {
        residual[u].zero();
        if (has_vector<kWhole>(place, u, cols)) residual[u].load(at);
      }
    }
  }
};

// y of one row, and its total to memory. `shared_sum` has kSharedSum words. `summed()` is called once the inputs are used up,
// `between(u)` before the last sum is known.
template <bool kWhole, typename Row, Pass kPass, int Threads, int E, int U, typename Summed, typename Between>
__device__ __forceinline__ void norm_inputs(const NormQuantizeParams& p, const RowPlace<Threads>& place, float* shared_sum,
                                            const RowInputs<Row, kPass, E, U>& inputs, const RowOperands<Row, E, U>& operands,
                                            Raw<typename Row::In, E> (&raw)[U], Summed&& summed, Between&& between) {
  using In = typename Row::In;
  constexpr bool kWide = Row::kSum == Sum::kWide;
  const int64_t row = place.row;
  const bool active = row >= 0;
  const int cols = static_cast<int>(p.cols);
  const auto there = [&](int u) { return has_vector<kWhole>(place, u, cols); };
  Raw<float, E> wide[kWide ? U : 1];
  auto& value = one_of<kWide>(raw, wide);  // what is normalised

#pragma unroll
  for (int u = 0; u < U; ++u) {
    raw[u] = inputs.x[u];
    if constexpr (RowInputs<Row, kPass, E, U>::kResidual) {
      const int i = u * place.threads + place.lane;
      float a[E], b[E];
      raw[u].unpack(a), inputs.residual[u].unpack(b);
#pragma unroll
      for (int e = 0; e < E; ++e) a[e] = __fadd_rn(a[e], b[e]);
      raw[u].pack(a);
      if constexpr (kWide) wide[u].pack(a);
      if (kPass != Pass::kAgain && there(u)) raw[u].store(static_cast<In*>(p.total) + (row * p.cols + i) * E);
    }
  }
  summed();

  float mean = 0.f;
  if constexpr (Row::kCentred) {
    float sum = 0.f;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float v[E];
      value[u].unpack(v);
#pragma unroll
      for (int e = 0; e < E; ++e) sum += v[e];
    }
    mean = row_sum<Threads>(sum, shared_sum, place.threads) * p.per_column;
    shared_sum += 32;
  }
  float sum = 0.f;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    float v[E];
    value[u].unpack(v);
    if constexpr (Row::kCentred) {
#pragma unroll
      for (int e = 0; e < E; ++e) v[e] = __fadd_rn(v[e], -mean);
    }
    if (!Row::kCentred || kWhole || there(u)) {  // else zeros, less the mean
#pragma unroll
      for (int e = 0; e < E; ++e) sum = fmaf(v[e], v[e], sum);
    }
    between(u);
  }
  sum = row_sum<Threads>(sum, shared_sum, place.threads);
  const float factor = rsqrtf(sum * p.per_column + p.eps);

#pragma unroll
  for (int u = 0; u < U; ++u) {
    float v[E];
    value[u].unpack(v);
    if constexpr (Row::kCentred) {
#pragma unroll
      for (int e = 0; e < E; ++e) v[e] = __fadd_rn(v[e], -mean);
    }
#pragma unroll
    for (int e = 0; e < E; ++e) v[e] = __fmul_rn(v[e], factor);
    Row::Norm::template apply<Row>(v, operands.vector(u), raw[u]);
    const int i = u * place.threads + place.lane;
    if (Row::kCentred ? !there(u) : !active) raw[u].zero();  // zeros less the mean, or times an infinity, are no longer zeros
    if constexpr (Row::kKeep && kPass != Pass::kAgain) {
      if (there(u)) raw[u].store(static_cast<In*>(p.kept) + (row * p.cols + i) * E);
    }
  }
}

// The same from memory.
template <typename Row, Pass kPass = Pass::kOnly, int Threads, int E, int U>
__device__ __forceinline__ void norm_row(const NormQuantizeParams& p, const RowPlace<Threads>& place, float* shared_sum,
                                         Raw<typename Row::In, E> (&raw)[U]) {
  constexpr bool kOperandsFirst = U * E <= 8;  // else their registers are the residual's until the sum is made
  RowInputs<Row, kPass, E, U> inputs;
  RowOperands<Row, E, U> operands;
  const int64_t sample = operands.sample_of(p, place.row);
  const auto load = [&](int u) { operands.template load<false>(p, sample, place, u); };
  inputs.template load<false>(p, place);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (kOperandsFirst) load(u);
  }
  norm_inputs<false>(
      p, place, shared_sum, inputs, operands, raw,
      [] {
        if constexpr (kPass == Pass::kOnly) allow_next_kernel();
      },
      [&](int u) {
        if (!kOperandsFirst) load(u);
      });
}

template <typename Row, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int Threads, int E, int U>
__global__ void __launch_bounds__(Threads == kWholeBlock ? 1024 : kRowsBlock)
    norm_quantize_kernel(const __grid_constant__ NormQuantizeParams p) {
  __shared__ uint32_t shared_max[32];
  __shared__ float shared_sum[kSharedSum<Row>];
  const auto place = RowPlace<Threads>::of(p.rows, blockIdx.x);
  Raw<typename Row::In, E> y[U];
  wait_for_previous_kernel();
  norm_row<Row>(p, place, shared_sum, y);
  quantize_row<Threads, Fp8, Saturated, ScaleT, ScaleProgram, Chain>(
      y, place, p.consts, shared_max, p.cols, static_cast<ScaleT*>(p.scale) + place.row * scales_of_row<ScaleProgram>(p.cols * E),
      p.out + place.row * p.cols * E);
}

// Norms whose rows share more than a weight, or that take two sums. As many blocks as fill the GPU take the rows in turn: operands
// stay in registers, and the next row is on its way while one is normalised. Only rows that are all vectors of their threads: no
// vector is then asked whether it is there.
template <typename Row, int E, int U>
constexpr bool kWalksRow = E == 8 && U == 4 && (Row::kCentred || Row::Norm::reads(kBias) || Row::Norm::reads(kFactor) || Row::Norm::reads(kShift));
template <typename Row>
constexpr int kWalkThreads = Row::kResidual ? 512 : 640;  // of an SM: 128 and 96 registers each

template <typename Row, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int Threads, int E, int U>
__global__ void __launch_bounds__(Threads == kWholeBlock ? kWalkThreads<Row> : kRowsBlock, Threads == kWholeBlock ? 1 : kWalkThreads<Row> / kRowsBlock)
    norm_quantize_walk_kernel(const __grid_constant__ NormQuantizeParams p) {
  __shared__ uint32_t shared_max[32];
  __shared__ float shared_sum[kSharedSum<Row>];
  auto next = RowPlace<Threads>::of(p.rows, blockIdx.x);
  RowInputs<Row, Pass::kOnly, E, U> inputs;
  RowOperands<Row, E, U> operands;
  int64_t sample = -1;
  wait_for_previous_kernel();
  inputs.template load<true>(p, next);
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const auto place = next;
    uint32_t left;
    const int64_t wanted = !operands.kOfSample || place.row < 0 ? 0 : p.samples.divide(static_cast<uint32_t>(place.row), &left);
    if (wanted != sample) {
      sample = wanted;
#pragma unroll
      for (int u = 0; u < U; ++u) operands.template load<true>(p, sample, place, u);
    }
    Raw<typename Row::In, E> y[U];
    norm_inputs<true>(
        p, place, shared_sum, inputs, operands, y,
        [&] {
          if (block + gridDim.x < p.blocks) {
            next = RowPlace<Threads>::of(p.rows, block + gridDim.x);
            inputs.template load<true>(p, next);
          } else {
            allow_next_kernel();
          }
        },
        [](int) {});
    quantize_row<Threads, Fp8, Saturated, ScaleT, ScaleProgram, Chain, true>(
        y, place, p.consts, shared_max, p.cols, static_cast<ScaleT*>(p.scale) + place.row * scales_of_row<ScaleProgram>(p.cols * E),
        p.out + place.row * p.cols * E);
    if constexpr (Threads == kWholeBlock && kIsMx<ScaleProgram> && !Row::kCentred) __syncthreads();  // one sum, and no maximum between
  }
}

template <typename Row, int Threads, int E, int U>
__global__ void __launch_bounds__(Threads == kWholeBlock ? 1024 : kRowsBlock)
    norm_amax_kernel(const __grid_constant__ NormQuantizeParams p) {
  using In = typename Row::In;
  __shared__ float shared_sum[kSharedSum<Row>];
  wait_for_previous_kernel();
  rows_of_tensor<Threads, In, E, U>(p.rows, p.cols, p.blocks, static_cast<In*>(p.y), p.partial,
                                    [&](const RowPlace<Threads>& place, Raw<In, E>(&y)[U]) { norm_row<Row>(p, place, shared_sum, y); });
}

// One scale in one launch. Rows lie in the same threads as in two, so that the mean has the same order of summation.
template <typename Row, int Threads, int E, int U>
struct NormOnce : OnceWork<typename Row::In> {
  using In = typename Row::In;
  const NormQuantizeParams& p;
  float* shared_sum;  // 2 × 32: a warp may be a turn ahead of the others of its row, but not two sums
  int half = 0;

  __device__ __forceinline__ NormOnce(const NormQuantizeParams& p, float* shared_sum) : p(p), shared_sum(shared_sum) {}
  __device__ __forceinline__ RowPlace<Threads> place(uint32_t block) const { return RowPlace<Threads>::of(p.rows, block, p.row_threads); }
  __device__ __forceinline__ void y(uint32_t block, bool again, Raw<In, E> (&raw)[U]) {
    if constexpr (!Row::kCentred) half ^= 32;  // it takes both in turn by itself
    if (again) {
      norm_row<Row, Pass::kAgain>(p, place(block), shared_sum + half, raw);
    } else {
      norm_row<Row, Pass::kFirst>(p, place(block), shared_sum + half, raw);
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
template <typename Row>
constexpr bool kNormInFp32 = sizeof(typename Row::In) == 4 || Row::kSum == Sum::kWide;

template <typename Row, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int Threads, int E, int U>
__global__ void __launch_bounds__(kNormOnceThreads<U>, U == 1 || kNormInFp32<Row> ? 1 : 2)
    norm_quantize_once_kernel(const __grid_constant__ NormQuantizeParams p) {
  using In = typename Row::In;
  __shared__ float shared_sum[64];
  quantize_once<In, Fp8, Saturated, ScaleT, ScaleProgram, Chain, E, U>(
      p.once, dynamic_shared_memory<Aligned<In, E>>(), NormOnce<Row, Threads, E, U>(p, shared_sum));
}

inline void check_size(const TensorView& view, const char* name, int64_t wanted) {
  if (view.numel() != wanted) TVM_FFI_THROW(ValueError) << name << ": wanted " << wanted << " elements, found shape " << shape_of(view);
}

// What a call of any mode is given besides its quantisation.
struct NormCall {
  const TensorView& x;
  const Optional<TensorView>& residual;
  const Optional<TensorView> (&operand)[4];  // by NormOperand
  double eps;
  const TensorView& out;
  const TensorView& total;
  const Optional<TensorView>& kept;
};

// Host: checks it, and puts it into `p`.
template <typename Row, typename Fp8>
Rows take_norm(NormQuantizeParams& p, const NormCall& call, Device& device) {
  using In = typename Row::In;
  static constexpr const char* kNames[4] = {"weight", "bias", "factor", "shift"};
  TensorMatcher().dtype<In>().device(device).verify(call.x, "x");
  const Rows rows = rows_of(call.x, "x");
  const auto given = [](const Optional<TensorView>& tensor, const char* name) -> const TensorView& {
    if (!tensor.has_value()) TVM_FFI_THROW(ValueError) << name << ": wanted a tensor, found None";
    return *tensor;
  };
  const auto whole = [&](const TensorView& tensor, const char* name) {
    TensorMatcher().dtype<In>().contiguous().device(device).verify(tensor, name);
    check_size(tensor, name, rows.rows * rows.cols);
    return data(tensor);
  };
  p.sample_rows = 1;
  for (int of = 0; of < 4; ++of) {
    if (!Row::Norm::reads(static_cast<NormOperand>(of))) continue;
    const TensorView& operand = given(call.operand[of], kNames[of]);
    p.operand[of] = data(operand);
    if (of < kFactor) {
      TensorMatcher({rows.cols}).template dtype<typename Row::W>().contiguous().device(device).verify(operand, kNames[of]);
      continue;
    }
    TensorMatcher().template dtype<typename Row::M>().device(device).verify(operand, kNames[of]);
    const Rows samples = rows_of(operand, kNames[of]);
    const int64_t each = samples.rows == 0 ? 0 : rows.rows / samples.rows;
    const bool alike = of == kFactor || !Row::Norm::reads(kFactor) || each == p.sample_rows;
    if (samples.cols != rows.cols || each * samples.rows != rows.rows || !alike) {
      TVM_FFI_THROW(ValueError) << kNames[of] << ": wanted a row for as many rows of x each, " << shape_of(call.x) << ", found " << shape_of(operand);
    }
    p.sample_rows = each > 0 ? each : 1, p.samples = Divisor::of(p.sample_rows), p.operand_pitch[of] = samples.pitch;
  }
  TensorMatcher().dtype<Fp8>().contiguous().device(device).verify(call.out, "out");
  if constexpr (Row::kResidual) {
    const TensorView& added = given(call.residual, "residual");
    TensorMatcher().dtype<In>().device(device).verify(added, "residual");
    const Rows other = rows_of(added, "residual");
    if (other.rows != rows.rows || other.cols != rows.cols) {
      TVM_FFI_THROW(ValueError) << "residual: wanted the shape of x, " << shape_of(call.x) << ", found " << shape_of(added);
    }
    p.residual = data(added), p.residual_pitch = other.pitch, p.total = whole(call.total, "total");
  }
  if constexpr (Row::kKeep) p.kept = whole(given(call.kept, "y"), "y");
  if (rows.cols == 0 || rows.cols > 32768) {
    TVM_FFI_THROW(ValueError) << "x: wanted 1 to 32768 columns, found shape " << shape_of(call.x);
  }
  p.x = data(call.x), p.out = data<uint8_t>(call.out);
  p.rows = rows.rows, p.cols = rows.cols, p.x_pitch = rows.pitch;
  p.eps = static_cast<float>(call.eps), p.per_column = 1.0f / static_cast<float>(rows.cols);
  return rows;
}

// Host: whether whole vectors of eight can be loaded and stored.
template <typename Row>
bool norm_in_vectors(const NormQuantizeParams& p) {
  const auto rows_aligned = [](const void* pointer, int64_t pitch, size_t size) { return aligned(pointer, 16) && pitch * size % 16 == 0; };
  constexpr size_t kSize = sizeof(typename Row::In);
  bool all = p.cols % 8 == 0 && rows_aligned(p.x, p.x_pitch, kSize) && aligned(p.out, 8);
  for (int of = 0; of < 4; ++of) all = all && rows_aligned(p.operand[of], p.operand_pitch[of], of < kFactor ? 16 : sizeof(typename Row::M));
  if constexpr (Row::kResidual) all = all && rows_aligned(p.residual, p.residual_pitch, kSize) && aligned(p.total, 16);
  return all && (!Row::kKeep || aligned(p.kept, 16));
}

template <typename Row, bool Rowwise, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Program>
struct NormQuantize {
  static_assert(!Program::kRow && !ScaleProgram::kRow, "norm_quantize has no operands of a value a row");
  using Chain = ToFp8<Program>;
  using In = typename Row::In;

  // For a tensor with one scale `partial` is given. True: nothing has been done, for want of `y`.
  static bool run(TensorView x, Optional<TensorView> residual, Optional<TensorView> weight, Optional<TensorView> bias,
                  Optional<TensorView> factor, Optional<TensorView> shift, double eps, TensorView out, TensorView scale, TensorView total,
                  Optional<TensorView> kept, Optional<TensorView> y, Optional<TensorView> partial, Optional<TensorView> bound, double c0, double c1,
                  double c2, double c3, double c4, double c5, double c6, double c7) {
    Device device;
    NormQuantizeParams p{};
    const Rows rows = take_norm<Row, Fp8>(p, {x, residual, {weight, bias, factor, shift}, eps, out, total, kept}, device);
    TensorMatcher().dtype<ScaleT>().contiguous().device(device).verify(scale, "scale");
    check_size(out, "out", rows.rows * rows.cols), check_size(scale, "scale", Rowwise ? rows.rows * scales_of_row<ScaleProgram>(rows.cols) : 1);
    if (kIsMx<ScaleProgram> && rows.cols % mx::kBlock != 0) {
      TVM_FFI_THROW(ValueError) << "x: wanted rows of a multiple of " << mx::kBlock << " elements, found shape " << shape_of(x);
    }
    if (rows.rows == 0 && !Rowwise) TVM_FFI_THROW(ValueError) << "x: wanted at least one row, since an empty tensor has no maximum";
    if (rows.rows == 0) return false;

    const double constants[kMaxConsts] = {c0, c1, c2, c3, c4, c5, c6, c7};
    p.scale = data(scale), p.consts = Consts::of(constants, take_bound<ScaleProgram, Program>(bound, device));
    if constexpr (!Rowwise) {
      p.partial = tensor_partials(*partial, device);
      if (y.has_value()) p.y = tensor_y<In>(*y, rows.rows * rows.cols, device);
      p.once = OnceParams{p.out, p.scale, p.partial, 0, 0, p.consts};
    }
    const bool vectors = norm_in_vectors<Row>(p);
    DeviceGuard guard(device.id());
    cudaStream_t stream = env_stream(device.id());
    if (vectors) p.cols /= 8;
    bool wants_y = false;
    with_row_shape(rows.rows, rows.cols, vectors, sm_count(device.id()), Start{p, stream, device.id(), wants_y});
    return wants_y;
  }

 private:
  struct Start {
    NormQuantizeParams& p;
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
        auto* kernel = norm_quantize_once_kernel<Row, Fp8, Saturated, ScaleT, ScaleProgram, Chain, kThreads, E, U>;
        return launch_once(kernel, plans, p, ceil_div(p.rows, parts), threads, threads * U * sizeof(Aligned<In, E>), device);
      }
      return false;
    }
    template <int Threads, int E, int U>
    bool walk(unsigned grid, unsigned block) const {
      if constexpr (kWalksRow<Row, E, U>) {
        const unsigned resident = kWalkThreads<Row> / block * static_cast<unsigned>(sm_count(device));
        const int threads = Threads == kWholeBlock ? block : Threads;
        if (grid <= resident || resident == 0 || p.cols != threads * U || p.rows >> 31) return false;
        const auto turns = ceil_div(grid, resident);
        p.blocks = grid;
        auto* kernel = norm_quantize_walk_kernel<Row, Fp8, Saturated, ScaleT, ScaleProgram, Chain, Threads, E, U>;
        Launch(static_cast<unsigned>(ceil_div(grid, turns)), block).stream(stream).programmatic().run(kernel, p);
        return true;
      }
      return false;
    }
    template <int Threads, int E, int U>
    void operator()(unsigned grid, unsigned block) const {
      if constexpr (Rowwise) {
        if (walk<Threads, E, U>(grid, block)) return;
        auto* kernel = norm_quantize_kernel<Row, Fp8, Saturated, ScaleT, ScaleProgram, Chain, Threads, E, U>;
        Launch(grid, block).stream(stream).programmatic().run(kernel, p);
      } else {
        if (once<Threads, E, U>(block)) return;
        wants_y = p.y == nullptr;
        if (wants_y) return;
        p.blocks = grid;
        const unsigned partials = tensor_blocks(grid, block, device);
        Launch(partials, block).stream(stream).programmatic().run(norm_amax_kernel<Row, Threads, E, U>, p);
        cast_rows<In, Fp8, Saturated, ScaleT, ScaleProgram, Chain>(p, partials, device, E == 8);
      }
    }
  };
};

}  // namespace inductor_ext
