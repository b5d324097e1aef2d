"""Checks of the KV-cache store: bytes against eager, rows that repeat, padding, bounds, layouts, streams, graphs."""

from __future__ import annotations

from typing import Any

import torch
from downcast_checks import Report
from downcast_units import E4, chains, steps, store

MARKED = 24  # elements of a row that spell its token, most significant last


def wanted_rows(text: str, x: torch.Tensor, scale: torch.Tensor, fp8: torch.dtype) -> torch.Tensor:
    return steps.evaluate(text, x, [scale]).to(fp8).view(torch.uint8)


def stores(report: Report, module: Any, dtype: torch.dtype, fp8: torch.dtype, loc_dtype: torch.dtype) -> None:
    """Distinct rows, every layout: the whole cache is compared, so that a byte written elsewhere shows."""
    text = chains(fp8)["f32_div"]
    k_scale, v_scale = torch.tensor(0.37, device="cuda"), torch.tensor([1.9], device="cuda")

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * 200).to(dtype)

    def cache(*shape: int, as_uint8: bool = False) -> torch.Tensor:
        filled = torch.full(shape, 0x55, dtype=torch.uint8, device="cuda")
        return filled if as_uint8 else filled.view(fp8)

    def check(
        what: str, k: Any, v: Any, kc: Any, vc: Any, loc: Any, mult: int = 1, offset: int = 0, wrap: bool = False
    ) -> None:
        slots = kc.shape[0]
        index = torch.arange(k.shape[0], device="cuda") if loc is None else loc.long()
        rows = index * mult + offset
        keep = torch.ones_like(rows, dtype=torch.bool) if wrap else index >= 0
        rows = torch.where(rows < 0, rows + slots, rows) if wrap else rows
        keep &= (rows >= 0) & (rows < slots)
        expected = []
        for x, c, s in ((k, kc, k_scale), (v, vc, v_scale)):
            if x is None:
                continue
            e = c.view(torch.uint8).clone()
            e[rows[keep]] = wanted_rows(text, x, s, fp8)[keep]
            expected.append((c, e))
        store(module, fp8, k, v, kc, vc, k_scale, v_scale, loc, mult, offset, wrap)
        wrong = sum(int((c.view(torch.uint8) != e).sum()) for c, e in expected)
        report.expect(f"store {dtype} {loc_dtype} {what}", wrong == 0, f"{wrong} bytes differ")

    def perm(tokens: int, slots: int) -> torch.Tensor:
        return torch.randperm(slots, device="cuda")[:tokens].to(loc_dtype)

    for tokens in (1, 2, 16, 127, 1000, 1024, 1025, 5000):
        for h, d in ((8, 128), (1, 128), (2, 64), (3, 80), (1, 7), (5, 33), (1, 576), (32, 128)):
            if tokens > 1025 and h == 32:
                continue
            slots = tokens + 50
            check(f"T={tokens} [{h}, {d}]", random(tokens, h, d), random(tokens, h, d), cache(slots, h, d), cache(slots, h, d),
                  perm(tokens, slots))  # fmt: skip
    for tokens in (100, 3000):
        slots = 4000
        qkv = random(tokens, 24, 128)
        k, v = qkv[:, 8:16], qkv[:, 16:]
        loc = perm(tokens, slots)
        check("qkv slices", k, v, cache(slots, 8, 128), cache(slots, 8, 128), loc)
        check("uint8 caches", k, v, cache(slots, 8, 128, as_uint8=True), cache(slots, 8, 128, as_uint8=True), loc)
        both = cache(2, slots, 8, 128)
        check("[2, …].unbind(0)", k, v, both[0], both[1], loc)
        interleaved = cache(slots, 2, 8, 128)
        check("[S, 2, …]: caches with a row stride", k, v, interleaved[:, 0], interleaved[:, 1], loc)
        check("one tensor", k, None, cache(slots, 8, 128), None, loc)
        check("no loc", k, v, cache(slots, 8, 128), cache(slots, 8, 128), None, 1, 7)
        check("mult, offset", k, v, cache(2 * slots, 8, 128), cache(2 * slots, 8, 128), loc, 2, 1)
        odd = random(tokens, 3 * 131 + 1)
        check("odd rows, odd base", odd[:, 1:132], odd[:, 132:263], cache(slots, 131), cache(slots, 131), loc)
        wide_v = random(tokens, 4, 64)
        check("v narrower than k", k, wide_v, cache(slots, 8, 128), cache(slots, 4, 64), loc)
        padded = loc.clone()
        padded[::3] = -1
        check("padding", k, v, cache(slots, 8, 128), cache(slots, 8, 128), padded)
        outside = loc.clone()
        outside[::5], outside[1::5] = slots, slots + 12345
        check("rows past the end", k, v, cache(slots, 8, 128), cache(slots, 8, 128), outside)
        check("wrap", k, v, cache(slots, 8, 128), cache(slots, 8, 128), loc - slots // 2, 1, 0, True)
        for bad, wrap, raises in ((slots, False, True), (-slots - 1, True, True), (-1, False, False), (-1, True, False)):
            wrong = loc.clone()
            wrong[:] = torch.arange(tokens, device="cuda")
            wrong[37] = bad
            try:
                store(
                    module,
                    fp8,
                    k,
                    v,
                    cache(slots, 8, 128),
                    cache(slots, 8, 128),
                    k_scale,
                    v_scale,
                    wrong,
                    wrap=wrap,
                    check=True,
                )
                report.expect(f"check of loc={bad}, wrap={wrap}", not raises, "nothing was raised")
            except IndexError as error:
                report.expect(f"check of loc={bad}, wrap={wrap}", raises and "37" in str(error), str(error))
        store(module, fp8, k, v, cache(slots, 8, 128), cache(slots, 8, 128), k_scale, v_scale, loc, check=True)
    store(module, fp8, random(0, 8, 128), random(0, 8, 128), cache(5, 8, 128), cache(5, 8, 128), k_scale, v_scale, perm(0, 5))
    for what, bad in {
        "different T": lambda: store(
            module, fp8, random(4, 8), random(5, 8), cache(9, 8), cache(9, 8), k_scale, v_scale, perm(4, 9)
        ),
        "different D": lambda: store(
            module, fp8, random(4, 8), random(4, 8), cache(9, 8), cache(9, 9), k_scale, v_scale, perm(4, 9)
        ),
        "loc too long": lambda: store(
            module, fp8, random(4, 8), random(4, 8), cache(9, 8), cache(9, 8), k_scale, v_scale, perm(5, 9)
        ),
        "strided D": lambda: store(
            module, fp8, random(4, 16)[:, ::2], random(4, 8), cache(9, 8), cache(9, 8), k_scale, v_scale, perm(4, 9)
        ),
    }.items():
        try:
            bad()
            report.expect(f"store refuses: {what}", False, "nothing was raised")
        except (ValueError, TypeError) as error:
            report.expect(f"store refuses: {what}", True, str(error))


def marked(tokens: int, h: int, d: int) -> torch.Tensor:
    """Rows of ones and twos that spell their token's number again and again."""
    bits = torch.arange(h * d, device="cuda") % MARKED
    return (((torch.arange(tokens, device="cuda")[:, None] >> bits) & 1) + 1).to(torch.bfloat16).view(tokens, h, d)


def whole_rows(
    report: Report, what: str, k_cache: Any, v_cache: Any, rows: torch.Tensor, keep: torch.Tensor, last: bool
) -> None:
    """Every cache row of ``rows[keep]`` spells one token that was to go there, K and V the same; others are untouched."""
    slots = k_cache.shape[0]
    k, v = (c.view(E4).float().view(slots, -1) for c in (k_cache, v_cache))
    spelled = ((k[:, :MARKED] - 1).long() << torch.arange(MARKED, device="cuda")).sum(1)
    named = torch.zeros(slots, dtype=torch.bool, device="cuda")
    named[rows[keep]] = True
    tokens = rows.numel()
    token = spelled[named].clamp(0, tokens - 1)
    ideal = marked(tokens, 1, k.shape[1])[token].float().view(-1, k.shape[1])
    mixed = int((ideal != k[named]).any(1).sum()) + int((ideal != v[named]).any(1).sum())
    strangers = int((rows[token] != torch.arange(slots, device="cuda")[named]).sum()) + int((~keep[token]).sum())
    touched = int((k_cache.view(torch.uint8).view(slots, -1)[~named] != 0x55).sum())
    not_last = 0
    if last:
        best = torch.full((slots,), -1, device="cuda").scatter_reduce(
            0, rows[keep].long(), torch.arange(tokens, device="cuda")[keep], "amax")  # fmt: skip
        not_last = int((best[named] != token).sum())
    report.expect(f"repeated rows {what}", mixed + strangers + touched + not_last == 0,
                  f"{mixed} mixed, {strangers} of another row, {touched} bytes elsewhere, {not_last} not the last")  # fmt: skip


def repeats(report: Report, modules: dict[torch.dtype, Any]) -> None:
    one = torch.ones((), device="cuda")
    for h, d in ((8, 128), (1, 128), (1, 100 + 1), (32, 128)):
        for tokens in (2, 16, 200, 1024, 1500, 7168, 65536):
            if h * d > 1024 and tokens in (200, 1500):
                continue
            k = marked(tokens, h, d)
            slots = 70000
            patterns = {
                "all one row": torch.full((tokens,), 5, device="cuda"),
                "few rows": torch.randint(0, 13, (tokens,), device="cuda"),
                "pairs": torch.arange(tokens, device="cuda") // 2,
                "random": torch.randint(0, tokens, (tokens,), device="cuda"),
                "halves": torch.arange(tokens, device="cuda") % max(tokens // 2, 1),
                "colliding slots": torch.randint(0, 2, (tokens,), device="cuda") * 65536
                + torch.randint(0, 3, (tokens,), device="cuda"),
                "padding": torch.randint(-5, 40, (tokens,), device="cuda"),
            }
            for what, loc in patterns.items():
                loc_dtype = torch.int32 if tokens % 3 else torch.int64
                for again in range(3):
                    kc, vc = (torch.full((slots, h, d), 0x55, dtype=torch.uint8, device="cuda") for _ in range(2))
                    store(modules[loc_dtype], E4, k, k, kc, vc, one, one, loc.to(loc_dtype))
                    whole_rows(report, f"{what} T={tokens} [{h}, {d}] try {again}", kc, vc, loc, loc >= 0, tokens <= 4096)

    for tokens in (2, 77, 2000, 50000):  # no loc, one row: claims, whatever the number of tokens
        k = marked(tokens, 8, 128)
        kc, vc = (torch.full((9, 8, 128), 0x55, dtype=torch.uint8, device="cuda") for _ in range(2))
        store(modules[torch.int64], E4, k, k, kc, vc, one, one, None, mult=0, offset=3)
        rows = torch.full((tokens,), 3, device="cuda")
        whole_rows(report, f"no loc, mult=0 T={tokens}", kc, vc, rows, rows >= 0, False)
    slots = 5000  # a row by its two names, from either end
    for tokens in (50, 3000):
        k = marked(tokens, 8, 128)
        loc = torch.randint(0, 40, (tokens,), device="cuda") - slots * torch.randint(0, 2, (tokens,), device="cuda")
        kc, vc = (torch.full((slots, 8, 128), 0x55, dtype=torch.uint8, device="cuda") for _ in range(2))
        store(modules[torch.int64], E4, k, k, kc, vc, one, one, loc, wrap=True)
        rows = torch.where(loc < 0, loc + slots, loc)
        whole_rows(report, f"wrapped names T={tokens}", kc, vc, rows, rows >= 0, True)


def streams_and_graphs(report: Report, modules: dict[torch.dtype, Any]) -> None:
    one, module, h, d, slots = torch.ones((), device="cuda"), modules[torch.int64], 8, 128, 70000
    for tokens in (300, 20000, 40000):
        k = marked(tokens, h, d)
        streams = [torch.cuda.Stream() for _ in range(3)]
        locs = [torch.randint(0, 900, (tokens,), device="cuda") for _ in streams]
        caches = [[torch.full((slots, h, d), 0x55, dtype=torch.uint8, device="cuda") for _ in range(2)] for _ in streams]
        torch.cuda.synchronize()
        for _ in range(10):  # the same rows of different caches, at the same time
            for stream, loc, (kc, vc) in zip(streams, locs, caches):
                with torch.cuda.stream(stream):
                    store(module, E4, k, k, kc, vc, one, one, loc)
        torch.cuda.synchronize()
        for i, (loc, (kc, vc)) in enumerate(zip(locs, caches)):
            whole_rows(report, f"three streams T={tokens} stream {i}", kc, vc, loc, loc >= 0, tokens <= 4096)

        kc, vc = (torch.full((slots, h, d), 0x55, dtype=torch.uint8, device="cuda") for _ in range(2))
        loc = torch.randint(0, 900, (tokens,), device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            store(module, E4, k, k, kc, vc, one, one, loc, check=True)  # the check is left out while capturing
        report.expect(f"capture runs nothing T={tokens}", int((kc != 0x55).sum()) == 0)
        for again in range(5):
            loc.copy_(torch.randint(0, 900, (tokens,), device="cuda"))
            kc.fill_(0x55), vc.fill_(0x55)
            graph.replay()
            torch.cuda.synchronize()
            whole_rows(report, f"graph replay {again} T={tokens}", kc, vc, loc, loc >= 0, tokens <= 4096)
