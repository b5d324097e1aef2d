// The KV-cache store: K and V scaled, clamped, cast to FP8 and scattered into their caches, in one launch.
//
//   k_cache[row] = cast(k_program(k[t])),  v_cache[row] = cast(v_program(v[t])),  row = loc[t] * mult + offset
//
//   k, v              [T, ...]  float, __half or __nv_bfloat16; trailing dims contiguous, row stride free
//   k_cache, v_cache  [S, ...]  FP8 or its bytes as uint8; likewise
//   k_scale, v_scale  operand Scalar<0, S> of either program; c0..c7 are shared by both
//   loc               [T] int32 or int64; without it row = t * mult + offset
//   wrap              a negative row counts from the end (index_put); otherwise a negative loc[t] is padding and is skipped
// Rows outside [0, S) are never written. `check` reads back whether there was one, and throws IndexError.
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
#include <mutex>

#include "inductor_ext/fp8.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/steps.cuh"
#include "inductor_ext/tensor.h"

namespace inductor_ext {

constexpr int kFewTokens = 1024;
constexpr int kScanTokens = 4096;  // H200, 8 x 128 heads: 10.5 against 11.1 us for claims here, 15.8 against 15.2 us at 7168
constexpr int kMostFewElements = 65535 * 32;  // of a row: a piece of 32 threads or more for each block of grid.y
constexpr int kClaimSlots = 1 << 16;
constexpr unsigned long long kNoToken = ~0ull;
static __device__ unsigned long long downcast_fp8_claims[kClaimSlots];  // zero outside of kernels
static __device__ unsigned long long downcast_fp8_outside = kNoToken;   // first token whose row is outside the cache

struct DowncastFp8Side {
  const void* x;
  uint8_t* cache;
  int64_t x_stride;      // elements
  int64_t cache_stride;  // bytes
  const void* scale;
  int vectors;  // of a row
};

struct DowncastFp8Params {
  DowncastFp8Side k, v;
  const void* loc;  // or null
  int64_t tokens, slots, mult, offset;
  bool wrap, check;
  bool may_repeat;
  Consts consts;
};

constexpr int64_t kSkip = -1;     // padding
constexpr int64_t kOutside = -2;  // not a row of the cache

template <typename Loc>
__device__ __forceinline__ int64_t cache_row(const DowncastFp8Params& p, int64_t loc) {
  if (!p.wrap && p.loc != nullptr && loc < 0) return kSkip;
  int64_t row = loc * p.mult + p.offset;
  if (p.wrap && row < 0) row += p.slots;
  return row >= 0 && row < p.slots ? row : kOutside;
}

template <typename Loc>
__device__ __forceinline__ int64_t loc_of(const DowncastFp8Params& p, int64_t token) {
  return p.loc == nullptr ? token : static_cast<int64_t>(static_cast<const Loc*>(p.loc)[token]);
}

__device__ __forceinline__ void note_outside(const DowncastFp8Params& p, int64_t token) {
  atomicMin(&downcast_fp8_outside, static_cast<unsigned long long>(token));
}

// ---- few tokens: one block a token (and a piece of its row), one vector of K and V a thread ------------------------------------

constexpr int kDowncastFp8Threads = 128;

template <typename In, typename Fp8, bool Saturated, typename KChain, typename VChain, typename Loc, bool IsPair, int E>
__global__ void __launch_bounds__(kDowncastFp8Threads) downcast_fp8_scan_few_kernel(const __grid_constant__ DowncastFp8Params p) {
  const int token = blockIdx.x;
  const int first = blockIdx.y * blockDim.x;
  const int lane = threadIdx.x;
  const int i = first + lane;

  wait_for_previous_kernel();
  const int64_t loc = loc_of<Loc>(p, token);
  Raw<In, E> k, v;
  if (i < p.k.vectors) k.load(static_cast<const In*>(p.k.x) + token * p.k.x_stride + i * E);
  if (IsPair && i < p.v.vectors) v.load(static_cast<const In*>(p.v.x) + token * p.v.x_stride + i * E);
  // Both scales now: behind the branch below, v's load cost 0.2 us of a 1.5 us kernel.
  const auto k_prepared = KChain::prepare(Env{p.consts, &p.k.scale});
  typename VChain::Prepared v_prepared;
  if constexpr (IsPair) v_prepared = VChain::prepare(Env{p.consts, &p.v.scale});
  // Early the next kernel's start is hidden; from 512 tokens its blocks would crowd some of the multiprocessors.
  if (p.tokens <= 256) allow_next_kernel();
  const int64_t row = cache_row<Loc>(p, loc);
  bool repeated = false;
  if (p.may_repeat) {
    const Loc* locs = static_cast<const Loc*>(p.loc);
    if (p.wrap) {
      for (int other = token + 1 + lane; other < p.tokens; other += blockDim.x) repeated |= cache_row<Loc>(p, locs[other]) == row;
    } else {  // equal rows are equal locs
#pragma unroll 8
      for (int other = token + 1 + lane; other < p.tokens; other += blockDim.x) repeated |= locs[other] == static_cast<Loc>(loc);
    }
    repeated = __syncthreads_or(repeated);
  }
  allow_next_kernel();
  if (p.check && row == kOutside && lane == 0 && blockIdx.y == 0) note_outside(p, token);
  if (row < 0 || repeated) return;
  if (i < p.k.vectors) downcast_vector<In, Fp8, Saturated, KChain>(k, k_prepared, p.k.cache + row * p.k.cache_stride + i * E);
  if constexpr (IsPair) {
    if (i < p.v.vectors) downcast_vector<In, Fp8, Saturated, VChain>(v, v_prepared, p.v.cache + row * p.v.cache_stride + i * E);
  }
}

// ---- many tokens: `Lanes` lanes (32, or 8 for narrow rows) a token, its K and V in registers --------------------------------

// The vectors first, first + Lanes, ... of one row of one side: U of them on the way at a time, E elements each.
template <typename In, typename Fp8, bool Saturated, typename Chain, int Lanes, int E, int U>
struct DowncastFp8Chunk {
  typename Chain::Prepared prepared;
  Raw<In, E> raw[U];

  __device__ __forceinline__ void load(const DowncastFp8Side& side, int64_t token, int first) {
    const In* x = static_cast<const In*>(side.x) + token * side.x_stride + first * E;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * Lanes < side.vectors) raw[u].load(x + u * Lanes * E);
    }
  }
  __device__ __forceinline__ void store(const DowncastFp8Side& side, int64_t row, int first) const {
    uint8_t* cache = side.cache + row * side.cache_stride + first * E;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * Lanes < side.vectors) downcast_vector<In, Fp8, Saturated, Chain>(raw[u], prepared, cache + u * Lanes * E);
    }
  }
};

constexpr int kScanThreads = 256;

constexpr int kTargets = 8;

// What is compared of a loc: its low word, or that of its row where negative rows count from the end.
template <typename Loc, bool Wrap>
__device__ __forceinline__ uint32_t scan_key(const DowncastFp8Params& p, int token) {
  if constexpr (Wrap) return static_cast<uint32_t>(cache_row<Loc>(p, static_cast<const Loc*>(p.loc)[token]));
  return static_cast<const uint32_t*>(p.loc)[static_cast<int64_t>(token) * (sizeof(Loc) / 4)];
}

// Sets bit i of `repeated` where the row of token first + i is also that of a later token, for kTargets tokens.
template <typename Loc, bool Wrap>
__device__ __forceinline__ void find_repeated(const DowncastFp8Params& p, int first, unsigned* repeated) {
  constexpr int kBatch = 8;
  const int tokens = static_cast<int>(p.tokens);
  uint32_t targets[kTargets];
#pragma unroll
  for (int i = 0; i < kTargets; ++i) targets[i] = scan_key<Loc, Wrap>(p, min(first + i, tokens - 1));
  const Loc* locs = static_cast<const Loc*>(p.loc);
  // Mark where the later token `other` goes to the row of one of the targets, comparing all of the rows.
  auto mark = [&](int other) {
    const int64_t row = cache_row<Loc>(p, locs[other]);
#pragma unroll 1
    for (int i = 0; i < kTargets && first + i < other; ++i) {
      if (row >= 0 && row == cache_row<Loc>(p, locs[first + i])) atomicOr(repeated, 1u << i);
    }
  };
  if (threadIdx.x < kTargets && first + threadIdx.x < tokens) {  // among the targets themselves
    const uint32_t key = scan_key<Loc, Wrap>(p, first + threadIdx.x);
    bool some = false;
#pragma unroll
    for (int i = 0; i < kTargets; ++i) some |= i < threadIdx.x && key == targets[i];
    if (some) mark(first + threadIdx.x);
  }
  for (int begin = first + kTargets + threadIdx.x; begin < tokens; begin += kBatch * kScanThreads) {
    uint32_t keys[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) keys[j] = scan_key<Loc, Wrap>(p, min(begin + j * kScanThreads, tokens - 1));
    bool some = false;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
#pragma unroll
      for (int i = 0; i < kTargets; ++i) some |= keys[j] == targets[i];
    }
    if (some) {
#pragma unroll 1
      for (int j = 0; j < kBatch && begin + j * kScanThreads < tokens; ++j) mark(begin + j * kScanThreads);
      if (*static_cast<volatile unsigned*>(repeated) == (1u << kTargets) - 1) return;
    }
  }
}

template <typename In, typename Fp8, bool Saturated, typename KChain, typename VChain, typename Loc, bool IsPair, int Lanes,
          int E, int U>
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
  DowncastFp8Chunk<In, Fp8, Saturated, KChain, Lanes, E, U> k;
  DowncastFp8Chunk<In, Fp8, Saturated, VChain, Lanes, E, U> v;
  if (threadIdx.x < kTokens / kTargets) repeated[threadIdx.x] = 0;

  wait_for_previous_kernel();
  int64_t row = kSkip;
  if (token < p.tokens) {
    row = loc_of<Loc>(p, token);
    k.load(p.k, token, lane);
    if constexpr (IsPair) v.load(p.v, token, lane);
    row = cache_row<Loc>(p, row);
  }
  k.prepared = KChain::prepare(Env{p.consts, &p.k.scale});
  if constexpr (IsPair) v.prepared = VChain::prepare(Env{p.consts, &p.v.scale});
  if (p.may_repeat) {
    __syncthreads();
    for (int i = 0; i < kTokens; i += kTargets) {
      if (block_token + i >= p.tokens) break;
      const int first = static_cast<int>(block_token) + i;
      p.wrap ? find_repeated<Loc, true>(p, first, &repeated[i / kTargets]) : find_repeated<Loc, false>(p, first, &repeated[i / kTargets]);
    }
    __syncthreads();
    if (repeated[mine / kTargets] >> (mine % kTargets) & 1) row = kSkip;
  }
  allow_next_kernel();
  if (p.check && row == kOutside && lane == 0) note_outside(p, token);
  if (row < 0) return;
  for (int first = lane;;) {
    k.store(p.k, row, first);
    if constexpr (IsPair) v.store(p.v, row, first);
    first += kChunk;
    if (first >= vectors) return;
    k.load(p.k, token, first);
    if constexpr (IsPair) v.load(p.v, token, first);
  }
}

// ---- very many tokens, whose rows may repeat: claims -------------------------------------------------------------------------
// A cache row must not be written by two tokens at the same time; written one after the other, the later is whole. Before its
// first store a warp claims the row by a compare-and-swap of the row's address into a slot of a table, and gives the slot back
// when its stores are done (release). It finds the slot
//   free                  -> it is the only writer (acquire: behind every store of the one who had it before);
//   taken, by the row     -> that token's row, whole, is the one to stand: nothing to store;
//   taken, by another row -> it tries again. Nobody waits while holding a slot, so a holder always gets on.
// The slots are back to zero when the kernel ends, and what they hold are addresses of rows in memory: launches on other streams,
// replays of a captured graph and other caches share the table without harm, and it needs no clearing.
// The atomic and the fence cost 2 us at the ends of a kernel and 3 % of the bandwidth at 65536 tokens. K and V wait in shared
// memory, not in registers, to have enough tokens in flight.

__device__ __forceinline__ unsigned long long claim(unsigned long long* slot, unsigned long long key) {
  unsigned long long seen;
  asm volatile("atom.acquire.gpu.global.cas.b64 %0, [%1], 0, %2;" : "=l"(seen) : "l"(slot), "l"(key) : "memory");
  return seen;
}
__device__ __forceinline__ void give_back(unsigned long long* slot) {
  asm volatile("st.release.gpu.global.b64 [%0], 0;" ::"l"(slot) : "memory");
}

// A DowncastFp8Chunk whose elements wait in shared memory.
constexpr int kClaimThreads = 128;

template <typename In, typename Fp8, bool Saturated, typename Chain, int Lanes, int E, int U>
struct DowncastFp8Stage {
  static constexpr int kWide = E * static_cast<int>(sizeof(In)) / 16;  // 16-byte accesses a vector
  using Buffer = uint4[U * kWide][kClaimThreads];
  typename Chain::Prepared prepared;
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
  __device__ __forceinline__ void store(const DowncastFp8Side& side, int64_t row, int first) const {
    uint8_t* cache = side.cache + row * side.cache_stride + first * E;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * Lanes < side.vectors) {
        Raw<In, E> raw;
#pragma unroll
        for (int w = 0; w < kWide; ++w) *reinterpret_cast<uint4*>(raw.words + 4 * w) = buffer[u * kWide + w][threadIdx.x];
        downcast_vector<In, Fp8, Saturated, Chain>(raw, prepared, cache + u * Lanes * E);
      }
    }
  }
};
// Single elements stay in registers.
template <typename In, typename Fp8, bool Saturated, typename Chain, int Lanes, int U>
struct DowncastFp8Stage<In, Fp8, Saturated, Chain, Lanes, 1, U> : DowncastFp8Chunk<In, Fp8, Saturated, Chain, Lanes, 1, U> {
  using Buffer = uint4[1][1];
  __device__ __forceinline__ explicit DowncastFp8Stage(Buffer&) {}
};

template <typename In, typename Fp8, bool Saturated, typename KChain, typename VChain, typename Loc, bool IsPair, int E, int U>
__global__ void __launch_bounds__(kClaimThreads, E == 1 ? 8 : sizeof(In) == 2 ? 10 : 6)
    downcast_fp8_claim_many_kernel(const __grid_constant__ DowncastFp8Params p) {
  constexpr int Lanes = 32;
  using KStage = DowncastFp8Stage<In, Fp8, Saturated, KChain, Lanes, E, U>;
  using VStage = DowncastFp8Stage<In, Fp8, Saturated, VChain, Lanes, E, U>;
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
  auto store = [&](int64_t row, int first) {
    wait_staged();
    k.store(p.k, row, first);
    if constexpr (IsPair) v.store(p.v, row, first);
  };

  wait_for_previous_kernel();
  int64_t row = kSkip;
  if (token < p.tokens) {
    row = loc_of<Loc>(p, token);
    load(lane);
    row = cache_row<Loc>(p, row);
  }
  k.prepared = KChain::prepare(Env{p.consts, &p.k.scale});
  if constexpr (IsPair) v.prepared = VChain::prepare(Env{p.consts, &p.v.scale});
  allow_next_kernel();
  if (p.check && row == kOutside && lane == 0) note_outside(p, token);

  const unsigned long long key = reinterpret_cast<unsigned long long>(p.k.cache + row * p.k.cache_stride);
  unsigned long long* slot = downcast_fp8_claims + ((row ^ (row >> 16)) & (kClaimSlots - 1));
  bool pending = row >= 0;
  while (pending) {  // all lanes alike: the warp has one token
    unsigned long long seen = 0;
    if (lane == 0) seen = claim(slot, key);
    seen = __shfl_sync(0xffffffffu, seen, 0);
    if (seen == 0) {
      store(row, lane);
      for (int first = kChunk; first < vectors; first += kChunk) {
        load(first + lane);
        store(row, first + lane);
      }
      __syncwarp();
      if (lane == 0) give_back(slot);
    }
    pending = seen != 0 && seen != key;
    if (pending) __nanosleep(100);
  }
  wait_staged();  // also where nothing was stored: no copy into shared memory outlives the block
}

template <typename In, typename CacheFp8, bool Saturated, typename KProgram, typename VProgram, typename Loc>
struct DowncastFp8 {
  static_assert(!KProgram::kRow && !VProgram::kRow, "downcast_fp8 has one scale a tensor, not one a row");

  static void run(TensorView k, TensorView v, TensorView k_cache, TensorView v_cache, Optional<TensorView> k_scale,
                  Optional<TensorView> v_scale, Optional<TensorView> loc, int64_t mult, int64_t offset, bool wrap, bool check,
                  double c0, double c1, double c2, double c3, double c4, double c5, double c6, double c7) {
    Call call{{c0, c1, c2, c3, c4, c5, c6, c7}, mult, offset, wrap, check};
    call.template side<KProgram>(call.p.k, k, "k", k_cache, "k_cache", k_scale, "k_scale");
    call.template side<VProgram>(call.p.v, v, "v", v_cache, "v_cache", v_scale, "v_scale");
    call.template launch<true>(loc);
  }

  static void run_one(TensorView x, TensorView cache, Optional<TensorView> scale, Optional<TensorView> loc, int64_t mult,
                      int64_t offset, bool wrap, bool check, double c0, double c1, double c2, double c3, double c4, double c5,
                      double c6, double c7) {
    Call call{{c0, c1, c2, c3, c4, c5, c6, c7}, mult, offset, wrap, check};
    call.template side<KProgram>(call.p.k, x, "x", cache, "cache", scale, "scale");
    call.template launch<false>(loc);
  }

 private:
  struct Call {
    DowncastFp8Params p = {};
    Device device;
    Symbol tokens{"T"}, slots{"S"};
    bool vectors = true;  // 16-byte loads reach everything

    Call(const double (&constants)[kMaxConsts], int64_t mult, int64_t offset, bool wrap, bool check) {
      p.consts = Consts::of(constants);
      p.mult = mult, p.offset = offset, p.wrap = wrap, p.check = check;
    }

    template <typename Program>
    void side(DowncastFp8Side& side, const TensorView& x, const char* x_name, const TensorView& cache, const char* cache_name,
              const Optional<TensorView>& scale, const char* scale_name) {
      TensorMatcher().dtype<In>().device(device).verify(x, x_name);
      TensorMatcher().dtype<CacheFp8, uint8_t>().device(device).verify(cache, cache_name);
      int64_t cols = row_length(x, x_name, tokens, &side.x_stride);
      int64_t cache_cols = row_length(cache, cache_name, slots, &side.cache_stride);
      if (cols != cache_cols) {
        TVM_FFI_THROW(ValueError) << cache_name << ": wanted rows of " << cols << " elements as in " << x_name << ", found shape "
                                  << shape_of(cache);
      }
      VisitOperands<Program>::with([&](int index, bool, auto type) {
        if (index != 0) TVM_FFI_THROW(ValueError) << scale_name << ": wanted a program with operand 0 only, found " << index;
        if (!scale.has_value()) TVM_FFI_THROW(ValueError) << scale_name << ": wanted a tensor, found None";
        TensorMatcher().template dtype<decltype(type)>().device(device).verify(scale.value(), scale_name);
        if (scale.value().numel() != 1) {
          TVM_FFI_THROW(ValueError) << scale_name << ": wanted one element, found shape " << shape_of(scale.value());
        }
        side.scale = data(scale.value());
      });
      side.x = data(x);
      side.cache = data<uint8_t>(cache);
      check_row_length(cols, x_name);
      side.vectors = static_cast<int>(cols);  // elements until `launch` knows the vector width
      vectors = vectors && cols % 8 == 0 && aligned(side.x, 16) && aligned(side.cache, 8) &&
                side.x_stride * sizeof(In) % 16 == 0 && side.cache_stride % 8 == 0;
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
    void launch(const Optional<TensorView>& loc) {
      if (loc.has_value()) {
        TensorMatcher({tokens}).dtype<Loc>().contiguous().device(device).verify(loc.value(), "loc");
        p.loc = data(loc.value());
      }
      p.tokens = tokens.value(), p.slots = slots.value();
      const int64_t elements = std::max(p.k.vectors, p.v.vectors);
      if (p.tokens == 0 || elements == 0) return;
      DeviceGuard guard(device.id());
      cudaStream_t stream = env_stream(device.id());
      if (p.check) {
        cudaStreamCaptureStatus capturing;
        check_cuda(cudaStreamIsCapturing(stream, &capturing), "cudaStreamIsCapturing");
        p.check = capturing == cudaStreamCaptureStatusNone;
      }
      if (!p.check) return launch_width<IsPair>(elements, stream);
      static std::mutex one_check_at_a_time;
      std::lock_guard<std::mutex> lock(one_check_at_a_time);
      launch_width<IsPair>(elements, stream);
      throw_if_outside(stream);
    }

    template <bool IsPair>
    void launch_width(int64_t elements, cudaStream_t stream) {
      const bool distinct = p.tokens == 1 || (p.loc == nullptr && p.mult > 0 && p.offset >= 0);
      const bool scan = p.loc != nullptr && p.mult != 0 && p.tokens <= kScanTokens;
      p.may_repeat = !distinct;
      if (vectors) p.k.vectors /= 8, p.v.vectors /= 8;
      if (!distinct && !scan) {
        vectors ? launch_claim_many<IsPair, 8, 4>(stream) : launch_claim_many<IsPair, 1, 8>(stream);
      } else if (p.tokens <= kFewTokens && elements <= kMostFewElements) {
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
      const dim3 grid(static_cast<unsigned>(p.tokens), static_cast<unsigned>(pieces));
      Launch(grid, threads)
          .stream(stream)
          .programmatic()
          .run(downcast_fp8_scan_few_kernel<In, CacheFp8, Saturated, ToFp8<KProgram>, ToFp8<VProgram>, Loc, IsPair, E>, p);
    }
    template <bool IsPair, int Lanes, int E, int U>
    void launch_scan_many(cudaStream_t stream) {
      Launch(static_cast<unsigned>(ceil_div(p.tokens, kScanThreads / Lanes)), kScanThreads)
          .stream(stream)
          .programmatic()
          .run(downcast_fp8_scan_many_kernel<In, CacheFp8, Saturated, ToFp8<KProgram>, ToFp8<VProgram>, Loc, IsPair, Lanes, E, U>, p);
    }
    template <bool IsPair, int E, int U>
    void launch_claim_many(cudaStream_t stream) {
      const auto kernel =
          downcast_fp8_claim_many_kernel<In, CacheFp8, Saturated, ToFp8<KProgram>, ToFp8<VProgram>, Loc, IsPair, E, U>;
      static OncePerDevice carveout;
      carveout.run(device.id(), [&] {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
                   "cudaFuncSetAttribute");
      });
      Launch(static_cast<unsigned>(ceil_div(p.tokens, kClaimThreads / 32)), kClaimThreads).stream(stream).programmatic().run(kernel, p);
    }

    void throw_if_outside(cudaStream_t stream) {
      unsigned long long token;
      check_cuda(cudaMemcpyFromSymbolAsync(&token, downcast_fp8_outside, 8, 0, cudaMemcpyDeviceToHost, stream), "check of loc");
      check_cuda(cudaStreamSynchronize(stream), "check of loc");
      if (token == kNoToken) return;
      check_cuda(cudaMemcpyToSymbolAsync(downcast_fp8_outside, &kNoToken, 8, 0, cudaMemcpyHostToDevice, stream), "check of loc");
      Loc value = static_cast<Loc>(token);
      if (p.loc != nullptr) {
        check_cuda(cudaMemcpyAsync(&value, static_cast<const Loc*>(p.loc) + token, sizeof(Loc), cudaMemcpyDeviceToHost, stream),
                   "check of loc");
      }
      check_cuda(cudaStreamSynchronize(stream), "check of loc");
      const int64_t row = static_cast<int64_t>(value) * p.mult + p.offset;
      TVM_FFI_THROW(IndexError) << "loc: wanted rows in [" << (p.wrap ? -p.slots : 0) << ", " << p.slots << "), found row " << row
                                << " for token " << token << " (loc = " << value << ")";
    }
  };
};

}  // namespace inductor_ext
