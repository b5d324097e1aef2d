"""Inductor's own autotuner, and our kernels in it.

Under ``max_autotune`` Inductor measures every way it knows to compute a matrix product and takes the fastest. What replaces
such a product by a table's word then stands aside (`active`).
"""

from __future__ import annotations

import torch


def active() -> bool:
    """Whether Inductor will autotune the matrix products of the graph that is being compiled.

    To be asked while Inductor's config is that of the compile: in a pass, a rule's guard, a lowering.
    """
    config = torch._inductor.config
    return bool(config.max_autotune or config.max_autotune_gemm)
