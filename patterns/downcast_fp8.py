"""downcast_fp8: K and V, scaled, clamped, cast to FP8 and stored into their caches at the same rows, become one launch.

    k_cache = index_put(k_cache, [slots], cast(k));  v_cache = index_put(v_cache, [slots], cast(v))
        →  inductor_ext.downcast_fp8(k, v, k_cache!, v_cache!, …)

Stores through ``index_put``, ``index_copy``, slice assignment and ``copy_``; caches used directly, through ``.view``, as uint8,
or as halves of one ``[2, …]`` buffer. The op mutates the graph input itself, so no copy of the cache is made. A store without
a partner is rewritten on its own. Negative indices count from the end, as they do in ``index_put``.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from inductor_ext import torch_compat
from inductor_ext.graph import (
    RESHAPES,
    aten,
    call,
    describe,
    erase_dead,
    fake_replay,
    is_call,
    is_opaque,
    known_equal,
    replay,
    same_sizes,
    value_of,
)
from inductor_ext.kernels import steps
from inductor_ext.kernels.downcast_fp8.op import OP
from inductor_ext.patterns.support import cache_store, fp8_chain
from inductor_ext.patterns.support.cache_store import Store
from inductor_ext.patterns.support.fp8_chain import Chain, Failure
from inductor_ext.rule import Call, Context, Example, Match, Refusal, Rule

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
_OTHER_VIEWS = (
    aten.view.dtype,
    aten.select.int,
    aten.slice.Tensor,
    aten.unbind.int,
    aten.split_with_sizes.default,
    operator.getitem,
)


@dataclasses.dataclass
class Half:
    """One of K and V: the store and the chain that makes what is stored."""

    store: Store
    chain: Chain

    @property
    def scale(self) -> Node | None:
        return self.chain.operands[0] if self.chain.operands else None

    def input_views(self) -> list[Node]:
        """The views from the chain's input to the stored rows: the chain's own, and those between cast and store."""
        node, after = self.store.value, []
        while node is not self.chain.cast:
            if not is_call(node, aten.view.dtype):
                after.append(node)
            node = node.args[0]
        return [*self.chain.pre_views, *self.chain.post_views, *reversed(after)]

    def input_value(self) -> torch.Tensor:
        """What the op reads: the chain's input in the shape of the stored rows."""
        value = fake_replay(self.input_views(), value_of(self.chain.x))
        return value.unsqueeze(0) if self.store.one_row else value

    def insert_input(self, graph: Graph) -> Node:
        node = replay(graph, self.input_views(), self.chain.x)
        return call(graph, aten.unsqueeze.default, node, 0) if self.store.one_row else node


#: Rows (exclusive) between which Inductor's one kernel for a direct, indexed store beats ours, which makes sure that a repeated
#: index stores one row whole: 4.0 against 5.2 µs at 2048 rows of 8 × 128 on an H200, 28.6 against 29.4 at 16 384, but 108
#: against 102 at 65 536 (benchmarks/results/h200/kv_cache_compiled.json).
STOCK_WINS = (256, 32768)


def _stock_wins(tokens: int) -> bool:
    return STOCK_WINS[0] < tokens < STOCK_WINS[1]


def _hint(size: Any) -> int:
    """A size as the graph was traced with; no guard is added."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def anchors(graph: Graph) -> Iterable[Node]:
    return [node for node in graph.nodes if is_call(node, *cache_store.SCATTERS)]


def guard(node: Node, context: Context) -> Match | Refusal | None:
    half = _half(node)
    if half is None:
        return None
    if isinstance(half, Failure):
        return context.refuse(half.node, half.reason, wanted=half.wanted, found=half.found)
    partner = _partner(half)
    halves = [half] if partner is None else [partner, half]
    if partner is None and _is_first_of_a_pair(half):
        return None  # the pair is matched at its second store
    if _insertion_point(halves) is None:
        return context.refuse(
            node,
            "the old rows are read after the new ones",
            wanted="every read of the cache as it was before any read of it as it becomes",
            found=describe(half.store.root),
        )
    if not context.forced and all(h.store.direct for h in halves) and not all(is_opaque(h.chain.x) for h in halves):
        fusible = next(h for h in halves if not is_opaque(h.chain.x))
        return context.refuse(
            node,
            "Inductor fuses this store into its producer for free",
            wanted="a graph input, a GEMM, attention or another opaque kernel as producer, or a cache behind a view",
            found=describe(fusible.chain.x),
        )
    tokens = _hint(half.input_value().shape[0])
    if not context.forced and half.store.loc is not None and all(h.store.direct for h in halves) and _stock_wins(tokens):
        return context.refuse(
            node,
            "stock stores this many rows faster",
            wanted=f"at most {STOCK_WINS[0]} or at least {STOCK_WINS[1]} rows, or a cache behind a view",
            found=f"{tokens} rows",
        )
    why = "forced" if context.forced else "stock copies caches that are behind a view"
    if not context.forced and all(h.store.direct for h in halves):
        why = f"its input comes from {describe(halves[0].chain.x)}"
    detail = f"{'K and V' if len(halves) == 2 else 'one tensor'}: {halves[0].chain.program} → {halves[0].chain.dtype}"
    return Match(node, (Call(OP, _arguments(halves)),), detail, why, halves)


def _half(scatter: Node) -> Half | Failure | None:
    """A scatter of a chain's FP8 rows into a graph input; None when it stores something else."""
    value = scatter.args[2] if is_call(scatter, aten.index_put.default, aten._unsafe_index_put.default) else scatter.args[1]
    if not isinstance(value, Node):
        return None
    cast = _cast_above(value)
    if cast is None:
        return None
    store = cache_store.trace(scatter)
    if store is None or isinstance(store, Failure):
        return store
    if cache_store.written_input(store.root) is None:
        return Failure(scatter, "the cache is not a graph input", "a buffer or argument of the model", describe(store.root))
    chain = fp8_chain.trace(cast)
    if isinstance(chain, Failure):
        return chain
    if len(chain.operands) > 1 or any(value_of(operand).numel() != 1 for operand in chain.operands):
        found = ", ".join(map(describe, chain.operands))
        return Failure(cast, "scale layout", "one scale of one element", found)
    if any(value_of(o).device != value_of(chain.x).device for o in chain.operands):
        return Failure(cast, "scale device", str(value_of(chain.x).device), describe(chain.operands[0]))
    stored, buffer = value_of(scatter.args[0]).dtype, value_of(store.root)
    for found in (stored, buffer.dtype):  # the op gets the buffer, not the view of it
        if found not in (chain.dtype, torch.uint8):
            return Failure(scatter, "cache dtype", f"{chain.dtype} or uint8", str(found))
    if value_of(value).dtype is not stored:  # copy_ converts, and a number is not its byte
        return Failure(scatter, "the store converts", f"rows of the cache's dtype {stored}", describe(value))
    devices = [value_of(node).device for node in (chain.x, store.loc) if node is not None]
    if any(device != buffer.device for device in devices):
        found = ", ".join(map(str, devices))
        return Failure(scatter, "device", f"rows and indices on the cache's device {buffer.device}", found)
    if not _rows_contiguous(cache_store.geometry(store, value_of(store.root))):
        found = f"strides {list(store.destination().stride())}"
        return Failure(scatter, "cache layout", "rows that are contiguous in memory", found)
    half = Half(store, chain)
    if not _rows_contiguous(half.input_value()):
        found = f"{describe(chain.x)} strides {list(half.input_value().stride())}"
        return Failure(cast, "input layout", "rows that are contiguous in memory", found)
    if len(cast.users) > 1 or (value is not cast and len(value.users) > 1):
        other = [user for user in cast.users if user is not scatter and user is not value]
        return Failure(
            cast, "the stored FP8 rows have a second user", "the store alone", describe(other[0] if other else value)
        )
    return half


def _cast_above(value: Node) -> Node | None:
    """The cast that a stored value comes from, through views and ``.view(uint8)``."""
    while is_call(value, aten.view.dtype) or (
        isinstance(value, Node) and value.op == "call_function" and value.target in RESHAPES
    ):
        value = value.args[0]
    return value if fp8_chain.is_fp8_cast(value) else None


def _rows_contiguous(cache: torch.Tensor) -> bool:
    expected: Any = 1
    for size, stride in reversed(list(zip(cache.shape[1:], cache.stride()[1:]))):
        if not known_equal(size, 1) and not known_equal(stride, expected):
            return False
        expected = expected * size
    return True


# ---- pairs -------------------------------------------------------------------------------------------------------------


def _partner(second: Half) -> Half | None:
    """The store just before ``second``, if it can join it and nobody reads its cache in between."""
    scatter = second.store.scatter
    first = _neighbour(scatter, "prev")
    if first is None or not _joins(first, second):
        return None
    return first if _insertion_point([first, second]) is not None else None


def _insertion_point(halves: list[Half]) -> Node | None:
    """The node after which one op can do the stores: its inputs are there and the caches' old rows have been read, but not
    yet the new ones. None when there is no such place."""
    inputs = [half.chain.x for half in halves] + [halves[0].store.root]
    inputs += [node for half in halves for node in (half.scale, half.store.loc, half.store.mult, half.store.offset)]
    own = set().union(*(_between(half) for half in halves))
    if halves[-1].store.root not in own:
        inputs.append(halves[-1].store.root)
    inputs += [reader for half in halves for reader in _readers(half.store.root) if reader not in own]
    last = max(node for node in inputs if isinstance(node, Node))
    readers = [user for half in halves for user in (*half.store.top.users, *half.store.scatter.users) if user not in own]
    return last if all(reader > last for reader in readers) else None


def _readers(root: Node) -> list[Node]:
    """What reads a version of a cache, through views too; not the copy back into the buffer itself."""
    found, pending = [], list(root.users)
    while pending:
        user = pending.pop()
        if is_call(user, *RESHAPES, *_OTHER_VIEWS):
            pending.extend(user.users)
        elif user.op != "output" and not is_call(user, aten.copy_.default):
            found.append(user)
    return found


def _is_first_of_a_pair(half: Half) -> bool:
    second = _neighbour(half.store.scatter, "next")
    partner = None if second is None else _partner(second)
    return partner is not None and partner.store.scatter is half.store.scatter


def _neighbour(scatter: Node, direction: str) -> Half | None:
    """The nearest other FP8 store before or after. K and V of a layer are neighbours; no pair is looked for further away."""
    node: Node = getattr(scatter, direction)
    while node.op != "root":
        if is_call(node, *cache_store.SCATTERS):
            half = _half(node)
            if isinstance(half, Half):
                return half
        node = getattr(node, direction)
    return None


def _between(half: Half) -> set[Node]:
    """The nodes that only take ``half``'s view of its cache or put it back: they go when the store is rewritten."""
    nodes = {*half.store.views, half.store.top, half.store.scatter}
    for view in half.store.views:
        if is_call(view, operator.getitem):
            nodes.add(view.args[0])
    node: Node = half.store.scatter
    while node is not half.store.top:
        node = next(user for user in node.users if user is half.store.top or user.target in cache_store.INVERSES)
        nodes.add(node)
    return nodes


def _joins(first: Half, second: Half) -> bool:
    a, b = first.store, second.store
    if a.scatter.target != b.scatter.target or a.loc is not b.loc or (a.mult, a.offset) != (b.mult, b.offset):
        return False
    if first.chain.dtype != second.chain.dtype or not same_sizes(first.input_value().shape[:1], second.input_value().shape[:1]):
        return False
    if value_of(first.chain.x).dtype != value_of(second.chain.x).dtype:
        return False
    if len(steps.constants(first.chain.program, second.chain.program)) > steps.MAX_CONSTS:
        return False
    # One kernel has one number of slots and one size of row for both.
    if not same_sizes(a.destination().shape, b.destination().shape):
        return False
    one, two = cache_store.written_input(a.root), cache_store.written_input(b.root)
    if one is two:  # halves of one buffer: the second store must build on the first, and write other memory
        return b.root is a.top and b.views != [] and _disjoint(a, b)
    return True


def _disjoint(a: Store, b: Store) -> bool:
    """Whether two views of one buffer share no memory: one after the other, or their rows side by side."""
    base = value_of(a.root)
    one, two = cache_store.geometry(a, base), cache_store.geometry(b, base)
    if not same_sizes(one.stride(), two.stride()):
        return False
    row = math.prod(one.shape[1:])
    pitch, slots = one.stride(0), one.shape[0]
    for low, high in ((one, two), (two, one)):
        gap = high.storage_offset() - low.storage_offset()
        if statically_known_true(gap >= (slots - 1) * pitch + row):
            return True
        if statically_known_true(gap >= row) and statically_known_true(gap + row <= pitch):
            return True
    return False


# ---- replacement -------------------------------------------------------------------------------------------------------


def _arguments(halves: list[Half]) -> tuple[Any, ...]:
    """Fake arguments of the op, in schema order."""
    k, v = halves[0], halves[1] if len(halves) == 2 else None

    def cache(half: Half) -> torch.Tensor:
        return cache_store.geometry(half.store, value_of(half.store.root))

    return (
        k.input_value(),
        v and v.input_value(),
        cache(k),
        v and cache(v),
        k.scale and value_of(k.scale),
        v and v.scale and value_of(v.scale),
        k.store.loc and value_of(k.store.loc),
        k.chain.program,
        v.chain.program if v else k.chain.program,
        k.chain.dtype,
        value_of(k.store.mult),
        value_of(k.store.offset),
        True,
    )


def replace(match: Match) -> None:
    halves: list[Half] = match.data
    graph = match.node.graph
    last = halves[-1].store
    point = _insertion_point(halves)
    assert point is not None
    while point.op == "placeholder" and point.next.op == "placeholder":
        point = point.next
    with graph.inserting_before(point.next):
        inputs = [half.insert_input(graph) for half in halves]
        # Two halves of one buffer share a base: the first store's root is the version that both build on.
        shared = len(halves) == 2 and cache_store.written_input(halves[0].store.root) is cache_store.written_input(last.root)
        bases = [halves[0].store.root] if len(halves) == 1 or shared else [half.store.root for half in halves]
        kwargs: dict[str, Any] = {
            "k": inputs[0],
            "v": inputs[1] if len(halves) == 2 else None,
            "k_scale": halves[0].scale,
            "v_scale": halves[-1].scale if len(halves) == 2 else None,
            "loc": last.loc,
            "k_program": halves[0].chain.program,
            "v_program": halves[-1].chain.program,
            "dtype": halves[0].chain.dtype,
            "mult": last.mult,
            "offset": last.offset,
            "wrap": True,
        }
        for name, half in zip(("k_cache", "v_cache"), halves):
            base = bases[0] if shared else half.store.root
            kwargs[f"_{name}_base_index"] = bases.index(base)
            view = cache_store.geometry(half.store, value_of(base))
            if half.store.views:
                kwargs[f"_{name}_size"] = tuple(torch_compat.symbolic(graph, list(view.shape)))
                kwargs[f"_{name}_stride"] = tuple(torch_compat.symbolic(graph, list(view.stride())))
                kwargs[f"_{name}_storage_offset"] = torch_compat.symbolic(graph, [view.storage_offset()])[0]
        if len(halves) == 1:
            kwargs["_v_cache_base_index"] = None
        kwargs["_all_bases"] = bases
        node = graph.call_function(auto_functionalized_v2, (OP.overload,), kwargs)
        results = [torch_compat.fresh_base(value_of(base)) for base in bases]
        node.meta.update(_provenance(match.node), val=(None, *results))
        tops = []
        for index, result in enumerate(results):
            top = graph.call_function(operator.getitem, (node, index + 1))
            top.meta.update(_provenance(match.node), val=result)
            tops.append(top)
    for half, top in zip(halves, tops if len(tops) == len(halves) else tops * 2):
        _publish(graph, half, top)
    for half in reversed(halves):
        erase_dead(half.store.top)


def _provenance(node: Node) -> dict[str, Any]:
    return {name: node.meta[name] for name in ("stack_trace", "nn_module_stack", "original_aten") if name in node.meta}


def _publish(graph: Graph, half: Half, top: Node) -> None:
    """Every reader of the store's result reads the new version of the buffer, or a view of it."""
    store = half.store
    if store.scatter is not store.top and len(store.scatter.users) > 0:
        outside = [user for user in store.scatter.users if user.target not in cache_store.INVERSES]
        if outside:
            with graph.inserting_before(min(outside)):
                view = cache_store.view_of(graph, store, top)
            for user in outside:
                user.replace_input_with(store.scatter, view)
    store.top.replace_all_uses_with(top)


# ---- examples --------------------------------------------------------------------------------------------------------


def _quantise(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return (x.float() / s).clamp(-448.0, 448.0).to(E4)


def _x(device: str) -> torch.Tensor:
    return torch.randn(16, 8, 64, device=device).bfloat16() * 30


def _cache(device: str, *shape: int, dtype: torch.dtype = E4) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8, device=device).view(dtype)


def _single(device: str) -> tuple[Any, ...]:
    k, v, ks, vs, cache, slots = _inputs(2, 64, 8, 64, caches=1)(device)
    return k[:1], v[:1], ks, vs, cache, slots[3:4]


def _slots(device: str) -> torch.Tensor:
    return torch.arange(16, device=device) * 3 % 61


def _inputs(*shape: int, caches: int = 2, dtype: torch.dtype = E4) -> Any:
    def make(device: str) -> tuple[Any, ...]:
        s = torch.tensor(0.5, device=device)
        return (
            _x(device),
            _x(device),
            s,
            s * 2,
            *(_cache(device, *shape, dtype=dtype) for _ in range(caches)),
            _slots(device),
        )

    return make


def _direct(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[slots] = _quantise(k, ks)
    vc[slots] = _quantise(v, vs)


def _view(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc.view(-1, 8, 64).index_put_((slots,), _quantise(k, ks))
    vc.view(-1, 8, 64).index_put_((slots,), _quantise(v, vs))


def _unbind(k: Any, v: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> None:
    kc, vc = kv.unbind(0)
    kc[slots] = _quantise(k, ks)
    vc[slots] = _quantise(v, vs)


def _bytes(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc.view(E4)[slots] = _quantise(k, ks)
    vc.view(E4)[slots] = _quantise(v, vs)


def _index_copy(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc.view(-1, 8, 64).index_copy_(0, slots, _quantise(k, ks).view(torch.uint8))
    vc.view(-1, 8, 64).index_copy_(0, slots, _quantise(v, vs).view(torch.uint8))


def _slice(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[3:19] = _quantise(k, ks)
    vc[3:19] = _quantise(v, vs)


def _strided_slice(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[2:34:2].copy_(_quantise(k, ks))
    vc[2:34:2].copy_(_quantise(v, vs))


def _halves_slice(k: Any, v: Any, ks: Any, vs: Any, kv: Any, slots: Any) -> None:
    kv[0, 3:19] = _quantise(k, ks)
    kv[1, 3:19] = _quantise(v, vs)


def _one(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc.view(-1, 8, 64)[slots] = _quantise(k, ks)


def _read_after(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    _view(k, v, ks, vs, kc, vc, slots)
    return kc.float().sum() + vc.view(-1, 8, 64)[slots].float().sum()


def _other_slots(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[slots] = _quantise(k, ks)
    vc[slots + 1] = _quantise(v, vs)


def _qkv(qkv: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    _, k, v = qkv.split([1024, 512, 512], dim=-1)
    _direct(k.view(-1, 8, 64), v.view(-1, 8, 64), ks, vs, kc, vc, slots)


def _qkv_inputs(device: str) -> tuple[Any, ...]:
    s = torch.tensor(0.5, device=device)
    qkv = torch.randn(16, 2048, device=device).bfloat16()
    return (qkv, s, s * 2, _cache(device, 64, 8, 64), _cache(device, 64, 8, 64), _slots(device))


MATCHES = (
    Example("direct", _direct, _inputs(64, 8, 64)),
    Example("view", _view, _inputs(4, 16, 8, 64)),
    Example("view_dynamic_shape", _view, _inputs(4, 16, 8, 64), dynamic=True),
    Example("unbind", _unbind, _inputs(2, 64, 8, 64, caches=1)),
    Example("unbind_one_token", _unbind, _single),
    Example("uint8_view", _bytes, _inputs(64, 8, 64, dtype=torch.uint8)),
    Example("uint8_index_copy", _index_copy, _inputs(4, 16, 8, 64, dtype=torch.uint8)),
    Example("slice", _slice, _inputs(64, 8, 64)),
    Example("strided_slice", _strided_slice, _inputs(64, 8, 64)),
    Example("slice_of_half", _halves_slice, _inputs(2, 64, 8, 64, caches=1)),
    Example("one_tensor", _one, _inputs(4, 16, 8, 64)),
    Example("read_after_store", _read_after, _inputs(4, 16, 8, 64)),
    Example("two_indices_two_stores", _other_slots, _inputs(64, 8, 64), count=2),
    Example("slices_of_qkv", _qkv, _qkv_inputs),
)


def _sin(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    _direct(torch.sin(k), torch.sin(v), ks, vs, kc, vc, slots)


def _many(device: str) -> tuple[Any, ...]:
    s = torch.tensor(0.5, device=device)
    kv = [torch.randn(4096, 1, 16, device=device).bfloat16() for _ in range(2)]
    return (*kv, s, s * 2, _cache(device, 8192, 1, 16), _cache(device, 8192, 1, 16), torch.arange(4096, device=device))


def _accumulate(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc.index_put_((slots,), _quantise(k, ks).view(torch.uint8), accumulate=True)


def _two_indices(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[slots % 4, slots % 16] = _quantise(k, ks)


def _head_scale(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> None:
    kc[slots] = _quantise(k, ks * torch.ones(1, 8, 1, device=k.device))


def _used_again(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    q = _quantise(k, ks)
    kc[slots] = q
    return q


def _new_cache(k: Any, v: Any, ks: Any, vs: Any, kc: Any, vc: Any, slots: Any) -> torch.Tensor:
    fresh = (kc.float() + 1).to(E4)
    fresh[slots] = _quantise(k, ks)
    return fresh


NEAR_MISSES = (
    Example("producer_is_pointwise", _sin, _inputs(64, 8, 64), reason="Inductor fuses this store into its producer for free"),
    Example("rows_that_stock_stores_faster", _direct, _many, reason="stock stores this many rows faster"),
    Example("accumulate", _accumulate, _inputs(64, 8, 64, dtype=torch.uint8), reason="the store accumulates"),
    Example("two_index_tensors", _two_indices, _inputs(4, 16, 8, 64), reason="index layout"),
    Example("scale_a_head", _head_scale, _inputs(64, 8, 64), reason="scale layout"),
    Example("rows_used_again", _used_again, _inputs(64, 8, 64), reason="the stored FP8 rows have a second user"),
    Example("cache_made_in_graph", _new_cache, _inputs(64, 8, 64), reason="the cache is not a graph input"),
)

RULE = Rule(
    name="downcast_fp8",
    doc="K and V scaled, clamped, cast to FP8 and stored into their caches → one launch",
    anchors=anchors,
    guard=guard,
    replace=replace,
    matches=MATCHES,
    near_misses=NEAR_MISSES,
)
