"""What tests of kernels on a GPU do first and last: find the target or skip, build at once, see that no kernel was replaced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from inductor_ext import jit, settings


def arch_or_skip(wanted: str | None = None, what: str = "the kernels") -> str:
    """The GPU's target. Skips without a GPU, or where ``what`` is for ``wanted`` and this is another target."""
    __tracebackhide__ = True  # the test is the place that was skipped
    arch = jit.current_arch()
    if wanted is not None and arch != wanted:
        pytest.skip(f"{what} are for {wanted}, found {arch}")
    if arch is None:
        pytest.skip("no GPU")
    return arch


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
