"""fp8_quantize: amax, scale, clamp and cast with a dynamic scale become one kernel with two outputs.

    s = program(amax(|x|));  q = cast(clamp(x / s))   →   q, s = inductor_ext.fp8_quantize(x, "row" | "tensor", …)

A scale a row, a group (a row of ``x.view(…, 128)``) or a tensor; torchao's recipe, which takes ``amax / 448`` in bf16, and the
usual ones in fp32 or double alike, bounded by a number or by a tensor of one element. x may be divided by the scale or
multiplied by its reciprocal, and any node on the way from the maximum may be read elsewhere: s is the one from which all of
those follow (`dynamic_scale`). Left alone unless forced when Inductor can fuse the chain with what produces x.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from inductor_ext.graph import call, describe, value_of
from inductor_ext.kernels.fp8_quantize.op import OP
from inductor_ext.miss import INPUT_LAYOUT, SEVERAL_SCALES, Miss, found_or_none
from inductor_ext.patterns.support import dynamic_scale, fp8_chain, profit, quantisation
from inductor_ext.rule import Call, Context, Example, Match, Rule

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def guard(node: Node, context: Context) -> Match | None:
    chain = found_or_none(fp8_chain.trace, node)
    if chain is None:
        return None  # fp8_downcast reports why it is no chain
    dynamic = [operand for operand in chain.operands if dynamic_scale.amax_above(operand, chain.x) is not None]
    if not dynamic:
        return None
    if len(chain.operands) != 1:
        found = ", ".join(map(describe, chain.operands))
        raise Miss(SEVERAL_SCALES, node, "one dynamic scale", found)
    scale = dynamic_scale.trace(chain, dynamic[0])
    x = chain.input_value()
    if not (fp8_chain.collapses_to_rows(x) if scale.granularity == "row" else fp8_chain.is_dense(x)):
        wanted = "rows of one pitch and unit stride" if scale.granularity == "row" else "a dense tensor"
        if scale.granularity == "row" and fp8_chain.is_dense(x):
            wanted += ": no kernel here takes the maximum of columns"
        raise Miss(INPUT_LAYOUT, node, wanted, f"{describe(chain.x)} strides {list(x.stride())}")
    read = quantisation.Quantisation(chain, scale)
    quantisation.check_place(read, min(read.nodes))
    profit.check(node, chain.x, context)
    arguments = (scale.granularity, scale.scale_program, scale.program, chain.dtype, *scale.bounds)
    why = "forced" if context.forced else f"its input comes from {describe(chain.x)}"
    made = Call(OP, (x, *torch.fx.map_arg(arguments, value_of)))
    return Match(node, (made,), read.detail, why, (read, arguments))


def replace(match: Match) -> None:
    found, arguments = match.data
    chain, graph = found.chain, match.node.graph
    place = min(found.nodes)
    quantisation.make_room(found, place)
    with graph.inserting_before(place):
        outputs: list[Node] = []

        def make(x: Node) -> Node:
            pair = call(graph, OP.overload, x, *arguments, like=match.node)
            outputs.extend(call(graph, operator.getitem, pair, i, like=match.node) for i in range(2))
            return outputs[0]

        value = chain.insert(graph, make)
        found.scale.put(graph, outputs[1])
    fp8_chain.replace_cast(match.node, value)


# ---- examples --------------------------------------------------------------------------------------------------------


def _x(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape or (64, 256), dtype=torch.float32, device=device) * 7).to(dtype)


def _one(device: str) -> tuple[Any, ...]:
    return (_x(device),)


def _row(x: torch.Tensor) -> Any:
    s = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448.0
    return (x.float() / s).clamp(-448.0, 448.0).to(E4), s


def _torchao(x: torch.Tensor, dims: Any) -> Any:
    s = (x.abs().amax(dims, keepdim=True) / 448.0).float()
    return (x.float() / s).clamp(-448.0, 448.0).to(E4), s


def _tensor_reciprocal(x: torch.Tensor) -> Any:
    s = 448.0 / torch.clamp(x.abs().max().float(), min=1e-12)
    return (x.float() * s).clamp(-448, 448).to(E4), s.reciprocal()


def _group(x: torch.Tensor) -> Any:
    b = x.float().view(x.shape[0], -1, 128)
    s = b.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
    return (b / s).clamp(-448.0, 448.0).to(E4).view(x.shape), s.squeeze(-1)


def _mx(x: torch.Tensor) -> Any:
    b = x.float().view(x.shape[0], -1, 32)
    e = torch.floor(torch.log2(b.abs().amax(-1, keepdim=True).clamp(min=2**-126))) - 8
    return (b * torch.exp2(-e)).clamp(-448, 448).to(E4).view(x.shape), e


def _by(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (x.float() * factor).clamp(-448.0, 448.0).to(E4)


def _reciprocal(x: torch.Tensor) -> Any:
    """The reciprocal multiplies, the scale is returned: vLLM's native quantisation."""
    s = (x.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=1e-6)
    return _by(x, s.reciprocal()), s


def _amax_is_read_too(x: torch.Tensor) -> Any:
    amax = x.abs().amax(-1).float().clamp(1e-4)
    return _by(x, 448.0 / amax[:, None]), amax / 448.0, amax


def _aminmax(x: torch.Tensor) -> Any:
    low, high = x.aminmax(dim=-1, keepdim=True)
    s = torch.maximum(low.abs(), high.abs()).float()
    s = torch.where(s > 0, s, 1.0) / 448.0
    return (x.float() / s).clamp(-448.0, 448.0).to(E4), s


def _powers_of_two(x: torch.Tensor) -> Any:
    b = x.view(x.shape[0], -1, 128)
    s = torch.exp2(torch.ceil(torch.log2((b.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=1e-6))))
    return (b / s).clamp(-448.0, 448.0).to(E4).view_as(x), s.squeeze(-1).to(torch.float8_e8m0fnu)


def _deep_gemm(x: torch.Tensor) -> Any:
    b = x.view(x.shape[0], -1, 128)
    bits = (b.abs().float().amax(-1).clamp(1e-4) / 448.0).view(torch.int)
    s = ((((bits >> 23) & 0xFF) + (bits & 0x7FFFFF).bool().int()).clamp(1, 254) << 23).view(torch.float)
    return (b * (1.0 / s.unsqueeze(2))).to(E4).view_as(x), s


def _double(x: torch.Tensor) -> Any:
    """torchao's training: the scale in double, rounded to a power of two."""
    s = (448.0 / x.abs().max().double().clamp(min=1e-12)).float()
    s = torch.exp2(torch.floor(torch.log2(s)))
    return _by(x, s), s.reciprocal()


def _flattened_between(x: torch.Tensor) -> Any:
    s = (x.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=1e-12)
    return (x.reshape(-1, 64).float() / s.reshape(-1, 1)).clamp(-448.0, 448.0).to(E4), s


def _bounded(x: torch.Tensor, bound: torch.Tensor) -> Any:
    """A tensor bounds the maximum: vLLM's quantisation of each token with ``scale_ub``."""
    amax, _ = x.abs().max(dim=-1)
    s = (amax.unsqueeze(-1).to(torch.float32).clamp(max=bound) / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    return _by(x, s.reciprocal()), s


def _bounded_amax(x: torch.Tensor, bound: torch.Tensor) -> Any:
    """The same as FBGEMM has it: the maximum is in x's dtype, and what is returned is not what x is scaled by."""
    amax = torch.minimum(x.abs().max(dim=-1)[0], bound).clamp(min=1e-12)
    s = 448.0 / amax.float()
    return (x * s[..., None]).clamp(-448.0, 448.0).to(E4), 1.0 / s


def _bounded_scale(x: torch.Tensor, bound: torch.Tensor) -> Any:
    s = torch.minimum(bound, x.abs().amax() / 448.0)
    return _by(x, 1.0 / s), s


def _bound_of_the_maximum(x: torch.Tensor) -> Any:
    amax = x.abs().amax(-1, keepdim=True).float()
    s = torch.minimum(amax, amax.mean()) / 448.0
    return (x.float() / s).clamp(-448.0, 448.0).to(E4), s


def _two_bounds(x: torch.Tensor, least: torch.Tensor, most: torch.Tensor) -> Any:
    s = x.abs().amax(-1, keepdim=True).float().clamp(min=least, max=most) / 448.0
    return (x.float() / s).clamp(-448.0, 448.0).to(E4), s


def _with_bound(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return _x(device), torch.full(shape, 15.0, dtype=dtype, device=device)


def _signed(x: torch.Tensor) -> Any:
    s = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).float() / 448.0
    return (x.float() / s).clamp(-448.0, 448.0).to(E4), s


def _columns(x: torch.Tensor) -> Any:
    s = x.abs().amax(0, keepdim=True).float().clamp(min=1e-12) / 448.0
    return (x.float() / s).clamp(-448.0, 448.0).to(E4).t().contiguous(), s


def _turned(x: torch.Tensor) -> Any:
    return _row(x.t())


MATCHES = (
    Example("row", _row, _one),
    Example("row_dynamic_shape", _row, _one, dynamic=True),
    Example("row_torchao", lambda x: _torchao(x, -1), _one),
    Example("tensor_torchao", lambda x: _torchao(x, (0, 1)), _one),
    Example("tensor_reciprocal", _tensor_reciprocal, _one),
    Example("group_128", _group, _one),
    Example("row_fp16", _row, lambda d: (_x(d, dtype=torch.float16),)),
    Example("row_fp32", _row, lambda d: (_x(d, dtype=torch.float32),)),
    Example(
        "row_e5m2",
        lambda x: (lambda s: ((x.float() / s).clamp(-57344.0, 57344.0).to(E5), s))(
            x.float().abs().amax(-1, keepdim=True) / 57344.0
        ),
        _one,
    ),
    Example("after_matmul", lambda a, b: _row(a @ b), lambda d: (_x(d), _x(d, 256, 64))),
    Example("reciprocal_of_what_is_returned", _reciprocal, _one),
    Example("amax_and_scale_are_read_too", _amax_is_read_too, _one),
    Example("amax_used_twice", lambda x: (lambda a: (*_scaled_by(x, a), a))(x.abs().amax(-1, keepdim=True)), _one),
    Example("aminmax", _aminmax, _one),
    Example("powers_of_two", _powers_of_two, _one),
    Example("powers_of_two_by_bits", _deep_gemm, _one, dynamic=True),
    Example("double", _double, _one),
    Example("flattened_between", _flattened_between, lambda d: (_x(d, 4, 12, 64),), dynamic=True),
    Example("bounded", _bounded, _with_bound, dynamic=True),
    Example("bounded_amax", _bounded_amax, lambda d: _with_bound(d, 1)),
    Example("bounded_in_bf16", _bounded_amax, _with_bound),
    Example("bounded_scale_of_all", _bounded_scale, lambda d: _with_bound(d, 1)),
    Example("norm_forced", lambda x: _row(torch.nn.functional.rms_norm(x, (256,)) * 1.5), _one, mode="always"),
)

NEAR_MISSES = (
    Example(
        "consumer_is_pointwise",
        lambda x: (lambda q, s: q.float() * s)(*_row(x)),
        _one,
        reason="Inductor fuses this chain into its consumer for free",
    ),
    Example("mx", _mx, _one, reason="a step of the scale is not one the kernel computes"),
    Example(
        "column_amax",
        lambda x: (lambda s: (x.float() / s).clamp(-448.0, 448.0).to(E4))(
            (x.abs().amax() + x.abs().amax(0).float().mean()).float()
        ),
        _one,
        reason="a step of the scale is not one the kernel computes",
    ),
    Example(
        "producer_is_pointwise",
        lambda x: _row(torch.sin(x)),
        _one,
        reason="Inductor fuses this chain into its producer for free",
    ),
    Example(
        "bound_is_a_row",
        _bounded,
        lambda d: _with_bound(d, 64, 1),
        reason="a step of the scale is not one the kernel computes",
    ),
    Example(
        "bound_in_bf16",
        _bounded_scale,
        lambda d: _with_bound(d, 1, dtype=torch.bfloat16),
        reason="a step of the scale is not one the kernel computes",
    ),
    Example(
        "bound_is_made_of_the_maximum",
        _bound_of_the_maximum,
        _one,
        reason="a step of the scale is not one the kernel computes",
    ),
    Example(
        "two_bounds",
        _two_bounds,
        lambda d: (*_with_bound(d), torch.tensor(20.0, device=d)),
        reason="the scale has several bounds",
    ),
    Example("maximum_may_be_minus_zero", _signed, _one, reason="a maximum of zeros may be -0"),
    Example("rows_of_the_transposed", _turned, _one, reason="input layout"),
    Example(
        "two_scales",
        lambda x, t: _scaled_by(x, x.abs().amax(-1, keepdim=True), t),
        lambda d: (_x(d), torch.tensor(2.0, device=d)),
        reason="several scales in one chain",
    ),
    Example("strided_rows", lambda x: _row(x[:, ::2]), _one, reason="input layout"),
)


def _scaled_by(x: torch.Tensor, amax: torch.Tensor, also: Any = None) -> Any:
    s = amax.float().clamp(min=1e-12) / 448.0
    y = x.float() if also is None else x.float() * also
    return (y / s).clamp(-448.0, 448.0).to(E4), s


RULE = Rule(
    name="fp8_quantize",
    doc="amax, scale, clamp, cast with a dynamic scale → one fused kernel",
    anchors=fp8_chain.casts,
    guard=guard,
    replace=replace,
    matches=MATCHES,
    near_misses=NEAR_MISSES,
)
