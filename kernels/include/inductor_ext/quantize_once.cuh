// A tensor's FP8 quantisation with one scale in one launch: y is computed, kept on the chip, and cast once its maximum is known.
//
//   1. A block computes its share of y, in turns of U vectors a thread. The first turns stay in shared memory, the last one in
//      registers. Those between go nowhere. The block's maximum goes to partial[block].
//   2. A barrier of the grid, whose blocks all are resident.
//   3. scale = scale_program(max of partial); the blocks cast what they kept, and compute again what they did not, the last of
//      it first: its inputs are still in L2.
//
// Two launches (quantize_tensor.cuh) write all of y and read it again. What an H200 keeps of a 16-bit y: 25 MB in shared memory
// and 8 to 13 MB in registers, 7168 rows of 2048 columns and four fifths of 7168 rows of 3072.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "inductor_ext/divisor.cuh"
#include "inductor_ext/fp8.cuh"
#include "inductor_ext/grid_barrier.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/quantize_tensor.cuh"
#include "inductor_ext/reduce.cuh"
#include "inductor_ext/steps.cuh"

namespace inductor_ext {

constexpr int kOnceThreads = 512;

// Shared memory of an SM that is used. 196 KiB leave 60 for L1, through which all loads go; 228, all there is, would leave 28.
constexpr int kOnceShared = 196 << 10;

// However little of y is kept, one launch is taken. A vector that is not kept costs its inputs' bytes again, where two launches
// write and read it: for a norm and x alone 2 bytes an element against 4, for a gated activation 4 against 4. On an H200 one launch
// took 422 µs for 65536 x (2 x 3072) with 9 % kept, two 478 (benchmarks/results/h200/one_scale.json).

struct OnceParams {
  uint8_t* out;
  void* scale;
  float* partial;
  uint32_t blocks;  // of work, below 2^30: block b of the grid takes b, b + gridDim.x, …
  int kept;         // turns in shared memory
  Consts consts;
};

// A vector as memory holds it, 16-byte aligned: of shared memory, and of what this kernel itself wrote.
template <typename In, int E>
struct alignas(16) Aligned {
  Raw<In, E> raw;
};

// What a kernel's work is derived from. It has, besides,
//   y(block, again, raw)   raw[U] of a block of work, zeros where there is none; `again` after the barrier
//   at(block, u)           where this thread's vector u goes in out, negative for nowhere
template <typename In>
struct OnceWork {
  __device__ __forceinline__ void rest(Amax<In>&) const {}  // elements behind the last vector: their maximum, and their cast
  template <typename F>
  __device__ __forceinline__ void cast_rest(F&&) const {}
};

template <typename In, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int E, int U, typename Work>
__device__ __forceinline__ void quantize_once(const OnceParams& p, Aligned<In, E>* kept, Work&& work) {
  __shared__ uint32_t shared[32];
  const auto place = [&](int turn, int u) { return (turn * U + u) * blockDim.x + threadIdx.x; };
  const auto block = [&](int turn) { return blockIdx.x + turn * gridDim.x; };
  const int last = static_cast<int>((p.blocks - 1 - blockIdx.x + gridDim.x) / gridDim.x) - 1;  // -1: no work
  const int in_shared = min(p.kept, last);

  Amax<In> amax;
  Raw<In, E> y[U];
  wait_for_previous_kernel();
#pragma unroll 1
  for (int turn = 0; turn <= last; ++turn) {
    work.y(block(turn), false, y);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      amax.merge(y[u]);
      if (turn < in_shared) kept[place(turn, u)].raw = y[u];
    }
  }
  work.rest(amax);
  uint32_t bits = block_max(amax.float_bits(), shared);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) p.partial[blockIdx.x] = __uint_as_float(bits);
    grid_barrier();
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) bits = max(bits, __float_as_uint(__ldcg(p.partial + i)));
    bits = block_max(bits, shared);
  }
  allow_next_kernel();  // not before the barrier: its blocks could take the room of ours

  const float scale = scale_of<ScaleProgram>(p.consts, bits);
  if (blockIdx.x == 0 && threadIdx.x == 0) *static_cast<ScaleT*>(p.scale) = from_float<ScaleT>(scale);
  const auto prepared = prepare_scaled<Chain>(p.consts, scale, bits);
  const auto cast = [&](const auto& raw, int64_t at) {
    if (at >= 0) downcast_vector<In, Fp8, Saturated, Chain>(raw, prepared, p.out + at);
  };
  const auto cast_turn = [&](int turn) {
#pragma unroll
    for (int u = 0; u < U; ++u) cast(y[u], work.at(block(turn), u));
  };
  if (last >= 0) cast_turn(last);
#pragma unroll 1
  for (int turn = last - 1; turn >= in_shared; --turn) {
    work.y(block(turn), true, y);
    cast_turn(turn);
  }
  for (int turn = in_shared - 1; turn >= 0; --turn) {
#pragma unroll
    for (int u = 0; u < U; ++u) cast(kept[place(turn, u)].raw, work.at(block(turn), u));
  }
  work.cast_rest(cast);
}

// ---- host -------------------------------------------------------------------------------------------------------------------

// INDUCTOR_EXT_TENSOR_LAUNCHES=1 or 2 takes that many launches wherever possible, to measure one against the other: it is read at
// every call. 0, or nothing: by size.
inline int forced_launches() {
  const char* text = std::getenv("INDUCTOR_EXT_TENSOR_LAUNCHES");
  return text == nullptr ? 0 : std::atoi(text);
}

// How a kernel fills an SM: blocks, and turns of each that its shared memory holds.
struct OncePlan {
  int blocks, kept;
};

// The plans of a kernel, for each device and block size made once. (Twice, if two threads come first together.)
class OncePlans {
 public:
  template <typename Kernel>
  OncePlan of(Kernel* kernel, unsigned threads, int turn_bytes, int device) {
    std::atomic<uint32_t>* known = device < kDevices ? &plans_[device][threads / 32] : nullptr;
    if (const uint32_t found = known ? known->load(std::memory_order_relaxed) : 0) {
      return {static_cast<int>(found >> 16) - 1, static_cast<int>(found & 0xffff)};
    }
    const OncePlan plan = made(kernel, threads, turn_bytes, device);
    if (known) known->store(static_cast<uint32_t>(plan.blocks + 1) << 16 | static_cast<uint32_t>(plan.kept), std::memory_order_relaxed);
    return plan;
  }

 private:
  template <typename Kernel>
  static OncePlan made(Kernel* kernel, unsigned threads, int turn_bytes, int device) {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
      return value;
    };
    const auto resident = [&](int kept) {
      int blocks = 0;
      check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(kept) * turn_bytes),
                 "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
      return blocks;
    };
    cudaFuncAttributes own = {};
    check_cuda(cudaFuncGetAttributes(&own, kernel), "cudaFuncGetAttributes");
    OncePlan plan{attribute(cudaDevAttrCooperativeLaunch) ? resident(0) : 0, 0};
    if (plan.blocks == 0) return plan;
    const int of_sm = std::min(kOnceShared, attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)) / plan.blocks;
    const int of_block = std::min(of_sm - attribute(cudaDevAttrReservedSharedMemoryPerBlock), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    plan.kept = std::max((of_block - static_cast<int>(own.sharedSizeBytes)) / turn_bytes, 0);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.kept * turn_bytes), "cudaFuncSetAttribute");
    while (plan.kept > 0 && resident(plan.kept) < plan.blocks) --plan.kept;
    return plan;
  }

  static constexpr int kDevices = 64;
  std::atomic<uint32_t> plans_[kDevices][33] = {};  // blocks + 1, kept; 0 is unknown
};

// One launch, if it is possible and two are not forced; false, and nothing has been launched, if not. `p.once` has all but blocks
// and kept.
template <typename Kernel, typename Params>
bool launch_once(Kernel* kernel, OncePlans& plans, Params& p, int64_t blocks, unsigned threads, int turn_bytes, int device) {
  if (forced_launches() == 2 || blocks >= 1 << 30) return false;
  const OncePlan plan = plans.of(kernel, threads, turn_bytes, device);
  const int64_t resident = std::min<int64_t>(static_cast<int64_t>(plan.blocks) * sm_count(device), kTensorMaxPartials);
  if (resident == 0) return false;
  unsigned grid = static_cast<unsigned>(std::min(blocks, resident));
  const int64_t turns = ceil_div(blocks, grid);
  p.once.blocks = static_cast<uint32_t>(blocks), p.once.kept = static_cast<int>(std::min<int64_t>(plan.kept, turns - 1));

  constexpr unsigned kCluster = 8;
  const bool cluster = grid <= kCluster;
  while (cluster && (grid & (grid - 1)) != 0) ++grid;  // to a power of two, the last blocks without work
  Launch launch(grid, threads);
  launch.stream(env_stream(device)).shared_memory(static_cast<size_t>(p.once.kept) * turn_bytes).programmatic();
  if (!cluster) return launch.cooperative().run_if_it_fits(kernel, p);
  if (grid > 1) launch.cluster(grid);
  launch.run(kernel, p);
  return true;
}

}  // namespace inductor_ext
