// A tensor from Python: `Given` of tests/support/cuda_on_cpu.
#pragma once

#include <cstdint>

struct Given {
  void* pointer;
  int64_t ndim, bytes, sizes[4], strides[4];
};

template <typename View>
View view_of(const Given& given) {
  return {given.pointer, {given.sizes, given.sizes + given.ndim}, {given.strides, given.strides + given.ndim}};
}
