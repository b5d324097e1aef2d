"""Hugging Face models by name, from their configs, with random weights and a fixed seed: nothing is downloaded.

The shapes are those of the published models. Two things of theirs do not change the time of a step and are left at the
library's default: the base and the scaling of the rotary embedding.
"""

from __future__ import annotations

import dataclasses
import importlib

import torch

from inductor_ext.bench import families
from inductor_ext.bench.families import ModelShape
from inductor_ext.errors import SettingError

OURS = "inductor_ext"  # the attn_implementation of `inductor_ext.integrations.transformers`

MODELS = {
    "Qwen3-0.6B": ModelShape("qwen3", 28, 1024, 16, 8, 128, 3072, 151936),
    "Qwen3-8B": ModelShape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936),
    "Qwen3-30B-A3B": ModelShape("qwen3_moe", 48, 2048, 32, 4, 128, 768, 151936, 128, 8),
    "Qwen2-1.5B": ModelShape("qwen2", 28, 1536, 12, 2, 128, 8960, 151936),
    "Llama-3.1-8B": ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256),
    "Mistral-7B": ModelShape("mistral", 32, 4096, 32, 8, 128, 14336, 32000),
    "Phi-3-mini": ModelShape("phi3", 32, 3072, 32, 32, 96, 8192, 32064),
    "OLMo-2-1B": ModelShape("olmo2", 16, 2048, 16, 16, 128, 8192, 100352),
    "Gemma-2-2B": ModelShape("gemma2", 26, 2304, 8, 4, 256, 9216, 256000),
    "Gemma-3-1B": ModelShape("gemma3", 26, 1152, 4, 1, 256, 6912, 262144),
    "BERT-base": ModelShape("bert", 12, 768, 12, 12, 64, 3072, 30522),
    "BERT-large": ModelShape("bert", 24, 1024, 16, 16, 64, 4096, 30522),
    "MiniLM-L6": ModelShape("bert", 6, 384, 12, 12, 32, 1536, 30522),
    "ModernBERT-base": ModelShape("modernbert", 22, 768, 12, 12, 64, 1152, 50368),
    "SigLIP-so400m": ModelShape("siglip", 27, 1152, 16, 16, 72, 4304, 0, positions=729),
    "Whisper-large-encoder": ModelShape("whisper", 32, 1280, 20, 20, 64, 5120, 51866, positions=1500),
    "Flux-single": ModelShape("diffusion", 38, 3072, 24, 24, 128, 12288, 0),
    "tiny": ModelShape("qwen3", 2, 256, 4, 2, 64, 512, 512),
}


def named(name: str, layers: int | None = None) -> tuple[str, ModelShape]:
    """The model's own spelling of its name, and its shape, with another number of layers if one is given."""
    for known, shape in MODELS.items():
        if known.lower() == name.lower():
            return known, dataclasses.replace(shape, layers=layers or shape.layers)
    raise SettingError(f"--model: wanted one of {', '.join(MODELS)}, found {name!r}")


def build(shape: ModelShape, device: str, attention: str = "sdpa", dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """The model without a head; the same weights for every process that builds it on the same device."""
    if attention == OURS:
        importlib.import_module("inductor_ext.integrations.transformers")
    torch.manual_seed(0)
    with torch.device(device):
        model = families.module(shape, attention, dtype)
    return model.eval().requires_grad_(False)
