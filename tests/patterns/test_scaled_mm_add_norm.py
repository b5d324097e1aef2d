"""scaled_mm_add_norm after the rules that make what it reads: what is measured decides, generated code plans its outputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext.kernels.scaled_mm_add_norm.op import table
from tests.support import scaled_tables as tables
from tests.support.compiled import run_compiled
from tests.support.fakegpu import fake_gpu
from tests.support.products import BF16, E4, empty, explained, refusals

forgotten = pytest.fixture(autouse=True)(tables.forgetting)
M, N, K = 48, 1024, 64
BEFORE = {"scaled_mm": "always", "scaled_mm_add": "always", "rms_norm_quantize": "always", "fp8_quantize": "always"}
ALWAYS = {**BEFORE, "scaled_mm_add_norm": "always"}
RULE = "scaled_mm_add_norm"


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    f = x.float()
    return weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()


def project(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A linear layer of torchao's, with a dynamic scale a row."""
    s = (x.abs().amax(-1, keepdim=True) / 448.0).float()
    q = (x.float() / s).clamp(-448.0, 448.0).to(E4)
    return torch._scaled_mm(q, w.t(), s, t.t(), out_dtype=BF16, use_fast_accum=True)


def layers(mixed: Any, x: Any, w1: Any, t1: Any, n1: Any, w2: Any, t2: Any, w3: Any, t3: Any, n2: Any) -> Any:
    """o, the norm, an MLP's only product, its way back, the next norm and a product: as layers follow each other."""
    x = x + project(mixed, w1, t1)
    y = project(norm(x, n1), w2, t2)
    x = x + project(y, w3, t3)
    return project(norm(x, n2), w2, t2), x


_WEIGHTS = [((n, k), (n, 1)) for n, k in ((N, K), (K, N), (N, K))]
(_W1, _T1), (_W2, _T2), (_W3, _T3) = (((w, E4), (t, torch.float32)) for w, t in _WEIGHTS)
SHAPES = ((M, K), BF16), ((M, N), BF16), _W1, _T1, ((N,), BF16), _W2, _T2, _W3, _T3, ((N,), BF16)


def given() -> tuple[Any, ...]:
    """On a fake GPU."""
    return tuple(empty(*shape, dtype=dtype) for shape, dtype in SHAPES)


def on_cpu() -> tuple[Any, ...]:
    torch.manual_seed(0)
    return tuple(
        (torch.rand(shape) + 0.1 if dtype is torch.float32 else torch.randn(shape)).to(dtype) for shape, dtype in SHAPES
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_two_launches_a_layer(dynamic: bool) -> None:
    torch._dynamo.reset()

    def make() -> tuple[Any, ...]:
        made = given()
        for value in made[:2] if dynamic else ():
            torch._dynamo.mark_dynamic(value, 0)
        return made

    found = explained(layers, make, dynamic=None if dynamic else False, **ALWAYS)
    counts = found.counts()
    assert counts[RULE] == 2 and refusals(found, RULE) == []
    (graph,) = found.graphs
    assert "inductor_ext.rms_norm_quantize" not in graph.after and "inductor_ext.scaled_mm_add.default" not in graph.after
    calls = [line for line in graph.after.splitlines() if "inductor_ext.scaled_mm_add_norm.default(" in line]
    assert len(calls) == 2
    for line in calls:
        assert ("tile:128x128p@1x8)" in line) == (not dynamic), "where M is symbolic the op chooses when it runs"
    assert {event.detail for event in found.rewrites if event.rule == RULE} == {"norm 'cast mul', N = 1024: tile:128x128p@1x8"}


def test_nothing_is_done_until_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = explained(layers, given, **BEFORE)
    assert RULE not in found.counts() and found.counts()["scaled_mm_add"] == 2
    assert set(refusals(found, RULE)) == {"not measured"}
    kind, other = (table(n).kind(True, True) for n in (1024, 512))
    for kinds, us, reason in (((kind,), 2.0, None), ((kind,), 3.99, "it would not be faster"), ((other,), 2.0, "not measured")):
        tables.use(monkeypatch, {(N, K): ((32, "tile:64x128p@1x8", us, 4.0), (64, "tile:64x128p@1x8", us, 4.0))}, kinds=kinds)
        torch._dynamo.reset()
        found = explained(layers, given, **BEFORE)
        assert found.counts().get(RULE, 0) == (2 if reason is None else 0)
        assert set(refusals(found, RULE)) == ({reason} if reason else set())
        if reason is None:
            (detail,) = {event.detail for event in found.rewrites if event.rule == RULE}
            assert detail.endswith(": tile:64x128p@1x8")


def test_it_computes_what_two_launches_do() -> None:
    torch._dynamo.reset()
    inputs = on_cpu()
    found = inductor_ext.verify(layers, *inputs, rules=ALWAYS, end_to_end=False)
    (check,) = [check for check in found.checks if check.rule == RULE]
    assert check.ok and check.rewrites == 2 and check.differing == 0, "the reference is the composition of the two operators'"
    together, recorder = run_compiled(layers, inputs, rules=ALWAYS)
    apart, _ = run_compiled(layers, inputs, rules=BEFORE)
    assert recorder.counts()[RULE] == 2
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)


def source_of(make: Callable[[], Any]) -> str:
    with fake_gpu() as gpu:
        source = gpu.source(layers, make, backend=inductor_ext.backend(build="defer", rules=ALWAYS), dynamic=False)
    return source.split("runner = ")[0].split("benchmark_compiled_module")[0]


def test_its_outputs_are_planned_buffers() -> None:
    source = source_of(given)
    first, second = [line for line in source.splitlines() if "extern_kernels.inductor_ext_scaled_mm_add_norm(" in line]
    assert "inductor_ext_rms_norm_quantize" not in source and "inductor_ext_scaled_mm_add(" not in source
    total, quantised, scales = re.findall(r"out0=(buf\d+), out1=(buf\d+), out2=(buf\d+)\)", first)[0]
    assert f"{total} = empty_strided_cuda(({M}, {N}), ({N}, 1), torch.bfloat16)" in source
    assert f"{quantised} = empty_strided_cuda(({M}, {N}), ({N}, 1), torch.float8_e4m3fn)" in source
    assert f"{scales} = empty_strided_cuda(({M}, 1), (1, 1), torch.float32)" in source
    assert f", None, {total}, " in second, "the second one adds to the first one's sum"
    (read,) = [line for line in source.splitlines() if f"inductor_ext_scaled_mm([{quantised}]" in line]
    assert f"[{scales}]" in read and ".run(" not in source
