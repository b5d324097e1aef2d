"""A Hugging Face Qwen3-MoE with MXFP8 experts (random weights): right, how fast, and how much memory, against stock in bf16.

    python -m benchmarks.models.moe_mxfp8 [--layers 1] [--tokens 16,4096] [--activations bf16] [--out FILE.json]     on a GPU
    python -m benchmarks.models.moe_mxfp8 --tiny                                                   on a CPU: that it runs

The layers are those of Qwen3-30B-A3B. Each number of tokens is one row: a step of stock ``torch.compile`` in bf16 and of the
quantised model through this backend with its MXFP8 kernels forced, the median of CUDA-graph replays; the distance of the
quantised model, compiled by stock and by this backend, to the same run eagerly (a router changes its mind over a rounding, so
that stock is not near either); and cosines to bf16. Kernels are built while the model compiles. Exit status 1 where a product
was not rewritten, or where ours is more than twice as far from eager as stock, plus 1e-2.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from typing import Any

import torch

import inductor_ext
from benchmarks import timing
from inductor_ext.rule import TOLERANCE

RULES = {"mxfp8_grouped_mm": "always"}


def build(layers: int, tiny: bool, device: str) -> torch.nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeModel

    sizes = (8, 64, 32, 2, 4, 2, 16) if tiny else (128, 2048, 768, 8, 32, 4, 128)
    experts, hidden, middle, top_k, heads, kv_heads, head_dim = sizes
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        num_experts=experts, hidden_size=hidden, moe_intermediate_size=middle, num_experts_per_tok=top_k,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=1024,
        norm_topk_prob=True, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        model = Qwen3MoeModel(config).bfloat16().eval().requires_grad_(False)
    model.set_experts_implementation("grouped_mm")
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # transformers' 0.02 would leave experts' outputs, wrong ones too, small beside the residual
            parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)
    return model


def milliseconds(step: Any, device: str) -> float:
    if device == "cuda":
        return timing.graph_time([step], least_calls=3) * 1e3
    step()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", default="16,4096")
    parser.add_argument("--activations", default="bf16", choices=("auto", "bf16", "fp8", "mxfp8"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    device = "cpu" if options.tiny else "cuda"
    model = build(options.layers, options.tiny, device)
    counts = [int(count) for count in ("24,64" if options.tiny else options.tokens).split(",")]
    ids = {count: torch.randint(0, 1024, (1, count), device=device) for count in counts}

    def hidden(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens).last_hidden_state

    rows: dict[int, dict[str, float]] = {count: {} for count in counts}
    bf16 = {}
    for count in counts:
        torch._dynamo.reset()
        stock = torch.compile(hidden, dynamic=False)
        bf16[count] = hidden(ids[count])
        rows[count]["stock, ms"] = milliseconds(lambda stock=stock, count=count: stock(ids[count]), device)
    cost = inductor_ext.quantize_moe_(model, activations=options.activations)
    for count in counts:
        torch._dynamo.reset()
        found = inductor_ext.explain(hidden, ids[count], rules=RULES, dynamic=False)
        torch._dynamo.reset()
        inductor = torch.compile(hidden, dynamic=False)(ids[count])
        torch._dynamo.reset()
        ours = torch.compile(hidden, backend=inductor_ext.backend(rules=RULES), dynamic=False)
        eager, made = hidden(ids[count]), ours(ids[count])
        rows[count] |= {
            "ours, ms": milliseconds(lambda ours=ours, count=count: ours(ids[count]), device),
            "rewritten": found.counts().get("mxfp8_grouped_mm", 0),
            "stock to eager": distance(inductor, eager),
            "ours to eager": distance(made, eager),
            "cosine, eager": cosine(eager, bf16[count]),
            "cosine, ours": cosine(made, bf16[count]),
        }
    if options.out:
        whole = cost.to_dict()
        kept = {key: whole[key] for key in ("error", "bytes_before", "bytes_after", "activations", "rounding")}
        found = [{"tokens": count, **row} for count, row in rows.items()]
        timing.write_json(options.out, {"layers": options.layers, "cost": kept, "rows": found})
    columns = list(rows[counts[0]])
    print("tokens  " + "  ".join(f"{column:>13}" for column in columns))
    for count, row in rows.items():
        print(f"{count:6d}  " + "  ".join(f"{row[column]:13.5g}" for column in columns))
    wrong = [
        count
        for count, row in rows.items()
        if row["rewritten"] != 2 * options.layers
        or not row["ours to eager"] <= 2 * row["stock to eager"] + TOLERANCE
        or not row["cosine, ours"] > 0
    ]
    print(f"WRONG at {wrong} tokens" if wrong else "right")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
