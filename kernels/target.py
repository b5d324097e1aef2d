"""The GPU target that kernels are compiled for and tables are measured on, by device."""

from __future__ import annotations

import torch

from inductor_ext import jit

_known: dict[int | None, str] = {}


def target_of(device: torch.device) -> str:
    """``sm_90a``, …, of a CUDA device; "" for others."""
    if device.type != "cuda":
        return ""
    known = _known.get(device.index)
    if known is None:
        known = jit.arch_of(torch.cuda.get_device_capability(device))
        if torch.cuda.is_initialized():  # not for fake tensors of a GPU that is not there
            _known[device.index] = known
    return known
