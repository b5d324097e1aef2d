"""The RMSNorms that kernels with a norm built in compute: one weight a column, in three ways (`norms.CPP_NORMS`).

    y = weight * n.to(dtype)           "cast mul": Llama, Mistral, Qwen, Phi
    y = (n * weight).to(dtype)         "mul cast": torch.nn.functional.rms_norm, OLMo 2
    y = (n * (1 + weight)).to(dtype)   "mul+1 cast": Gemma

`norm.trace` reads them, and every other norm.
"""

from __future__ import annotations

import dataclasses

from torch.fx import Node

from inductor_ext.kernels import norms
from inductor_ext.patterns.support import norm as any_norm


@dataclasses.dataclass(frozen=True)
class RmsNorm:
    """``y = norm(total)``; ``inner`` are the nodes between ``total`` and ``y``, both excluded."""

    y: Node
    total: Node
    weight: Node
    eps: float
    norm: str
    inner: tuple[Node, ...]


def trace(y: Node) -> RmsNorm | None:
    """The norm that ends in ``y``; None where there is nothing like one, or it is none of the three."""
    found = any_norm.trace(y)
    return None if found is None else of(found)


def of(found: any_norm.Norm) -> RmsNorm | None:
    """The same of a norm that has been read. 1 + weight in 16 bits is rounded: the weight is what the graph makes of it."""
    operand = found.operands.get("weight")
    if operand is None or found.kind != "rms" or found.wide:
        return None
    weight, steps = operand.node, found.steps
    if "mul+1r" in steps:
        weight, steps = operand.made, steps.replace("mul+1r", "mul")
    if steps not in norms.CPP_NORMS:
        return None
    return RmsNorm(found.y, found.total, weight, found.eps, steps, found.inner)
