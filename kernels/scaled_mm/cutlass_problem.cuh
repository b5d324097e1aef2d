// What a scaled_mm through CUTLASS's collectives needs around them, on Hopper (collectives.cuh) and Blackwell (blackwell.cuh):
// the checks of its tensors, the epilogue D = acc * scale_a * scale_b + bias as a visitor tree, and the launch.
//
// Each scale is one element or a vector, chosen at run time: CUTLASS's broadcast nodes take a stride that is a `bool`, so one
// binary serves all four combinations, and nothing is expanded beforehand. Without a bias its node gives zeros.
//
// The kernel is launched with our own Launch rather than GemmUniversalAdapter, which would bring its occupancy queries,
// workspace and error codes along, and reports no reason.
#pragma once

#include <inductor_ext/launch.cuh>
#include <inductor_ext/tensor.h>

#include <tvm/ffi/container/array.h>

#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"
#include "cutlass/gemm/gemm.h"
#include "cutlass/kernel_hardware_info.h"

#include "inductor_ext/cutlass_types.cuh"

namespace inductor_ext {

using tvm::ffi::Array;
using tvm::ffi::Tensor;

// ---- the problem ------------------------------------------------------------------------------------------------------------

struct CutlassProblem {
  int m, n, k;
  const void *a, *b;
  int64_t a_stride, b_stride;  // of rows of a, of columns of b
  const float *scale_a, *scale_b;
  bool row_scale, column_scale;  // one scale a row of a, a column of b
  const void* bias;              // null without
  void* out;
  int64_t out_stride;
};

inline void check_cutlass_extent(int64_t value, const char* what) {
  if (value > INT32_MAX) TVM_FFI_THROW(ValueError) << what << ": wanted fewer than 2^31, found " << value;
}

inline void check_cutlass_rows(const void* pointer, int64_t pitch, int64_t size, const char* name, const char* lines) {
  if (!aligned(pointer, 16) || pitch * size % 16 != 0) {
    TVM_FFI_THROW(ValueError) << name << ": wanted " << lines << " that start at multiples of 16 bytes, found them " << pitch * size
                              << " bytes apart from address " << pointer;
  }
}

inline const float* check_cutlass_scale(const TensorView& scale, int64_t extent, Device& device, const char* name) {
  TensorMatcher().dtype<float>().contiguous().device(device).verify(scale, name);
  if (scale.numel() != 1 && scale.numel() != extent) {
    TVM_FFI_THROW(ValueError) << name << ": wanted one element or " << extent << ", found shape " << shape_of(scale);
  }
  return data<float>(scale);
}

// One problem that writes columns [column, column + N) of `out`, whose rows hold `columns` of them.
template <typename EA, typename EB, typename Out>
CutlassProblem check_cutlass_problem(const TensorView& a, const TensorView& b, const TensorView& scale_a, const TensorView& scale_b,
                                     const Optional<TensorView>& bias, const TensorView& out, int64_t column, int64_t columns,
                                     Device& device) {
  Symbol M("M"), N("N"), K("K");
  TensorMatcher({M, K}).dtype<EA>().strides({kAny, 1}).device(device).verify(a, "a");
  TensorMatcher({K, N}).dtype<EB>().strides({1, kAny}).device(device).verify(b, "b");
  TensorMatcher({M, columns}).dtype<Out>().strides({kAny, 1}).device(device).verify(out, "out");
  const int64_t m = M.value(), n = N.value(), k = K.value();
  if (k % 16 != 0 || n % 16 != 0 || k == 0) {
    TVM_FFI_THROW(ValueError) << "b: wanted K and N to be multiples of 16, K at least 16, found shape " << shape_of(b);
  }
  check_cutlass_extent(m, "a: rows"), check_cutlass_extent(n, "b: columns"), check_cutlass_extent(k, "a: columns");
  CutlassProblem p{};
  p.m = static_cast<int>(m), p.n = static_cast<int>(n), p.k = static_cast<int>(k);
  p.scale_a = check_cutlass_scale(scale_a, m, device, "scale_a"), p.row_scale = scale_a.numel() != 1;
  p.scale_b = check_cutlass_scale(scale_b, n, device, "scale_b"), p.column_scale = scale_b.numel() != 1;
  if (bias.has_value()) {
    TensorMatcher({N}).dtype<Out>().contiguous().device(device).verify(bias.value(), "bias");
    p.bias = data(bias.value());
  }
  if (m == 0 || n == 0) return p;
  p.a = data(a), p.a_stride = m == 1 ? k : a.strides()[0];
  p.b = data(b), p.b_stride = n == 1 ? k : b.strides()[1];
  p.out = data<Out>(out) + column, p.out_stride = m == 1 ? columns : out.strides()[0];
  check_cutlass_rows(p.a, p.a_stride, sizeof(EA), "a", "rows");
  check_cutlass_rows(p.b, p.b_stride, sizeof(EB), "b", "columns");
  check_cutlass_rows(p.out, p.out_stride, sizeof(Out), "out", "rows");
  return p;
}

// ---- the epilogue -----------------------------------------------------------------------------------------------------------

// A broadcast node that reads nothing before the kernel ahead in the stream has ended. CUTLASS 4.2's SM100 kernel waits in its
// loading warps only, while its epilogue warps fetch the scales at once: those of a quantising kernel ahead would be stale.
template <typename Node>
struct AfterPreviousKernel : Node {
  using Node::Node;

  template <typename Callbacks>
  struct Waiting : Callbacks {
    CUTLASS_DEVICE explicit Waiting(Callbacks const& callbacks) : Callbacks(callbacks) {}
    CUTLASS_DEVICE void begin() {
      wait_for_previous_kernel();
      Callbacks::begin();
    }
  };

  template <bool ReferenceSrc, typename... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(cutlass::epilogue::fusion::ConsumerStoreArgs<Args...> const& args) {
    auto callbacks = Node::template get_consumer_store_callbacks<ReferenceSrc>(args);
    return Waiting<decltype(callbacks)>(callbacks);
  }
};

// `CtaTile` is one CTA's tile, M × N × K. `Source` (C) is not read; the name only keeps to CUTLASS's words.
template <typename CtaTile, typename Out>
struct ScaledMmEpilogue {
  template <template <typename> typename Function, typename Result, typename... Inputs>
  using Tree = cutlass::epilogue::fusion::Sm90TreeVisitor<
      cutlass::epilogue::fusion::Sm90Compute<Function, Result, float, cutlass::FloatRoundStyle::round_to_nearest>, Inputs...>;

  using RowStride = cute::Stride<bool, cute::_0, cute::_0>;
  using ColumnStride = cute::Stride<cute::_0, bool, cute::_0>;
  using ScaleA = AfterPreviousKernel<cutlass::epilogue::fusion::Sm90ColBroadcast<0, CtaTile, float, float, RowStride, 4, false>>;
  using ScaleB = AfterPreviousKernel<cutlass::epilogue::fusion::Sm90RowBroadcast<0, CtaTile, float, float, ColumnStride, 4, false>>;
  using Bias = AfterPreviousKernel<
      cutlass::epilogue::fusion::Sm90RowBroadcast<0, CtaTile, Out, float, cute::Stride<cute::_0, cute::_1, cute::_0>>>;
  using Scaled = Tree<cutlass::multiplies, float, ScaleA, cutlass::epilogue::fusion::Sm90AccFetch>;
  using Type = Tree<cutlass::homogeneous_multiply_add, Out, ScaleB, Scaled, Bias>;

  static typename Type::Arguments arguments(const CutlassProblem& p) {
    typename Type::Arguments arguments{};
    arguments.op_0 = {p.scale_b, 0.0f, {cute::_0{}, p.column_scale, cute::_0{}}};
    arguments.op_1.op_0 = {p.scale_a, 0.0f, {p.row_scale, cute::_0{}, cute::_0{}}};
    arguments.op_2 = {static_cast<const Out*>(p.bias), Out(0), {}};
    return arguments;
  }
};

// ---- the launch -------------------------------------------------------------------------------------------------------------

// `GemmKernel` on the current stream, in clusters of `cluster_m` × 1. It may start while the kernel ahead still ends.
template <typename GemmKernel>
void launch_cutlass(const CutlassProblem& p, const typename GemmKernel::EpilogueArguments& epilogue,
                    const typename GemmKernel::TileSchedulerArguments& scheduler, int sms, unsigned cluster_m, int device) {
  using A = typename GemmKernel::ElementA;
  using B = typename GemmKernel::ElementB;
  typename GemmKernel::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {p.m, p.n, p.k, 1};
  arguments.mainloop.ptr_A = static_cast<const A*>(p.a);
  arguments.mainloop.dA = cute::make_stride(p.a_stride, cute::_1{}, int64_t{0});
  arguments.mainloop.ptr_B = static_cast<const B*>(p.b);
  arguments.mainloop.dB = cute::make_stride(p.b_stride, cute::_1{}, int64_t{0});
  arguments.epilogue = epilogue;
  arguments.epilogue.ptr_D = static_cast<typename GemmKernel::ElementD*>(p.out);
  arguments.epilogue.dD = cute::make_stride(p.out_stride, cute::_1{}, int64_t{0});
  arguments.scheduler = scheduler;
  arguments.hw_info.device_id = device;
  arguments.hw_info.sm_count = sms;

  constexpr int kSharedBytes = GemmKernel::SharedStorageSize;
  auto kernel = cutlass::device_kernel<GemmKernel>;
  static OncePerDevice allowed;
  allowed.run(device, [&] {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "cudaFuncSetAttribute");
  });
  const auto params = GemmKernel::to_underlying_arguments(arguments, nullptr);
  Launch(GemmKernel::get_grid_shape(params), GemmKernel::get_block_shape())
      .stream(env_stream(device))
      .shared_memory(kSharedBytes)
      .cluster(cluster_m)
      .programmatic()
      .run(kernel, params);
}

// The two host functions of a family. `Family` gives `launch(problem, device)` and `kClusterM`.
template <typename Family, typename EA, typename EB, typename Out>
struct CutlassHost {
  static void run(TensorView a, TensorView b, TensorView scale_a, TensorView scale_b, Optional<TensorView> bias, TensorView out,
                  bool static_b, int64_t cluster_m, int64_t cluster_n) {
    check_cluster(cluster_m, cluster_n);
    Device device;
    const int64_t columns = out.ndim() == 2 && b.ndim() == 2 ? b.shape()[1] : 0;
    const CutlassProblem p = check_cutlass_problem<EA, EB, Out>(a, b, scale_a, scale_b, bias, out, 0, columns, device);
    launch(p, device.id());
  }

  // Several problems into columns of `out`, side by side: one launch each.
  static void run_group(Array<Tensor> a, Array<Tensor> b, Array<Tensor> scale_a, Array<Tensor> scale_b,
                        Array<Optional<Tensor>> bias, TensorView out, bool static_b, int64_t cluster_m, int64_t cluster_n) {
    check_cluster(cluster_m, cluster_n);
    const size_t count = b.size();
    if ((a.size() != 1 && a.size() != count) || scale_a.size() != a.size() || scale_b.size() != count || bias.size() != count) {
      TVM_FFI_THROW(ValueError) << "a, scale_a, scale_b, bias: wanted one a and scale_a or " << count << ", and " << count
                                << " of the others, as of b, found " << a.size() << ", " << scale_a.size() << ", " << scale_b.size()
                                << ", " << bias.size();
    }
    int64_t columns = 0, column = 0;
    for (const Tensor& each : b) columns += each.ndim() == 2 ? each.shape()[1] : 0;
    for (size_t i = 0; i < count; ++i) {
      const size_t shared = a.size() == 1 ? 0 : i;
      const Optional<Tensor> bias_i = bias[i];
      Tensor bias_tensor;
      Optional<TensorView> added;
      if (bias_i.has_value()) bias_tensor = bias_i.value(), added = TensorView(bias_tensor);
      const Tensor a_i = a[shared], b_i = b[i], scale_a_i = scale_a[shared], scale_b_i = scale_b[i];
      Device device;
      const CutlassProblem p = check_cutlass_problem<EA, EB, Out>(a_i, b_i, scale_a_i, scale_b_i, added, out, column, columns, device);
      launch(p, device.id());
      column += p.n;
    }
  }

 private:
  static void launch(const CutlassProblem& p, int device) {
    if (p.m == 0 || p.n == 0) return;
    DeviceGuard guard(device);
    Family::launch(p, device);
  }

  static void check_cluster(int64_t cluster_m, int64_t cluster_n) {
    if (cluster_m != Family::kClusterM || cluster_n != 1) {
      TVM_FFI_THROW(ValueError) << "cluster: wanted " << Family::kClusterM << " x 1, as compiled in, found " << cluster_m << " x "
                                << cluster_n;
    }
  }
};

}  // namespace inductor_ext
