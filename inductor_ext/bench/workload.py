"""Which texts one step holds, and the model inputs that stand for them.

Three layouts of ``items`` texts with ``lengths`` tokens:

    uniform   input_ids [B, L]                                       all texts as long as each other
    padded    input_ids [B, max L], attention_mask [B, max L]        padding on the right
    packed    input_ids [1, sum L], position_ids [1, sum L]          positions start again at each text

or, with a ``context``, one more token of each of ``items`` texts that have filled a KV cache (``cache.py``) but for one row:

    decode    input_ids [B, 1], position_ids [1, 1]

Token ids are random, and the same for the same seed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import torch

from inductor_ext.errors import SettingError

Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Lengths of the texts of one step; ``packed`` puts them end to end in one row. ``context``: tokens each has then seen."""

    lengths: tuple[int, ...]
    packed: bool = False
    context: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise SettingError(f"lengths: wanted whole numbers from 1 up, found {list(self.lengths)}")
        if self.context and (set(self.lengths) != {1} or self.packed or self.context < 2):
            found = f"{self.context} tokens, lengths {list(self.lengths)}"
            raise SettingError(f"context: wanted 2 tokens or more, and one new one a text, found {found}")

    @property
    def items(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of the texts, without padding."""
        return sum(self.lengths)

    @property
    def rows(self) -> int:
        """Tokens the model computes, padding included."""
        return self.tokens if self.packed else self.items * max(self.lengths)

    @property
    def padded(self) -> bool:
        return not self.packed and len(set(self.lengths)) > 1

    def __str__(self) -> str:
        if self.context:
            return f"decoding {self.items} sequences of {self.context} tokens, FP8 KV cache"
        if len(set(self.lengths)) == 1:
            what = f"{self.items} × {self.lengths[0]} tokens"
        else:
            what = f"{self.items} texts of {min(self.lengths)} to {max(self.lengths)} tokens, {self.tokens} in all"
        padding = f", padded to {self.rows}" if self.padded else ""
        return what + (", packed into one row" if self.packed else padding)

    def inputs(self, vocab: int, device: str, seed: int) -> Inputs:
        """The model's keyword arguments for random texts of these lengths."""
        generator = torch.Generator().manual_seed(seed)
        shape = (1, self.rows) if self.packed else (self.items, max(self.lengths))
        found = {"input_ids": torch.randint(0, vocab, shape, generator=generator)}
        if self.context:
            found["position_ids"] = torch.tensor([[self.context - 1]])
        elif self.packed:
            found["position_ids"] = torch.cat([torch.arange(length) for length in self.lengths])[None]
        elif self.padded:
            found["attention_mask"] = (torch.arange(shape[1])[None] < torch.tensor(self.lengths)[:, None]).long()
        return {name: value.to(device) for name, value in found.items()}

    def bounds(self, device: str) -> Inputs:
        """What a variable-length attention is told besides: where each packed text begins and ends; padding there is none."""
        if not self.packed:
            return {}
        cu_seqlens = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=device)
        longest = max(self.lengths)
        return {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": longest, "max_length_k": longest}

    def embeddings(self, hidden: torch.Tensor, causal: bool = True) -> torch.Tensor:
        """[items, H]: the hidden state of each text's last token, or the mean of all of its tokens', where each sees all."""
        if not causal:
            texts = hidden[0].split(self.lengths) if self.packed else [row[:size] for row, size in zip(hidden, self.lengths)]
            return torch.stack([text.float().mean(0) for text in texts])
        lengths = torch.tensor(self.lengths, device=hidden.device)
        if self.packed:
            return hidden[0, lengths.cumsum(0) - 1]
        return hidden[torch.arange(self.items, device=hidden.device), lengths - 1]

    def to_dict(self) -> dict[str, Any]:
        return {
            "lengths": list(self.lengths),
            "packed": self.packed,
            "items": self.items,
            "tokens": self.tokens,
            "rows": self.rows,
            "context": self.context,
        }


def parse_lengths(text: str, count: int, seed: int = 0) -> tuple[int, ...]:
    """``"512,128,64"``, or ``count`` draws of ``"lognormal:mean=200,sigma=0.6,max=2048"`` (mean and max in tokens)."""
    name, colon, rest = text.partition(":")
    if not colon:
        try:
            return tuple(int(part) for part in text.split(","))
        except ValueError:
            raise SettingError(f'--lengths: wanted "512,128,…" or "lognormal:mean=…,sigma=…", found {text!r}') from None
    if name != "lognormal":
        raise SettingError(f"--lengths: wanted the distribution lognormal, found {name!r}")
    given = {"sigma": 0.5, "max": 8192.0}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in ("mean", "sigma", "max"):
            raise SettingError(f"--lengths: lognormal takes mean, sigma and max; found {key!r}")
        try:
            given[key] = float(value)
        except ValueError:
            raise SettingError(f"--lengths: wanted a number for {key}, found {value!r}") from None
    if given.get("mean", 0) <= 0 or given["sigma"] < 0 or given["max"] < 1:
        raise SettingError(f"--lengths: wanted mean > 0, sigma >= 0 and max >= 1, found {text!r}")
    draw = random.Random(seed)
    mu = math.log(given["mean"]) - given["sigma"] ** 2 / 2  # so that `mean` is the mean of the lengths, not of their logarithms
    lengths = (round(draw.lognormvariate(mu, given["sigma"])) for _ in range(count))
    return tuple(max(1, min(int(given["max"]), length)) for length in lengths)
