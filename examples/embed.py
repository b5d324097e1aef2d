"""Embeddings of texts of mixed lengths, as a user makes them: tokenise, pack, one model step a pack, pool, normalise.

    python examples/embed.py                                   2 000 made-up texts through a model with random weights
    python examples/embed.py --model-dir DIR --input FILE      a model and tokenizer on disk, one text a line

Several texts are put end to end into one row of tokens, up to ``--budget``, so that nothing is computed for padding:

    input_ids     [1, T]     the texts' tokens, each text ended by the end-of-text token
    position_ids  [1, T]     0, 1, … again at each text, from which the model library tells the texts apart
    cu_seqlens    [N + 1]    where each text begins, and T

An embedding is the last token's hidden state, scaled to length 1, as Qwen3-Embedding does it. T and N are another number
at each step; the model is compiled once for all of them. Needs transformers; FP8 on a GPU needs torchao; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._dynamo.utils import counters

END = "<|endoftext|>"
WARM_STEPS = 2  # steps that may compile: the first, and one of another length


def make_tokenizer() -> Any:
    """A byte-level tokenizer without merges, built here: a token for each byte, and ``END`` after each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([*alphabet, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, vocab[END])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_model(vocab: int, device: str, dtype: torch.dtype, attention: str, tiny: bool) -> torch.nn.Module:
    """Qwen3 without a head, random weights: the 0.6B shape, or a tiny one."""
    from transformers import AutoModel, Qwen3Config

    register(attention)

    sizes = (2, 128, 4, 2, 32, 256) if tiny else (28, 1024, 16, 8, 128, 3072)
    layers, hidden, heads, kv_heads, head_dim, intermediate = sizes
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModel.from_config(config, attn_implementation=attention, dtype=dtype)


def register(attention: str) -> None:
    """Make this package's attention known to transformers."""
    if attention == "inductor_ext":
        importlib.import_module("inductor_ext.integrations.transformers")


def load_model(folder: str, device: str, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    from transformers import AutoModel

    register(attention)
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    return model.to(device)


def to_fp8(model: torch.nn.Module) -> None:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


@dataclasses.dataclass(frozen=True)
class Pack:
    """Texts of one step: their numbers in the caller's list, and their tokens."""

    numbers: tuple[int, ...]
    texts: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


def packs(texts: Iterable[Sequence[int]], budget: int) -> Iterator[Pack]:
    """Texts in their order, as many a step as ``budget`` tokens hold; a longer text is cut to it."""
    numbers: list[int] = []
    held: list[tuple[int, ...]] = []
    for number, text in enumerate(texts):
        cut = tuple(text) if len(text) <= budget else (*text[: budget - 1], text[-1])  # the end-of-text token stays
        if held and sum(map(len, held)) + len(cut) > budget:
            yield Pack(tuple(numbers), tuple(held))
            numbers, held = [], []
        numbers.append(number)
        held.append(cut)
    if held:
        yield Pack(tuple(numbers), tuple(held))


class Embedder:
    """A compiled model, and what turns texts into its inputs and its hidden states into embeddings."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, budget: int = 4096, backend: Any = "inductor_ext") -> None:
        model = model.eval().requires_grad_(False)
        self.attention = model.config._attn_implementation
        self.device = next(model.parameters()).device
        self.tokenizer = tokenizer
        self.budget = budget
        self.model: Callable[..., Any] = model
        if backend != "eager":
            # dynamic=True makes inputs of Python floats too, and a norm's eps is one: what it is fused with has to know it.
            torch._dynamo.config.specialize_float = True
            self.model = torch.compile(model, backend=backend, dynamic=True)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], told: Callable[[Pack], None] = lambda pack: None) -> torch.Tensor:
        """[number of texts, H], fp32, each row of length 1. ``told`` is called after each step."""
        tokens = [ids or [self.tokenizer.eos_token_id] for ids in self.tokenizer(list(texts))["input_ids"]]
        found: dict[int, torch.Tensor] = {}
        for pack in packs(tokens, self.budget):
            found.update(zip(pack.numbers, self.step(pack)))
            told(pack)
        return torch.stack([found[number] for number in range(len(texts))])

    def step(self, pack: Pack) -> torch.Tensor:
        """[N, H]: embeddings of a pack's texts."""
        texts = list(pack.texts)
        if pack.tokens == 1:
            texts.append(texts[0])  # a size of 1 is compiled apart, so a lone token gets company; its copy is dropped below
        ends = torch.tensor([0, *itertools.accumulate(map(len, texts))], dtype=torch.int32)
        ids = torch.tensor([token for text in texts for token in text])
        positions = torch.cat([torch.arange(len(text)) for text in texts])
        inputs = {"input_ids": ids[None].to(self.device), "position_ids": positions[None].to(self.device)}
        cu_seqlens = ends.to(self.device)
        hidden = self.model(**inputs, **self.bounds(cu_seqlens, max(map(len, texts)))).last_hidden_state[0]
        last = hidden[cu_seqlens[1:] - 1][: len(pack.texts)]
        return torch.nn.functional.normalize(last.float(), dim=-1)

    def bounds(self, cu_seqlens: torch.Tensor, longest: int) -> dict[str, Any]:
        """What a variable-length attention is told besides; sdpa gets a mask that the model makes of the positions."""
        if self.attention == "sdpa":
            return {}
        longest = 1 << max(1, longest - 1).bit_length()  # an upper bound, which takes few values
        found = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": longest, "max_length_k": longest}
        return {**found, "padded": False} if self.attention == "inductor_ext" else found


def compiled_graphs() -> int:
    """Graphs compiled so far in this process; a recompile adds one."""
    return counters["stats"]["unique_graphs"]


def made_up_texts(count: int, mean: int) -> list[str]:
    """Words in random order; lengths in bytes are spread like those of real documents."""
    draw = random.Random(0)
    words = ["a", "model", "reads", "text", "and", "gives", "each", "passage", "vector", "so", "that", "near", "means", "alike"]
    texts = []
    for _ in range(count):
        length = max(1, round(draw.lognormvariate(0, 0.8) * mean))
        texts.append(" ".join(draw.choices(words, k=length // 5 + 1))[:length])
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--input", help="a file with one text a line, instead of made-up texts")
    parser.add_argument("--texts", type=int, default=2000 if gpu else 200, help="how many texts to make up")
    parser.add_argument("--mean", type=int, default=200 if gpu else 60, help="about how many bytes they have")
    parser.add_argument("--budget", type=int, default=8192 if gpu else 512, help="tokens a step")
    parser.add_argument("--model-dir", help="a Hugging Face model and tokenizer on disk, instead of random weights")
    parser.add_argument("--backend", default="inductor_ext", help="inductor_ext, inductor or eager")
    parser.add_argument("--attention", default="inductor_ext", help="attn_implementation: inductor_ext, sdpa, …")
    parser.add_argument("--bf16", action="store_true", help="leave the linear layers in bf16 on a GPU; a CPU always has fp32")
    options = parser.parse_args()

    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    if options.model_dir:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
        model = load_model(options.model_dir, device, dtype, options.attention)
    else:
        tokenizer = make_tokenizer()
        model = make_model(len(tokenizer), device, dtype, options.attention, tiny=not gpu)
    if gpu and not options.bf16:
        to_fp8(model)
    if options.input:
        from pathlib import Path

        texts = Path(options.input).read_text(encoding="utf-8").splitlines()
    else:
        texts = made_up_texts(options.texts, options.mean)
    show(Embedder(model, tokenizer, options.budget, options.backend), texts)


def show(embedder: Embedder, texts: Sequence[str]) -> None:
    """Embed with a progress bar; print throughput after the first steps, and how many graphs were compiled when."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    steps, items, tokens, started, warm_graphs = 0, 0, 0, 0.0, 0
    columns = (TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("Compiling", total=len(texts), speed="")

        def told(pack: Pack) -> None:
            nonlocal steps, items, tokens, started, warm_graphs
            steps += 1
            if steps == WARM_STEPS:
                if embedder.device.type == "cuda":
                    torch.cuda.synchronize()
                started, warm_graphs = time.perf_counter(), compiled_graphs()
            elif steps > WARM_STEPS:
                items, tokens = items + len(pack.texts), tokens + pack.tokens
                seconds = time.perf_counter() - started
                speed = f"{items / seconds:,.0f} texts/s, {tokens / seconds:,.0f} tokens/s"
                bar.update(task, description="Embedding", speed=speed)
            bar.advance(task, len(pack.texts))

        embeddings = embedder.embed(texts, told)
        embeddings = embeddings.cpu()
        seconds = time.perf_counter() - started
    print(f"{len(texts)} texts in {steps} steps on {embedder.device}; embeddings {list(embeddings.shape)}")
    if steps > WARM_STEPS:
        print(f"after the first {WARM_STEPS} steps: {items / seconds:,.0f} texts/s, {tokens / seconds:,.0f} tokens/s")
        print(f"graphs compiled: {warm_graphs} in the first {WARM_STEPS} steps, {compiled_graphs() - warm_graphs} after them")


if __name__ == "__main__":
    main()
