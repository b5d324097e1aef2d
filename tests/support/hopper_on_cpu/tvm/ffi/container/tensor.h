// Stand-in: a tensor that is kept is a view, too.
#pragma once

#include "inductor_ext/tensor.h"

namespace tvm::ffi {
using Tensor = inductor_ext::TensorView;
}
