// mxfp8_grouped_mm for compute capability 9.0, which has no tensor core for MX: weights stay FP8 in memory and in shared memory, and
// become bf16, their scale with them, on the way into wgmma's registers (`hopper_bf16.cuh`); or, where x is FP8 with a scale a row,
// FP8 tensor cores multiply, and each product of 32 is scaled when it is added (`hopper_fp8.cuh`). x in MXFP8 becomes bf16 first, by a
// launch of its own (`to_bf16.cuh`). One persistent, warp-specialised kernel for few and for many rows an expert.
//
//   out[t, n] = sum_k x[t, k] * 2^sx[t, k / 32] * w[e, n, k] * 2^sw[e, n, k / 32]     rows t of expert e, see op.py
//
// Measured on an H200 (benchmarks/results/h200/mxfp8_grouped_mm.json); its source also runs on a CPU in the tests
// (tests/support/hopper_on_cpu).
//
//   consumers      one warpgroup for W = 64 rows of weights, two for 128 and 256. Weights are the M side (swapped operands), since M
//                  is 64 and an expert often has fewer tokens than that; N tokens are the columns, 8 to 256 of them
//   a producer     one warp: weights and tokens come by the copy engine, scales in 4-byte asynchronous copies by its lanes
//   clusters       two CTAs with neighbouring channels and the same tokens (`ClusterW`), or the other way round (`ClusterN`): each
//                  brings half of what they share, to both. Where products bound the speed, L2 is the next limit: 5.5 TB/s, of
//                  which 256 x 128 tiles of FP8 at 1 000 TFLOP/s ask for 6.3; 5.2 with tokens shared, 4.2 with weights
//
// Bytes: weights are read once where an expert's tokens fit one tile, and 128 KB of them or more are on their way to an SM at any
// time where they bound the speed; 4 TB/s take 30. Instructions: at 4 TB/s an SM (132 of them, 1.7 GHz) gets 17.8 weights a clock.
// Two weights cost a 16-bit load, FP8 to fp16 (exact, NaN stays NaN, subnormals are normal there), two widenings to fp32, one
// narrowing to bf16, one product with the scale: 6 instructions of 32 lanes for 64 weights, so 1.7 of the 4 that an SM issues a
// clock, and 2.8 with all that is around them (sm_90a: about 320 instructions a warp and a stage of 64 rows); the two that run at half
// rate take 0.56 of their 2. Moving the e4m3 bits into place instead ((b & 0x7f) << 4, times 2^(120 + s)) is not cheaper once NaN
// (0x7f becomes 480) and scales above 2^7 (a factor that overflows) are right: 5 to 6 as well.
// K keeps its order, so that bf16 tokens come straight from memory by the copy engine. A permutation that gives a thread 16
// weights in one load would save the 16-bit loads, 0.5 of 3 instructions a weight, and would cost a pass over all tokens.
//
// Exact: e4m3 has 4 significant bits and a scale is a power of two. The product is a bf16 for every scale from 2^-124 (subnormals
// of the block: 2^-9 * 2^-124 is the smallest bf16) to 2^119 (448 * 2^119 < 2^128); outside that it is rounded once, or infinite,
// as fp32 would be. fp16 x has no kernel: scaled weights need bf16's range, and fp16 to bf16 loses three bits of x.
#pragma once

#include <algorithm>

#include "inductor_ext/launch.cuh"
#include "inductor_ext/tensor.h"
#include "mxfp8_grouped_mm/hopper_bf16.cuh"
#include "mxfp8_grouped_mm/hopper_common.cuh"
#include "mxfp8_grouped_mm/hopper_fp8.cuh"
#include "mxfp8_grouped_mm/to_bf16.cuh"

namespace inductor_ext {

// 64 channels of a tile from `channel` on, through shared memory: wgmma has channels as rows, the output has tokens.
template <typename Shape, typename Out, int N>
__device__ __forceinline__ void store_block(const float (&d)[N / 2], uint8_t* staged, const GroupedParams& p, const GroupedTile& tile,
                                            int channel) {
  constexpr int kTokens = Shape::kStagedTokens, kVector = 16 / Shape::kSize, kVectors = grouped::kGroupRows / kVector;
  const int thread = threadIdx.x % grouped::kGroupThreads;
  const int group = Shape::kGroups == 1 ? 0 : threadIdx.x / grouped::kGroupThreads;
  auto meet = [&] { cutlass::arch::NamedBarrier::sync(grouped::kGroupThreads, group); };
#pragma unroll
  for (int part = 0; part < N / kTokens; ++part) {
    if (part * kTokens >= tile.valid) continue;
    meet();  // what was staged before has been read
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float* sums = d + 4 * (part * kTokens / 8 + j);
      if constexpr (Shape::kSize == 2) {
        Out* tag = nullptr;
        cute::SM90_U16x4_STSM_T::copy(pack(tag, sums[0], sums[1]), pack(tag, sums[2], sums[3]),
                                      *reinterpret_cast<cute::uint128_t*>(staged + grouped::staged_row(thread, j)));
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int at = grouped::staged_at(4, grouped::fragment_column(thread, j, e), grouped::fragment_row(thread, i));
            *reinterpret_cast<float*>(staged + at) = sums[2 * i + e];
          }
        }
      }
    }
    meet();
    Out* out = static_cast<Out*>(p.out) + (tile.token + part * kTokens) * p.out_pitch + channel;
    for (int i = thread; i < min(kTokens, tile.valid - part * kTokens) * kVectors; i += grouped::kGroupThreads) {
      const int token = i / kVectors, at = i % kVectors * kVector;
      if (channel + at >= p.channels) continue;
      *reinterpret_cast<uint4*>(out + token * p.out_pitch + at) =
          *reinterpret_cast<const uint4*>(staged + grouped::staged_at(Shape::kSize, token, at));
    }
  }
}

// ---- loading ----------------------------------------------------------------------------------------------------------------

// The scales of one stage, by the producer's lanes: those of each of `rows` rows from row `first` on, the row's from its scale
// `begin` on, in two words a row, since they begin anywhere where K is not a multiple of 128. `scales_in` takes them out. Rows
// that are not there get zeros, numbers: what they scale is 0. Nothing is read past `end`.
__device__ __forceinline__ void copy_scales(uint8_t* to, int slots, const uint8_t* base, const uint8_t* end, int64_t first, int rows,
                                            int per_row, int begin, bool whole_words) {
  const uint8_t* from = base + first * per_row + begin;
#pragma unroll 2
  for (int row = threadIdx.x % 32; row < slots; row += 32) {
    const uint8_t* word = from + static_cast<int64_t>(row < rows ? row : 0) * per_row;
    word -= reinterpret_cast<uintptr_t>(word) % 4;
    const uint32_t slot = cute::cast_smem_ptr_to_uint(to + row * grouped::kScaleSlot);
    const int64_t left = row < rows ? end - word : 0;
    copy_word(slot, word, static_cast<int>(left < 4 ? left : 4));
    if (!whole_words) copy_word(slot + 4, left > 4 ? word + 4 : word, static_cast<int>(left < 8 ? (left > 4 ? left - 4 : 0) : 4));
  }
}

// A scale for each token of a tile. Those past its end get zeros: their columns are not stored.
template <int N>
__device__ __forceinline__ void copy_row_scales(uint8_t* to, const uint8_t* base, const GroupedTile& tile) {
#pragma unroll
  for (int token = threadIdx.x % 32; token < N; token += 32) {
    const bool there = token < tile.valid;
    const uint8_t* from = base + (static_cast<int64_t>(tile.token) + (there ? token : 0)) * 4;
    copy_word(cute::cast_smem_ptr_to_uint(to + token * 4), from, there ? 4 : 0);
  }
}

// A box of weights or tokens, where the cluster's CTAs share them for all, at the same place and barrier in each.
template <int Cluster>
__device__ __forceinline__ void load_weights(const CUtensorMap* w, uint64_t* full, uint64_t hint, uint8_t* to, int k, int channel,
                                             int expert) {
  if constexpr (Cluster == 1) {
    cute::SM90_TMA_LOAD_3D::copy(w, full, hint, to, k, channel, expert);
  } else {
    cute::SM90_TMA_LOAD_MULTICAST_3D::copy(w, full, (1 << Cluster) - 1, hint, to, k, channel, expert);
  }
}
template <int Cluster>
__device__ __forceinline__ void load_tokens(const CUtensorMap* x, uint64_t* full, uint8_t* to, int k, int token) {
  if constexpr (Cluster == 1) {
    load_tile(x, full, to, k, token);
  } else {
    load_tile_to((1 << Cluster) - 1, x, full, to, k, token);
  }
}

template <typename Shape, int N>
__device__ __forceinline__ void produce(const GroupedParams& p, const GroupedSchedule& schedule, const GroupedRing& ring) {
  constexpr int kBox = Shape::kBoxTokens;
  const int lane = threadIdx.x % 32, per_row = p.k / grouped::kBlock, stages = grouped::ceil_of(p.k, Shape::kStageK);
  const int rank_w = grouped::rank_of(blockIdx.x, Shape::kClusterW), rank_n = grouped::rank_of(blockIdx.x, Shape::kClusterN);
  const int tiles = schedule.first[p.experts];
  const uint8_t* w_end = p.w_scale + static_cast<int64_t>(p.experts) * p.channels * per_row;
  Slot slot;
  slot.phase = 1;  // the first time round every stage is free
  int expert = 0;
  for (int index = blockIdx.x / Shape::kCluster; index < tiles; index += gridDim.x / Shape::kCluster) {
    const GroupedTile tile = schedule.tile<Shape>(index, expert);
    const int boxes = grouped::ceil_of(tile.valid, kBox);
    const uint32_t bytes = Shape::kWeights + boxes * kBox * Shape::kStageK * Shape::kSizeOfX;
    const uint64_t hint = tile.alone ? kEvictFirst : kEvictNormal;
    // A cluster's second CTA may have no channels, or no tokens: it brings its part, and what it multiplies is not stored.
    const int scale_rows = min(Shape::kChannels, max(p.channels - tile.channel, 0));
    const int64_t scale_row = static_cast<int64_t>(tile.expert) * p.channels + (scale_rows > 0 ? tile.channel : 0);
    for (int at = 0; at < stages; ++at) {
      EmptyBarrier::wait(ring.empty + slot.index, slot.phase);
      uint64_t* full = ring.full + slot.index;
      uint8_t* stage = ring.stages + slot.index * Shape::kStage;
      if (lane == 0) {
        const int k = at * Shape::kStageK;
        FullBarrier::arrive_and_expect_tx(full, bytes);
        const int row = rank_n * Shape::kBoxChannels;
        load_weights<Shape::kClusterN>(&p.w, full, hint, stage + row * Shape::kStageK, k, tile.channel + row, tile.expert);
        uint8_t* to = stage + Shape::kWeights;
        for (int box = rank_w; box < boxes; box += Shape::kClusterW) {
          const int token = tile.token + box * kBox;
          uint8_t* rows = to + box * kBox * 128;
          load_tokens<Shape::kClusterW>(&p.x, full, rows, k, token);
          if (Shape::kStageK * Shape::kSizeOfX == 256) load_tokens<Shape::kClusterW>(&p.x, full, rows + N * 128, k + 64, token);
        }
      }
      __syncwarp();
      uint8_t* scales = ring.scales + slot.index * Shape::kScales;
      const int begin = at * Shape::kStageScales;
      copy_scales(scales, Shape::kChannels, p.w_scale, w_end, scale_row, scale_rows, per_row, begin, Shape::kBy128 || p.whole_words);
      if constexpr (Shape::kFp8) {  // the tokens' own, which are needed once all of K is summed
        if (at + 1 == stages && tile.valid > 0) copy_row_scales<N>(scales + Shape::kChannels * grouped::kScaleSlot, p.x_scale, tile);
      }
      cutlass::arch::cpasync_barrier_arrive_noinc(full);
      slot.advance(ring.count);
    }
  }
  allow_next_kernel();
}

// One tile's sums over all of K, in the first Columns / 2 of each block of d.
template <typename Shape, int N, int Columns>
__device__ __forceinline__ void sums(float (&d)[Shape::kBlocks][N / 2], const GroupedRing& ring, Slot& slot, const GroupedParams& p,
                                     const GroupedTile& tile) {
  if constexpr (Shape::kFp8) {
    multiply_fp8<Shape, N, Columns>(d, ring, slot, p, tile);
  } else {
    multiply_bf16<Shape, N, Columns>(d, ring, slot, p, tile);
  }
}

template <typename Shape, typename Out, int N>
__device__ __forceinline__ void consume(const GroupedParams& p, const GroupedSchedule& schedule, const GroupedRing& ring, uint8_t* staged) {
  const int tiles = schedule.first[p.experts];
  const int group = threadIdx.x / grouped::kGroupThreads;
  float d[Shape::kBlocks][N / 2];
  Slot slot;
  int expert = 0;
  for (int index = blockIdx.x / Shape::kCluster; index < tiles; index += gridDim.x / Shape::kCluster) {
    const GroupedTile tile = schedule.tile<Shape>(index, expert);
    const int columns = grouped::columns_for(tile.valid, N);
    if (columns == N) {
      sums<Shape, N, N>(d, ring, slot, p, tile);
    } else if constexpr (N >= 64) {
      if (N == 256 && columns == N / 4 * 3) {
        if constexpr (N == 256) sums<Shape, N, N / 4 * 3>(d, ring, slot, p, tile);
      } else if (columns == N / 2) {
        sums<Shape, N, N / 2>(d, ring, slot, p, tile);
      } else {
        sums<Shape, N, N / 4>(d, ring, slot, p, tile);
      }
    }
#pragma unroll
    for (int b = 0; b < Shape::kBlocks; ++b) {
      const int channel = tile.channel + (group * Shape::kBlocks + b) * grouped::kGroupRows;
      store_block<Shape, Out, N>(d[b], staged + group * Shape::kStaged, p, tile, channel);
    }
  }
}

// ---- the kernel -------------------------------------------------------------------------------------------------------------

template <GroupedX Kind, typename Out, int W, int N, int ClusterW, int ClusterN,
          typename Shape = GroupedShape<Kind, Out, W, N, ClusterW, ClusterN>>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kCtas) mxfp8_grouped_mm_kernel(const __grid_constant__ GroupedParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  GroupedRing ring;
  ring.count = p.stages;
  ring.stages = shared;
  ring.scales = shared + p.stages * Shape::kStage;
  uint8_t* staged = ring.scales + p.stages * Shape::kScales;
  ring.full = reinterpret_cast<uint64_t*>(staged + Shape::kGroups * Shape::kStaged);
  ring.empty = ring.full + kGroupedMaxStages;
  GroupedSchedule schedule;
  schedule.first = reinterpret_cast<int*>(ring.empty + kGroupedMaxStages);
  schedule.ends = schedule.first + p.experts + 1;
  schedule.experts = p.experts, schedule.group = p.group;
  schedule.channel_tiles = grouped::ceil_of(p.channels, ClusterW * Shape::kChannels);

  const int warp = threadIdx.x / 32;
  constexpr int kProducer = Shape::kConsumers / 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < p.stages; ++s) {
      FullBarrier::init(ring.full + s, 1 + 32);  // the copy engine's bytes, and the producer's lanes
      EmptyBarrier::init(ring.empty + s, Shape::kCluster * Shape::kConsumers / 32);  // those of all CTAs that this one's loads reach
    }
    cutlass::arch::fence_barrier_init();
  } else if (threadIdx.x == kProducer * 32) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.w));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.x));
  }
  if constexpr (Shape::kCluster > 1) {  // before another CTA's loads and arrivals
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  }
  // Which weights are needed is in offs, so nothing can be fetched before the kernel ahead has ended.
  wait_for_previous_kernel();
  for (int e = threadIdx.x; e < p.experts; e += Shape::kThreads) schedule.ends[e] = grouped::bounded_end(__ldg(p.offs + e), p.tokens);
  __syncthreads();
  if (warp == 0) schedule.make<N * ClusterN>();
  __syncthreads();

  if (warp >= kProducer) {
    if constexpr (Shape::kMovesRegisters) cutlass::arch::warpgroup_reg_dealloc<Shape::kProducerRegisters>();
    if (warp == kProducer) produce<Shape, N>(p, schedule, ring);
  } else {
    if constexpr (Shape::kMovesRegisters) cutlass::arch::warpgroup_reg_alloc<Shape::kConsumerRegisters>();
    consume<Shape, Out, N>(p, schedule, ring, staged);
  }
  if constexpr (Shape::kCluster > 1) {  // no CTA leaves while another may still arrive at its barriers
    cute::cluster_arrive();
    cute::cluster_wait();
  }
}

// ---- host -------------------------------------------------------------------------------------------------------------------

// A CTA's tile is W output channels by N tokens; a cluster's are side by side. Everything is checked before anything is launched.
template <GroupedX Kind, typename Out, int W, int N, int ClusterW = 1, int ClusterN = 1>
struct Mxfp8GroupedMm {
  using Shape = GroupedShape<Kind, Out, W, N, ClusterW, ClusterN>;
  using X = std::conditional_t<Kind == GroupedX::kBf16, __nv_bfloat16, __nv_fp8_e4m3>;

  static void run(TensorView x, Optional<TensorView> x_scale, TensorView w, TensorView w_scale, TensorView offs, TensorView out) {
    Symbol tokens("T"), experts("E"), channels("N"), k("K");
    Device device;
    TensorMatcher({tokens, k}).dtype<X>().strides({kAny, 1}).device(device).verify(x, "x");
    TensorMatcher({experts, channels, k}).dtype<__nv_fp8_e4m3>().contiguous().device(device).verify(w, "w");
    check_sizes(experts.value(), channels.value(), k.value(), w);
    if (Shape::kBy128 && k.value() % grouped::kStageK != 0) {
      TVM_FFI_THROW(ValueError) << "w: wanted K to be a multiple of " << grouped::kStageK << ", which share a scale, found K = "
                                << k.value();
    }
    const int64_t per_row = k.value() / grouped::kBlock;
    TensorMatcher({experts, channels, per_row}).dtype<__nv_fp8_e8m0, uint8_t>().contiguous().device(device).verify(w_scale, "w_scale");
    if (x_scale.has_value() != (Kind != GroupedX::kBf16)) {
      TVM_FFI_THROW(ValueError) << "x_scale: wanted " << (Kind != GroupedX::kBf16 ? "the scales of x" : "None") << " for "
                                << dtype_name(DTypeOf<X>::value) << " x, found " << (x_scale.has_value() ? "a tensor" : "None");
    }
    if constexpr (Shape::kFp8) {
      TensorMatcher({tokens, 1}).dtype<float>().contiguous().device(device).verify(*x_scale, "x_scale");
    }
    TensorMatcher({experts}).dtype<int32_t>().contiguous().device(device).verify(offs, "offs");
    TensorMatcher({tokens, channels}).dtype<Out>().strides({kAny, 1}).device(device).verify(out, "out");
    if (tokens.value() > (int64_t{1} << 30)) TVM_FFI_THROW(ValueError) << "x: wanted at most 2^30 rows, found " << tokens.value();
    if (tokens.value() == 0 || experts.value() == 0 || channels.value() == 0) return;

    const int64_t x_pitch = tokens.value() == 1 ? k.value() : x.strides()[0];
    const int64_t out_pitch = tokens.value() == 1 ? channels.value() : out.strides()[0];
    check_rows(x, "x", x_pitch * static_cast<int64_t>(sizeof(X)));
    check_rows(w, "w", k.value());
    check_rows(out, "out", out_pitch * Shape::kSize);

    GroupedParams p;
    encode<3>(&p.w, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, data(w), {k.value(), channels.value(), experts.value()},
              {k.value(), k.value() * channels.value()}, {Shape::kStageK, Shape::kBoxChannels, 1});
    if constexpr (Shape::kSizeOfX == 1) {
      encode(&p.x, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, data(x), tokens.value(), k.value(), x_pitch, Shape::kBoxTokens, 128);
    } else {
      encode(&p.x, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data(x), tokens.value(), k.value(), x_pitch * 2, Shape::kBoxTokens, 64);
    }
    p.w_scale = data<uint8_t>(w_scale);
    p.x_scale = x_scale.has_value() ? data<uint8_t>(*x_scale) : nullptr;
    p.offs = data<int32_t>(offs);
    p.out = data(out), p.out_pitch = out_pitch;
    p.experts = static_cast<int>(experts.value()), p.tokens = static_cast<int>(tokens.value());
    p.channels = static_cast<int>(channels.value()), p.k = static_cast<int>(k.value());
    p.stages = Shape::stages(p.experts);
    p.group = std::max(1, 1024 / (N * ClusterN));
    p.whole_words = p.k % grouped::kStageK == 0 && aligned(p.w_scale, 4);
    launch(p, device.id());
  }

 private:
  static void check_sizes(int64_t experts, int64_t channels, int64_t k, const TensorView& w) {
    if (k % grouped::kBlock != 0 || channels % 8 != 0 || k == 0 || k > (1 << 24) || channels > (1 << 24)) {
      TVM_FFI_THROW(ValueError) << "w: wanted [E, N, K] with N a multiple of 8 and K a multiple of 32, at most 2^24 each, found shape "
                                << shape_of(w);
    }
    if (experts > kGroupedMaxExperts) {
      TVM_FFI_THROW(ValueError) << "w: wanted at most " << kGroupedMaxExperts << " experts, found " << experts;
    }
  }
  static void check_rows(const TensorView& view, const char* name, int64_t pitch_bytes) {
    if (pitch_bytes % 16 != 0 || !aligned(data(view), 16)) {
      TVM_FFI_THROW(ValueError) << name << ": wanted rows that start at multiples of 16 bytes, found strides " << strides_of(view)
                                << " at address ..." << reinterpret_cast<uintptr_t>(data(view)) % 16;
    }
  }
  static void launch(const GroupedParams& p, int device) {
    DeviceGuard guard(device);
    const int64_t token_tiles = p.tokens / (N * ClusterN) + std::min(p.experts, p.tokens);  // the most there can be
    const int64_t tiles = token_tiles * ceil_div(p.channels, ClusterW * Shape::kChannels);  // a cluster's
    if (tiles >= (int64_t{1} << 31)) TVM_FFI_THROW(ValueError) << "x: wanted fewer than 2^31 tiles of " << N << " rows, found " << tiles;
    auto* kernel = mxfp8_grouped_mm_kernel<Kind, Out, W, N, ClusterW, ClusterN>;
    static OncePerDevice allowed;
    allowed.run(device, [&] {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit), "cudaFuncSetAttribute");
    });
    const int64_t room = static_cast<int64_t>(sm_count(device)) * Shape::kCtas / Shape::kCluster;
    if (room == 0) TVM_FFI_THROW(RuntimeError) << "a device with no room for a cluster of " << Shape::kCluster << " CTAs";
    Launch launch(static_cast<unsigned>(std::min(tiles, room) * Shape::kCluster), Shape::kThreads);
    launch.stream(env_stream(device)).shared_memory(Shape::bytes(p.experts)).programmatic();
    if (Shape::kCluster > 1) launch.cluster(Shape::kCluster);
    launch.run(kernel, p);
  }
};

}  // namespace inductor_ext
