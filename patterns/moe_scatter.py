"""moe_scatter: experts' rows that are scattered back to their tokens, weighted and summed, become one kernel.

    z = y * weights[perm, None]                        y: the experts' rows, in the order of perm, which sorts T·k expert ids
    out = base.scatter_add(0, (perm // k)[:, None].expand(-1, H), z)       index_add and an accumulating index_put alike
    z[perm] = y;  out = (z.view(T, k, H) * w).sum(1)                       or bmm(w.view(T, 1, k), z.view(T, k, H))
        →   out = base + inductor_ext.moe_combine(y, weights.view(T, k), inverse.view(T, k), …)

What `moe_combine` reads where rows are gathered, whose kernel this is too. The inverse of perm is made: T·k integers. A buffer
of zeros, whole rows written to it and atomic additions go. Those round after every addition in y's dtype; the kernel sums in
fp32 and rounds once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext import torch_compat
from inductor_ext.calls import CONVERT, arguments, aten, calling, is_call, prims
from inductor_ext.graph import call, constant_of, describe, erase_dead, is_reshape, known_equal, same_sizes, value_of
from inductor_ext.kernels import steps
from inductor_ext.miss import Miss, no_other_users
from inductor_ext.patterns import moe_combine
from inductor_ext.patterns.moe_combine import E, H, K, T
from inductor_ext.patterns.support import routing
from inductor_ext.patterns.support.same import in_order
from inductor_ext.rule import ACCUMULATED, Context, Example, Match, Rule

_ADDS = (aten.scatter_add.default, aten.index_add.default)
_SCATTERS = (aten.index_put.default, aten.scatter.src)
_STEP = "a step between the rows and their sum"


@dataclasses.dataclass(frozen=True)
class Scatter:
    """``combine`` with the permutation for its inverse; ``base``: what the sums are added to; ``shape``: that of the result."""

    combine: moe_combine.Combine
    base: Node | None
    shape: tuple[Any, ...]


def anchors(graph: Graph) -> list[Node]:
    return calling(*_ADDS, aten.index_put.default, aten.sum.dim_IntList, aten.bmm.default)(graph)


def guard(node: Node, context: Context) -> Match | None:
    found = trace(node)
    if found is None:
        return None
    moe_combine.check(found.combine, context)
    return dataclasses.replace(moe_combine.match_of(found.combine), data=found)


def trace(node: Node) -> Scatter | None:
    """What ``node`` sums, where rows are scattered by a sorting permutation; None where it does nothing like it."""
    if is_call(node, *_ADDS) or (is_call(node, aten.index_put.default) and arguments(node)["accumulate"]):
        return _added(node)
    if is_call(node, aten.sum.dim_IntList):
        dims, keepdim = (arguments(node)[name] for name in ("dim", "keepdim"))
        summed = value_of(node.args[0]).dim() == 3 and [dim % 3 for dim in dims] == [1] and not keepdim
        return _Walk(node).scattered(node.args[0]) if summed else None  # type: ignore[arg-type]
    if is_call(node, aten.bmm.default):
        weights, rows = node.args
        if not known_equal(value_of(weights).shape[1], 1):
            return None
        walk = _Walk(node)
        walk.weights, walk.product = (weights, False), torch.float32  # type: ignore[assignment]
        return walk.scattered(rows)  # type: ignore[arg-type]
    return None


def _added(node: Node) -> Scatter | None:
    """Rows added to those of their tokens, perm // k."""
    given = arguments(node)
    base, index, rows = given["self"], given.get("index"), given.get("src", given.get("source", given.get("values")))
    if is_call(node, aten.index_put.default):
        index = given["indices"][0] if len(given["indices"]) == 1 else None
    elif given["dim"] not in (0, -2):
        return None
    one, two = value_of(base), value_of(rows)
    if one.dim() != 2 or not same_sizes(one.shape[1:], two.shape[1:]):
        return None
    tokens = _column(index) if is_call(node, aten.scatter_add.default) else index
    divided = None if tokens is None else in_order(tokens)
    if not is_call(divided, aten.div.Tensor_mode) or divided.kwargs.get("rounding_mode") not in ("floor", "trunc"):  # type: ignore[union-attr]
        return None
    perm, top_k = divided.args[:2]  # type: ignore[union-attr]
    if routing.permutation(perm) is None or not isinstance(top_k, int) or top_k < 1:  # type: ignore[arg-type]
        return None
    count = value_of(base).shape[0]
    whole = known_equal(value_of(perm).shape[0], count * top_k) and known_equal(value_of(rows).shape[0], count * top_k)
    if not whole:
        raise Miss("the rows are not those of all tokens", node, f"{top_k} rows of each of {count} tokens", describe(rows))
    return _Walk(node, base=base).ordered(rows, perm, (count, top_k))  # type: ignore[arg-type]


def _column(index: Node) -> Node | None:
    """The vector whose element every column of a row of ``index`` is."""
    if not is_call(index, aten.expand.default) or value_of(index).dim() != 2:
        return None
    column = value_of(index.args[0])
    return index.args[0] if column.dim() == 2 and known_equal(column.shape[1], 1) else None  # type: ignore[return-value]


class _Walk:
    """From what is summed up to the experts' rows, and what was met on the way."""

    def __init__(self, node: Node, base: Node | None = None) -> None:
        self.node, self.base = node, base
        self.inner: list[Node] = []
        self.weights: tuple[Node, bool] | None = None  # and whether they are in the rows' order
        self.product: torch.dtype | None = None
        self.mask: tuple[routing.RowMask, bool] | None = None

    def scattered(self, at: Node) -> Scatter | None:
        """``at`` [T, k, H] is a view of rows in the tokens' order."""
        at = self._steps(at, False)
        if not is_reshape(at) or value_of(at).dim() != 3:
            return None
        if not known_equal(value_of(at).shape[2], value_of(at.args[0]).shape[-1]):
            return None
        shape = tuple(value_of(at).shape[:2])
        self.inner.append(at)
        at = self._steps(in_order(at), False)
        if not is_call(at, *_SCATTERS) or value_of(at).dim() != 2 or arguments(at).get("accumulate"):
            return None
        given = arguments(at)
        if is_call(at, aten.scatter.src):
            perm, rows, along = _column(given["index"]), given["src"], given["dim"] in (0, -2)
        else:
            perm, rows, along = given["indices"][0], given["values"], len(given["indices"]) == 1
        perm = None if perm is None else in_order(perm)
        if not along or perm is None or routing.permutation(perm) is None:
            return None
        whole = known_equal(value_of(perm).shape[0], value_of(at).shape[0])
        if not whole or not same_sizes(value_of(rows).shape, value_of(at).shape):
            raise Miss("the rows are not those of all tokens", at, f"as many rows as {describe(perm)} has", describe(rows))
        self.inner.append(at)
        return self.ordered(rows, perm, shape)

    def ordered(self, at: Node, perm: Node, shape: tuple[Any, Any]) -> Scatter | None:
        """``at`` holds the rows in the order of ``perm``."""
        at = self._steps(at, True)
        node, result = self.node, moe_combine.narrowed_behind(self.node)
        if self.base is not None and not _is_zero(self.base):
            result = node  # the sum with what else there is comes before the convert
        found = moe_combine.Combine(node, result, shape, at, perm, self.product or value_of(at).dtype, inner=self.inner)
        if self.weights is not None:
            found.weights, found.weights_sorted = self.weights
        if self.mask is not None:
            mask, found.ids_sorted = self.mask
            found.ids, found.experts = mask.ids, mask.experts
        for each in self.inner:
            kept = torch.float32, value_of(at).dtype
            if value_of(each).dtype not in kept:
                wanted = f"converts to {kept[0]} or {kept[1]} only"
                raise Miss("a value is rounded between the rows and their sum", each, wanted, describe(each))
        no_other_users(self.inner, {node, *self.inner}, _STEP, "the sum only")
        base = None if _is_zero(self.base) else self.base
        return Scatter(found, base, tuple(value_of(result).shape))

    def _steps(self, at: Node, is_sorted: bool) -> Node:
        """Past converts, one product with a weight a row, and one mask of rows."""
        while isinstance(at, Node) and at.op == "call_function" and isinstance(value_of(at), torch.Tensor):
            if is_call(at, CONVERT) and value_of(at).dtype in steps.TOKEN_OF_DTYPE:
                if value_of(at.args[0]).dtype not in steps.TOKEN_OF_DTYPE:
                    break
                above = at.args[0]
            elif self.weights is None and is_call(at, aten.mul.Tensor) and (both := moe_combine.weighted_rows(at)) is not None:
                above, weights = both
                self.weights, self.product = (weights, is_sorted), value_of(at).dtype
            elif self.mask is None and (mask := routing.row_mask(at)) is not None and constant_of(mask.fill) == 0:
                above, self.mask = mask.kept, (mask, is_sorted)
            else:
                break
            self.inner.append(at)
            at = above  # type: ignore[assignment]
        return at


def _is_zero(base: Any) -> bool:
    """Whether every element is: a rule of Inductor's has made full of zeros and zeros_like."""
    return is_call(base, aten.full.default) and base.args[1] == 0


def replace(match: Match) -> None:
    found: Scatter = match.data
    graph, result, perm = match.node.graph, found.combine.result, found.combine.inverse
    with graph.inserting_before(match.node):
        made = moe_combine.insert(graph, found.combine, _inverse(graph, perm))
        if len(found.shape) != 2:
            made = call(graph, aten.reshape.default, made, torch_compat.symbolic(graph, list(found.shape)), like=result)
        if found.base is not None:
            made = call(graph, aten.add.Tensor, found.base, made, like=result)
    result.replace_all_uses_with(made)
    erase_dead(result)


def _inverse(graph: Graph, perm: Node) -> Node:
    """inverse[perm] = arange, as a graph spells it."""
    value = value_of(perm)
    (size,) = torch_compat.symbolic(graph, list(value.shape))
    kind = {"dtype": value.dtype, "device": value.device}
    empty = call(graph, aten.empty.memory_format, [size], like=perm, **kind)
    iota = call(graph, prims.iota.default, size, like=perm, start=0, step=1, requires_grad=False, **kind)
    return call(graph, aten.index_put.default, empty, [perm], iota, like=perm)


# ---- examples --------------------------------------------------------------------------------------------------------


def _weighted(y: torch.Tensor, weights: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    """In fp32, as torchtitan's router gives the weights."""
    return (y.float() * weights.reshape(-1)[perm].reshape(-1, 1)).to(y.dtype)


def _zeros(y: torch.Tensor) -> torch.Tensor:
    return torch.zeros(T, H, dtype=y.dtype, device=y.device)


def _scatter_add(y: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    perm = torch.sort(ids.reshape(-1)).indices
    return _zeros(y).scatter_add(0, (perm // K).reshape(-1, 1).expand(-1, H), _weighted(y, weights, perm))


def _onto_shared(y: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Shared experts' rows are there already."""
    perm = torch.sort(ids.reshape(-1)).indices
    return shared.scatter_add(0, (perm // K).reshape(-1, 1).expand(-1, H), _weighted(y, weights, perm))


def _index_add(y: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    perm = torch.sort(ids.reshape(-1)).indices
    return shared.index_add(0, perm // K, y * weights.reshape(-1)[perm, None].to(y.dtype))


def _index_put(y: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of experts that are not here count as zero."""
    sorted_ids, perm = torch.sort(ids.reshape(-1))
    y = y.masked_fill((sorted_ids >= E).unsqueeze(-1), 0.0)
    return _zeros(y).index_put((perm // K,), _weighted(y, weights, perm), accumulate=True)


def _unsorted(y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    z = torch.zeros_like(y)
    z[torch.sort(ids.reshape(-1)).indices] = y
    return z.view(T, K, H)


def _summed(y: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (_unsorted(y, ids) * weights.view(T, K, 1)).sum(1)


def _bmm(y: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.bmm(weights.view(T, 1, K), _unsorted(y, ids).float()).to(y.dtype).squeeze(1)


def _any_tokens(y: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    perm = torch.sort(torch.topk(logits, K).indices.reshape(-1)).indices
    out = torch.zeros(logits.shape[0], y.shape[1], dtype=y.dtype, device=y.device)
    return out.index_add(0, perm // K, _weighted(y, weights, perm))


def _inputs(device: str, weights: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    y = torch.randn(T * K, H, device=device).bfloat16()
    return y, torch.rand(T, K, device=device).to(weights), torch.randint(0, E + 1, (T, K), device=device)


def _with_shared(device: str) -> tuple[torch.Tensor, ...]:
    return *_inputs(device), torch.randn(T, H, device=device).bfloat16()


def _with_logits(device: str) -> tuple[torch.Tensor, ...]:
    return *_inputs(device)[:2], torch.randn(T, E + 1, device=device)


def _match(name: str, fn: Any, inputs: Any = _inputs, **rest: Any) -> Example:
    return Example(name, fn, inputs, mode="always", **rest)


RULE = Rule(
    name="moe_scatter",
    doc="the experts' rows scattered to their tokens, weighted and summed → one kernel",
    anchors=anchors,
    guard=guard,
    replace=replace,
    exact=False,
    cost="products are summed in fp32 and rounded once; additions into a buffer round after each",
    tolerance=ACCUMULATED,
    matches=(
        _match("scatter_add", _scatter_add),
        _match("onto_shared_experts", _onto_shared, _with_shared),
        _match("index_add", _index_add, _with_shared),
        _match("index_put", _index_put),
        _match("rows_then_sum", _summed),
        _match("rows_then_bmm", _bmm),
        _match("any_tokens_index_add", _any_tokens, _with_logits, dynamic=True),
    ),
    near_misses=(
        Example("few_rows", _index_add, _with_shared, reason="Inductor's code was faster with so few rows of a token"),
        Example(
            "some_tokens",
            lambda y, w, ids: torch.zeros(2 * T, H, dtype=y.dtype, device=y.device).index_add(
                0, torch.sort(ids.reshape(-1)).indices // K, y
            ),
            _inputs,
            reason="the rows are not those of all tokens",
        ),
        Example(
            "rows_are_read_elsewhere",
            lambda y, w, ids: (lambda z: ((z * w.view(T, K, 1)).sum(1), z.float().sigmoid()))(_unsorted(y, ids)),
            _inputs,
            reason="a step between the rows and their sum has a second user",
        ),
        Example(
            "integers",
            lambda y, w, ids: _zeros(y).index_add(0, torch.sort(ids.reshape(-1)).indices // K, y),
            lambda device: (torch.ones(T * K, H, device=device, dtype=torch.int32), *_inputs(device)[1:]),
            reason="input dtype",
        ),
    ),
)
