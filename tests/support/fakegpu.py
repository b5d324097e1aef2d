"""Run Inductor for CUDA on a machine without a GPU, as far as the source of the generated wrapper.

    with fake_gpu() as gpu:
        source = gpu.source(fn, make_inputs, backend=inductor_ext.backend(build="defer"))

Inputs are fake CUDA tensors, so nothing is computed; everything up to code generation is the real thing: Dynamo, AOTAutograd,
our rules, Inductor's scheduling, its memory planning and its wrapper. A CPU-only torch has no CUDA device guard, which even
indexing a fake CUDA tensor needs: two lines of C++ (``guard.cpp``) register one that does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch._inductor.config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

GUARD = Path(__file__).with_name("guard.cpp")

H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    total_memory=150_754_820_096,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_multiprocessor=233_472,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    L2_cache_size=62_914_560,
    clock_rate=1_980_000,
    memory_clock_rate=3_201_000,
    memory_bus_width=6144,
    gcnArchName="",
)


class _SourceReady(Exception):
    """Raised in place of running the generated code."""


@functools.cache
def load_guard() -> None:
    """Compile and load the device guard that a CPU-only torch lacks; skips the test when that is not possible."""
    if torch.version.cuda is not None:
        return
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: fake CUDA tensors on a CPU-only torch need a two-line device guard")
    root = Path(torch.__file__).parent
    library = Path(tempfile.mkdtemp(prefix="inductor_ext-guard-")) / "guard.so"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    flags = ["-shared", "-fPIC", "-O0", "-std=c++20", abi, "-isystem", str(root / "include")]
    subprocess.run([compiler, *flags, str(GUARD), "-o", str(library), f"-L{root / 'lib'}", "-lc10"], check=True)
    torch.ops.load_library(str(library))


def _patches(capability: tuple[int, int]) -> list[tuple[Any, str, Any]]:
    """What asks the driver on the way to the source, and an H200's answers."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import compile_fx

    properties = SimpleNamespace(**{**vars(H200), "major": capability[0], "minor": capability[1]})
    major, minor = capability

    class Worker(CudaInterface.Worker):
        @staticmethod
        def get_device_properties(device: Any = None) -> Any:
            return properties

        @staticmethod
        def current_device() -> int:
            return 0

    return [
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "get_device_capability", lambda device=None: capability),
        (torch.cuda, "current_device", lambda: 0),
        (CudaInterface, "Worker", Worker),
        (CudaInterface, "get_device_properties", staticmethod(lambda device=None: properties)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda device=None: major * 10 + minor)),
        (CudaInterface, "current_device", staticmethod(lambda: 0)),
        (CudaInterface, "device", staticmethod(lambda device: contextlib.nullcontext())),
        (compile_fx, "_check_triton_bf16_support", lambda graph: None),
        (importlib.import_module("torch._inductor.scheduler"), "has_triton", lambda *args, **kwargs: True),
        (importlib.import_module("torch.utils._triton"), "triton_hash_with_backend", lambda *args, **kwargs: "none"),
        (importlib.import_module("inductor_ext.backend"), "OVERLAP", False),  # no compile comes to its end
    ]


class FakeGpu:
    """What `fake_gpu` yields."""

    def __init__(self) -> None:
        self._source = ""

    def source(
        self,
        fn: Callable[..., Any],
        make_inputs: Callable[[], tuple[Any, ...]],
        *,
        backend: Any = "inductor",
        dynamic: bool | None = False,
        **config: Any,
    ) -> str:
        """The wrapper Inductor writes for ``fn``, from ``def call`` on. ``make_inputs`` is called under a FakeTensorMode."""
        torch._dynamo.reset()
        self._source = ""
        config = {"fx_graph_cache": False, "compile_threads": 1, "joint_graph_constant_folding": False, **config}
        with FakeTensorMode(shape_env=ShapeEnv()), torch._inductor.config.patch(**config):
            inputs = make_inputs()
            try:
                torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
            except Exception:
                if not self._source:
                    raise
        return self._source[self._source.find("def call(") :]

    def _keep_source(self, lowering: Any, *args: Any, **kwargs: Any) -> Any:
        wrapper, _ = lowering.codegen()
        self._source = getattr(wrapper, "value", wrapper)
        raise _SourceReady


@contextlib.contextmanager
def fake_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[FakeGpu]:
    """A context in which fake CUDA tensors can be compiled, for a GPU of ``capability``."""
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime import hints

    load_guard()
    gpu = FakeGpu()
    keep = lambda lowering, *args, **kwargs: gpu._keep_source(lowering)  # noqa: E731 (bound as a method)
    with contextlib.ExitStack() as stack:
        for owner, name, value in [*_patches(capability), (GraphLowering, "compile_to_module", keep)]:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        forget = getattr(hints.DeviceProperties.create, "cache_clear", lambda: None)
        forget()
        try:
            yield gpu
        finally:
            forget()


@contextlib.contextmanager
def fake_cuda_inputs() -> Iterator[None]:
    """Only fake CUDA tensors and an H200's capability: enough for the rules, which never reach code generation."""
    load_guard()
    with (
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        # Folding would run the constants of a graph on the device.
        torch._inductor.config.patch(joint_graph_constant_folding=False),
    ):
        yield
