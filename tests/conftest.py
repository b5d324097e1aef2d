"""What every test shares: caches of its own, no settings from the environment, a fresh Dynamo, a fixed seed.

Tests on a GPU do take kernels from ``INDUCTOR_EXT_PREBUILT_DIR``, if that is set (`tests.gpu` sets it). Without it the first
of them builds what all that were selected say they need, in parallel.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

# Before torch is imported: compiled code and reports of earlier runs must not decide what a test sees.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor_ext-tests-")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process a core: threads of several would wait for each other, spinning


#: Files that take a minute or more, the longest first.
LONG = (
    "test_builds.py",
    "test_examples.py",
    "test_perturbed.py",
    "test_model.py",
    "test_blackwell.py",
    "test_fuzz.py",
    "test_expert_parallel.py",
    "test_mxfp8_model.py",
    "test_mxfp8_blackwell.py",
    "test_backend.py",
    "test_tensor_parallel.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="Leave out long files and what is marked slow, nvcc or gpu.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those first: two processes then end together."""
    if config.getoption("--fast"):
        slow = [item for item in items if item.path.name in LONG or any(map(item.get_closest_marker, ("slow", "nvcc", "gpu")))]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


_kernels_of = pytest.StashKey[dict[Any, Any]]()


@pytest.fixture(autouse=True)
def _clean(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import torch

    kept = "INDUCTOR_EXT_PREBUILT_DIR" if request.node.get_closest_marker("gpu") else ""
    for name in list(os.environ):
        if name.startswith("INDUCTOR_EXT_") and name != kept:
            monkeypatch.delenv(name)
    monkeypatch.setattr("inductor_ext.passes.RAISE", True)  # a rule's exception is a failed test
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest, _clean: None) -> None:
    """On a GPU: skip what is for another one, and have the kernels."""
    if not request.node.get_closest_marker("gpu"):
        return
    from inductor_ext import jit, registry
    from tests.support.kernels import build, skip_unless_meant, wanted_by

    arch = jit.current_arch()
    skip_unless_meant(request.node, arch)
    registry.ops()
    if not os.environ.get("INDUCTOR_EXT_PREBUILT_DIR"):
        if _kernels_of not in request.session.stash:
            items = [item for item in request.session.items if item.get_closest_marker("gpu")]
            request.session.stash[_kernels_of] = jit.prepare(spec for item in items for spec in wanted_by(item, arch))
        build(wanted_by(request.node, arch))


@pytest.fixture(scope="session", autouse=True)
def _remove_cache() -> Iterator[None]:
    import shutil

    yield
    shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
