"""Whether a rewrite may be chosen by itself: on a GPU only where its kernel has run and been compared, or been measured."""

from __future__ import annotations

import torch
from torch.fx import Node

from inductor_ext.miss import Miss
from inductor_ext.rule import Context

NOT_RUN = "the kernel has not been run on this GPU yet"
NOT_MEASURED = "the rewrite has not been measured on this GPU yet"


def check(node: Node, context: Context, device: torch.device, has_run: frozenset[str], reason: str = NOT_RUN) -> None:
    """Miss where what ran, or was measured, on the targets ``has_run`` is to be done on another ``device``, unless forced."""
    if device.type != "cuda" or context.forced:
        return
    major, minor = torch.cuda.get_device_capability(device)
    target = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
    if target in has_run:
        return
    wanted = f"one of {', '.join(sorted(has_run))}" if has_run else f'rules={{"{context.rule}": "always"}}'
    raise Miss(reason, node, wanted, target)
