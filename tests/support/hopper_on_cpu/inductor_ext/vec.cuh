// Stand-in for the vectors: elements as they are in memory, read from inside a tensor and aligned.
#pragma once

#include "hopper.cuh"

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }

namespace inductor_ext {

template <typename T, int N>
struct Raw {
  static constexpr int kBytes = sizeof(T) * N;
  static constexpr int kWords = (kBytes + 3) / 4;
  uint32_t words[kWords];

  void load(const T* p) {
    hopper_on_cpu::check_access(p, kBytes, std::min(kBytes, 16));
    std::memcpy(words, p, kBytes);
  }
  void pack(const float (&v)[N]) {
    for (int i = 0; i < N; ++i) set(i, v[i]);
  }
  void unpack(float (&v)[N]) const {
    for (int i = 0; i < N; ++i) v[i] = get(i);
  }
  void multiply(const Raw& other) {
    for (int i = 0; i < N; ++i) set(i, get(i) * other.get(i));
  }
  void add(const Raw& other) {  // by way of fp32, as eager adds
    for (int i = 0; i < N; ++i) set(i, get(i) + other.get(i));
  }
  static uint32_t pair(float low, float high) { return inductor_ext::pack(static_cast<T*>(nullptr), low, high); }

 private:
  float get(int i) const {
    T value;
    std::memcpy(&value, reinterpret_cast<const uint8_t*>(words) + i * sizeof(T), sizeof(T));
    return widen(value);
  }
  void set(int i, float v) {
    const T value = narrow<T>(v);
    std::memcpy(reinterpret_cast<uint8_t*>(words) + i * sizeof(T), &value, sizeof(T));
  }
};

}  // namespace inductor_ext
