"""Tiny mixtures of experts: Hugging Face's classes, random weights large enough that the experts count."""

from __future__ import annotations

from typing import Any

import pytest
import torch

VOCABULARY = 128


def qwen3_moe(experts: str = "grouped_mm") -> Any:
    transformers = pytest.importorskip("transformers")
    _needs_experts_implementation(transformers)
    config = transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, head_dim=16, norm_topk_prob=True
    )
    return _made(transformers.Qwen3MoeForCausalLM, config, experts)


def mixtral(experts: str = "grouped_mm") -> Any:
    transformers = pytest.importorskip("transformers")
    _needs_experts_implementation(transformers)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return _made(transformers.MixtralForCausalLM, config, experts)


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length))


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _made(kind: Any, config: Any, experts: str) -> Any:
    torch.manual_seed(0)
    model = kind(config).bfloat16().eval().requires_grad_(False)
    model.set_experts_implementation(experts)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            parameter.normal_(0, 0.3)  # with transformers' own 0.02 the experts hardly change what passes by them
    return model


def _needs_experts_implementation(transformers: Any) -> None:
    if not hasattr(transformers.PreTrainedModel, "set_experts_implementation"):
        pytest.skip(f"transformers {transformers.__version__} has no experts_implementation")
