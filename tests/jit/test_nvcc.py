"""The real nvcc, once for Hopper and once for Blackwell: no GPU is needed to compile, load and call host code."""

from __future__ import annotations

import pytest

from inductor_ext.errors import ToolchainError
from inductor_ext.jit import KernelCache, find_toolchain, forget, headers, prepare, try_load

KERNEL = """
#pragma once
#include <tvm/ffi/container/tensor.h>
#include "common.h"
#ifdef __CUDA_ARCH__
#include "device_only.h"
#endif
namespace tiny {
__global__ void fill(int* out, int value) { out[threadIdx.x] = value; }
template <int N, int M> struct Tiny {
  static void run(tvm::ffi::TensorView out) { fill<<<1, 32>>>(static_cast<int*>(out.data_ptr()), N); }
  static int answer(int x) { return x + N * M; }
};
}  // namespace tiny
"""


@pytest.mark.nvcc
def test_real_nvcc_for_hopper_and_blackwell(lab):
    settings = lab.settings.replace(nvcc="")
    try:
        toolchain = find_toolchain(settings)
    except ToolchainError as error:
        pytest.skip(str(error))
    (lab.kernels / "answer/tiny.cuh").write_text(KERNEL)
    (lab.kernels / "include/common.h").write_text("// host and device\n")
    (lab.kernels / "include/device_only.h").write_text("// device\n")
    exports = (("run", "tiny::Tiny<2, 3>::run"), ("answer", "tiny::Tiny<2, 3>::answer"))
    specs = [lab.spec(source="answer/tiny.cuh", exports=exports, arch=arch) for arch in ("sm_90a", "sm_100a")]
    modules = prepare(specs, settings)
    for spec in specs:
        assert not isinstance(modules[spec], Exception), modules[spec]
        assert modules[spec]["answer"](1) == 7
    for entry in KernelCache(lab.cache).entries():
        ours = {"kernels:answer/tiny.cuh", "kernels:include/common.h", "kernels:include/device_only.h"}
        assert set(entry.record.headers) == ours  # the toolkit, libstdc++ and tvm-ffi are covered by versions
        assert entry.record.packages[headers.TVM_FFI] == headers.package_version(headers.TVM_FFI)
        assert entry.record.nvcc == toolchain.nvcc_version
    (lab.kernels / "include/device_only.h").write_text("// edited\n")
    forget()
    assert try_load(specs[0], settings) is None
