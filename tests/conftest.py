"""What every test shares: caches of its own, no settings from the environment, a fresh Dynamo, a fixed seed.

Tests on a GPU do take kernels from ``INDUCTOR_EXT_PREBUILT_DIR``, if that is set: building them takes longer than the tests.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

# Before torch is imported: compiled code and reports of earlier runs must not decide what a test sees.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor_ext-tests-")


#: Files that take minutes, most of them nvcc's.
LONG = ("test_builds.py", "test_mxfp8_blackwell.py", "test_blackwell.py", "test_expert_parallel.py", "test_tensor_parallel.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those first: two processes then end together."""
    items.sort(key=lambda item: item.path.name not in LONG)


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


@pytest.fixture(scope="session", autouse=True)
def _remove_cache() -> Iterator[None]:
    import shutil

    yield
    shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
