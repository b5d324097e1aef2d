// Stand-in for the vectors: elements as they are in memory, checked to lie inside a tensor and aligned.
#pragma once

#include "cuda_on_cpu.h"

struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
struct __nv_fp8_e4m3 { uint8_t bits; };
struct __nv_fp8_e5m2 { uint8_t bits; };
struct __nv_fp8_e8m0 { uint8_t bits; };

namespace inductor_ext {

inline float to_float(float v) { return v; }
inline float to_float(__nv_bfloat16 v) { return __uint_as_float(uint32_t{v.bits} << 16); }
inline float to_float(__half v) {
  _Float16 value;
  std::memcpy(&value, &v, 2);
  return static_cast<float>(value);
}

template <typename T>
T from_float(float v) {
  if constexpr (std::is_same_v<T, __half>) {
    const _Float16 value = static_cast<_Float16>(v);
    __half result;
    std::memcpy(&result, &value, 2);
    return result;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const uint32_t bits = __float_as_uint(v);
    if (v != v) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest even
  } else {
    return v;
  }
}

// Accesses outside of what a test has named here throw.
struct Span {
  const char *begin, *end;
};
inline std::vector<Span> spans;
inline void check_access(const void* p, size_t bytes, size_t alignment) {
  const char* at = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) throw std::runtime_error("misaligned access");
  for (const Span& span : spans) {
    if (span.begin <= at && at + bytes <= span.end) return;
  }
  throw std::runtime_error("access outside of every tensor");
}

template <typename T, int N>
struct Raw {
  static constexpr int kWords = (sizeof(T) * N + 3) / 4;
  union {
    T values[N];
    uint32_t words[kWords];
  };
  void zero() { std::memset(values, 0, sizeof(values)); }
  void load(const T* p) {
    check_access(p, sizeof(values), std::min<size_t>(sizeof(values), 16));
    std::memcpy(values, p, sizeof(values));
  }
  void unpack(float (&v)[N]) const {
    for (int i = 0; i < N; ++i) v[i] = to_float(values[i]);
  }
  void pack(const float (&v)[N]) {
    for (int i = 0; i < N; ++i) values[i] = from_float<T>(v[i]);
  }
  void multiply(const Raw& other) {
    for (int i = 0; i < N; ++i) values[i] = from_float<T>(to_float(values[i]) * to_float(other.values[i]));
  }
  void add(const Raw& other) {
    for (int i = 0; i < N; ++i) values[i] = from_float<T>(to_float(values[i]) + to_float(other.values[i]));
  }
  void store(T* p) const {
    check_access(p, sizeof(values), std::min<size_t>(sizeof(values), 16));
    std::memcpy(p, values, sizeof(values));
  }
};

struct uint4 {
  uint32_t x, y, z, w;
};
inline void stage_16(uint4* shared, const void* p) {
  check_access(p, 16, 16);
  std::memcpy(shared, p, 16);
}
inline void wait_staged() {}

template <int N>
struct Bytes {
  uint8_t bytes[N];
  void store(void* p) const {
    check_access(p, N, N);
    std::memcpy(p, bytes, N);
  }
};

template <typename T, int N>
void load_half(Raw<T, N>& raw, const T* p) { raw.load(p); }
template <typename T, int N>
void store_half(const Raw<T, N>& raw, T* p) { raw.store(p); }
template <typename T, int N>
void load_apart(Raw<T, N>& raw, const T* p) {
  for (int i = 0; i < N; ++i) {
    check_access(p + i, sizeof(T), sizeof(T));
    raw.values[i] = p[i];
  }
}
template <typename T, int N>
void store_apart(const Raw<T, N>& raw, T* p) {
  for (int i = 0; i < N; ++i) {
    check_access(p + i, sizeof(T), sizeof(T));
    p[i] = raw.values[i];
  }
}
template <int N>
void store_apart(const Bytes<N>& bytes, void* p) {
  check_access(p, N, 1);
  std::memcpy(p, bytes.bytes, N);
}

}  // namespace inductor_ext
