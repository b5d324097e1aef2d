// The KV-cache store: K and V scaled, clamped, cast to FP8 and scattered into their caches, in one launch.
//
//   k_cache[row] = cast(k_program(k[t])),  v_cache[row] = cast(v_program(v[t])),  row = loc[t] * mult + offset
//
//   k, v              [T, ...]  float, __half or __nv_bfloat16; trailing dims contiguous, row stride free
//   k_cache, v_cache  [S, ...]  FP8 or its bytes as uint8; likewise. Or [blocks, block, ..., D] with a D of unit stride, the other
//                     strides free (LAYOUTS)
//   k_scale, v_scale  operand Scalar<0, S> of either program, one element or one a head; c0..c7 are shared by both
//   loc               [T] int32 or int64; without it row = t * mult + offset
//   at                [T] likewise, or none: cache_rows.cuh
//   wrap              a negative row counts from the end (index_put); otherwise a negative loc[t] is padding and is skipped
// Rows outside [0, S) are never written. `check` reads back whether there was one, and throws IndexError.
//
// LAYOUTS, compiled in. By default a row is one run of memory, S of them lie at one distance, and a tensor has one scale.
//   kBlocks           S = blocks * block; blocks, their rows and a row's heads lie at distances of their own
//   kKHeads, kVHeads  k's (v's) scale is [H]: one for each head of [T, H, D]
//
// REPEATED ROWS: one token's K and V are stored whole, the last one's up to kScanTokens tokens.
//   few tokens, scan_few    a block a token looks through loc[t+1..T) while its loads are in flight, and leaves the row to a later
//                           token.
//   up to 4096, scan_many   8 tokens a block, each thread comparing its share of the later locs with all 8. Blocks of late tokens,
//                           with which the kernel ends, have little to look through.
//   more, claim_many        see there: looking through loc would be quadratic, so rows are claimed in a table instead.
//   rows that cannot repeat (one token; no loc)  scan_few and scan_many without the scan.
#pragma once

#include <tvm/ffi/function.h>

#include <algorithm>

#include "inductor_ext/cache_rows.cuh"
#include "inductor_ext/fp8.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/steps.cuh"
#include "inductor_ext/tensor.h"

namespace inductor_ext {

constexpr int kFewTokens = 1024;
constexpr int kMostFewElements = 65535 * 32;  // of a row: a piece of 32 threads or more for each block of grid.y

template <bool Blocks, bool KHeads, bool VHeads>
struct CacheLayout {
  static constexpr bool kBlocks = Blocks, kKHeads = KHeads, kVHeads = VHeads;
};
using PlainRows = CacheLayout<false, false, false>;

struct DowncastFp8Side {
  const void* x;
  uint8_t* cache;
  int64_t x_stride;      // elements
  int64_t cache_stride;  // bytes
  const void* scale;
  int vectors;  // of a row
  // Of a cache in blocks, or a scale a head:
  int64_t block_stride, head_stride, scale_stride;  // bytes
  Divisor head;                                     // by the vectors of one

  // Where a row of the cache begins, and vector first + i of E elements in it; i is known when a kernel is compiled.
  template <bool Blocks>
  __device__ __forceinline__ uint8_t* row_at(const CacheRows& rows, int64_t row) const {
    return cache + place_of<Blocks>(rows, row, cache_stride, block_stride);
  }
  template <bool Blocks, int E>
  __device__ __forceinline__ uint8_t* vector_at(uint8_t* row, int first, int i = 0) const {
    if constexpr (!Blocks) return row + first * E + i * E;
    uint32_t within;
    const uint32_t of_head = head.divide(first + i, &within);
    return row + of_head * head_stride + within * E;
  }
  // The chain for vector i, or where there is none for the last one; its head may have a scale of its own.
  template <bool Heads, typename Chain>
  __device__ __forceinline__ typename Chain::Prepared prepare(const Consts& consts, int i) const {
    if constexpr (!Heads) return Chain::prepare(Env{consts, &scale});
    uint32_t within;
    i = max(min(i, vectors - 1), 0);
    const void* own = static_cast<const char*>(scale) + head.divide(i, &within) * scale_stride;
    return Chain::prepare(Env{consts, &own});
  }
};

struct DowncastFp8Params {
  DowncastFp8Side k, v;
  CacheRows rows;
  Consts consts;
};

// ---- few tokens: one block a token (and a piece of its row), one vector of K and V a thread ------------------------------------

constexpr int kDowncastFp8Threads = 128;

template <typename In, typename Fp8, bool Saturated, typename KChain, typename VChain, typename Loc, typename Layout, bool IsPair,
          int E>
__global__ void __launch_bounds__(kDowncastFp8Threads) downcast_fp8_scan_few_kernel(const __grid_constant__ DowncastFp8Params p) {
  const int token = blockIdx.x;
  const int first = blockIdx.y * blockDim.x;
  const int lane = threadIdx.x;
  const int i = first + lane;

  wait_for_previous_kernel();
  const Told told_row = told<Loc, Layout::kBlocks>(p.rows, token);
  Raw<In, E> k, v;
  if (i < p.k.vectors) k.load(static_cast<const In*>(p.k.x) + token * p.k.x_stride + i * E);
  if (IsPair && i < p.v.vectors) v.load(static_cast<const In*>(p.v.x) + token * p.v.x_stride + i * E);
  // Both scales now: behind the branch below, v's load cost 0.2 us of a 1.5 us kernel.
  const auto k_prepared = p.k.prepare<Layout::kKHeads, KChain>(p.consts, i);
  typename VChain::Prepared v_prepared;
  if constexpr (IsPair) v_prepared = p.v.prepare<Layout::kVHeads, VChain>(p.consts, i);
  // Early the next kernel's start is hidden; from 512 tokens its blocks would crowd some of the multiprocessors.
  if (p.rows.tokens <= 256) allow_next_kernel();
  const int64_t row = cache_row<Loc, Layout::kBlocks>(p.rows, told_row);
  bool repeated = false;
  if (p.rows.may_repeat) {
    const Loc* locs = static_cast<const Loc*>(p.rows.loc);
    if (compares_rows<Layout::kBlocks>(p.rows)) {
      for (int other = token + 1 + lane; other < p.rows.tokens; other += blockDim.x) {
        repeated |= row_of_listed<Loc, Layout::kBlocks>(p.rows, other) == row;
      }
    } else {  // equal rows are equal locs
#pragma unroll 8
      for (int other = token + 1 + lane; other < p.rows.tokens; other += blockDim.x) {
        repeated |= locs[other] == static_cast<Loc>(told_row.loc);
      }
    }
    repeated = __syncthreads_or(repeated);
  }
  allow_next_kernel();
  if (p.rows.check && row == kOutside && lane == 0 && blockIdx.y == 0) note_outside(token);
  if (row < 0 || repeated) return;
  constexpr bool kBlocks = Layout::kBlocks;
  if (i < p.k.vectors) {
    downcast_vector<In, Fp8, Saturated, KChain>(k, k_prepared, p.k.vector_at<kBlocks, E>(p.k.row_at<kBlocks>(p.rows, row), i));
  }
  if constexpr (IsPair) {
    if (i < p.v.vectors) {
      downcast_vector<In, Fp8, Saturated, VChain>(v, v_prepared, p.v.vector_at<kBlocks, E>(p.v.row_at<kBlocks>(p.rows, row), i));
    }
  }
}

// ---- many tokens: `Lanes` lanes (32, or 8 for narrow rows) a token, its K and V in registers --------------------------------

// What casts the vectors of one side's rows and stores them; its scale, unless it is one a head (`Heads`), is read once.
template <typename In, typename Fp8, bool Saturated, typename Chain, bool Blocks, bool Heads, int E>
struct DowncastFp8Cast {
  typename Chain::Prepared prepared;

  __device__ __forceinline__ void prepare(const DowncastFp8Params& p, const DowncastFp8Side& side) {
    if constexpr (!Heads) prepared = side.prepare<false, Chain>(p.consts, 0);
  }
  // Vector first + i of the row that begins at `row`.
  __device__ __forceinline__ void store(const DowncastFp8Params& p, const DowncastFp8Side& side, const Raw<In, E>& vector,
                                        uint8_t* row, int first, int i) const {
    uint8_t* to = side.vector_at<Blocks, E>(row, first, i);
    if constexpr (Heads) {
      downcast_vector<In, Fp8, Saturated, Chain>(vector, side.prepare<true, Chain>(p.consts, first + i), to);
    } else {
      downcast_vector<In, Fp8, Saturated, Chain>(vector, prepared, to);
    }
  }
};

// The vectors first, first + Lanes, ... of one row of one side: U of them on the way at a time, E elements each.
template <typename In, typename Cast, int Lanes, int E, int U>
struct DowncastFp8Chunk {
  Cast cast;
  Raw<In, E> raw[U];

  __device__ __forceinline__ void load(const DowncastFp8Side& side, int64_t token, int first) {
    const In* x = static_cast<const In*>(side.x) + token * side.x_stride + first * E;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * Lanes < side.vectors) raw[u].load(x + u * Lanes * E);
    }
  }
  __device__ __forceinline__ void store(const DowncastFp8Params& p, const DowncastFp8Side& side, uint8_t* row, int first) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * Lanes < side.vectors) cast.store(p, side, raw[u], row, first, u * Lanes);
    }
  }
};

constexpr int kScanThreads = 256;

template <typename In, typename Fp8, bool Saturated, typename KChain, typename VChain, typename Loc, typename Layout, bool IsPair,
          int Lanes, int E, int U>
__global__ void __launch_bounds__(kScanThreads, sizeof(In) == 2 ? 3 : 2)
    downcast_fp8_scan_many_kernel(const __grid_constant__ DowncastFp8Params p) {
  constexpr int kTokens = kScanThreads / Lanes;
  constexpr int kChunk = Lanes * U;
  __shared__ unsigned repeated[kTokens / kTargets];
  const int lane = threadIdx.x % Lanes;
  const int64_t block_token = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int mine = threadIdx.x / Lanes;
  const int64_t token = block_token + mine;
  const int vectors = IsPair ? max(p.k.vectors, p.v.vectors) : p.k.vectors;
  constexpr bool kBlocks = Layout::kBlocks;
  DowncastFp8Chunk<In, DowncastFp8Cast<In, Fp8, Saturated, KChain, kBlocks, Layout::kKHeads, E>, Lanes, E, U> k;
  DowncastFp8Chunk<In, DowncastFp8Cast<In, Fp8, Saturated, VChain, kBlocks, Layout::kVHeads, E>, Lanes, E, U> v;
  if (threadIdx.x < kTokens / kTargets) repeated[threadIdx.x] = 0;

  wait_for_previous_kernel();
  int64_t row = kSkip;
  if (token < p.rows.tokens) {
    const Told told_row = told<Loc, kBlocks>(p.rows, token);
    k.load(p.k, token, lane);
    if constexpr (IsPair) v.load(p.v, token, lane);
    row = cache_row<Loc, kBlocks>(p.rows, told_row);
  }
  k.cast.prepare(p, p.k);
  if constexpr (IsPair) v.cast.prepare(p, p.v);
  if (p.rows.may_repeat) {
    __syncthreads();
    for (int i = 0; i < kTokens; i += kTargets) {
      if (block_token + i >= p.rows.tokens) break;
      const int first = static_cast<int>(block_token) + i;
      compares_rows<kBlocks>(p.rows) ? find_repeated<Loc, true, kScanThreads, kBlocks>(p.rows, first, &repeated[i / kTargets])
                                     : find_repeated<Loc, false, kScanThreads, kBlocks>(p.rows, first, &repeated[i / kTargets]);
    }
    __syncthreads();
    if (repeated[mine / kTargets] >> (mine % kTargets) & 1) row = kSkip;
  }
  allow_next_kernel();
  if (p.rows.check && row == kOutside && lane == 0) note_outside(token);
  if (row < 0) return;
  uint8_t* const k_row = p.k.row_at<kBlocks>(p.rows, row);
  uint8_t* const v_row = p.v.row_at<kBlocks>(p.rows, row);
  for (int first = lane;;) {
    k.store(p, p.k, k_row, first);
    if constexpr (IsPair) v.store(p, p.v, v_row, first);
    first += kChunk;
    if (first >= vectors) return;
    k.load(p.k, token, first);
    if constexpr (IsPair) v.load(p.v, token, first);
  }
}

// ---- very many tokens, whose rows may repeat: claims -------------------------------------------------------------------------
// A warp has a token: it claims the token's row before its first store.
// The atomic and the fence cost 2 us at the ends of a kernel and 3 % of the bandwidth at 65536 tokens. K and V wait in shared
// memory, not in registers, to have enough tokens in flight.

// A DowncastFp8Chunk whose elements wait in shared memory.
constexpr int kClaimThreads = 128;

template <typename In, typename Cast, int Lanes, int E, int U>
struct DowncastFp8Stage {
  static constexpr int kWide = E * static_cast<int>(sizeof(In)) / 16;  // 16-byte accesses a vector
  using Buffer = uint4[U * kWide][kClaimThreads];
  Cast cast;
  Buffer& buffer;

  __device__ __forceinline__ explicit DowncastFp8Stage(Buffer& buffer) : buffer(buffer) {}
  __device__ __forceinline__ void load(const DowncastFp8Side& side, int64_t token, int first) {
    const In* x = static_cast<const In*>(side.x) + token * side.x_stride + first * E;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * Lanes < side.vectors) {
#pragma unroll
        for (int w = 0; w < kWide; ++w) stage_16(&buffer[u * kWide + w][threadIdx.x], x + u * Lanes * E + w * (16 / sizeof(In)));
      }
    }
  }
  __device__ __forceinline__ void store(const DowncastFp8Params& p, const DowncastFp8Side& side, uint8_t* row, int first) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * Lanes < side.vectors) {
        Raw<In, E> raw;
#pragma unroll
        for (int w = 0; w < kWide; ++w) *reinterpret_cast<uint4*>(raw.words + 4 * w) = buffer[u * kWide + w][threadIdx.x];
        cast.store(p, side, raw, row, first, u * Lanes);
      }
    }
  }
};
// Single elements stay in registers.
template <typename In, typename Cast, int Lanes, int U>
struct DowncastFp8Stage<In, Cast, Lanes, 1, U> : DowncastFp8Chunk<In, Cast, Lanes, 1, U> {
  using Buffer = uint4[1][1];
  __device__ __forceinline__ explicit DowncastFp8Stage(Buffer&) {}
};

template <typename In, typename Fp8, bool Saturated, typename KChain, typename VChain, typename Loc, typename Layout, bool IsPair,
          int E, int U>
__global__ void __launch_bounds__(kClaimThreads, E == 1 ? 8 : sizeof(In) == 2 ? 10 : 6)
    downcast_fp8_claim_many_kernel(const __grid_constant__ DowncastFp8Params p) {
  constexpr int Lanes = 32;
  constexpr bool kBlocks = Layout::kBlocks;
  using KStage = DowncastFp8Stage<In, DowncastFp8Cast<In, Fp8, Saturated, KChain, kBlocks, Layout::kKHeads, E>, Lanes, E, U>;
  using VStage = DowncastFp8Stage<In, DowncastFp8Cast<In, Fp8, Saturated, VChain, kBlocks, Layout::kVHeads, E>, Lanes, E, U>;
  __shared__ typename KStage::Buffer buffers[IsPair ? 2 : 1];
  constexpr int kChunk = Lanes * U;
  const int lane = threadIdx.x % Lanes;
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * kClaimThreads + threadIdx.x) / Lanes;
  const int vectors = IsPair ? max(p.k.vectors, p.v.vectors) : p.k.vectors;
  KStage k(buffers[0]);
  VStage v(buffers[IsPair ? 1 : 0]);
  auto load = [&](int first) {
    k.load(p.k, token, first);
    if constexpr (IsPair) v.load(p.v, token, first);
  };
  auto store = [&](uint8_t* k_row, uint8_t* v_row, int first) {
    wait_staged();
    k.store(p, p.k, k_row, first);
    if constexpr (IsPair) v.store(p, p.v, v_row, first);
  };

  wait_for_previous_kernel();
  int64_t row = kSkip;
  if (token < p.rows.tokens) {
    const Told told_row = told<Loc, kBlocks>(p.rows, token);
    load(lane);
    row = cache_row<Loc, kBlocks>(p.rows, told_row);
  }
  k.cast.prepare(p, p.k);
  if constexpr (IsPair) v.cast.prepare(p, p.v);
  allow_next_kernel();
  if (p.rows.check && row == kOutside && lane == 0) note_outside(token);

  uint8_t* const k_row = p.k.row_at<kBlocks>(p.rows, row);
  uint8_t* const v_row = p.v.row_at<kBlocks>(p.rows, row);
  const unsigned long long key = reinterpret_cast<unsigned long long>(k_row);
  unsigned long long* slot = claim_slot(row);
  bool pending = row >= 0;
  while (pending) {  // all lanes alike: the warp has one token
    unsigned long long seen = 0;
    if (lane == 0) seen = claim(slot, key);
    seen = __shfl_sync(0xffffffffu, seen, 0);
    if (seen == 0) {
      store(k_row, v_row, lane);
      for (int first = kChunk; first < vectors; first += kChunk) {
        load(first + lane);
        store(k_row, v_row, first + lane);
      }
      __syncwarp();
      if (lane == 0) give_back(slot);
    }
    pending = seen != 0 && seen != key;
    if (pending) __nanosleep(100);
  }
  wait_staged();  // also where nothing was stored: no copy into shared memory outlives the block
}

template <typename In, typename CacheFp8, bool Saturated, typename KProgram, typename VProgram, typename Loc,
          typename Layout = PlainRows>
struct DowncastFp8 {
  static_assert(!KProgram::kRow && !VProgram::kRow, "downcast_fp8 has one scale a tensor or a head, not one a row");

  static void run(TensorView k, TensorView v, TensorView k_cache, TensorView v_cache, Optional<TensorView> k_scale,
                  Optional<TensorView> v_scale, Optional<TensorView> loc, int64_t mult, int64_t offset, bool wrap, bool check,
                  double c0, double c1, double c2, double c3, double c4, double c5, double c6, double c7) {
    run_at(k, v, k_cache, v_cache, k_scale, v_scale, loc, std::nullopt, mult, offset, wrap, check, c0, c1, c2, c3, c4, c5, c6, c7);
  }
  static void run_at(TensorView k, TensorView v, TensorView k_cache, TensorView v_cache, Optional<TensorView> k_scale,
                     Optional<TensorView> v_scale, Optional<TensorView> loc, Optional<TensorView> at, int64_t mult, int64_t offset,
                     bool wrap, bool check, double c0, double c1, double c2, double c3, double c4, double c5, double c6, double c7) {
    Call call{{c0, c1, c2, c3, c4, c5, c6, c7}, mult, offset, wrap, check};
    call.template side<KProgram, Layout::kKHeads>(call.p.k, k, "k", k_cache, "k_cache", k_scale, "k_scale");
    call.template side<VProgram, Layout::kVHeads>(call.p.v, v, "v", v_cache, "v_cache", v_scale, "v_scale");
    call.template launch<true>(loc, at);
  }

  static void run_one(TensorView x, TensorView cache, Optional<TensorView> scale, Optional<TensorView> loc, int64_t mult,
                      int64_t offset, bool wrap, bool check, double c0, double c1, double c2, double c3, double c4, double c5,
                      double c6, double c7) {
    run_one_at(x, cache, scale, loc, std::nullopt, mult, offset, wrap, check, c0, c1, c2, c3, c4, c5, c6, c7);
  }
  static void run_one_at(TensorView x, TensorView cache, Optional<TensorView> scale, Optional<TensorView> loc,
                         Optional<TensorView> at, int64_t mult, int64_t offset, bool wrap, bool check, double c0, double c1, double c2,
                         double c3, double c4, double c5, double c6, double c7) {
    Call call{{c0, c1, c2, c3, c4, c5, c6, c7}, mult, offset, wrap, check};
    call.template side<KProgram, Layout::kKHeads>(call.p.k, x, "x", cache, "cache", scale, "scale");
    call.template launch<false>(loc, at);
  }

 private:
  struct Call {
    DowncastFp8Params p = {};
    Device device;
    Symbol tokens{"T"}, slots{"S"}, blocks{"blocks"}, block{"block"};
    bool vectors = true;  // 16-byte loads reach everything
    static constexpr bool kApart = Layout::kBlocks || Layout::kKHeads || Layout::kVHeads;
    int64_t columns[2] = {1, 1};  // of a head of k and v, where it counts

    Call(const double (&constants)[kMaxConsts], int64_t mult, int64_t offset, bool wrap, bool check) {
      p.consts = Consts::of(constants);
      p.rows.mult = mult, p.rows.offset = offset, p.rows.wrap = wrap, p.rows.check = check;
    }

    template <typename Program, bool Heads>
    void side(DowncastFp8Side& side, const TensorView& x, const char* x_name, const TensorView& cache, const char* cache_name,
              const Optional<TensorView>& scale, const char* scale_name) {
      TensorMatcher().dtype<In>().device(device).verify(x, x_name);
      TensorMatcher().dtype<CacheFp8, uint8_t>().device(device).verify(cache, cache_name);
      int64_t cols = row_length(x, x_name, tokens, &side.x_stride);
      const int64_t cache_cols = Layout::kBlocks ? row_of_blocks(side, cache, cache_name)
                                                 : row_length(cache, cache_name, slots, &side.cache_stride);
      if (cols != cache_cols) {
        TVM_FFI_THROW(ValueError) << cache_name << ": wanted rows of " << cols << " elements as in " << x_name << ", found shape "
                                  << shape_of(cache);
      }
      VisitOperands<Program>::with([&](int index, bool, auto type) {
        if (index != 0) TVM_FFI_THROW(ValueError) << scale_name << ": wanted a program with operand 0 only, found " << index;
        if (!scale.has_value()) TVM_FFI_THROW(ValueError) << scale_name << ": wanted a tensor, found None";
        TensorMatcher().template dtype<decltype(type)>().device(device).verify(scale.value(), scale_name);
        const TensorView& given = scale.value();
        const bool heads = x.ndim() == 3 && given.ndim() == 1 && given.numel() > 0 && given.shape()[0] == x.shape()[1];
        if (Heads ? !heads : given.numel() != 1) {
          TVM_FFI_THROW(ValueError) << scale_name << ": wanted one element" << (Heads ? " for each head of [T, H, D]" : "")
                                    << ", found shape " << shape_of(given);
        }
        side.scale = data(given);
        if constexpr (Heads) side.scale_stride = given.strides()[0] * static_cast<int64_t>(sizeof(type));
      });
      side.x = data(x);
      side.cache = data<uint8_t>(cache);
      check_row_length(cols, x_name);
      side.vectors = static_cast<int>(cols);  // elements until `launch` knows the vector width
      vectors = vectors && cols % 8 == 0 && aligned(side.x, 16) && aligned(side.cache, 8) &&
                side.x_stride * sizeof(In) % 16 == 0 && side.cache_stride % 8 == 0;
      if constexpr (Layout::kBlocks || Heads) {
        head_columns(side) = std::max<int64_t>(x.shape()[x.ndim() - 1], 1);
        vectors = vectors && head_columns(side) % 8 == 0 && side.block_stride % 8 == 0 && side.head_stride % 8 == 0;
      }
    }

    int64_t& head_columns(const DowncastFp8Side& side) { return columns[&side == &p.v]; }

    // Elements of a row of [blocks, block, H, D], or without H; the strides of what a row lies in go to the side.
    int64_t row_of_blocks(DowncastFp8Side& side, const TensorView& cache, const char* name) {
      const int dims = cache.ndim();
      if (dims != 3 && dims != 4) {
        TVM_FFI_THROW(ValueError) << name << ": wanted [blocks, block, H, D] or [blocks, block, D], found shape " << shape_of(cache);
      }
      const auto &sizes = cache.shape(), &strides = cache.strides();
      if (!Dim(blocks).matches(sizes[0], name) || !Dim(block).matches(sizes[1], name)) {
        TVM_FFI_THROW(ValueError) << name << ": wanted first dimensions " << Dim(blocks).text() << " and " << Dim(block).text()
                                  << ", found shape " << shape_of(cache);
      }
      if (sizes[dims - 1] > 1 && strides[dims - 1] != 1 && cache.numel() > 0) {
        TVM_FFI_THROW(ValueError) << name << ": wanted a last dimension of unit stride, found strides " << strides_of(cache);
      }
      const auto stride_of = [&](int dim) { return sizes[dim] > 1 ? strides[dim] : 0; };
      side.block_stride = stride_of(0), side.cache_stride = stride_of(1), side.head_stride = dims == 4 ? stride_of(2) : 0;
      return sizes[dims - 1] * (dims == 4 ? sizes[2] : 1);
    }

    // Elements of a row of [N, ...] whose trailing dims are contiguous together; N goes to the symbol.
    static int64_t row_length(const TensorView& view, const char* name, Symbol& rows, int64_t* stride) {
      if (view.ndim() < 2) TVM_FFI_THROW(ValueError) << name << ": wanted at least 2 dimensions, found shape " << shape_of(view);
      const int64_t *sizes = view.shape().data(), *strides = view.strides().data();
      if (!Dim(rows).matches(sizes[0], name)) {
        TVM_FFI_THROW(ValueError) << name << ": wanted first dimension " << Dim(rows).text() << ", found shape " << shape_of(view);
      }
      int64_t cols = 1;
      for (int i = view.ndim() - 1; i > 0; --i) {
        if (sizes[i] != 1 && strides[i] != cols && view.numel() > 0) {
          TVM_FFI_THROW(ValueError) << name << ": wanted trailing dimensions contiguous together, found strides "
                                    << strides_of(view) << " of shape " << shape_of(view);
        }
        cols *= sizes[i];
      }
      *stride = sizes[0] > 1 ? strides[0] : cols;
      return cols;
    }

    template <bool IsPair>
    void launch(const Optional<TensorView>& loc, const Optional<TensorView>& at) {
      if (loc.has_value()) {
        TensorMatcher({tokens}).dtype<Loc>().contiguous().device(device).verify(loc.value(), "loc");
        p.rows.loc = data(loc.value());
      }
      p.rows.tokens = tokens.value(), p.rows.slots = slots.value();
      if constexpr (Layout::kBlocks) take_blocks(loc, at);
      const int64_t elements = std::max(p.k.vectors, p.v.vectors);
      if (p.rows.tokens == 0 || elements == 0) return;
      DeviceGuard guard(device.id());
      cudaStream_t stream = env_stream(device.id());
      launch_checked<Loc>(p.rows, stream, [&] { launch_width<IsPair>(elements, stream); });
    }

    void take_blocks(const Optional<TensorView>& loc, const Optional<TensorView>& at) {
      p.rows.blocks = blocks.value(), p.rows.slots = p.rows.blocks * block.value();
      p.rows.block = Divisor::of(std::max<int64_t>(block.value(), 1));
      if (p.rows.slots >= int64_t{1} << 31) {
        TVM_FFI_THROW(ValueError) << "k_cache: wanted fewer than 2^31 rows in its blocks, found " << p.rows.slots;
      }
      if (!at.has_value()) return;
      if (!loc.has_value() || p.rows.mult != 1 || p.rows.offset != 0) {
        TVM_FFI_THROW(ValueError) << "at: wanted it with a loc, mult 1 and offset 0, found " << (loc.has_value() ? "a" : "no")
                                  << " loc, mult " << p.rows.mult << " and offset " << p.rows.offset;
      }
      TensorMatcher({tokens}).dtype<Loc>().contiguous().device(device).verify(at.value(), "at");
      p.rows.at = data(at.value());
    }

    template <bool IsPair>
    void launch_width(int64_t elements, cudaStream_t stream) {
      const bool distinct = p.rows.tokens == 1 || (p.rows.loc == nullptr && p.rows.mult > 0 && p.rows.offset >= 0);
      const bool scan = p.rows.loc != nullptr && p.rows.mult != 0 && p.rows.tokens <= kScanTokens;
      p.rows.may_repeat = !distinct;
      if (vectors) p.k.vectors /= 8, p.v.vectors /= 8;
      if constexpr (kApart) {
        const int64_t width = vectors ? 8 : 1;
        for (DowncastFp8Side* side : {&p.k, &p.v}) side->head = Divisor::of(std::max<int64_t>(head_columns(*side) / width, 1));
      }
      if (!distinct && !scan) {
        vectors ? launch_claim_many<IsPair, 8, 4>(stream) : launch_claim_many<IsPair, 1, 8>(stream);
      } else if (p.rows.tokens <= kFewTokens && elements <= kMostFewElements) {
        vectors ? launch_few<IsPair, 8>(elements / 8, stream) : launch_few<IsPair, 1>(elements, stream);
      } else if (!vectors) {
        launch_scan_many<IsPair, 32, 1, 8>(stream);
      } else if (elements <= 128) {
        launch_scan_many<IsPair, 8, 8, 2>(stream);
      } else {
        launch_scan_many<IsPair, 32, 8, 4>(stream);
      }
    }

    template <bool IsPair, int E>
    void launch_few(int64_t vectors, cudaStream_t stream) {
      const int threads = static_cast<int>(std::min<int64_t>(ceil_div(vectors, 32) * 32, kDowncastFp8Threads));
      const int64_t pieces = ceil_div(vectors, threads);
      const dim3 grid(static_cast<unsigned>(p.rows.tokens), static_cast<unsigned>(pieces));
      Launch(grid, threads)
          .stream(stream)
          .programmatic()
          .run(downcast_fp8_scan_few_kernel<In, CacheFp8, Saturated, ToFp8<KProgram>, ToFp8<VProgram>, Loc, Layout, IsPair, E>, p);
    }
    template <bool IsPair, int Lanes, int E, int U>
    void launch_scan_many(cudaStream_t stream) {
      Launch(static_cast<unsigned>(ceil_div(p.rows.tokens, kScanThreads / Lanes)), kScanThreads)
          .stream(stream)
          .programmatic()
          .run(downcast_fp8_scan_many_kernel<In, CacheFp8, Saturated, ToFp8<KProgram>, ToFp8<VProgram>, Loc, Layout, IsPair, Lanes, E,
                                             U>,
               p);
    }
    template <bool IsPair, int E, int U>
    void launch_claim_many(cudaStream_t stream) {
      const auto kernel =
          downcast_fp8_claim_many_kernel<In, CacheFp8, Saturated, ToFp8<KProgram>, ToFp8<VProgram>, Loc, Layout, IsPair, E, U>;
      static OncePerDevice carveout;
      carveout.run(device.id(), [&] {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
                   "cudaFuncSetAttribute");
      });
      const unsigned blocks = static_cast<unsigned>(ceil_div(p.rows.tokens, kClaimThreads / 32));
      Launch(blocks, kClaimThreads).stream(stream).programmatic().run(kernel, p);
    }
  };
};

}  // namespace inductor_ext
