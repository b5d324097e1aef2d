"""What shares memory: results, caches read between two stores, inputs that lie in what is written, slots out of range."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext import memory
from tests.support.compiled import run_compiled, run_copies
from tests.support.equal import assert_all_same_bytes
from tests.support.fakegpu import fake_cuda_inputs

E4 = torch.float8_e4m3fn
ROTATED = {"qk_norm_rope": "always", "qk_norm_rope_store": "always"}


def _quantise(x: torch.Tensor) -> torch.Tensor:
    return (x.float() / 0.25).clamp(-448.0, 448.0).to(E4)


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = (x.abs().amax(-1, keepdim=True) / 448.0).float()
    return (x.float() / s).clamp(-448.0, 448.0).to(E4), s


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 120, shape, dtype=torch.uint8).view(E4)


def _inputs() -> tuple[torch.Tensor, ...]:
    k, v = torch.randn(5, 2, 8).bfloat16(), torch.randn(5, 2, 8).bfloat16()
    return k, v, _codes(4, 16, 2, 8), torch.tensor([0, 1, 2, 9, 11])


def _between(k: Any, v: Any, cache: Any, at: Any) -> Any:
    cache.view(-1, 2, 8)[at] = _quantise(k)
    then = cache.clone()
    cache.view(-1, 2, 8)[at + 1] = _quantise(v)
    return then


def _between_as_bytes(k: Any, v: Any, cache: Any, at: Any) -> Any:
    cache.view(-1, 2, 8)[at] = _quantise(k)
    then = cache.view(torch.uint8)[1:].clone()
    cache.view(-1, 2, 8)[at] = _quantise(v)
    return then


def _before(k: Any, v: Any, cache: Any, at: Any) -> Any:
    old = cache.clone()
    cache.view(-1, 2, 8)[at] = _quantise(k)
    cache.view(-1, 2, 8)[at + 1] = _quantise(v)
    return old


def _read_between(k: Any, v: Any, cache: Any, at: Any) -> Any:
    cache.view(-1, 2, 8)[at] = _quantise(k)
    sums = cache.view(-1, 16)[::2].float().sum(0)
    cache.view(-1, 2, 8)[at] = _quantise(v)
    return sums


def _copied_elsewhere(k: Any, v: Any, cache: Any, at: Any) -> Any:
    cache.view(-1, 2, 8)[at] = _quantise(k)
    k.copy_(cache[0, :5].float())
    cache.view(-1, 2, 8)[at] = _quantise(v)


@pytest.mark.parametrize(
    "fn", [_between, _between_as_bytes, _before, _read_between, _copied_elsewhere], ids=lambda f: f.__name__
)
def test_a_cache_that_is_read_between_two_stores(fn: Callable[..., Any]) -> None:
    inputs = _inputs()
    found, _ = run_compiled(fn, inputs, rules={"downcast_fp8": "always"})
    assert_all_same_bytes(found, run_copies(fn, inputs))


def test_the_last_state_of_a_cache_may_be_returned() -> None:
    def store(k: Any, v: Any, cache: Any, at: Any) -> Any:
        cache.view(-1, 2, 8)[at] = _quantise(k)
        return cache[0]

    inputs = _inputs()
    found, recorder = run_compiled(store, inputs)
    assert recorder.counts() == {"downcast_fp8": 1}
    assert_all_same_bytes(found, run_copies(store, inputs))


def test_a_cache_returned_between_two_stores_is_a_near_miss() -> None:
    _, recorder = run_compiled(_between, _inputs())
    reasons = {refusal.reason for refusal in recorder.refusals("downcast_fp8")}
    assert "the caller gets the cache as it is between two stores" in reasons


def _v_out_of_k(qkv: Any, cos: Any, sin: Any, k_cache: Any, v_cache: Any, slots: Any) -> Any:
    """V's rows are old rows of the K cache that the same launch would write."""
    k = qkv.view(2, 6, 2, 64).transpose(1, 2)
    k = k * cos[:, None] + torch.cat((-k[..., 32:], k[..., :32]), -1) * sin[:, None]
    old = k_cache[4:16].clone()
    k_cache[slots] = k.transpose(1, 2).reshape(12, 2, 64)
    v_cache[slots] = old
    return k


def _k_out_of_itself(k: Any, v: Any, cache: Any, at: Any) -> None:
    flat = cache.view(torch.uint8).view(-1, 2, 8)
    flat[at] = flat[at[0] : at[0] + 5].clone()


def test_rows_that_lie_in_the_cache_that_is_written() -> None:
    tables = [torch.rand(2, 6, 64).bfloat16() for _ in range(2)]
    caches = [torch.randn(64, 2, 64).bfloat16() for _ in range(2)]
    inputs = (torch.randn(2, 6, 128).bfloat16(), *tables, *caches, torch.arange(12) * 3)
    found, recorder = run_compiled(_v_out_of_k, inputs, rules=ROTATED)
    assert_all_same_bytes(found, run_copies(_v_out_of_k, inputs))
    assert recorder.counts().get("qk_norm_rope_store") == 1, "K alone is stored by the launch that rotates it"


def test_tables_that_lie_in_the_cache_that_is_written() -> None:
    def turned(k: Any, v: Any, cos: Any, cache: Any, slots: Any) -> Any:
        sin = cache[:6].view(1, 6, 64)
        k = k.view(1, 6, 1, 64).transpose(1, 2)
        k = k * cos[:, None] + torch.cat((-k[..., 32:], k[..., :32]), -1) * sin[:, None]
        cache[slots] = k.transpose(1, 2).reshape(6, 1, 64)

    inputs = (torch.randn(6, 64).bfloat16(), torch.randn(6, 64).bfloat16(), torch.rand(1, 6, 64).bfloat16(),
              torch.randn(32, 1, 64).bfloat16(), torch.arange(6) * 2)  # fmt: skip
    found, recorder = run_compiled(turned, inputs, rules=ROTATED)
    assert_all_same_bytes(found, run_copies(turned, inputs))
    assert "an input lies in the cache" in {refusal.reason for refusal in recorder.refusals("qk_norm_rope_store")}


@pytest.mark.parametrize(
    "views",
    [
        (lambda a: a, lambda b: b),
        (lambda a: a.view(torch.uint8), lambda b: b[1:]),
        (lambda a: a[:, ::2], lambda b: b.t()),
        (lambda a: a.chunk(2)[1], lambda b: b.select(0, 1)),
        (lambda a: a.split(2)[0].unsqueeze(0), lambda b: b.view(-1)[3:]),
    ],
)
def test_two_results_are_two_buffers(views: Any) -> None:
    def twice(x: Any) -> Any:
        (a, _), (b, _) = _rows(x), _rows(x)
        return views[0](a), views[1](b)

    x = torch.randn(4, 32)
    found, _ = run_compiled(twice, (x,))
    assert_all_same_bytes(found, run_copies(twice, (x,)))
    assert found[0].untyped_storage().data_ptr() != found[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize("slot", [64, -65, 1000])
def test_a_slot_out_of_range_is_an_error_as_in_eager_mode(slot: int, checks: bool) -> None:
    def store(k: Any, cache: Any, at: Any) -> None:
        cache.view(-1, 2, 16)[at] = _quantise(k)

    k, cache = torch.randn(3, 2, 16).bfloat16(), _codes(4, 16, 2, 16)
    with pytest.raises(IndexError, match="64"):
        store(k, cache, torch.tensor([1, slot, 3]))
    with pytest.raises(IndexError, match=f"wanted rows in .0, 64., found {slot if slot > 0 else slot + 64} for token 1"):
        run_compiled(store, (k, cache, torch.tensor([1, slot, 3])), checks=checks)


@pytest.mark.parametrize("checks", [False, True])
def test_checks_reach_the_launch_on_a_gpu(checks: bool) -> None:
    def store(k: Any, cache: Any, at: Any) -> None:
        cache.view(-1, 2, 16)[at] = _quantise(k)

    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
        k = torch.empty(3, 2, 16, dtype=torch.bfloat16, device="cuda")
        cache, at = torch.empty(4, 16, 2, 16, dtype=E4, device="cuda"), torch.arange(3, device="cuda")
        found = inductor_ext.explain(store, k, cache, at, options={"checks": checks})
    assert found.counts() == {"downcast_fp8": 1}
    assert f"check={checks}," in found.graphs[0].after


def test_sizes_and_numbers_lie_in_no_memory() -> None:
    graph = torch.fx.Graph()
    base = graph.placeholder("base")
    size = graph.call_function(torch.ops.aten.sym_size.int, (base, 0))
    check = graph.call_function(torch.ops.aten._assert_async.default, (base,))
    part = graph.call_function(operator.getitem, (base, 0))
    assert [memory.is_view(each) for each in (3, None, base, size, check, part)] == [False] * 6
    assert memory.written_input(3) is None and memory.written_input(size) is None
    assert memory.read_by_another_name([3, None, size], [base]) is None
    assert memory.read_by_another_name([3, base], [base]) is base


def test_an_attribute_of_the_module_is_no_graph_input() -> None:
    graph = torch.fx.Graph()
    constant, rows, at = graph.get_attr("constant"), graph.placeholder("rows"), graph.placeholder("at")
    stored = graph.call_function(torch.ops.aten.index_put.default, (constant, [at], rows))
    assert memory.written_input(stored) is None


def test_a_view_is_read_once_and_only_of_what_it_views() -> None:
    """A view that takes a value twice, or takes it as something other than what it looks at."""
    graph = torch.fx.Graph()
    x, rows = graph.placeholder("x"), graph.placeholder("rows")
    view = graph.call_function(torch.ops.aten.view.default, (x, [4]))
    sizes = graph.call_function(torch.ops.aten.view.default, (rows, [x]))
    used = graph.call_function(torch.ops.aten.relu.default, (sizes,))
    graph.output((view, used))
    found = list(memory.readers(x))
    assert (sizes, used) not in found and (x, sizes) in found
    assert len(found) == len(set(found))


def test_one_value_that_is_returned_may_be_one_with_itself() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    a, b, hidden = (graph.call_function(torch.ops.aten.relu.default, (x,)) for _ in range(3))
    graph.output((a, b))
    assert memory.may_be_one(a, a) and not memory.may_be_one(a, b)
    assert memory.may_be_one(a, hidden) and memory.may_be_one(hidden, b)


def test_what_is_copied_into_another_input_is_not_written_back() -> None:
    graph = torch.fx.Graph()
    cache, other, rows, at = (graph.placeholder(name) for name in ("cache", "other", "rows", "at"))
    stored = graph.call_function(torch.ops.aten.index_put.default, (cache, [at], rows))
    graph.call_function(torch.ops.aten.copy_.default, (other, stored))
    assert not memory.is_written_back(stored)
    graph.call_function(torch.ops.aten.copy_.default, (cache, stored))
    assert memory.is_written_back(stored)


def test_an_ops_own_results_are_no_versions_of_what_it_writes() -> None:
    graph = torch.fx.Graph()
    cache = graph.placeholder("cache")
    wrote = graph.call_function(auto_functionalized_v2, ("op",), {"_all_bases": [cache]})
    wrote.meta["val"] = (torch.empty(2), torch.empty(3))
    own, version = (graph.call_function(operator.getitem, (wrote, index)) for index in range(2))
    assert memory.written_input(own) is None and memory.written_input(version) is cache


def test_a_version_by_strides_lies_in_its_input() -> None:
    # PyTorch writes into inputs that are views of one tensor by as_strided_scatter on that tensor
    graph = torch.fx.Graph()
    base, rows = graph.placeholder("base"), graph.placeholder("rows")
    stored = graph.call_function(torch.ops.aten.as_strided_scatter.default, (base, rows, [2, 8], [8, 1], 16))
    view = graph.call_function(torch.ops.aten.as_strided.default, (stored, [4, 8], [8, 1], 0))
    assert memory.written_input(view) is base
    assert memory.read_by_another_name([view], [base]) is view
