"""FP8 chains: static and dynamic scales, several of one activation, behind a norm or an activation."""

from __future__ import annotations

from tests.fuzz.builder import Builder


def _rows(b: Builder) -> tuple[int, int]:
    return b.pick(4, 24, 1, 7, 64), b.pick(64, 32, 128, 16, 96)


def fp8_downcast(b: Builder) -> None:
    rows, columns = _rows(b)
    dtype, wide = b.dtype(), columns
    x = b.activation("x", rows, columns, dtype=dtype, by=b.pick(3.0, 100.0))
    if b.chance(20):
        wide = 32
        x = b.let(f"{x} @ {b.given('w', b.normal(columns, wide, dtype=dtype))}")
    kind = b.pick("one", "one", "row", "number", "column")
    if kind == "one":
        s = b.scale()
    elif kind == "number":
        s = str(b.pick(0.25, 0.1, 3.0))
    else:
        s = b.given("s", f"torch.rand({rows}, 1) + 0.1" if kind == "row" else f"torch.rand({wide}) + 0.1")
    if b.chance(20):
        x = b.let(f"{x}.view(-1)" if kind in ("one", "number") else f"{x}.view({rows}, 1, -1)")
    b.give(b.static(x, s))
    b.force("fp8_downcast")


def fp8_quantize(b: Builder) -> None:
    rows, columns = b.pick(4, 24, 1, 7), b.pick(64, 128, 256, 32)
    dtype = b.dtype()
    x = b.activation("x", rows, columns, dtype=dtype, by=7.0)
    if b.chance(20):
        x = b.let(f"{x} @ {b.given('w', b.normal(columns, columns, dtype=dtype))}")
    if b.chance(20):
        x = b.let(f"torch.sin({x})")
    kind = b.pick("row", "row", "all", "group")
    if kind == "group":
        x = b.let(f"{x}.view({rows}, -1, {b.pick(*(g for g in (128, 64, 32) if columns % g == 0))})")
    q, s = b.dynamic(x, "all" if kind == "all" else "-1")
    if b.chance(30):
        s = b.let(f"{s}.squeeze(-1)")
    b.give(q, s)
    b.force("fp8_quantize")


def quantize_once(b: Builder) -> None:
    rows, columns = _rows(b)
    x = b.activation("x", rows, columns, dtype=b.pick("bfloat16", "float32", "float16"))
    if b.chance(50):
        x = b.let(f"F.silu({x})")
    static = b.chance(40)
    s = b.scale() if static else ""
    shape = b.number(0, 7)  # of the chain's own spellings: equal ones are what the rule looks for
    before = len(b._lines)
    q, t = (b.static(x, s), "") if static else b.dynamic(x)
    chain = b._lines[before:]
    for copy in range(b.pick(1, 1, 2)):
        again, renames = [], {}
        for line in chain:
            name, _, expression = line.partition(" = ")
            renames[name] = f"{name}_{copy}"
            again.append(f"{renames[name]} = " + _renamed(expression, renames))
        b._lines.extend(again)
        r, u = renames[q], renames.get(t, "")
        if shape % 2:
            r = b.let(f"{r}.float()")
            b.give(b.let(f"{r} * {u}") if u else r)
        else:
            b.give(r, *([u] if u and shape > 3 else []))
    if b.chance(50):
        b.give(q)
    elif b.chance(70):
        f = b.let(f"{q}.float()")
        b.give(b.let(f"{f} * {t}") if t else f)
    if t and b.chance(40):
        b.give(t)


def _renamed(text: str, renames: dict[str, str]) -> str:
    from tests.fuzz.program import renamed

    return renamed(text, renames)


def rms_norm_quantize(b: Builder) -> None:
    rows, columns = b.pick(4, 24, 1, 7), b.pick(64, 32, 128, 256)
    kind = b.pick("row", "row", "static", "static", "all", "mxfp8")
    dtype = b.pick("bfloat16", "bfloat16", "float16")
    x = b.activation("x", rows, columns, dtype=dtype)
    w = b.given("w", f"(torch.rand({columns}) + 0.5).to(torch.{dtype})")
    total = ""
    if b.chance(30):
        r = b.given("r", b.normal(rows, columns, dtype=dtype))
        x = total = b.let(f"torch.add({x}, {r})" if b.chance(40) else f"{x} + {r}")
    y = b.norm(x, w, columns)
    if b.chance(15):
        y = b.let(f"{y}.view(-1, {columns})")
    if kind == "static":
        for i in range(b.pick(1, 2, 3)):
            b.give(b.static(y, b.given(f"s{i}", f"torch.tensor({0.01 * (i + 1)})")))
    elif kind == "mxfp8":
        b.several(f"torch.ops.inductor_ext.mxfp8_quantize({y}, None, {b.pick('rceil', 'floor')!r}, False)", "q", "e")
        b.give("q", "e")
        b.force("rms_norm_quantize", percent=90)
    else:
        b.give(*b.dynamic(y, "all" if kind == "all" else "-1"))
    if total and b.chance(60):
        b.give(total)
    b.force("rms_norm_quantize", percent=30)


def norm_quantize(b: Builder) -> None:
    """Norms of every kind: the sum in fp32, LayerNorm, modulation, other roots; the normalised value read elsewhere too."""
    samples, tokens, columns = b.pick(2, 1, 3), b.pick(4, 1, 7), b.pick(64, 32, 96)
    dtype = b.pick("bfloat16", "bfloat16", "float16")
    x = b.activation("x", samples, tokens, columns, dtype=dtype)
    vectors = [b.given(each, f"(torch.rand({columns}) + 0.5).to(torch.{dtype})") for each in ("w", "v")]
    h, total = "", ""
    if b.chance(50):
        r = b.given("r", b.normal(samples, tokens, columns, dtype=dtype))
        one, two = b.let(f"{x}.float()"), b.let(f"{r}.float()")
        h = total = b.let(f"torch.add({one}, {two})" if b.chance(40) else f"{one} + {two}")
    else:
        h = b.let(f"{x}.float()")
    if b.chance(60):
        n = b.let(f"F.layer_norm({h}, ({columns},), None, None, 1e-5)")
    else:
        m = b.let(f"{h}.pow(2)")
        m = b.let(f"{m}.mean(-1, keepdim=True)") if b.chance(50) else b.let(f"{m}.sum(-1, keepdim=True) / {columns}")
        e = b.let(f"{m} + 1e-6")
        n = b.let(b.pick(f"{h} * torch.rsqrt({e})", f"{h} / torch.sqrt({e})", f"{h} * (1.0 / torch.sqrt({e}))"))
    rounded = b.chance(50)
    if rounded:
        n = b.let(f"{n}.to({x}.dtype)")
    kind = b.pick("affine", "affine", "modulated", "weight", "alone")
    if kind == "modulated":
        shape = b.pick((samples, 1), (1, 1), (samples, tokens), (1, tokens))
        s, t = (b.given(each, b.normal(*shape, columns, dtype=dtype)) for each in "st")
        n = b.let(f"{n} * {b.let(f'1 + {s}')}")
        n = b.let(f"{n} + {t}")
    elif kind != "alone":
        n = b.let(f"{n} * {vectors[0]}")
        if kind == "affine":
            n = b.let(f"{n} + {vectors[1]}")
    y = n if rounded else b.let(f"{n}.to({x}.dtype)")
    b.give(*b.dynamic(y, b.pick("-1", "-1", "all")))
    if b.chance(30):
        b.give(b.pick(y, b.let(f"{y} * 2")))
    if total and b.chance(60):
        b.give(b.let(f"{total}.to({x}.dtype)") if b.chance(80) else total)
    b.force("rms_norm_quantize", "layer_norm_quantize", percent=90)


def act_quantize(b: Builder) -> None:
    """Activations alone and in other forms than act_mul_quantize's."""
    rows, columns = b.pick(4, 24, 1, 7), b.pick(64, 32, 96)
    dtype = b.pick("bfloat16", "bfloat16", "float16", "float32")
    both = b.activation("x", rows, 2 * columns, dtype=dtype)
    if b.chance(40):
        g, u = b.let(f"{both}[..., ::2]"), b.let(f"{both}[..., 1::2]")
    else:
        g, u = b.several(f"{both}.chunk(2, -1)", "g", "u")
    kind = b.pick("alone", "alone", "quick", "relu", "fp32", "clamped")
    if kind in ("alone", "fp32"):
        act = b.pick("F.silu({})", "F.gelu({})", "F.gelu({}, approximate='tanh')")
        if kind == "alone":
            y = b.let(act.format(g))
        else:
            wide, factor = b.let(act.format(b.let(f"{g}.float()"))), b.let(f"{u}.float()")
            y = b.let(f"{b.let(f'{wide} * {factor}')}.to({g}.dtype)")
    elif kind == "relu":
        y = b.let(f"{b.let(f'F.relu({g})')}.square()")
    else:
        if kind == "clamped":
            g, u = b.let(f"{g}.clamp(max=7.0)"), b.let(f"{u}.clamp(-7.0, 7.0)")
        y = b.let(f"{g} * {b.let(f'torch.sigmoid({g} * 1.702)')}")
        if kind == "clamped":
            y = b.let(f"{b.let(f'{u} + 1')} * {y}")
    if kind in ("quick", "relu") and b.chance(40):
        y = b.let(f"{y} * {u}")
    b.give(*b.dynamic(y, b.pick("-1", "-1", "all")))
    b.force("act_quantize", percent=90)


def act_cat_quantize(b: Builder) -> None:
    """An activation beside other columns, mostly attention's heads, in either order."""
    batch, tokens, heads, size = b.pick(2, 1, 3), b.pick(4, 1, 7), b.pick(2, 1, 4), b.pick(16, 8, 12)
    columns, dtype = b.pick(64, 32, 96), b.pick("bfloat16", "bfloat16", "float16", "float32")
    kind = b.pick("heads", "heads", "columns", "slice", "computed")
    if kind == "heads":
        x = b.activation("x", batch, heads, tokens, size, dtype=dtype)
        t = b.let(f"{x}.transpose(1, 2)")
        x = b.let(f"{t}.flatten(2)" if b.chance(70) else f"{t}.reshape({batch}, {tokens}, -1)")
    else:
        x = b.activation("x", batch, tokens, heads * size, dtype=dtype)
        if kind == "slice":
            x = b.let(f"{x}[..., {b.pick('2:', '::2', ':-1', '8:')}]")
        elif kind == "computed":
            x = b.let(f"torch.sin({x})")
    gated = b.chance(40)
    h = b.activation("h", batch, tokens, columns * (2 if gated else 1), dtype=dtype)
    act = b.pick("F.silu({})", "F.gelu({})", "F.gelu({}, approximate='tanh')", "F.relu({}).square()")
    if gated:
        g, u = b.several(f"{h}.chunk(2, -1)", "g", "u")
        y = b.let(f"{b.let(act.format(g))} * {u}")
    else:
        y = b.let(act.format(h))
    parts = [x, y] if b.chance(70) else [y, x]
    if b.chance(5):
        parts.append(x)
    y = b.let(f"torch.cat(({', '.join(parts)}), {b.pick('-1', '-1', '2')})")
    if b.chance(30):
        y = b.let(f"{y}.flatten(0, 1)")
    b.give(*b.dynamic(y))
    if b.chance(10):
        b.give(b.pick(x, y, b.let(f"{y} * 2")))
    b.force("act_cat_quantize", percent=40)


def act_mul_quantize(b: Builder) -> None:
    rows, columns = b.pick(4, 24, 1, 7), b.pick(64, 32, 128)
    dtype = b.pick("bfloat16", "bfloat16", "float16")
    if b.chance(40):
        both = b.activation("x", rows, 2 * columns, dtype=dtype)
        g, u = b.several(f"{both}.chunk(2, -1)", "g", "u")
    else:
        g, u = (b.activation(name, rows, columns, dtype=dtype) for name in "gu")
    act = b.pick("F.silu({})", "F.silu({})", "F.gelu({})", "F.gelu({}, approximate='tanh')")
    a = b.let(act.format(g))
    y = b.let(f"{a} * {u}" if b.chance(60) else f"{u} * {a}")
    kind = b.pick("row", "row", "static", "static", "all", "mxfp8")
    if kind == "static":
        for i in range(b.pick(1, 2)):
            if b.chance(20):
                s = b.given(f"s{i}", f"torch.tensor({b.pick(3, 900)})")
            else:
                s = b.given(f"s{i}", f"torch.tensor({0.05 * (i + 1)})")
            b.give(b.static(y, s))
    elif kind == "mxfp8":
        b.several(f"torch.ops.inductor_ext.mxfp8_quantize({y}, None, {b.pick('rceil', 'floor')!r}, False)", "q", "e")
        b.give("q", "e")
        b.force("act_mul_quantize", percent=90)
    else:
        b.give(*b.dynamic(y, "all" if kind == "all" else "-1"))
    b.force("act_mul_quantize", percent=30)
