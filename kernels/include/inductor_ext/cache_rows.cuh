// The rows of a cache that tokens are stored to: which they are, whether they exist, and which of several tokens one belongs to.
//
//   row = loc[t] * mult + offset        loc [T] int32 or int64; without it row = t * mult + offset
//   wrap                                a negative row counts from the end (index_put); otherwise a negative loc[t] is padding
// Rows outside [0, S) are never written. `check` has the first such token noted, for `throw_if_outside` to read back.
//
// REPEATED ROWS: a row holds one token whole, so that two must not write it at the same time. Either a token whose row a later one
// has too leaves it alone (`find_repeated` compares it with all later ones), or, where comparing would be quadratic in too many
// tokens, a row is claimed in a table before it is written (`claim`).
#pragma once

#include <mutex>

#include "inductor_ext/claim.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/tensor.h"

namespace inductor_ext {

constexpr int kScanTokens = 4096;  // H200, 8 x 128 heads: 10.5 against 11.1 us for claims here, 15.8 against 15.2 us at 7168
constexpr int kClaimSlots = 1 << 16;
constexpr unsigned long long kNoToken = ~0ull;
static __device__ unsigned long long cache_row_claims[kClaimSlots];  // zero outside of kernels
static __device__ unsigned long long cache_row_outside = kNoToken;   // first token whose row is outside the cache

struct CacheRows {
  const void* loc;  // or null
  int64_t tokens, slots, mult, offset;
  bool wrap, check;
  bool may_repeat;
};

constexpr int64_t kSkip = -1;     // padding
constexpr int64_t kOutside = -2;  // not a row of the cache

template <typename Loc>
__device__ __forceinline__ int64_t cache_row(const CacheRows& p, int64_t loc) {
  if (!p.wrap && p.loc != nullptr && loc < 0) return kSkip;
  int64_t row = loc * p.mult + p.offset;
  if (p.wrap && row < 0) row += p.slots;
  return row >= 0 && row < p.slots ? row : kOutside;
}

template <typename Loc>
__device__ __forceinline__ int64_t loc_of(const CacheRows& p, int64_t token) {
  return p.loc == nullptr ? token : static_cast<int64_t>(static_cast<const Loc*>(p.loc)[token]);
}

__device__ __forceinline__ void note_outside(int64_t token) {
  atomicMin(&cache_row_outside, static_cast<unsigned long long>(token));
}

// ---- later tokens of the same row -------------------------------------------------------------------------------------------

constexpr int kTargets = 8;

// What is compared of a loc: its low word, or that of its row where negative rows count from the end.
template <typename Loc, bool Wrap>
__device__ __forceinline__ uint32_t scan_key(const CacheRows& p, int token) {
  if constexpr (Wrap) return static_cast<uint32_t>(cache_row<Loc>(p, static_cast<const Loc*>(p.loc)[token]));
  return static_cast<const uint32_t*>(p.loc)[static_cast<int64_t>(token) * (sizeof(Loc) / 4)];
}

// Sets bit i of `repeated` where the row of token first + i is also that of a later token, for kTargets tokens. All `Threads`
// threads of the block take part.
template <typename Loc, bool Wrap, int Threads>
__device__ __forceinline__ void find_repeated(const CacheRows& p, int first, unsigned* repeated) {
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
  for (int begin = first + kTargets + threadIdx.x; begin < tokens; begin += kBatch * Threads) {
    uint32_t keys[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) keys[j] = scan_key<Loc, Wrap>(p, min(begin + j * Threads, tokens - 1));
    bool some = false;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
#pragma unroll
      for (int i = 0; i < kTargets; ++i) some |= keys[j] == targets[i];
    }
    if (some) {
#pragma unroll 1
      for (int j = 0; j < kBatch && begin + j * Threads < tokens; ++j) mark(begin + j * Threads);
      if (*static_cast<volatile unsigned*>(repeated) == (1u << kTargets) - 1) return;
    }
  }
}

// ---- claims -----------------------------------------------------------------------------------------------------------------
// A cache row must not be written by two tokens at the same time; written one after the other, the later is whole. Before its
// first store a token's threads claim the row by a compare-and-swap of the row's address into a slot of a table, and give the slot
// back when its stores are done (release). They find the slot
//   free                  -> they are the only writers (acquire: behind every store of those who had it before);
//   taken, by the row     -> that token's row, whole, is the one to stand: nothing to store;
//   taken, by another row -> they try again. Nobody waits while holding a slot, so a holder always gets on.
// The slots are back to zero when the kernel ends, and what they hold are addresses of rows in memory: launches on other streams,
// replays of a captured graph and other caches share the table without harm, and it needs no clearing.

__device__ __forceinline__ unsigned long long* claim_slot(int64_t row) {
  return cache_row_claims + ((row ^ (row >> 16)) & (kClaimSlots - 1));
}

// ---- on the host ------------------------------------------------------------------------------------------------------------

inline bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

// IndexError, where a token was noted: `rows` names its row. Waits for the stream.
template <typename Loc>
void throw_if_outside(const CacheRows& rows, cudaStream_t stream) {
  unsigned long long token;
  check_cuda(cudaMemcpyFromSymbolAsync(&token, cache_row_outside, 8, 0, cudaMemcpyDeviceToHost, stream), "check of loc");
  check_cuda(cudaStreamSynchronize(stream), "check of loc");
  if (token == kNoToken) return;
  check_cuda(cudaMemcpyToSymbolAsync(cache_row_outside, &kNoToken, 8, 0, cudaMemcpyHostToDevice, stream), "check of loc");
  Loc value = static_cast<Loc>(token);
  if (rows.loc != nullptr) {
    check_cuda(cudaMemcpyAsync(&value, static_cast<const Loc*>(rows.loc) + token, sizeof(Loc), cudaMemcpyDeviceToHost, stream),
               "check of loc");
  }
  check_cuda(cudaStreamSynchronize(stream), "check of loc");
  const int64_t row = static_cast<int64_t>(value) * rows.mult + rows.offset;
  TVM_FFI_THROW(IndexError) << "loc: wanted rows in [" << (rows.wrap ? -rows.slots : 0) << ", " << rows.slots << "), found row "
                            << row << " for token " << token << " (loc = " << value << ")";
}

// `launch()`, and with `rows.check` a look at what it noted; one at a time, for there is one note. A stream that is being captured
// cannot be waited for: nothing is checked there.
template <typename Loc, typename F>
void launch_checked(CacheRows& rows, cudaStream_t stream, F&& launch) {
  if (rows.check) rows.check = !capturing(stream);
  if (!rows.check) return launch();
  static std::mutex one_check_at_a_time;
  std::lock_guard<std::mutex> lock(one_check_at_a_time);
  launch();
  throw_if_outside<Loc>(rows, stream);
}

}  // namespace inductor_ext
