"""Architectures whose time a step can be measured: how transformers makes one of a `ModelShape`, what a step of it reads, and
which products a layer of it has.

    text      input_ids                    a decoder, or an encoder such as BERT
    pixels    pixel_values                 SigLIP: ``positions`` patches of 14 × 14
    sound     input_features               Whisper's encoder: two frames a position
    latents   hidden_states, a step's embedding, cos and sin                             a diffusion transformer (`diffusion`)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from inductor_ext.bench.diffusion import DiffusionTransformer
from inductor_ext.bench.library import import_transformers

PATCH, CHANNELS, MELS = 14, 3, 128


@dataclasses.dataclass(frozen=True)
class Linear:
    """Products [rows · ``times``, K] × [K, N] of a layer, those that share their input merged. ``weights``: how many there are
    of that size, each of which is read once."""

    n: int
    k: int
    times: int = 1
    weights: int = 1


@dataclasses.dataclass(frozen=True)
class Family:
    """``config``: a class of transformers, ``options`` what it is given besides a shape's sizes; "" for a module of our own.

    ``gated``: gate and up are multiplied. ``causal``: tokens see those before them, and a text is embedded as its last one.
    ``rotates``: q and k are rotated. ``names``: what the class calls a size, where that is not what decoders call it.
    """

    config: str
    gated: bool = True
    causal: bool = True
    rotates: bool = True
    sdpa: bool = True  # else transformers computes attention step by step: scores with a soft cap
    reads: Literal["text", "pixels", "sound", "latents"] = "text"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


_SIZES = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
_ENCODER = {"kv_heads": "", "head_dim": ""}  # which has a size of neither
_LONG = {"max_position_embeddings": 40960, "use_cache": False}
_GEMMA = {**_LONG, "query_pre_attn_scalar": 256}

FAMILIES = {
    "qwen3": Family("Qwen3Config", options=_LONG),
    "qwen2": Family("Qwen2Config", options=_LONG),
    "llama": Family("LlamaConfig", options=_LONG),
    "mistral": Family("MistralConfig", options=_LONG),
    "phi3": Family("Phi3Config", options={**_LONG, "pad_token_id": 0}),
    "olmo2": Family("Olmo2Config", options=_LONG),
    "gemma2": Family("Gemma2Config", options=_GEMMA, sdpa=False),
    "gemma3": Family("Gemma3TextConfig", options=_GEMMA),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        options=_LONG,
        names={"intermediate": "moe_intermediate_size", "experts": "num_experts", "top_k": "num_experts_per_tok"},
    ),
    "bert": Family("BertConfig", gated=False, causal=False, rotates=False, names=_ENCODER),
    "modernbert": Family("ModernBertConfig", causal=False, names=_ENCODER, options={"max_position_embeddings": 8192}),
    "siglip": Family(
        "SiglipVisionConfig",
        gated=False,
        causal=False,
        rotates=False,
        reads="pixels",
        options={"patch_size": PATCH, "num_channels": CHANNELS, "vision_use_head": False},
        names={**_ENCODER, "vocab": ""},
    ),
    "whisper": Family(
        "WhisperConfig",
        gated=False,
        causal=False,
        rotates=False,
        reads="sound",
        options={"num_mel_bins": MELS},
        names={
            **_ENCODER,
            "hidden": "d_model",
            "intermediate": "encoder_ffn_dim",
            "layers": "encoder_layers",
            "heads": "encoder_attention_heads",
        },
    ),
    "diffusion": Family("", gated=False, causal=False, reads="latents"),
}


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer of one of `FAMILIES`.

    ``experts``: how many a layer has, each of ``intermediate``, of which a token takes ``top_k``. ``positions``: how many an
    item has, where the model fixes it.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    experts: int = 0
    top_k: int = 0
    positions: int = 0

    @property
    def qk_norm(self) -> bool:
        """Whether every head of q and k has an RMSNorm of its own."""
        return self.family in ("qwen3", "qwen3_moe", "gemma3", "diffusion")

    @property
    def kind(self) -> Family:
        return FAMILIES[self.family]

    def config(self) -> Any:
        """transformers' configuration."""
        names = {**_SIZES, **self.kind.names}
        sizes = {called: getattr(self, name) for name, called in names.items() if called}
        if self.kind.reads == "pixels":
            sizes["image_size"] = PATCH * math.isqrt(self.positions)
        if self.kind.reads == "sound":
            sizes["max_source_positions"] = self.positions
        return getattr(import_transformers(), self.kind.config)(**sizes, **self.kind.options)


def module(shape: ModelShape, attention: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model without a head, with random weights, on the current default device."""
    if not shape.kind.config:
        return DiffusionTransformer(shape.layers, shape.hidden, shape.heads, shape.head_dim, shape.intermediate).to(dtype)
    transformers = import_transformers()
    options = {"attn_implementation": attention if shape.kind.sdpa else "eager", "dtype": dtype}
    if shape.kind.reads == "sound":
        encoder = transformers.models.whisper.modeling_whisper.WhisperEncoder
        made: torch.nn.Module = encoder._from_config(shape.config(), **options)
        return made
    return transformers.AutoModel.from_config(shape.config(), **options)


#: Of what is no text, by its family's ``reads``: the model's arguments for ``items`` of ``length`` positions.
Inputs = Callable[[ModelShape, int, int, torch.Generator], dict[str, torch.Tensor]]


def _pixels(shape: ModelShape, items: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    side = PATCH * math.isqrt(shape.positions)
    return {"pixel_values": torch.randn(items, CHANNELS, side, side, generator=generator)}


def _sound(shape: ModelShape, items: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(items, MELS, 2 * shape.positions, generator=generator)}


def _latents(shape: ModelShape, items: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    angles = torch.randn(length, shape.head_dim // 2, generator=generator) * 9
    cos, sin = (each.repeat_interleave(2, -1) for each in (angles.cos(), angles.sin()))
    made = {"hidden_states": torch.randn(items, length, shape.hidden, generator=generator)}
    return {**made, "temb": torch.randn(items, shape.hidden, generator=generator), "cos": cos, "sin": sin}


INPUTS: Mapping[str, Inputs] = {"pixels": _pixels, "sound": _sound, "latents": _latents}


def inputs(shape: ModelShape, items: int, length: int, device: str, seed: int) -> dict[str, torch.Tensor]:
    """What a step of a family that reads no text is given; bf16, but for the rotation's tables."""
    made = INPUTS[shape.kind.reads](shape, items, length, torch.Generator().manual_seed(seed))
    fp32 = ("cos", "sin")
    return {name: value.to(device, torch.float32 if name in fp32 else torch.bfloat16) for name, value in made.items()}


def linears(shape: ModelShape) -> list[Linear]:
    """The products of a layer."""
    family = shape.kind
    q, kv, hidden, inner = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden, shape.intermediate
    if family.reads == "latents":
        return [Linear(q + 2 * kv + inner, hidden), Linear(hidden, q + inner)]
    attention = [Linear(q + 2 * kv, hidden), Linear(hidden, q)]
    wide = (2 if family.gated else 1) * inner
    if shape.experts:
        experts = [Linear(wide, hidden, shape.top_k, shape.experts), Linear(hidden, inner, shape.top_k, shape.experts)]
        return [*attention, Linear(shape.experts, hidden), *experts]
    return [*attention, Linear(wide, hidden), Linear(hidden, inner)]
