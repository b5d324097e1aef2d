"""``benchmarks/models/packed_qwen3.py`` on a CPU: its sides agree, and its layers are what the rules are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.models import packed_qwen3
from inductor_ext.bench.model import named

LAYERS, TEXTS, LENGTH = 2, 3, 8
#: A layer has two norms before a product, one attention, one activation; what its products become depends on torch and the GPU.
FIRED = {"rms_norm_quantize": 2, "qk_norm_rope": 1, "act_mul_quantize": 1, "fp8_downcast": 1}


def test_the_sides_agree_and_the_rules_fire() -> None:
    names = [packed_qwen3.STOCK, packed_qwen3.OURS]  # a third would compile the same model once more
    found = packed_qwen3.measure(named("tiny", LAYERS)[1], TEXTS, LENGTH, "cpu", names, rounds=1)
    assert list(found) == names
    stock, *ours = found.values()
    assert stock["rewrites"] == {}
    for side in ours:
        assert side["cosine"] > 0.99
        assert {rule: side["rewrites"].get(rule) for rule in FIRED} == {rule: LAYERS * count for rule, count in FIRED.items()}


def test_texts_do_not_see_each_other_and_tokens_do_not_see_later_ones() -> None:
    """By both attentions: other tokens in the last text, and another last token in the first, change those rows alone."""
    shape = named("tiny", LAYERS)[1]
    tokens, *rest = inputs = packed_qwen3.packed(shape, TEXTS, LENGTH, "cpu")
    packed_qwen3.registry.ops()
    model = packed_qwen3.build(shape, inputs, LENGTH, packed_qwen3.sdpa_of_equal_texts)
    other = tokens.clone()
    changed = torch.zeros(len(tokens), dtype=torch.bool)
    changed[LENGTH - 1] = changed[-LENGTH:] = True
    other[changed] = (other[changed] + 1) % shape.vocab
    for attention in (packed_qwen3.sdpa_of_equal_texts, packed_qwen3.our_attention):
        before, after = (model(each, *rest, LENGTH, attention) for each in (tokens, other))
        assert torch.equal((before != after).any(-1), changed)


def test_the_table_has_a_column_for_what_any_side_has() -> None:
    def side(**parts: float) -> dict[str, Any]:
        found = {name: {"launches": 1, "us": us} for name, us in parts.items()}
        return {"step_ms": 1.0, "speedup": 1.0, "compile_s": 2.0, "cosine": 1.0, "parts": found, "kernels": [["k", 3, 1.0]]}

    stock, ours = packed_qwen3.rows({"stock": side(GEMM=5.2, gaps=1), "ours": side(GEMM=4.4, other=7)})
    assert list(stock) == list(ours)
    assert (stock["GEMM, µs"], stock["other, µs"], stock["kernels"]) == (5, 0, 3)
    assert (ours["other, µs"], ours["gaps, µs"]) == (7, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "tpu"], "wanted cuda or cpu, found 'tpu'"),
        (["--device", "cpu", "--only", "theirs"], "found 'theirs'"),
        (["--device", "cpu", "--out", "{folder}/out.json"], "wanted a GPU"),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str, tmp_path: Path) -> None:
    app = packed_qwen3.typer.Typer(rich_markup_mode=None)
    app.command()(packed_qwen3.main)
    result = CliRunner().invoke(app, [each.format(folder=tmp_path) for each in options])
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())
