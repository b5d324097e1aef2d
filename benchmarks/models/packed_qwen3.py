"""A packed embedding model written by hand, in static FP8: a step of stock ``torch.compile`` against one of this backend.

    python -m benchmarks.models.packed_qwen3 --out benchmarks/results/h200/packed_qwen3.json      [--layers 28] [--texts 14]
    python -m benchmarks.models.packed_qwen3                            without a GPU: a tiny shape, to show that it runs

Qwen3-0.6B's shape and random weights, written as who cares for speed writes it: the texts' tokens one after another in [T],
``positions`` [T], ``cu_seqlens`` int32 [N + 1]; cos and sin once for all layers; q, k and v of one product, gate and up of one.
Linear layers are `Fp8TensorLinear`: one scale for the weight, one for the input, fixed by a run of the same texts in bf16.

    stock                      Inductor with its defaults; attention by ``torch.nn.attention.varlen``
    ours                       this backend; attention by ``torch.ops.inductor_ext.varlen_attention``
    ours, torch's attention    this backend; attention by ``torch.nn.attention.varlen``

All have the same weights and are timed in turn: medians of CUDA-graph replays (on a CPU of calls). ``compile_s`` is the first
call, with the build of kernels that are not in the cache. A kernel's µs are the profiler's, of one call; ``gaps`` is what is
left of the step's. ``cosine`` is the least of the texts' embeddings (their last tokens' rows) to stock's.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks import timing
from benchmarks.kernels.shared import show
from inductor_ext import registry, settings
from inductor_ext.bench import breakdown
from inductor_ext.bench.model import ModelShape, named
from inductor_ext.bench.quantize import Fp8TensorLinear
from inductor_ext.report.events import GraphReport, Refusal

BF16 = torch.bfloat16
EPS, THETA = 1e-6, 1e6
#: (q [T, H, D], k, v [T, Hkv, D], cu_seqlens, tokens of the longest text) → [T, H, D], causal within each text.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# ---- attention -------------------------------------------------------------------------------------------------------


def torch_attention() -> Attention:
    """``varlen_attn`` as the installed torch spells a causal one."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    keywords: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        keywords["enable_gqa"] = True

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **keywords)

    return attend


def sdpa_of_equal_texts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int
) -> torch.Tensor:
    """For a CPU, where ``varlen_attn`` has no kernel; all texts are of ``longest`` tokens."""
    q, k, v = (x.unflatten(0, (-1, longest)).transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)


def our_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
    scale = q.shape[-1] ** -0.5
    return torch.ops.inductor_ext.varlen_attention(q, k, v, cu_seqlens, longest, scale, -1, 0, 0.0, False, "")


# ---- the model -------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=BF16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class Layer(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.widths = [heads * shape.head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        self.attention_norm, self.mlp_norm = RMSNorm(shape.hidden), RMSNorm(shape.hidden)
        self.q_norm, self.k_norm = RMSNorm(shape.head_dim), RMSNorm(shape.head_dim)
        self.qkv: nn.Module = nn.Linear(shape.hidden, sum(self.widths), bias=False, dtype=BF16)
        self.out: nn.Module = nn.Linear(self.widths[0], shape.hidden, bias=False, dtype=BF16)
        self.gate_up: nn.Module = nn.Linear(shape.hidden, 2 * shape.intermediate, bias=False, dtype=BF16)
        self.down: nn.Module = nn.Linear(shape.intermediate, shape.hidden, bias=False, dtype=BF16)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Callable[..., Any]) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm(x)).split(self.widths, -1)
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)) for each in qkv)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        x = x + self.out(attend(q, k, v).flatten(1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


class PackedQwen3(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.embed = nn.Embedding(shape.vocab, shape.hidden, dtype=BF16)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, attention: Attention
    ) -> torch.Tensor:
        x = self.embed(tokens)
        half = torch.arange(0, self.head_dim, 2, device=tokens.device, dtype=torch.float32) / self.head_dim
        angles = positions[:, None].float() * THETA**-half
        angles = torch.cat((angles, angles), -1)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        attend = functools.partial(attention, cu_seqlens=cu_seqlens, longest=longest)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        return self.norm(x)


def build(shape: ModelShape, inputs: Inputs, longest: int, attention: Attention) -> PackedQwen3:
    """Random weights, and static scales of what ``inputs`` makes of them."""
    torch.manual_seed(0)
    with torch.device(inputs[0].device):
        model = PackedQwen3(shape).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0, 1 if parameter is model.embed.weight else parameter.shape[1] ** -0.5)
    amax: dict[nn.Module, torch.Tensor] = {}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [
        linear.register_forward_pre_hook(lambda module, args: amax.update({module: args[0].abs().amax()})) for linear in linears
    ]
    model(*inputs, longest, attention)
    for hook in hooks:
        hook.remove()
    for layer in model.layers:
        for name in ("qkv", "out", "gate_up", "down"):
            linear = getattr(layer, name)
            setattr(layer, name, Fp8TensorLinear(linear, amax[linear]))
    return model


def packed(shape: ModelShape, texts: int, length: int, device: str) -> Inputs:
    """Tokens, positions and cu_seqlens of texts of the same length."""
    made = torch.Generator(device).manual_seed(1)
    tokens = torch.randint(0, shape.vocab, (texts * length,), device=device, generator=made)
    positions = torch.arange(length, device=device).repeat(texts)
    return tokens, positions, torch.arange(texts + 1, device=device, dtype=torch.int32) * length


# ---- the sides -------------------------------------------------------------------------------------------------------

STOCK, OURS, OURS_TORCH = "stock", "ours", "ours, torch's attention"


class Side:
    """One way to run the model, compiled by its first `step`."""

    def __init__(self, name: str, model: PackedQwen3, inputs: Inputs, longest: int) -> None:
        self.name = name
        self.reports: list[GraphReport] = []
        on_cpu = inputs[0].device.type == "cpu"
        attention = our_attention if name == OURS else sdpa_of_equal_texts if on_cpu else torch_attention()
        backend = "inductor" if name == STOCK else self._backend
        self.compiled = torch.compile(
            lambda *each: model(*each, longest, attention), backend=backend, fullgraph=True, dynamic=False
        )
        self.inputs = inputs

    def _backend(self, gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        from inductor_ext.backend import compile_graph

        return compile_graph(gm, inputs, settings.current(), on_report=self.reports.append)

    def step(self) -> torch.Tensor:
        return self.compiled(*self.inputs)

    def embeddings(self) -> torch.Tensor:
        """[N, hidden]: each text's last token."""
        return self.step()[self.inputs[2][1:].long() - 1].float()

    @property
    def rewrites(self) -> dict[str, int]:
        return dict(Counter(event.rule for report in self.reports for event in report.rewrites))

    @property
    def refusals(self) -> list[Refusal]:
        return [event for report in self.reports for event in report.refusals]


def first_call(side: Side) -> float:
    """Seconds of it: the compilation."""
    importlib.import_module("torch._inductor.compile_fx")  # importing Inductor is not compiling
    started = time.perf_counter()
    side.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def timed(sides: list[Side], rounds: int, device: str) -> dict[str, list[float]]:
    """µs of a step, a number a round."""
    if device == "cuda":
        return timing.in_turn({side.name: [side.step] for side in sides}, rounds=rounds, replays=10, least_calls=3)
    found: dict[str, list[float]] = {side.name: [] for side in sides}
    for _, side in itertools.product(range(rounds), sides):
        started = time.perf_counter()
        side.step()
        found[side.name].append((time.perf_counter() - started) * 1e6)
    return found


def kernels_of(side: Side, device: str) -> list[tuple[str, int, float]]:
    """Name, launches and µs of each kernel of one call, the most µs first; nothing on a CPU."""
    if device == "cpu":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        side.step()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in events if not event.is_user_annotation]
    return sorted(((event.key, event.count, event.self_device_time_total) for event in kernels), key=lambda each: -each[2])


def measure(shape: ModelShape, texts: int, length: int, device: str, names: list[str], rounds: int) -> dict[str, Any]:
    """Side → what was found, as JSON has it."""
    registry.ops()  # the attention of ours is one of them
    inputs = packed(shape, texts, length, device)
    model = build(shape, inputs, length, sdpa_of_equal_texts if device == "cpu" else torch_attention())
    torch._dynamo.reset()  # the sides share their code, and so the limit of its compilations
    sides = [Side(name, model, inputs, length) for name in names]
    compile_s = {side.name: first_call(side) for side in sides}
    embeddings = {side.name: side.embeddings() for side in sides}
    us = timed(sides, rounds, device)
    found: dict[str, Any] = {}
    for side in sides:
        step_us = statistics.median(us[side.name])
        kernels = kernels_of(side, device)
        cosines = nn.functional.cosine_similarity(embeddings[side.name], embeddings[names[0]])
        found[side.name] = {
            "step_us": [round(each, 1) for each in us[side.name]],
            "step_ms": step_us * 1e-3,
            "speedup": timing.ratio(us[names[0]], us[side.name]),
            "compile_s": round(compile_s[side.name], 1),
            "cosine": float(cosines.min()),
            "rewrites": side.rewrites,
            "refusals": {f"{rule}: {reason}": count for (rule, reason), count in by_reason(side.refusals).items()},
            "parts": breakdown.to_dict(breakdown.classify(kernels, step_us)),
            "kernels": [[name[:200], launches, round(us, 1)] for name, launches, us in kernels],
        }
    return found


def by_reason(refusals: list[Refusal]) -> Counter[tuple[str, str]]:
    return Counter((each.rule, each.reason) for each in refusals)


def rows(sides: dict[str, Any]) -> list[dict[str, Any]]:
    """A line of the table a side; columns for the classes of kernels that any of them has."""
    parts = [part for part in (*breakdown.CLASSES, breakdown.GAPS) if any(part in found["parts"] for found in sides.values())]
    made = []
    for name, found in sides.items():
        us = {f"{part}, µs": round(found["parts"].get(part, {"us": 0})["us"]) for part in parts}
        launches = {"kernels": sum(launches for _, launches, _ in found["kernels"])} if parts else {}
        head = {"side": name, "ms": f"{found['step_ms']:.3f}", "stock / it": f"{found['speedup']:.2f}"}
        made.append({**head, **us, **launches, "compile, s": found["compile_s"], "cosine": f"{found['cosine']:.5f}"})
    return made


def main(
    layers: Annotated[int, typer.Option(help="Layers; 0 for the shape's own.")] = 0,
    texts: Annotated[int, typer.Option(help="Texts of a step; 0 for 14, or 3 on a CPU.")] = 0,
    length: Annotated[int, typer.Option(help="Tokens of each text; 0 for 512, or 8 on a CPU.")] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu; a GPU if there is one.")] = "",
    only: Annotated[list[str] | None, typer.Option(help="Sides beside stock; may be given again.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds in which the sides take turns.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Where the numbers go, with a GPU.")] = None,
) -> None:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"wanted cuda or cpu, found {device!r}", param_hint="--device")
    wrong = set(only or ()) - {OURS, OURS_TORCH}
    if wrong:
        raise typer.BadParameter(f"wanted {OURS!r} or {OURS_TORCH!r}, found {wrong.pop()!r}", param_hint="--only")
    if out is not None and device == "cpu":
        raise typer.BadParameter("wanted a GPU: times of a CPU are no result", param_hint="--out")
    name, shape = named("Qwen3-0.6B" if device == "cuda" else "tiny", layers or None)
    texts, length = texts or (14 if device == "cuda" else 3), length or (512 if device == "cuda" else 8)
    sides = measure(shape, texts, length, device, [STOCK, *(only or (OURS, OURS_TORCH))], rounds)
    if out is not None:
        what = f"{name}, {shape.layers} layers, static FP8, {texts} texts of {length} tokens, packed"
        timing.write_json(out, {"what": what, "sides": sides})
    for side, found in sides.items():
        for title in ("rewrites", "refusals"):
            if found[title]:
                print(f"{side}, {title}: " + ", ".join(f"{each} ×{count}" for each, count in found[title].items()))
    show(rows(sides), 140)


if __name__ == "__main__":
    typer.run(main)
