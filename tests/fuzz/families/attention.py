"""Attention: causal masks in several spellings, heads that share K and V, and attention through a cache that is filled."""

from __future__ import annotations

from tests.fuzz.builder import Builder

H, HKV, D = 4, 2, 16


def _heads(b: Builder, name: str, count: int, tokens: int, dtype: str, batch: int = 2) -> str:
    """[B, count, S, D] as a projection leaves it."""
    x = b.given(name, f"torch.randn({batch}, {tokens}, {count * D}).to(torch.{dtype})")
    return b.let(f"{x}.view({batch}, {tokens}, {count}, {D}).transpose(1, 2)")


def _repeated(b: Builder, x: str, batch: int, tokens: int, count: int) -> str:
    if count == H:
        return x
    e = b.let(f"{x}[:, :, None].expand({batch}, {count}, {H // count}, {tokens}, {D})")
    return b.let(f"{e}.reshape({batch}, {H}, {tokens}, {D})")


def _dtype(b: Builder) -> str:
    return "bfloat16" if b.cuda else str(b.pick("float32", "float32", "bfloat16"))


def _bias(b: Builder, allowed: str, dtype: str, batch: int, queries: int, keys: int) -> str:
    low = b.pick("-65536.0", "float('-inf')") if dtype != "float16" else "float('-inf')"
    w = b.let(f"torch.where({allowed}, 0.0, {low})")
    c = b.let(f"{w}.to(torch.{dtype})")
    return b.let(f"{c}.expand({batch}, 1, {queries}, {keys})")


def causal_attention(b: Builder) -> None:
    batch, s, dtype = b.pick(2, 1), b.pick(24, 9, 2), _dtype(b)
    count = b.pick(HKV, H, 1)
    q, k, v = (_heads(b, name, n, s, dtype, batch) for name, n in zip("qkv", (H, count, count)))
    k, v = (_repeated(b, x, batch, s, count) for x in (k, v))
    kind = b.pick("band", "band", "band", "triangle", "flag", "two")
    if kind == "triangle":
        f = b.let(f"torch.full(({s}, {s}), float('-inf'), dtype=torch.{dtype}, device={q}.device)")
        t = b.let(f"{f}.triu(1)")
        mask = b.let(f"{t}[None, None].expand({batch}, 1, {s}, {s})")
        o = b.let(f"sdpa({q}, {k}, {v}, {mask})")
    elif kind == "flag":
        o = b.let(f"sdpa({q}, {k}, {v}, None, True)")
    else:
        at = b.let(f"torch.arange({s}, device={q}.device)")
        i, j = b.let(f"{at}[None, None, :, None]"), b.let(f"{at}[None, None, None, :]")
        allowed = b.let(b.pick(f"{j} <= {i}", f"{i} >= {j}", f"{j} < {i} + 1", f"{j} - {i} <= 0"))
        if kind == "two":
            other = b.let(b.pick(f"{i} - {j} < 4", f"{j} >= 0", f"{j} + 3 > {i}", f"{i} - {j} <= 5"))
            allowed = b.let(f"{allowed} & {other}")
        mask = _bias(b, allowed, dtype, batch, s, s)
        o = b.let(f"sdpa({q}, {k}, {v}, {mask})")
    b.give(b.let(f"{o}.transpose(1, 2).flatten(2)" if b.chance(70) else f"{o} * 2"))
    b.force("causal_attention", percent=60)


def grouped_queries(b: Builder) -> None:
    batch, s, dtype = b.pick(2, 1), b.pick(24, 9, 3), _dtype(b)
    count = b.pick(HKV, 1)
    q, k, v = (_heads(b, name, n, t, dtype, batch) for name, n, t in zip("qkv", (H, count, count), (1, s, s)))
    if b.chance(25):
        k, v = (b.let(f"{x}.to(E4).to(torch.{dtype}) * 0.5") for x in (k, v))
    k, v = (_repeated(b, x, batch, s, count) for x in (k, v))
    if b.chance(60):
        m = b.given("m", f"torch.arange({s}) < torch.tensor([[{s}], [{max(1, s // 2)}]])[:{batch}]")
        heads = b.pick(1, H)
        w = b.let(f"torch.where({m}[:, None, None], 0.0, -65536.0)")
        c = b.let(f"{w}.to(torch.{dtype})")
        mask = b.let(f"{c}.expand(-1, {heads}, 1, -1)")
        o = b.let(f"sdpa({q}, {k}, {v}, {mask})")
    else:
        o = b.let(f"sdpa({q}, {k}, {v})")
    b.give(b.let(f"{o} * 2"))
    b.force("grouped_queries", percent=90)


def prefill_only(b: Builder) -> None:
    batch, s, dtype = 2, b.pick(24, 9, 2), _dtype(b)
    length = s * b.pick(2, 1)
    fp8 = b.chance(25)
    q, k, v = (_heads(b, name, n, s, dtype, batch) for name, n in zip("qkv", (H, HKV, HKV)))
    cache = f"torch.zeros({batch}, {HKV}, {length}, {D}).to({'E4' if fp8 else f'torch.{dtype}'})"
    kc, vc = b.given("kc", cache), b.given("vc", cache)
    kind = b.pick("length", "positions", "slice")
    if fp8:
        k, v = (b.let(f"({x} * 2.0).clamp(-448.0, 448.0).to(E4)") for x in (k, v))
    if kind == "slice":
        b.do(f"{kc}[:, :, :{s}] = {k}")
        b.do(f"{vc}[:, :, :{s}] = {v}")
        keys, values = b.let(f"{kc}[:, :, :{s}]"), b.let(f"{vc}[:, :, :{s}]")
        at, count = b.let(f"torch.arange({s}, device={q}.device)"), s
    else:
        first = b.given("n", "torch.zeros((), dtype=torch.int64)") if kind == "length" else ""
        at = b.let(f"torch.arange({s}, device={q}.device) + {first}") if first else b.given("at", f"torch.arange({s})")
        copy = b.chance(60) and not fp8
        for one, x in ((kc, k), (vc, v)):
            b.do(f"{one}.index_copy_(2, {at}, {x})" if copy else f"{one}[:, :, {at}] = {x}")
        keys, values, count = kc, vc, length
    allowed = b.let(f"torch.arange({count}, device={q}.device)[None, None, None, :] <= {at}[None, None, :, None]")
    if kind == "length" and b.chance(60):
        b.do(f"n.add_({s})")
    mask = _bias(b, allowed, dtype, batch, s, count)
    if fp8:
        keys, values = (b.let(f"{x}.to(torch.{dtype}) * 0.5") for x in (keys, values))
    keys, values = (_repeated(b, x, batch, count, HKV) for x in (keys, values))
    o = b.let(f"sdpa({q}, {keys}, {values}, {mask})")
    b.give(b.let(f"{o}.transpose(1, 2).flatten(2)"))
    b.options["prefill_only"] = True
    b.force("prefill_only", percent=50)
