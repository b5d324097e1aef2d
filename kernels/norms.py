"""What a norm does, as text: the language of the matcher, the references and the kernels.

    h = total.float();  n = h * rsqrt(mean(h²) + eps)                              "rms"
    m = mean(h);        n = (h - m) * rsqrt(mean((h - m)²) + eps)                  "layer", over the last dimension both

and then, in fp32, one step a token:

    cast          rounds to x's dtype; after the last step that is done in any case
    mul           times weight
    mul+1         times 1 + weight, added in fp32
    mul+1r        times 1 + weight, rounded to the weight's dtype
    add           plus bias
    factor  factor+1  factor+1r   times a sample's own factor, likewise
    shift         plus a sample's own shift

A bf16 product of bf16 values is the fp32 product, rounded: "cast mul" is ``weight * n.to(bf16)`` (Llama, Mistral, Qwen, Phi),
"mul cast" ``(n * weight).to(bf16)`` (torch.nn.functional.rms_norm, OLMo 2), "mul+1 cast" Gemma's, "mul add cast" LayerNorm's,
"cast factor+1r cast shift" what diffusion transformers make of ``norm(x) * (1 + scale) + shift``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from inductor_ext.kernels import steps

KINDS = ("rms", "layer")

#: What each step reads, and its C++ type in include/inductor_ext/norm.cuh.
_STEPS: dict[str, tuple[str, str]] = {
    "cast": ("", "NormCast"),
    "mul": ("weight", "Times<inductor_ext::kWeight>"),
    "mul+1": ("weight", "Times<inductor_ext::kWeight, inductor_ext::OnePlus>"),
    "mul+1r": ("weight", "Times<inductor_ext::kWeight, inductor_ext::OnePlusRounded>"),
    "add": ("bias", "Plus<inductor_ext::kBias>"),
    "factor": ("factor", "Times<inductor_ext::kFactor>"),
    "factor+1": ("factor", "Times<inductor_ext::kFactor, inductor_ext::OnePlus>"),
    "factor+1r": ("factor", "Times<inductor_ext::kFactor, inductor_ext::OnePlusRounded>"),
    "shift": ("shift", "Plus<inductor_ext::kShift>"),
}
OPERANDS = ("weight", "bias", "factor", "shift")
#: Programs with a C++ type of their own, which the rotations share.
CPP_NORMS = {"cast mul": "CastThenWeight", "mul cast": "WeightThenCast", "mul+1 cast": "OnePlusWeightThenCast"}


@functools.cache
def operands_of(program: str) -> tuple[str, ...]:
    """The operands that a program's steps read, in their order. ValueError for a token that is none."""
    unknown = [token for token in program.split() if token not in _STEPS]
    if unknown:
        raise ValueError(f"wanted {', '.join(_STEPS)}, found {unknown[0]!r} (in {program!r})")
    return tuple(operand for token in program.split() if (operand := _STEPS[token][0]))


def normalise(
    total: torch.Tensor, eps: float, kind: str, program: str, operands: Mapping[str, torch.Tensor | None], dtype: torch.dtype
) -> torch.Tensor:
    """The norm in PyTorch's operators, in ``dtype``. Factor and shift have a row for as many consecutive rows of total each."""
    value = total.float()
    if kind == "layer":
        value = value - value.mean(-1, keepdim=True)
    value = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps)
    for token in program.split():
        operand, _ = _STEPS[token]
        if not operand:
            value = value.to(dtype).float()
            continue
        other = operands[operand]
        assert other is not None
        made = 1.0 + other.float() if "+1" in token else other.float()
        if token.endswith("+1r"):
            made = made.to(other.dtype).float()
        if operand in ("factor", "shift"):
            made = _a_row_each(made, total)
        value = value + made if operand in ("bias", "shift") else value * made
    return value.to(dtype)


def _a_row_each(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``rows``, each repeated for the consecutive rows of ``like`` that are its sample's."""
    columns = like.shape[-1]
    rows = rows.reshape(-1, columns)
    every = like.numel() // columns if columns else 0
    return rows.repeat_interleave(every // max(rows.shape[0], 1), 0).reshape(like.shape)


def to_cpp(program: str) -> str:
    """The C++ type of a program."""
    if program in CPP_NORMS:
        return f"inductor_ext::{CPP_NORMS[program]}"
    tokens = program.split()
    while tokens and tokens[-1] == "cast":  # what the kernel does at the end in any case
        tokens.pop()
    return f"inductor_ext::NormSteps<{', '.join('inductor_ext::' + _STEPS[token][1] for token in tokens)}>"


def row_type(
    x: torch.dtype, summed: str, kind: str, program: str, weight: torch.dtype | None, factor: torch.dtype | None, keep: bool
) -> str:
    """The C++ type of a row; ``summed`` is None, Rounded or Wide, as norm_quantize.cuh names the sum of x and residual."""
    types = [steps.CPP_TYPES[x], steps.CPP_TYPES[weight or x], steps.CPP_TYPES[factor or x]]
    flags = [f"inductor_ext::Sum::k{summed}", str(kind == "layer").lower(), to_cpp(program), str(keep).lower()]
    return f"inductor_ext::NormRow<{', '.join(types + flags)}>"
