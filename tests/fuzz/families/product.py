"""FP8 products, alone and with what stands around them in a model."""

from __future__ import annotations

from tests.fuzz.builder import Builder
from tests.fuzz.families.cache import _rotated

ROWS = (40, 16, 1, 48)


def _a(b: Builder, m: int, k: int, row: bool, name: str = "a") -> tuple[str, str]:
    """An FP8 operand [M, K], given or quantised here, and its scale."""
    if b.chance(25):
        x = b.given(f"{name}x", b.normal(m, k))
        if row:
            return b.dynamic(x)
        s = b.given(f"{name}_s", "torch.tensor(0.5)")
        return b.static(x, s, "E4"), s
    a = b.given(name, f"torch.randn({m}, {k}).to({b.pick('E4', 'E4', 'E4', 'E5')})")
    return a, b.given(f"{name}_s", f"torch.rand({m}, 1) + 0.5" if row else "torch.tensor(0.5)")


def _w(b: Builder, n: int, k: int, row: bool, name: str = "w") -> tuple[str, str]:
    w = b.given(name, f"torch.randn({n}, {k}).to(E4)")
    return w, b.given(f"{name}_s", f"torch.rand({n}, 1) + 0.5" if row else "torch.tensor(0.25)")


def _product(
    b: Builder, a: tuple[str, str], w: tuple[str, str], bias: str = "", options: str = "out_dtype=torch.bfloat16"
) -> str:
    t, u = b.let(f"{w[0]}.t()"), b.let(f"{w[1]}.t()")
    extra = f", bias={bias}" if bias else ""
    return b.let(f"torch._scaled_mm({a[0]}, {t}, {a[1]}, {u}{extra}, {options})")


def _options(b: Builder) -> str:
    dtype = b.pick("bfloat16", "bfloat16", "bfloat16", "float32", "float16")
    return f"out_dtype=torch.{dtype}" + (", use_fast_accum=True" if b.chance(30) else "")


def scaled_mm(b: Builder) -> None:
    m, k, n, row = b.pick(*ROWS), b.pick(64, 32, 128), b.pick(48, 32, 16), b.chance(50)
    w = _w(b, n, k, row)
    bias = b.given("bias", b.normal(n)) if not row and b.chance(30) else ""
    p = _product(b, _a(b, m, k, row), w, bias, _options(b) if not bias else "out_dtype=torch.bfloat16")
    b.give(b.let(f"{p}.view(-1, {b.pick(n, 8)})") if b.chance(30) else p)
    b.force("scaled_mm", percent=80)


def scaled_mm_add(b: Builder) -> None:
    m, k, n, row = b.pick(*ROWS), 64, b.pick(48, 32), b.chance(50)
    x = b.given("x", b.normal(m, n))
    a, w = _a(b, m, k, row), _w(b, n, k, row)
    bias = b.given("bias", b.normal(n)) if not row and b.chance(20) else ""
    p = _product(b, a, w, bias)
    if b.chance(30):
        p, x = (b.let(f"{each}.view(1, {m}, {n})") for each in (p, x))
    total = b.let(b.pick(f"{x} + {p}", f"{p} + {x}", f"torch.add({x}, {p})"))
    b.give(total)
    if b.chance(30):
        b.give(b.norm(total, b.given("nw", b.normal(n)), n))
    b.force("scaled_mm_add", percent=90)


def scaled_mm_act_mul(b: Builder) -> None:
    m, k, n, row = b.pick(*ROWS), 64, b.pick(48, 32), b.chance(60)
    a = _a(b, m, k, row)
    if b.chance(40):
        p = _product(b, a, _w(b, 2 * n, k, row))
        if b.chance(50):
            g, u = b.several(f"{p}.chunk(2, -1)", "g", "u")
        else:
            g, u = b.let(f"{p}[:, :{n}]"), b.let(f"{p}[:, {n}:]")
    else:
        g, u = (_product(b, a, _w(b, n, k, row, name)) for name in ("wg", "wu"))
    act = b.let(b.pick("F.silu({})", "F.silu({})", "F.gelu({}, approximate='tanh')", "F.gelu({})").format(g))
    y = b.let(f"{act} * {u}" if b.chance(70) else f"{u} * {act}")
    b.give(*(b.dynamic(y) if b.chance(40) else (y,)))
    b.force("scaled_mm_act_mul", percent=90)


def scaled_mm_siblings(b: Builder) -> None:
    """And scaled_mm_cat."""
    m, k, row = b.pick(*ROWS), 64, b.chance(50)
    a = _a(b, m, k, row)
    widths = [b.pick(48, 32, 16) for _ in range(b.pick(2, 3))]
    products = [_product(b, a, _w(b, n, k, row, f"w{i}")) for i, n in enumerate(widths)]
    for p in products:
        f = b.let(f"{p}.float()")
        b.give(b.let(f"{f}.sigmoid()"))
    if b.chance(20):
        b.give(b.let(f"torch.cat([{', '.join(products)}], 1)"))
    b.force("scaled_mm_siblings", percent=90)


def scaled_mm_cat(b: Builder) -> None:
    m, row = b.pick(*ROWS), b.chance(50)
    same = b.chance(40)
    products = []
    for i in range(b.pick(2, 2, 3)):
        k = 64 if same else b.pick(64, 128, 32)
        if not i or not same:
            a = _a(b, m, k, row, f"a{i}")
        products.append(_product(b, a, _w(b, b.pick(48, 32, 16), k, row, f"w{i}")))
    if b.chance(30):
        products = [b.let(f"{p}.view(1, {m}, -1)") for p in products]
    b.give(b.let(f"torch.cat([{', '.join(products)}], -1)"))
    b.force("scaled_mm_cat", percent=95)


def scaled_mm_rope(b: Builder) -> None:
    batch, s, d, k, row = b.pick(2, 1), b.pick(4, 16), 128, 64, b.chance(60)
    a = _a(b, batch * s, k, row)
    heads = (2, 1, 1)
    norm, first = b.chance(50), b.chance(70)
    tables = b.pick(1, batch)
    parts = [
        b.let(f"{_product(b, a, _w(b, n * d, k, row, f'w{name}'))}.view({batch}, {s}, -1, {d})")
        for name, n in zip("qkv", heads)
    ]
    c, e = (
        b.let(f"{b.given(name, f'(torch.randn({tables}, {s}, {d}) * 9).{name}().bfloat16()')}.unsqueeze({1 if first else 2})")
        for name in ("cos", "sin")
    )
    turned = []
    for name, x in zip("qk", parts[:2]):
        if norm:
            x = b.norm(x, b.given(f"n{name}", f"(torch.rand({d}) + 0.5).bfloat16()"), d)
        if first:
            x = b.let(f"{x}.transpose(1, 2)")
        turned.append(_rotated(b, x, c, e, d))
    q, key = turned if first else [b.let(f"{x}.transpose(1, 2)") for x in turned]
    v = b.let(f"{parts[2]}.transpose(1, 2)")
    key, v = (b.let(f"{x}.expand(-1, {heads[0]}, -1, -1)") for x in (key, v))
    b.give(b.let(f"sdpa({q}, {key}, {v})"))
    for rule in ("scaled_mm_siblings", "qk_norm_rope", "scaled_mm_rope"):
        b.rules[rule] = "always"
    b.rules["causal_attention"] = "off"
