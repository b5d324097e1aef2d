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

#include "inductor_ext/cache_rows.cuh"
#include "inductor_ext/fp8.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/steps.cuh"
#include "inductor_ext/tensor.h"

namespace inductor_ext {

constexpr int kFewTokens = 1024;
constexpr int kMostFewElements = 65535 * 32;  // of a row: a piece of 32 threads or more for each block of grid.y

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
  CacheRows rows;
  Consts consts;
};

// ---- few tokens: one block a token (and a piece of its row), one vector of K and V a thread ------------------------------------

constexpr int kDowncastFp8Threads = 128;

template <typename In, typename Fp8, bool Saturated, typename KChain, typename VChain, typename Loc, bool IsPair, int E>
__global__ void __launch_bounds__(kDowncastFp8Threads) downcast_fp8_scan_few_kernel(const __grid_constant__ DowncastFp8Params p) {
  const int token = blockIdx.x;
  const int first = blockIdx.y * blockDim.x;
  const int lane = threadIdx.x;
  const int i = first + lane;

  wait_for_previous_kernel();
  const int64_t loc = loc_of<Loc>(p.rows, token);
  Raw<In, E> k, v;
  if (i < p.k.vectors) k.load(static_cast<const In*>(p.k.x) + token * p.k.x_stride + i * E);
  if (IsPair && i < p.v.vectors) v.load(static_cast<const In*>(p.v.x) + token * p.v.x_stride + i * E);
  // Both scales now: behind the branch below, v's load cost 0.2 us of a 1.5 us kernel.
  const auto k_prepared = KChain::prepare(Env{p.consts, &p.k.scale});
  typename VChain::Prepared v_prepared;
  if constexpr (IsPair) v_prepared = VChain::prepare(Env{p.consts, &p.v.scale});
  // Early the next kernel's start is hidden; from 512 tokens its blocks would crowd some of the multiprocessors.
  if (p.rows.tokens <= 256) allow_next_kernel();
  const int64_t row = cache_row<Loc>(p.rows, loc);
  bool repeated = false;
  if (p.rows.may_repeat) {
    const Loc* locs = static_cast<const Loc*>(p.rows.loc);
    if (p.rows.wrap) {
      for (int other = token + 1 + lane; other < p.rows.tokens; other += blockDim.x) {
        repeated |= cache_row<Loc>(p.rows, locs[other]) == row;
      }
    } else {  // equal rows are equal locs
#pragma unroll 8
      for (int other = token + 1 + lane; other < p.rows.tokens; other += blockDim.x) {
        repeated |= locs[other] == static_cast<Loc>(loc);
      }
    }
    repeated = __syncthreads_or(repeated);
  }
  allow_next_kernel();
  if (p.rows.check && row == kOutside && lane == 0 && blockIdx.y == 0) note_outside(token);
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
  if (token < p.rows.tokens) {
    row = loc_of<Loc>(p.rows, token);
    k.load(p.k, token, lane);
    if constexpr (IsPair) v.load(p.v, token, lane);
    row = cache_row<Loc>(p.rows, row);
  }
  k.prepared = KChain::prepare(Env{p.consts, &p.k.scale});
  if constexpr (IsPair) v.prepared = VChain::prepare(Env{p.consts, &p.v.scale});
  if (p.rows.may_repeat) {
    __syncthreads();
    for (int i = 0; i < kTokens; i += kTargets) {
      if (block_token + i >= p.rows.tokens) break;
      const int first = static_cast<int>(block_token) + i;
      p.rows.wrap ? find_repeated<Loc, true, kScanThreads>(p.rows, first, &repeated[i / kTargets])
                  : find_repeated<Loc, false, kScanThreads>(p.rows, first, &repeated[i / kTargets]);
    }
    __syncthreads();
    if (repeated[mine / kTargets] >> (mine % kTargets) & 1) row = kSkip;
  }
  allow_next_kernel();
  if (p.rows.check && row == kOutside && lane == 0) note_outside(token);
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
// A warp has a token: it claims the token's row before its first store.
// The atomic and the fence cost 2 us at the ends of a kernel and 3 % of the bandwidth at 65536 tokens. K and V wait in shared
// memory, not in registers, to have enough tokens in flight.

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
  if (token < p.rows.tokens) {
    row = loc_of<Loc>(p.rows, token);
    load(lane);
    row = cache_row<Loc>(p.rows, row);
  }
  k.prepared = KChain::prepare(Env{p.consts, &p.k.scale});
  if constexpr (IsPair) v.prepared = VChain::prepare(Env{p.consts, &p.v.scale});
  allow_next_kernel();
  if (p.rows.check && row == kOutside && lane == 0) note_outside(token);

  const unsigned long long key = reinterpret_cast<unsigned long long>(p.k.cache + row * p.k.cache_stride);
  unsigned long long* slot = claim_slot(row);
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
      p.rows.mult = mult, p.rows.offset = offset, p.rows.wrap = wrap, p.rows.check = check;
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
        p.rows.loc = data(loc.value());
      }
      p.rows.tokens = tokens.value(), p.rows.slots = slots.value();
      const int64_t elements = std::max(p.k.vectors, p.v.vectors);
      if (p.rows.tokens == 0 || elements == 0) return;
      DeviceGuard guard(device.id());
      cudaStream_t stream = env_stream(device.id());
      launch_checked<Loc>(p.rows, stream, [&] { launch_width<IsPair>(elements, stream); });
    }

    template <bool IsPair>
    void launch_width(int64_t elements, cudaStream_t stream) {
      const bool distinct = p.rows.tokens == 1 || (p.rows.loc == nullptr && p.rows.mult > 0 && p.rows.offset >= 0);
      const bool scan = p.rows.loc != nullptr && p.rows.mult != 0 && p.rows.tokens <= kScanTokens;
      p.rows.may_repeat = !distinct;
      if (vectors) p.k.vectors /= 8, p.v.vectors /= 8;
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
          .run(downcast_fp8_scan_few_kernel<In, CacheFp8, Saturated, ToFp8<KProgram>, ToFp8<VProgram>, Loc, IsPair, E>, p);
    }
    template <bool IsPair, int Lanes, int E, int U>
    void launch_scan_many(cudaStream_t stream) {
      Launch(static_cast<unsigned>(ceil_div(p.rows.tokens, kScanThreads / Lanes)), kScanThreads)
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
      const unsigned blocks = static_cast<unsigned>(ceil_div(p.rows.tokens, kClaimThreads / 32));
      Launch(blocks, kClaimThreads).stream(stream).programmatic().run(kernel, p);
    }
  };
};

}  // namespace inductor_ext
