// What C functions for Python share: a tensor from it, `Given` of tests/support/cuda_on_cpu, and an error for it.
#pragma once

#include <cstdint>
#include <cstring>
#include <exception>

struct Given {
  void* pointer;
  int64_t ndim, bytes, sizes[4], strides[4];
};

template <typename View>
View view_of(const Given& given) {
  return {given.pointer, {given.sizes, given.sizes + given.ndim}, {given.strides, given.strides + given.ndim}};
}

// 0, or 1 with `error` filled.
template <typename F>
int caught(char* error, int length, F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& failure) {
    std::strncpy(error, failure.what(), length - 1);
    return 1;
  }
}
