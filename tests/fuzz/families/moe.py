"""Mixtures of experts: masks, combination, and grouped products with MXFP8 weights."""

from __future__ import annotations

from tests.fuzz.builder import Builder

E, K = 4, 2


def _sorted(b: Builder, ids: str) -> tuple[str, str]:
    flat = b.let(f"{ids}.reshape(-1)")
    b.several(f"torch.sort({flat})", "order", "perm")
    return "order", "perm"


def _inverse(b: Builder, perm: str) -> str:
    if b.chance(30):
        return b.let(f"torch.argsort({perm})")
    inverse = b.let(f"torch.empty_like({perm})")
    b.do(f"{inverse}[{perm}] = torch.arange({perm}.shape[0], device={perm}.device)")
    return inverse


def moe_combine(b: Builder) -> None:
    t, h = b.pick(6, 1, 9), b.pick(64, 32)
    dtype = b.pick("bfloat16", "bfloat16", "float16", "float32")
    y = b.activation("y", t * K, h, dtype=dtype)
    w = b.given("w", f"torch.rand({t}, {K}).to(torch.{b.pick(dtype, 'float32', 'bfloat16')})")
    kind = b.pick("transformers", "after", "none", "given")
    if kind == "given":
        inverse = b.given("inverse", f"torch.randperm({t * K})")
    else:
        order, perm = _sorted(b, b.given("ids", f"torch.randint(0, {E + 1}, ({t}, {K}))"))
        inverse = _inverse(b, perm)
    if kind == "transformers":
        if b.chance(60):
            m = b.let(f"({order} >= {E}).unsqueeze(-1)")
            y = b.let(f"{y}.masked_fill({m}, 0.0)")
        v = b.let(f"{w}.reshape(-1)[{perm}].unsqueeze(-1)")
        y = b.let(f"{y} * {v}")
    elif kind == "given":
        f = b.let(f"{y}.float()")
        v = b.let(f"{w}.view(-1, 1)")
        y = b.let(f"{f} * {v}")
    rows = b.let(f"{y}[{inverse}]")
    rows = b.let(f"{rows}.view(-1, {K}, {h})")
    if kind == "after":
        v = b.let(f"{w}.view(-1, {K}, 1)")
        rows = b.let(f"{rows} * {v}")
    out = b.let(f"{rows}.sum(dim=1)")
    b.give(b.let(f"{out}.to(torch.bfloat16)") if b.chance(50) else out)
    b.force("moe_combine", percent=90)


def moe_scatter(b: Builder) -> None:
    t, h = b.pick(6, 1, 9), b.pick(64, 32)
    dtype = b.pick("bfloat16", "bfloat16", "float16", "float32")
    y = b.activation("y", t * K, h, dtype=dtype)
    w = b.given("w", f"torch.rand({t}, {K}).to(torch.{b.pick(dtype, 'float32')})")
    order, perm = _sorted(b, b.given("ids", f"torch.randint(0, {E + 1}, ({t}, {K}))"))
    if b.chance(30):
        m = b.let(f"({order} >= {E}).unsqueeze(-1)")
        y = b.let(f"{y}.masked_fill({m}, 0.0)")
    kind = b.pick("scatter_add", "index_add", "index_put", "sum", "bmm")
    if kind in ("sum", "bmm"):
        z = b.let(f"torch.zeros_like({y})")
        b.do(f"{z}[{perm}] = {y}")
        z = b.let(f"{z}.view({t}, {K}, {h})")
        v = b.let(f"{w}.view({t}, {f'{K}, 1' if kind == 'sum' else f'1, {K}'})")
        if kind == "sum":
            out = b.let(f"({z} * {v}).sum(1)")
        else:
            f, g = b.let(f"{z}.float()"), b.let(f"{v}.float()")
            out = b.let(f"torch.bmm({g}, {f}).squeeze(1)")
    else:
        if b.chance(70):
            v = b.let(f"{w}.reshape(-1)[{perm}].unsqueeze(-1)")
            f = b.let(f"{y}.float()")
            y = b.let(f"({f} * {v}).to(torch.{dtype})")
        zeros = f"torch.zeros({t}, {h}, dtype=torch.{dtype}, device={perm}.device)"
        base = b.let(zeros) if b.chance(60) else b.activation("shared", t, h, dtype=dtype)
        k = b.pick(K, K, K, 1) if t == 1 else K
        tokens = b.let(f"{perm} // {k}" if k == K else f"{perm} % {t}")
        if kind == "scatter_add":
            tokens = b.let(f"{tokens}.unsqueeze(-1).expand(-1, {h})")
        put = f"{base}.index_put(({tokens},), {y}, accumulate=True)"
        out = b.let(put if kind == "index_put" else f"{base}.{kind}(0, {tokens}, {y})")
    b.give(out)
    b.force("moe_scatter", percent=90)


def moe_masks(b: Builder) -> None:
    t, h, i = b.pick(6, 3), 32, 16
    x = b.activation("x", t, h)
    up, down = b.given("up", b.normal(E, 2 * i, h)), b.given("down", b.normal(E, h, i))
    order, perm = _sorted(b, b.given("ids", f"torch.randint(0, {E + 1}, ({t}, {K}))"))
    f = b.let(f"{order}.{b.pick('float', 'float', 'int') if b.cuda else 'float'}()")
    counts = b.let(f"torch.histc({f}, {E}, 0, {E - 1})")
    offs = b.let(f"torch.cumsum({counts}, 0, dtype=torch.int32)")
    m = b.let(f"({order} >= {E}).unsqueeze(-1)")
    rows = b.let(f"{x}[{perm} // {K}]")
    before, behind = b.chance(80), b.chance(80)
    if before or not behind:
        rows = b.let(f"{rows}.masked_fill({m}, 0.0)")
    u = b.let(f"{up}.transpose(1, 2)")
    rows = b.let(f"torch._grouped_mm({rows}, {u}, offs={offs})")
    if behind:
        rows = b.let(f"{rows}.masked_fill({m}, 0.0)" if b.chance(70) else f"torch.where({m}, 0.0, {rows})")
    g, r = b.several(f"{rows}.chunk(2, -1)", "g", "r")
    a = b.let(f"{b.pick('torch.relu', 'F.silu')}({g})")
    z = b.let(f"{a} * {r}")
    d = b.let(f"{down}.transpose(1, 2)")
    y = b.let(f"torch._grouped_mm({z}, {d}, offs={offs})")
    y = b.let(f"torch.where({m}, 0.0, {y}.float())")
    if b.chance(40):
        inverse = _inverse(b, perm)
        y = b.let(f"{y}[{inverse}].view({t}, {K}, {h}).sum(1)")
    b.give(y)
    b.force("moe_masks", percent=50)


def _ends(b: Builder, rows: int) -> str:
    return b.given("offs", f"torch.tensor({[*sorted(b.number(0, rows) for _ in range(E - 1)), rows]}, dtype=torch.int32)")


def mxfp8_grouped_mm(b: Builder) -> None:
    rows, n, k = b.pick(12, 1, 20), b.pick(48, 32), b.pick(64, 32, 128)
    activations = b.pick("", "mxfp8", "fp8")
    options = f", activations={activations!r}" if activations else ""
    if b.chance(30):
        options += ", rounding='floor'"
    x = b.activation("x", rows, k, by=1.0)
    w = b.given("w", f"mx((torch.randn({E}, {n}, {k}) * 0.1).bfloat16(){options})")
    offs = _ends(b, rows)
    t = b.let(f"{w}.transpose(-2, -1)")
    call = b.pick("torch._grouped_mm({}, {}, offs={})", "F.grouped_mm({}, {}, offs={})")
    out = b.let(call.format(x, t, offs))
    if b.chance(30):
        out = b.let(f"F.silu({out})")
    b.give(out)
    b.force("mxfp8_grouped_mm", percent=95)


def mxfp8_scaled_grouped_mm(b: Builder) -> None:
    rows, n, k = b.pick(12, 1, 20), b.pick(48, 32), b.pick(64, 32)
    quantise = "torch.ops.inductor_ext.mxfp8_quantize({}, None, 'rceil', False)"
    if b.chance(40):
        x = b.activation("x", rows, k, by=1.0)
        a, s = b.several(quantise.format(x), "a", "s")
    else:
        made = quantise.format(b.normal(rows, k))
        a, s = b.given("a", f"{made}[0]"), b.given("s", f"{made}[1]")
    made = quantise.format(f"(torch.randn({E}, {n}, {k}) * 0.1).bfloat16()")
    w, ws = b.given("w", f"{made}[0]"), b.given("ws", f"{made}[1]")
    offs = _ends(b, rows)
    t = b.let(f"{w}.transpose(-2, -1)")
    kind = b.let("F.ScalingType.BlockWise1x32", "blocks")
    extra = b.pick("", "", ", output_dtype=torch.float16", ", use_fast_accum=True")
    b.give(b.let(f"F.scaled_grouped_mm({a}, {t}, {s}, {kind}, {ws}, {kind}, offs={offs}{extra})"))
    b.force("mxfp8_scaled_grouped_mm", percent=95)
