"""A step's kernels by class, told by their names.

GEMM            cuBLAS's nvjet, CUTLASS, Triton's matmul templates, this package's products
attention       cuDNN's and FlashAttention's kernels
memory-bound    Triton's and PyTorch's element-wise and reduction kernels, this package's quantising kernels
memset, memcpy  what the driver does
other           names that no line below knows
gaps            the step's time less the sum of its kernels: what the GPU waits between them. Kernels that start while
                the one before still runs (programmatic dependent launch) make it smaller, below zero even.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

GEMM, ATTENTION, MEMORY, MEMSET, OTHER, GAPS = "GEMM", "attention", "memory-bound", "memset, memcpy", "other", "gaps"
CLASSES = (GEMM, ATTENTION, MEMORY, MEMSET, OTHER)

#: The first that is found in the name decides. Triton's come early: their names hold the names of the operators they fuse.
NAMES: tuple[tuple[str, str], ...] = (
    (r"^(Memset|Memcpy)", MEMSET),
    (r"^triton_tem_.*attention", ATTENTION),
    (r"^triton_(tem|mm|bmm)_", GEMM),
    (r"^triton_", MEMORY),
    (r"(?i)fmha|flash|sdpa|attention", ATTENTION),
    (r"inductor_ext::.*(scaled|grouped)_mm", GEMM),
    (r"(?i)nvjet|gemm|cutlass::device_kernel|cutlass_\d|splitk|gemv", GEMM),
    (r"inductor_ext::", MEMORY),
    (r"at::native::|elementwise|vectorized|reduce_kernel|index|[Nn]orm|softmax|copy|scatter|gather|fill|arange", MEMORY),
)


def class_of(name: str) -> str:
    for pattern, found in NAMES:
        if re.search(pattern, name):
            return found
    return OTHER


@dataclasses.dataclass
class Part:
    launches: int = 0
    us: float = 0.0


def classify(kernels: Iterable[tuple[str, int, float]], step_us: float) -> dict[str, Part]:
    """Launches and µs of each class, and the gaps; empty without kernels."""
    found = {name: Part() for name in CLASSES}
    for name, launches, us in kernels:
        part = found[class_of(name)]
        part.launches += launches
        part.us += us
    if not any(part.launches for part in found.values()):
        return {}
    if not found[OTHER].launches:
        del found[OTHER]
    found[GAPS] = Part(0, step_us - sum(part.us for part in found.values()))
    return found


def to_dict(parts: dict[str, Part]) -> dict[str, Any]:
    return {name: {"launches": part.launches, "us": round(part.us, 1)} for name, part in parts.items()}
