"""The demo's work, without its presentation: a Qwen3 model with FP8 linear layers, compiled stock and by this backend.

The model is Hugging Face's ``Qwen3Model`` from a config, with random weights: nothing is downloaded. On a GPU it has
the 0.6B shape, on a CPU a small one. Its linear layers are FP8 with a dynamic scale a row: torchao's where the machine
allows it, else `Fp8Linear`, which does torchao's arithmetic in torch operators.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from inductor_ext.backend import backend
from inductor_ext.errors import InductorExtError
from inductor_ext.report.explain import Explanation
from inductor_ext.report.verify import EndToEnd, Verification, verify

E4M3 = torch.float8_e4m3fn
Forward = Callable[[torch.Tensor], torch.Tensor]


class DemoError(InductorExtError):
    """The demo cannot run here; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model and of one batch."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    sequences: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads, {self.kv_heads} KV heads, "
            f"intermediate {self.intermediate}; {self.sequences} × {self.tokens} tokens"
        )


SMALL = Shape(2, 256, 4, 2, 64, 512, vocab=512, sequences=4, tokens=64)
QWEN3_06B = Shape(28, 1024, 16, 8, 128, 3072, vocab=1024, sequences=14, tokens=512)


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far apart two outputs are: max |a - b|, cosine of the whole, and ‖a - b‖ / ‖b‖."""

    max_abs: float
    cosine: float
    relative: float


@dataclasses.dataclass
class Result:
    """What a run of the demo found. Times are medians in milliseconds.

    Compile times are not among them: the second compile finds kernels that the first one made.
    """

    device: str
    shape: Shape
    quantisation: str
    explanation: Explanation
    verification: Verification
    distances: dict[str, Distance]
    run_ms: dict[str, float]
    how_timed: str

    @property
    def ok(self) -> bool:
        return self.verification.ok

    @property
    def outputs_ok(self) -> bool:
        """Whether this backend's output is no further from eager than stock's, but for another rounding."""
        return self.verification.end_to_end is None or self.verification.end_to_end.ok

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "device": self.device,
            "shape": dataclasses.asdict(self.shape),
            "quantisation": self.quantisation,
            "counts": self.explanation.counts(),
            "near_misses": len(self.explanation.refusals),
            "outputs": {pair: dataclasses.asdict(distance) for pair, distance in self.distances.items()},
            "verify": self.verification.to_dict(),
            "run_ms": self.run_ms,
            "how_timed": self.how_timed,
        }


class Fp8Linear(torch.nn.Module):
    """A linear layer in FP8 with one dynamic scale a row of its input and one static scale a row of its weight.

    As in torchao ``amax / 448`` is taken in the input's dtype and the scale is fp32 from there on.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight, scale = quantise_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.scaled_mm = scaled_mm_works(weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, scale = quantise_rows(x)
        rows, row_scale = q.view(-1, q.shape[-1]), scale.view(-1, 1)
        if self.scaled_mm:
            out = torch._scaled_mm(rows, self.weight.t(), row_scale, self.scale.t(), out_dtype=x.dtype)
        else:
            out = ((rows.float() * row_scale) @ (self.weight.float() * self.scale).t()).to(x.dtype)
        out = out.view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 data and an fp32 scale a row, as torchao's ``PerRow`` computes them."""
    scale = (x.abs().amax(-1, keepdim=True) / 448.0).float()
    return (x.float() / scale).clamp(-448.0, 448.0).to(E4M3), scale


@functools.cache
def scaled_mm_works(device: torch.device) -> bool:
    """Whether ``torch._scaled_mm`` takes row-wise scales: from capability 8.9 on; on a CPU from torch 2.13 on."""
    a, one = torch.ones(16, 16, device=device).to(E4M3), torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(a, a.t(), one, one.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def build(shape: Shape, device: str) -> tuple[Forward, torch.Tensor, str]:
    """The model as a function of token ids, ids for it, and how its linear layers were quantised."""
    with quiet("torchao", "torch.utils._pytree"):
        try:
            from transformers import Qwen3Config, Qwen3Model
        except ImportError as error:
            raise DemoError(f"the demo needs transformers ({error}); pip install 'inductor-ext[demo]'") from error
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )
    torch.manual_seed(0)
    model: torch.nn.Module = Qwen3Model(config)
    model = model.to(device=device, dtype=torch.bfloat16).eval().requires_grad_(False)
    how = quantise(model, device)
    ids = torch.randint(0, shape.vocab, (shape.sequences, shape.tokens), device=device)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).last_hidden_state

    return forward, ids, how


def quantise(model: torch.nn.Module, device: str) -> str:
    """Make the linear layers FP8 in place, by torchao where it can; says how."""
    reason = "torchao's FP8 needs a GPU"
    if device == "cuda":
        if torch.cuda.get_device_capability() < (8, 9):
            reason = "torchao's FP8 needs compute capability 8.9"
        else:
            try:
                return _quantise_torchao(model)
            except Exception as error:  # whatever a version of torchao dislikes about a version of torch
                reason = f"torchao refused: {type(error).__name__}: {error}"
    _replace_linears(model)
    product = "torch._scaled_mm" if scaled_mm_works(torch.device(device)) else "a dequantised product"
    return f"FP8 row-wise dynamic, torchao's arithmetic in torch operators with {product} ({reason})"


def _quantise_torchao(model: torch.nn.Module) -> str:
    with quiet("torchao", "torch.utils._pytree"):
        import torchao
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return f"FP8 row-wise dynamic by torchao {torchao.__version__}"


def _replace_linears(module: torch.nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, Fp8Linear(child))
        else:
            _replace_linears(child)


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Hide what libraries say while they are imported: which optional binaries of theirs do not load here."""
    chosen = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in chosen]
    for logger in chosen:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(chosen, levels):
            logger.setLevel(level)


Stage = Callable[[str], contextlib.AbstractContextManager[Any]]


@torch.no_grad()
def run(shape: Shape | None = None, device: str | None = None, stage: Stage = contextlib.nullcontext) -> Result:
    """Everything the demo does. ``stage(title)`` is entered around each step, for a progress display."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = shape or (QWEN3_06B if device == "cuda" else SMALL)
    outputs: dict[str, torch.Tensor] = {}
    with stage("Building the model"):
        forward, ids, how = build(shape, device)
        outputs["eager"] = forward(ids)
    with stage("Starting Inductor"):  # its imports and its compiler's first start belong to neither side
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
    ours = torch.compile(forward, backend=backend(progress=False))  # the demo has a progress display of its own
    runs: dict[str, Forward] = {"stock": torch.compile(forward), "inductor_ext": ours}
    for name, compiled in runs.items():
        with stage(f"Compiling with {name}"):
            outputs[name] = compiled(ids).clone()
    with stage("Comparing each rewrite with what it replaced"):
        verification = verify(forward, ids, end_to_end=False)
    names = [("inductor_ext", "stock"), ("inductor_ext", "eager"), ("stock", "eager")]
    distances = {f"{a} to {b}": distance(outputs[a], outputs[b]) for a, b in names}
    verification.end_to_end = EndToEnd(*(distances[pair].relative for pair in _PAIRS))
    with stage("Timing"):
        how_timed, run_ms = timed({name: functools.partial(compiled, ids) for name, compiled in runs.items()}, device)
    device_name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return Result(device_name, shape, how, Explanation(verification.graphs), verification, distances, run_ms, how_timed)


_PAIRS = ("stock to eager", "inductor_ext to eager", "inductor_ext to stock")


def distance(a: torch.Tensor, b: torch.Tensor) -> Distance:
    a, b = a.double().flatten(), b.double().flatten()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
    return Distance(float((a - b).abs().max()), float(cosine), float((a - b).norm() / b.norm()))


def timed(calls: dict[str, Callable[[], Any]], device: str, rounds: int = 30) -> tuple[str, dict[str, float]]:
    """How it was timed, and median milliseconds of each call. The calls take turns, so that drift hits all alike."""
    once = _timer_cuda if device == "cuda" else _timer_cpu
    timers = {name: once(call) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, timer in timers.items():
            found[name].append(timer())
    what = "CUDA-graph replays" if device == "cuda" else "wall-clock times"
    return f"median of {rounds} {what}", {name: statistics.median(times) for name, times in found.items()}


def _timer_cpu(call: Callable[[], Any]) -> Callable[[], float]:
    call()

    def once() -> float:
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3

    return once


def _timer_cuda(call: Callable[[], Any]) -> Callable[[], float]:
    """Replays of a CUDA graph of the call, so that the GPU is timed and not Python."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    return once
