"""act_cat_quantize: an activation beside columns as they are, quantised together, becomes one kernel.

    y = cat([x, act(h)], -1);  s = program(amax(|y|));  q = cast(clamp(y / s))   →   q, s = act_cat_quantize(x, h, …)

Blocks that attend and compute their MLP side by side end in one product (Flux's single blocks): x is attention's output, first
or last. Where attention leaves [B, H, S, D], the kernel reads its heads where they lie.

Inductor reads x and h twice, and activates twice: for the maximum, and to cast. This is one pass by act_quantize's device code,
and chosen where that one is (``MEASURED``). x has to lie in memory anyway. With one scale for the whole tensor y would go to
memory, and with a given one Inductor needs one pass as well: those are left alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.calls import aten, is_call
from inductor_ext.graph import describe, guarded_at_most, is_opaque, known_equal, same_sizes, value_of
from inductor_ext.kernels.act_cat_quantize.op import GRANULARITIES, MAX_COLUMNS, OP
from inductor_ext.kernels.act_quantize.op import MEASURED
from inductor_ext.miss import DTYPES, INPUT_LAYOUT, NOT_FASTER, Miss, fused, no_other_users
from inductor_ext.patterns.act_quantize import Activated, trace
from inductor_ext.patterns.support import fp8_chain, has_run, quantisation
from inductor_ext.rule import Call, Context, Example, Match, Rule

E4 = torch.float8_e4m3fn
F = torch.nn.functional


@dataclasses.dataclass(frozen=True)
class Concatenated:
    """``cat`` is ``activated`` beside ``x``, [..., C] or heads [..., H, D] of those columns, or behind it for ``x_first``."""

    cat: Node
    activated: Activated
    x: Node
    x_first: bool


def guard(node: Node, context: Context) -> Match | None:
    traced = quantisation.trace(node)
    started = () if traced is None else quantisation.starts(traced)
    found = next(((chain, parts) for chain in started if (parts := _activated_parts(chain.x))), None)
    if found is None:
        return None
    chain, parts = found
    read = _concatenated(chain.x, parts)
    inner = read.activated.inner
    no_other_users(inner, {*inner, read.cat}, "a step of the activation", "it only")
    quantised = quantisation.parse(chain, context)
    _check_layout(node, read)
    if quantised.granularity not in GRANULARITIES:
        raise Miss(NOT_FASTER, node, "a scale of each row or block, from the data", quantised.detail)
    if not context.forced and not is_opaque(read.x):
        wanted = "a graph input, a GEMM, attention or another opaque kernel as producer"
        raise Miss(fused("concatenation", "producer"), node, wanted, describe(read.x))
    has_run.check(node, context, value_of(read.cat).device, MEASURED, has_run.NOT_MEASURED)
    quantisation.check_place(quantised, min(quantised.nodes))
    of = read.activated
    given = (read.x, of.gate, of.up, of.form, of.pairs, read.x_first, *quantised.arguments)
    made = Call(OP, torch.fx.map_arg(given, value_of))
    order = f"x, {of.form}" if read.x_first else f"{of.form}, x"
    detail = f"[{order}]{', pairs' if of.pairs else ''}, {quantised.detail}"
    return Match(node, (made,), detail, quantised.why, (quantised, given))


def _activated_parts(cat: Node) -> dict[int, Activated]:
    """Those parts of a concatenation that are an activation, by their place."""
    if not is_call(cat, aten.cat.default):
        return {}
    parts: Any = cat.args[0]
    traced = {index: trace(part) for index, part in enumerate(parts) if isinstance(part, Node)}
    return {index: found for index, found in traced.items() if found is not None}


def _concatenated(cat: Node, activated: dict[int, Activated]) -> Concatenated:
    parts: Any = cat.args[0]
    dim = cat.args[1] if len(cat.args) > 1 else 0
    value = value_of(cat)
    if dim not in (-1, value.dim() - 1):
        raise Miss("the concatenation is not of columns", cat, "the last dimension", f"dimension {dim} of {value.dim()}")
    if len(parts) != 2:
        raise Miss("more than two parts are concatenated", cat, "an activation and one other", f"{len(parts)} parts")
    if len(activated) != 1:
        wanted, found = "an activation beside columns as they are", ", ".join(map(describe, parts))
        raise Miss("both parts of the concatenation are activations", cat, wanted, found)
    for part in parts:
        if value_of(part).dtype is not value.dtype:
            raise Miss(DTYPES, cat, f"two parts of {value.dtype}", ", ".join(map(describe, parts)))
    ((index, read),) = activated.items()
    return Concatenated(cat, read, _columns(parts[1 - index]), x_first=index == 1)


def _columns(part: Node) -> Node:
    """What ``part`` is copied from: itself, or what a copy of it is of, or heads [..., H, D] that lie side by side in it."""
    shape = value_of(part).shape
    above: Any = part
    if is_call(part, aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        above = part.args[0]
    while is_call(above, aten.clone.default):
        above = above.args[0]
    heads = value_of(above)
    if same_sizes(heads.shape, shape):
        return above  # type: ignore[no-any-return]
    return above if heads.dim() > 1 and same_sizes(heads.shape[:-2], shape[:-1]) else part


def _check_layout(node: Node, read: Concatenated) -> None:
    for each in (read.activated.gate, read.activated.up):
        if each is not None and not fp8_chain.collapses_to_rows(value_of(each)):
            raise Miss(INPUT_LAYOUT, node, "rows of one pitch and unit stride", _strides(each))
    if not _has_rows(value_of(read.x), value_of(read.cat).dim() - 1):
        raise Miss(INPUT_LAYOUT, node, "rows of unit stride with one pitch, or two, none of them zero", _strides(read.x))
    columns = value_of(read.cat).shape[-1]
    if not guarded_at_most(columns, MAX_COLUMNS):
        raise Miss("too many columns", node, f"at most {MAX_COLUMNS}", str(columns))


def _strides(node: Node) -> str:
    return f"{describe(node)} strides {list(value_of(node).stride())}"


def _has_rows(x: torch.Tensor, leading: int) -> bool:
    """Whether a kernel reads x where it lies: unit stride, and leading dimensions that are at most two by their strides."""
    sized = [(size, stride) for size, stride in zip(x.shape, x.stride()) if not known_equal(size, 1)]
    if not known_equal(x.stride(-1), 1) or any(known_equal(stride, 0) for _, stride in sized):
        return False
    rows = [(size, stride) for size, stride in zip(x.shape[:leading], x.stride()) if not known_equal(size, 1)]
    steps = [known_equal(above, size * stride) for (_, above), (size, stride) in itertools.pairwise(rows)]
    return steps.count(False) <= 1


def replace(match: Match) -> None:
    quantised, given = match.data
    quantisation.insert(match.node, quantised, OP.overload, given)


# ---- examples --------------------------------------------------------------------------------------------------------


def _quantise(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = (y.abs().amax(-1, keepdim=True) / 448.0).float()
    return (y.float() / s).clamp(-448.0, 448.0).to(E4), s


def _beside(device: str) -> tuple[torch.Tensor, ...]:
    """Columns, and what is activated."""
    return tuple((torch.randn(3, 8, columns, device=device) * 3).bfloat16() for columns in (32, 64))


def _heads(device: str) -> tuple[torch.Tensor, ...]:
    """Attention's output as it leaves it, [B, H, S, D], and what is activated."""
    return (torch.randn(3, 2, 8, 16, device=device) * 3).bfloat16(), _beside(device)[1]


def _single_block(x: torch.Tensor, h: torch.Tensor) -> Any:
    """Flux: attention and the MLP's activation share one product."""
    return _quantise(torch.cat((x, F.gelu(h, approximate="tanh")), -1))


def _of_attention(x: torch.Tensor, h: torch.Tensor) -> Any:
    return _single_block(x.transpose(1, 2).flatten(2), h)


def _swiglu(x: torch.Tensor, h: torch.Tensor) -> Any:
    gate, up = h.chunk(2, -1)
    return _quantise(torch.cat((x, F.silu(gate) * up), -1))


def _rows(x: torch.Tensor, h: torch.Tensor) -> Any:
    """torchao's product flattens tokens before it quantises."""
    return _quantise(torch.cat((x, F.gelu(h)), -1).flatten(0, 1))


def _one_scale(x: torch.Tensor, h: torch.Tensor) -> Any:
    y = torch.cat((x, F.gelu(h)), -1)
    return (y.float() / (y.abs().amax() / 448.0).float()).clamp(-448.0, 448.0).to(E4)


def _mxfp8(x: torch.Tensor, h: torch.Tensor) -> Any:
    return torch.ops.inductor_ext.mxfp8_quantize(torch.cat((x, F.silu(h)), -1).flatten(0, 1), None, "rceil", False)


RULE = Rule(
    name="act_cat_quantize",
    doc="an activation concatenated with other columns, and FP8 of both → one kernel",
    anchors=quantisation.anchors,
    guard=guard,
    replace=replace,
    exact=False,
    cost="exponentials, erf and tanh are PyTorch's GPU kernel's, and an activated value may differ by one FP8 step",
    matches=(
        Example("single_block", _single_block, _beside),
        Example("single_block_dynamic_shape", _single_block, _beside, dynamic=True),
        Example("heads", _of_attention, _heads),
        Example("heads_dynamic_shape", _of_attention, _heads, dynamic=True),
        Example("activation_first", lambda x, h: _quantise(torch.cat((F.gelu(h), x), dim=2)), _beside),
        Example("gated", _swiglu, _beside),
        Example("flattened_tokens", _rows, _beside),
        Example("columns_of_a_wider_buffer", lambda x, h: _single_block(x[..., 8:24], h), _beside),
        Example("mxfp8", _mxfp8, _beside),
        Example("computed_columns", lambda x, h: _single_block(torch.sin(x), h), _beside, mode="always"),
    ),
    near_misses=(
        Example(
            "three_parts",
            lambda x, h: _quantise(torch.cat((x, x, F.gelu(h)), -1)),
            _beside,
            reason="more than two parts are concatenated",
        ),
        Example(
            "two_activations",
            lambda x, h: _quantise(torch.cat((F.silu(x), F.gelu(h)), -1)),
            _beside,
            reason="both parts of the concatenation are activations",
        ),
        Example(
            "by_rows",
            lambda x, h: _quantise(torch.cat((x, F.gelu(h[..., :32])), 1)),
            _beside,
            reason="the concatenation is not of columns",
        ),
        Example(
            "promoted", lambda x, h: _quantise(torch.cat((x.float(), F.gelu(h)), -1)), _beside, reason=DTYPES
        ),
        Example(
            "read_elsewhere",
            lambda x, h: (lambda y: (*_quantise(y), y * 3))(torch.cat((x, F.gelu(h)), -1)),
            _beside,
            reason="what is quantised has a second user",
        ),
        Example(
            "the_activation_is_read",
            lambda x, h: (lambda a: (*_quantise(torch.cat((x, a), -1)), a * 3))(F.gelu(h)),
            _beside,
            reason="a step of the activation has a second user",
        ),
        Example(
            "broadcast_columns",
            lambda x, h: _single_block(x[:, :1].expand(3, 8, 32), h),
            _beside,
            reason=INPUT_LAYOUT,
        ),
        Example("every_other_column", lambda x, h: _single_block(x[..., ::2], h), _beside, reason=INPUT_LAYOUT),
        Example("activation_of_every_other_column", lambda x, h: _single_block(x, h[..., ::2]), _beside, reason=INPUT_LAYOUT),
        Example("one_scale_for_all", _one_scale, _beside, reason=NOT_FASTER),
        Example(
            "static_scale",
            lambda x, h, s: (torch.cat((x, F.gelu(h)), -1).float() / s).clamp(-448.0, 448.0).to(E4),
            lambda device: (*_beside(device), torch.tensor(0.05, device=device)),
            reason=NOT_FASTER,
        ),
        Example(
            "computed_columns_fuse",
            lambda x, h: _single_block(torch.sin(x), h),
            _beside,
            reason=fused("concatenation", "producer"),
        ),
        Example(
            "wider_than_a_row_kernel_takes",
            _single_block,
            lambda device: tuple(torch.randn(2, each, device=device).bfloat16() for each in (64, 32768)),
            reason="too many columns",
        ),
    ),
)
