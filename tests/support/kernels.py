"""What tests on a GPU share: which kernels they say they need, one parallel build of them, and that no kernel was replaced.

    def kernels(arch): return [OP.spec_of_key(key, arch) for key in KEYS]      # kernels(arch, dtype): by a parameter

    @pytest.mark.gpu(kernels=kernels)                                          # arch="sm_90a": only for that target
    def test_…

nvcc takes from five seconds to a minute for each, so what is not said here is built in the middle of a test, one at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from inductor_ext import jit, registry, settings
from inductor_ext.graph import value_of
from inductor_ext.report.explain import compiled_with, passes_only
from tests.support.fakegpu import fake_cuda_inputs

_said: dict[Any, list[jit.JitSpec]] = {}


def wanted_by(item: pytest.Item, arch: str) -> list[jit.JitSpec]:
    """The kernels that the test's `gpu` mark names for ``arch``."""
    registry.ops()
    mark = item.get_closest_marker("gpu")
    make: Callable[..., Iterable[jit.JitSpec]] | None = mark.kwargs.get("kernels") if mark else None
    if mark is None or make is None or mark.kwargs.get("arch", arch) != arch:
        return []
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    taken = {name: parameters[name] for name in inspect.signature(make).parameters if name != "arch"}
    key = make, arch, *map(id, taken.values())
    if key not in _said:
        _said[key] = list(dict.fromkeys(make(arch, **taken)))
    return _said[key]


def called_in(graph: torch.fx.Graph, arch: str) -> list[jit.JitSpec]:
    """The kernels that the calls in a graph need."""
    ops = {op.overload: op for op in registry.ops()}
    found: dict[jit.JitSpec, None] = {}
    for node in graph.nodes:
        if node.target in ops:
            args, keywords = torch.fx.map_arg((node.args, node.kwargs), value_of)
            names = [argument.name for argument in node.target._schema.arguments]
            given = (*args, *(keywords.get(name) for name in names[len(args) :]))
            found.update(dict.fromkeys(ops[node.target].specs(given, arch)))
    return list(found)


def called_by(
    fn: Callable[..., Any], make_inputs: Callable[[], tuple[Any, ...]], arch: str, dynamic: bool | None = None, **chosen: Any
) -> list[jit.JitSpec]:
    """The kernels that the compiled function calls, or would call if a later rule had not taken its op."""
    found: dict[jit.JitSpec, None] = {}

    def observe(_rule: str, graph: torch.fx.Graph) -> None:
        found.update(dict.fromkeys(called_in(graph, arch)))

    torch._dynamo.reset()
    options = settings.current(**{**chosen, "build": "defer", "arch": arch})
    with (
        fake_cuda_inputs(),
        FakeTensorMode(shape_env=ShapeEnv()),
        compiled_with(options, fn, None, inner_compile=passes_only, observer=observe, dynamic=dynamic) as run,
    ):
        run(*make_inputs())
    return list(found)


def skip_unless_meant(item: pytest.Item, arch: str | None) -> None:
    """Skip a test on a GPU where there is none, or another than it is for."""
    mark = item.get_closest_marker("gpu")
    meant = mark.kwargs.get("arch", arch) if mark else arch
    if arch is None:
        pytest.skip("needs a CUDA GPU")
    if meant != arch:
        pytest.skip(f"is for {meant}, found {arch}")


def build(specs: Iterable[jit.JitSpec], options: settings.Settings | None = None) -> dict[jit.JitSpec, Any]:
    """The kernels, each made once and in parallel. Raises the first failure: PyTorch's operators would be tested instead."""
    modules = jit.prepare(specs, options)
    for module in modules.values():
        if isinstance(module, Exception):
            raise module
    return modules


def assert_kernels_ran(caplog: pytest.LogCaptureFixture) -> None:
    """No op warned that PyTorch's own operators run in its kernel's place, in any phase: ``caplog.text`` has the last."""
    said = [record.getMessage() for phase in ("setup", "call", "teardown") for record in caplog.get_records(phase)]
    replaced = [message for message in said if "running PyTorch's own operators instead" in message]
    assert not replaced, f"the kernel did not run: {replaced[0]}"
