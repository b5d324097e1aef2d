// Sums on FP8 tensor cores, for e4m3 tokens with one scale a row. wgmma multiplies 32 elements of K at a time, as many as share a scale
// of the weights: each product of 32 goes to registers of its own, and from there into the sums, times that scale. Where 128 elements
// share one (`kFp8By128`) wgmma adds the four products of a stage, which go into the sums together: a quarter of the FFMAs.
//
// The product before is added while the next one runs, where registers for two fit beside the sums, and the two warpgroups take turns
// at the tensor cores in any case.
//
//   d[n, t] += 2^sw[n, k / 32] * (w[n, 32 of k] . x[t, 32 of k]ᵀ)        out[t, n] = sx[t] * d[n, t]
//
// Weights are the M side, so that a thread has two rows of a block and needs two scales for all of its columns: one FFMA a sum, and
// little beside it. 64 rows by N tokens by 32 of K take N / 2 cycles of the tensor cores and N / 2 of the four FP32 pipes, so that
// the two can keep each other busy, where scales of tokens that change along K too would need a product of scales for every sum:
// three times the instructions (prior art: 50 to 100 % of FP8's peak).
//
// FP8 wgmma keeps 14 bits of the products that it adds at once. It adds 32 here, and the sums are fp32: more exact than FP8 GEMMs
// that promote every 128, as `kFp8By128` does, or never.
#pragma once

#include "mxfp8_grouped_mm/hopper_common.cuh"

namespace inductor_ext {

// d += part * scale[row]
template <int Columns, int M>
__device__ __forceinline__ void promote(float (&d)[M], const float (&part)[Columns / 2], const float (&scale)[2]) {
#pragma unroll
  for (int j = 0; j < Columns / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) d[4 * j + 2 * i + e] = fmaf(part[4 * j + 2 * i + e], scale[i], d[4 * j + 2 * i + e]);
    }
  }
}

// One tile's sums over all of K, in the first Columns / 2 of each block of d, times the tokens' scales.
template <typename Shape, int N, int Columns>
__device__ __forceinline__ void multiply_fp8(float (&d)[Shape::kBlocks][N / 2], const GroupedRing& ring, Slot& slot,
                                             const GroupedParams& p, const GroupedTile& tile) {
  using Mma = Wgmma<__nv_fp8_e4m3, __nv_fp8_e4m3, Columns>;
  constexpr int kBlocks = Shape::kBlocks, kParts = Shape::kParts;
  constexpr int kChained = Shape::kBy128 ? grouped::kStageK : grouped::kBlock;  // elements of K that share a scale
  constexpr int kProducts = grouped::kStageK / kChained * kBlocks;
  const int thread = threadIdx.x % grouped::kGroupThreads;
  // Of one lane, so that the compiler knows that a warp's are the same: descriptors then need no way to uniform registers.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x / grouped::kGroupThreads), 0);
  const int row0 = group * kBlocks * grouped::kGroupRows;
  const int row = row0 + grouped::fragment_row(thread, 0);
  int first_scale = row * grouped::kScaleSlot;
  keep(first_scale);
  const Release<Shape::kCluster> release;
  const int per_row = p.k / grouped::kBlock, stages = grouped::ceil_of(p.k, grouped::kStageK);
  // All rows of a thread are multiples of 8 apart, so that their scales begin alike in their words.
  const int shift = grouped::scale_shift(reinterpret_cast<uintptr_t>(p.w_scale), tile.expert, p.channels, tile.channel + row, per_row);
  float part[kParts][Columns / 2];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[b][i] = 0.f;
  }
  int held = 0;
  for (int at = 0; at < stages; ++at) {
    FullBarrier::wait(ring.full + slot.index, slot.phase);
    std::conditional_t<Shape::kBy128, SharedScales<kBlocks>, WeightScales<kBlocks>> scales;
    const uint8_t* own_scales = ring.scales + (slot.index * Shape::kScales + first_scale);
    if constexpr (Shape::kBy128) {
      scales.read(own_scales, shift);
    } else {
      scales.read(own_scales, shift, grouped::scales_there(per_row, at, Shape::kStageScales));
    }
    const uint8_t* stage = ring.stages + slot.index * Shape::kStage;
    const uint64_t weights = operand(stage + row0 * grouped::kStageK), tokens = operand(stage + Shape::kWeights);
    // Product number `which` of the stage: of elements that share a scale, one block after the other.
    auto issue = [&](int which) {
      const int b = which % kBlocks;
      fence_registers(part[which % kParts]);
      cute::warpgroup_arrive();
      if constexpr (Shape::kBy128) {
        Mma::stage(stage + (row0 + b * grouped::kGroupRows) * grouped::kStageK, stage + Shape::kWeights, part[which % kParts], true);
      } else {
        const int k = which / kBlocks * kChained;
        Mma::step(weights + ((b * grouped::kGroupRows * grouped::kStageK + k) >> 4), tokens + (k >> 4), part[which % kParts]);
      }
      cute::warpgroup_commit_batch();
    };
    // Nothing is under way from one stage to the next: ptxas would serialise all of it. The other warpgroup's products fill the gap.
    if constexpr (kParts == 2) issue(0);
#pragma unroll
    for (int which = 0; which < kProducts; ++which) {
      if constexpr (kParts == 1) issue(which);
      if (kParts == 2 && which + 1 < kProducts) {
        issue(which + 1);
        cute::warpgroup_wait<1>();
      } else {
        cute::warpgroup_wait<0>();
      }
      fence_registers(part[which % kParts]);
      const int step = which / kBlocks, b = which % kBlocks;
      const float scale[2] = {scales.scale(b, 0, step), scales.scale(b, 1, step)};
      promote<Columns>(d[b], part[which % kParts], scale);
    }
    held = slot.index;
    if (at + 1 < stages) release(ring.empty + held);
    slot.advance(ring.count);
  }
  // The last stage, which is still held, has the tokens' scales.
  const float* token_scales = reinterpret_cast<const float*>(ring.scales + held * Shape::kScales + Shape::kChannels * grouped::kScaleSlot);
#pragma unroll
  for (int j = 0; j < Columns / 8; ++j) {
    const float2 two = *reinterpret_cast<const float2*>(token_scales + grouped::fragment_column(thread, j, 0));
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) d[b][4 * j + 2 * i] *= two.x, d[b][4 * j + 2 * i + 1] *= two.y;
    }
  }
  __syncwarp();
  release(ring.empty + held);
}

}  // namespace inductor_ext
