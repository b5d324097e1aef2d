// mxfp8_grouped_mm on compute capability 10.0 (sm_100a): CUTLASS's block-scaled grouped collectives, tcgen05 tensor cores that
// apply the e8m0 scales themselves.
//
//   out[t, n] = sum_k x[t, k] * 2^sx[t, k / 32] * w[e, n, k] * 2^sw[e, n, k / 32]      for the rows t of expert e
//
//   x [T, K] e4m3 sorted by expert · x_scale, w_scale e8m0 in tiles of 128 x 4 (groups.cuh) · w [E, N, K] e4m3 ·
//   offs [E] int32 cumulative ends · out [T, N] bf16, fp16 or fp32
//
// NOT RUN ON HARDWARE. The project had no Blackwell GPU: this file compiles for sm_100a, its machine code and its layouts were
// inspected (tests/kernels/test_mxfp8_blackwell.py), and that is all that is known.
//
// The operands are swapped: weights are the M operand and an expert's tokens the N operand, since M tiles have 128 rows at least
// and experts often have fewer tokens. The product is then out^T, M-major.
//
//   M x N = 128 x N          one SM an MMA (cta_group::1)
//   M x N = 256 x N, @2x1    two SMs of a cluster share an MMA (cta_group::2): each loads half of the tokens' tile
//
// Two launches a call. `set_up_groups` (groups.cuh) writes each group's shape, pointers, strides and scale layouts; the product's
// persistent CTAs walk the groups, and rewrite their own TMA descriptors where a tile is of another group than the one before it.
// Groups without tokens have no tiles. Descriptors hold a group's own number of tokens: rows past it are neither read nor written.
//
// Both live in `scratch`, which is an argument: Inductor plans it as it plans `out`, so that no two calls that may run at the same
// time share one, in two streams or in two CUDA graphs, and nothing has to be kept, locked or freed here.
#pragma once

#define CUTLASS_ENABLE_GDC_FOR_SM100 1  // griddepcontrol: programmatic dependent launch on both edges

#include "mxfp8_grouped_mm/groups.cuh"

#include <inductor_ext/cutlass_types.cuh>
#include <inductor_ext/tensor.h>

#include "cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"
#include "cutlass/epilogue/thread/activation.h"
#include "cutlass/gemm/gemm.h"
#include "cutlass/kernel_hardware_info.h"

// Only what a grouped SM100 GEMM needs: collective_builder.hpp and gemm_universal.hpp would bring every architecture's.
// clang-format off: the order matters
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder_decl.hpp"
#include "cutlass/gemm/collective/collective_mma_decl.hpp"
#include "cutlass/gemm/collective/sm100_blockscaled_mma_array_warpspecialized.hpp"
#include "cutlass/gemm/collective/builders/sm100_blockscaled_umma_builder.inl"
#include "cutlass/gemm/kernel/gemm_universal_decl.h"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"
#include "cutlass/gemm/kernel/sm100_gemm_array_tma_warpspecialized.hpp"
// clang-format on

namespace inductor_ext {

// ---- scratch ----------------------------------------------------------------------------------------------------------------

// `scratch`: 5 TMA descriptors an SM from its first multiple of 128 bytes on, then the arrays of all groups, each at a multiple of
// 64. blackwell.py computes the same number of bytes, to plan it.
constexpr int64_t kDescriptorBytes = 128, kDescriptors = 5;
constexpr int64_t kArrayAlignment = 64;

constexpr int64_t scratch_array(int64_t experts, int64_t size) {
  return (experts * size + kArrayAlignment - 1) / kArrayAlignment * kArrayAlignment;
}
inline char* scratch_start(const TensorView& scratch) {
  const auto address = reinterpret_cast<uintptr_t>(data(scratch));
  return reinterpret_cast<char*>((address + kDescriptorBytes - 1) / kDescriptorBytes * kDescriptorBytes);
}

// ---- the kernel -------------------------------------------------------------------------------------------------------------

// CUTLASS's kernel reads the groups' shapes for its first tile before it waits for the kernel ahead: under programmatic dependent
// launch they would not be written yet. So all of it waits here; what is left to overlap is the launch itself.
template <typename GemmKernel>
__global__ void __launch_bounds__(GemmKernel::MaxThreadsPerBlock, GemmKernel::MinBlocksPerMultiprocessor)
    grouped_product(const __grid_constant__ typename GemmKernel::Params params) {
  extern __shared__ char shared[];
  wait_for_previous_kernel();
  GemmKernel kernel;
  kernel(params, shared);
}

// A tile is `TileM` output channels x `TileN` tokens.
template <typename Out, int TileM, int TileN, int ClusterM>
struct Mxfp8GroupedBlackwell {
  static constexpr bool kTwoSms = TileM == 256;
  static_assert((TileM == 128 && ClusterM == 1) || (TileM == 256 && ClusterM == 2), "tiles are 128 rows, or 256 in clusters of pairs");

  static constexpr int kTileK = 128;  // one swizzle atom of bytes, and one tile of scales
  static constexpr int kAlignment = 16;

  using Fp8 = cutlass::float_e4m3_t;
  using Scale = cutlass::float_ue8m0_t;
  using Mx = cutlass::mx_float8_t<Fp8>;
  using D = typename CutlassType<Out>::type;
  using Tile = cute::Shape<cute::Int<TileM>, cute::Int<TileN>, cute::Int<kTileK>>;
  using Cluster = cute::Shape<cute::Int<ClusterM>, cute::_1, cute::_1>;
  using ProblemShape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;  // (N, tokens, K) of each group

  // The accumulator, rounded once.
  using Rounded = cutlass::epilogue::fusion::Sm90TreeVisitor<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::epilogue::thread::Identity, D, float,
                                             cutlass::FloatRoundStyle::round_to_nearest>,
      cutlass::epilogue::fusion::Sm90AccFetch>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
      float, float, void, cutlass::layout::ColumnMajor*, kAlignment / sizeof(D), D, cutlass::layout::ColumnMajor*,
      kAlignment / sizeof(D),
      cute::conditional_t<kTwoSms, cutlass::epilogue::PtrArrayTmaWarpSpecialized2Sm,
                          cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm>,
      Rounded>::CollectiveOp;

  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp, Mx, cutlass::layout::RowMajor*, kAlignment, Mx,
      cutlass::layout::ColumnMajor*, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename CollectiveEpilogue::SharedStorage))>,
      cute::conditional_t<kTwoSms, cutlass::gemm::KernelPtrArrayTmaWarpSpecialized2SmMxf8f6f4Sm100,
                          cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmMxf8f6f4Sm100>>::CollectiveOp;

  using GemmKernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, CollectiveMainloop, CollectiveEpilogue>;

  using Shape = typename ProblemShape::UnderlyingProblemShape;
  using StrideW = typename GemmKernel::InternalStrideA;
  using StrideX = typename GemmKernel::InternalStrideB;
  using StrideOut = typename GemmKernel::InternalStrideD;
  using ScaleConfig = typename CollectiveMainloop::Sm1xxBlkScaledConfig;
  using ScaleLayout = typename CollectiveMainloop::InternalLayoutSFA;
  static_assert(std::is_same_v<ScaleLayout, typename CollectiveMainloop::InternalLayoutSFB>);

  // What `set_up_groups` writes: arrays of E in `scratch`, as CUTLASS wants them.
  struct Arrays {
    const char *x, *x_scale, *w, *w_scale;
    char* out;
    GroupedSizes sizes;
    Shape* shapes;
    const Fp8 **ptr_w, **ptr_x;
    const Scale **ptr_w_scale, **ptr_x_scale;
    D** ptr_out;
    StrideW* stride_w;
    StrideX* stride_x;
    StrideOut* stride_out;
    ScaleLayout *layout_w_scale, *layout_x_scale;

    __host__ __device__ void operator()(int group, const GroupPlace& p) const {
      const Shape shape(sizes.n, p.tokens, sizes.k);
      const auto extents = cute::make_shape(sizes.n, p.tokens, sizes.k, 1);
      shapes[group] = shape;
      ptr_w[group] = reinterpret_cast<const Fp8*>(w + p.w);
      ptr_x[group] = reinterpret_cast<const Fp8*>(x + p.x);
      ptr_w_scale[group] = reinterpret_cast<const Scale*>(w_scale + p.w_scale);
      ptr_x_scale[group] = reinterpret_cast<const Scale*>(x_scale + p.x_scale);
      ptr_out[group] = reinterpret_cast<D*>(out + p.out);
      stride_w[group] = StrideW(int64_t{sizes.k}, cute::_1{}, cute::_0{});
      stride_x[group] = StrideX(sizes.x_pitch, cute::_1{}, cute::_0{});
      stride_out[group] = StrideOut(cute::_1{}, sizes.out_pitch / sizes.out_size, cute::_0{});
      layout_w_scale[group] = ScaleConfig::tile_atom_to_shape_SFA(extents);
      layout_x_scale[group] = ScaleConfig::tile_atom_to_shape_SFB(extents);
    }
  };

  static_assert(sizeof(Shape) == 12 && sizeof(StrideW) == 8 && sizeof(StrideX) == 8 && sizeof(StrideOut) == 8);
  static_assert(sizeof(ScaleLayout) == 20, "blackwell.py plans the scratch with these sizes");

  // `sms`: CTAs at most.
  static int64_t scratch_bytes(int64_t experts, int64_t sms) {
    return kDescriptorBytes * (kDescriptors * sms + 1) + scratch_array(experts, sizeof(Shape)) + 8 * scratch_array(experts, 8) +
           2 * scratch_array(experts, sizeof(ScaleLayout));
  }

  static Arrays arrays_of(char* scratch, const GroupedSizes& sizes, int sms) {
    Arrays a{};
    a.sizes = sizes;
    char* next = scratch + kDescriptorBytes * kDescriptors * sms;
    const auto take = [&](auto*& array) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
      next += scratch_array(sizes.experts, sizeof(*array));
    };
    take(a.shapes);
    take(a.ptr_w), take(a.ptr_x), take(a.ptr_w_scale), take(a.ptr_x_scale), take(a.ptr_out);
    take(a.stride_w), take(a.stride_x), take(a.stride_out);
    take(a.layout_w_scale), take(a.layout_x_scale);
    return a;
  }

  // ---- the host function ----------------------------------------------------------------------------------------------------

  static void run(TensorView x, TensorView x_scale, TensorView w, TensorView w_scale, TensorView offs, TensorView out,
                  TensorView scratch) {
    Symbol T("T"), E("E"), N("N"), K("K");
    Device device;
    TensorMatcher({T, K}).dtype<__nv_fp8_e4m3>().strides({kAny, 1}).device(device).verify(x, "x");
    TensorMatcher({E, N, K}).dtype<__nv_fp8_e4m3>().contiguous().device(device).verify(w, "w");
    TensorMatcher({E}).dtype<int32_t>().contiguous().device(device).verify(offs, "offs");
    TensorMatcher({T, N}).dtype<Out>().strides({kAny, 1}).device(device).verify(out, "out");
    TensorMatcher({kAny}).dtype<uint8_t>().contiguous().device(device).verify(scratch, "scratch");
    const int64_t t = T.value(), e = E.value(), n = N.value(), k = K.value();
    if (k == 0 || k % mx::kBlock != 0) {
      TVM_FFI_THROW(ValueError) << "w: wanted K to be a multiple of " << mx::kBlock << ", at least one, found shape " << shape_of(w);
    }
    if (n * static_cast<int64_t>(sizeof(Out)) % kAlignment != 0) {
      TVM_FFI_THROW(ValueError) << "w: wanted N to be a multiple of " << kAlignment / sizeof(Out) << " for an output of "
                                << dtype_name(DTypeOf<Out>::value) << ", found shape " << shape_of(w);
    }
    for (const int64_t extent : {t + mx::kTileRows * e, n, k}) {
      if (extent > INT32_MAX) TVM_FFI_THROW(ValueError) << "x, w: wanted fewer than 2^31 rows and columns, found " << extent;
    }
    const int64_t scale_pitch = scale_tiles(k) * mx::kTileCols;
    TensorMatcher({kAny, scale_pitch}).dtype<__nv_fp8_e8m0>().contiguous().device(device).verify(x_scale, "x_scale");
    TensorMatcher({E, padded_rows(n) * scale_pitch}).dtype<__nv_fp8_e8m0>().contiguous().device(device).verify(w_scale, "w_scale");
    if (t == 0 || n == 0 || e == 0) return;

    GroupedSizes sizes{};
    sizes.tokens = t, sizes.experts = static_cast<int>(e), sizes.n = static_cast<int>(n), sizes.k = static_cast<int>(k);
    sizes.x_pitch = t == 1 ? k : x.strides()[0];
    sizes.out_size = sizeof(Out), sizes.out_pitch = (t == 1 ? n : out.strides()[0]) * static_cast<int64_t>(sizeof(Out));
    sizes.scale_rows = x_scale.shape()[0];
    check_rows(data(x), sizes.x_pitch, "x"), check_rows(data(w), k, "w"), check_rows(data(out), sizes.out_pitch, "out");
    check_rows(data(x_scale), mx::kTileBytes, "x_scale"), check_rows(data(w_scale), mx::kTileBytes, "w_scale");

    const int id = device.id(), sms = sm_count(id);
    if (scratch.numel() < scratch_bytes(e, sms)) {
      TVM_FFI_THROW(ValueError) << "scratch: wanted " << scratch_bytes(e, sms) << " bytes, found " << scratch.numel();
    }
    DeviceGuard guard(id);
    Arrays arrays = arrays_of(scratch_start(scratch), sizes, sms);
    arrays.x = data<char>(x), arrays.x_scale = data<char>(x_scale), arrays.w = data<char>(w), arrays.w_scale = data<char>(w_scale);
    arrays.out = data<char>(out);
    launch_set_up(sizes, data<int>(offs), arrays, id);
    launch_product(arrays, scratch_start(scratch), sms, id);
  }

  // ---- for tests, on the host -----------------------------------------------------------------------------------------------

  // `scratch` as `set_up_groups` leaves it, all tensors being dense and at address 0.
  static void set_up(TensorView offs, int64_t tokens, int64_t n, int64_t k, int64_t scale_rows, int64_t sms, TensorView scratch) {
    Symbol E("E");
    TensorMatcher({E}).dtype<int32_t>().contiguous().verify(offs, "offs");
    TensorMatcher({scratch_bytes(E.value(), sms)}).dtype<uint8_t>().contiguous().verify(scratch, "scratch");
    const GroupedSizes sizes = dense_sizes(tokens, E.value(), n, k, sizeof(Out), scale_rows);
    set_up_groups_on_host(sizes, data<int>(offs), arrays_of(scratch_start(scratch), sizes, static_cast<int>(sms)));
  }

  // `bytes` [rows, blocks] int64: where CUTLASS's layout has the scale of each row of w (`of_x`: of x) and block of K.
  static void scale_bytes(int64_t k, bool of_x, TensorView bytes) {
    TensorMatcher({kAny, kAny}).dtype<int64_t>().contiguous().verify(bytes, "bytes");
    const int rows = static_cast<int>(bytes.shape()[0]), blocks = static_cast<int>(bytes.shape()[1]);
    const int other = 1;  // of the other operand
    const ScaleLayout layout = of_x ? ScaleConfig::tile_atom_to_shape_SFB(cute::make_shape(other, rows, static_cast<int>(k), 1))
                                    : ScaleConfig::tile_atom_to_shape_SFA(cute::make_shape(rows, other, static_cast<int>(k), 1));
    for (int i = 0; i < rows * blocks; ++i) data<int64_t>(bytes)[i] = layout(i / blocks, i % blocks * mx::kBlock, 0);
  }

 private:
  static void check_rows(const void* pointer, int64_t pitch, const char* name) {
    if (!aligned(pointer, kAlignment) || pitch % kAlignment != 0) {
      TVM_FFI_THROW(ValueError) << name << ": wanted rows that start at multiples of " << kAlignment << " bytes, found them "
                                << pitch << " bytes apart from address " << pointer;
    }
  }

  static void launch_product(const Arrays& a, char* scratch, int sms, int device) {
    typename GemmKernel::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    arguments.problem_shape = {a.sizes.experts, a.shapes, nullptr};  // null: the host knows no shape
    arguments.mainloop.ptr_A = a.ptr_w, arguments.mainloop.dA = a.stride_w;
    arguments.mainloop.ptr_B = a.ptr_x, arguments.mainloop.dB = a.stride_x;
    arguments.mainloop.ptr_SFA = a.ptr_w_scale, arguments.mainloop.layout_SFA = a.layout_w_scale;
    arguments.mainloop.ptr_SFB = a.ptr_x_scale, arguments.mainloop.layout_SFB = a.layout_x_scale;
    arguments.epilogue.ptr_D = a.ptr_out, arguments.epilogue.dD = a.stride_out;
    arguments.hw_info.device_id = device;
    arguments.hw_info.sm_count = sms;  // the grid is as many CTAs, each with descriptors of its own in scratch
    if (static_cast<int64_t>(GemmKernel::get_workspace_size(arguments)) > kDescriptorBytes * kDescriptors * sms) {
      TVM_FFI_THROW(RuntimeError) << "CUTLASS wants " << GemmKernel::get_workspace_size(arguments) << " bytes for descriptors, wanted "
                                  << "at most " << kDescriptorBytes * kDescriptors * sms << ": another version than this was written for";
    }

    constexpr int kSharedBytes = GemmKernel::SharedStorageSize;
    auto kernel = grouped_product<GemmKernel>;
    static OncePerDevice allowed;
    allowed.run(device, [&] {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "cudaFuncSetAttribute");
    });
    const auto params = GemmKernel::to_underlying_arguments(arguments, scratch);
    Launch(GemmKernel::get_grid_shape(params), GemmKernel::get_block_shape())
        .stream(env_stream(device))
        .shared_memory(kSharedBytes)
        .cluster(ClusterM)
        .programmatic()
        .run(kernel, params);
  }
};

}  // namespace inductor_ext
