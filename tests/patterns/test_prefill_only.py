"""prefill_only: transformers' own static cache, calls one after another, what the option says, other ways to read a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import inductor_ext
from inductor_ext.errors import InductorExtError
from inductor_ext.patterns import prefill_only
from tests.support.compiled import run_compiled

transformers = pytest.importorskip("transformers")
ROOM, TOKENS = 64, 24


def decoder(layers: int = 2) -> nn.Module:
    config = transformers.Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return transformers.Qwen3Model(config).eval()


class Cached(nn.Module):
    """A decoder with a static cache of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=ROOM)
        self.cache.early_initialization(batch_size=2, num_heads=2, head_dim=16, dtype=torch.float32, device="cpu")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).last_hidden_state


def tokens(count: int = TOKENS) -> torch.Tensor:
    return torch.randint(0, 128, (2, count))


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=inductor_ext.backend(**options))


@torch.no_grad()
def test_a_transformers_model_computes_what_it_does_without_a_cache() -> None:
    model = decoder()
    cached = Cached(model)
    report = inductor_ext.explain(cached, tokens(), options={"prefill_only": True}, rules={"causal_attention": "off"})
    assert report.counts()["prefill_only"] == 2
    (graph,) = report.graphs
    assert "index_put" in graph.before and "index_put" not in graph.after
    assert "copy_" not in graph.after, "neither caches nor lengths are written"
    assert "aten.where" in graph.before and "aten.where" not in graph.after, "no mask"

    cached = Cached(model)
    run = compiled(cached, prefill_only=True)
    for _ in range(3):  # every call finds an empty cache
        ids = tokens()
        wanted = model(input_ids=ids, use_cache=False).last_hidden_state
        assert torch.allclose(run(ids), wanted, atol=1e-4)
    assert all(not layer.keys.any() and not layer.values.any() for layer in cached.cache.layers)


@torch.no_grad()
def test_without_the_option_the_cache_is_filled() -> None:
    cached = Cached(decoder(1))
    run = compiled(cached)
    run(tokens())
    keys = cached.cache.layers[0].keys
    assert keys[:, :, :TOKENS].any() and not keys[:, :, TOKENS:].any()
    report = inductor_ext.explain(Cached(decoder(1)), tokens())
    (refusal,) = [each for each in report.refusals if each.rule == "prefill_only"]
    assert (refusal.reason, refusal.found) == ("prefill-only work is not declared", "prefill_only=False")


@torch.no_grad()
def test_decoding_is_left_alone() -> None:
    """With the option too, one token attends to the cache that it finds."""
    model = decoder(1)
    cached, plain = Cached(model), Cached(model)
    prompt, following = tokens(), tokens(1)
    cached(prompt)
    plain(prompt)
    report = inductor_ext.explain(cached, following, options={"prefill_only": True})
    assert "prefill_only" not in report.counts()
    assert [each.reason for each in report.refusals if each.rule == "prefill_only"] == ["one token"]


def _inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return prefill_only._static("cpu")


def test_a_cache_that_is_not_empty_is_noticed() -> None:
    inputs = _inputs()
    inputs[-1].fill_(3)
    with pytest.raises(RuntimeError, match="prefill_only is set, but the KV cache is not empty"):
        run_compiled(prefill_only._static_cache, inputs, prefill_only=True, checks=True)


def test_positions_that_do_not_start_at_0_are_noticed() -> None:
    inputs = prefill_only._positions("cpu")
    inputs[-1].add_(1)
    with pytest.raises(RuntimeError, match="positions do not start at 0"):
        run_compiled(prefill_only._given_positions, inputs, prefill_only=True, checks=True)


def test_what_eight_bits_round_is_rounded_still() -> None:
    """The stored FP8 values are read, not K itself: the result is that of the cache, not a better one."""
    inputs = prefill_only._eight_bits("cpu")
    (found, *_), recorder = run_compiled(prefill_only._eight_bit_cache, inputs, prefill_only=True)
    assert recorder.counts()["prefill_only"] == 1
    (stock, *_), _ = run_compiled(prefill_only._eight_bit_cache, inputs)
    assert torch.allclose(found, stock, atol=1e-5)
    (exact, *_), _ = run_compiled(prefill_only._static_cache, (*inputs[:3], *prefill_only._cache("cpu"), inputs[-1]))
    assert not torch.allclose(found, exact, atol=1e-3)


def test_the_option_has_to_be_a_known_one() -> None:
    with pytest.raises(InductorExtError, match="unknown option 'prefil_only'"):
        inductor_ext.backend(prefil_only=True)


def _refusal(fn: Any, inputs: Any) -> tuple[str, str]:
    found = inductor_ext.explain(fn, *inputs, options={"prefill_only": True})
    assert "prefill_only" not in found.counts()
    (refusal,) = [each for each in found.refusals if each.rule == "prefill_only"]
    return refusal.reason, refusal.found


def test_a_cache_read_after_the_store() -> None:
    def run(*inputs: Any) -> Any:
        return prefill_only._static_cache(*inputs), inputs[3].clone()

    assert _refusal(run, _inputs())[0] == "the cache is read elsewhere"


def test_a_cache_read_before_the_store() -> None:
    def run(*inputs: Any) -> Any:
        before = inputs[3].sum()
        return prefill_only._static_cache(*inputs) + before

    assert _refusal(run, _inputs())[0] == "the cache is read elsewhere"


def test_an_accumulating_store() -> None:
    def run(q: Any, k: Any, v: Any, keys: Any, values: Any, at: Any) -> Any:
        q, k, v = prefill_only.split(q, k, v)
        rows = torch.arange(2)[:, None, None], torch.arange(2)[None, :, None], at[None, None, :]
        keys.index_put_(rows, k)
        values.index_put_(rows, v)
        return prefill_only._attend(q, keys, values, prefill_only._mask(q, 0, keys.shape[2]))

    assert _refusal(run, prefill_only._positions("cpu"))[0] == "index layout"


def test_a_slice_that_starts_later() -> None:
    def run(q: Any, k: Any, v: Any, keys: Any, values: Any) -> Any:
        q, k, v = prefill_only.split(q, k, v)
        keys[:, :, 4 : 4 + TOKENS] = k
        values[:, :, 4 : 4 + TOKENS] = v
        return prefill_only._attend(q, keys, values, prefill_only._mask(q, 0, keys.shape[2]))

    assert _refusal(run, prefill_only._static("cpu")[:-1]) == ("where the cache is written", "a slice from 4")


def test_other_rows_than_those_stored() -> None:
    def run(q: Any, k: Any, v: Any, keys: Any, values: Any) -> Any:
        q, k, v = prefill_only.split(q, k, v)
        keys[:, :, :TOKENS] = k
        values[:, :, :TOKENS] = v
        mask = prefill_only._mask(q, 0, TOKENS)
        return prefill_only._attend(q, keys[:, :, 4 : 4 + TOKENS], values[:, :, 4 : 4 + TOKENS], mask)

    assert _refusal(run, prefill_only._static("cpu")[:-1])[0] == "other rows of the cache are read"
