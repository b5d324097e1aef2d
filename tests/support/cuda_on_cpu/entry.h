// What the C functions that run a kernel on the CPU share: tensors from Python, and errors for it. Included once, after the
// kernel's source.
#pragma once

#include "../given.h"

namespace {

using namespace inductor_ext;

TensorView view(const Given& given) {
  spans.push_back({static_cast<char*>(given.pointer), static_cast<char*>(given.pointer) + given.bytes});
  return view_of<TensorView>(given);
}
[[maybe_unused]] Optional<TensorView> maybe(const Given* given) { return given ? Optional<TensorView>(view(*given)) : std::nullopt; }

// As `caught`.
template <typename F>
int attempt(char* error, int length, F&& f) {
  spans.clear();
  launches = 0;
  return caught(error, length, f);
}

}  // namespace

// The GPU's multiprocessors, which the choice of a kernel or of a grid asks for.
extern "C" void set_multiprocessors(int count) { multiprocessors = count; }
extern "C" int launches_of_last_call() { return launches; }
