"""docs/results.md and the table in README.md, made from the JSON under benchmarks/results.

    python -m benchmarks.report             writes both; a test compares what is committed with what this makes

What the page says is in results.md.j2, with a call wherever a table stands; the functions below make the tables. Every number
is read from a file that the page names, and rounded.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from inductor_ext.bench import summary

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->"  # around the table in it
RESULTS = ROOT / "benchmarks" / "results"
Row = Mapping[str, Any]


def read(name: str, gpu: str = "h200") -> Any:
    return summary.read(RESULTS / gpu / f"{name}.json")


def source(*names: str, gpu: str = "h200") -> str:
    """Where a table's numbers are from, and when they were measured."""
    links = [f"[{name}.json](../benchmarks/results/{gpu}/{name}.json)" for name in names]
    dates = sorted({read(name, gpu)["environment"].get("date", "") for name in names} - {""})
    return f"From {', '.join([*links, ' and '.join(dates)] if dates else links)}."


# ---- Markdown --------------------------------------------------------------------------------------------------------


def table(rows: Iterable[Row]) -> str:
    """A line a row, a column a key."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(key, "")) for key in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def grid(rows: Iterable[Row], title: str, size: str, line: Callable[[Row], str], cell: Callable[[Row], str]) -> str:
    """Rows of the same ``line`` side by side, a column for each ``size``."""
    lines: dict[str, dict[Any, str]] = {}
    for row in rows:
        lines.setdefault(line(row), {})[row[size]] = cell(row)
    columns = sorted({key for cells in lines.values() for key in cells})
    return table({title: name, **{f"{key:,}": cells.get(key, "") for key in columns}} for name, cells in lines.items())


def number(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def f2(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def us(row: Row) -> dict[str, str]:
    return {"stock, µs": number(row["stock_us"]), "this, µs": number(row["ours_us"])}


def by_size(text: str) -> str:
    return text.strip("[]").replace(", ", " × ").replace("x", " × ")


def scales(rows: Iterable[Row], title: str, size: str, line: Callable[[Row], str], ratio: str = "ratio") -> str:
    """`grid` of ratios, row-wise / tensor-wise."""
    found: dict[tuple[str, Any], dict[bool, str]] = {}
    for row in rows:
        found.setdefault((line(row), row[size]), {})[row["rowwise"]] = f2(row[ratio])
    made = [
        {"line": name, size: m, "cell": " / ".join(each.get(x, "–") for x in (True, False))}
        for (name, m), each in found.items()
    ]
    return grid(made, title, size, lambda row: row["line"], lambda row: row["cell"])


# ---- whole models ----------------------------------------------------------------------------------------------------


def sides(name: str) -> dict[str, Any]:
    return {side["name"]: side for side in read(name)["sides"]}


RECIPES = {"PerRow": "model_qwen3_row", "PerTensor": "model_qwen3_tensor"}


def qwen3_steps() -> str:
    rows = []
    for recipe, name in RECIPES.items():
        stock, ours = (sides(name)[side] for side in ("stock", "ours"))
        apart = ours["cosine_to_bf16"]
        launches = [str(sum(part["launches"] for part in side["breakdown"].values())) for side in (stock, ours)]
        rows.append({
            "torchao": recipe, "stock, ms": f2(stock["step_ms"]), "this, ms": f2(ours["step_ms"]),
            "speed": f"{f2(ours['of_stock'])}×", "launches": " → ".join(launches),
            "cosine to bf16: stock": f"{stock['cosine_to_bf16']['mean']:.5f}", "this": f"{apart['mean']:.5f}",
            "difference": f"{apart['less_stock']:+.5f} ± {apart['standard_error']:.5f}",
        })  # fmt: skip
    return table(rows)


def qwen3_parts() -> str:
    rows = []
    for recipe, name in RECIPES.items():
        for side in ("stock", "ours"):
            parts = sides(name)[side]["breakdown"]
            rows.append({"side": f"{side}, {recipe}", **{kind: f"{part['us']:,.0f}" for kind, part in parts.items()}})
    floor = read(RECIPES["PerRow"])["floor"]["us"]
    return table([*rows, {"side": "floor", **{kind: f"{us:,.0f}" for kind, us in floor.items()}}])


def ablation() -> str:
    rows, before = [], None
    for side in read("ablation_row")["sides"]:
        if side["error"]:
            rows.append({"side": side["name"], "step, ms": f"none: {side['error']}"})
            continue
        saved = "" if before is None else f"{before - side['step_ms']:+.3f}"
        rows.append(
            {"side": side["name"], "step, ms": f"{side['step_ms']:.3f}", "speed": f2(side["of_stock"]), "saved, ms": saved}
        )
        before = side["step_ms"]
    return table(rows)


def families() -> str:
    rows = []
    for model in read("suite")["suite"]:
        launches = [sum(part["launches"] for part in model["breakdown"][side].values()) for side in ("stock", "ours")]
        apart = model["cosine_to_bf16"]["ours"]
        rows.append({
            "model": model["model"], "texts × tokens": model["workload"], "stock, ms": f2(model["stock_ms"]),
            "this, ms": f2(model["ours_ms"]), "speed": f"{f2(model['of_stock'])}×", "floor, ms": f2(model["floor_ms"]),
            "launches": " → ".join(map(str, launches)),
            "cosine to bf16, less stock's": f"{apart['less_stock']:+.5f} ± {apart['standard_error']:.5f}",
        })  # fmt: skip
    return table(rows)


def llama() -> str:
    rows = []
    for name in ("llama_prefill", "llama_decode_1", "llama_decode_16", "llama_decode_64", "llama_decode_1_grouped"):
        result, (stock, ours) = read(name), (sides(name)[side] for side in ("stock", "ours"))
        forced = re.search(r"--rules (\S+)", result["environment"]["command"])
        layer = [f"{side['breakdown']['attention']['us'] / result['model']['layers']:.0f}" for side in (stock, ours)]
        rows.append({
            "work": result["what"].partition("; ")[2].replace("1 sequences", "1 sequence"), "stock, ms": f2(stock["step_ms"]),
            "this, ms": f2(ours["step_ms"]), "speed": f"{f2(ours['of_stock'])}×", "attention of a layer, µs": " → ".join(layer),
            "remark": result.get("note", f"`--rules {forced[1]}`" if forced else ""),
        })  # fmt: skip
    return table(rows)


def packed() -> str:
    rows = []
    for name, side in read("packed_qwen3")["sides"].items():
        parts = {f"{kind}, µs": f"{part['us']:,.0f}" for kind, part in side["parts"].items()}
        head = {"side": name, "step, ms": f2(side["step_ms"]), "speed": f"{f2(side['speedup'])}×"}
        rows.append({**head, **parts, "least cosine to stock": f"{side['cosine']:.4f}"})
    return table(rows)


def experts() -> str:
    return table(
        {"tokens": f"{row['tokens']:,}", "activations": f'`"{name}"`', "stock in bf16, ms": f2(row["stock, ms"]),
         "this, ms": f2(row["ours, ms"]), "speed": f"{f2(row['stock, ms'] / row['ours, ms'])}×",
         "cosine to bf16": f"{row['cosine, ours']:.3f}"}
        for name in ("fp8", "bf16") for row in read(f"moe_mxfp8_{name}")["rows"]
    )  # fmt: skip


# ---- casts and stores ------------------------------------------------------------------------------------------------

CASTS = {
    "downcast bfloat16 f32_div": "`fp8_downcast`, static scale, bf16", "quantize row": "`fp8_quantize`, a scale a row",
    "downcast float32 f32_div": "`fp8_downcast`, static scale, fp32", "quantize tensor": "`fp8_quantize`, one scale",
}  # fmt: skip
STORES = {
    "direct": "`cache[slots] = …`", "view": "through `.view`", "unbind": "caches from `[2, …].unbind(0)`",
    "uint8_view": "uint8 cache viewed as e4m3", "slice": "`cache[a:b] = …`",
}  # fmt: skip


def casts() -> str:
    return table(
        {"kernel": CASTS[row["kernel"]], "size": by_size(row["size"]), **us(row), "speed": f2(row["stock_over_ours"]),
         "of a copy's speed": f2(row["of_copy"])}
        for row in read("downcast")["rows"] if row["kernel"] in CASTS and "stock_us" in row
    )  # fmt: skip


def slow_copy() -> str:
    """Of the one kernel whose copy was slow, the rate over that of copies."""
    result = read("downcast")
    (rate,) = [row["tb_s"] for row in result["rows"] if row["bytes"] > 1 << 30 and row["of_copy"] > 1.1]
    return f2(rate / result["copy_tb_s"])


def stores() -> str:
    arrow = lambda row: f"{number(row['stock_us'])} → {number(row['ours_us'])}"  # noqa: E731
    return grid(read("kv_cache_compiled")["rows"], "store", "T", lambda row: STORES[row["form"]], arrow)


# ---- products --------------------------------------------------------------------------------------------------------


def products(accumulation: str) -> str:
    rows = [
        {**shape, "m": m, "ratio": ratio, "rowwise": shape["kind"].startswith("row")}
        for shape in read("scaled_mm")["shapes"] if accumulation in shape["kind"]
        for m, ratio in zip(shape["m"], shape["ratio"])
    ]  # fmt: skip
    return scales(rows, "N × K", "m", lambda row: f"{row['n']} × {row['k']}")


def product_means() -> str:
    columns = {"grid": "Qwen3-0.6B", "llama and 8192": "Llama-3.1-8B and 8192³", "all": "all", "lowest": "slowest"}
    means = read("scaled_mm")["summary"]
    return table(
        {"scales and accumulation": kind, **{title: f2(mean[name]) for name, title in columns.items()}}
        for kind, mean in means.items()
    )


def collectives() -> float:
    timed = [shape for shape in read("scaled_mm")["shapes"] if "collectives_us" in shape]
    lists = [zip(shape["collectives_us"], shape["ours_us"], shape["stock_us"]) for shape in timed]
    return statistics.geometric_mean(theirs / (ours or stock) for each in lists for theirs, ours, stock in each)


def call_costs() -> str:
    return "; ".join(f"{name} {us:.1f}" for name, us in read("scaled_mm")["call_us"].items())


def siblings() -> str:
    names = {3: "q, k, v", 2: "gate, up"}
    return scales(read("scaled_mm")["siblings"], "products", "m", lambda row: names[len(row["widths"])], "ratio_to_stock")


def autotuned() -> str:
    return table(
        {"M × N × K": f"{row['m']} × {row['n']} × {row['k']}", "scales": "row-wise" if row["rowwise"] else "tensor-wise",
         **us(row), "winner": row["ours_takes"], "speed": f2(row["ratio"])}
        for row in read("scaled_mm_max_autotune")["rows"]
    )  # fmt: skip


def fused(name: str) -> str:
    return scales(read(name)["rows"], "N × K", "m", lambda row: f"{row['n']} × {row['k']} {row.get('model', '')}".strip())


# ---- the other kernels -----------------------------------------------------------------------------------------------


def works(rows: Sequence[Row], ratio: str) -> str:
    return grid(rows, "work, columns", "rows", lambda row: f"{row['work']}, {row['columns']:,}", lambda row: f2(row[ratio]))


def producers() -> str:
    return works([*read("producers")["rows"], *read("producers_static")["rows"]], "ratio")


def one_scale() -> str:
    return works(read("one_scale")["rows"], "auto/stock")


def rotation_stores() -> str:
    return table(
        {"model": row["model"], "cache": row["cache"], "tokens": f"{row['tokens']:,}", "stock, µs": number(row["stock_us"]),
         "two launches, µs": number(row["two_us"]), "one, µs": number(row["together_us"]), "stock / one": f2(row["to_stock"]),
         "two / one": f2(row["to_two"])}
        for row in read("qk_norm_rope_store")["rows"]
    )  # fmt: skip


def attention() -> str:
    rows = []
    for row in read("attention")["shapes"]:
        taken = {side: cell[0] for side, cell in row.items() if isinstance(cell, list)}
        ours = taken["hopper, batch"]
        rows.append({
            "sequences": row["sequences"], "this, µs": number(ours), "TFLOP/s": f"{row['GFLOP'] / ours * 1e3:.0f}",
            "PyTorch / this": f2(row["hopper, batch"][1]), "cuDNN / this": f2(taken["cudnn, batch"] / ours),
            "packed: torch / this": f2(taken["torch, packed"] / taken["hopper, packed"]),
        })  # fmt: skip
    return table(rows)


def grouped(side: str) -> str:
    return grid(
        read("mxfp8_grouped_mm")["rows"], "N × K", "tokens", lambda row: f"{row['model']}, {row['n']} × {row['k']}",
        lambda row: f"{f2(row[f'{side}_ratio'])} / {f2(row[f'{side}_ratio_fp8'])}",
    )  # fmt: skip


def grouped_means() -> str:
    means = read("mxfp8_grouped_mm")["summary"]
    over = {"ratio": "bf16", "ratio_fp8": "row-wise FP8"}
    return table(
        {"tokens": kind, "bound by": bound, "relative to": title, **{name: f2(value) for name, value in found.items()}}
        for side, kind in (("ours_fp8", "FP8"), ("ours", "bf16")) for bound in ("weights", "products")
        for name, title in over.items() for found in [means[f"{side}, bound by {bound}, {name}"]]
    )  # fmt: skip


def quantised() -> str:
    compared = ("inductor", "torchao")
    return table(
        {"shape": by_size(row["shape"]), "dtype": row["dtype"], "scales": row["scales"], "groups": row["groups"] or "",
         "this, µs": number(row["ours_us"]), **{f"{side} / this": f2(row.get(f"{side}/ours", math.nan)) for side in compared},
         "of a copy's speed": f2(row["of_copy"])}
        for row in read("mxfp8_quantize")["rows"]
    )  # fmt: skip


def combined() -> str:
    return table(
        {"tokens": f"{row['tokens']:,}", "experts a token": row["k"], "hidden": row["hidden"], **us(row),
         "speed": f2(row["ratio"]), "of a copy's speed": f2(row["of_copy"])}
        for row in read("moe_combine")["rows"]
    )  # fmt: skip


def chunks() -> str:
    return table(
        {"model": row["model"], "tokens": f"{row['tokens']:,}", "all at once, µs": number(row["us"][0]),
         **{f"in {count}": f2(ratio) for count, ratio in zip(row["chunks"][1:], row["ratio"][1:])}}
        for row in read("mlp_chunks")["rows"]
    )  # fmt: skip


def trust() -> str:
    rows = read("trust")["table"]
    return table({name: re.sub(r", \d+ s", "", cell) for name, cell in row.items()} for row in rows)


def compile_times() -> str:
    rows = []
    for model, sides in read("compile_time")["models"].items():
        stock, cold, warm = (sides[side]["compile_s"] for side in ("stock", "cold", "warm"))
        rows.append(
            {
                "model": model,
                "stock": f"{stock:.1f} s",
                "ours, no kernel built yet": f"{cold:.1f} s, {cold / stock:.2f} of stock",
                "ours, kernels built": f"{warm:.1f} s, {warm / stock:.2f} of stock",
            }
        )
    return table(rows)


TABLES = (
    qwen3_steps, qwen3_parts, ablation, families, llama, packed, experts, casts, slow_copy, stores, products, product_means,
    collectives, call_costs, siblings, autotuned, fused, producers, one_scale, rotation_stores, attention, grouped,
    grouped_means, quantised, combined, chunks, trust, compile_times,
)  # fmt: skip


def page() -> str:
    environments = [summary.read(path).get("environment") for path in sorted((RESULTS / "h200").glob("*.json"))]
    ((gpu, torch),) = {(each.get("gpu") or each["GPU"], each["torch"]) for each in environments if each}  # it says it of all
    known = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    known.filters["f2"] = f2
    known.globals.update({each.__name__: each for each in (read, source, *TABLES)})
    made: str = known.from_string(Path(__file__).with_name("results.md.j2").read_text(encoding="utf-8")).render(
        gpu=gpu, torch=torch, ms=lambda us: f"{us / 1e3:.1f}", build=read("scaled_mm_build", "nvcc"),
        qwen3=sides("model_qwen3_row"), autotune=sides("model_qwen3_max_autotune"),
        hf_packed=sides("model_qwen3_packed_8_layers"),
    )  # fmt: skip
    return made


def headline() -> str:
    """The README's table, and where its first step goes."""
    models = {
        "Qwen3-0.6B, 28 layers, 14 × 512 tokens, torchao PerRow": "model_qwen3_row",
        "the same, PerTensor": "model_qwen3_tensor",
        "Llama-3.1-8B's shape, 4 layers, static FP8, 8 × 1024 tokens": "llama_prefill",
        "the same, decoding 16 sequences with an FP8 KV cache of 2048 tokens": "llama_decode_16",
    }
    compared = {title: [sides(name)[side]["step_ms"] for side in ("stock", "ours")] for title, name in models.items()}
    by_hand, step = read("packed_qwen3")["sides"], read("moe_mxfp8_fp8")["rows"][0]
    compared["Qwen3-0.6B packed by hand, 8 layers, static FP8"] = [by_hand[side]["step_ms"] for side in ("stock", "ours")]
    suite = {model["model"]: model for model in read("suite")["suite"]}
    named = {"BERT-large": "BERT-large, 4 layers, 14 × 512 tokens, torchao PerRow", "Gemma-3-1B": "the same, Gemma-3-1B"}
    for model, title in named.items():
        compared[title] = [suite[model]["stock_ms"], suite[model]["ours_ms"]]
    title = f"Qwen3-30B-A3B's shape, 2 layers, {step['tokens']} tokens: experts in MXFP8, stock in bf16"
    compared[title] = [step["stock, ms"], step["ours, ms"]]
    rows = [
        {"one step on one NVIDIA H200": title, "stock `torch.compile`": f"{f2(stock)} ms", "this": f"{f2(ours)} ms",
         "speed": f"{f2(stock / ours)}×"}
        for title, (stock, ours) in compared.items()
    ]  # fmt: skip
    ours = sides("model_qwen3_row")["ours"]
    mean = f"The geometric mean of sixteen model families is {f2(read('suite')['geometric_mean'])}× (docs/results.md)."
    matmuls = f"Matmuls take {ours['breakdown']['GEMM']['us'] / 1e3:.1f} of the {ours['step_ms']:.1f} ms in the first line"
    return f"{table(rows)}\n\n{mean} {matmuls}: the time was saved in attention and in the memory-bound kernels.\n"


def with_headline(text: str) -> str:
    """A README with the table of `headline` between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + headline() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(with_headline(README.read_text(encoding="utf-8")), encoding="utf-8")
