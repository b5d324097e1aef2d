"""Stores into KV caches, rotations of q and k, and both together."""

from __future__ import annotations

from tests.fuzz.builder import Builder

H = 2


def _slots(b: Builder, tokens: int, slots: int, name: str = "i") -> str:
    kind = b.pick("spread", "spread", "negative", "repeated", "random")
    if kind == "spread":
        return b.given(name, f"torch.arange({tokens}) * 7 % {slots - 1}")
    if kind == "negative":
        return b.given(name, f"torch.arange({tokens}) - {min(tokens, slots) // 2}")
    if kind == "repeated":
        return b.given(name, f"torch.arange({tokens}) // 2")
    return b.given(name, f"torch.randint(-{slots}, {slots}, ({tokens},))")


def _caches(b: Builder, kind: str, slots: int, d: int, fp8: bool) -> tuple[str, str]:
    """Names or expressions of the caches as [slots, H, D]; what the graph is given may be another view of them."""
    make = "codes({})" if fp8 else "torch.randn({}).bfloat16()"
    size = f"{slots // 8}, 8, {H}, {d}" if kind == "view" else f"{slots}, {H}, {d}"
    made = make.format(size)
    if kind == "bytes":
        made += ".view(torch.uint8)"
    how = b.pick("apart", "apart", "apart", "unbind", "alias")
    if how == "unbind":
        both = b.given(
            "kv",
            f"torch.stack([{made}, {made}])" if not fp8 else f"{make.format(f'2, {size}')}" + made[len(make.format(size)) :],
        )
        if b.chance(50):
            return b.several(f"{both}.unbind(0)", "kc", "vc")  # type: ignore[return-value]
        return b.let(f"{both}[0]", "kc"), b.let(f"{both}[1]", "vc")
    kc = b.given("kc", made)
    if how == "alias" and b.chance(40):
        return kc, b.given("vc", f"{kc}.view({kc}.shape)")
    return kc, b.given("vc", made)


def _store(b: Builder, cache: str, kind: str, rows: str, at: str, d: int, tokens: int) -> None:
    if kind == "view":
        target = b.let(f"{cache}.view(-1, {H}, {d})")
    elif kind == "bytes":
        target = b.let(f"{cache}.view(E4)")
    else:
        target = cache
    if kind == "slice":
        first, step = b.pick((3, 1), (2, 2), (0, 1))
        end = first + tokens * step
        b.do(f"{target}[{first}:{end}:{step}] = {rows}" if b.chance(50) else f"{target}[{first}:{end}:{step}].copy_({rows})")
        return
    how = b.pick("setitem", "setitem", "index_put", "index_copy")
    if how == "setitem":
        b.do(f"{target}[{at}] = {rows}")
    elif how == "index_put":
        b.do(f"{target}.index_put_(({at},), {rows})")
    elif kind in ("direct", "view"):
        one, two = b.let(f"{target}.view(torch.uint8)"), b.let(f"{rows}.view(torch.uint8)")
        b.do(f"{one}.index_copy_(0, {at}, {two})")
    else:
        b.do(f"{target}[{at}] = {rows}")


def _in_blocks(b: Builder) -> None:
    """Stores into caches in blocks: halves of one or two buffers, heads behind rows or before them, a scale a head."""
    tokens, d, blocks, block = b.pick(5, 16, 1), b.pick(16, 8), 4, b.pick(8, 16)
    kinds = {
        "blocks": (f"{blocks}, 2, {block}, {H}, {d}", 1, None),
        "heads": (f"{blocks}, 2, {H}, {block}, {d}", 1, 1),
        "first": (f"2, {blocks}, {block}, {H}, {d}", 0, None),
        "rows": (f"{blocks}, {block}, 2, {H}, {d}", 2, None),
    }
    size, dim, heads = kinds[b.pick("blocks", "blocks", "heads", "heads", "first", "rows")]
    kc, vc = b.several(f"{b.given('kv', f'codes({size})')}.unbind({dim})", "kc", "vc")
    told = b.pick("slot", "slot", "two", "other")
    if told == "two":
        block_of = b.given("b", f"torch.randint(-{blocks}, {blocks}, ({tokens},))")
        row_of = b.given("r", f"torch.randint(-{block}, {block}, ({tokens},))")
    else:
        slot, by = _slots(b, tokens, blocks * block), block if told == "slot" else block // 2
        block_of, row_of = b.let(f"{slot} // {block}"), b.let(f"{slot} % {by}")
    dtype = b.dtype()
    for name, cache in (("k", kc), ("v", vc)):
        x = b.activation(name, tokens, H, d, dtype=dtype, by=30.0)
        of = f"{name}s"
        scale = b.given(of, f"torch.rand({H}) + 0.3") + "[:, None]" if b.chance(40) else b.scale(of)
        rows = b.let(f"({x}.float() / {scale}).clamp(-448.0, 448.0).to(E4)")
        if heads is None:
            b.do(f"{cache}[{block_of}, {row_of}] = {rows}")
        elif b.chance(50):
            b.do(f"{cache}[{block_of}, :, {row_of}] = {rows}")
        else:
            b.do(f"{cache}.transpose(1, 2)[{block_of}, {row_of}] = {rows}")
        if b.chance(15):
            b.give(b.let(f"{kc}.float().amax()"))
    b.force("downcast_fp8")


def downcast_fp8(b: Builder) -> None:
    if b.chance(30):
        return _in_blocks(b)
    tokens, slots, d = b.pick(5, 16, 1, 3), 64, b.pick(16, 64, 8)
    dtype = b.dtype()
    k, v = (b.activation(name, tokens, H, d, dtype=dtype, by=30.0) for name in "kv")
    kind = b.pick("view", "direct", "bytes", "slice")
    kc, vc = _caches(b, kind, slots, d, fp8=True)
    s = b.scale()
    at = "" if kind == "slice" else _slots(b, tokens, slots)
    early = b.chance(30)
    if early:
        k, v = b.static(k, s, "E4"), b.static(v, s, "E4")
    _store(b, kc, kind, k if early else b.static(k, s, "E4"), at, d, tokens)
    if b.chance(20):
        b.give(b.let(f"{kc}.clone()"))
    if b.chance(80):
        if at and b.chance(30):
            at = b.let(f"{at} + 1")
        _store(b, b.pick(vc, vc, vc, kc), kind, v if early else b.static(v, s, "E4"), at, d, tokens)
    if b.chance(20):
        b.give(b.let(f"{vc}.float().sum()"))
    b.force("downcast_fp8")


def _half(b: Builder, x: str, d: int) -> str:
    if b.chance(50):
        low, high = b.let(f"{x}[..., : {d // 2}]"), b.let(f"{x}[..., {d // 2} :]")
    else:
        names = f"{x}_l", f"{x}_h"
        low, high = b.several(f"{x}.chunk(2, -1)", *names)
    n = b.let(f"-{high}")
    return b.let(f"torch.cat(({n}, {low}), -1)")


def _joined(b: Builder, x: str, cos: str, sin: str, d: int) -> str:
    """By halves or by pairs whose two columns are computed apart and then put together; of some columns, or of all."""
    pairs = b.chance(40)
    low, high = (
        (b.let(f"{x}[..., ::2]"), b.let(f"{x}[..., 1::2]"))
        if pairs
        else (b.let(f"{x}[..., : {d // 2}]"), b.let(f"{x}[..., {d // 2} :]"))
    )
    one = b.let(f"{b.let(f'{low} * {cos}')} - {b.let(f'{high} * {sin}')}")
    two = b.let(f"{b.let(f'{high} * {cos}')} + {b.let(f'{low} * {sin}')}")
    return b.let(f"torch.stack(({one}, {two}), -1).flatten(-2)") if pairs else b.let(f"torch.cat(({one}, {two}), -1)")


def _rotated(b: Builder, x: str, cos: str, sin: str, d: int, way: str = "whole") -> str:
    if way == "joined":
        return _joined(b, x, cos, sin, d)
    if way == "some":
        low, high = b.let(f"{x}[..., : {d // 2}]"), b.let(f"{x}[..., {d // 2} :]")
        turned = _joined(b, low, cos, sin, d // 2)
        return b.let(f"torch.cat(({turned}, {high}), -1)")
    one = b.let(f"{x} * {cos}")
    two = b.let(f"{_half(b, x, d)} * {sin}")
    return b.let(f"torch.add({one}, {two})" if b.chance(30) else f"{one} + {two}")


def _turned(b: Builder, batch: int, s: int, d: int, dtype: str = "bfloat16") -> tuple[str, str, str, bool]:
    """q, k and v of one qkv, q and k rotated; whether heads stand before positions."""
    heads, kv = 4, H
    qkv = b.activation("qkv", batch, s, (heads + 2 * kv) * d, dtype=dtype)
    tables = b.pick(1, batch)
    way = b.pick("whole", "whole", "joined", "some")
    columns = {"whole": d, "joined": d // 2, "some": d // 4}[way]
    made = f"(torch.randn({tables}, {s}, {columns}) * 9)"
    cos, sin = (b.given(name, f"{made}.{name}().to(torch.{dtype})") for name in ("cos", "sin"))
    b.several(f"{qkv}.split([{heads * d}, {kv * d}, {kv * d}], -1)", "q", "k", "v")
    first = b.chance(50)
    parts = []
    norm = b.chance(40)
    c, e = (b.let(f"{each}.unsqueeze({1 if first else 2})") for each in (cos, sin))
    for name in "qkv":
        x = b.let(f"{name}.unflatten(-1, (-1, {d}))")
        if norm and name != "v":
            x = b.norm(x, b.given(f"w{name}", f"(torch.rand({d}) + 0.5).to(torch.{dtype})"), d)
        if first:
            x = b.let(f"{x}.transpose(1, 2)")
        parts.append(x if name == "v" else _rotated(b, x, c, e, d, way))
    return *parts, first  # type: ignore[return-value]


def qk_norm_rope(b: Builder) -> None:
    q, k, _, _ = _turned(b, b.pick(2, 1, 3), b.pick(6, 1, 9), b.pick(16, 64, 32), b.pick("bfloat16", "bfloat16", "float16"))
    b.give(*b.pick((q, k), (q, k), (k, q), (q,)))
    b.force("qk_norm_rope")


def qk_norm_rope_store(b: Builder) -> None:
    batch, s, d = b.pick(2, 1, 3), b.pick(6, 1), b.pick(16, 64)
    tokens, slots = batch * s, 40
    q, k, v, first = _turned(b, batch, s, d)
    fp8 = b.chance(60)
    kind = b.pick("view", "direct", "bytes", "slice") if fp8 else b.pick("view", "direct", "slice")
    kc, vc = _caches(b, kind, slots, d, fp8)
    scale = b.scale() if fp8 else ""
    at = "" if kind == "slice" else _slots(b, tokens, slots)
    old = b.let(f"{b.pick(kc, vc)}.view(-1, {H}, {d})[4 : {4 + tokens}].clone()") if not fp8 and b.chance(20) else ""
    order = [(kc, k), (vc, v)]
    for cache, x in order if b.chance(80) else order[::-1]:
        rows = b.let(f"{x}.transpose(1, 2)") if first else x
        rows = b.let(f"{rows}.reshape(-1, {H}, {d})")
        if old and cache == vc:
            rows = old
        if fp8:
            rows = b.static(rows, scale, "E4")
        _store(b, cache, kind if fp8 or kind != "bytes" else "direct", rows, at, d, tokens)
        if b.chance(10):
            b.give(b.let(f"{cache}.clone()"))
    b.give(*b.pick((q,), (q, k), (q, k, v)))
    b.rules.update({"qk_norm_rope": "always", "qk_norm_rope_store": "always"})
