// What the C functions that run a kernel on the CPU share: tensors from Python. Included once, after the kernel's source.
#pragma once

#include "../given.h"

namespace {

using namespace inductor_ext;

TensorView view(const Given& given) {
  spans.push_back({static_cast<char*>(given.pointer), static_cast<char*>(given.pointer) + given.bytes});
  return view_of<TensorView>(given);
}
[[maybe_unused]] Optional<TensorView> maybe(const Given* given) { return given ? Optional<TensorView>(view(*given)) : std::nullopt; }

}  // namespace
