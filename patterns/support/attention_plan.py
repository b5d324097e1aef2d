"""What attention becomes once its band of positions is known: the fastest library's kernel, without mask or repeated heads.

Rules find out what may be seen and where K and V really are; `match` looks for a kernel and `replace` puts it there. cuDNN and
torch's own flash attention are called as PyTorch's operators; any other library through `varlen_attention`. The result lies in
memory as [B, S, H, D], which is what output projections read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.calls import CONVERT, aten
from inductor_ext.graph import call, describe, erase_dead, known_equal, value_of
from inductor_ext.kernels.varlen_attention import implementations
from inductor_ext.kernels.varlen_attention.op import OP, problem_of
from inductor_ext.miss import DROPOUT, DTYPES, INPUT_LAYOUT, LOG_SUM_EXP, Miss
from inductor_ext.patterns.support.attention import Attention
from inductor_ext.patterns.support.attention_mask import Band
from inductor_ext.patterns.support.strides import drop_idle_copies, refresh
from inductor_ext.rule import Call, Match


@dataclasses.dataclass(frozen=True)
class Source:
    """Where Q, K or V is to be read: ``node``, through copies of ``chain``, calls that each lead from ``replaced`` to the next,
    and rounded to ``dtype``."""

    node: Node
    replaced: Node | None = None
    chain: tuple[Node, ...] = ()
    dtype: torch.dtype | None = None

    @property
    def value(self) -> torch.Tensor:
        """The fake tensor that `emit` gives."""
        found = value_of(self.node)
        with found.fake_mode if self.chain else contextlib.nullcontext():
            for before, link in zip((self.replaced, *self.chain), self.chain):
                args, kwargs = torch.fx.map_arg((link.args, link.kwargs), _swapped(before, found))
                found = link.target(*args, **kwargs)  # type: ignore[operator]
        if self.dtype not in (None, found.dtype):
            with found.fake_mode:
                found = found.to(self.dtype)
        return found

    def emit(self, graph: Graph) -> Node:
        made = self.node
        for before, link in zip((self.replaced, *self.chain), self.chain):
            args, kwargs = torch.fx.map_arg((link.args, link.kwargs), lambda n, b=before, m=made: m if n is b else n)
            made = call(graph, link.target, *args, like=link, **kwargs)  # type: ignore[arg-type]
        if self.dtype not in (None, value_of(made).dtype):
            made = call(graph, CONVERT, made, self.dtype, like=made)
        return made


def _swapped(before: Node | None, found: Any) -> Any:
    return lambda node: found if node is before else value_of(node)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is emitted: ``implementation`` of `implementations`, "cpu" for the reference."""

    found: Attention
    k: Source
    v: Source
    band: Band
    implementation: str

    @property
    def left(self) -> int:
        return -1 if self.band.left is None else self.band.left

    @property
    def right(self) -> int:
        return -1 if self.band.right is None else self.band.right


def queries(found: Attention) -> Source:
    if found.unscaled:
        return Source(found.q, found.unscaled[0], found.unscaled[1:], found.rounded)
    return Source(found.q, dtype=found.rounded)


def check(found: Attention, sources: tuple[Source, Source]) -> None:
    """Miss where no kernel does it; ``sources`` are K and V as long as Q, repeated or not."""
    node = found.node
    q, k, v = (each.value for each in (queries(found), *sources))
    if found.dropout:
        raise Miss(DROPOUT, node, "0", str(found.dropout))
    if found.others or found.output is None:
        other = ", ".join(map(describe, found.others)) or "no use of the output"
        raise Miss(LOG_SUM_EXP, node, "inference: the output alone", other)
    if not known_equal(q.shape[2], k.shape[2]):
        raise Miss("queries are not the keys' tokens", node, f"{q.shape[2]} keys", str(k.shape[2]))
    if not isinstance(q.shape[3], int) or not isinstance(found.scale, (int, float)):
        raise Miss("head size is not known", node, "a number", str(q.shape[3]))
    if not known_equal(q.shape[3], v.shape[3]):
        wanted = f"heads of {q.shape[3]} in V, as in Q and K"
        raise Miss("head size of V (MLA)", node, wanted, str(v.shape[3]))
    if found.bias is not None:
        bias, scores = value_of(found.bias).shape, (*q.shape[:3], value_of(found.k).shape[2])
        if len(bias) > 4 or not all(known_equal(a, 1) or known_equal(a, b) for a, b in zip(bias[::-1], scores[::-1])):
            raise Miss("the bias is not of the scores' shape", node, f"what broadcasts to {list(scores)}", describe(found.bias))
    if not q.dtype is k.dtype is v.dtype:
        raise Miss(DTYPES, node, f"{q.dtype} for K and V, as Q's", f"{k.dtype} and {v.dtype}")
    if any(each.stride(-1) != 1 for each in (q, k, v)):
        strides = ", ".join(str(list(each.stride())) for each in (q, k, v))
        raise Miss(INPUT_LAYOUT, node, "unit stride in the last dimension", strides)


def match(found: Attention, k: Source, v: Source, band: Band, why: str, detail: str = "") -> Match:
    """``found``, which `check` let through, with K and V taken from ``k`` and ``v`` [B, Hkv, S, D]; `replace` rewrites it."""
    library, lacking = _choose(Plan(found, k, v, band, ""))
    plan = Plan(found, k, v, band, library.name if library else "cpu")
    q = queries(found).value
    heads = f"{q.shape[1]}/{k.value.shape[1]} heads of {q.shape[3]}"
    title = library.title if library else "reference"
    made = () if _as_aten(plan) else (Call(OP, _arguments(plan, q, k.value, v.value)),)
    parts = [_named(band), heads, title + (f" ({lacking})" if lacking else ""), detail]
    return Match(found.node, made, ", ".join(filter(None, parts)), why, plan)


def _choose(plan: Plan) -> tuple[Any, str]:
    """The implementation (None for the CPU's reference), and what faster ones lack."""
    q = queries(plan.found).value
    if q.device.type == "cpu":
        return None, ""
    problem = problem_of(q, plan.left, plan.right, 0.0, False, q.shape[2], float(plan.found.scale))
    chosen, why = implementations.choose(problem, known=(plan.found.kernel,))
    if chosen is None:
        wanted = "a library that can do it: flash-attn 4, 3 or 2, cuDNN or torch's flash attention"
        raise Miss("no implementation", plan.found.node, wanted, why)
    return chosen, why


def _named(band: Band) -> str:
    if band == Band():
        return "full"
    if band == Band(right=0):
        return "causal"
    return f"keys from -{band.left} to +{band.right}".replace("None", "∞")


def _as_aten(plan: Plan) -> bool:
    """Whether PyTorch's own operator runs it, in a buffer of its own: without a copy where it cannot write into a given one."""
    return plan.implementation in ("cudnn", "torch") and plan.band in (Band(), Band(right=0))


def _arguments(plan: Plan, *heads: Any) -> tuple[Any, ...]:
    """The op's arguments from q, k and v [B, H, S, D], nodes or fake tensors: it reads them as [B, S, H, D]."""
    rows = [_rows(each) for each in heads]
    implementation = "" if plan.implementation == "cpu" else plan.implementation
    return (*rows, None, 0, float(plan.found.scale), plan.left, plan.right, 0.0, False, implementation)


def _rows(heads: Any) -> Any:
    order = [0, 2, 1, 3]
    if isinstance(heads, torch.Tensor):
        return heads.permute(order)
    return call(heads.graph, aten.permute.default, heads, order, like=heads)


def replace(match: Match) -> None:
    """Put ``match.data``, a `Plan`, in the place of the attention of ``match.node``."""
    plan: Plan = match.data
    found, graph = plan.found, match.node.graph
    assert found.output is not None
    with graph.inserting_before(match.node):
        heads = tuple(each.emit(graph) for each in (queries(found), plan.k, plan.v))
        if _as_aten(plan):
            made = _emit_aten(graph, plan, heads)
        else:
            made = call(graph, OP.overload, *_arguments(plan, *heads), like=match.node)
            made = call(graph, aten.permute.default, made, [0, 2, 1, 3], like=match.node)
    found.output.replace_all_uses_with(made)
    refresh(made)
    drop_idle_copies(made)
    inputs = found.node.all_input_nodes
    erase_dead(found.output)
    if not found.node._erased:
        graph.erase_node(found.node)  # not `erase_dead`: it counts as impure for its dropout, and there is none
    for node in inputs:
        erase_dead(node)


def _emit_aten(graph: Graph, plan: Plan, inputs: tuple[Node, ...]) -> Node:
    found, rest = plan.found, (0.0, plan.band.right == 0)
    scale = {"like": found.node, "scale": float(found.scale)}
    if plan.implementation == "cudnn":
        made = call(graph, aten._scaled_dot_product_cudnn_attention.default, *inputs, None, False, *rest, **scale)
    else:
        made = call(graph, aten._scaled_dot_product_flash_attention.default, *inputs, *rest, **scale)
    return call(graph, operator.getitem, made, 0, like=found.node)
