"""Checks of the FP8 downcast kernels against eager PyTorch on the same device, byte for byte (NaN matching NaN)."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from downcast_units import BF16, E4, E5, F16, F32, IN_DTYPES, SHORT, chains, quantize, recipes, static, steps


class Report:
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def expect(self, name: str, ok: bool, detail: str = "") -> None:
        self.lines.append({"check": name, "ok": bool(ok), "detail": detail})
        if not ok:
            print(f"FAILED {name}: {detail}", flush=True)

    def run(self, name: str, check: Callable[..., None], *args: Any) -> None:
        try:
            check(self, *args)
            torch.cuda.synchronize()
        except Exception as error:  # a broken check must not hide the others
            self.expect(name, False, f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=4)}")

    def failed(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if not line["ok"]]


def differing(found: torch.Tensor, wanted: torch.Tensor) -> int:
    """How many FP8 elements differ, all NaN being equal."""
    a, b = found.view(torch.uint8), wanted.view(torch.uint8)
    first_nan = 0x7F if wanted.dtype == E4 else 0x7D
    nan = ((a & 0x7F) >= first_nan) & ((b & 0x7F) >= first_nan)
    return int(((a != b) & ~nan).sum())


def poisoned(x: torch.Tensor, fp8: torch.dtype) -> torch.Tensor:
    out = torch.empty_like(x, dtype=fp8)
    out.view(torch.uint8).fill_(0x55)
    return out


def adversarial(dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Over ten million values: every 16-bit pattern, or random bits, FP8 ties and bounds times ``scale`` and neighbours."""
    generator = torch.Generator("cuda").manual_seed(int(scale * 1000) + 1)
    if dtype != F32:
        patterns = torch.arange(-32768, 32768, dtype=torch.int32, device="cuda").to(torch.int16).view(dtype)
        random = torch.randn(10_000_000 // 8 * 8, generator=generator, device="cuda").mul(100 * scale).to(dtype)
        return torch.cat([patterns, random])
    bits = (
        torch.randint(-(2**31), 2**31, (8_000_000,), generator=generator, device="cuda", dtype=torch.int64)
        .to(torch.int32)
        .view(F32)
    )
    bytes_ = torch.arange(256, dtype=torch.uint8, device="cuda")
    ties = []
    for fp8 in (E4, E5):
        values = bytes_.view(fp8).float()
        values = values[values.isfinite()].sort().values
        ties += [values, (values[1:] + values[:-1]) / 2]
    edges = torch.tensor(
        [448, 464, 480, 57344, 61440, 65536, 0.0, 1e-45, 1e-40, 3.4e38, float("inf"), float("nan")], device="cuda"
    )
    edges = torch.cat([*ties, edges, -edges]) * scale
    near = torch.cat([(edges.view(torch.int32) + step).view(F32) for step in range(-4, 5)])
    normal = torch.randn(4_000_000, generator=generator, device="cuda") * (100 * scale)
    return torch.cat([bits, near, normal, -normal * 1e-3])


# ---- facts about eager ----


def eager_facts(report: Report) -> None:
    for dtype in (BF16, F16):
        x = torch.randn(1 << 20, device="cuda").to(dtype)
        s = torch.tensor(0.123456789, device="cuda")
        rounded = (x.float() * s.to(dtype).float()).to(dtype)
        kept = (x.float() * s).to(dtype)
        eager = x * s
        report.expect(f"fact: {SHORT[dtype]} * 0-d f32 CUDA tensor rounds the scalar first", torch.equal(eager, rounded),
                      f"equal to the unrounded product: {torch.equal(eager, kept)}")  # fmt: skip
        report.expect(f"fact: {SHORT[dtype]} * 0-d f32 CPU tensor does not round it", torch.equal(x * s.cpu(), kept))
        quotient = (x.float() / s.to(dtype).float()).to(dtype)
        report.expect(f"fact: {SHORT[dtype]} / 0-d f32 CUDA tensor rounds the scalar first, IEEE", torch.equal(x / s, quotient))
    for dtype in IN_DTYPES:
        x = torch.randn(1 << 20, device="cuda").to(dtype)
        inverse = torch.tensor(1.0, dtype=F32) / torch.tensor(447.3, dtype=F32)
        by_inverse = (x.float() * inverse.cuda()).to(dtype)
        by_division = (x.double() / float(torch.tensor(447.3, dtype=F32))).to(F32).to(dtype)
        eager = x / 447.3
        report.expect(f"fact: {SHORT[dtype]} / Python number multiplies by its fp32 reciprocal", torch.equal(eager, by_inverse),
                      f"equal to a true division: {torch.equal(eager, by_division)}")  # fmt: skip
        d = torch.tensor(447.3, device="cuda")
        if dtype == F32:
            report.expect("fact: f32 / 0-d CUDA tensor is a true division", torch.equal(x / d, by_division))
        nan = torch.full((8,), float("nan"), dtype=dtype, device="cuda")
        report.expect(f"fact: clamp keeps NaN ({SHORT[dtype]})", bool(nan.clamp(-448, 448).isnan().all()))
    ten = torch.full((4,), 10.0, dtype=BF16, device="cuda")
    report.expect(
        "fact: a Python bound is rounded to the result's dtype", torch.equal(ten.clamp(max=3.3), torch.full_like(ten, 3.3))
    )
    nan, tensor_nan = float("nan"), torch.tensor(float("nan"), dtype=BF16, device="cuda")
    for what, value in {
        "clamp(max=nan)": ten.clamp(max=nan), "clamp(min=nan)": ten.clamp(min=nan), "clamp_min(nan)": torch.clamp_min(ten, nan),
        "clamp_max(nan)": torch.clamp_max(ten, nan), "clamp(nan, 3)": ten.clamp(nan, 3.0), "clamp(3, nan)": ten.clamp(3.0, nan),
        "clamp_max(tensor nan)": torch.clamp_max(ten, tensor_nan), "clamp_min(tensor nan)": torch.clamp_min(ten, tensor_nan),
    }.items():  # fmt: skip
        report.expect(f"fact: 10.{what}", True, f"gives {float(value[0])}")
    minus = torch.tensor([-0.0] * 4, device="cuda").clamp(min=0.0)
    report.expect("fact: clamp(-0.0, min=0.0)", True, f"gives sign bit {bool(minus.signbit()[0])}")
    for fp8 in (E4, E5):
        nan = torch.tensor([float("nan"), -float("nan")], device="cuda").to(fp8).view(torch.uint8)
        report.expect(
            f"fact: NaN casts to NaN ({SHORT[fp8]})",
            bool(((nan & 0x7F) >= (0x7F if fp8 == E4 else 0x7D)).all()),
            str(nan.tolist()),
        )


def division(report: Report, module: Any) -> None:
    wrong = torch.zeros(1, dtype=torch.int64, device="cuda")
    first = torch.zeros(4, device="cuda")
    for name, seeds in (
        ("near_midpoints", [()]),
        ("all_bf16", [()]),
        ("all_f16", [()]),
        ("random_bits", [(s << 40,) for s in range(4)]),
    ):
        for seed in seeds:
            getattr(module, name)(wrong, first, *seed)
        report.expect(f"near division: {name}", int(wrong) == 0, f"{int(wrong)} differ; v, d, q, wanted {first.tolist()}")
        wrong.zero_()


# ---- fp8_downcast ----


def static_chains(report: Report, module: Any, dtype: torch.dtype, fp8: torch.dtype) -> None:
    for name, text in chains(fp8).items():
        if name == "row_div":
            continue
        scales = [0.0123, 1.0, 0.0, 1e-30, 1e-41, 3e38, float("inf"), float("nan"), -0.7] if "s0" in text else [1.0]
        for scale in scales:
            x = adversarial(dtype, scale if 1e-3 < abs(scale) < 10 else 1.0)
            s = torch.tensor(scale, device="cuda")
            out = poisoned(x, fp8)
            static(module, name, fp8, x, out, s if "s0" in text else None)
            wrong = differing(out, steps.evaluate(text, x, [s]).to(fp8))
            report.expect(
                f"downcast {SHORT[dtype]}->{SHORT[fp8]} {name} scale {scale}", wrong == 0, f"{wrong} of {x.numel()} differ"
            )


def static_shapes(report: Report, module: Any, dtype: torch.dtype, fp8: torch.dtype) -> None:
    s = torch.tensor(0.31, device="cuda")

    def check(what: str, x: torch.Tensor, out: torch.Tensor | None = None) -> None:
        if out is None:
            out = poisoned(x, fp8)
        static(module, "f32_div", fp8, x, out, s)
        wrong = differing(out.contiguous(), steps.evaluate(chains(fp8)["f32_div"], x, [s]).to(fp8).contiguous())
        report.expect(f"shape {what} {SHORT[dtype]}", wrong == 0, f"{wrong} differ")

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * 100).to(dtype)

    for n in (1, 7, 8, 9, 255, 2048 * 4 + 3, 1_000_003):
        check(f"[{n}]", random(n))
    check("0-d", random(1)[0])
    check("misaligned base", random(4097)[1:])
    check("transposed", random(64, 96).t())
    check("permuted", random(4, 6, 8, 64).permute(0, 2, 1, 3))
    check("pitched", random(100, 3 * 128)[:, 128:256], poisoned(random(100, 128), fp8))
    check("pitched odd", random(100, 301)[:, 1:98], poisoned(random(100, 97), fp8))
    check("qkv slice", random(50, 3, 8, 64)[:, 1], poisoned(random(50, 8, 64), fp8))
    out = torch.zeros(100, 512, dtype=torch.uint8, device="cuda").view(fp8)
    check("pitched out", random(100, 128), out[:, 128:256])
    report.expect("pitched out: nothing else written", int((out.view(torch.uint8)[:, :128] != 0).sum()) == 0)
    check("one column", random(100, 3)[:, 1:2], poisoned(random(100, 1), fp8))
    empty = random(0, 128)
    static(module, "f32_div", fp8, empty, poisoned(empty, fp8), s)
    for rows, cols in ((100, 128), (33, 96), (7, 33), (4096, 1024), (1, 4096), (5, 1)):
        x, r = random(rows, cols), torch.rand(rows, 1, device="cuda") + 0.01
        out = poisoned(x, fp8)
        static(module, "row_div", fp8, x, out, r)
        wrong = differing(out, steps.evaluate(chains(fp8)["row_div"], x, [r]).to(fp8))
        report.expect(f"row operand [{rows}, {cols}] {SHORT[dtype]}", wrong == 0, f"{wrong} differ")
    for what, bad in {
        "x dtype": lambda: static(module, "f32_div", fp8, random(8).double(), poisoned(random(8), fp8), s),
        "out shape": lambda: static(module, "f32_div", fp8, random(8), poisoned(random(9), fp8), s),
        "no scale": lambda: static(module, "f32_div", fp8, random(8), poisoned(random(8), fp8), None),
        "cpu": lambda: static(module, "f32_div", fp8, random(8).cpu(), poisoned(random(8), fp8), s),
        "row count": lambda: static(
            module, "row_div", fp8, random(8, 8), poisoned(random(8, 8), fp8), torch.ones(7, device="cuda")
        ),
    }.items():
        try:
            bad()
            report.expect(f"refuses: {what}", False, "nothing was raised")
        except (ValueError, TypeError) as error:
            report.expect(f"refuses: {what}", True, str(error))


# ---- fp8_quantize ----


def quantized(report: Report, module: Any, name: str, dtype: torch.dtype, fp8: torch.dtype, small: bool = False) -> None:
    scale_text, text = recipes(fp8)[name]
    scale_dtype = steps.result_dtype(scale_text, dtype)
    workspace = torch.empty(1024, device="cuda")

    def check(kind: str, what: str, x: torch.Tensor) -> None:
        out = (
            torch.empty(x.shape, dtype=torch.uint8, device="cuda").fill_(0x55).view(fp8) if kind == "row" else poisoned(x, fp8)
        )
        scale = torch.full((*x.shape[:-1], 1) if kind == "row" else (), 7.0, dtype=scale_dtype, device="cuda")
        quantize(module, kind, name, fp8, x, out, scale, *([workspace] if kind == "tensor" else []))
        amax = x.abs().amax(-1, keepdim=True) if kind == "row" else x.abs().amax()
        wanted = steps.evaluate(scale_text, amax)
        same = bool(((scale == wanted) | (scale.isnan() & wanted.isnan())).all())
        wrong = differing(out.contiguous(), steps.evaluate(text, x, scale=wanted).to(fp8).contiguous())
        label = f"quantize {kind} {name} {SHORT[dtype]}->{SHORT[fp8]} {what}"
        report.expect(label, same and wrong == 0, f"scale equal {same}, {wrong} of {x.numel()} bytes differ")

    def random(*shape: int) -> torch.Tensor:
        x = (torch.randn(*shape, device="cuda") * torch.rand(shape[0], *[1] * (len(shape) - 1), device="cuda") * 50).to(dtype)
        flat = x.view(-1, shape[-1])
        if shape[0] > 8 and flat.shape[1] > 1:
            flat[1, -1], flat[2, 0], flat[3], flat[4, -1] = float("nan"), float("inf"), 0.0, -float("inf")
            flat[5], flat[6, :-1], flat[7] = 1e-7, 0.0, -0.0
        return x

    widths = (1, 7, 128, 130, 1024, 16392) if small else (
        1, 2, 7, 8, 33, 64, 120, 128, 129, 136, 256, 512, 520, 768, 1000, 1024, 1032, 2048, 3072, 4096, 4104, 5000, 5001, 7168,
        8192, 8200, 12288, 16384, 16383, 16392, 20001, 32768)  # fmt: skip
    for cols in widths:
        check("row", f"[37, {cols}]", random(37, cols))
        check("row", f"[1, {cols}]", random(1, cols))
    check("row", "group [50, 6, 128]", random(50, 6, 128))
    check("row", "pitched", random(64, 3 * 256)[:, 256:512])
    check("row", "pitched odd", random(64, 301)[:, 1:98])
    check("row", "misaligned", random(1, 4097)[:, 1:])
    if not small:
        patterns = adversarial(dtype)[: 65536 + 1024 * 4000]
        check("row", "all patterns", patterns.view(-1, 128))
        check("row", "adversarial", patterns.view(-1, 2048))
        check("row", "[65536, 1024]", random(65536, 1024))
        check("row", "[4099, 8192]", random(4099, 8192))
    for shape in ((1,), (7,), (4096,), (4097,), (333, 1001), (4096, 8192)):
        x = (torch.randn(shape, device="cuda") * 50).to(dtype)
        check("tensor", str(list(shape)), x)
    x = (torch.randn(1000, 999, device="cuda") * 50).to(dtype)
    check("tensor", "misaligned", x.view(-1)[1:])
    check("tensor", "transposed", x.t())
    check("tensor", "zeros", torch.zeros(10000, dtype=dtype, device="cuda"))
    x[-1, -1] = float("nan")
    check("tensor", "a NaN", x)
    x[-1, -1] = -float("inf")
    check("tensor", "an infinity", x)
    for kind, empty in (
        ("row", torch.empty(3, 0, dtype=dtype, device="cuda")),
        ("tensor", torch.empty(0, 8, dtype=dtype, device="cuda")),
    ):
        try:
            check(kind, "empty", empty)
            report.expect(f"refuses an empty {kind}", False, "nothing was raised")
        except ValueError as error:
            report.expect(f"refuses an empty {kind}", True, str(error))
        except (IndexError, RuntimeError) as error:
            report.expect(f"refuses an empty {kind}", False, str(error))
    no_rows = torch.empty(0, 128, dtype=dtype, device="cuda")
    quantize(module, "row", name, fp8, no_rows, no_rows.to(fp8), torch.empty(0, 1, dtype=scale_dtype, device="cuda"))
