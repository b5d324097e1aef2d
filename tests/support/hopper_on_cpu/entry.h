// What the C functions that run a kernel on the CPU share. Included once, after the kernel's source.
#pragma once

#include "../given.h"

namespace inductor_ext {
__attribute__((aligned(1024))) uint8_t shared[kSharedBytes];
}

namespace {

using namespace inductor_ext;

TensorView view(const Given& given) {
  const uint8_t* begin = static_cast<uint8_t*>(given.pointer);
  hopper_on_cpu::spans.push_back({begin, begin + given.bytes});
  return view_of<TensorView>(given);
}
Optional<TensorView> optional(const Given* given) { return given == nullptr ? Optional<TensorView>() : view(*given); }

// As `caught`.
template <typename F>
int attempt(int sms, unsigned seed, char* error, int length, F&& f) {
  multiprocessors = sms, hopper_on_cpu::seed = seed;
  hopper_on_cpu::spans.clear();
  return caught(error, length, f);
}

}  // namespace
