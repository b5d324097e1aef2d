"""mxfp8_grouped_mm against PyTorch's grouped products, in bf16 and in row-wise FP8, for the experts of two models.

    python -m benchmarks.kernels.mxfp8_grouped_mm --out benchmarks/results/h200/mxfp8_grouped_mm.json    (--quick: six points)
    python -m benchmarks.kernels.mxfp8_grouped_mm --tune           every tile at every point, the fastest by tokens a group

Both matmuls of an expert of Qwen3-30B-A3B and of Mixtral-8x7B, uniform random routing. Every point is compared with fp64 of the
dequantised operands first. Times are CUDA-graph replays, in turn, medians of three rounds. Weights are cold in L2: where the
experts hit would fit it, each call of a graph hits others. TB/s count the weights of the experts hit, in the dtype that a side
reads. ``ours`` has x in bf16, ``ours, mx`` in MXFP8 and ``ours, fp8`` in FP8 with a scale a row (quantised beforehand, as for
row-wise FP8). 128 elements of K of the weights share a scale, as `quantize_moe_` makes them for FP8 tokens; ``ours, fp8, 32``
does not know that, and scales after every 32.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer

from benchmarks import timing
from benchmarks.kernels.shared import Out, built, show
from inductor_ext import jit, registry, settings
from inductor_ext.kernels.mxfp8_grouped_mm import hopper
from inductor_ext.kernels.mxfp8_grouped_mm.op import OP, dequantize
from inductor_ext.moe import mx

BF16, FP32, E4 = torch.bfloat16, torch.float32, mx.DATA
FEW_ROWS = 64  # an expert that is hit: up to here reading weights takes longer than multiplying
TOKENS = (1, 8, 64, 512, 4096, 16384)
#: experts, hidden, intermediate, experts a token
MODELS = {"Qwen3-30B-A3B": (128, 2048, 768, 8), "Mixtral-8x7B": (8, 4096, 14336, 2)}
QUICK = (("Qwen3-30B-A3B", 1), ("Qwen3-30B-A3B", 64), ("Qwen3-30B-A3B", 4096), ("Mixtral-8x7B", 8), ("Mixtral-8x7B", 4096))
LIMIT = 3e-3  # ‖out - fp64‖ / ‖fp64‖: bf16 rounds to 1.7e-3 on average
#: Our sides, and what x is in each.
OURS = {"ours": "bf16", "ours_mx": "mxfp8", "ours_fp8": "fp8_128", "ours_fp8_32": "fp8"}
FASTEST = 3  # tiles of each point that `tune` shows
Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Weights:
    """One matmul's weights, [E, N, K]."""

    model: str
    which: str
    top_k: int
    bf16: torch.Tensor
    data: torch.Tensor
    scale: torch.Tensor
    rowwise: torch.Tensor
    rowwise_scale: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Set:
    """What one call reads and writes besides weights."""

    offs: torch.Tensor
    x: torch.Tensor
    mx_x: torch.Tensor
    mx_scale: torch.Tensor
    rowwise_x: torch.Tensor
    rowwise_scale: torch.Tensor
    out: torch.Tensor


def to_rowwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448.0
    return (x.float() / scale).to(E4), scale.squeeze(-1)


def by_expert(x: torch.Tensor, convert: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """An expert at a time: fp32 copies of all of Mixtral's weights would take 15 GB."""
    pairs = [convert(each) for each in x]
    return tuple(
        torch.stack([each.view(torch.uint8) if each.itemsize == 1 else each for each in part]).view(part[0].dtype)
        for part in zip(*pairs)
    )


def weights(model: str, which: str) -> Weights:
    experts, hidden, intermediate, top_k = MODELS[model]
    n, k = (2 * intermediate, hidden) if which == "first" else (hidden, intermediate)
    bf16 = torch.empty(experts, n, k, device="cuda", dtype=BF16).normal_(std=0.02)
    quantised = by_expert(bf16, lambda w: mx.quantize(w, "rceil", 128))
    return Weights(model, which, top_k, bf16, *quantised, *by_expert(bf16, to_rowwise))


def make_sets(w: Weights, tokens: int) -> list[Set]:
    """Routings that hit other experts from call to call; one is enough where the experts hit are many times L2."""
    experts, n, k = w.data.shape
    torch.manual_seed(tokens)
    picks = torch.stack([torch.randperm(experts, device="cuda")[: w.top_k] for _ in range(tokens)]).flatten()
    hit = len(picks.unique())
    count = min(timing.sets_for(hit * n * k), max(experts // w.top_k, 1), 16)
    made = []
    for shift in range(max(count, 2)):
        counts = torch.bincount((picks + shift * w.top_k) % experts, minlength=experts)
        rows = tokens * w.top_k
        x = torch.randn(rows, k, device="cuda", dtype=BF16)
        offs, out = counts.cumsum(0).int(), torch.empty(rows, n, device="cuda", dtype=BF16)
        made.append(Set(offs, x, *mx.quantize(x, "rceil"), *to_rowwise(x), out))
    return made


# ---- sides -----------------------------------------------------------------------------------------------------------


def stock(w: Weights, s: Set) -> Run:
    right = w.bf16.transpose(-2, -1)
    return lambda: torch._grouped_mm(s.x, right, offs=s.offs)


def rowwise(w: Weights, s: Set) -> Run:
    right = w.rowwise.transpose(-2, -1)
    scales = s.rowwise_scale, w.rowwise_scale
    return lambda: torch._scaled_grouped_mm(s.rowwise_x, right, *scales, offs=s.offs, out_dtype=BF16, use_fast_accum=True)


def arguments(w: Weights, s: Set, kind: str) -> tuple[Any, ...]:
    rows = s.rowwise_x, s.rowwise_scale[:, None]
    x, scale = {"bf16": (s.x, None), "mxfp8": (s.mx_x, s.mx_scale)}.get(kind, rows)
    return x, scale, w.data, w.scale, s.offs, BF16, False, 128 if kind == "fp8_128" else 32


def ours(w: Weights, s: Set, kind: str) -> Run:
    """What a compiled graph calls."""
    given = arguments(w, s, kind)
    return lambda: OP._call(*given, out=s.out)


def with_tile(module: Any, key: Any, w: Weights, s: Set, kind: str) -> Run:
    run, given = hopper.bind(module, key), arguments(w, s, kind)
    return lambda: run(*given[:5], s.out)


def build(keys: Sequence[Any]) -> dict[Any, Any]:
    """The kernels of `hopper`'s keys, in parallel. The first failure ends the run."""
    arch = jit.current_arch(settings.current()) or ""
    if arch != hopper.TARGET:
        raise SystemExit(f"these kernels are for {hopper.TARGET}, found {arch or 'no GPU'}")
    specs = {key: OP.spec_of_key((arch, key), arch) for key in keys}
    made = built(specs.values())
    return {key: made[spec] for key, spec in specs.items()}


# ---- correctness -----------------------------------------------------------------------------------------------------


def error(w: Weights, s: Set, kind: str) -> float:
    """‖out - fp64‖ / ‖fp64‖ over all rows."""
    x, scale, data, w_scale, *_ = arguments(w, s, kind)
    if scale is None:
        x = x.double()
    elif kind == "mxfp8":
        x = dequantize(x, scale, torch.float64)
    else:
        x = x.double() * scale.double()
    ends, wrong, whole = s.offs.tolist(), 0.0, 0.0
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends)):
        if start == end:
            continue
        wanted = x[start:end] @ dequantize(data[expert], w_scale[expert], torch.float64).t()
        wrong += float((s.out[start:end].double() - wanted).square().sum())
        whole += float(wanted.square().sum())
    return (wrong / max(whole, 1e-300)) ** 0.5


def check(run: Run, w: Weights, s: Set, kind: str) -> float:
    s.out.fill_(torch.nan)
    run()
    return error(w, s, kind)


def wrong_at(found: float) -> bool:
    return not found < LIMIT  # NaN is wrong too


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(w: Weights, tokens: int) -> dict[str, Any]:
    sets = make_sets(w, tokens)
    experts, n, k = w.data.shape
    rows, hit = tokens * w.top_k, int((sets[0].offs.diff(prepend=sets[0].offs.new_zeros(1)) > 0).sum())
    row: dict[str, Any] = {"model": w.model, "which": w.which, "tokens": tokens, "rows": rows, "n": n, "k": k, "hit": hit}
    sides: dict[str, list[Run]] = {"bf16": [stock(w, s) for s in sets], "fp8": [rowwise(w, s) for s in sets]}
    for name, kind in OURS.items():
        sides[name] = [ours(w, s, kind) for s in sets]
        row[f"{name}_tile"] = hopper.tile(kind, rows, experts)
        row[f"{name}_error"] = max(check(run, w, s, kind) for run, s in list(zip(sides[name], sets))[:2])
    times = timing.in_turn(sides, replays=7, least_calls=8)
    row |= timing.medians(times)
    for name, found in times.items():
        us = statistics.median(found)
        row[f"{name}_tbs"] = round(hit * n * k * (2 if name == "bf16" else 1) / us * 1e-6, 3)
        row[f"{name}_tflops"] = round(2 * rows * n * k / us * 1e-6, 1)
    for name in OURS:
        row[f"{name}_ratio"] = timing.ratio(times["bf16"], times[name])
        row[f"{name}_ratio_fp8"] = timing.ratio(times["fp8"], times[name])
    return row


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is printed: of each of our sides µs, and its speed relative to bf16 and to row-wise FP8."""
    made = {key: row[key] for key in ("model", "which", "tokens", "bf16_us", "fp8_us")}
    for name in OURS:
        wrong = " WRONG" if wrong_at(row[f"{name}_error"]) else ""
        made[name] = f"{row[f'{name}_us']:.1f}{wrong}, {row[f'{name}_ratio']:.2f}, {row[f'{name}_ratio_fp8']:.2f}"
    return made


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means and least ratios of each of our sides, where weights bound the speed and where products do."""
    found: dict[str, Any] = {}
    for name in OURS:
        for bound in ("weights", "products"):
            some = [row for row in rows if (row["rows"] <= FEW_ROWS * row["hit"]) == (bound == "weights")]
            for over in ("ratio", "ratio_fp8"):
                each = [row[f"{name}_{over}"] for row in some]
                if each:
                    values = round(statistics.geometric_mean(each), 3), min(each)
                    found[f"{name}, bound by {bound}, {over}"] = dict(zip(("mean", "least"), values))
    return found


# ---- every tile ------------------------------------------------------------------------------------------------------


def tune(points: Sequence[tuple[str, str, int]]) -> list[dict[str, Any]]:
    keys = [(name, kind, BF16) for kind, names in hopper.ALL_TILES.items() for name in names]
    modules, rows = build(keys), []
    for (model, which), group in itertools.groupby(points, key=lambda point: point[:2]):
        w = weights(model, which)
        for _, _, tokens in group:
            sets = make_sets(w, tokens)
            mean = tokens * w.top_k / w.data.shape[0]
            for kind in hopper.ALL_TILES:
                found = {}
                for key in keys:
                    narrow = hopper.sizes(key[0])[1] * 16 < mean  # reads its weights sixteen times: not worth the time
                    if key[1] != kind or narrow:
                        continue
                    calls = [with_tile(modules[key], key, w, s, kind) for s in sets]
                    if wrong_at(check(calls[0], w, sets[0], kind)):
                        print(f"WRONG: {key[0]} {key[1]} {model} {which} {tokens}")
                        continue
                    found[key[0]] = round(timing.graph_time(calls, replays=5, least_calls=4) * 1e6, 2)
                chosen = hopper.tile(kind, tokens * w.top_k, w.data.shape[0])
                row = {"model": model, "which": which, "tokens": tokens, "mean": mean, "kind": kind}
                rows.append({**row, **fastest(found), "chosen": chosen, "chosen_us": found.get(chosen)})
            del sets
        del w
        torch.cuda.empty_cache()
    return rows


def fastest(us: dict[str, float]) -> dict[str, Any]:
    """What a row says of the tiles that were timed, and all of their times, which its summary leaves out."""
    ordered = sorted(us, key=us.__getitem__)[:FASTEST]
    return {"fastest": ordered, "fastest_us": [us[name] for name in ordered], "all_us": us}


# ---- main ------------------------------------------------------------------------------------------------------------


def main(
    out: Out = None,
    quick: Annotated[bool, typer.Option(help="A few points.")] = False,
    tune_tiles: Annotated[bool, typer.Option("--tune", help="Time every tile.")] = False,
) -> None:
    registry.ops()
    points = [
        (model, which, tokens)
        for model, which in itertools.product(MODELS, ("first", "second"))
        for tokens in TOKENS
        if not quick or (model, tokens) in QUICK
    ]
    if tune_tiles:
        tiles = tune(points)
        if out is not None:
            timing.write_json(out, {"tiles": tiles})
        show(sorted(tiles, key=lambda row: (row["kind"], row["mean"])), 200, without=("all_us",))
        return
    build([(name, kind, BF16) for kind, names in hopper.TILES.items() for _, name in names])
    rows = []
    for (model, which), group in itertools.groupby(points, key=lambda point: point[:2]):
        w = weights(model, which)
        rows += [measure(w, tokens) for _, _, tokens in group]
        del w
        torch.cuda.empty_cache()
    found = summary(rows)
    if out is not None:
        timing.write_json(out, {"how_timed": timing.HOW, "rows": rows, "summary": found})
    show([shown(row) for row in rows], 150)
    for name, ratios in found.items():
        print(f"{name}: geometric mean {ratios['mean']}, least {ratios['least']}")
    if any(wrong_at(row[name]) for row in rows for name in (f"{each}_error" for each in OURS)):
        raise SystemExit("wrong results: see the table")


if __name__ == "__main__":
    typer.run(main)
