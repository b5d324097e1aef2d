"""What is rewritten in two layers of every model family of `bench model --suite`, and why the rest is not.

Small models with row-wise FP8, as torchao makes it. A spelling that is no longer read shows here as a line that changes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext.bench import families, quantize
from inductor_ext.bench import model as models
from inductor_ext.bench.suite import DEFAULT
from inductor_ext.bench.workload import Workload
from tests.support.golden import assert_golden, golden_torch_only

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
HEADS, POSITIONS = 4, 16


def _small(name: str) -> models.ModelShape:
    """Two layers with the heads' own size, which decides more than any other size does."""
    shape = models.MODELS[name]
    sizes = {"layers": 2, "heads": HEADS, "kv_heads": max(1, HEADS * shape.kv_heads // shape.heads), "intermediate": 256}
    sizes |= {"hidden": HEADS * shape.head_dim, "experts": min(shape.experts, 8), "top_k": min(shape.top_k, 2)}
    vocab = shape.vocab if shape.family == "modernbert" else 128  # whose padding has the largest number but one
    return dataclasses.replace(shape, **sizes, vocab=vocab, positions=POSITIONS if shape.positions else 0)


@torch.no_grad()
@pytest.mark.parametrize("name", DEFAULT)
def test_rewrites(name: str) -> None:
    golden_torch_only()
    pytest.importorskip("transformers")
    torch._dynamo.reset()
    shape = _small(name)
    work = Workload((shape.positions or 32,) * 2)
    inputs: dict[str, Any] = (
        work.inputs(shape.vocab, "cpu", 1)
        if shape.kind.reads == "text"
        else families.inputs(shape, work.items, work.lengths[0], "cpu", 1)
    )
    build = lambda: models.build(shape, "cpu")  # noqa: E731
    model, _ = quantize.quantize(build, "row", lambda each: each(**inputs).last_hidden_state, "cpu")
    found = inductor_ext.explain(model, **inputs)
    lines = [f"{rule} ×{count}" for rule, count in sorted(found.counts().items())]
    missed = Counter(f"{each.rule}: {each.reason}" for each in found.refusals)
    lines += ["", *(f"{reason} ×{count}" for reason, count in sorted(missed.items()))]
    assert_golden(GOLDEN / f"{name}.txt", "\n".join(lines))
