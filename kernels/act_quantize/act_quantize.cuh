// An activation, gated or not, and FP8 with a dynamic scale a row, in one pass over memory.
//
//   y = form(gate, up);  scale = scale_program(max |y|);  out = cast(program(y, scale))
//
//   gate, up [R, C] (leading dims may be several), unit last stride, row pitch free each; out [R, C] contiguous, scale R elements
//   without a gate there is no up; Inputs::kPairs has both in gate, [R, 2C], in neighbouring columns
//   C up to 32 768; c0..c7 are the constants of both programs
//   MXFP8 (MxScale): C a multiple of 32, scale [R, C / 32]
//
// With one scale for the whole tensor one launch keeps y on the chip (quantize_once.cuh), or y goes to memory and a second launch
// casts it: rows that are not whole aligned vectors, and a y of which little would be kept.
//
// Forms are those of activation.cuh. GELU and its like of bf16 come off a table where there are rows enough (act_table.cuh).
#pragma once

#include <tvm/ffi/function.h>

#include "inductor_ext/act_table.cuh"
#include "inductor_ext/activation.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/quantize_row.cuh"
#include "inductor_ext/tensor.h"

namespace inductor_ext {

struct ActQuantizeParams {
  const void* gate;
  const void* up;
  uint8_t* out;
  void* scale;
  int64_t rows, cols;  // cols in vectors
  int64_t gate_pitch, up_pitch;
  Consts consts;
  // of a tensor with one scale: y [R, C], a maximum a block, and how many blocks of rows there are
  void* y;
  float* partial;
  int64_t blocks;
  OnceParams once;
  Divisor columns;  // a row's vectors
  uint32_t count;   // vectors of all rows
  int row_threads;
};

enum class Inputs { kOne, kTwo, kPairs };

// All that y is compiled for: its dtype, how it is computed, and of what.
template <typename In_, typename Form_, Inputs kInputs_>
struct ActRow {
  using In = In_;
  using Form = Form_;
  static constexpr Inputs kInputs = kInputs_;

  // Vector i of a row.
  template <int E>
  __device__ static __forceinline__ void load(const ActQuantizeParams& p, int64_t row, int64_t i, Raw<In, E>& gate, Raw<In, E>& up) {
    const In* first = static_cast<const In*>(p.gate) + row * p.gate_pitch;
    if constexpr (kInputs == Inputs::kPairs) {
      Raw<In, E> low, high;
      low.load(first + 2 * i * E), high.load(first + (2 * i + 1) * E);
      constexpr int kWords = Raw<In, E>::kWords;
      const auto word = [&](int w) { return w < kWords ? low.words[w % kWords] : high.words[w % kWords]; };
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint32_t one = word(2 * w), two = word(2 * w + 1);
        if constexpr (sizeof(In) == 4 || E == 1) {
          gate.words[w] = one, up.words[w] = two;
        } else {
          gate.words[w] = (one & 0xffffu) | two << 16, up.words[w] = one >> 16 | (two & 0xffff0000u);
        }
      }
    } else {
      gate.load(first + i * E);
      if constexpr (kInputs == Inputs::kTwo) up.load(static_cast<const In*>(p.up) + row * p.up_pitch + i * E);
    }
  }
  template <int E, int U>
  __device__ static __forceinline__ void activate(Raw<In, E> (&y)[U], const Raw<In, E> (&up)[U]) {
#pragma unroll
    for (int u = 0; u < U; ++u) Form_::template apply<In>(y[u], up[u]);
  }
};

// y of one row.
template <typename Row, int Threads, int E, int U>
__device__ __forceinline__ void act_row(const ActQuantizeParams& p, const RowPlace<Threads>& place, Raw<typename Row::In, E> (&y)[U]) {
  Raw<typename Row::In, E> up[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int i = u * place.threads + place.lane;
    y[u].zero(), up[u].zero();
    if (place.row >= 0 && i < p.cols) Row::load(p, place.row, i, y[u], up[u]);
  }
  allow_next_kernel();
  Row::activate(y, up);
}

template <typename Row, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int Threads, int E, int U>
__global__ void __launch_bounds__(Threads == kWholeBlock ? 1024 : kRowsBlock)
    act_quantize_kernel(const __grid_constant__ ActQuantizeParams p) {
  __shared__ uint32_t shared[32];
  const auto place = RowPlace<Threads>::of(p.rows, blockIdx.x);
  Raw<typename Row::In, E> y[U];
  wait_for_previous_kernel();
  act_row<Row>(p, place, y);
  quantize_row<Threads, Fp8, Saturated, ScaleT, ScaleProgram, Chain>(
      y, place, p.consts, shared, p.cols, static_cast<ScaleT*>(p.scale) + place.row * scales_of_row<ScaleProgram>(p.cols * E),
      p.out + place.row * p.cols * E);
}

// Where a form has a table: a block an SM, which fills it and takes rows in turn, as many at once as it has threads for.
template <typename Row, int E, int U>
constexpr bool kWalks = std::is_same_v<typename Row::In, __nv_bfloat16> && Tabled<typename Row::Form>::kThere && E == 8 && U == 4;
// So many elements for every SM: fewer are computed before a table is filled.
constexpr int64_t kWorthATable = 16384;

// kWhole: a row is all vectors of its threads. `load(place, y, up)` reads one, `activated(place, u)` says whether vector u is to be.
template <bool kWhole, typename Row, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int Threads, int E,
          int U, typename Params, typename Load, typename Activated>
__device__ __forceinline__ void walk_rows(const Params& p, Load&& load, Activated&& activated) {
  using In = typename Row::In;
  using Form = Tabled<typename Row::Form>;
  constexpr bool kAhead = Row::kInputs == Inputs::kOne;  // two inputs of two rows are more registers than there are
  __shared__ typename Form::Table table;
  __shared__ uint32_t shared[64];
  table.fill();
  __syncthreads();

  auto next = RowPlace<Threads>::of(p.rows, blockIdx.x, p.row_threads);
  Raw<In, E> y[U], ahead[kAhead ? U : 1], up[kAhead ? 1 : U];
  wait_for_previous_kernel();
  if constexpr (kAhead) load(next, ahead, up);
  uint32_t* maxima = shared;  // one half and the other in turn: a warp may be a row ahead of the others of its row
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x, maxima = maxima == shared ? shared + 32 : shared) {
    const auto place = next;
    const bool last = block + gridDim.x >= p.blocks;
    if (!last) next = RowPlace<Threads>::of(p.rows, block + gridDim.x, p.row_threads);
    if constexpr (kAhead) {
#pragma unroll
      for (int u = 0; u < U; ++u) y[u] = ahead[u];
      if (!last) load(next, ahead, up);
    } else {
      load(place, y, up);
    }
    if (last) allow_next_kernel();
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (activated(place, u)) Form::apply(table, y[u], up[kAhead ? 0 : u]);
    }
    quantize_row<Threads, Fp8, Saturated, ScaleT, ScaleProgram, Chain, kWhole>(
        y, place, p.consts, maxima, p.cols, static_cast<ScaleT*>(p.scale) + place.row * scales_of_row<ScaleProgram>(p.cols * E),
        p.out + place.row * p.cols * E);
  }
}

template <bool kWhole, typename Row, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int Threads, int E,
          int U>
__global__ void __launch_bounds__(1024) act_quantize_walk_kernel(const __grid_constant__ ActQuantizeParams p) {
  using In = typename Row::In;
  const auto load = [&](const RowPlace<Threads>& place, auto& y, auto& up) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      Raw<In, E>& other = up[Row::kInputs == Inputs::kOne ? 0 : u];
      y[u].zero(), other.zero();
      if (has_vector<kWhole>(place, u, static_cast<int>(p.cols))) Row::load(p, place.row, u * place.threads + place.lane, y[u], other);
    }
  };
  walk_rows<kWhole, Row, Fp8, Saturated, ScaleT, ScaleProgram, Chain, Threads, E, U>(p, load, [](const auto&, int) { return true; });
}

// Host: starts one of the kernels `whole` and `parts` for rows of `threads` threads with U vectors each; false: too few elements.
template <int U, typename Kernel, typename Params>
bool walk(Kernel* whole, Kernel* parts, Params& p, int64_t columns, int threads, cudaStream_t stream, int device) {
  const int sms = sm_count(device);
  if (p.rows * columns < kWorthATable * sms) return false;
  p.row_threads = threads, p.blocks = ceil_div(p.rows, parts_of_block(threads));
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>(p.blocks, sms));
  Launch(grid, parts_of_block(threads) * threads).stream(stream).programmatic().run(p.cols == U * threads ? whole : parts, p);
  return true;
}

template <typename Row, int Threads, int E, int U>
__global__ void __launch_bounds__(Threads == kWholeBlock ? 1024 : kRowsBlock)
    act_amax_kernel(const __grid_constant__ ActQuantizeParams p) {
  using In = typename Row::In;
  wait_for_previous_kernel();
  rows_of_tensor<Threads, In, E, U>(p.rows, p.cols, p.blocks, static_cast<In*>(p.y), p.partial,
                                    [&](const RowPlace<Threads>& place, Raw<In, E>(&y)[U]) { act_row<Row>(p, place, y); });
}

// One scale in one launch: vectors of all rows one after the other, the last ones first.
template <typename Row, int E, int U>
struct ActOnce : OnceWork<typename Row::In> {
  using In = typename Row::In;
  const ActQuantizeParams& p;

  __device__ __forceinline__ explicit ActOnce(const ActQuantizeParams& p) : p(p) {}
  __device__ __forceinline__ uint32_t vector(uint32_t block, int u) const {
    return ((p.once.blocks - 1 - block) * U + u) * blockDim.x + threadIdx.x;
  }
  __device__ __forceinline__ void y(uint32_t block, bool, Raw<In, E> (&raw)[U]) const {
    Raw<In, E> up[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const uint32_t i = vector(block, u);
      uint32_t column;
      const int64_t row = p.columns.divide(i, &column);
      raw[u].zero(), up[u].zero();
      if (i < p.count) Row::load(p, row, column, raw[u], up[u]);
    }
    Row::activate(raw, up);
  }
  __device__ __forceinline__ int64_t at(uint32_t block, int u) const {
    const uint32_t i = vector(block, u);
    return i < p.count ? static_cast<int64_t>(i) * E : -1;
  }
};

template <typename Row, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int E, int U>
__global__ void __launch_bounds__(kOnceThreads, sizeof(typename Row::In) == 4 ? 1 : 2)
    act_quantize_once_kernel(const __grid_constant__ ActQuantizeParams p) {
  using In = typename Row::In;
  quantize_once<In, Fp8, Saturated, ScaleT, ScaleProgram, Chain, E, U>(p.once, dynamic_shared_memory<Aligned<In, E>>(),
                                                                       ActOnce<Row, E, U>(p));
}

// Host: checks what every mode is given, and puts it into `p`.
template <typename Row, typename Fp8>
Rows take_inputs(ActQuantizeParams& p, const TensorView& gate, const Optional<TensorView>& up, const TensorView& out, Device& device) {
  using In = typename Row::In;
  TensorMatcher().dtype<In>().device(device).verify(gate, "gate");
  TensorMatcher().dtype<Fp8>().contiguous().device(device).verify(out, "out");
  Rows rows = rows_of(gate, "gate");
  p.gate = data(gate), p.gate_pitch = rows.pitch;
  if constexpr (Row::kInputs == Inputs::kPairs) {
    if (rows.cols % 2 != 0) TVM_FFI_THROW(ValueError) << "gate: wanted pairs of columns, found shape " << shape_of(gate);
    rows.cols /= 2;
  }
  if constexpr (Row::kInputs == Inputs::kTwo) {
    if (!up.has_value()) TVM_FFI_THROW(ValueError) << "up: wanted a tensor, found None";
    TensorMatcher().dtype<In>().device(device).verify(*up, "up");
    const Rows other = rows_of(*up, "up");
    if (other.rows != rows.rows || other.cols != rows.cols) {
      TVM_FFI_THROW(ValueError) << "up: wanted the shape of gate, " << shape_of(gate) << ", found " << shape_of(*up);
    }
    p.up = data(*up), p.up_pitch = other.pitch;
  }
  if (rows.cols == 0 || rows.cols > 32768) {
    TVM_FFI_THROW(ValueError) << "gate: wanted 1 to 32768 columns, found shape " << shape_of(gate);
  }
  p.out = data<uint8_t>(out), p.rows = rows.rows, p.cols = rows.cols;
  return rows;
}

// Host: whether whole vectors of eight can be loaded and stored.
template <typename Row>
bool inputs_in_vectors(const ActQuantizeParams& p) {
  const auto rows_aligned = [](const void* pointer, int64_t pitch) {
    return aligned(pointer, 16) && pitch * sizeof(typename Row::In) % 16 == 0;
  };
  return p.cols % 8 == 0 && rows_aligned(p.gate, p.gate_pitch) && rows_aligned(p.up, p.up_pitch) && aligned(p.out, 8);
}

template <typename Row, bool Rowwise, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Program>
struct ActQuantize {
  static_assert(!Program::kRow && !ScaleProgram::kRow, "act_quantize has no operands of a value a row");
  using Chain = ToFp8<Program>;
  using In = typename Row::In;

  // For a tensor with one scale `partial` is given. True: nothing has been done, for want of `y`.
  static bool run(TensorView gate, Optional<TensorView> up, TensorView out, TensorView scale, Optional<TensorView> y, Optional<TensorView> partial,
                  Optional<TensorView> bound, double c0, double c1, double c2, double c3, double c4, double c5, double c6, double c7) {
    Device device;
    ActQuantizeParams p{};
    const Rows rows = take_inputs<Row, Fp8>(p, gate, up, out, device);
    TensorMatcher().dtype<ScaleT>().contiguous().device(device).verify(scale, "scale");
    if (kIsMx<ScaleProgram> && rows.cols % mx::kBlock != 0) {
      TVM_FFI_THROW(ValueError) << "gate: wanted rows of a multiple of " << mx::kBlock << " elements, found shape " << shape_of(gate);
    }
    if (out.numel() != rows.rows * rows.cols || scale.numel() != (Rowwise ? rows.rows * scales_of_row<ScaleProgram>(rows.cols) : 1)) {
      TVM_FFI_THROW(ValueError) << "out, scale: wanted " << rows.rows << " rows of " << rows.cols << ", found shapes " << shape_of(out)
                                << ", " << shape_of(scale);
    }
    if (rows.rows == 0 && !Rowwise) TVM_FFI_THROW(ValueError) << "gate: wanted at least one row, since an empty tensor has no maximum";
    if (rows.rows == 0) return false;

    const double constants[kMaxConsts] = {c0, c1, c2, c3, c4, c5, c6, c7};
    p.scale = data(scale), p.consts = Consts::of(constants, take_bound<ScaleProgram, Program>(bound, device));
    const bool vectors = inputs_in_vectors<Row>(p);
    DeviceGuard guard(device.id());
    if (vectors) p.cols /= 8;
    if constexpr (!Rowwise) {
      p.partial = tensor_partials(*partial, device);
      if (y.has_value()) {
        p.y = tensor_y<In>(*y, rows.rows * rows.cols, device);
      } else {
        return !(vectors && once(p, device.id()));
      }
    }
    with_row_shape(rows.rows, rows.cols, vectors, sm_count(device.id()), Start{p, env_stream(device.id()), device.id()});
    return false;
  }

 private:
  static bool once(ActQuantizeParams& p, int device) {
    const int64_t count = p.rows * p.cols;
    if (count >= int64_t{1} << 31) return false;
    p.count = static_cast<uint32_t>(count), p.columns = Divisor::of(p.cols);
    p.once = OnceParams{p.out, p.scale, p.partial, 0, 0, p.consts};
    // So few vectors that they leave SMs idle: one a thread.
    return count < int64_t{4} * kOnceThreads * sm_count(device) ? once<1>(p, device) : once<4>(p, device);
  }
  template <int U>
  static bool once(ActQuantizeParams& p, int device) {
    static OncePlans plans;
    auto* kernel = act_quantize_once_kernel<Row, Fp8, Saturated, ScaleT, ScaleProgram, Chain, 8, U>;
    return launch_once(kernel, plans, p, ceil_div(p.count, kOnceThreads * U), kOnceThreads, kOnceThreads * U * sizeof(Aligned<In, 8>),
                       device);
  }
  struct Start {
    ActQuantizeParams& p;
    cudaStream_t stream;
    int device;
    template <int Threads, int E, int U>
    void operator()(unsigned grid, unsigned block) const {
      if constexpr (Rowwise) {
        if constexpr (kWalks<Row, E, U>) {
          constexpr int kOf = Threads == kWholeBlock ? kPartOfBlock : Threads;
          auto* whole = act_quantize_walk_kernel<true, Row, Fp8, Saturated, ScaleT, ScaleProgram, Chain, kOf, E, U>;
          auto* parts = act_quantize_walk_kernel<false, Row, Fp8, Saturated, ScaleT, ScaleProgram, Chain, kOf, E, U>;
          const int threads = Threads == kWholeBlock ? static_cast<int>(block) : Threads;
          if (walk<U>(whole, parts, p, p.cols * E, threads, stream, device)) return;
        }
        auto* kernel = act_quantize_kernel<Row, Fp8, Saturated, ScaleT, ScaleProgram, Chain, Threads, E, U>;
        Launch(grid, block).stream(stream).programmatic().run(kernel, p);
      } else {
        p.blocks = grid;
        const unsigned partials = tensor_blocks(grid, block, device);
        Launch(partials, block).stream(stream).programmatic().run(act_amax_kernel<Row, Threads, E, U>, p);
        cast_rows<In, Fp8, Saturated, ScaleT, ScaleProgram, Chain>(p, partials, device, E == 8);
      }
    }
  };
};

}  // namespace inductor_ext
