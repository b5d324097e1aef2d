"""What the tests of both activation kernels on the CPU share: PlusAbs of programs.h, and what a function of theirs computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a C function computes of gate, and of up where ``inputs`` is 2; ``exact``: to the last byte."""

    fn: Callable[..., torch.Tensor]
    inputs: int
    dtype: torch.dtype = torch.bfloat16
    pairs: bool = False
    exact: bool = True


def plus_abs(x: torch.Tensor) -> torch.Tensor:
    return x + x.abs()


def in_fp32(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (plus_abs(gate.float()) * up.float()).to(gate.dtype)
