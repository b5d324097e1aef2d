"""How long torch.compile takes with this backend and with stock: Hugging Face's models, FP8 row-wise by torchao.

    python -m benchmarks.models.compile_time [--models qwen3,gemma2,olmo2,qwen2] [--out FILE.json]

Each compile runs in a process of its own with an empty Inductor cache, one after the other: stock; ours with an empty kernel
cache ("cold"); ours again, with the kernels that the run before has built ("warm"). ``compile_s`` is the first call, ``pass_s``
our pass with the loading or building of its kernels. Torchao switches Inductor's coordinate-descent tuning on, which compiles
for minutes: it is off on all sides. The step is the median of CUDA-graph replays, for the reader who asks what the seconds buy;
it is short, from a cool card, and no headline.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch._inductor.config
import typer

from benchmarks import timing
from inductor_ext import settings
from inductor_ext.backend import compile_graph
from inductor_ext.report.events import GraphReport

#: transformers' configuration class, and what differs from its defaults. Sizes are those of Qwen3-0.6B, Gemma-2-2B, OLMo-2-7B
#: and Qwen2-1.5B.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": (
        "Qwen3",
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 128},
    ),
    "gemma2": (
        "Gemma2",
        {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 256},
    ),
    "olmo2": (
        "Olmo2",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4, "num_attention_heads": 32,
         "num_key_value_heads": 32},
    ),
    "qwen2": (
        "Qwen2",
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 4, "num_attention_heads": 12,
         "num_key_value_heads": 2},
    ),
}  # fmt: skip
SIDES = ("stock", "cold", "warm")
BATCH, LENGTH, VOCAB = 8, 512, 1024


def _build(name: str, device: str) -> torch.nn.Module:
    import transformers
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    family, sizes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCAB, use_cache=False, pad_token_id=0, **sizes)
    model = getattr(transformers, f"{family}Model")(config).to(device=device, dtype=torch.bfloat16).eval()
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    torch._inductor.config.coordinate_descent_tuning = False
    torch._inductor.config.coordinate_descent_check_all_directions = False
    return model


def _one(name: str, side: str, device: str) -> dict[str, Any]:
    """Compile in this process; what it took."""
    reports: list[GraphReport] = []

    def ours(gm: Any, inputs: Any, **_: Any) -> Any:
        return compile_graph(gm, inputs, settings.current(), on_report=reports.append)

    model = _build(name, device)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), device=device)
    with torch.no_grad():
        compiled = torch.compile(model, backend="inductor" if side == "stock" else ours)
        begun = time.perf_counter()
        compiled(ids)
        if device == "cuda":
            torch.cuda.synchronize()
        found: dict[str, Any] = {"compile_s": round(time.perf_counter() - begun, 2)}
        for report in reports:
            found |= {"rewrites": report.counts(), "kernels": len(report.kernels), "pass_s": round(report.seconds, 2)}
        if device == "cuda":
            found["step_ms"] = round(1e3 * timing.graph_time([lambda: compiled(ids)], least_calls=1), 3)
    return found


def _spawn(name: str, side: str, device: str, kernels: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "INDUCTOR_EXT_CACHE_DIR": kernels}
        command = [sys.executable, "-m", "benchmarks.models.compile_time", "--models", name, "--only", side, "--device", device]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def main(
    models: Annotated[str, typer.Option(help="Some of " + ",".join(MODELS))] = ",".join(MODELS),
    only: Annotated[str, typer.Option(help="In this process: one of " + ", ".join(SIDES))] = "",
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    out: Annotated[Path | None, typer.Option(help="Where the result goes as JSON.")] = None,
) -> None:
    names = models.split(",")
    if only:
        print(json.dumps(_one(names[0], only, device)))
        return
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as kernels:
            rows[name] = {side: _spawn(name, side, device, kernels) for side in SIDES}
        print(name, json.dumps(rows[name]), flush=True)
        if out:
            timing.write_json(out, {"tokens": [BATCH, LENGTH], "models": rows})
    for name, sides in rows.items():
        stock, cold, warm = (sides[side].get("compile_s", float("nan")) for side in SIDES)
        print(
            f"{name:8} stock {stock:6.1f} s   cold {cold:6.1f} s ({cold / stock:.2f})   warm {warm:6.1f} s ({warm / stock:.2f})"
        )


if __name__ == "__main__":
    typer.run(main)
