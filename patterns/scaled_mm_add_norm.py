"""scaled_mm_add_norm: the launch that adds a residual to an FP8 product normalises and quantises the sum too.

    t = inductor_ext.scaled_mm_add(a, b, …);  q, s, _ = inductor_ext.rms_norm_quantize(view(t), None, weight, …, "row", …)
        →   t, q, s = inductor_ext.scaled_mm_add_norm(a, b, …, weight, …)

What `scaled_mm_add` and `rms_norm_quantize` have made becomes one call; other readers of the sum, such as the next residual,
read its first output. Each element is rounded as those two round it. Rows are at most 1024 wide, those that a cluster of eight
CTAs holds: of Qwen3-0.6B's 7168 tokens a launch and 15 MB of reads go, twice a layer. What was measured
(``kernels/scaled_mm_add_norm/table_<target>.json``) decides; until something is, ``always`` does.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext import torch_compat
from inductor_ext.graph import aten, call, describe, erase_dead, is_call, known_equal, value_of
from inductor_ext.kernels.rms_norm_quantize.op import OP as RMS_NORM_QUANTIZE
from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm_add.op import OP as SCALED_MM_ADD
from inductor_ext.kernels.scaled_mm_add_norm import op as scaled_mm_add_norm
from inductor_ext.kernels.scaled_mm_add_norm.op import OUT_DTYPE, TILE, WIDTHS
from inductor_ext.patterns.rms_norm_quantize import _gemma, _llama, _mxfp8, _quantise, _static
from inductor_ext.patterns.scaled_mm import fixed, product, rowwise, tensorwise, with_bias
from inductor_ext.patterns.support import columns, scaled_plan
from inductor_ext.patterns.support.fp8_chain import Failure
from inductor_ext.patterns.support.same import in_order
from inductor_ext.rule import REQUANTIZED, Call, Context, Example, Match, Refusal, Rule
from inductor_ext.settings import RuleMode


@dataclasses.dataclass(frozen=True)
class _Plan:
    sum: Node  # scaled_mm_add
    norm: Node  # rms_norm_quantize
    config: str

    @property
    def weight(self) -> Node:
        return self.norm.args[2]  # type: ignore[return-value]

    def arguments(self) -> tuple[Any, ...]:
        """The op's arguments, nodes for tensors."""
        *product, out_dtype, fast, static_b, _ = self.sum.args
        _, _, weight, eps, norm, _, scale_program, program, dtype, _ = self.norm.args
        return *product, weight, eps, norm, scale_program, program, dtype, out_dtype, fast, static_b, self.config


def anchors(graph: Graph) -> Iterable[Node]:
    return [node for node in graph.nodes if is_call(node, RMS_NORM_QUANTIZE.overload) and _sum_of(node) is not None]


def _sum_of(node: Node) -> Node | None:
    """The product and residual that a norm reads, and does not add another to."""
    made = in_order(node.args[0])  # type: ignore[arg-type]
    return made if is_call(made, SCALED_MM_ADD.overload) and node.args[1] is None else None


def guard(node: Node, context: Context) -> Match | Refusal | None:
    made = _sum_of(node)
    if made is None:  # another norm of the same sum has it
        return None
    wrong = _wrong_sum(made) or _wrong_norm(node, made)
    if wrong is not None:
        return context.refuse(wrong.node, wrong.reason, wanted=wrong.wanted, found=wrong.found)
    a, b, scale_a, scale_b, *_, fast, _, _ = (value_of(each) if isinstance(each, Node) else each for each in made.args)
    (m, k), n, target = a.shape, b.shape[1], scaled_mm.target_of(a.device)
    static, on_gpu = isinstance(m, int), a.device.type == "cuda"
    table, problem = scaled_mm_add_norm.table(n), (n, k, scaled_mm.is_rowwise((scale_a, scale_b)), fast)
    why = "" if context.forced else scaled_plan.measured(table, target, node, m, problem)
    if isinstance(why, Failure):
        wanted = f'{why.wanted}, or rules={{"{context.rule}": "always"}}'
        return context.refuse(node, why.reason, wanted=wanted, found=why.found)
    name = table.choose(target, m if static else scaled_mm.bounds(m)[1], *problem)
    if on_gpu and not name:
        return context.refuse(node, "no kernel for this GPU", wanted="sm_90a", found=target)
    plan = _Plan(made, node, name if static and on_gpu else "")
    arguments = torch.fx.map_arg(plan.arguments(), value_of)
    detail = f"norm {node.args[4]!r}, N = {n}: {name if on_gpu else 'reference'}"
    return Match(node, (Call(scaled_mm_add_norm.OP, arguments),), detail, why or "the sum is normalised where it is made", plan)


def _wrong_sum(made: Node) -> Failure | None:
    if made.args[6] is not OUT_DTYPE:
        return Failure(made, "output dtype", str(OUT_DTYPE), str(made.args[6]))
    n = value_of(made).shape[1]
    if n not in WIDTHS:
        wanted = f"{', '.join(map(str, WIDTHS))} columns: {TILE} of each CTA of a cluster"
        return Failure(made, "no cluster has whole rows", wanted, f"{n} columns")
    return None


def _wrong_norm(node: Node, made: Node) -> Failure | None:
    x, _, weight, _, _, granularity, *_ = node.args
    if granularity != "row":
        return Failure(node, "not a dynamic scale a row", "granularity 'row', with one output", f"granularity {granularity!r}")
    n = value_of(made).shape[1]
    if not known_equal(value_of(x).shape[-1], n):
        return Failure(node, "the norm is not of whole rows", f"a view that keeps the {n} columns", describe(x))
    value = value_of(weight)
    if value.dtype is not OUT_DTYPE or not known_equal(value.stride(0), 1):
        found = f"{describe(weight)} strides {list(value.stride())}"
        return Failure(node, "the norm's weight", f"{OUT_DTYPE} in a row", found)
    late = columns.hoist(weight, made, move=False)
    if late is not None:
        return Failure(node, "the norm's weight is computed later than the product", "one from before it", describe(late))
    return None


def replace(match: Match) -> None:
    plan: _Plan = match.data
    graph, made, norm = match.node.graph, plan.sum, plan.norm
    columns.hoist(plan.weight, made, move=True)
    with graph.inserting_before(made):
        both = call(graph, scaled_mm_add_norm.OP.overload, *plan.arguments(), like=norm)
        likes = made, norm, norm
        total, quantised, scale = (call(graph, operator.getitem, both, i, like=like) for i, like in enumerate(likes))
    for user in list(norm.users):
        if user.args[1] in (0, 1):  # the third is empty, and nothing reads it
            result, shape = (quantised, scale)[user.args[1]], value_of(user).shape
            if len(shape) != 2:
                with graph.inserting_before(norm):
                    result = call(graph, aten.reshape.default, result, torch_compat.symbolic(graph, list(shape)), like=norm)
            user.replace_all_uses_with(result)
        erase_dead(user)
    if not made._erased:
        made.replace_all_uses_with(total)
        erase_dead(made)


# ---- examples --------------------------------------------------------------------------------------------------------

N = WIDTHS[0]
#: The rules that make what this one reads.
BEFORE: tuple[tuple[str, RuleMode], ...] = (("scaled_mm_add", "always"), ("rms_norm_quantize", "always"))

Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _operands(device: str, make: Any = rowwise, n: int = N, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """A product's a, weight and scales; the residual, and the norm's weight."""
    residual, weight = torch.randn(40, n, device=device).to(dtype), torch.rand(n, device=device) + 0.5
    return *make(device, n=n), residual, weight.to(dtype)


def _tensorwise_operands(device: str) -> tuple[Any, ...]:
    return _operands(device, tensorwise)


def _wide(device: str) -> tuple[Any, ...]:
    return _operands(device, n=2 * WIDTHS[-1])


def _narrow(device: str) -> tuple[Any, ...]:
    return _operands(device, n=N - TILE)


def _fp16_operands(device: str) -> tuple[Any, ...]:
    return _operands(device, dtype=torch.float16)


def _with_bias(device: str) -> tuple[Any, ...]:
    given = _operands(device)
    return *given, with_bias(given)[-1]


def _with_scale(device: str) -> tuple[Any, ...]:
    return *_operands(device), torch.tensor([[0.02]], device=device)


def _weight_in_fp32(device: str) -> tuple[Any, ...]:
    *others, weight = _operands(device)
    return *others, weight.float()


def _summed(a: Any, w: Any, s: Any, t: Any, x: Any, **options: Any) -> torch.Tensor:
    return x + product(a, w, s, t, **options)


def _normed(*inputs: Any, norm: Norm = _llama, **options: Any) -> Any:
    *product, weight = inputs
    total = _summed(*product, **options)
    return *_quantise(norm(total, weight)), total * 2


def _sum_unread(*inputs: Any) -> Any:
    return _normed(*inputs)[:2]


def _gemma_normed(*inputs: Any) -> Any:
    return _normed(*inputs, norm=_gemma)


def _biased(*inputs: Any) -> Any:
    return _normed(*inputs[:-1], bias=inputs[-1])


def _fast(*inputs: Any) -> Any:
    return _normed(*inputs, use_fast_accum=True)


def _in_fp16(*inputs: Any) -> Any:
    return _normed(*inputs, out_dtype=torch.float16)


def _any_rows(*inputs: Any) -> Any:
    fixed(inputs[1], N)
    for each in (inputs[4], inputs[5]):
        if each.shape[-1] != N:
            raise ValueError(f"wanted {N} columns, found {each.shape[-1]}")
    return _normed(*inputs)


def _through_views(a: Any, w: Any, s: Any, t: Any, x: Any, weight: Any) -> Any:
    total = product(a, w, s, t).view(2, 20, N) + x.view(2, 20, N)
    return *_quantise(_llama(total, weight)), total * 2


def _weight_made_later(*inputs: Any) -> Any:
    """Of what the product gives: it cannot be there before."""
    *product, weight = inputs
    total = _summed(*product)
    return _quantise(_llama(total, (weight * total.float().sum().sigmoid()).bfloat16()))


def _heads_normed(*inputs: Any) -> Any:
    *product, weight = inputs
    return _quantise(_llama(_summed(*product).view(-1, TILE), weight[:TILE]))


def _one_scale(*inputs: Any) -> Any:
    *product, weight = inputs
    y = _llama(_summed(*product), weight)
    return (y.float() / (y.abs().amax() / 448.0).float()).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def _static_scale(*inputs: Any) -> Any:
    *product, weight, scale = inputs
    return _static(_llama(_summed(*product), weight), scale)


def _mx(*inputs: Any) -> Any:
    *product, weight = inputs
    return _mxfp8(_llama(_summed(*product), weight))


def _match(name: str, fn: Any, inputs: Any = _operands, **options: Any) -> Example:
    return Example(name, fn, inputs, mode="always", before=BEFORE, **options)


def _miss(name: str, fn: Any, inputs: Any, reason: str, **options: Any) -> Example:
    return Example(name, fn, inputs, reason=reason, before=BEFORE, **options)


RULE = Rule(
    name="scaled_mm_add_norm",
    doc="an FP8 matrix product, its residual, then RMSNorm and FP8 by rows → one launch",
    anchors=anchors,
    guard=guard,
    replace=replace,
    exact=False,
    cost=f"{scaled_plan.COST}; the norm's mean too: a scale within its last place, values within one FP8 step",
    tolerance=REQUANTIZED,
    matches=(
        _match("rowwise", _normed),
        _match("tensorwise", _normed, _tensorwise_operands),
        _match("fast_accumulation", _fast),
        _match("bias", _biased, _with_bias),
        _match("gemma", _gemma_normed),
        _match("sum_unread", _sum_unread),
        _match("through_views", _through_views),
        _match("dynamic_shape", _any_rows, dynamic=True),
    ),
    near_misses=(
        _miss("not_measured", _normed, _operands, "not measured"),
        _miss("wide_rows", _normed, _wide, "no cluster has whole rows"),
        _miss("narrow_rows", _normed, _narrow, "no cluster has whole rows"),
        _miss("fp16", _in_fp16, _fp16_operands, "output dtype"),
        _miss("weight_in_fp32", _gemma_normed, _weight_in_fp32, "the norm's weight"),
        _miss("weight_made_later", _weight_made_later, _operands, "the norm's weight is computed later than the product"),
        _miss("heads", _heads_normed, _operands, "the norm is not of whole rows"),
        _miss("one_scale_for_all", _one_scale, _operands, "not a dynamic scale a row"),
        _miss("static_scale", _static_scale, _with_scale, "not a dynamic scale a row"),
        _miss("mxfp8", _mx, _operands, "not a dynamic scale a row"),
    ),
)
