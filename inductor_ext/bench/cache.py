"""A KV cache as servers keep it, for a step that decodes one token of every sequence: FP8 rows in one pool a layer.

    keys, values    [B · L, Hkv, D] e4m3, full but for each sequence's last row; scale fp32, one a pool
    a step          stores its K and V at the last row of each sequence, and attends to all L rows of it

Every step writes the same rows, so that one CUDA graph can be replayed: what is in the cache does not change its time.
"""

from __future__ import annotations

from typing import Any

import torch

from inductor_ext.bench.families import ModelShape
from inductor_ext.bench.library import import_transformers
from inductor_ext.demo import E4M3

SCALE = 1 / 64  # of K and V of random models, which reach 5 or so: in the middle of e4m3's range


def decode_cache(shape: ModelShape, items: int, context: int, device: str) -> Any:
    """A transformers ``Cache`` of ``shape.layers`` pools with random rows, the same for every process."""
    cache_utils = import_transformers().cache_utils

    class Pool(cache_utils.CacheLayerMixin):  # type: ignore[misc, name-defined]
        is_compileable = False  # its mask would be a tensor; one query sees every key
        is_sliding = False

        def __init__(self, generator: torch.Generator) -> None:
            super().__init__()
            sizes = (items * context, shape.kv_heads, shape.head_dim)
            self.keys, self.values = (_random(sizes, generator) for _ in range(2))
            self.scale = torch.tensor(SCALE, device=device)
            self.slots = torch.arange(1, items + 1, device=device) * context - 1
            self.is_initialized = True

        def lazy_initialization(self, *args: Any) -> None:
            pass

        def update(self, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            self.keys[self.slots] = self._stored(k)
            self.values[self.slots] = self._stored(v)
            return self._read(self.keys, k.dtype), self._read(self.values, v.dtype)

        def _stored(self, x: torch.Tensor) -> torch.Tensor:
            return (x.transpose(1, 2).flatten(0, 1).float() / self.scale).clamp(-448.0, 448.0).to(E4M3)

        def _read(self, pool: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            rows = pool.view(items, context, shape.kv_heads, shape.head_dim)
            return (rows.to(dtype) * self.scale.to(dtype)).transpose(1, 2)

        def get_seq_length(self) -> int:
            return context - 1

        def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
            return context, 0

        def get_max_length(self) -> int:
            return context

        get_max_cache_shape = get_max_length  # its name before transformers 5.20

    generator = torch.Generator(device).manual_seed(0)
    return cache_utils.Cache(layers=[Pool(generator) for _ in range(shape.layers)])


def _random(sizes: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normally distributed numbers over `SCALE`, in e4m3; a part at a time, since fp32 takes four times the memory."""
    found = torch.empty(sizes, dtype=E4M3, device=generator.device)
    for part in found.split(1 << 16):
        made = torch.randn(part.shape, generator=generator, device=generator.device)
        part.copy_((made / SCALE).clamp(-448.0, 448.0).to(E4M3))
    return found
