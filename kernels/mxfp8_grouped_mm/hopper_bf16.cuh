// Sums on bf16 tensor cores: weights become bf16, their scale with them, on the way into wgmma's registers. The arithmetic
// is in `hopper.cuh`.
#pragma once

#include "mxfp8_grouped_mm/hopper_common.cuh"

namespace inductor_ext {

// D[64, N] += A[64, 16] · B[N, 16]ᵀ, both bf16; A in registers, as PTX lays m64k16 out: (row i, half of K high) at [2 * high + i].
template <int N>
struct GroupedWgmma {
  using Atom = decltype(cute::SM90::GMMA::rs_op_selector<cutlass::bfloat16_t, cutlass::bfloat16_t, float,
                                                         cute::Shape<cute::Int<64>, cute::Int<N>, cute::Int<16>>>());
  template <int D>
  static __device__ __forceinline__ void step(const uint32_t (&a)[4], uint64_t b, float (&d)[D]) {
    call(a, b, d, std::make_index_sequence<N / 2>());
  }

 private:
  template <int D, size_t... I>
  static __device__ __forceinline__ void call(const uint32_t (&a)[4], uint64_t b, float (&d)[D], std::index_sequence<I...>) {
    Atom::fma(a[0], a[1], a[2], a[3], b, d[I]..., cute::SM90::GMMA::ScaleOut::One);
  }
};

// One tile's sums over all of K, in the first Columns / 2 of each block of d.
template <typename Shape, int N, int Columns>
__device__ __forceinline__ void multiply_bf16(float (&d)[Shape::kBlocks][N / 2], const GroupedRing& ring, Slot& slot,
                                              const GroupedParams& p, const GroupedTile& tile) {
  constexpr int kTogether = Shape::kTogether, kBlocks = Shape::kBlocks, kStageK = Shape::kStageK, kScales = Shape::kStageScales;
  constexpr int kSets = kStageK / grouped::kStep / kTogether;
  static_assert(kSets * kBlocks % 2 == 0, "the last set of weights of a stage is not the first of the next");
  const int thread = threadIdx.x % grouped::kGroupThreads;
  const int row0 = threadIdx.x / grouped::kGroupThreads * kBlocks * grouped::kGroupRows;
  const int row = row0 + grouped::fragment_row(thread, 0);
  int first = row0 * kStageK + grouped::weights_of(thread, kStageK), first_scale = row * grouped::kScaleSlot;
  keep(first), keep(first_scale);
  const Release<Shape::kCluster> release;
  const int per_row = p.k / grouped::kBlock, stages = grouped::ceil_of(p.k, kStageK);
  // All rows of a thread are multiples of 8 apart, so that their scales begin alike in their words.
  const int shift = grouped::scale_shift(reinterpret_cast<uintptr_t>(p.w_scale), tile.expert, p.channels, tile.channel + row, per_row);
  uint32_t a[2][kTogether][4];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[b][i] = 0.f;
  }
  int previous = -1;
  for (int at = 0; at < stages; ++at) {
    FullBarrier::wait(ring.full + slot.index, slot.phase);
    const int weights = slot.index * Shape::kStage + first;
    WeightScales<kBlocks> scales;
    scales.read(ring.scales + (slot.index * Shape::kScales + first_scale), grouped::scale_shift_of_stage(shift, at, kScales),
                grouped::scales_there(per_row, at, kScales));
    const uint64_t tokens = operand(ring.stages + (slot.index * Shape::kStage + Shape::kWeights));
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        // The wgmmas before these run while these ones' weights are converted, into the other half of `a`.
        constexpr int kHalves = 2;
        const int half = (set * kBlocks + b) % kHalves;
#pragma unroll
        for (int s = 0; s < kTogether; ++s) {
          const int step = set * kTogether + s;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t factor = scales.factor(b, i, step / 2);
#pragma unroll
            for (int high = 0; high < 2; ++high) {
              const int from = grouped::weights_at(weights, step, i, high, kStageK) + b * grouped::kGroupRows * kStageK;
              a[half][s][2 * high + i] = scaled_pair(*reinterpret_cast<const uint16_t*>(ring.stages + from), factor);
            }
          }
        }
        fence_registers(a[half]);
        fence_registers(d[b]);
        cute::warpgroup_arrive();
#pragma unroll
        for (int s = 0; s < kTogether; ++s) {
          GroupedWgmma<Columns>::step(a[half][s], tokens + (grouped::token_step(N, set * kTogether + s) >> 4), d[b]);
        }
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<1>();
        fence_registers(a[half ^ 1]);  // in use until here
        if (set == 0 && b == 0 && previous >= 0) release(ring.empty + previous);
      }
    }
    previous = slot.index;
    slot.advance(ring.count);
  }
  cute::warpgroup_wait<0>();
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) fence_registers(d[b]);
  if (previous >= 0) release(ring.empty + previous);
}

}  // namespace inductor_ext
