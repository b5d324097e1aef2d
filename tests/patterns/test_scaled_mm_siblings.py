"""scaled_mm_siblings and scaled_mm_cat: which products are joined, which are not, and what is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from inductor_ext import settings
from inductor_ext.backend import compile_graph
from inductor_ext.calls import aten
from inductor_ext.report.explain import passes_only
from tests.support import scaled_tables as tables
from tests.support.compiled import Recorder
from tests.support.fakegpu import fake_cuda_inputs
from tests.support.products import BF16, E4, empty, explained, one, quantise, refusals, scale, tensorwise
from tests.support.scaled_tables import FASTER, SMALL

forgotten = pytest.fixture(autouse=True)(tables.forgetting)


# ---- siblings --------------------------------------------------------------------------------------------------------


def pair(a: Any, s: Any, w: Any, t: Any, u: Any, r: Any) -> Any:
    return torch.sin(one(a, w, s, t)) + torch.sin(one(a, u, s, r))


def pair_inputs(m: int = 32) -> tuple[Any, ...]:
    return empty(m, 64), scale(), empty(48, 64), scale(), empty(48, 64), scale()


@pytest.mark.parametrize("together", [3.0, 5.0])
def test_siblings_where_one_launch_is_faster(monkeypatch: pytest.MonkeyPatch, together: float) -> None:
    """Apart each takes 2 µs."""
    tables.use(monkeypatch, {(48, 64): ((64, tables.STREAM, 2.0, 3.0),), (96, 64): ((64, tables.STREAM, together, 9.0),)})
    found = explained(pair, pair_inputs)
    if together < 4:
        (event,) = found.rewrites
        assert event.rule == "scaled_mm_siblings" and event.detail == f"2 products, N = 48 + 48: {tables.STREAM}"
        assert event.why == f"one launch of 3.0 µs for 2 of 4.0 µs together ({tables.STREAM})"
    else:
        assert found.counts() == {"scaled_mm": 2}
        assert refusals(found, "scaled_mm_siblings") == ["the products are faster apart"]


def test_siblings_with_a_dynamic_m(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[Any, ...]:
        a, *others = pair_inputs(40)
        torch._dynamo.mark_dynamic(a, 0)
        return a, *others

    tables.use(monkeypatch, {(48, 64): FASTER, (96, 64): SMALL})
    assert explained(pair, make, dynamic=None).counts() == {"scaled_mm_siblings": 1}
    # Apart 4 µs. What is faster for few rows must not lose much for many: the way back to PyTorch's operators costs a copy.
    for small, large, joined in ((9.0, 9.0, False), (2.0, 4.1, True), (2.0, 5.0, False)):
        tables.use(
            monkeypatch, {(48, 64): FASTER, (96, 64): ((64, tables.STREAM, small, 9.0), (16384, tables.TILE, large, 9.0))}
        )
        wanted = {"scaled_mm_siblings": 1} if joined else {"scaled_mm": 2}
        found = explained(pair, make, dynamic=None)
        assert found.counts() == wanted
        assert refusals(found, "scaled_mm_siblings") == ([] if joined else ["the products are faster apart"])


def test_a_dynamic_m_compiles_once() -> None:
    always = {"scaled_mm": "always", "scaled_mm_siblings": "always"}
    recorder = Recorder(rules=always)
    compiled = torch.compile(pair, backend=recorder, dynamic=None)
    pairs = [value for _ in range(2) for value in (torch.randn(32, 64).to(E4), torch.tensor(0.5))]
    for m in (40, 7, 96, 33):
        a = torch.randn(m, 64).to(E4)
        torch._dynamo.mark_dynamic(a, 0)
        inputs = (a, torch.tensor(0.25), *pairs)
        found, wanted = compiled(*inputs), pair(*inputs)
        assert found.shape == (m, 32)
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert len(recorder.reports) == 1 and recorder.counts() == {"scaled_mm_siblings": 1}


NO_SIBLINGS: dict[str, Any] = {
    "other_scale": lambda a, s, w, t, u, r: (one(a, w, s, t).sin(), one(a, u, r, t).sin()),
    "other_input": lambda a, s, w, t, u, r: (one(a, w, s, t).sin(), one(u, w, s, t).sin()),
    "other_dtype": lambda a, s, w, t, u, r: (
        one(a, w, s, t).sin(),
        torch._scaled_mm(a, u.t(), s, r, out_dtype=torch.float16).sin(),
    ),
    "other_accumulation": lambda a, s, w, t, u, r: (
        one(a, w, s, t).sin(),
        torch._scaled_mm(a, u.t(), s, r, out_dtype=BF16, use_fast_accum=True).sin(),
    ),
}


@pytest.mark.parametrize("name", NO_SIBLINGS)
def test_products_that_are_no_siblings(name: str) -> None:
    found = explained(NO_SIBLINGS[name], pair_inputs, scaled_mm_siblings="always", scaled_mm="off")
    assert found.counts() == {} and refusals(found, "scaled_mm_siblings") == []


def test_a_product_of_a_siblings_output_is_none() -> None:
    def chain(a: Any, s: Any, w: Any, t: Any) -> Any:
        return one(a, quantise(one(a, w, s, t), t), s, t).sin()

    make = lambda: (empty(32, 64), scale(), empty(64, 64), scale())  # noqa: E731
    found = explained(chain, make, scaled_mm_siblings="always", scaled_mm="off")
    assert found.counts().get("scaled_mm_siblings") is None
    assert refusals(found, "scaled_mm_siblings") == ["a sibling needs something computed later"]


def test_a_returned_product_leaves_its_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """k is returned, as a cache would be; q and v share a launch all the same."""
    tables.use(monkeypatch, {(48, 64): FASTER, (96, 64): FASTER})

    def three(a: Any, s: Any, *pairs: Any) -> Any:
        q, k, v = (one(a, w, s, t) for w, t in zip(pairs[::2], pairs[1::2]))
        return q.sin() + v.sin(), k.view(4, 8, 48)

    make = lambda: (*pair_inputs(), empty(48, 64), scale())  # noqa: E731
    found = explained(three, make)
    assert found.counts() == {"scaled_mm_siblings": 1, "scaled_mm": 1}
    assert "bfloat16[32, 96]" in found.graphs[0].after


def test_views_below_know_their_strides() -> None:
    """A later rule reads the strides of what it is given: those of a column slice."""

    def heads(a: Any, s: Any, w: Any, t: Any, u: Any, r: Any) -> Any:
        q, k = (p.view(4, 8, 3, 16).transpose(1, 2) for p in (one(a, w, s, t), one(a, u, s, r)))
        return q.sin() + k.sin()

    seen: list[Any] = []

    def look(rule: str, graph: Graph) -> None:
        views = [node.meta["val"] for node in graph.nodes if rule and node.target is aten.permute.default]
        seen.extend(tuple(view.stride()) for view in views if view.dim() == 4)

    def backend(gm: Any, inputs: Any, **_: Any) -> Any:
        chosen = settings.current(build="defer", rules={"scaled_mm_siblings": "always"})
        return compile_graph(gm, inputs, chosen, inner_compile=passes_only, observer=look)

    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
        torch.compile(heads, backend=backend, dynamic=False)(*pair_inputs())
    assert seen == [(768, 16, 96, 1)] * 2


def test_strides_read_by_a_user_are_refused_even_when_forced() -> None:
    def strided(a: Any, s: Any, w: Any, t: Any, u: Any, r: Any) -> Any:
        return torch.as_strided(one(a, w, s, t), (32, 24), (48, 2)).sin(), one(a, u, s, r).sin()

    found = explained(strided, pair_inputs, scaled_mm_siblings="always", scaled_mm="off")
    assert found.counts() == {} and refusals(found, "scaled_mm_siblings") == ["a user reads it by strides"]


def test_flex_attention_takes_columns() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def attention(a: Any, s: Any, *pairs: Any) -> Any:
        q, k, v = (one(a, w, s, t).view(2, 128, 2, 64).transpose(1, 2) for w, t in zip(pairs[::2], pairs[1::2]))
        return flex_attention(q, k, v)

    def make() -> tuple[Any, ...]:
        return empty(256, 64), scale(), *(value for _ in range(3) for value in (empty(128, 64), scale()))

    assert explained(attention, make, scaled_mm_siblings="always").counts() == {"scaled_mm_siblings": 1}


def test_an_operator_of_a_person_gets_its_strides() -> None:
    if not hasattr(torch.ops.inductor_ext_tests, "look"):
        torch.library.define("inductor_ext_tests::look", "(Tensor x) -> Tensor")
        torch.library.register_fake("inductor_ext_tests::look", lambda x: torch.empty_like(x))

    def looked_at(a: Any, s: Any, w: Any, t: Any, u: Any, r: Any) -> Any:
        return torch.ops.inductor_ext_tests.look(one(a, w, s, t).view(4, 8, 48)), one(a, u, s, r).sin()

    found = explained(looked_at, pair_inputs, scaled_mm="off")
    assert refusals(found, "scaled_mm_siblings") == ["a user is not one of PyTorch's operators"]


def test_siblings_of_five_are_one_call() -> None:
    def five(a: Any, s: Any, *pairs: Any) -> Any:
        return sum(torch.sin(one(a, w, s, t)) for w, t in zip(pairs[::2], pairs[1::2]))

    def make() -> tuple[Any, ...]:
        return empty(32, 64), scale(), *(value for _ in range(5) for value in (empty(48, 64), scale()))

    found = explained(five, make, scaled_mm_siblings="always")
    assert found.counts() == {"scaled_mm_siblings": 1} and "bfloat16[32, 240]" in found.graphs[0].after


def test_views_of_weights_are_moved_up() -> None:
    def fused(a: Any, s: Any, w: Any, t: Any, u: Any, r: Any) -> Any:
        weight = torch.sin(one(a, w[:32], s, t))
        return weight + torch.sin(one(a, u.view(48, 64)[16:], s, r.reshape(1, 1)))

    assert explained(fused, pair_inputs, scaled_mm_siblings="always").counts() == {"scaled_mm_siblings": 1}


# ---- concatenations --------------------------------------------------------------------------------------------------


def test_a_concatenation_decides_by_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(a: Any, w: Any, s: Any, t: Any, c: Any, u: Any, r: Any, v: Any) -> Any:
        return torch.cat([one(a, w, s, t), one(c, u, r, v)], dim=-1)

    make = lambda: (*tensorwise(), *tensorwise(k=128))  # noqa: E731
    fast = ((64, tables.STREAM, 2.0, 3.0),)
    tables.use(monkeypatch, {(48, 64): fast, (48, 128): fast, (96, 128): fast})
    found = explained(joined, make)
    assert found.counts() == {"scaled_mm_cat": 1}
    tables.use(monkeypatch, {(48, 64): fast, (48, 128): fast, (96, 128): ((64, tables.STREAM, 20.0, 30.0),)})
    found = explained(joined, make)
    assert found.counts() == {"scaled_mm": 2} and refusals(found, "scaled_mm_cat") == ["the products are faster apart"]


def test_rows_one_above_another_are_no_columns() -> None:
    def stacked(a: Any, w: Any, s: Any, t: Any, c: Any, u: Any, r: Any, v: Any) -> Any:
        return torch.cat([one(a, w, s, t), one(c, u, r, v)])

    found = explained(stacked, lambda: (*tensorwise(), *tensorwise()), scaled_mm_cat="always", scaled_mm="off")
    assert found.counts() == {} and refusals(found, "scaled_mm_cat") == []
