"""From a ``JitSpec`` to a loaded tvm-ffi module: prebuilt directory, cache, or nvcc. Importing it does no work."""

from inductor_ext.jit.cache import Entry, KernelCache
from inductor_ext.jit.headers import include_dirs, kernels_root
from inductor_ext.jit.loader import forget, load, try_load
from inductor_ext.jit.parallel import build_jobs, prebuild, prepare
from inductor_ext.jit.progress import BuildEvent
from inductor_ext.jit.spec import JitSpec
from inductor_ext.jit.toolchain import Check, Toolchain, current_arch, diagnose, find_toolchain, write_clangd

__all__ = [
    "BuildEvent",
    "Check",
    "Entry",
    "JitSpec",
    "KernelCache",
    "Toolchain",
    "build_jobs",
    "current_arch",
    "diagnose",
    "find_toolchain",
    "forget",
    "include_dirs",
    "kernels_root",
    "load",
    "prebuild",
    "prepare",
    "try_load",
    "write_clangd",
]
