"""Qwen3-0.6B (Hugging Face, random weights) with torchao FP8 PerRow: compile seconds and step time, stock against this backend.

    python -m benchmarks.models.qwen3_compile [--layers 28] [--batch 14] [--length 512] [--together] [--out FILE.json]

Each side compiles in a process of its own with an empty Inductor cache; this backend's kernels are built beforehand (the warm
kernel cache of the goal). Times are medians of CUDA-graph replays; kernels are counted by the profiler in one step, cuBLAS's
products (nvjet), memsets and ours apart. ``--together`` compiles both sides at the same time, which halves the wait and makes
the compile times worthless; steps are then still measured one after the other.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import filelock
import torch


def build_model(layers: int) -> torch.nn.Module:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=1024, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    model = Qwen3Model(config).to(device="cuda", dtype=torch.bfloat16).eval()
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return model


def graph_time(step: Any, replays: int = 30) -> float:
    """Median milliseconds of a CUDA-graph replay of one step."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


#: By what a kernel's name begins with or, for ours, holds: Triton's kernels carry the names of what they read too.
KINDS = {"memset": "Memset", "nvjet": "nvjet", "ours": "inductor_ext::", "triton": "triton_"}


def kernels_of(step: Any) -> dict[str, dict[str, float]]:
    """Launches and µs of one step: all, and by what the kernel's name holds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    found = {}
    for kind, text in {"all": "", **KINDS}.items():
        mine = [event for event in events if text in event.key]
        microseconds = sum(event.self_device_time_total for event in mine)
        found[kind] = {"launches": sum(event.count for event in mine), "us": round(microseconds, 1)}
    return found


def child(side: str, layers: int, batch: int, length: int, output: str, lock: str) -> None:
    model = build_model(layers)
    tokens = torch.randint(0, 1024, (batch, length), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    counts: dict[str, int] = {}
    backend: Any = "inductor"
    if side == "ours":
        import inductor_ext
        from inductor_ext import settings
        from inductor_ext.backend import compile_graph

        def backend(gm: Any, inputs: Any, **_: Any) -> Any:
            return compile_graph(
                gm, inputs, settings.current(), on_report=lambda report: counts.update(report.counts())
            )

        assert inductor_ext.__version__
    else:
        importlib.import_module("torch._inductor.compile_fx")  # importing Inductor is not compiling
    compiled = torch.compile(model, backend=backend)

    def step() -> torch.Tensor:
        return compiled(tokens).last_hidden_state

    with torch.no_grad():
        started = time.perf_counter()
        out = step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        with filelock.FileLock(lock):
            result = {
                "compile_s": seconds, "step_ms": graph_time(step), "kernels": kernels_of(step), "rewrites": counts,
            }  # fmt: skip
    torch.save(out.float().cpu(), output + ".pt")
    Path(output).write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--batch", type=int, default=14)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out")
    parser.add_argument("--child")
    parser.add_argument("--child-out")
    parser.add_argument("--together", action="store_true")
    options = parser.parse_args()
    if options.child:
        lock = str(Path(options.child_out).with_name("measuring.lock"))
        child(options.child, options.layers, options.batch, options.length, options.child_out, lock)
        return

    results: dict[str, list[dict[str, Any]]] = {"stock": [], "ours": []}
    outputs: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as scratch:
        # Two layers first: builds this backend's kernels, and warms the file system for both.
        runs = [("ours", 2)] + [(s, options.layers) for _ in range(options.repeats) for s in results]
        started: list[subprocess.Popen[bytes]] = []
        for index, (side, layers) in enumerate(runs):
            command = [sys.executable, __file__, "--child", side, "--child-out", f"{scratch}/{index}.json",
                       "--layers", str(layers), "--batch", str(options.batch), "--length", str(options.length)]  # fmt: skip
            environment = {
                **os.environ,
                "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor{index}",
                "TRITON_CACHE_DIR": f"{scratch}/triton{index}",
            }
            if not (options.together and index == 0):
                started.append(subprocess.Popen(command, env=environment))
            if not options.together and started[-1].wait():
                raise SystemExit(f"{side} failed")
        if any(process.wait() for process in started):
            raise SystemExit("a side failed")
        for index, (side, layers) in enumerate(runs):
            path = f"{scratch}/{index}.json"
            if index:
                results[side].append(json.loads(Path(path).read_text()))
                outputs[side] = torch.load(path + ".pt")
                print(side, layers, Path(path).read_text(), flush=True)

    def best(side: str, key: str) -> float:
        return min(run[key] for run in results[side])

    stock, ours = outputs["stock"].flatten(), outputs["ours"].flatten()
    report = {
        "what": f"Qwen3-0.6B shape, {options.layers} layers, torchao PerRow, {options.batch} x {options.length}",
        "runs": results,
        "compiled_together": options.together,
        "compile_ratio_ours_over_stock": best("ours", "compile_s") / best("stock", "compile_s"),
        "speedup_over_stock": best("stock", "step_ms") / best("ours", "step_ms"),
        "cosine_ours_stock": float(torch.nn.functional.cosine_similarity(stock, ours, dim=0)),
    }
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import timing

    timing.write_json(options.out or "qwen3_compile.json", report)
    print(json.dumps({key: value for key, value in report.items() if key != "runs"}, indent=1))


if __name__ == "__main__":
    main()
