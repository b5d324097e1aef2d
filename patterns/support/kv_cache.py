"""How attention reads K or V through a cache that the same graph has just written, and what was written.

    cache [B, Hkv, L, D] ──index_put([None, None, at], rows [B, Hkv, S, D])── store ──(permute, convert, · scale)── attention

`trace` walks up from attention's input to the store: either attention reads the whole cache, of which the mask must hide what
was not written, or exactly the rows that were stored (the same index, the same slice). `Read.source` is the same input made of
the stored rows alone. Where in the sequence they were stored, and that nobody else needs the store, is for the rule to ask.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import CONVERT, aten, is_call
from inductor_ext.graph import RESHAPES, describe, known_equal, same_sizes, value_of
from inductor_ext.miss import INDEX_LAYOUT, ROWS_BROADCAST, STORE_ACCUMULATES, Miss
from inductor_ext.patterns.support.attention_plan import Source
from inductor_ext.patterns.support.same import same_value

_PUTS = (aten.index_put.default, aten._unsafe_index_put.default)
_SCATTERS = (*_PUTS, aten.index_copy.default, aten.slice_scatter.default)
_COPIES = (aten.clone.default, aten.alias.default)
#: What keeps every dimension of a cache where it is, or says where it goes.
_KEEPS = (CONVERT, aten.mul.Tensor, aten.div.Tensor, aten.permute.default, *_COPIES)
_FOLLOWED = frozenset((*_KEEPS, *RESHAPES, aten.expand.default, aten.index.Tensor, aten.slice.Tensor))


@dataclasses.dataclass(frozen=True)
class Read:
    """``source`` is what attention reads of the rows that ``store`` puts into ``cache``, a graph input.

    ``at`` is where along the sequence: an index tensor, or the start of a slice. ``whole``: attention reads the cache from its
    first row to its last, else only what was stored.
    """

    store: Node
    cache: Node
    source: Source
    at: Any
    whole: bool


def trace(k: Node) -> Read | None:
    """The cache that attention reads ``k`` [B, Hkv, L or S, D] from; None where the graph has not just written one."""
    chain: list[Node] = []
    node = k
    while not is_call(node, *_SCATTERS):
        if node.op != "call_function" or node.target not in _FOLLOWED or is_call(node, aten.expand.default):
            return None
        chain.append(node)
        node = _followed(node)
    chain.reverse()
    if node.args[0].op != "placeholder":
        raise _view(node, node.args[0])
    rows, dim, at = _stored(node)
    if chain and is_call(chain[0], aten.index.Tensor, aten.slice.Tensor):
        read, *rest = chain
        if not _same_rows(node, read, rows):
            raise Miss("other rows of the cache are read", node, f"those of {describe(node)}", describe(read))
        return Read(node, node.args[0], Source(rows, read, tuple(rest)), at, whole=False)
    for link in chain:
        if not is_call(link, *_KEEPS):
            raise Miss("the cache is reshaped", node, "permutations, converts and scales", describe(link))
        if is_call(link, aten.permute.default):
            order = [each % value_of(link).dim() for each in link.args[1]]
            dim = order.index(dim)
    if dim != 2 or value_of(k).dim() != 4:
        found = f"dimension {dim} of {describe(k)}"
        raise Miss("the rows are stored along another dimension", node, "the sequence's of [B, H, S, D]", found)
    return Read(node, node.args[0], Source(rows, node, tuple(chain)), at, whole=True)


def _view(store: Node, cache: Any) -> Miss:
    wanted = "a cache that is an argument or a buffer of the model, written without a view"
    return Miss("the cache is a view", store, wanted, describe(cache))


def _copied(rows: Any) -> Any:
    """``cache[:, :, :S] = rows`` copies rows into a slice, and scatters the slice."""
    if not is_call(rows, aten.copy.default):
        return rows
    before, after = value_of(rows.args[1]), value_of(rows)
    return rows.args[1] if before.dtype is after.dtype and same_sizes(before.shape, after.shape) else rows


def _followed(node: Node) -> Node:
    """The tensor that a link of the chain reads; the other operand of a product is a scale."""
    if is_call(node, aten.mul.Tensor) and isinstance(node.args[1], Node) and value_of(node.args[0]).numel() == 1:
        return node.args[1]
    return node.args[0]


def _stored(store: Node) -> tuple[Node, int, Any]:
    """(rows, dimension, index or start) of a store that replaces whole rows along one dimension."""
    if is_call(store, *_PUTS):
        indices, rows = store.args[1], store.args[2]
        accumulate = store.args[3] if len(store.args) > 3 else store.kwargs.get("accumulate", False)
        if accumulate:
            raise Miss(STORE_ACCUMULATES, store, "accumulate=False", "accumulate=True")
        given = [dim for dim, index in enumerate(indices) if index is not None]
        if len(given) != 1 or value_of(indices[given[0]]).dim() != 1:
            raise Miss(INDEX_LAYOUT, store, "one 1-d index along the sequence", str(indices))
        dim, at = given[0], indices[given[0]]
    elif is_call(store, aten.index_copy.default):
        dim, at, rows = store.args[1] % value_of(store).dim(), store.args[2], store.args[3]
    else:
        defaults: tuple[Any, ...] = (None, None, 0, 0, None, 1)
        _, rows, dim, start, _, step = store.args + defaults[len(store.args) :]
        if step != 1:
            raise Miss(INDEX_LAYOUT, store, "every row of a slice", f"step {step}")
        dim, at = dim % value_of(store).dim(), start or 0
        if is_call(rows, *_SCATTERS):
            raise _view(store, rows.args[0])
        rows = _copied(rows)
    cache, value = value_of(store), value_of(rows)
    others = [(a, b) for d, (a, b) in enumerate(zip(cache.shape, value.shape)) if d != dim]
    if value.dim() != cache.dim() or not all(known_equal(*pair) for pair in others):
        found = f"{describe(rows)} into {list(cache.shape)}"
        raise Miss(ROWS_BROADCAST, store, "rows of the cache's other sizes", found)
    return rows, dim, at


def _same_rows(store: Node, read: Node, rows: Node) -> bool:
    """Whether ``read`` of ``store`` gives back what was stored."""
    if not same_sizes(value_of(read).shape, value_of(rows).shape):
        return False
    if is_call(read, aten.index.Tensor):
        if not is_call(store, *_PUTS) or len(store.args[1]) != len(read.args[1]):
            return False
        pairs = zip(store.args[1], read.args[1])
        return all(a is b or (isinstance(a, Node) and isinstance(b, Node) and same_value(a, b)) for a, b in pairs)
    if not is_call(store, aten.slice_scatter.default):
        return False
    where = [(*node.args[skip:], *(0, 0)[len(node.args) - skip :])[:2] for node, skip in ((store, 2), (read, 1))]
    (dim, start), (other, begin) = where
    return dim == other and (start or 0) == (begin or 0)


def other_readers(read: Read, reader: Node) -> list[Node]:
    """What needs the store, or the cache as it was, besides ``reader`` and the write back into the cache."""
    known = (read.store, *(user for user in read.cache.users if writes_back(user, read.cache) or _overwritten(user)))
    found = [user for user in read.cache.users if user not in known]
    pending, seen = [read.store], {read.store}
    while pending:
        for user in pending.pop().users:
            if user is reader or user in seen:
                continue
            if writes_back(user, read.cache):
                found.extend(user.users)
            elif user.op == "call_function" and user.target in _FOLLOWED:
                seen.add(user)
                pending.append(user)
            else:
                found.append(user)
    return found


def _overwritten(node: Node) -> bool:
    """Whether ``node`` is a slice that is looked at only to be written as a whole."""
    return is_call(node, aten.slice.Tensor) and all(
        is_call(user, aten.copy.default) and user.args[0] is node and user.args[1] is not node for user in node.users
    )


def writes_back(node: Node, given: Node) -> bool:
    """Whether ``node`` writes a new value into the graph input ``given``, as functionalisation leaves it at the end."""
    return is_call(node, aten.copy_.default) and node.args[0] is given


def integer_inputs(node: Any) -> list[Node]:
    """Integer tensors among the graph inputs that ``node`` is computed from."""
    found, pending, seen = [], [node] if isinstance(node, Node) else [], set()
    while pending:
        each = pending.pop()
        if each in seen:
            continue
        seen.add(each)
        value = value_of(each)
        if each.op == "placeholder" and isinstance(value, torch.Tensor) and not value.dtype.is_floating_point:
            found.append(each)
        pending.extend(each.all_input_nodes)
    return found
