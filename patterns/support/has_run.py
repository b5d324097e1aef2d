"""Whether a kernel may be chosen by itself: on a GPU only where it has run before and was compared with the reference there."""

from __future__ import annotations

import torch
from torch.fx import Node

from inductor_ext.rule import Context, Refusal


def refusal(node: Node, context: Context, device: torch.device, has_run: frozenset[str]) -> Refusal | None:
    """Why a kernel that ran on the targets ``has_run`` is not taken on ``device``, if so; None where the rule is forced."""
    if device.type != "cuda" or context.forced:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    target = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
    if target in has_run:
        return None
    wanted = f"one of {', '.join(sorted(has_run))}" if has_run else f'rules={{"{context.rule}": "always"}}'
    return context.refuse(node, "the kernel has not been run on this GPU yet", wanted=wanted, found=target)
