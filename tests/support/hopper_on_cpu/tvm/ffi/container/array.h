// Stand-in for tvm-ffi's arrays.
#pragma once

#include <vector>

namespace tvm::ffi {
template <typename T>
using Array = std::vector<T>;
}
