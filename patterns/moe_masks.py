"""moe_masks: masks of rows that nothing reads, which model libraries put around grouped matmuls, go.

    x = where(sorted_ids >= E, 0, x);  y = _grouped_mm(f(x), w, offs)   →   y = _grouped_mm(f(x), w, offs)

Rows whose expert is not here sort to the end, at or past ``offs[-1]``, and a grouped matmul neither reads nor writes them. So
they may hold anything, if whatever is made of them, row by row, ends in another grouped matmul of the same groups, or in
`moe_combine`, which does not read them either. Rows before ``offs[-1]`` keep every byte.

That a masked row is past ``offs[-1]`` is read from the graph: mask and group ends count the same ids, up to the same expert.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import CONVERT, aten, calling, is_call
from inductor_ext.graph import RESHAPES, describe, erase_dead, known_equal, value_of
from inductor_ext.kernels.moe_combine.op import OP as COMBINE
from inductor_ext.kernels.mxfp8_round.op import OP as ROUND
from inductor_ext.miss import Miss
from inductor_ext.patterns.support import routing
from inductor_ext.patterns.support.routing import RowMask
from inductor_ext.patterns.support.same import in_order
from inductor_ext.rule import Context, Example, Match, Rule

#: Where the group ends are among the arguments of the matmuls, whose rows are the first argument's.
_GROUPED = {aten._grouped_mm.default: 2}
_SLICES = {aten.slice.Tensor: 1, aten.split.Tensor: 2, aten.split_with_sizes.default: 2, aten.select.int: 1, aten.unbind.int: 1}
_READ = "a masked row is read"
_REDUCTIONS = {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default}


def guard(node: Node, context: Context) -> Match | None:
    mask = routing.row_mask(node)
    if mask is None or value_of(node).dim() != 2:
        return None
    readers, other = _readers(node)
    if not readers:
        return None  # a mask of something else
    if routing.sorted_ids(mask.ids) is None:
        reason, wanted = "the ids of the mask are not sorted", "the values of an ascending sort"
        raise Miss(reason, node, wanted, describe(mask.ids))
    if other is not None:
        raise Miss(_READ, node, "operators that take each row by itself, then a grouped matmul", describe(other))
    for reader in readers:
        _check(reader, mask)
    named = ", ".join(map(str, readers))
    return Match(node, (), f"rows of experts from {mask.experts} on", f"read by {named} only, which skip them", mask.kept)


def replace(match: Match) -> None:
    match.node.replace_all_uses_with(match.data)
    erase_dead(match.node)


def _readers(node: Node) -> tuple[list[Node], Node | None]:
    """The matmuls and combinations that what is made of ``node``'s rows ends in, and another use of them if there is one."""
    rows = value_of(node).shape[0]
    readers: dict[Node, None] = {}
    other: Node | None = None
    pending, seen = [node], {node}
    while pending:
        at = pending.pop()
        for user in at.users:
            if _skips_rows(at, user):
                readers[user] = None
            elif not _row_by_row(at, user, rows):
                other = user
            elif user not in seen:
                seen.add(user)
                pending.append(user)
    return list(readers), other


def _skips_rows(source: Node, user: Node) -> bool:
    """Whether ``user`` takes rows of ``source`` that groups of rows name, or that expert ids do."""
    if source in user.args[1:]:
        return False
    return user.target is COMBINE.overload or (is_call(user, *_GROUPED) and value_of(user.args[1]).dim() == 3)


def _row_by_row(source: Node, user: Node, rows: Any) -> bool:
    """Whether a row of ``user``, or of each of its parts, comes of the same row of ``source`` alone, and of other tensors."""
    if user.target is operator.getitem:
        return True  # a part of a split
    value, before = value_of(user), value_of(source)
    if user.target in _SLICES:
        at = _SLICES[user.target]
        dim = user.kwargs.get("dim", user.args[at] if len(user.args) > at else 0)
        return dim % before.dim() != 0
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or not known_equal(value.shape[0], rows):
        return False
    if user.target in RESHAPES:
        return user.target is not aten.permute.default or user.args[1][0] == 0
    if user.target in _REDUCTIONS:
        dims = (user.args[1] if len(user.args) > 1 else None) or [0]  # without any it is over all, rows too
        return all(dim % before.dim() != 0 for dim in ([dims] if isinstance(dims, int) else dims))
    pointwise = user.target in (CONVERT, ROUND.overload) or torch.Tag.pointwise in getattr(user.target, "tags", ())
    return pointwise and value.dim() == before.dim()


def _check(reader: Node, mask: RowMask) -> None:
    """Miss where ``reader`` may read a masked row."""
    ids = routing.sorted_ids(mask.ids)
    assert ids is not None
    if reader.target is COMBINE.overload:
        expert_ids, experts = reader.args[3:5]
        if in_order(expert_ids) is ids.ids and experts <= mask.experts:
            return
        raise Miss(_READ, reader, f"experts from {mask.experts} on left out", describe(reader))
    at = _GROUPED[reader.target]
    offs = reader.args[at] if len(reader.args) > at else reader.kwargs.get("offs")
    ends = routing.group_ends(offs) if isinstance(offs, Node) else None
    if ends is None:
        wanted = "cumsum(histc(expert ids, bins=E, min=0, max=E - 1))"
        raise Miss("the group ends are not counted from expert ids", reader, wanted, describe(offs))
    if ends.ids is not mask.ids and ends.ids is not ids.ids:
        found = f"{describe(ends.ids)} and {describe(mask.ids)}"
        raise Miss("mask and group ends are of other ids", reader, "the same ids, or their sort", found)
    if ends.experts > mask.experts:
        wanted = f"group ends of at most {mask.experts} experts, as the mask leaves"
        raise Miss("a masked row is in a group", reader, wanted, str(ends.experts))


# ---- examples --------------------------------------------------------------------------------------------------------

E, K, T, H, I = 4, 2, 6, 32, 16  # noqa: E741


def _groups(ids: torch.Tensor, experts: int = E) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sorted ids, the permutation, and the group ends, as transformers spells them."""
    sorted_ids, perm = torch.sort(ids.reshape(-1))
    counts = torch.histc(sorted_ids.float() if ids.device.type == "cpu" else sorted_ids.int(), experts, 0, experts - 1)
    return sorted_ids, perm, torch.cumsum(counts, 0, dtype=torch.int32)


def _mlp(x: Any, up: Any, down: Any, ids: Any) -> torch.Tensor:
    """Both matmuls of the experts with a mask before and behind the first; rows that are not here are zero in the result."""
    sorted_ids, perm, offs = _groups(ids)
    mask = (sorted_ids >= E).unsqueeze(-1)
    rows = torch._grouped_mm(x[perm // K].masked_fill(mask, 0.0), up.transpose(1, 2), offs=offs)
    gate, rest = rows.masked_fill(mask, 0.0).chunk(2, -1)
    y = torch._grouped_mm(torch.relu(gate) * rest, down.transpose(1, 2), offs=offs)
    return torch.where(mask, 0.0, y.float())


def _whole(x: Any, up: Any, down: Any, ids: Any) -> torch.Tensor:
    """The same, weighted and summed by token as transformers does."""
    sorted_ids, perm, offs = _groups(ids)
    mask = (sorted_ids >= E).unsqueeze(-1)
    rows = torch._grouped_mm(x[perm // K].masked_fill(mask, 0.0), up.transpose(1, 2), offs=offs)
    gate, rest = rows.masked_fill(mask, 0.0).chunk(2, -1)
    y = torch._grouped_mm(torch.relu(gate) * rest, down.transpose(1, 2), offs=offs)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.shape[0], device=perm.device)
    return y.masked_fill(mask, 0.0)[inverse].view(T, K, H).sum(1)


def _one(x: Any, up: Any, ids: Any, mask: Any, offs: Any) -> torch.Tensor:
    """One matmul of masked rows; what it leaves out is zero, so that bytes can be compared."""
    y = torch._grouped_mm(x.masked_fill(mask, 0.0), up.transpose(1, 2), offs=offs)
    return torch.where((torch.sort(ids.reshape(-1)).values >= E - 1).unsqueeze(-1), 0.0, y.float())


def _of_other_ids(x: Any, up: Any, _: Any, ids: Any) -> torch.Tensor:
    sorted_ids, perm, _ = _groups(ids)
    return _one(x[perm // K], up, ids, (sorted_ids >= E).unsqueeze(-1), _groups(ids + 1)[2])


def _of_more_experts(x: Any, up: Any, _: Any, ids: Any) -> torch.Tensor:
    sorted_ids, perm, offs = _groups(ids)
    return _one(x[perm // K], up, ids, (sorted_ids >= E - 1).unsqueeze(-1), offs)


def _not_sorted(x: Any, up: Any, _: Any, ids: Any) -> torch.Tensor:
    _, perm, offs = _groups(ids)
    return _one(x[perm // K], up, ids, (ids.reshape(-1) >= E).unsqueeze(-1), offs)


def _given_ends(x: Any, up: Any, offs: Any, ids: Any) -> torch.Tensor:
    sorted_ids, perm, _ = _groups(ids)
    return _one(x[perm // K], up, ids, (sorted_ids >= E).unsqueeze(-1), offs)


def _read_elsewhere(x: Any, up: Any, _: Any, ids: Any) -> Any:
    sorted_ids, perm, offs = _groups(ids)
    rows = x[perm // K].masked_fill((sorted_ids >= E).unsqueeze(-1), 0.0)
    return torch._grouped_mm(rows, up.transpose(1, 2), offs=offs)[:1], rows * 2


def _one_amax(x: Any, up: Any, _: Any, ids: Any) -> Any:
    sorted_ids, perm, offs = _groups(ids)
    rows = x[perm // K].masked_fill((sorted_ids >= E).unsqueeze(-1), 0.0)
    return torch._grouped_mm(rows / rows.abs().amax(), up.transpose(1, 2), offs=offs)[:1]


def _inputs(device: str) -> tuple[torch.Tensor, ...]:
    shapes = (T, H), (E, 2 * I, H), (E, H, I)
    ids = torch.tensor([[0, E], [1, 3], [E, E], [0, 2], [3, 0], [E, 1]], device=device)
    return *(torch.randn(shape, device=device).bfloat16() for shape in shapes), ids


def _with_ends(device: str) -> tuple[torch.Tensor, ...]:
    x, up, _, ids = _inputs(device)
    return x, up, torch.tensor([2, 4, 5, 8], device=device, dtype=torch.int32), ids


RULE = Rule(
    name="moe_masks",
    doc="masks of rows that a grouped matmul neither reads nor writes → nothing",
    anchors=calling(aten.where.self),
    guard=guard,
    replace=replace,
    differs_unread=True,
    matches=(
        Example("around_the_first_matmul", _mlp, _inputs, count=2),
        Example("whole_layer", _whole, _inputs, count=2, before=(("moe_combine", "always"),)),  # which takes the third mask
    ),
    near_misses=(
        Example("other_ids", _of_other_ids, _inputs, reason="mask and group ends are of other ids"),
        Example("fewer_experts", _of_more_experts, _inputs, reason="a masked row is in a group"),
        Example("not_sorted", _not_sorted, _inputs, reason="the ids of the mask are not sorted"),
        Example("given_ends", _given_ends, _with_ends, reason="the group ends are not counted from expert ids"),
        Example("read_elsewhere", _read_elsewhere, _inputs, reason="a masked row is read"),
        Example("one_amax_for_all", _one_amax, _inputs, reason="a masked row is read"),
    ),
)
