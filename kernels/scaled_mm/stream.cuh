// scaled_mm for few tokens: the weights stream through once, as wgmma's M operand (swapped operands), and K is split over a
// cluster of CTAs that add their sums through distributed shared memory: no workspace, no memset, one launch.
//
//   grid (split, tiles of W output channels, tiles of T tokens), clusters of `split` CTAs
//   each CTA: D[W, T] = b[W, its K] · a[T, its K]ᵀ → every CTA of the cluster gets T / split tokens of all sums, adds, scales, stores
//
// A GEMM of N = 1024 has 16 tiles of 64 channels for 132 SMs: without the split, 16 SMs would pull all the weights. With
// `static_b` the first stages of weights are requested before the kernel ahead has ended.
#pragma once

#include "inductor_ext/launch.cuh"
#include "inductor_ext/tensor.h"
#include "inductor_ext/hopper.cuh"
#include "scaled_mm/problem.cuh"

namespace inductor_ext {

constexpr int kStreamMaxStages = 24;
// Everything a CTA reads should be asked for at once: a stage that has to be freed first costs a trip to memory. Where there are
// more CTAs than SMs, two of them share an SM, and one computes while the other waits.
constexpr int kStreamShared = kSharedLimit, kStreamSharedOfTwo = 110 * 1024;

template <int T, int W>
struct StreamShared {
  static constexpr int kStage = (W + T) * kBlockK;
  static constexpr int kSums = T * (W + 4) * 4;  // four floats of padding: the accumulators' stores then meet no bank twice
  static constexpr int kVectors = (2 * W + T) * 4;
  static constexpr int kFixed = kSums + kVectors + (2 * kStreamMaxStages + 1) * 8;
  // Sums leave for the other CTAs from where the stages were.
  static constexpr int ring(int stages) { return stages * kStage > kSums ? stages * kStage : (kSums + 1023) / 1024 * 1024; }
  static constexpr int bytes(int stages) { return ring(stages) + kFixed; }
};

// From this many tokens on, the copy engine moves the sums between CTAs: 4-byte stores took 1.5 µs for 64 × 64 of them.
constexpr int kBulkTokens = 32;

struct StreamParams {
  Products products;
  int stages;
  int split;
  bool static_b;

};

template <typename EA, typename EB, typename Out, int T, int W, bool Exact>
__global__ void __launch_bounds__(W / 64 * kWarpgroup + 32) scaled_mm_stream_kernel(const __grid_constant__ StreamParams p) {
  using Shared = StreamShared<T, W>;
  constexpr int kConsumers = W / 64 * kWarpgroup;
  extern __shared__ __align__(1024) uint8_t shared[];
  constexpr bool kBulk = T >= kBulkTokens;
  float* sums = reinterpret_cast<float*>(shared + Shared::ring(p.stages));  // [split][T / split][W + 4]
  float* channel_scale = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(sums) + Shared::kSums);
  float* channel_bias = channel_scale + W;
  float* token_scale = channel_bias + W;
  uint64_t* full = reinterpret_cast<uint64_t*>(token_scale + T);
  uint64_t* empty = full + kStreamMaxStages;
  uint64_t* arrived = empty + kStreamMaxStages;  // the sums of the other CTAs

  const int split = p.split, rank = blockIdx.x;
  int which = 0;
  while (which + 1 < p.products.count && static_cast<int>(blockIdx.y) >= p.products.of[which + 1].first_tile) ++which;
  const Product& product = p.products.of[which];
  const int channel0 = (blockIdx.y - product.first_tile) * W, token0 = blockIdx.z * T;
  const int blocks = (product.k + kBlockK - 1) / kBlockK;
  const int begin = blocks * rank / split, count = blocks * (rank + 1) / split - begin;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool producer = threadIdx.x == kConsumers;
  if (producer) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&product.b));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&product.a));
    for (int s = 0; s < p.stages; ++s) FullBarrier::init(full + s, 1), EmptyBarrier::init(empty + s, kConsumers / 32);
    FullBarrier::init(arrived, 1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (split > 1) cute::cluster_arrive_relaxed();  // awaited before the first store into another CTA: it must have begun

  if (warp == kConsumers / 32) {
    if (producer) {
      auto weights = [&](int i, int s) {
        load_tile(&product.b, full + s, shared + s * Shared::kStage, (begin + i) * kBlockK, channel0);
      };
      auto tokens = [&](int i, int s) {
        load_tile(&product.a, full + s, shared + s * Shared::kStage + W * kBlockK, (begin + i) * kBlockK, token0);
      };
      if (!p.static_b) wait_for_previous_kernel();
      const int ahead = min(count, p.stages);
      for (int i = 0; i < ahead; ++i) {
        FullBarrier::arrive_and_expect_tx(full + i, Shared::kStage);
        weights(i, i);
      }
      if (p.static_b) wait_for_previous_kernel();
      for (int i = 0; i < ahead; ++i) tokens(i, i);
      Slot slot;
      for (int i = ahead; i < count; ++i) {
        EmptyBarrier::wait(empty + slot.index, slot.phase);
        FullBarrier::arrive_and_expect_tx(full + slot.index, Shared::kStage);
        weights(i, slot.index);
        tokens(i, slot.index);
        slot.advance(p.stages);
      }
      allow_next_kernel();
    }
    __syncwarp();
    if (split > 1) {
      cute::cluster_wait();
      cute::cluster_arrive();
      cute::cluster_wait();
    }
    return;
  }

  wait_for_previous_kernel();
  for (int i = threadIdx.x; i < W; i += kConsumers) {
    const int channel = min(channel0 + i, product.n - 1);
    channel_scale[i] = product.scale_b[static_cast<int64_t>(channel) * product.scale_b_stride];
    channel_bias[i] = product.bias == nullptr ? 0.f : widen(static_cast<const Out*>(product.bias)[channel]);
  }
  for (int i = threadIdx.x; i < T; i += kConsumers) {
    token_scale[i] = product.scale_a[static_cast<int64_t>(min(token0 + i, p.products.m - 1)) * product.scale_a_stride];
  }

  const int group = warp / 4;
  float d[T / 2];
#pragma unroll
  for (int i = 0; i < T / 2; ++i) d[i] = 0.f;
  Slot slot;
  int previous = -1;
  for (int i = 0; i < count; ++i) {
    FullBarrier::wait(full + slot.index, slot.phase);
    const uint8_t* weights = shared + slot.index * Shared::kStage + group * 64 * kBlockK;
    const uint8_t* tokens = shared + slot.index * Shared::kStage + W * kBlockK;
    if constexpr (Exact) {
      float part[T / 2];
      cute::warpgroup_arrive();
      Wgmma<EB, EA, T>::stage(weights, tokens, part, true);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
      if (lane == 0) EmptyBarrier::arrive(empty + slot.index);
      fence_registers(part);
#pragma unroll
      for (int j = 0; j < T / 2; ++j) d[j] += part[j];
    } else {
      fence_registers(d);
      cute::warpgroup_arrive();
      Wgmma<EB, EA, T>::stage(weights, tokens, d, false);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      if (previous >= 0 && lane == 0) EmptyBarrier::arrive(empty + previous);
      previous = slot.index;
    }
    slot.advance(p.stages);
  }
  cute::warpgroup_wait<0>();
  fence_registers(d);

  // Token t of the tile belongs to CTA t / each; `sums` there holds what every CTA of the cluster contributes.
  const int each = T / split, valid = min(T, p.products.m - token0);
  const bool bulk = kBulk && split > 1;
  const int part = each * (W + 4);  // floats that one CTA has for another
  float* own = bulk ? reinterpret_cast<float*>(shared) : sums;
  if (bulk) cutlass::arch::NamedBarrier::sync(kConsumers, 0);  // all have read their last stage
  if (split > 1 && !bulk) cute::cluster_wait();
  const int row = group * 64 + (warp % 4) * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < T / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int token = 8 * j + 2 * (lane % 4) + e;
      if (token < valid) {
        if (split > 1 && !bulk) {
          const uint32_t remote = address_in(token / each, sums + rank * part + token % each * (W + 4) + row);
          store_remote(remote, d[4 * j + e]);
          store_remote(remote + 8 * 4, d[4 * j + 2 + e]);
        } else {
          float* to = own + token * (W + 4) + row;
          to[0] = d[4 * j + e];
          to[8] = d[4 * j + 2 + e];
        }
      }
    }
  }
  const int mine = min(each, valid - rank * each);
  if (bulk) {
    cute::tma_store_fence();
    cute::cluster_wait();  // the others have begun, and their barrier is ready
    cutlass::arch::NamedBarrier::sync(kConsumers, 0);
    if (threadIdx.x < split) {
      const int to = threadIdx.x, bytes = min(each, valid - to * each) * (W + 4) * 4;
      if (to == rank) {
        FullBarrier::arrive_and_expect_tx(arrived, max(mine, 0) * (W + 4) * 4 * (split - 1));  // its own it reads where they are
      } else if (bytes > 0) {
        copy_to(to, sums + rank * part, own + to * part, bytes, arrived);
      }
    }
    FullBarrier::wait(arrived, 0);
    cute::cluster_arrive();  // whoever copied to this CTA may leave
  } else if (split > 1) {
    cute::cluster_arrive();  // release: the stores above are seen after the wait
    cute::cluster_wait();
    cutlass::arch::NamedBarrier::sync(kConsumers, 0);
  } else {
    cutlass::arch::NamedBarrier::sync(kConsumers, 0);
  }

  constexpr int kChunks = W / 8;
  Out* out = static_cast<Out*>(p.products.out) + product.column + channel0;
  for (int i = threadIdx.x; i < mine * kChunks; i += kConsumers) {
    const int token = i / kChunks, channel = i % kChunks * 8;
    if (channel0 + channel >= product.n) continue;
    float v[8] = {};
    for (int s = 0; s < split; ++s) {
      const float* sums_of = bulk && s == rank ? own + rank * part : sums + s * part;
      const float4* from = reinterpret_cast<const float4*>(sums_of + token * (W + 4) + channel);
      const float4 low = from[0], high = from[1];
      v[0] += low.x, v[1] += low.y, v[2] += low.z, v[3] += low.w;
      v[4] += high.x, v[5] += high.y, v[6] += high.z, v[7] += high.w;
    }
    const int in_tile = rank * each + token;
    const float scale = token_scale[in_tile];
#pragma unroll
    for (int c = 0; c < 8; ++c) v[c] = v[c] * scale * channel_scale[channel + c] + channel_bias[channel + c];
    Out* to = out + static_cast<int64_t>(token0 + in_tile) * p.products.out_pitch + channel;
    if constexpr (sizeof(Out) == 2) {
      Out* tag = nullptr;
      *reinterpret_cast<uint4*>(to) = make_uint4(pack(tag, v[0], v[1]), pack(tag, v[2], v[3]), pack(tag, v[4], v[5]), pack(tag, v[6], v[7]));
    } else {
      reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
      reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
  }
  if (bulk) cute::cluster_wait();  // what the others copy from here has been read
}

// T tokens and W = 64 or 128 output channels a CTA; `first` is the split: 1, 2, 4 or 8.
template <typename EA, typename EB, typename Out, int T, int W, bool Exact>
struct ScaledMmStream : ScaledMmEntries<ScaledMmStream<EA, EB, Out, T, W, Exact>, EA, EB, Out> {
  static constexpr bool kStores = true;
  static_assert(T % 8 == 0 && T <= 128 && (W == 64 || W == 128));

  static Boxes boxes(int64_t split, int64_t) {
    if ((split != 1 && split != 2 && split != 4 && split != 8) || T % split != 0) {
      TVM_FFI_THROW(ValueError) << "split: wanted 1, 2, 4 or 8, and no more than " << T << " tokens, found " << split;
    }
    return {T, W, W, 0, 0};
  }

  static void launch(const Products& products, int device, bool static_b, int split, int) {
    using Shared = StreamShared<T, W>;
    int longest = 0;
    for (int i = 0; i < products.count; ++i) longest = std::max(longest, products.of[i].k);
    const int blocks = static_cast<int>(ceil_div(ceil_div(longest, kBlockK), split));
    const dim3 grid(split, products.tiles_n, static_cast<unsigned>(ceil_div(products.m, T)));
    const int64_t ctas = static_cast<int64_t>(grid.x) * grid.y * grid.z;
    const int budget = ctas <= sm_count(device) ? kStreamShared : kStreamSharedOfTwo;
    const int room = std::max((budget - Shared::kFixed) / Shared::kStage, 4);
    StreamParams p{products, std::min({blocks, room, kStreamMaxStages}), split, static_b};
    auto* kernel = scaled_mm_stream_kernel<EA, EB, Out, T, W, Exact>;
    static OncePerDevice allowed;
    allowed.run(device, [&] {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit), "cudaFuncSetAttribute");
    });
    Launch launch(grid, W / 64 * kWarpgroup + 32);
    launch.stream(env_stream(device)).shared_memory(Shared::bytes(p.stages)).programmatic();
    if (split > 1) launch.cluster(split);
    launch.run(kernel, p);
  }
};

}  // namespace inductor_ext
