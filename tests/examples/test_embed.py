"""examples/embed.py on a CPU: packing changes no embedding, and nothing is compiled after the first steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import embed

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return embed.make_tokenizer()


def make_model(tokenizer: Any, attention: str = "sdpa") -> torch.nn.Module:
    return embed.make_model(len(tokenizer), "cpu", torch.float32, attention, tiny=True)


def test_tokenizer_is_bytes_and_an_end(tokenizer: Any) -> None:
    ids = tokenizer("né")["input_ids"]
    assert len(ids) == 4 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "né"
    assert tokenizer("")["input_ids"] == [tokenizer.eos_token_id]


def test_packs_keep_the_order_and_the_budget() -> None:
    texts = [[1, 2, 9], [3, 9], [4, 5, 6, 7, 8, 9], [9]]
    found = list(embed.packs(texts, 5))
    assert [pack.numbers for pack in found] == [(0, 1), (2,), (3,)]
    assert found[1].texts == ((4, 5, 6, 7, 9),)  # cut, its end kept
    assert [pack.tokens for pack in found] == [5, 5, 1]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "inductor_ext"])
def test_packed_is_one_at_a_time_and_nothing_is_recompiled(tokenizer: Any, attention: str) -> None:
    model = make_model(tokenizer, attention)
    texts = ["", *embed.made_up_texts(20, 30)]
    wanted = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        hidden = model(input_ids=ids).last_hidden_state[0, -1]
        wanted.append(hidden / hidden.norm())
    embedder = embed.Embedder(model, tokenizer, budget=150)
    seen: list[tuple[int, int, int]] = []
    before = embed.compiled_graphs()

    def told(pack: embed.Pack) -> None:
        seen.append((len(pack.texts), pack.tokens, embed.compiled_graphs() - before))

    got = embedder.embed(texts, told)
    torch.testing.assert_close(got, torch.stack(wanted), rtol=0, atol=2e-6)
    assert len({tokens for _, tokens, _ in seen}) > 3 and len({count for count, _, _ in seen}) > 1
    alone = embedder.embed([""])  # a single token in the whole step
    torch.testing.assert_close(alone[0], wanted[0], rtol=0, atol=2e-6)
    assert seen[0][2] == 1 and embed.compiled_graphs() - before == 1


def test_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("the CPU's sizes are what this runs")
    path = tmp_path / "texts"
    path.write_text("\n".join(embed.made_up_texts(12, 20)))
    monkeypatch.setattr(sys, "argv", ["embed.py", "--backend", "eager", "--budget", "64", "--input", str(path)])
    embed.main()
    shown = capsys.readouterr().out
    assert "12 texts in" in shown and "embeddings [12, 128]" in shown and "0 after them" in shown


def test_a_model_on_disk(tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(tokenizer)
    model.save_pretrained(tmp_path)
    loaded = embed.load_model(str(tmp_path), "cpu", torch.float32, "sdpa")
    texts = ["one", "another one"]
    found = [embed.Embedder(each, tokenizer, backend="eager").embed(texts) for each in (model, loaded)]
    assert torch.equal(*found) and found[0].norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
