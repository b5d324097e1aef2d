"""From a ``JitSpec`` to a loaded tvm-ffi module: prebuilt directory, wheel, cache or nvcc. Importing it does no work."""

from inductor_ext.jit.cache import Entry, KernelCache
from inductor_ext.jit.clangd import write_clangd
from inductor_ext.jit.doctor import Check, diagnose
from inductor_ext.jit.headers import include_dirs, kernels_root
from inductor_ext.jit.loader import forget, load, try_load
from inductor_ext.jit.parallel import Started, build_jobs, prebuild, prepare, start
from inductor_ext.jit.progress import BuildEvent
from inductor_ext.jit.shipped import pack
from inductor_ext.jit.spec import JitSpec
from inductor_ext.jit.toolchain import Toolchain, arch_of, current_arch, find_toolchain

__all__ = [
    "BuildEvent",
    "Check",
    "Entry",
    "JitSpec",
    "KernelCache",
    "Started",
    "Toolchain",
    "arch_of",
    "build_jobs",
    "current_arch",
    "diagnose",
    "find_toolchain",
    "forget",
    "include_dirs",
    "kernels_root",
    "load",
    "pack",
    "prebuild",
    "prepare",
    "start",
    "try_load",
    "write_clangd",
]
