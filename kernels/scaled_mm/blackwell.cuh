// scaled_mm on compute capability 10.0 (sm_100a): CUTLASS 3.x collectives, tcgen05 tensor cores.
//
//   out[M, N] = (a[M, K] · b[K, N]) * scale_a * scale_b + bias      (op.py says what each may be)
//
// NOT RUN ON HARDWARE. The project had no Blackwell GPU: this file compiles for sm_100a and its machine code was inspected
// (tests/kernels/test_blackwell.py), and that is all that is known. No table exists for the target, so that PyTorch's own operator
// stays unless a configuration is asked for by name or Inductor's autotuner measures it as the fastest.
//
//   M x N = 128 x N          one SM an MMA (cta_group::1)
//   M x N = 256 x N, @2x1    two SMs of a cluster share an MMA (cta_group::2): each loads half of b's tile
//
// There is one accumulation mode here: the tensor core keeps fp32 sums, so `use_fast_accum` has nothing to choose. The grid covers
// the output and each CTA takes further tiles from the hardware's work queue. A group of problems is one launch for each, into
// columns of one output; on Hopper it is one launch. `static_b` changes nothing: the collectives' only load warp waits for the
// kernel ahead before it loads anything.
#pragma once

#define CUTLASS_ENABLE_GDC_FOR_SM100 1  // griddepcontrol: programmatic dependent launch on both edges

#include "scaled_mm/cutlass_problem.cuh"

// Only what an SM100 GEMM needs: collective_builder.hpp and gemm_universal.hpp would bring every architecture's.
// clang-format off: the order matters
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder_decl.hpp"
#include "cutlass/gemm/collective/collective_mma_decl.hpp"
#include "cutlass/gemm/collective/sm100_mma_warpspecialized.hpp"
#include "cutlass/gemm/collective/builders/sm100_umma_builder.inl"
#include "cutlass/gemm/kernel/gemm_universal_decl.h"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"
#include "cutlass/gemm/kernel/sm100_gemm_tma_warpspecialized.hpp"
// clang-format on

namespace inductor_ext {

template <typename EA, typename EB, typename Out, int M, int N, int ClusterM>
struct ScaledMmBlackwell : CutlassHost<ScaledMmBlackwell<EA, EB, Out, M, N, ClusterM>, EA, EB, Out> {
  static constexpr int kClusterM = ClusterM;
  static constexpr bool kTwoSms = M == 256;
  static_assert(M == 128 || (M == 256 && ClusterM % 2 == 0), "tiles are 128 rows, or 256 in clusters of pairs");

  static constexpr int kTileK = 128;  // one swizzle atom of bytes
  static constexpr int kAlignment = 16;

  using D = typename CutlassType<Out>::type;
  using Tile = cute::Shape<cute::Int<M>, cute::Int<N>, cute::Int<kTileK>>;
  using CtaTile = cute::Shape<cute::Int<kTwoSms ? M / 2 : M>, cute::Int<N>, cute::Int<kTileK>>;
  using Cluster = cute::Shape<cute::Int<ClusterM>, cute::_1, cute::_1>;
  using Epilogue = ScaledMmEpilogue<CtaTile, D>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float,
      float, void, cutlass::layout::RowMajor, kAlignment / sizeof(D), D, cutlass::layout::RowMajor, kAlignment / sizeof(D),
      cute::conditional_t<kTwoSms, cutlass::epilogue::TmaWarpSpecialized2Sm, cutlass::epilogue::TmaWarpSpecialized1Sm>,
      typename Epilogue::Type>::CollectiveOp;

  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassTensorOp, typename CutlassType<EA>::type, cutlass::layout::RowMajor, kAlignment,
      typename CutlassType<EB>::type, cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename CollectiveEpilogue::SharedStorage))>,
      cute::conditional_t<kTwoSms, cutlass::gemm::KernelTmaWarpSpecialized2SmSm100,
                          cutlass::gemm::KernelTmaWarpSpecialized1SmSm100>>::CollectiveOp;

  using GemmKernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue>;

  static void launch(const CutlassProblem& p, int device) {
    typename GemmKernel::EpilogueArguments epilogue{};
    epilogue.thread = Epilogue::arguments(p);
    // The scheduler takes no number of SMs: the hardware hands out the tiles.
    launch_cutlass<GemmKernel>(p, epilogue, {}, 0, ClusterM, device);
  }
};

}  // namespace inductor_ext
