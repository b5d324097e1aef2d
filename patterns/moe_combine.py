"""moe_combine: the weighted un-permute at the end of a mixture of experts becomes one kernel.

    z = y * weights[perm, None]                        y: the experts' rows; may be masked, where(ids >= E, 0, y)
    out = z[inverse].view(T, k, H).sum(1)              inverse[perm] = arange(T·k)
        →   out = inductor_ext.moe_combine(y, weights.view(T, k), inverse.view(T, k), …)

Every row is read once, in 16-byte accesses, and masked rows not at all. The weights may come before or after the un-permute
or be missing, and so may the mask. The inverse is kept: it is a scatter of T·k integers, and the sum needs it token by token.

In mode "auto" only from `LEAST_TOP_K` rows a token on: with fewer, the kernel was slower than Inductor's code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.calls import CONVERT, arguments, aten, calling, is_call
from inductor_ext.graph import call, constant_of, describe, erase_dead, is_opaque, is_reshape, known_equal, same_sizes, value_of
from inductor_ext.kernels import steps
from inductor_ext.kernels.moe_combine.op import HAS_RUN, MAX_TOP_K, OP
from inductor_ext.miss import INPUT_DTYPE, INPUT_LAYOUT, Miss, no_other_users
from inductor_ext.patterns.support import has_run, routing
from inductor_ext.patterns.support.same import in_order
from inductor_ext.rule import Call, Context, Example, Match, Rule

#: Rows of a token from which on the kernel was faster than Inductor's code for the same lines (H200, 4096 tokens: 1.09 times
#: with 5, 4.5 with 8; benchmarks/results/h200/moe_combine.json), and its speed below.
LEAST_TOP_K = 5
SPEED_BELOW = "0.87 of Inductor's speed with 1, 0.92 to 1.01 with 2, 0.98 to 1.05 with 4 on H200"


@dataclasses.dataclass
class Combine:
    """A sum of gathered rows. ``weights`` and ``ids`` are vectors in the tokens' order, or still in that of y's rows."""

    sum: Node
    result: Node  # the sum, or the convert behind it
    shape: tuple[Any, Any]  # T, k
    y: Node
    inverse: Node
    product: torch.dtype
    weights: Node | None = None
    weights_sorted: bool = False
    ids: Node | None = None
    ids_sorted: bool = False
    experts: int = 0
    inner: list[Node] = dataclasses.field(default_factory=list)  # what only the sum may read


def guard(node: Node, context: Context) -> Match | None:
    found = trace(node)
    if found is None:
        return None
    check(found, context)
    return match_of(found)


def match_of(found: Combine) -> Match:
    parts = [f"{found.shape[1]} of {value_of(found.y).shape[1]}"]
    parts += ["weights"] if found.weights is not None else []
    parts += [f"experts below {found.experts}"] if found.ids is not None else []
    return Match(found.result, (Call(OP, _fakes(found)),), ", ".join(parts), "each row is read once", found)


def trace(node: Node) -> Combine | None:
    """The sum ``node`` as a combination of gathered rows; None where no rows are gathered."""
    found = _walk(node)
    if found is None:
        return None
    dims, keepdim = (arguments(node)[name] for name in ("dim", "keepdim"))
    if [dim % 3 for dim in dims] != [1] or keepdim:
        shown = f"{list(dims)}{', keepdim' if keepdim else ''}"
        raise Miss("the sum is not over a token's rows", node, "dimension 1 of [T, k, H], not kept", shown)
    return found


def _walk(node: Node) -> Combine | None:
    at: Any = node.args[0]
    found = Combine(node, node, (0, 0), at, at, torch.float32)
    gathered, product = False, None
    view: Node | None = None
    weighted: list[tuple[Node, bool]] = []
    masked: list[tuple[routing.RowMask, bool]] = []
    narrowed: Node | None = None
    while isinstance(at, Node) and isinstance(value_of(at), torch.Tensor):
        if is_call(at, CONVERT):
            if value_of(at).dtype is not torch.float32:
                narrowed = at
            found.inner.append(at)
            at = at.args[0]
        elif is_reshape(at) and value_of(at).dim() == 3 and value_of(at.args[0]).dim() == 2:
            if not known_equal(value_of(at).shape[2], value_of(at.args[0]).shape[1]):
                return None
            view = at
            found.inner.append(at)
            at = at.args[0]
        elif view is not None and not gathered and (gather := _gather(at)) is not None:
            gathered = True
            found.inner.append(at)
            at, found.inverse = gather
        elif is_call(at, aten.mul.Tensor) and not weighted and (factors := weighted_rows(at)) is not None:
            product = value_of(at).dtype
            weighted.append((factors[1], gathered))
            found.inner.append(at)
            at = factors[0]
        elif (mask := routing.row_mask(at)) is not None and not masked and constant_of(mask.fill) == 0:
            masked.append((mask, gathered))
            found.inner.append(at)
            at = mask.kept
        else:
            break
    if not gathered:
        return None
    assert view is not None  # above what is gathered
    if narrowed is not None:
        reason = "a value is converted between the rows and their sum"
        raise Miss(reason, narrowed, "converts to float32 only", describe(narrowed))
    found.shape, found.y = tuple(value_of(view).shape[:2]), at
    found.product = product or value_of(at).dtype
    for weights, is_sorted in weighted:
        found.weights, found.weights_sorted = weights, is_sorted
    for mask, is_sorted in masked:
        found.ids, found.ids_sorted, found.experts = mask.ids, is_sorted, mask.experts
    no_other_users(found.inner, {node, *found.inner}, "a step between the rows and their sum", "the sum only")
    found.result = narrowed_behind(node)
    return found


def narrowed_behind(node: Node) -> Node:
    """The convert that alone reads a sum in fp32, where it is one to a dtype that the kernel writes; else the sum."""
    if value_of(node).dtype is torch.float32 and len(node.users) == 1:
        (user,) = node.users
        if is_call(user, CONVERT) and user.args[1] in steps.TOKEN_OF_DTYPE:
            return user
    return node


def _gather(node: Node) -> tuple[Node, Node] | None:
    """Source and index of ``source[index]``, rows of a matrix. (index_select is decomposed to it.)"""
    if not is_call(node, aten.index.Tensor) or len(node.args[1]) != 1:
        return None
    source, (index,) = node.args
    return (source, index) if value_of(source).dim() == 2 and value_of(index).dtype in routing.INTEGERS else None


def weighted_rows(node: Node) -> tuple[Node, Node] | None:
    """Rows and weights of their product: one weight a row, [.., 1]."""
    shape = value_of(node).shape
    for rows, weights in (node.args, node.args[::-1]):
        one, other = value_of(rows), value_of(weights)
        if not isinstance(other, torch.Tensor):
            return None
        a_row = same_sizes(one.shape, shape) and same_sizes(other.shape, (*shape[:-1], 1))
        if a_row and other.dtype in steps.TOKEN_OF_DTYPE:
            return rows, weights
    return None


def check(found: Combine, context: Context) -> None:
    y, top_k = value_of(found.y), found.shape[1]
    node = found.result
    if y.dtype not in steps.TOKEN_OF_DTYPE:
        raise Miss(INPUT_DTYPE, node, "bfloat16, float16 or float32", str(y.dtype))
    if not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
        raise Miss("rows of a token", node, f"a number from 1 to {MAX_TOP_K}", str(top_k))
    if not known_equal(y.stride(1), 1):
        strides = f"{describe(found.y)} strides {list(y.stride())}"
        raise Miss(INPUT_LAYOUT, node, "rows of unit stride", strides)
    if not context.forced and not is_opaque(found.y):
        wanted = "a graph input, a grouped matmul or another opaque kernel as producer"
        raise Miss("Inductor computes the rows where it reads them", node, wanted, describe(found.y))
    if not context.forced and top_k < LEAST_TOP_K:
        wanted = f'{LEAST_TOP_K} or more, or rules={{"{context.rule}": "always"}}: the kernel had {SPEED_BELOW}'
        raise Miss("Inductor's code was faster with so few rows of a token", node, wanted, str(top_k))
    has_run.check(node, context, y.device, HAS_RUN)


def _fakes(found: Combine) -> tuple[Any, ...]:
    """The op's arguments, as far as its kernel depends on them."""
    y, inverse, shape = value_of(found.y), value_of(found.inverse), found.shape
    with y.fake_mode:
        weights = None if found.weights is None else y.new_empty(shape, dtype=_weights_dtype(found))
        ids = None if found.ids is None else y.new_empty(shape, dtype=value_of(found.ids).dtype)
        return y, weights, inverse.new_empty(shape), ids, found.experts, value_of(found.result).dtype


def _weights_dtype(found: Combine) -> torch.dtype:
    """That of the weights, or fp32 where y was converted before the product, which is then fp32 too."""
    given = value_of(found.weights).dtype
    return given if torch.promote_types(value_of(found.y).dtype, given) is found.product else found.product


def replace(match: Match) -> None:
    found: Combine = match.data
    with match.node.graph.inserting_before(match.node):
        made = insert(match.node.graph, found, found.inverse)
    found.result.replace_all_uses_with(made)
    erase_dead(found.result)


def insert(graph: Graph, found: Combine, inverse: Node) -> Node:
    """The call, at the graph's insertion point."""
    like, sizes = found.result, [-1, found.shape[1]]

    def by_token(vector: Node | None, is_sorted: bool) -> Node | None:
        if vector is None:
            return None
        if is_sorted:
            flat = in_order(vector)
            ordered = routing.in_token_order(flat, inverse)
            if ordered is None:
                if value_of(vector).dim() != 1:
                    vector = call(graph, aten.reshape.default, vector, [-1], like=like)
                ordered = call(graph, aten.index.Tensor, vector, [inverse], like=like)
            vector = ordered
        return table(vector)

    def table(vector: Node) -> Node:
        """[T, k], contiguous."""
        if not same_sizes(value_of(vector).shape, found.shape):
            vector = call(graph, aten.reshape.default, vector, sizes, like=like)
        if not value_of(vector).is_contiguous():
            vector = call(graph, aten.clone.default, vector, like=like, memory_format=torch.contiguous_format)
        return vector

    weights = by_token(found.weights, found.weights_sorted)
    if weights is not None and value_of(weights).dtype is not _weights_dtype(found):
        weights = call(graph, CONVERT, weights, _weights_dtype(found), like=like)
    ids = by_token(found.ids, found.ids_sorted)
    dtype = value_of(found.result).dtype
    return call(graph, OP.overload, found.y, weights, table(inverse), ids, found.experts, dtype, like=like)


# ---- examples --------------------------------------------------------------------------------------------------------

E, K, T, H = 4, 2, 6, 64


def _sorted(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sorted expert ids, the permutation and its inverse, as transformers spells it."""
    sorted_ids, perm = torch.sort(ids.reshape(-1))
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.shape[0], device=perm.device)
    return sorted_ids, perm, inverse


def _transformers(y: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    sorted_ids, perm, inverse = _sorted(ids)
    y = y.masked_fill((sorted_ids >= E).unsqueeze(-1), 0.0)
    y = y * weights.reshape(-1)[perm].unsqueeze(-1)
    return y[inverse].view(-1, K, H).sum(dim=1).to(torch.bfloat16)


def _routed(y: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return _transformers(y, weights, torch.topk(logits, K).indices)


def _after(y: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    _, _, inverse = _sorted(ids)
    return (y[inverse].view(-1, K, H) * weights.view(-1, K, 1)).sum(dim=1)


def _unweighted(y: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    _, perm, _ = _sorted(ids)
    return y[torch.argsort(perm)].view(-1, K, H).sum(dim=1)


def _given_order(y: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Weights in the rows' order, and an inverse that the graph is given."""
    return (y.float() * weights.view(-1, 1))[inverse].view(T, K, H).sum(dim=1)


def _inputs(device: str, weights: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    y = torch.randn(T * K, H, device=device).bfloat16()
    return y, torch.rand(T, K, device=device).to(weights), torch.randint(0, E + 1, (T, K), device=device)


def _with_order(device: str) -> tuple[torch.Tensor, ...]:
    y, weights, _ = _inputs(device)
    return y, weights, torch.randperm(T * K, device=device)


def _with_logits(device: str) -> tuple[torch.Tensor, ...]:
    y, weights, _ = _inputs(device)
    return y, weights, torch.randn(T, E + 1, device=device)


def _match(name: str, fn: Any, inputs: Any = _inputs, **rest: Any) -> Example:
    return Example(name, fn, inputs, mode="always", **rest)  # on a GPU the kernel has to be asked for until it has run


RULE = Rule(
    name="moe_combine",
    doc="the experts' rows back in the tokens' order, weighted and summed → one kernel",
    anchors=calling(aten.sum.dim_IntList),
    guard=guard,
    replace=replace,
    exact=False,
    cost="products are rounded as in eager and summed in fp32, in another order than eager's or Inductor's may be",
    matches=(
        _match("transformers", _transformers),
        _match("any_number_of_tokens", _routed, _with_logits, dynamic=True),
        _match("fp32_weights", _transformers, lambda device: _inputs(device, torch.float32)),
        _match("weights_after", _after),
        _match("no_weights", _unweighted),
        _match("given_order", _given_order, _with_order),
        _match(
            "some_rows_of_a_larger_buffer",  # what came back from other ranks
            lambda y, w, places: (y[places.view(-1)].view(-1, K, H) * w.view(-1, K, 1)).sum(dim=1),
            lambda device: (torch.randn(T * K * 2, H, device=device).bfloat16(), *_with_order(device)[1:]),
        ),
    ),
    near_misses=(
        Example(
            "sum_over_columns",
            lambda y, w, ids: y[_sorted(ids)[2]].view(T, K, H).sum(dim=2),
            _inputs,
            reason="the sum is not over a token's rows",
        ),
        Example(
            "rows_are_read_elsewhere",
            lambda y, w, ids: (lambda z: (z.view(T, K, H).sum(dim=1), z * 2))(y[_sorted(ids)[2]]),
            _inputs,
            reason="a step between the rows and their sum has a second user",
        ),
        Example(
            "products_are_rounded_again",
            lambda y, w, ids: (y.float() * w.view(-1, 1)).bfloat16()[_sorted(ids)[2]].view(T, K, H).sum(dim=1),
            _inputs,
            reason="a value is converted between the rows and their sum",
        ),
        Example(
            "columns",
            lambda y, w, ids: y.t()[_sorted(ids)[2]].view(T, K, H).sum(dim=1),
            lambda device: (torch.randn(H, T * K, device=device).bfloat16(), *_inputs(device)[1:]),
            reason="input layout",
        ),
        Example(
            "rows_are_computed_by_inductor",
            lambda y, w, ids: torch.relu(y)[_sorted(ids)[2]].view(T, K, H).sum(dim=1),
            _inputs,
            reason="Inductor computes the rows where it reads them",
        ),
        Example(
            "integers",
            lambda y, w, ids: y[_sorted(ids)[2]].view(T, K, H).sum(dim=1),
            lambda device: (torch.ones(T * K, H, device=device, dtype=torch.int32), *_inputs(device)[1:]),
            reason="input dtype",
        ),
        Example(
            "few_rows",
            lambda y, w, ids: y[_sorted(ids)[2]].view(T, K, H).sum(dim=1),
            _inputs,
            reason="Inductor's code was faster with so few rows of a token",
        ),
        Example(
            "many_rows",
            lambda y, w, ids: y[_sorted(ids)[2]].view(2, 72, H).sum(dim=1),
            lambda device: (
                torch.randn(144, H, device=device).bfloat16(),
                torch.rand(2, 72, device=device),
                torch.randint(0, E, (2, 72), device=device),
            ),
            reason="rows of a token",
        ),
    ),
)
