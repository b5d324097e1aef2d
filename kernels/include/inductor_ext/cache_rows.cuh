// The rows of a cache that tokens are stored to: which they are, whether they exist, and which of several tokens one belongs to.
//
//   row = loc[t] * mult + offset        loc [T] int32 or int64; without it row = t * mult + offset
//   wrap                                a negative row counts from the end (index_put); otherwise a negative loc[t] is padding
// BLOCKS: a cache whose rows lie in blocks, each at its own place. Row r is row r % block of block r / block.
//   at [T]                              like loc, which then is a block: the token's row is row at[t] of block loc[t]. Each counts
//                                       from its own end with `wrap`, and must be inside its own range
// Rows outside [0, S) are never written. `check` has the first such token noted, for `throw_if_outside` to read back.
//
// REPEATED ROWS: a row holds one token whole, so that two must not write it at the same time. Either a token whose row a later one
// has too leaves it alone (`find_repeated` compares it with all later ones), or, where comparing would be quadratic in too many
// tokens, a row is claimed in a table before it is written (`claim`).
#pragma once

#include <mutex>

#include "inductor_ext/claim.cuh"
#include "inductor_ext/divisor.cuh"
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
  // Of a cache in blocks alone:
  const void* at;  // or null
  int64_t blocks;
  Divisor block;  // by the rows of one
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

// What a token was told: a row, or a block and a row of it.
struct Told {
  int64_t loc, at;
};

template <typename Loc, bool Blocks>
__device__ __forceinline__ Told told(const CacheRows& p, int64_t token) {
  Told result{loc_of<Loc>(p, token), 0};
  if constexpr (Blocks) {
    if (p.at != nullptr) result.at = static_cast<const Loc*>(p.at)[token];
  }
  return result;
}

template <typename Loc, bool Blocks>
__device__ __forceinline__ int64_t cache_row(const CacheRows& p, Told told) {
  if (!Blocks || p.at == nullptr) return cache_row<Loc>(p, told.loc);
  if (!p.wrap && (told.loc < 0 || told.at < 0)) return kSkip;
  const int64_t rows = p.block.divisor;
  const int64_t block = told.loc < 0 ? told.loc + p.blocks : told.loc;
  const int64_t row = told.at < 0 ? told.at + rows : told.at;
  return block >= 0 && block < p.blocks && row >= 0 && row < rows ? block * rows + row : kOutside;
}

// The row of a token where there is a loc.
template <typename Loc, bool Blocks>
__device__ __forceinline__ int64_t row_of_listed(const CacheRows& p, int64_t token) {
  const Loc loc = static_cast<const Loc*>(p.loc)[token];
  if (!Blocks || p.at == nullptr) return cache_row<Loc>(p, loc);
  return cache_row<Loc, Blocks>(p, Told{loc, static_cast<const Loc*>(p.at)[token]});
}

// Whether rows have to be compared to know which tokens have the same: without, their locs tell.
template <bool Blocks>
__device__ __forceinline__ bool compares_rows(const CacheRows& p) { return p.wrap || (Blocks && p.at != nullptr); }

// Where a row that is there begins, behind the first of a cache whose rows are `pitch` apart, and whose blocks `block_pitch`.
template <bool Blocks>
__device__ __forceinline__ int64_t place_of(const CacheRows& p, int64_t row, int64_t pitch, int64_t block_pitch) {
  if constexpr (!Blocks) return row * pitch;
  uint32_t within;
  const uint32_t block = p.block.divide(static_cast<uint32_t>(row), &within);
  return block * block_pitch + within * pitch;
}

__device__ __forceinline__ void note_outside(int64_t token) {
  atomicMin(&cache_row_outside, static_cast<unsigned long long>(token));
}

// ---- later tokens of the same row -------------------------------------------------------------------------------------------

constexpr int kTargets = 8;

// What is compared of a token: the low word of its loc, or that of its row where locs do not tell (`compares_rows`).
template <typename Loc, bool ByRow, bool Blocks>
__device__ __forceinline__ uint32_t scan_key(const CacheRows& p, int token) {
  if constexpr (ByRow) return static_cast<uint32_t>(row_of_listed<Loc, Blocks>(p, token));
  return static_cast<const uint32_t*>(p.loc)[static_cast<int64_t>(token) * (sizeof(Loc) / 4)];
}

// Sets bit i of `repeated` where the row of token first + i is also that of a later token, for kTargets tokens. All `Threads`
// threads of the block take part.
template <typename Loc, bool ByRow, int Threads, bool Blocks = false>
__device__ __forceinline__ void find_repeated(const CacheRows& p, int first, unsigned* repeated) {
  constexpr int kBatch = 8;
  const int tokens = static_cast<int>(p.tokens);
  uint32_t targets[kTargets];
#pragma unroll
  for (int i = 0; i < kTargets; ++i) targets[i] = scan_key<Loc, ByRow, Blocks>(p, min(first + i, tokens - 1));
  // Mark where the later token `other` goes to the row of one of the targets, comparing all of the rows.
  auto mark = [&](int other) {
    const int64_t row = row_of_listed<Loc, Blocks>(p, other);
#pragma unroll 1
    for (int i = 0; i < kTargets && first + i < other; ++i) {
      if (row >= 0 && row == row_of_listed<Loc, Blocks>(p, first + i)) atomicOr(repeated, 1u << i);
    }
  };
  if (threadIdx.x < kTargets && first + threadIdx.x < tokens) {  // among the targets themselves
    const uint32_t key = scan_key<Loc, ByRow, Blocks>(p, first + threadIdx.x);
    bool some = false;
#pragma unroll
    for (int i = 0; i < kTargets; ++i) some |= i < threadIdx.x && key == targets[i];
    if (some) mark(first + threadIdx.x);
  }
  for (int begin = first + kTargets + threadIdx.x; begin < tokens; begin += kBatch * Threads) {
    uint32_t keys[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) keys[j] = scan_key<Loc, ByRow, Blocks>(p, min(begin + j * Threads, tokens - 1));
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
  Loc value = static_cast<Loc>(token), at = 0;
  const auto read = [&](Loc& into, const void* from) {
    if (from == nullptr) return;
    check_cuda(cudaMemcpyAsync(&into, static_cast<const Loc*>(from) + token, sizeof(Loc), cudaMemcpyDeviceToHost, stream),
               "check of loc");
  };
  read(value, rows.loc), read(at, rows.at);
  check_cuda(cudaStreamSynchronize(stream), "check of loc");
  if (rows.at != nullptr) {
    const int64_t block = rows.block.divisor;
    TVM_FFI_THROW(IndexError) << "loc, at: wanted blocks in [" << (rows.wrap ? -rows.blocks : 0) << ", " << rows.blocks
                              << ") and rows of them in [" << (rows.wrap ? -block : 0) << ", " << block << "), found block " << value
                              << " and row " << at << " for token " << token;
  }
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
