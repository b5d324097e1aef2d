"""Hugging Face models by name, from their configs, with random weights and a fixed seed: nothing is downloaded.

The shapes are those of the published models. Two things of theirs do not change the time of a step and are left at the
library's default: the base and the scaling of the rotary embedding.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch

from inductor_ext.demo import quiet
from inductor_ext.errors import InductorExtError, SettingError

OURS = "inductor_ext"  # the attn_implementation of `inductor_ext.integrations.transformers`
EXTRA = "pip install 'inductor-ext[bench]'"


class BenchError(InductorExtError):
    """The benchmark cannot run here, or a side of it failed."""


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer. ``qk_norm``: an RMSNorm of every head of q and k (Qwen3)."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    def config(self) -> Any:
        transformers = import_transformers()
        kind = {"qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}[self.family]
        return kind(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=40960,
            use_cache=False,
        )


MODELS = {
    "Qwen3-0.6B": ModelShape("qwen3", 28, 1024, 16, 8, 128, 3072, 151936),
    "Qwen3-8B": ModelShape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936),
    "Llama-3.1-8B": ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256),
    "tiny": ModelShape("qwen3", 2, 256, 4, 2, 64, 512, 512),
}


def named(name: str, layers: int | None = None) -> tuple[str, ModelShape]:
    """The model's own spelling of its name, and its shape, with another number of layers if one is given."""
    for known, shape in MODELS.items():
        if known.lower() == name.lower():
            return known, dataclasses.replace(shape, layers=layers or shape.layers)
    raise SettingError(f"--model: wanted one of {', '.join(MODELS)}, found {name!r}")


def import_transformers() -> Any:
    with quiet("torchao", "torch.utils._pytree"):
        try:
            import transformers
        except ImportError as error:
            raise BenchError(f"this needs transformers ({error}); {EXTRA}") from error
    return transformers


def build(shape: ModelShape, device: str, attention: str = "sdpa", dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """The model without a head; the same weights for every process that builds it on the same device."""
    transformers = import_transformers()
    if attention == OURS:
        importlib.import_module("inductor_ext.integrations.transformers")
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModel.from_config(shape.config(), attn_implementation=attention, dtype=dtype)
    return model.eval().requires_grad_(False)
