"""What is nearly an activation before a quantisation: left alone, with eager's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from tests.support.nearly import check, quantise_rows, square

NEARLY: dict[str, Callable[..., Any]] = {
    "one_row_for_all": lambda gate, up: silu(gate) * up[:1],
    "one_gate_for_all": lambda gate, up: silu(gate[:1]) * up,
    "clamped_with_one_row_for_all": lambda gate, up: (
        (up[:1].clamp(-7.0, 7.0) + 1) * ((g := gate.clamp(max=7.0)) * torch.sigmoid(g * 1.702))
    ),
    "up_of_another_dtype": lambda gate, up: silu(gate.float().sin()) * up,
    "not_rounded": lambda gate, up: silu(gate.float()),
}


@pytest.mark.parametrize("what", list(NEARLY))
def test_what_is_nearly_an_activation(what: str) -> None:
    check("act_quantize", lambda gate, up: quantise_rows(NEARLY[what](gate, up)), square(), square(1), count=0)
