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
// One group of lanes (32, or 8 for narrow rows) takes one token, all 8-element vectors of its K and V row in flight at once.
//
// REPEATED ROWS: one token's K and V are stored whole. A cache row must not be written by two groups at the same time; written
// one after the other, the later is whole. How that is ensured depends on T alone:
//   kUnique  the rows cannot repeat (one token, or no loc).
//   kScan    few tokens: a group looks through loc[t+1..T) while its loads are in flight, and leaves the row to a later token.
//   kClaim   many: before its first store a group claims the row by a compare-and-swap of the row's address into a slot of a
//            table, and gives the slot back after its stores are done (release). It finds the slot
//              free                      -> it is the only writer (acquire: behind every store of the one who had it before);
//              taken, by the same row    -> that token's row, whole, is the one to stand: nothing to store;
//              taken, by another row     -> it tries again. Nobody waits while holding a slot, so a holder always gets on.
//            The slots are back to zero when the kernel ends, and their contents are addresses of the row in memory: launches on
//            other streams, replays of a captured graph and other caches share the table without harm, and it needs no clearing.
// Cost of a claim: one atomic behind the load of loc, hidden by the loads of K and V, and one fence.
#pragma once

#include <tvm/ffi/function.h>

#include <algorithm>
#include <mutex>

#include "inductor_ext/fp8.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/steps.cuh"
#include "inductor_ext/tensor.h"

namespace inductor_ext {

constexpr int kClaimSlots = 1 << 16;
constexpr unsigned long long kNoToken = ~0ull;
static __device__ unsigned long long downcast_fp8_claims[kClaimSlots];  // zero outside of kernels
static __device__ unsigned long long downcast_fp8_outside = kNoToken;   // first token whose row is outside the cache

enum class Repeats { kUnique, kScan, kClaim };

struct DowncastFp8Side {
  const void* x;
  uint8_t* cache;
  int64_t x_stride;      // elements
  int64_t cache_stride;  // bytes
  int64_t vectors;       // of a row
  Operands operands;
};

struct DowncastFp8Params {
  DowncastFp8Side k, v;
  const void* loc;  // or null
  int64_t tokens, slots, mult, offset;
  bool wrap, check;
  Repeats repeats;
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

// The vectors [first, first + Lanes * U) of one row of one side: loaded, cast, stored.
template <typename In, typename Fp8, bool Saturated, typename Program, int Lanes, int E, int U>
struct DowncastFp8Chunk {
  typename Program::Prepared prepared;
  Raw<In, E> raw[U];
  Bytes<E> bytes[U];

  __device__ __forceinline__ void load(const DowncastFp8Side& side, int64_t token, int64_t first, int lane) {
    const In* x = static_cast<const In*>(side.x) + token * side.x_stride + (first + lane) * E;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      raw[u].zero();
      if (first + u * Lanes + lane < side.vectors) raw[u].load(x + u * Lanes * E);
    }
  }
  __device__ __forceinline__ void cast() {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float v[E];
      raw[u].unpack(v);
      Program::apply(prepared, v);
      bytes[u] = cast_fp8<Fp8, Saturated>(v);
    }
  }
  __device__ __forceinline__ void store(const DowncastFp8Side& side, int64_t row, int64_t first, int lane) const {
    uint8_t* cache = side.cache + row * side.cache_stride + (first + lane) * E;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * Lanes + lane < side.vectors) bytes[u].store(cache + u * Lanes * E);
    }
  }
};

__device__ __forceinline__ unsigned long long claim(unsigned long long* slot, unsigned long long key) {
  unsigned long long seen;
  asm volatile("atom.acquire.gpu.global.cas.b64 %0, [%1], 0, %2;" : "=l"(seen) : "l"(slot), "l"(key) : "memory");
  return seen;
}
__device__ __forceinline__ void give_back(unsigned long long* slot) {
  asm volatile("st.release.gpu.global.b64 [%0], 0;" ::"l"(slot) : "memory");
}

constexpr int kDowncastFp8Threads = 128;

template <typename In, typename Fp8, bool Saturated, typename KProgram, typename VProgram, typename Loc, bool IsPair, int Lanes,
          int E, int U>
__global__ void __launch_bounds__(kDowncastFp8Threads, sizeof(In) == 2 ? 6 : 4) downcast_fp8_kernel(const __grid_constant__ DowncastFp8Params p) {
  constexpr int kChunk = Lanes * U;
  const int lane = threadIdx.x % Lanes;
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / Lanes;
  const bool active = token < p.tokens;
  const int64_t vectors = IsPair ? max(p.k.vectors, p.v.vectors) : p.k.vectors;
  int64_t first = static_cast<int64_t>(blockIdx.y) * kChunk;

  int64_t row = kSkip;
  if (active) row = p.loc == nullptr ? token : static_cast<int64_t>(static_cast<const Loc*>(p.loc)[token]);
  DowncastFp8Chunk<In, Fp8, Saturated, KProgram, Lanes, E, U> k;
  DowncastFp8Chunk<In, Fp8, Saturated, VProgram, Lanes, E, U> v;
  if (active) {
    k.load(p.k, token, first, lane);
    if constexpr (IsPair) v.load(p.v, token, first, lane);
    row = cache_row<Loc>(p, row);
  }
  if (p.check && row == kOutside && lane == 0) atomicMin(&downcast_fp8_outside, static_cast<unsigned long long>(token));

  k.prepared = KProgram::prepare(Env{p.consts, p.k.operands});
  if constexpr (IsPair) v.prepared = VProgram::prepare(Env{p.consts, p.v.operands});
  const unsigned group = Lanes == 32 ? 0xffffffffu : ((1u << (Lanes % 32)) - 1) << (threadIdx.x % 32 / Lanes * Lanes);

  if (p.repeats == Repeats::kScan) {
    bool repeated = false;
    if (row >= 0) {
#pragma unroll 4
      for (int64_t other = token + 1 + lane; other < p.tokens; other += Lanes) {
        const int64_t loc = p.loc == nullptr ? other : static_cast<int64_t>(static_cast<const Loc*>(p.loc)[other]);
        repeated |= cache_row<Loc>(p, loc) == row;
      }
    }
    if (__ballot_sync(0xffffffffu, repeated) & group) row = kSkip;
  }

  const bool claims = p.repeats == Repeats::kClaim;
  const unsigned long long key = reinterpret_cast<unsigned long long>(p.k.cache + row * p.k.cache_stride);
  unsigned long long* slot = downcast_fp8_claims + ((row ^ (row >> 16)) & (kClaimSlots - 1));
  bool pending = row >= 0;
  unsigned long long seen = 0;
  if (claims && pending && lane == 0) seen = claim(slot, key);
  k.cast();  // the claim is on its way meanwhile
  if constexpr (IsPair) v.cast();
  while (__any_sync(0xffffffffu, pending)) {
    if (claims) seen = __shfl_sync(0xffffffffu, seen, 0, Lanes);
    if (pending && seen == 0) {
      k.store(p.k, row, first, lane);
      if constexpr (IsPair) v.store(p.v, row, first, lane);
      while ((first += static_cast<int64_t>(gridDim.y) * kChunk) < vectors) {
        k.load(p.k, token, first, lane);
        if constexpr (IsPair) v.load(p.v, token, first, lane);
        k.cast();
        if constexpr (IsPair) v.cast();
        k.store(p.k, row, first, lane);
        if constexpr (IsPair) v.store(p.v, row, first, lane);
      }
      if (claims) {
        __syncwarp(group);
        if (lane == 0) give_back(slot);
      }
    }
    pending = pending && seen != 0 && seen != key;
    if (pending) {
      __nanosleep(100);
      if (lane == 0) seen = claim(slot, key);
    }
  }
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
        side.operands.pointer[0] = data(scale.value());
      });
      side.x = data(x);
      side.cache = data<uint8_t>(cache);
      side.vectors = cols;  // elements until `launch` knows the vector width
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
      const int64_t elements = IsPair ? std::max(p.k.vectors, p.v.vectors) : p.k.vectors;
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
      if (!vectors) {
        launch_kernel<IsPair, 32, 1, 8>(elements, stream);
      } else {
        p.k.vectors /= 8, p.v.vectors /= 8;
        if (elements <= 128) {
          launch_kernel<IsPair, 8, 8, 2>(elements / 8, stream);
        } else {
          launch_kernel<IsPair, 32, 8, 4>(elements / 8, stream);
        }
      }
    }

    template <bool IsPair, int Lanes, int E, int U>
    void launch_kernel(int64_t vectors, cudaStream_t stream) {
      const bool distinct = p.loc == nullptr && p.mult > 0 && p.offset >= 0;
      if (p.tokens == 1 || distinct) {
        p.repeats = Repeats::kUnique;
      } else {
        p.repeats = p.tokens <= 32 * Lanes ? Repeats::kScan : Repeats::kClaim;
      }
      // A claimed row is stored by the one group that claimed it; otherwise the chunks of a row go to different blocks.
      const int64_t chunks = p.repeats == Repeats::kClaim ? 1 : ceil_div(vectors, Lanes * U);
      // Few tokens: one warp a block, to use every multiprocessor.
      const int threads = ceil_div(p.tokens * Lanes, 32) * chunks <= 4 * sm_count(device.id()) ? 32 : kDowncastFp8Threads;
      const dim3 grid(static_cast<unsigned>(ceil_div(p.tokens * Lanes, threads)), static_cast<unsigned>(std::min<int64_t>(chunks, 65535)));
      Launch(grid, threads)
          .stream(stream)
          .run(downcast_fp8_kernel<In, CacheFp8, Saturated, KProgram, VProgram, Loc, IsPair, Lanes, E, U>, p);
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
