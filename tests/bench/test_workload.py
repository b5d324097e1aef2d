"""Lengths, the model inputs they make, and where each text's last token is."""

from __future__ import annotations

import statistics

import pytest
import torch

from inductor_ext.bench.workload import Workload, parse_lengths
from inductor_ext.errors import SettingError


def test_uniform() -> None:
    work = Workload((5, 5, 5))
    inputs = work.inputs(100, "cpu", seed=1)
    assert set(inputs) == {"input_ids"} and inputs["input_ids"].shape == (3, 5)
    assert torch.equal(inputs["input_ids"], work.inputs(100, "cpu", seed=1)["input_ids"])
    assert not torch.equal(inputs["input_ids"], work.inputs(100, "cpu", seed=2)["input_ids"])
    assert (work.items, work.tokens, work.rows, work.padded) == (3, 15, 15, False)


def test_padded() -> None:
    work = Workload((2, 4))
    inputs = work.inputs(100, "cpu", seed=1)
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert (work.tokens, work.rows, work.padded) == (6, 8, True)
    hidden = torch.arange(8.0).view(2, 4, 1)
    assert work.embeddings(hidden).flatten().tolist() == [1.0, 7.0]


def test_decoding() -> None:
    work = Workload((1, 1, 1), context=8)
    inputs = work.inputs(100, "cpu", seed=1)
    assert inputs["input_ids"].shape == (3, 1) and inputs["position_ids"].tolist() == [[7]]
    assert (work.items, work.tokens, work.rows, work.padded) == (3, 3, 3, False)
    assert str(work) == "decoding 3 sequences of 8 tokens, FP8 KV cache"
    for lengths, context in (((1, 2), 8), ((1, 1), 1)):
        with pytest.raises(SettingError, match="context: wanted 2 tokens or more, and one new one a text"):
            Workload(lengths, context=context)


def test_packed() -> None:
    work = Workload((2, 4), packed=True)
    inputs = work.inputs(100, "cpu", seed=1)
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3]] and inputs["input_ids"].shape == (1, 6)
    assert work.embeddings(torch.arange(6.0).view(1, 6, 1)).flatten().tolist() == [1.0, 5.0]
    assert (work.rows, work.padded) == (6, False)
    bounds = work.bounds("cpu")
    assert bounds["cu_seq_lens_q"].tolist() == [0, 2, 6] and bounds["max_length_q"] == 4
    assert Workload((2, 4)).bounds("cpu") == {}


def test_lengths_as_a_list_or_a_distribution() -> None:
    assert parse_lengths("512,128,64", 9) == (512, 128, 64)
    drawn = parse_lengths("lognormal:mean=200,sigma=0.6,max=2048", 4000)
    assert drawn == parse_lengths("lognormal:mean=200,sigma=0.6,max=2048", 4000)
    assert statistics.fmean(drawn) == pytest.approx(200, rel=0.05) and min(drawn) >= 1 and max(drawn) <= 2048
    assert set(parse_lengths("lognormal:mean=50,sigma=0", 3)) == {50}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12,x", 'wanted "512,128,…"'),
        ("normal:mean=3", "wanted the distribution lognormal, found 'normal'"),
        ("lognormal:median=3", "takes mean, sigma and max; found 'median'"),
        ("lognormal:mean=x", "wanted a number for mean, found 'x'"),
        ("lognormal:sigma=1", "wanted mean > 0"),
        ("lognormal:mean=9,sigma=-1", "sigma >= 0"),
    ],
)
def test_lengths_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        parse_lengths(text, 2)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(SettingError, match="from 1 up"):
        Workload((3, 0))
