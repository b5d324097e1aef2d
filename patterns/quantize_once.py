"""quantize_once: the same activation quantised several times with the same chain is quantised once; its users share the result.

    q1, s1 = quantise(x); q2, s2 = quantise(x)   →   q1, s1 used twice

torchao quantises the input of every linear layer on its own, so q, k and v repeat one chain three times, gate and up twice.
The chains are compared node by node down to what they share; equal chains give equal bytes, so nothing but work is lost.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from inductor_ext.graph import describe, erase_dead
from inductor_ext.memory import may_be_one
from inductor_ext.miss import Miss, found_or_none
from inductor_ext.patterns.support import fp8_chain
from inductor_ext.patterns.support.same import input_pairs, is_pure, root, same_value
from inductor_ext.rule import Context, Example, Match, Rule

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def guard(node: Node, context: Context) -> Match | None:
    near: Node | None = None
    source = _source(node)
    for other in _casts_before(node):
        if same_value(node, other):
            if not may_be_one(node, other):
                wanted = "at most one of them among the outputs, since a caller may write to either"
                found = f"'{other.name}' and '{node.name}' among the outputs"
                raise Miss("both results are returned", node, wanted, found)
            return Match(node, (), f"shares {other.name}", "the same chain on the same activation", other)
        if near is None and _source(other) is source:
            near = other
    if near is not None:
        wanted = f"the chain of '{near.name}': {_program(near)}"
        raise Miss("another chain quantises the same activation", node, wanted, _program(node))
    return None


def replace(match: Match) -> None:
    _merge(match.node, match.data)


def _merge(node: Node, other: Node) -> None:
    """Let every user of a chain's nodes read the equal node of the other chain."""
    if node is other:
        return
    for mine, theirs in list(input_pairs(node, other)):
        _merge(mine, theirs)
    if other < node and may_be_one(node, other):  # a scale may come before its equal: both are kept then, and both are right
        node.replace_all_uses_with(other)
        erase_dead(node)


def _casts_before(node: Node) -> list[Node]:
    """Casts to the same dtype of what may be the same activation, in the graph's order."""
    found, seen, pending = list[Node](), set[Node](), [root(node)]
    while pending:
        for user in pending.pop().users:
            if user in seen or not is_pure(user):
                continue
            seen.add(user)
            pending.append(user)
            if user < node and fp8_chain.is_fp8_cast(user) and user.args[1] is node.args[1] and root(user) is root(node):
                found.append(user)
    return sorted(found)


def _source(cast: Node) -> Node | None:
    chain = found_or_none(fp8_chain.trace, cast)
    return None if chain is None else chain.x


def _program(cast: Node) -> str:
    chain = found_or_none(fp8_chain.trace, cast)
    if chain is None:
        return describe(cast)
    scales = ", ".join(describe(operand) for operand in chain.operands)
    return f"{chain.program} with {scales}" if scales else chain.program


# ---- examples --------------------------------------------------------------------------------------------------------


def _x(device: str) -> torch.Tensor:
    return torch.randn(32, 64, device=device).bfloat16() * 9


def _quantise(x: torch.Tensor, limit: float = 448.0) -> tuple[torch.Tensor, torch.Tensor]:
    s = (x.abs().amax(-1, keepdim=True) / limit).float()
    return (x.float() / s).clamp(-limit, limit).to(E4), s


def _three(x: torch.Tensor) -> list[torch.Tensor]:
    x = torch.nn.functional.silu(x)
    return [q.float() * s for q, s in (_quantise(x), _quantise(x), _quantise(x))]


def _static(x: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
    return [(x.float() / scale).clamp(-448.0, 448.0).to(E4).float() for scale in (s, t)]


def _scales(device: str) -> tuple[torch.Tensor, ...]:
    return _x(device), torch.tensor(0.5, device=device), torch.tensor(0.25, device=device)


RULE = Rule(
    name="quantize_once",
    doc="equal quantisations of one activation → one, shared",
    anchors=fp8_chain.casts,
    guard=guard,
    replace=replace,
    matches=(
        Example("three_users_of_one_norm", _three, lambda d: (_x(d),), count=2, before=(("act_quantize", "off"),)),
        Example("same_static_scale", lambda x, s, t: _static(x, s, s), _scales),
    ),
    near_misses=(
        Example("other_scale", _static, _scales, reason="another chain quantises the same activation"),
        Example(
            "both_returned",
            lambda x: [*_quantise(x), *_quantise(x)],
            lambda d: (_x(d),),
            reason="both results are returned",
        ),
        Example(
            "other_bounds",
            lambda x: [*_quantise(x), *_quantise(x, 240.0)],
            lambda d: (_x(d),),
            reason="another chain quantises the same activation",
        ),
    ),
)
