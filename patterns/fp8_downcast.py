"""fp8_downcast: a scale-clamp-cast chain with static scales becomes one kernel.

    convert_element_type(clamp(mul | div (x, scale)), float8)   →   inductor_ext.fp8_downcast(x, [scale], program, float8)

The chain may clamp in any spelling or not at all, in bf16, fp16 or fp32, with views and converts anywhere; the program keeps
every step and its dtype, so the result is the eager chain's, byte for byte. What nothing else reads of a scale, such as its
reciprocal, the kernel computes too: ``mul:s0|recip``. A chain that Inductor can fuse into its producer, or into what makes its
scale, is left alone unless the rule is forced: an extern kernel has to read from memory what the producer has in registers.

Eight-bit work that no rule reads is reported here too, by its name (`unread`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.graph import call, describe, is_reshape, value_of
from inductor_ext.kernels import steps
from inductor_ext.kernels.fp8_downcast.op import OP
from inductor_ext.miss import INPUT_LAYOUT, Miss, found_or_none
from inductor_ext.patterns.support import dynamic_scale, fp8_chain, profit, unread
from inductor_ext.rule import Call, Context, Example, Match, Rule

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def anchors(graph: Graph) -> list[Node]:
    return [*fp8_chain.casts(graph), *unread.converts(graph)]


def guard(node: Node, context: Context) -> Match | None:
    if not fp8_chain.is_fp8_cast(node):
        unread.check(node)
        return None
    chain = fp8_chain.trace(node)
    if any(dynamic_scale.amax_above(operand, chain.x) is not None for operand in chain.operands):
        return None  # a dynamic scale: fp8_quantize's business
    x = chain.input_value()
    rows = ":r" in chain.program
    if not (fp8_chain.collapses_to_rows(x) or (not rows and fp8_chain.is_dense(x))):
        wanted = "rows of one pitch and unit stride" if rows else "a dense tensor, or rows of one pitch and unit stride"
        raise Miss(INPUT_LAYOUT, node, wanted, f"{describe(chain.x)} strides {list(x.stride())}")
    profit.check(node, chain.x, context)
    program, operands = _with_scales_made(chain)
    for operand in operands:
        profit.check_scale(node, operand, chain.x, context)
    arguments = (x, [value_of(operand) for operand in operands], program, chain.dtype)
    why = "forced" if context.forced else f"its input comes from {describe(chain.x)}"
    return Match(node, (Call(OP, arguments),), f"{program} → {chain.dtype}", why, (chain, operands, program))


def _with_scales_made(chain: fp8_chain.Chain) -> tuple[str, list[Node]]:
    """The chain's program, which makes what nothing else reads of its scales itself, and the scales that are left."""
    program, operands = list(chain.steps), list(chain.operands)
    for index, operand in enumerate(operands):
        if value_of(operand).device != value_of(chain.x).device:
            continue  # its value goes to the kernel as a number
        node, made = operand, list[steps.Step]()
        while len(node.users) == 1 and not is_reshape(node):
            way = found_or_none(dynamic_scale.step, node)
            if way is None or value_of(way.above).dtype not in fp8_chain.FLOATS:
                break
            made[:0] = [] if way.step is None else [way.step]
            node = way.above
        names = f"s{index}", f"r{index}"
        longer = [dataclasses.replace(each, via=tuple(made)) if each.operand in names else each for each in program]
        if len(steps.constants(steps.text_of(longer))) <= steps.MAX_CONSTS:
            program, operands[index] = longer, node
    return steps.text_of(program), operands


def replace(match: Match) -> None:
    chain, operands, program = match.data
    graph = match.node.graph
    with graph.inserting_before(match.node):
        value = chain.insert(graph, lambda x: call(graph, OP.overload, x, operands, program, chain.dtype, like=match.node))
    fp8_chain.replace_cast(match.node, value)


# ---- examples --------------------------------------------------------------------------------------------------------


def _x(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape or (64, 128), dtype=torch.float32, device=device).to(dtype) * 100


def _scaled(device: str) -> tuple[Any, ...]:
    return _x(device), torch.tensor(0.25, device=device)


def _rows(device: str) -> tuple[Any, ...]:
    return _x(device), torch.rand(64, 1, device=device) + 0.1


def _clamp(value: torch.Tensor) -> torch.Tensor:
    return value.clamp(-448.0, 448.0)


MATCHES = (
    Example("divide_fp32", lambda x, s: _clamp(x.float() / s).to(E4), _scaled),
    Example("divide_fp32_dynamic_shape", lambda x, s: _clamp(x.float() / s).to(E4), _scaled, dynamic=True),
    Example("reciprocal_bf16", lambda x, s: _clamp(x * s.reciprocal()).to(E4), _scaled),
    Example("one_over_scale", lambda x, s: (x * (1.0 / s)).clamp(min=-448, max=448).to(E4), _scaled),
    Example("python_scale", lambda x: (x.float() * 0.25).clamp(-448, 448).to(E4), lambda d: (_x(d),)),
    Example(
        "minimum_maximum",
        lambda x, s: torch.minimum(
            torch.maximum(x.float() / s, torch.full((), -448.0, device=x.device)), torch.full((), 448.0, device=x.device)
        ).to(E4),
        _scaled,
    ),
    Example("maximum_last", lambda x, s: (x.float() / s).clamp_max(448.0).clamp_min(-448.0).to(E4), _scaled),
    Example("hardtanh_bf16", lambda x, s: torch.nn.functional.hardtanh(x / s, -448, 448).to(E4), _scaled),
    Example("no_clamp", lambda x, s: (x / s).to(E4), _scaled),
    Example("e5m2", lambda x, s: (x.float() / s).clamp(-57344.0, 57344.0).to(E5), _scaled),
    Example("narrow_bounds", lambda x, s: (x.float() * s).clamp(-240.0, 240.0).to(E4), _scaled),
    Example(
        "scale_is_read_elsewhere",
        lambda x, s: (lambda t: (_clamp(x.float() * t).to(E4), t))(1.0 / s),
        _scaled,
    ),
    Example("reciprocal_of_a_row", lambda x, s: _clamp(x.float() * s.reciprocal()).to(E4), _rows),
    Example("row_scale", lambda x, s: _clamp(x.float() / s).to(E4), _rows),
    Example("row_scale_promotes", lambda x, s: _clamp(x / s).to(E4), _rows),
    Example("fp16", lambda x, s: _clamp(x * s).to(E4), lambda d: (_x(d, dtype=torch.float16), torch.tensor(0.5, device=d))),
    Example("fp32", lambda x, s: _clamp(x * s).to(E4), lambda d: (_x(d, dtype=torch.float32), torch.tensor(0.5, device=d))),
    Example("views_between", lambda x, s: _clamp((x.float() / s).view(-1)).to(E4).view(32, 256), _scaled),
    Example(
        "after_matmul",
        lambda a, b, s: _clamp((a @ b).float() / s).to(E4),
        lambda d: (_x(d), _x(d, 128, 32), torch.tensor(9.0, device=d)),
    ),
    Example(
        "norm_forced",
        lambda x, s: _clamp(
            (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16().float() / s
        ).to(E4),
        _scaled,
        mode="always",
        before=(("rms_norm_quantize", "off"),),
    ),
)

NEAR_MISSES = (
    Example(
        "consumer_is_pointwise",
        lambda x, s: _clamp(x.float() / s).to(E4).float() * s,
        _scaled,
        reason="Inductor fuses this chain into its consumer for free",
    ),
    Example("no_scale", lambda x: x.clamp(-448, 448).to(E4), lambda d: (_x(d),), reason="no scale before the cast"),
    Example(
        "float64",
        lambda x, s: _clamp(x / s).to(E4),
        lambda d: (_x(d).double(), torch.tensor(0.5, device=d)),
        reason="input dtype",
    ),
    Example(
        "column_scale",
        lambda x, s: _clamp(x.float() / s).to(E4),
        lambda d: (_x(d), torch.rand(128, device=d) + 0.1),
        reason="scale layout",
    ),
    Example(
        "integer_scale",
        lambda x, s: _clamp(x.float() / s).to(E4),
        lambda d: (_x(d), torch.tensor(3, device=d)),
        reason="scale dtype",
    ),
    Example(
        "clamped_value_used_twice",
        lambda x, s: (lambda y: (y.to(E4), y.sum()))(_clamp(x.float() / s)),
        _scaled,
        reason="the clamped value has a second user",
    ),
    Example(
        "producer_is_pointwise",
        lambda x, s: _clamp(torch.sin(x).float() / s).to(E4),
        _scaled,
        reason="Inductor fuses this chain into its producer for free",
    ),
    Example(
        "scale_is_made_of_the_values",
        lambda x: (lambda s: (_clamp(x.float() / s).to(E4), s))(x.float().pow(2).mean(-1, keepdim=True).sqrt() + 1e-12),
        lambda d: (_x(d),),
        reason="Inductor fuses this chain into its scale for free",
    ),
    Example(
        "scale_is_made_on_the_way",
        lambda x, s, t: _clamp(x.float() / (s * t)).to(E4),
        lambda d: (*_scaled(d), torch.tensor(0.5, device=d)),
        reason="Inductor fuses this chain into its scale for free",
    ),
    Example(
        "fnuz",
        lambda x, s: _clamp(x.float() / s).to(torch.float8_e4m3fnuz),
        _scaled,
        reason="another format than NVIDIA's FP8",
    ),
    Example(
        "int8",
        lambda x, s: (x.float() / s).round().clamp(-128, 127).to(torch.int8),
        _scaled,
        reason="quantised to int8",
    ),
    Example(
        "weight_only",
        lambda x, w, s: x @ (w.to(torch.bfloat16) * s).t(),
        lambda d: (_x(d), _x(d).to(E4), torch.ones(64, 1, dtype=torch.bfloat16, device=d)),
        reason="eight bits are only storage here",
    ),
    Example(
        "simulated",
        lambda x, w, s: (_clamp(x / s).to(E4).to(torch.bfloat16) * s) @ w,
        lambda d: (_x(d), _x(d).t(), torch.tensor(0.5, dtype=torch.bfloat16, device=d)),
        reason="FP8 is only simulated here",
    ),
    Example(
        "strided_input",
        lambda x, s: _clamp(x[:, ::2].float() / s).to(E4),
        _scaled,
        reason="input layout",
    ),
)

RULE = Rule(
    name="fp8_downcast",
    doc="scale-clamp-cast with static scales → one fused kernel",
    anchors=anchors,
    guard=guard,
    replace=replace,
    matches=MATCHES,
    near_misses=NEAR_MISSES,
)
