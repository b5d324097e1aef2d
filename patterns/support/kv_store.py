"""K or V on its way into its cache: the store, what makes the rows, and the op that does both.

`trace` reads the graph around one scatter. `partner` finds the other one of K and V, `insertion_point` the place where one op
can do the stores, and `put` puts it there: the op writes the graph input itself (``auto_functionalized_v2``, which Inductor
reinplaces), and every reader of the store's result reads the new version of the buffer.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from inductor_ext import memory, torch_compat
from inductor_ext.calls import CONVERT, aten, is_call
from inductor_ext.graph import RESHAPES, call, describe, erase_dead, fake_replay, known_equal, replay, same_sizes, value_of
from inductor_ext.kernels import steps
from inductor_ext.miss import (
    CACHE_IS_NO_INPUT,
    CACHE_LAYOUT,
    DEVICE,
    INDEX_LAYOUT,
    INPUT_LAYOUT,
    ROWS_BROADCAST,
    SCALE_LAYOUT,
    STORE_ACCUMULATES,
    Miss,
    found_or_none,
    second_user,
)
from inductor_ext.patterns.support import cache_store, fp8_chain
from inductor_ext.patterns.support.cache_store import Store
from inductor_ext.patterns.support.fp8_chain import Chain
from inductor_ext.rule import Context

_PUTS = (aten.index_put.default, aten._unsafe_index_put.default)

#: What is done to the cache on its way to attention, as repeating its heads.
_COPIES = (aten.clone.default, CONVERT)


@dataclasses.dataclass
class Half:
    """One of K and V: the store and the chain that makes what is stored; without one the rows are copied as they are."""

    store: Store
    chain: Chain | None
    x: Node  # what the chain, or the store, begins with: never a reshape itself
    dtype: torch.dtype  # of what is stored
    input_views: list[Node]  # from x to the stored rows: the chain's own, and those between cast and store
    by_sequence: bool = False  # rows [B, H, T, D] of a cache [B, H, S, D], each sequence's into its own
    scale_a_head: bool = False

    @property
    def program(self) -> str:
        return "" if self.chain is None else self.chain.program

    @property
    def scale(self) -> Node | None:
        return self.chain.operands[0] if self.chain is not None and self.chain.operands else None

    @property
    def scatter(self) -> Node:
        return self.store.scatter

    def input_value(self) -> torch.Tensor:
        """What the op reads: ``x`` in the shape of the stored rows."""
        value = fake_replay(self.input_views, value_of(self.x))
        if self.store.one_row:
            return value.unsqueeze(0)
        return value.permute(1, 0, 2) if self.store.dims == (1,) else value

    @property
    def inputs(self) -> list[Node]:
        """What the op reads of tensors."""
        return [node for node in (self.x, self.scale, self.store.loc, self.store.at) if node is not None]

    def insert_input(self, graph: Graph) -> Node:
        node = replay(graph, self.input_views, self.x)
        if self.store.one_row:
            return call(graph, aten.unsqueeze.default, node, 0)
        return call(graph, aten.permute.default, node, [1, 0, 2]) if self.store.dims == (1,) else node

    def scale_value(self) -> torch.Tensor | None:
        """What the op gets as the scale: one a head is [H]."""
        if self.scale is None:
            return None
        scale: torch.Tensor = value_of(self.scale)
        return scale.reshape(scale.numel()) if self.scale_a_head else scale

    def insert_scale(self, graph: Graph) -> Node | None:
        if self.scale is None or not self.scale_a_head:
            return self.scale
        size = torch_compat.symbolic(graph, [value_of(self.scale).numel()])
        return call(graph, aten.reshape.default, self.scale, size, like=self.scale)

    @property
    def blocks(self) -> bool:
        """Whether the op gets the cache as [blocks, block, …]."""
        return not self.by_sequence and self.destination().dim() > self.input_value().dim()

    def destination(self, base: torch.Tensor | None = None) -> torch.Tensor:
        """The rows that are written as a fake view of ``base``, or of the version of the buffer that is there: [S, …] where
        each is one run of memory and they lie at one distance, else [blocks, block, …]."""
        store, base = self.store, value_of(self.store.root) if base is None else base
        with base.fake_mode:
            rows = cache_store.geometry(store, base)
            if store.dims in ((1,), (0, 2)):
                order = [*store.dims, *(dim for dim in range(rows.dim()) if dim not in store.dims)]
                rows = rows.permute(order)
            if len(store.dims) == 1:
                heads_apart = rows.dim() == 3 and not self.by_sequence and not rows_contiguous(rows)
                return rows.unsqueeze(0) if heads_apart and known_equal(rows.stride(2), 1) else rows
            (blocks, block, *rest), (above, pitch, *strides) = rows.shape, rows.stride()
            if store.at is None and rows_contiguous(rows, 2) and known_equal(above, block * pitch):
                return rows.as_strided((blocks * block, *rest), (pitch, *strides), rows.storage_offset())
            return rows


def stored_value(scatter: Node) -> Any:
    """What a scatter stores."""
    return scatter.args[2] if is_call(scatter, *_PUTS) else scatter.args[1]


def trace(scatter: Node) -> Half | None:
    """A scatter of a chain's FP8 rows into a graph input; None when it stores something else."""
    return _traced(scatter, _source(stored_value(scatter)), _store) if _stores_fp8(scatter) else None


def trace_any(scatter: Node) -> Half | None:
    """`trace`, or the same of rows that have the cache's own dtype, or of rows along the third dimension of a cache."""
    if not isinstance(value_of(stored_value(scatter)), torch.Tensor):
        return None
    source = _source(stored_value(scatter))
    by_sequence = is_call(scatter, *_PUTS) and len(scatter.args[1]) == 3 and scatter.args[1][0] is scatter.args[1][1] is None
    return _traced(scatter, source, _store_by_sequence if by_sequence else _store)


def _stores_fp8(scatter: Node) -> bool:
    value = stored_value(scatter)
    return isinstance(value, Node) and fp8_chain.is_fp8_cast(_source(value)[0])


def _traced(scatter: Node, source: tuple[Node, list[Node]], find: Callable[[Node], Store]) -> Half:
    (x, views), value = source, stored_value(scatter)
    store = find(scatter)
    by_sequence = find is _store_by_sequence
    if not fp8_chain.is_fp8_cast(x):
        half = Half(store, None, x, value_of(x).dtype, views, by_sequence)
        _check(half, value)
        return half
    cast, chain = x, fp8_chain.trace(x, unscaled=True, heads=True)
    scale_a_head = _is_a_head(chain, views, store)
    if len(chain.operands) > 1 or (chain.operands and not scale_a_head and value_of(chain.operands[0]).numel() != 1):
        found = ", ".join(map(describe, chain.operands))
        raise Miss(SCALE_LAYOUT, cast, "one scale of one element, or of one for each head of [T, H, D]", found)
    if any(value_of(o).device != value_of(chain.x).device for o in chain.operands):
        raise Miss("scale device", cast, str(value_of(chain.x).device), describe(chain.operands[0]))
    input_views = [*chain.pre_views, *chain.post_views, *views]
    half = Half(store, chain, chain.x, chain.dtype, input_views, by_sequence, scale_a_head)
    _check(half, value)
    below = scatter
    while True:
        other = next((user for user in value.users if user is not below), None)
        if other is not None:
            raise Miss(second_user("what is stored in FP8"), cast, "the store alone", describe(other))
        if value is cast:
            return half
        value, below = value.args[0], value


def _is_a_head(chain: Chain, views: list[Node], store: Store) -> bool:
    """Whether the chain's scale has a value for each head of the stored rows [T, H, D], which are ``views`` of the cast."""
    if chain.head is None:
        return False
    dim: int | None
    dim, behind = chain.head
    for view in (*behind, *views):
        dim = _followed(view, dim)
        if dim is None:
            return False
    if value_of(store.value).dim() + store.one_row != 3:
        return False
    return dim == (0 if store.one_row or store.dims == (1,) else 1)


def _followed(view: Node, dim: int) -> int | None:
    """Which dimension of a reshape's result is dimension ``dim`` of what it reshapes."""
    before, after = value_of(view.args[0]).shape, value_of(view).shape
    if is_call(view, aten.permute.default):
        return [each % len(before) for each in view.args[1]].index(dim)
    inner = math.prod(before[dim + 1 :])
    for each, size in enumerate(after):
        if known_equal(size, before[dim]) and known_equal(math.prod(after[each + 1 :]), inner):
            return each
    return None


def _store(scatter: Node) -> Store:
    store = cache_store.trace(scatter)
    if memory.written_input(store.root) is None:
        raise Miss(CACHE_IS_NO_INPUT, scatter, "a buffer or argument of the model", describe(store.root))
    return store


def _store_by_sequence(scatter: Node) -> Store:
    """``index_put(cache, [None, None, at], rows)``, which ``cache.index_copy_(2, at, rows)`` becomes too."""
    root, indices, value = scatter.args[:3]
    at = indices[2]
    if any(each is not None for each in indices[:2]) or not isinstance(at, Node) or value_of(at).dim() != 1:
        raise Miss(INDEX_LAYOUT, scatter, "one index tensor, of one dimension", str(indices))
    if scatter.args[3] if len(scatter.args) > 3 else scatter.kwargs.get("accumulate", False):
        raise Miss(STORE_ACCUMULATES, scatter, "accumulate=False", "accumulate=True")
    if value_of(at).dtype not in (torch.int32, torch.int64):
        raise Miss(INDEX_LAYOUT, scatter, "int32 or int64 indices", describe(at))
    if not cache_store.packed(value_of(at)):
        raise Miss(INDEX_LAYOUT, scatter, "contiguous indices", f"strides {list(value_of(at).stride())}")
    if root.op != "placeholder":
        raise Miss(CACHE_IS_NO_INPUT, scatter, "a buffer or argument of the model", describe(root))
    cache, rows = value_of(root), value_of(value)
    if rows.dim() != 4 or not same_sizes([rows.shape[i] for i in (0, 1, 3)], [cache.shape[i] for i in (0, 1, 3)]):
        wanted = "[B, H, T, D] rows of the cache's other sizes"
        raise Miss(ROWS_BROADCAST, scatter, wanted, f"{describe(value)} into {list(cache.shape)}")
    if not known_equal(rows.shape[2], value_of(at).shape[0]):
        raise Miss(ROWS_BROADCAST, scatter, "a row for each index", f"{describe(value)} at {describe(at)}")
    return Store(scatter, value, root, [], scatter, at, 1, 0)


def _source(value: Node) -> tuple[Node, list[Node]]:
    """The node that ``value`` is views of (``.view(uint8)`` too), and those that rearrange, nearest that node first."""
    views = []
    while is_call(value, aten.view.dtype, *RESHAPES):
        if not is_call(value, aten.view.dtype):
            views.append(value)
        value = value.args[0]  # type: ignore[assignment]
    return value, views[::-1]


def _check(half: Half, value: Node) -> None:
    """Miss where an op cannot write these rows into this cache."""
    scatter, buffer = half.scatter, value_of(half.store.root)
    stored = value_of(scatter.args[0]).dtype
    allowed = (half.dtype, torch.uint8) if half.chain is not None else (half.dtype,)
    for found in (stored, buffer.dtype):  # the op gets the buffer, not the view of it
        if found not in allowed:
            raise Miss("cache dtype", scatter, " or ".join(map(str, allowed)).replace("torch.uint8", "uint8"), str(found))
    if value_of(value).dtype is not stored:  # copy_ converts, and a number is not its byte
        raise Miss("the store converts", scatter, f"rows of the cache's dtype {stored}", describe(value))
    devices = [value_of(node).device for node in (half.x, half.store.loc, half.store.at) if node is not None]
    if any(device != buffer.device for device in devices):
        found_devices = ", ".join(map(str, devices))
        raise Miss(DEVICE, scatter, f"rows and indices on the cache's device {buffer.device}", found_devices)
    check_inputs([half])
    if memory.is_returned(half.store.top) and not memory.is_written_back(half.store.top):
        wanted = "rows that only the cache keeps: the op writes them into it, and the next store would change the result"
        raise Miss("the caller gets the cache as it is between two stores", scatter, wanted, describe(half.store.top))
    if half.by_sequence:
        for name, tensor in ((CACHE_LAYOUT, half.destination()), (INPUT_LAYOUT, half.input_value())):
            if not known_equal(tensor.stride(3), 1):
                raise Miss(name, scatter, "columns of unit stride", f"strides {list(tensor.stride())}")
        return None
    if half.blocks:
        stride = half.destination().stride(-1)
        if not known_equal(stride, 1) and not known_equal(half.destination().shape[-1], 1):
            raise Miss(CACHE_LAYOUT, scatter, "columns of unit stride", f"strides {list(half.destination().stride())}")
    elif not rows_contiguous(half.destination()):
        strides = f"strides {list(half.store.destination().stride())}"
        raise Miss(CACHE_LAYOUT, scatter, "rows that are contiguous in memory, or whose heads are", strides)
    if not rows_contiguous(half.input_value()):
        strides = f"{describe(half.x)} strides {list(half.input_value().stride())}"
        at = scatter if half.chain is None else half.chain.cast
        raise Miss(INPUT_LAYOUT, at, "rows that are contiguous in memory", strides)
    return None


def checked(half: Half, context: Context) -> bool:
    """Whether an index past the cache is an error: on a CPU, as in eager mode, and on a GPU where checks are asked for."""
    return context.options.checks or value_of(half.x).device.type == "cpu"


def rows_contiguous(cache: torch.Tensor, first: int = 1) -> bool:
    """Whether the dimensions from ``first`` on are one run of memory."""
    expected: Any = 1
    for size, stride in reversed(list(zip(cache.shape[first:], cache.stride()[first:]))):
        if not known_equal(size, 1) and not known_equal(stride, expected):
            return False
        expected = expected * size
    return True


#: What an `insertion_point` needs.
OLD_ROWS_FIRST = "every read of the cache as it was before any read of it as it becomes"


# ---- pairs -------------------------------------------------------------------------------------------------------------

Tracer = Callable[[Node], Half | None]


def partner(second: Half, tracer: Tracer = trace, *, sink: bool = False) -> Half | None:
    """The store just before ``second``, if it can join it and nobody reads its cache in between."""
    first = neighbour(second.scatter, "prev", tracer)
    if first is None or not _joins(first, second):
        return None
    return first if insertion_point([first, second], [] if sink else None) is not None else None


def follower(first: Half, tracer: Tracer = trace, *, sink: bool = False) -> Half | None:
    """The store just after ``first``, if ``first`` is its partner."""
    second = neighbour(first.scatter, "next", tracer)
    found = None if second is None else partner(second, tracer, sink=sink)
    return second if found is not None and found.scatter is first.scatter else None


def insertion_point(
    halves: Sequence[Half], waiting: list[Node] | None = None, made: Sequence[Node] = (), others: Sequence[Node] = ()
) -> Node | None:
    """The node after which one op can do the stores: its inputs, and ``others``, are there and the caches' old rows have been
    read, but not yet the new ones. None when there is no such place. What is stored and the op itself has ``made`` is no input.
    With ``waiting``, views and copies of the new rows do not count as long as what reads them comes later: they are added to
    it, to be moved behind the op."""
    inputs = [*others, *(half.x for half in halves if half.x not in made), halves[0].store.root]
    for half in halves:
        inputs += [half.scale, half.store.loc, half.store.at, half.store.mult, half.store.offset]
    for half in halves:  # symbolic sizes may be computed where they are used
        inputs += [node for view in half.input_views for node in view.all_input_nodes[1:]]
    own = set().union(*(_between(half) for half in halves))
    if halves[-1].store.root not in own:
        inputs.append(halves[-1].store.root)
    inputs += [reader for half in halves for reader in _readers(half.store.root) if reader not in own]
    last = max(node for node in inputs if isinstance(node, Node))
    if last.op == "output":  # the caller gets the old rows, and nothing comes after that
        return None
    stored = [node for half in halves for node in (half.store.top, half.scatter)]
    return last if early_reader(stored, own, last, waiting) is None else None


def early_reader(made: Sequence[Node], own: set[Node], last: Node, waiting: list[Node] | None) -> Node | None:
    """A reader of ``made``, not among ``own``, that is not behind ``last``; views and copies that could be are ``waiting``."""
    pending = list(made)
    while pending:
        for user in pending.pop().users:
            if user in own or user > last or (waiting is not None and user in waiting):
                continue
            if waiting is None or not (memory.is_view(user) or is_call(user, *_COPIES)):
                return user
            waiting.append(user)
            pending.append(user)
    return None


def _readers(root: Node) -> list[Node]:
    """What reads a version of a cache, through views too, the caller as well; not the copy back into the buffer itself."""
    found = []
    for value, user in memory.readers(root):
        written_back = is_call(user, aten.copy_.default) and user.args[0] is value and user.args[1] is not value
        if not memory.is_view(user) and not written_back:
            found.append(user)
    return found


def check_inputs(halves: Sequence[Half], others: Sequence[Any] = ()) -> None:
    """Miss where what one op would read, ``others`` too, lies in a cache that it writes at the same time."""
    found = _aliased(halves, others)
    if found is not None:
        wanted = "inputs in other memory than the cache that is written"
        raise Miss("an input lies in the cache", found[1].scatter, wanted, describe(found[0]))


def _aliased(halves: Sequence[Half], others: Sequence[Any] = ()) -> tuple[Node, Half] | None:
    """What the op reads of a cache that it writes, and the half that writes it."""
    read = [*(node for half in halves for node in half.inputs), *others]
    written = {memory.written_input(half.store.root): half for half in halves}
    found = memory.read_by_another_name(read, [cache for cache in written if cache is not None])
    if found is None:
        return None
    return found, written[memory.written_input(found)]


def neighbour(scatter: Node, direction: str, tracer: Tracer = trace) -> Half | None:
    """The nearest other such store before or after. K and V of a layer are neighbours; no pair is looked for further away."""
    node: Node = getattr(scatter, direction)
    while node.op != "root":
        if is_call(node, *cache_store.SCATTERS):
            half = found_or_none(tracer, node)
            if half is not None:
                return half
        node = getattr(node, direction)
    return None


def _between(half: Half) -> set[Node]:
    """The nodes that only take ``half``'s view of its cache or put it back: they go when the store is rewritten."""
    nodes = {*half.store.views, *half.store.way, half.store.top, half.scatter}
    return nodes | {view.args[0] for view in half.store.views if is_call(view, operator.getitem)}


def _joins(first: Half, second: Half) -> bool:
    a, b = first.store, second.store
    told = [(store.scatter.target, store.loc, store.at, store.mult, store.offset) for store in (a, b)]
    if told[0] != told[1]:
        return False
    if first.dtype != second.dtype or not same_sizes(first.input_value().shape[:1], second.input_value().shape[:1]):
        return False
    if value_of(first.x).dtype != value_of(second.x).dtype:
        return False
    if len(steps.constants(first.program, second.program)) > steps.MAX_CONSTS or _aliased([first, second]) is not None:
        return False
    # One kernel has one number of slots and one size of row for both.
    if not same_sizes(first.destination().shape, second.destination().shape) or first.blocks != second.blocks:
        return False
    one, two = memory.written_input(a.root), memory.written_input(b.root)
    if one is two:  # halves of one buffer: the second store must build on the first, and write other memory
        return b.root is a.top and b.views != [] and _disjoint(first, second)
    return True


def _disjoint(a: Half, b: Half) -> bool:
    """Whether two views of one buffer share no memory: one after the other, or their rows side by side."""
    base = value_of(a.store.root)
    one, two = a.destination(base), b.destination(base)
    if not same_sizes(one.stride(), two.stride()):
        return False
    if a.blocks:
        return any(_between_blocks(one, high.storage_offset() - low.storage_offset()) for low, high in ((one, two), (two, one)))
    row = math.prod(one.shape[1:])
    pitch, slots = one.stride(0), one.shape[0]
    for low, high in ((one, two), (two, one)):
        gap = high.storage_offset() - low.storage_offset()
        if statically_known_true(gap >= (slots - 1) * pitch + row):
            return True
        if statically_known_true(gap >= row) and statically_known_true(gap + row <= pitch):
            return True
    return False


def _between_blocks(view: torch.Tensor, gap: Any) -> bool:
    """Whether what lies ``gap`` behind a view, of its sizes and strides, shares no memory with it.

    Some dimensions are steps from one run of memory to the next, all multiples of the smallest; the others are in a run, and
    the gap leads from a run into the space before the next. Without any steps, it leads past the one run.
    """
    dims = [(stride, size) for stride, size in zip(view.stride(), view.shape) if not known_equal(size, 1)]
    for step in (None, *(stride for stride, _ in dims)):
        run, apart = 1, True
        for stride, size in dims:
            if step is None or not statically_known_true(stride >= step):
                run = run + (size - 1) * stride
            else:
                apart = apart and statically_known_true(stride % step == 0)
        if apart and statically_known_true(gap >= run) and (step is None or statically_known_true(gap + run <= step)):
            return True
    return False


# ---- replacement -------------------------------------------------------------------------------------------------------

NAMES = ("k_cache", "v_cache")


def after(graph: Graph, point: Node) -> Any:
    """Insertion right behind ``point``, but never among the graph's inputs."""
    while point.op == "placeholder" and point.next.op == "placeholder":
        point = point.next
    return graph.inserting_before(point.next)


def put(
    graph: Graph,
    op: torch._ops.OpOverload,
    arguments: dict[str, Any],
    halves: Sequence[Half],
    like: Node,
    view: Callable[[Half, torch.Tensor], torch.Tensor | None] | None = None,
    outputs: Sequence[torch.Tensor] = (),
) -> list[Node]:
    """Insert ``op``, which writes k_cache and v_cache, and let it do the stores of ``halves``; gives its ``outputs``.

    ``halves`` are K's and V's. ``view(half, base)`` is what the op gets of a buffer, as a fake; None for the buffer itself.
    """
    ordered = sorted(halves, key=lambda half: half.scatter)
    view = view or (lambda half, base: None if half.store.whole and not half.blocks else half.destination(base))
    # Two halves of one buffer share a base: the first store's root is the version that both build on.
    roots = [memory.written_input(half.store.root) for half in ordered]
    shared = len(halves) == 2 and roots[0] is roots[1]
    bases = [ordered[0].store.root] if len(halves) == 1 or shared else [half.store.root for half in halves]
    kwargs = dict(arguments)
    for name, half in zip(NAMES, halves):
        base = bases[0] if shared else half.store.root
        kwargs[f"_{name}_base_index"] = bases.index(base)
        seen = view(half, value_of(base))
        if seen is not None:
            kwargs[f"_{name}_size"] = tuple(torch_compat.symbolic(graph, list(seen.shape)))
            kwargs[f"_{name}_stride"] = tuple(torch_compat.symbolic(graph, list(seen.stride())))
            kwargs[f"_{name}_storage_offset"] = torch_compat.symbolic(graph, [seen.storage_offset()])[0]
    if len(halves) == 1:
        kwargs["_v_cache_base_index"] = None
    kwargs["_all_bases"] = bases
    node = graph.call_function(auto_functionalized_v2, (op,), kwargs)
    results = [*(outputs or (None,)), *(torch_compat.fresh_base(value_of(base)) for base in bases)]
    node.meta.update(_provenance(like), val=tuple(results))
    items = []
    for index, result in enumerate(results):
        if result is not None:
            item = graph.call_function(operator.getitem, (node, index))
            item.meta.update(_provenance(like), val=result)
            items.append(item)
    made, tops = items[: len(outputs)], items[len(outputs) :]
    for half, top in zip(halves, tops if len(tops) == len(halves) else tops * 2):
        _publish(graph, half, top)
    for half in reversed(ordered):
        erase_dead(half.store.top)
    return made


def _provenance(node: Node) -> dict[str, Any]:
    return {name: node.meta[name] for name in ("stack_trace", "nn_module_stack", "original_aten") if name in node.meta}


def _publish(graph: Graph, half: Half, top: Node) -> None:
    """Every reader of the store's result reads the new version of the buffer, or a view of it."""
    store = half.store
    if store.scatter is not store.top and len(store.scatter.users) > 0:
        way = (*store.way, store.top)
        outside = [user for user in store.scatter.users if user not in way]
        if outside:
            with graph.inserting_before(min(outside)):
                view = cache_store.view_of(graph, store, top)
            for user in outside:
                user.replace_input_with(store.scatter, view)
    store.top.replace_all_uses_with(top)
