"""Eight-bit work that no rule reads is named, and what only looks like it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import inductor_ext
from tests.support.nearly import BF16, E4, E5, square

E4Z = torch.float8_e4m3fnuz


def reasons(fn: Callable[..., Any], *inputs: Any) -> list[str]:
    torch._dynamo.reset()
    return [each.reason for each in inductor_ext.explain(fn, *inputs).refusals if each.rule == "fp8_downcast"]


def scaled(x: Any) -> Any:
    return (x.float() / 0.5).clamp(-448.0, 448.0)


NAMED: dict[str, tuple[Callable[..., Any], str]] = {
    "fnuz": (lambda x, w: scaled(x).to(E4Z), "another format than NVIDIA's FP8"),
    "int8": (lambda x, w: (x / 0.1).round().clamp(-128, 127).to(torch.int8), "quantised to int8"),
    "int8_in_fp32": (lambda x, w: (x.float() / 0.1).clamp(-128, 127).round().to(torch.int8), "quantised to int8"),
    "simulated": (lambda x, w: (scaled(x).to(E4).to(BF16) * 0.5) @ w, "FP8 is only simulated here"),
}


@pytest.mark.parametrize("name", list(NAMED))
def test_what_no_rule_reads_is_named(name: str) -> None:
    fn, reason = NAMED[name]
    assert reason in reasons(fn, square(), square(1))


@pytest.mark.parametrize("dtype", [E4, E5, torch.int8], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_that_is_only_stored_in_eight_bits(dtype: torch.dtype, bias: bool) -> None:
    def linear(x: Any, w: Any, s: Any) -> Any:
        return torch.nn.functional.linear(x, w.to(BF16) * s, x[0] if bias else None)

    given = square(), (square(1) * 9).to(dtype), torch.full((32, 1), 0.1, dtype=BF16)
    assert "eight bits are only storage here" in reasons(linear, *given)


NOT_NAMED: dict[str, Callable[..., Any]] = {
    "integers": lambda x, w: x.float().to(torch.int8),
    "bools": lambda x, w: (x > 0).to(torch.int8),
    "read_back_and_summed": lambda x, w: scaled(x).to(E4).float().sum(),
    "product_of_another": lambda x, w: (scaled(x).to(E4).float().sum(), x @ w),
}


@pytest.mark.parametrize("name", list(NOT_NAMED))
def test_what_is_no_such_work_is_not_named(name: str) -> None:
    words = "int8", "storage", "simulated", "format"
    assert not any(word in reason for reason in reasons(NOT_NAMED[name], square(), square(1)) for word in words)
