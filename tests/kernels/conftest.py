"""On a GPU no test of a kernel passes with PyTorch's own operators in the kernel's place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.kernels import assert_kernels_ran


@pytest.fixture(autouse=True)
def _kernels_and_not_fallbacks(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    if request.node.get_closest_marker("gpu"):
        assert_kernels_ran(caplog)
