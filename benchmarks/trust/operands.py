"""What a call of `calls.CALLS` is, and what makes its operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

E4, E5, U8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
I32, I64 = torch.int32, torch.int64
Args = tuple[Any, ...]

#: Of ‖found - reference‖ / ‖reference‖, where an op promises no equal bytes. bf16 rounds to 1.7e-3 on average.
PRODUCT, ATTENTION = 5e-3, 8e-3
#: A norm's sum in another order changes some roundings, and a changed rounding of FP8 is 6 % of that element.
ROUNDED = 1e-2


class Maker:
    """Makes operands on ``device``: the same for the same seed."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = device
        self._random = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype = BF16, size: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=self._random) * size).to(dtype).to(self.device)

    def rand(self, *shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
        """From 0.5 to 1.5: weights and scales."""
        return (torch.rand(shape, generator=self._random) + 0.5).to(dtype).to(self.device)

    def column_major(self, n: int, k: int, dtype: torch.dtype = E4) -> torch.Tensor:
        """[K, N], as products take their second operand."""
        return self.randn(n, k, dtype=dtype).t()

    def slots(self, tokens: int, slots: int, dtype: torch.dtype = I64, holes: bool = True) -> torch.Tensor:
        """A row for each token, no two alike; with ``holes`` every seventh is padding and every eleventh past the end."""
        found = torch.randperm(slots, generator=self._random)[:tokens]
        if holes:
            found[::7], found[3::11] = -1, slots + 5
        return found.to(dtype).to(self.device)

    def ends(self, total: int, count: int) -> torch.Tensor:
        """[count] ascending ends, the last one being ``total``; some sequences or groups may be empty."""
        cuts = torch.randint(0, total + 1, (count - 1,), generator=self._random).sort().values
        return torch.cat([cuts, torch.full((1,), total)]).to(I32).to(self.device)

    def cache(self, *shape: int, dtype: torch.dtype = E4) -> torch.Tensor:
        made = torch.randint(1, 120, shape, dtype=U8, generator=self._random).to(self.device)
        return made if dtype is U8 else made.view(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = I64) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self._random).to(dtype).to(self.device)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call. ``limit`` 0: the reference's bytes. ``compared`` False: the reference cannot be asked, or has no one answer."""

    op: str
    what: str
    make: Callable[[Maker], Args]
    limit: float = 0.0
    compared: bool = True

    @property
    def name(self) -> str:
        return f"{self.op}: {self.what}"
