"""fp8_downcast, downcast_fp8 and fp8_quantize on one GPU: time against a device copy and stock Inductor, bytes against eager.

    python -m benchmarks.kernels.downcast --check --time --out benchmarks/results/h200/downcast.json

Times are CUDA-graph replays, median. Large sizes rotate over enough buffers to find L2 cold. `copy` is a device-to-device copy
that reads and writes as many bytes together, in the same run; `of copy` is its time over ours. A whole-tensor amax must read
its input twice: its bytes are 2 reads and 1 write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer

from benchmarks import timing
from benchmarks.kernels.downcast_checks import checks
from benchmarks.kernels.downcast_units import (
    BF16,
    DIVISION,
    E4,
    E5,
    F32,
    IN_DTYPES,
    chains,
    quantize,
    quantize_unit,
    recipes,
    static,
    static_unit,
    steps,
    store,
    store_unit,
)
from benchmarks.kernels.local_build import build
from benchmarks.kernels.shared import Out

TIME_UNITS = [
    static_unit(BF16, E4),
    static_unit(F32, E4),
    quantize_unit(BF16, E4, "torchao"),
    quantize_unit(BF16, E4, "recip"),
    store_unit(BF16, E4, torch.int64),
]
CHECK_UNITS = [DIVISION, *(static_unit(x, fp8) for x in IN_DTYPES for fp8 in (E4, E5))]


# ---- times ----


class Times:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.copies: dict[int, float] = {}

    def add(self, kernel: str, size: str, nbytes: int, calls: dict[str, list[Callable[[], Any]]]) -> None:
        if nbytes not in self.copies:
            self.copies[nbytes] = timing.copy_time(nbytes)
        copy = self.copies[nbytes]
        row: dict[str, Any] = {"kernel": kernel, "size": size, "bytes": nbytes, "copy_us": copy * 1e6}
        for name, variants in calls.items():
            try:
                row[f"{name}_us"] = timing.graph_time(variants) * 1e6
            except Exception as error:
                row[f"{name}_error"] = f"{type(error).__name__}: {error}"[:200]
                print(row[f"{name}_error"], flush=True)
        row["of_copy"] = row["copy_us"] / row["ours_us"]
        row["tb_s"] = nbytes / row["ours_us"] * 1e-6
        if "stock_us" in row:
            row["stock_over_ours"] = row["stock_us"] / row["ours_us"]
        self.rows.append(row)
        line = "  ".join(f"{key} {value:.3f}" for key, value in row.items() if isinstance(value, float))
        print(f"{kernel:26} {size:16} {line}", flush=True)


def cold(make: Callable[[], Any], nbytes: int) -> list[Any]:
    return [make() for _ in range(timing.sets_for(nbytes))]


def time_static(times: Times, modules: dict[str, Any]) -> None:
    s = torch.tensor(0.37, device="cuda")
    stock = torch.compile(lambda x, s: (x.float() / s).clamp(-448.0, 448.0).to(E4), dynamic=False)
    for dtype, name, sizes in (
        (BF16, "f32_div", ((65536, 1024), (65536, 8192), (7168, 3072), (128, 4096), (1, 4096))),
        (BF16, "mul", ((65536, 8192), (7168, 3072))),
        (BF16, "f32_mul_const", ((7168, 3072),)),
        (BF16, "row_div", ((65536, 1024), (7168, 3072))),
        (F32, "f32_div", ((65536, 1024), (7168, 3072))),
    ):
        for shape in sizes:
            torch._dynamo.reset()
            n = shape[0] * shape[1]
            nbytes = n * (dtype.itemsize + 1)
            sets = cold(
                lambda: (torch.randn(shape, device="cuda", dtype=dtype), torch.empty(shape, dtype=E4, device="cuda")), nbytes
            )
            operand = torch.rand(shape[0], 1, device="cuda") + 0.1 if name == "row_div" else None if "const" in name else s
            module = modules[static_unit(dtype, E4).name]
            calls = {"ours": [lambda x=x, o=o: static(module, name, E4, x, o, operand) for x, o in sets]}
            if name == "f32_div":
                calls["stock"] = [lambda x=x: stock(x, s) for x, _ in sets]
            times.add(f"downcast {str(dtype)[6:]} {name}", f"{list(shape)}", nbytes, calls)
            del sets, calls
            torch.cuda.empty_cache()


def stock_row(x: torch.Tensor) -> Any:
    scale = (x.abs().amax(-1, keepdim=True) / 448.0).float()
    return (x.float() / scale).clamp(-448.0, 448.0).to(E4), scale


def stock_tensor(x: torch.Tensor) -> Any:
    scale = (x.abs().amax() / 448.0).float()
    return (x.float() / scale).clamp(-448.0, 448.0).to(E4), scale


def time_quantize(times: Times, modules: dict[str, Any]) -> None:
    module = modules[quantize_unit(BF16, E4, "torchao").name]
    recip = modules[quantize_unit(BF16, E4, "recip").name]
    workspace = torch.empty(1024, device="cuda")
    for kind, sizes, stock in (
        ("row", ((65536, 1024), (65536, 8192), (7168, 3072), (524288, 128), (65536, 4096), (16384, 16384), (4096, 32768),
                 (128, 4096), (1, 4096)), torch.compile(stock_row, dynamic=False)),
        ("tensor", ((65536, 1024), (65536, 8192), (7168, 3072), (128, 4096)), torch.compile(stock_tensor, dynamic=False)),
    ):  # fmt: skip
        for shape in sizes:
            torch._dynamo.reset()
            rows, cols = shape
            nbytes = rows * cols * (3 if kind == "row" else 5)  # scales left out: the copy of an odd size is a slow one
            sets = cold(lambda: (
                torch.randn(shape, device="cuda", dtype=BF16), torch.empty(shape, dtype=E4, device="cuda"),
                torch.empty(rows if kind == "row" else 1, device="cuda"),
            ), nbytes)  # fmt: skip
            more = [workspace] if kind == "tensor" else []
            calls = {
                "ours": [lambda t=t: quantize(module, kind, "torchao", E4, *t, *more) for t in sets],
                "stock": [lambda t=t: stock(t[0]) for t in sets],
                "recip": [lambda t=t: quantize(recip, kind, "recip", E4, *t, *more) for t in sets],
            }
            times.add(f"quantize {kind}", f"{list(shape)}", nbytes, calls)
            del sets, calls
            torch.cuda.empty_cache()


def time_store(times: Times, modules: dict[str, Any]) -> None:
    module = modules[store_unit(BF16, E4, torch.int64).name]
    ks, vs = torch.tensor(0.37, device="cuda"), torch.tensor(1.7, device="cuda")

    def eager(k: Any, v: Any, kc: Any, vc: Any, loc: Any) -> None:
        kc[loc] = (k.float() / ks).clamp(-448.0, 448.0).to(E4)
        vc[loc] = (v.float() / vs).clamp(-448.0, 448.0).to(E4)

    h, d, slots = 8, 128, 131072
    for tokens in (1, 16, 128, 512, 1024, 2048, 7168, 16384, 32768, 65536):
        nbytes = tokens * (h * d * 2 * 3 + 8)
        small = tokens <= 2048  # hot in L2, as rows that a GEMM has just written are
        torch._dynamo.reset()
        stock = torch.compile(eager, dynamic=False)
        for what in ("random rows", "rows in order") if not small else ("random rows",):

            def make() -> Any:
                qkv = torch.randn(tokens, 3 * h, d, device="cuda", dtype=BF16)
                caches = [torch.zeros(slots, h, d, dtype=torch.uint8, device="cuda").view(E4) for _ in range(2)]
                rows = (
                    torch.randperm(slots, device="cuda")[:tokens]
                    if what == "random rows"
                    else torch.arange(tokens, device="cuda")
                )
                return qkv[:, h : 2 * h], qkv[:, 2 * h :], *caches, rows

            sets = [make()] if small else [make() for _ in range(timing.sets_for(nbytes))]
            calls = {
                "ours": [lambda t=t: store(module, E4, *t[:4], ks, vs, t[4]) for t in sets],
                "no_loc": [lambda t=t: store(module, E4, *t[:4], ks, vs, None) for t in sets],
            }
            if what == "random rows":
                calls["stock"] = [lambda t=t: stock(*t) for t in sets]
            times.add(f"KV store, {what}", f"T={tokens}", nbytes, calls)
            del sets, calls
            torch.cuda.empty_cache()
        if not small:  # every row the same: what repeats cost at worst
            t = make()
            one = torch.full_like(t[4], 3)
            times.add("KV store, one row", f"T={tokens}", nbytes, {"ours": [lambda: store(module, E4, *t[:4], ks, vs, one)]})


def host_overhead(modules: dict[str, Any]) -> dict[str, float]:
    x, out, s = (
        torch.randn(1, 4096, device="cuda", dtype=BF16),
        torch.empty(1, 4096, dtype=E4, device="cuda"),
        torch.ones((), device="cuda"),
    )
    k, cache = torch.randn(1, 8, 128, device="cuda", dtype=BF16), torch.zeros(64, 8, 128, dtype=torch.uint8, device="cuda")
    loc, scale = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.empty(1, 1, device="cuda")
    stat, kv = modules[static_unit(BF16, E4).name].f32_div, modules[store_unit(BF16, E4, torch.int64).name].run
    quant = modules[quantize_unit(BF16, E4, "torchao").name].row
    clamps, scaled = steps.padded_constants(chains(E4)["f32_div"]), steps.padded_constants(*recipes(E4)["torchao"])
    return {
        "fp8_downcast": timing.call_time(lambda: stat(x, out, s, None, None, None, *clamps)) * 1e6,
        "downcast_fp8": timing.call_time(lambda: kv(k, k, cache, cache, s, s, loc, 1, 0, False, False, *clamps)) * 1e6,
        "fp8_quantize row": timing.call_time(lambda: quant(x, out, scale, None, *scaled)) * 1e6,
    }


def main(
    check: Annotated[bool, typer.Option("--check", help="Check the arithmetic first.")] = False,
    time: Annotated[bool, typer.Option("--time", help="Time everything.")] = False,
    out: Out = None,
) -> None:
    units = {unit.name: unit for unit in (CHECK_UNITS if check else []) + (TIME_UNITS if time else [])}
    modules = build(list(units.values()))
    print("built", len(modules), flush=True)
    payload: dict[str, Any] = {}
    failed: list[str] = []
    if check:
        found = list(checks(modules))
        failed = [f"{name}: {wrong}" for name, wrong in found if wrong]
        payload["checks"] = {"run": len(found), "failed": failed}
        print(*failed, f"{len(found)} checks, {len(failed)} failed", sep="\n", flush=True)
    if time:
        times = Times()
        payload["rows"] = times.rows
        payload["copy_tb_s"] = timing.copy_bandwidth() * 1e-12
        print(f"copy {payload['copy_tb_s']:.3f} TB/s", flush=True)
        for part in (time_static, time_quantize, time_store):
            part(times, modules)
        payload["host_us"] = host_overhead(modules)
        print(payload["host_us"])
    if out is not None:
        timing.write_json(out, payload)
    raise typer.Exit(bool(failed))


if __name__ == "__main__":
    typer.run(main)
