"""Whether a rewrite may be chosen by itself: on a GPU only where its kernel has run and been compared, or been measured."""

from __future__ import annotations

import torch
from torch.fx import Node

from inductor_ext.rule import Context, Refusal

NOT_RUN = "the kernel has not been run on this GPU yet"
NOT_MEASURED = "the rewrite has not been measured on this GPU yet"


def refusal(
    node: Node, context: Context, device: torch.device, has_run: frozenset[str], reason: str = NOT_RUN
) -> Refusal | None:
    """Why what ran, or was measured, on the targets ``has_run`` is not done on ``device``; None where the rule is forced."""
    if device.type != "cuda" or context.forced:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    target = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
    if target in has_run:
        return None
    wanted = f"one of {', '.join(sorted(has_run))}" if has_run else f'rules={{"{context.rule}": "always"}}'
    return context.refuse(node, reason, wanted=wanted, found=target)
