"""K and V stored by the launch that turns K: Hugging Face's static cache, what stays with two launches, and generated code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext import registry
from inductor_ext.patterns import qk_norm_rope_store as rule
from inductor_ext.patterns.downcast_fp8 import _quantise
from inductor_ext.patterns.qk_norm_rope_store import (
    HEADS,
    KV_HEADS,
    SLOTS,
    B,
    D,
    _flat,
    _fp8,
    _inputs,
    _one_token,
    _rows,
    _turned,
)
from inductor_ext.rule import Example
from tests.support.compiled import run_compiled, run_copies
from tests.support.equal import assert_all_same_bytes
from tests.support.fakegpu import FakeGpu, fake_gpu
from tests.support.products import explained, refusals

ALWAYS = {"qk_norm_rope_store": "always"}


def _details(found: Any) -> list[str]:
    return [event.detail for graph in found.graphs for event in graph.rewrites if event.rule == "qk_norm_rope_store"]


# ---- models ----------------------------------------------------------------------------------------------------------


def _step(kind: str) -> Any:
    """A decoding step of a model with a StaticCache in which there are five tokens already."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.randint(0, 128, (B, 5)), past_key_values=cache, cache_position=torch.arange(5), use_cache=True)

    def step(tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return model(tokens, past_key_values=cache, cache_position=at, use_cache=True).last_hidden_state

    return step, cache


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_a_static_cache_is_stored_by_the_rotation(kind: str) -> None:
    torch.manual_seed(0)
    step, cache = _step(kind)
    tokens, at = torch.randint(0, 128, (B, 1)), torch.tensor([5])
    torch._dynamo.reset()
    with torch.no_grad():
        found = inductor_ext.explain(step, tokens, at)
    assert found.counts()["qk_norm_rope_store"] == 2, refusals(found, "qk_norm_rope_store")
    assert _details(found) == ["K and V: copied → torch.bfloat16"] * 2
    assert "index_put" not in found.graphs[0].after
    # The bytes in the cache: with the rule, and with two ops.
    kept = {}
    for mode in ("auto", "off"):
        torch._dynamo.reset()
        for layer in cache.layers:
            layer.keys.zero_(), layer.values.zero_()
            layer.cumulative_length = 5 if isinstance(layer.cumulative_length, int) else layer.cumulative_length.fill_(5)
        with torch.no_grad():
            out = torch.compile(step, backend=inductor_ext.backend(rules={"qk_norm_rope_store": mode}))(tokens, at)
        kept[mode] = [out, *(t.clone() for layer in cache.layers for t in (layer.keys, layer.values))]
    assert_all_same_bytes(kept["auto"], kept["off"])
    for written in kept["auto"][1:]:
        assert written.any(-1).any(1).sum(0).tolist() == [0] * 5 + [B] + [0] * 10, "the sixth row of every sequence"


# ---- what is left to others ------------------------------------------------------------------------------------------


def test_a_gpu_waits_until_it_is_measured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "MEASURED", frozenset({"sm_100a"}))
    make = lambda: _one_token("cuda")  # noqa: E731
    found = explained(_fp8, make)
    assert found.counts() == {"qk_norm_rope": 1, "downcast_fp8": 1}
    assert refusals(found, "qk_norm_rope_store") == ["the rewrite has not been measured on this GPU yet"]
    monkeypatch.setattr(rule, "MEASURED", frozenset({"sm_90a"}))


def test_sizes_that_measured_faster_in_two_launches() -> None:
    some = lambda: _inputs(4, 10, KV_HEADS, D)("cuda")  # noqa: E731
    found = explained(_fp8, some)
    assert found.counts() == {"qk_norm_rope": 1, "downcast_fp8": 1}
    assert refusals(found, "qk_norm_rope_store") == ["two launches measured faster"]
    assert explained(_fp8, some, qk_norm_rope_store="always").counts() == {"qk_norm_rope_store": 1}


def test_switched_off_there_are_two_ops() -> None:
    given = _inputs(4, 10, KV_HEADS, D)("cpu")
    found, recorder = run_compiled(_fp8, given, rules={"qk_norm_rope_store": "off"})
    assert recorder.counts() == {"qk_norm_rope": 1, "downcast_fp8": 1}
    assert_all_same_bytes(found, run_copies(_fp8, given))


def test_v_that_inductor_makes_is_left_to_it() -> None:
    def fn(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> Any:
        q, k, v = _turned(qkv, cos, sin)
        kc[slots] = _quantise(_rows(k), ks)
        vc[slots] = _quantise(_rows(-v), vs)
        return q

    given = _flat("cpu")
    found, recorder = run_compiled(fn, given)
    assert_all_same_bytes(found, run_copies(fn, given))
    events = [event for report in recorder.reports for event in report.rewrites if event.rule == "qk_norm_rope_store"]
    assert len(events) == 1 and events[0].detail.startswith("K alone (Inductor fuses v's store into")
    forced, recorder = run_compiled(fn, given, rules=ALWAYS)
    assert_all_same_bytes(forced, found)
    assert "K and V" in next(e for r in recorder.reports for e in r.rewrites if e.rule == "qk_norm_rope_store").detail


def test_v_of_another_dtype_is_stored_by_itself() -> None:
    def fn(qkv: Any, v: Any, cos: Any, sin: Any, kc: Any, vc: Any, slots: Any) -> Any:
        q, k, _ = _turned(qkv, cos, sin)
        kc.view(-1, KV_HEADS, D)[slots] = _quantise(_rows(k), torch.tensor(0.5))
        vc.view(-1, KV_HEADS, D)[slots] = _quantise(_rows(v), torch.tensor(0.5))
        return q

    qkv, cos, sin, _, _, kc, vc, slots = _inputs(4, 10, KV_HEADS, D)("cpu")
    given = (qkv, torch.randn(B, 6, KV_HEADS, D), cos, sin, kc, vc, slots)
    found, recorder = run_compiled(fn, given)
    assert recorder.counts() == {"qk_norm_rope_store": 1, "downcast_fp8": 1}
    assert_all_same_bytes(found, run_copies(fn, given))


def test_k_and_q_that_are_turned_apart() -> None:
    """k alone is one rotation, and stores what it turns."""

    def fn(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> Any:
        (q, _, _), (_, k, v) = _turned(qkv, cos, sin), _turned(qkv, sin, cos)
        kc[slots] = _quantise(_rows(k), ks)
        vc[slots] = _quantise(_rows(v), vs)
        return q

    given = _flat("cpu")
    found, recorder = run_compiled(fn, given)
    assert recorder.counts() == {"qk_norm_rope": 1, "qk_norm_rope_store": 1}
    assert_all_same_bytes(found, run_copies(fn, given))


def test_two_layers_of_one_cache() -> None:
    def fn(qkv: Any, w: Any, cos: Any, sin: Any, kv: Any, slots: Any) -> Any:
        for layer in range(2):
            q, k, v = _turned(qkv, cos, sin)
            kv[layer, 0][slots] = _quantise(_rows(k), 0.5)
            kv[layer, 1][slots] = _quantise(_rows(v), 0.25)
            qkv = (q.flatten(2).flatten(0, 1) @ w).view(qkv.shape)
        return qkv

    qkv, cos, sin, _, _, kv, slots = _inputs(2, 2, SLOTS, KV_HEADS, D, caches=1)("cpu")
    given = (qkv, torch.randn(HEADS * D, qkv.shape[-1]).bfloat16() / 8, cos, sin, kv, slots)
    found, recorder = run_compiled(fn, given)
    assert recorder.counts() == {"qk_norm_rope_store": 2}, recorder.refusals("qk_norm_rope_store")
    assert_all_same_bytes(found, run_copies(fn, given))


def test_reading_the_new_rows_and_the_turned_k() -> None:
    def fn(qkv: Any, cos: Any, sin: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> Any:
        q, k, v = _turned(qkv, cos, sin)
        kc.view(-1, KV_HEADS, D)[slots] = _quantise(_rows(k), ks)
        vc.view(-1, KV_HEADS, D)[slots] = _quantise(_rows(v), vs)
        return q, k.float().sum(), kc.float().sum(), vc.view(-1, KV_HEADS, D)[slots].float().sum()

    given = _inputs(4, 10, KV_HEADS, D)("cpu")
    found, recorder = run_compiled(fn, given)
    assert recorder.counts() == {"qk_norm_rope_store": 1}
    wanted = run_copies(fn, given)
    torch.testing.assert_close(found[1:4], wanted[1:4], rtol=1e-5, atol=1e-4)  # sums
    assert_all_same_bytes([found[0], *found[4:]], [wanted[0], *wanted[4:]])


def test_tokens_that_change_from_call_to_call() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_fp8, backend="inductor_ext", dynamic=True)
    for sequences in (3, 2, 5):
        qkv, cos, sin, ks, vs, kc, vc, _ = _inputs(4, 10, KV_HEADS, D)("cpu")
        qkv = torch.randn(sequences, *qkv.shape[1:]).bfloat16()
        given = (qkv, cos, sin, ks, vs, kc, vc, torch.arange(sequences * qkv.shape[1]) % 37)
        assert_all_same_bytes(run_copies(compiled, given), run_copies(_fp8, given))


# ---- generated code --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as fake:
        yield fake


@pytest.mark.parametrize("example", [pytest.param(example, id=example.name) for example in rule.RULE.matches])
def test_caches_are_written_in_place(gpu: FakeGpu, example: Example) -> None:
    backend = inductor_ext.backend(build="defer", rules=example.modes("qk_norm_rope_store"))
    source = gpu.source(example.fn, lambda: example.inputs("cuda"), backend=backend, dynamic=example.dynamic)
    body = source.split("runner = ")[0].split("benchmark_compiled_module")[0]
    (call,) = [line for line in body.splitlines() if "inductor_ext_qk_norm_rope_store(" in line]
    assert "inductor_ext_qk_norm_rope(" not in body
    outs = re.findall(r"out\d=(buf\d+)", call)
    assert len(outs) == 2
    for out in outs:
        assert re.search(rf"{out} = empty_strided_cuda\(", body), "Inductor plans both"
    caches = [x for x in example.inputs("cpu") if isinstance(x, torch.Tensor) and x.dim() >= 3 and x.shape[-1] == D]
    caches = [cache for cache in caches if cache.numel() >= 600]  # not the tables and weights
    assert caches
    for line in body.splitlines():
        if "empty_strided_cuda" in line:
            assert "float8" not in line and "uint8" not in line, f"a copy of a cache: {line}"
        launched = re.search(r"\.run\(.*?, (\d+), stream", line)
        if example.name != "static_cache":  # where sums are taken over the caches
            assert not launched or int(launched.group(1)) < min(cache.numel() for cache in caches), line
    arguments = call.split("(", 1)[1].split(", ")
    assert len([each for each in arguments if each.startswith(("arg", "reinterpret_tensor(arg"))]) >= 5


def test_stock_and_two_ops_read_k_again(gpu: FakeGpu) -> None:
    """The test of the test: without the rule there are two calls of ours."""
    backend = inductor_ext.backend(build="defer", rules={"qk_norm_rope_store": "off"})
    source = gpu.source(_fp8, lambda: _inputs(4, 10, KV_HEADS, D)("cuda"), backend=backend)
    body = source.split("runner = ")[0]
    assert "inductor_ext_qk_norm_rope(" in body and "inductor_ext_downcast_fp8(" in body


def test_the_rule_stands_before_what_it_replaces() -> None:
    names = [each.name for each in registry.rules()]
    assert names.index("qk_norm_rope_store") < names.index("qk_norm_rope") < names.index("downcast_fp8")
