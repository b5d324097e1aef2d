// A compute capability 9.0 CTA on the CPU: enough of it to compile the kernels of mxfp8_grouped_mm and of scaled_mm's tiles with a
// host compiler and run them. CTAs run one after the other, those of a cluster together, in turns.
//
// A thread is a fibre, which runs until it has to wait; turns are taken in a random order, and warps stay behind for a while. What
// hardware does on its own is done as late as it may be, so that whoever does not wait for it gets old bytes: copies (the copy
// engine's and cp.async) in a random order some turns later, wgmma and the copy engine's stores when their group is waited for; an
// operand that is not then what it was at its issue is an error. So is a CTA in which nothing can go on, one that ends before its
// stores have been read or before what another one of its cluster sends has come, a read outside of every tensor, and a store of
// what stmatrix wrote and no proxy fence followed. Shared memory begins as 0xff bytes, NaN in every format. Nothing is said about speed, about memory ordering between threads otherwise,
// or about what PTX's own conversions do: the stand-in of hopper_math.cuh computes from definitions.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "../fibres.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, gridDim, blockDim;
struct uint2 { uint32_t x, y; };
struct alignas(8) float2 { float x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
struct __nv_fp8_e4m3 { uint8_t bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
struct __half2 { __half x, y; };
struct __nv_fp8_e5m2 { uint8_t bits; };
struct __nv_fp8_e8m0 { uint8_t bits; };
using std::max;
using std::min;

namespace inductor_ext {
constexpr int kSharedBytes = 232448;
extern __attribute__((aligned(1024))) uint8_t shared[];
}  // namespace inductor_ext

namespace hopper_on_cpu {

constexpr size_t kStack = 256 << 10;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

// ---- memory -----------------------------------------------------------------------------------------------------------------

struct Span {
  const uint8_t *begin, *end;
};
inline std::vector<Span> spans;  // the tensors of a call
inline void check_access(const void* p, size_t bytes, size_t alignment) {
  const uint8_t* at = static_cast<const uint8_t*>(p);
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("a misaligned access");
  for (const Span& span : spans) {
    if (span.begin <= at && at + bytes <= span.end) return;
  }
  fail("an access outside of every tensor");
}
inline uint32_t in_shared(const void* p) {
  const int64_t at = static_cast<const uint8_t*>(p) - inductor_ext::shared;
  if (at < 0 || at >= inductor_ext::kSharedBytes) fail("not an address in shared memory");
  return static_cast<uint32_t>(at);
}

// ---- fibres -----------------------------------------------------------------------------------------------------------------

struct Pending {
  int turns;
  std::function<void()> act;
};
struct Meeting {  // of some threads: how many came, how many are wanted, and how often all have
  unsigned came = 0, wanted = 0;
  uint64_t times = 0;
};
inline float of_e4m3(uint8_t byte);
struct Step {  // a wgmma, of one thread
  const uint32_t* a[4];  // 16-bit elements from registers; or null, and A is `a_shared`
  uint64_t b;
  std::vector<float*> d;
  std::vector<uint8_t> operands;  // both, as they were when it was issued
  uint64_t a_shared;
  bool adds;
  bool words, across;  // elements are 16 bits, not 8; B's rows in shared memory are K, not N
  float (*of_element)(uint32_t);  // of 16 bits
  float (*of_a)(uint8_t) = of_e4m3;
  float (*of_b)(uint8_t) = of_e4m3;
};
struct Store {  // of a box, by the copy engine
  const uint8_t* from;
  std::vector<uint8_t> bytes;  // as they were when it was issued
  std::function<void()> write;
};
inline unsigned seed = 7;  // of the order in which things happen
struct Cta {
  std::vector<Fibre> fibres;
  std::vector<bool> ended;
  std::vector<std::function<bool()>> awaited;  // by each thread that waits
  jmp_buf scheduler;
  unsigned running = 0, threads = 0;
  uint64_t progress = 0;
  std::function<void()> body;
  std::exception_ptr failure;
  std::vector<Pending> pending;
  std::map<int, Meeting> meetings;
  std::vector<std::array<uint64_t, 3>> given;        // by each thread, to the others of its warp
  std::vector<std::vector<std::vector<Step>>> issued;  // by thread: groups of wgmmas, the last one open
  std::vector<int> unfinished;                       // cp.async of each thread
  std::vector<std::vector<std::vector<Store>>> stores;  // by thread: groups of stores, the last one open
  std::map<uint32_t, unsigned> unfenced;  // 16 bytes that stmatrix wrote: by which thread
  std::mt19937 random{seed};
  unsigned block = 0, left = 0;  // its index; threads that have not ended
  std::vector<uint8_t> memory;   // its shared memory, while another CTA of its cluster has its turn
  std::vector<unsigned> order;   // of its threads, in a turn
  std::vector<bool> stalled;     // warps that stay behind
  unsigned arrivals = 0;         // of other CTAs, on their way to its barriers
  unsigned cluster_arrives = 0;  // threads of it that came to the cluster's barrier, ever
};
inline Cta* cta = nullptr;                        // whose turn it is
inline std::vector<std::unique_ptr<Cta>> cluster;  // by rank

inline void yield() { leave(cta->fibres[cta->running], cta->scheduler); }
template <typename Condition>
void wait_until(Condition condition) {
  if (!condition()) {
    cta->awaited[cta->running] = std::ref(condition);  // the scheduler comes back when it holds
    yield();
  }
  ++cta->progress;
}
inline void later_in(Cta& where, std::function<void()> act) {  // in one of its turns
  if (where.left == 0) fail("what is sent to a CTA that has ended");
  where.pending.push_back({1 + static_cast<int>(cta->random() % 6), std::move(act)});
}
inline void later(std::function<void()> act) { later_in(*cta, std::move(act)); }

inline void start() {
  try {
    cta->body();
  } catch (...) {  // it cannot leave a fibre
    if (!cta->failure) cta->failure = std::current_exception();
  }
  cta->ended[cta->running] = true;
  ++cta->progress;
  yield();
}

inline void run_pending() {
  std::vector<Pending> due, rest;
  for (Pending& each : cta->pending) (--each.turns <= 0 ? due : rest).push_back(std::move(each));
  cta->pending = std::move(rest);
  std::shuffle(due.begin(), due.end(), cta->random);
  for (Pending& each : due) each.act(), ++cta->progress;
}

inline void make_cta(Cta& made, unsigned block, unsigned threads, std::function<void()> body, char* stacks) {
  made.block = block, made.threads = made.left = threads, made.body = std::move(body), made.random.seed(seed + block);
  made.fibres.resize(threads), made.ended.assign(threads, false), made.given.resize(threads), made.unfinished.assign(threads, 0);
  made.issued.assign(threads, {{}}), made.stores.assign(threads, {{}}), made.awaited.resize(threads), made.stalled.resize(threads / 32);
  made.order.resize(threads), made.memory.assign(inductor_ext::kSharedBytes, 0xff);
  std::iota(made.order.begin(), made.order.end(), 0u);
  for (unsigned i = 0; i < threads; ++i) make_fibre(made.fibres[i], &stacks[i * kStack], kStack, start);
}

// Each thread that is not held up goes on until it has to wait.
inline void take_turn() {
  Cta& own = *cta;
  for (unsigned warp = 0; warp < own.stalled.size(); ++warp) {
    own.stalled[warp] = own.stalled[warp] ? own.random() % 4 != 0 : own.random() % 8 == 0;
  }
  std::shuffle(own.order.begin(), own.order.end(), own.random);
  for (unsigned i : own.order) {
    if (own.ended[i] || own.stalled[i / 32]) continue;
    if (own.awaited[i] && !own.awaited[i]()) continue;
    own.awaited[i] = nullptr;
    own.running = i;
    threadIdx = dim3(i, 0, 0);
    resume(own.fibres[i], own.scheduler);
    own.left -= own.ended[i];
  }
  run_pending();
}

// Blocks from `first` on. The kernel knows one array of shared memory: it is the CTA's whose turn it is.
inline void run_cluster(unsigned first, unsigned ctas, unsigned threads, const std::function<void()>& body) {
  const std::unique_ptr<char[]> stacks(new char[ctas * threads * kStack]);
  cluster.clear();
  for (unsigned rank = 0; rank < ctas; ++rank) {
    cluster.push_back(std::make_unique<Cta>());
    make_cta(*cluster[rank], first + rank, threads, body, &stacks[rank * threads * kStack]);
  }
  auto have = [](Cta& next) {
    if (cta != nullptr) cta->memory.assign(inductor_ext::shared, inductor_ext::shared + inductor_ext::kSharedBytes);
    cta = &next, blockIdx = dim3(next.block, 0, 0);
    std::copy(next.memory.begin(), next.memory.end(), inductor_ext::shared);
  };
  cta = nullptr;
  have(*cluster[0]);
  int quiet = 0;
  uint64_t seen = ~0ull;
  std::mt19937 random{seed + first};
  for (;;) {
    uint64_t progress = 0;
    bool idle = true;
    std::vector<Cta*> running;
    for (const auto& each : cluster) {
      if (each->failure) std::rethrow_exception(each->failure);
      progress += each->progress, idle &= each->pending.empty();
      if (each->left > 0) running.push_back(each.get());
    }
    if (running.empty()) break;
    quiet = progress == seen && idle ? quiet + 1 : 0;
    if (quiet == 64) fail("every thread waits for another");
    seen = progress;
    Cta& next = *running[running.size() == 1 ? 0 : random() % running.size()];
    int turns = 1;
    if (ctas > 1) {  // first, and now and then, one runs far ahead; what it sends may come before the other does anything
      if (&next != cta) have(next), run_pending();
      turns = progress == 0 || random() % 8 == 0 ? 300 : 1 + static_cast<int>(random() % 16);
    }
    for (; turns > 0 && next.left > 0 && !next.failure; --turns) take_turn();
  }
  for (const auto& each : cluster) {
    if (!each->pending.empty()) fail("copies that no one waited for");
    for (const auto& groups : each->stores) {
      if (groups.size() > 1 || !groups[0].empty()) fail("a CTA that ended before the copy engine had read what it stores");
    }
  }
}

template <typename... Params, typename... Args>
void run_grid(unsigned grid, unsigned ctas, unsigned threads, void (*kernel)(Params...), Args&&... args) {
  gridDim = dim3(grid), blockDim = dim3(threads);
  if (grid % ctas != 0) fail("a grid that is no multiple of its clusters");
  for (unsigned x = 0; x < grid; x += ctas) run_cluster(x, ctas, threads, [&] { kernel(args...); });
}

// One of `count` threads is here; the last to come acts for all.
template <typename Act>
Meeting& come(int where, unsigned count, Act act) {
  Meeting& meeting = cta->meetings[where];
  if (meeting.came > 0 && meeting.wanted != count) fail("a barrier that threads come to with different counts");
  meeting.wanted = count, ++meeting.came, ++cta->progress;
  if (meeting.came == count) {
    act();
    meeting.came = 0, ++meeting.times;
  }
  return meeting;
}
// Goes on once `count` threads are here.
template <typename Act>
void meet(int where, unsigned count, Act act) {
  const uint64_t times = cta->meetings[where].times;
  Meeting& meeting = come(where, count, act);
  wait_until([&] { return meeting.times != times; });
}
inline void meet(int where, unsigned count) {
  meet(where, count, [] {});
}
constexpr int kAll = 0, kNamed = 100, kWarp = 1000, kWarpgroup = 2000;
inline int warp() { return static_cast<int>(threadIdx.x / 32); }

// What all lanes of the warp gave. A second meeting keeps the values until all have read them.
template <typename T>
std::array<T, 32> exchange(T value) {
  std::memcpy(cta->given[cta->running].data(), &value, sizeof(T));
  const unsigned first = threadIdx.x / 32 * 32;
  meet(kWarp + warp(), 32);
  std::array<T, 32> all;
  for (unsigned i = 0; i < 32; ++i) std::memcpy(&all[i], cta->given[first + i].data(), sizeof(T));
  meet(kWarp + warp(), 32);
  return all;
}

// ---- barriers in shared memory ----------------------------------------------------------------------------------------------

struct Barrier {  // in the 8 bytes that hardware has for it
  uint16_t wanted;
  uint16_t left : 15, phase : 1;
  int32_t bytes;

  void init(unsigned count) { wanted = static_cast<uint16_t>(count), left = count, phase = 0, bytes = 0; }
  void settle() {
    if (left == 0 && bytes == 0) left = wanted, phase ^= 1;
    ++cta->progress;
  }
  void arrive() {
    if (left == 0) fail("a barrier at which more arrive than it was made for");
    --left;
    settle();
  }
};
static_assert(sizeof(Barrier) == 8);
inline Barrier& barrier_at(const void* p) {
  in_shared(p);
  return *reinterpret_cast<Barrier*>(const_cast<void*>(p));
}

// ---- clusters ---------------------------------------------------------------------------------------------------------------

inline Cta& cta_of(unsigned rank) {
  if (rank >= cluster.size()) fail("a CTA that the cluster does not have");
  return *cluster[rank];
}
// At the barrier that lies in CTA `rank` where `p` lies here.
inline void arrive_in(unsigned rank, const void* p) {
  Cta& where = cta_of(rank);
  if (&where == cta) return barrier_at(p).arrive();
  ++where.arrivals;
  later_in(where, [p] { --cta->arrivals, barrier_at(p).arrive(); });
}
// All threads of all CTAs meet. Who waits sees what was sent to its own CTA before the others came; each comes before it waits.
inline void cluster_arrive() { ++cta->cluster_arrives, ++cta->progress; }
inline void cluster_wait() {
  const unsigned threads = cta->threads, times = (cta->cluster_arrives + threads - 1) / threads;
  wait_until([=] {
    auto came = [=](const auto& each) { return each->cluster_arrives >= times * threads; };
    return std::all_of(cluster.begin(), cluster.end(), came) && cta->arrivals == 0;
  });
}

// ---- wgmma ------------------------------------------------------------------------------------------------------------------

inline float of_bf16(uint32_t bits) {
  const uint32_t word = bits << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// With 128-byte swizzle.
inline const uint8_t* swizzled(uint32_t at) { return inductor_ext::shared + (at ^ ((at >> 7 & 7) << 4)); }

// Byte `byte` of row `row` of a K-major operand with 128-byte swizzle: the exchange goes by the address.
inline const uint8_t* operand_byte(uint64_t descriptor, int row, int byte) {
  if (descriptor >> 62 != 1) fail("a descriptor without 128-byte swizzle");
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4, group = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t at = start + row / 8 * group + row % 8 * 128 + byte;
  return swizzled(at);
}

inline float of_half(uint32_t bits) {
  const uint16_t half = static_cast<uint16_t>(bits);
  _Float16 value;
  std::memcpy(&value, &half, 2);
  return static_cast<float>(value);
}
inline float of_e5m2(uint8_t byte) { return of_half(byte << 8); }  // the upper half of one
inline float of_e4m3(uint8_t byte) {
  const int code = byte & 0x7f;
  const float size = code == 0x7f ? std::nanf("") : code < 8 ? code * 0x1p-9f : std::ldexp(1.f + code % 8 / 8.f, code / 8 - 7);
  return byte & 0x80 ? -size : size;
}

// A row of an operand in shared memory: 32 bytes of K.
inline std::array<uint8_t, 32> row_of(uint64_t descriptor, int row) {
  std::array<uint8_t, 32> found;
  for (int i = 0; i < 32; ++i) found[i] = *operand_byte(descriptor, row, i);
  return found;
}

template <typename T>
float of_word(uint32_t bits) { return std::is_same_v<T, __half> ? of_half(bits) : of_bf16(bits); }

// Row `n` of B, 32 bytes of K, where B's rows in shared memory are K: 64 columns of 16 bits in each, those after them a leading offset
// further, and 8 rows of K a stride offset from the next 8.
inline std::array<uint8_t, 32> row_across(uint64_t descriptor, int n) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4, stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1) fail("a descriptor without 128-byte swizzle");
  std::array<uint8_t, 32> found;
  for (int k = 0; k < 16; ++k) {
    const uint32_t at = start + n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2;
    std::memcpy(&found[2 * k], swizzled(at), 2);
  }
  return found;
}
inline std::array<uint8_t, 32> row_of_b(const Step& step, int n) { return step.across ? row_across(step.b, n) : row_of(step.b, n); }

// A of this thread's registers and, by the first of the warpgroup, what is in shared memory: what a wgmma reads must not change from
// its issue to its end.
inline std::vector<uint8_t> operands_of(const Step& step, bool first) {
  std::vector<uint8_t> found;
  auto add = [&](const auto& bytes) { found.insert(found.end(), bytes.begin(), bytes.end()); };
  for (const uint32_t* word : step.a) {
    for (int i = 0; word != nullptr && i < 4; ++i) found.push_back(*word >> 8 * i & 0xff);
  }
  for (int n = 0; first && n < static_cast<int>(step.d.size()) * 2; ++n) add(row_of_b(step, n));
  for (int m = 0; first && step.a[0] == nullptr && m < 64; ++m) add(row_of(step.a_shared, m));
  return found;
}

// The oldest group of a warpgroup: D[64, N] (+)= A[64, K] · B[N, K]ᵀ for each of its steps, as PTX lays A and D out. K is 32 bytes:
// 16 elements of 16 bits, with A in registers or in shared memory, or 32 of FP8.
inline void run_group(unsigned first) {
  const size_t steps = cta->issued[first].front().size();
  for (size_t s = 0; s < steps; ++s) {
    const Step& any = cta->issued[first].front()[s];
    const int columns = static_cast<int>(any.d.size()) * 2;
    const bool in_registers = any.a[0] != nullptr;
    const int length = any.words ? 16 : 32;
    auto element = [&](const std::array<uint8_t, 32>& bytes, int k, float (*of_byte)(uint8_t)) {
      return any.words ? any.of_element(bytes[2 * k] | bytes[2 * k + 1] << 8) : of_byte(bytes[k]);
    };
    std::vector<float> b(columns * 32);
    for (int n = 0; n < columns; ++n) {
      const auto bytes = row_of_b(any, n);
      for (int k = 0; k < length; ++k) b[n * 32 + k] = element(bytes, k, any.of_b);
    }
    float a[64][32];
    for (int m = 0; !in_registers && m < 64; ++m) {
      const auto bytes = row_of(any.a_shared, m);
      for (int k = 0; k < length; ++k) a[m][k] = element(bytes, k, any.of_a);
    }
    for (unsigned t = 0; t < 128; ++t) {
      const Step& step = cta->issued[first + t].front().at(s);
      const bool alike = step.b == any.b && step.d.size() == any.d.size() && step.a_shared == any.a_shared && step.adds == any.adds;
      if (!alike) fail("threads of a warpgroup that issue different wgmmas");
      if (step.operands != operands_of(step, t == 0)) fail("an operand of a wgmma that changed while it ran");
      for (int r = 0; in_registers && r < 4; ++r) {
        for (int e = 0; e < 2; ++e) {
          a[t / 32 * 16 + t % 32 / 4 + r % 2 * 8][t % 4 * 2 + r / 2 * 8 + e] = any.of_element(*step.a[r] >> 16 * e & 0xffff);
        }
      }
    }
    for (unsigned t = 0; t < 128; ++t) {
      const Step& step = cta->issued[first + t].front()[s];
      for (int i = 0; i < columns / 2; ++i) {
        const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
        float sum = step.adds ? *step.d[i] : 0.f;
        for (int k = 0; k < length; ++k) sum += a[row][k] * b[column * 32 + k];
        *step.d[i] = sum;
      }
    }
  }
  for (unsigned t = 0; t < 128; ++t) cta->issued[first + t].erase(cta->issued[first + t].begin());
}

// ---- matrices of a warp -----------------------------------------------------------------------------------------------------

// Lane 8 · m + r gives the address of row r of 8 x 8 matrix m, 16 bytes; lane t has elements 2 · (t % 4) and the next of row t / 4
// of each, in `values`.
struct Fragment {
  uint32_t address, values[4];
};
inline std::array<Fragment, 32> fragments(const void* row, const std::array<uint32_t, 4>& values) {
  Fragment own{in_shared(row), {}};
  if (own.address % 16 != 0) fail("a row of a matrix that is misaligned");
  std::copy(values.begin(), values.end(), own.values);
  return exchange(own);
}
inline void store_matrices(const void* row, const std::array<uint32_t, 4>& values) {
  const auto all = fragments(row, values);
  const unsigned lane = threadIdx.x % 32;
  cta->unfenced[all[lane].address] = threadIdx.x;
  for (int m = 0; m < 4; ++m) {
    std::memcpy(inductor_ext::shared + all[8 * m + lane / 4].address + lane % 4 * 4, &values[m], 4);
  }
}
inline std::array<uint32_t, 4> load_matrices(const void* row) {
  const auto all = fragments(row, {});
  const unsigned lane = threadIdx.x % 32;
  std::array<uint32_t, 4> values;
  for (int m = 0; m < 4; ++m) {
    std::memcpy(&values[m], inductor_ext::shared + all[8 * m + lane / 4].address + lane % 4 * 4, 4);
  }
  return values;
}

// ---- stores of the copy engine ----------------------------------------------------------------------------------------------

inline void store_later(const uint8_t* from, int bytes, std::function<void()> write) {
  const uint32_t at = in_shared(from);
  const auto written = cta->unfenced.lower_bound(at);
  if (written != cta->unfenced.end() && written->first < at + bytes) fail("a store of what was written without a fence since");
  cta->stores[threadIdx.x].back().push_back({from, {from, from + bytes}, std::move(write)});
}
inline void fence_stores() {
  for (auto each = cta->unfenced.begin(); each != cta->unfenced.end();) {
    each = each->second == threadIdx.x ? cta->unfenced.erase(each) : std::next(each);
  }
}
// All groups of this thread but the last `left`.
inline void finish_stores(size_t left) {
  auto& groups = cta->stores[threadIdx.x];
  while (groups.size() > left + 1) {
    for (const Store& store : groups.front()) {
      if (!std::equal(store.bytes.begin(), store.bytes.end(), store.from)) fail("shared memory that changed while the copy engine read it");
      store.write();
    }
    groups.erase(groups.begin());
  }
  ++cta->progress;
}

}  // namespace hopper_on_cpu

// ---- what CUDA has ----------------------------------------------------------------------------------------------------------

inline void __syncthreads() { hopper_on_cpu::meet(hopper_on_cpu::kAll, hopper_on_cpu::cta->threads); }
inline void __syncwarp() { hopper_on_cpu::meet(hopper_on_cpu::kWarp + hopper_on_cpu::warp(), 32); }
template <typename T> T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = threadIdx.x % 32;
  return hopper_on_cpu::exchange(value)[lane < step ? lane : lane - step];
}
template <typename T> T __shfl_sync(unsigned, T value, int from) { return hopper_on_cpu::exchange(value)[from]; }
inline unsigned __ballot_sync(unsigned, bool value) {
  unsigned result = 0;
  const auto all = hopper_on_cpu::exchange<uint32_t>(value);
  for (int i = 0; i < 32; ++i) result |= all[i] << i;
  return result;
}
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) { return hopper_on_cpu::exchange(value)[threadIdx.x % 32 ^ mask]; }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
template <typename T> T __ldg(const T* p) {
  hopper_on_cpu::check_access(p, sizeof(T), sizeof(T));
  return *p;
}
