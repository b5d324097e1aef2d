"""attn_implementation="inductor_ext": packed sequences, plain batches, padding, compiled and not, on tiny models on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inductor_ext
from tests.support.compiled import Recorder

pytest.importorskip("transformers")
import inductor_ext.integrations.transformers as integration

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "use_cache": False, "max_position_embeddings": 256,
}  # fmt: skip


def build(kind: str, attention: str = integration.NAME, **options: Any) -> torch.nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES, attn_implementation=attention, **options)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}Model")(config).eval()


def packed(*lengths: int, padding: int = 0) -> dict[str, Any]:
    positions = [at for length in (*lengths, padding) for at in range(length)]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(0, 97, (1, len(positions)), generator=torch.Generator().manual_seed(len(positions)))
    return {
        "input_ids": ids, "position_ids": torch.tensor(positions)[None], "cu_seq_lens_q": ends.int(),
        "cu_seq_lens_k": ends.int(), "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip


def one_by_one(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    ends = inputs["cu_seq_lens_q"].tolist()
    parts = [model(input_ids=inputs["input_ids"][:, a:b]).last_hidden_state for a, b in zip(ends, ends[1:])]  # noqa: RUF007
    return torch.cat(parts, 1)


KINDS = pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Qwen3", {"head_dim": 16}),
        ("Llama", {}),
        ("Mistral", {"sliding_window": 4}),
        ("Gemma2", {"head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    ],
)


@KINDS
@torch.no_grad()
def test_packed_is_each_sequence_alone(kind: str, options: dict[str, Any]) -> None:
    """Against transformers' own "eager" attention, one sequence at a time."""
    inputs = packed(9, 1, 14, padding=3)
    found = build(kind, **options)(**inputs).last_hidden_state
    wanted = one_by_one(build(kind, "eager", **options), inputs)
    torch.testing.assert_close(found[:, :24], wanted, rtol=1e-4, atol=1e-5)
    assert found.isfinite().all(), "padding too"


@KINDS
@torch.no_grad()
def test_compiled_packed_has_no_mask(kind: str, options: dict[str, Any]) -> None:
    model, inputs = build(kind, **options), packed(9, 1, 14)
    recorder = Recorder()
    found = torch.compile(model, backend=recorder, fullgraph=True)(**inputs).last_hidden_state
    torch.testing.assert_close(found, model(**inputs).last_hidden_state, rtol=1e-4, atol=1e-5)
    (report,) = recorder.reports
    assert report.after.count("inductor_ext.varlen_attention.default(") == 2
    assert "24, 24]" not in report.before and "aten.where" not in report.before, "no mask [B, 1, S, S]"
    assert not recorder.refusals("causal_attention")


@torch.no_grad()
def test_any_number_of_tokens_and_sequences_compiles_once() -> None:
    model, recorder = build("Qwen3", head_dim=16), Recorder()
    compiled = torch.compile(model, backend=recorder, fullgraph=True, dynamic=True)
    for lengths in ((9, 5, 14), (3, 4), (17, 2, 8, 11, 5)):
        inputs = packed(*lengths)
        torch.testing.assert_close(compiled(**inputs).last_hidden_state, one_by_one(model, inputs), rtol=1e-4, atol=1e-5)
    assert len(recorder.reports) == 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_batches_are_sdpas(compiled: bool, padded: bool) -> None:
    model, stock = build("Qwen3", head_dim=16), build("Qwen3", "sdpa", head_dim=16)
    ids = torch.randint(0, 97, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.int64)
    if padded:
        mask[1, 7:] = 0  # to the right
        mask[2, :4] = 0  # to the left
    recorder = Recorder()
    run = torch.compile(model, backend=recorder, fullgraph=True) if compiled else model
    found, wanted = (each(input_ids=ids, attention_mask=mask).last_hidden_state for each in (run, stock))
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_batch_without_a_mask_takes_the_rule() -> None:
    model, recorder = build("Qwen3", head_dim=16), Recorder()
    ids = torch.randint(0, 97, (3, 12))
    found = torch.compile(model, backend=recorder, fullgraph=True)(input_ids=ids).last_hidden_state
    assert recorder.counts()["causal_attention"] == 2
    torch.testing.assert_close(
        found, build("Qwen3", "eager", head_dim=16)(input_ids=ids).last_hidden_state, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_restarting_positions_alone_are_right_and_say_what_is_faster() -> None:
    model, recorder = build("Qwen3", head_dim=16), Recorder()
    inputs = packed(9, 1, 14)
    alone = {name: inputs[name] for name in ("input_ids", "position_ids")}
    found = torch.compile(model, backend=recorder, fullgraph=True)(**alone).last_hidden_state
    torch.testing.assert_close(found, one_by_one(model, inputs), rtol=1e-4, atol=1e-5)
    reasons = {
        (each.reason, 'attn_implementation="inductor_ext"' in each.wanted) for each in recorder.refusals("causal_attention")
    }
    assert reasons == {("the mask tells packed sequences of a graph input apart", True)}


@torch.no_grad()
def test_generation_works() -> None:
    import transformers

    config = transformers.Qwen3Config(**{**SIZES, "use_cache": True}, head_dim=16)
    ids = torch.randint(0, 97, (2, 7))
    texts = []
    for name in (integration.NAME, "eager"):
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(config).eval()
        model.set_attn_implementation(name)
        texts.append(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 0.1}, "dropout: wanted 0 with cu_seq_lens_q, found 0.1"),
        ({"s_aux": torch.ones(4)}, "s_aux: wanted no attention sinks"),
        ({"is_causal": False, "sliding_window": 4}, "is_causal: wanted causal attention where there is a sliding window"),
        ({"key": torch.ones(1, 2, 9, 16)}, "cu_seq_lens_q: wanted no tokens in the cache, found 9 keys for 8 queries"),
        ({"value": torch.ones(1, 2, 8, 32)}, "value: wanted heads as wide as the query's, found heads of 32 beside 16"),
    ],
)
def test_what_packed_attention_does_not_do(change: dict[str, Any], message: str) -> None:
    inputs = {"query": torch.ones(1, 4, 8, 16), "key": torch.ones(1, 2, 8, 16), "value": torch.ones(1, 2, 8, 16)}
    ends = torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        integration.attention(torch.nn.Module(), **{**inputs, "attention_mask": None, "cu_seq_lens_q": ends, **change})


def test_registering_twice_does_no_harm() -> None:
    integration.register()
    assert inductor_ext.backend
