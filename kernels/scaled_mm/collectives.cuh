// The yardstick of scaled_mm on compute capability 9.0: CUTLASS's own SM90 collectives as its builder puts them together, behind
// the same host functions as our kernels (stream.cuh, tile.cuh), so that one run can measure both.
//
//   pingpong      each of two consumer warpgroups has a tile of its own      (else cooperative: they halve one)
//   exact         the FP8 mainloop that adds partial sums to fp32 every 128 elements of K   (else fast accumulation)
//   ClusterM      CTAs along M that share b's tile by multicast
//
// No operator uses it: benchmarks/kernels/cutlass_collectives.py loads it. `static_b` changes nothing, and a group of problems is
// one launch for each.
#pragma once

#define CUTLASS_ENABLE_GDC_FOR_SM90 1  // griddepcontrol: programmatic dependent launch on both edges

#include "scaled_mm/cutlass_problem.cuh"

// Only what these kernels need: collective_builder.hpp and gemm_universal.hpp would bring every architecture's.
// clang-format off: the order matters
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder_decl.hpp"
#include "cutlass/gemm/collective/collective_mma_decl.hpp"
#include "cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp"
#include "cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized_fp8.hpp"
#include "cutlass/gemm/collective/builders/sm90_gmma_builder.inl"
#include "cutlass/gemm/kernel/gemm_universal_decl.h"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_pingpong.hpp"
// clang-format on

namespace inductor_ext {

template <typename EA, typename EB, typename Out, int M, int N, bool Pingpong, int ClusterM, bool Exact>
struct ScaledMmCollectives : CutlassHost<ScaledMmCollectives<EA, EB, Out, M, N, Pingpong, ClusterM, Exact>, EA, EB, Out> {
  static constexpr int kClusterM = ClusterM;
  static constexpr int kTileK = 128;  // one swizzle atom of bytes
  static constexpr int kAlignment = 16;

  using D = typename CutlassType<Out>::type;
  using Tile = cute::Shape<cute::Int<M>, cute::Int<N>, cute::Int<kTileK>>;
  using Cluster = cute::Shape<cute::Int<ClusterM>, cute::_1, cute::_1>;
  using Epilogue = ScaledMmEpilogue<Tile, D>;
  using FastSchedule = cute::conditional_t<Pingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum,
                                           cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum>;
  using ExactSchedule = cute::conditional_t<Pingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                            cutlass::gemm::KernelTmaWarpSpecializedCooperative>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float,
      float, void, cutlass::layout::RowMajor, kAlignment / sizeof(D), D, cutlass::layout::RowMajor, kAlignment / sizeof(D),
      cute::conditional_t<Pingpong, cutlass::epilogue::TmaWarpSpecialized, cutlass::epilogue::TmaWarpSpecializedCooperative>,
      typename Epilogue::Type>::CollectiveOp;

  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename CutlassType<EA>::type, cutlass::layout::RowMajor, kAlignment,
      typename CutlassType<EB>::type, cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename CollectiveEpilogue::SharedStorage))>,
      cute::conditional_t<Exact, ExactSchedule, FastSchedule>>::CollectiveOp;

  using GemmKernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue>;

  static void launch(const CutlassProblem& p, int device) {
    typename GemmKernel::EpilogueArguments epilogue{};
    epilogue.thread = Epilogue::arguments(p);
    launch_cutlass<GemmKernel>(p, epilogue, {}, sm_count(device), ClusterM, device);
  }
};

}  // namespace inductor_ext
