"""Every difference between the torch versions that are supported (2.11 to 2.15), and the version from which it can go."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from inductor_ext.errors import InductorExtError

#: Whether Inductor makes a rounding to 16 bits that is widened again, as of a rotation in fp32, no rounding at all: 2.11 alone.
LEAVES_ROUNDINGS_OUT = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)


def fresh_base(value: torch.Tensor) -> torch.Tensor:
    """A fake tensor like ``value`` with storage of its own, for the result of ``auto_functionalized_v2``.

    torch 2.11 refuses to reinplace a mutation when the result's fake shares its storage with the base and the result is
    read later. Can go with 2.11.
    """
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def previous_post_grad_pass(patches: dict[str, Any]) -> Any:
    """The post-grad pass somebody else set, from options or from Inductor's config; lists (2.12+) become one pass."""
    import torch._inductor.config as inductor_config

    return patches.get("post_grad_custom_post_pass", inductor_config.post_grad_custom_post_pass)


def uuid_of_pass(custom_pass: Any) -> Any:
    """uuid of a pass, or of a list of them (2.12+); None when one has none, which makes Inductor bypass its caches."""
    if custom_pass is None:
        return ()
    if isinstance(custom_pass, (list, tuple)):
        uuids = [uuid_of_pass(item) for item in custom_pass]
        return None if None in uuids else tuple(uuids)
    uuid = getattr(custom_pass, "uuid", None)
    return uuid() if callable(uuid) else None


def run_pass(custom_pass: Any, graph: Graph, is_inference: bool) -> None:
    """Run a pass of whatever kind the installed torch knows."""
    if custom_pass is None:
        return
    if isinstance(custom_pass, (list, tuple)):
        for item in custom_pass:
            run_pass(item, graph, is_inference)
        return
    from torch._inductor import custom_graph_pass

    inference_aware = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)  # 2.12+
    if inference_aware is not None and isinstance(custom_pass, inference_aware):
        custom_pass(graph, is_inference)
    else:
        custom_pass(graph)


def sort(graph: Graph) -> None:
    """Put every node behind those that it reads; nodes that are keep their order. Inductor's own, which is not public."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


def is_fallback(target: Any) -> bool:
    """Whether Inductor runs ``target`` as an opaque call rather than generating code for it."""
    from torch._inductor import lowering

    return target in lowering.fallbacks or target not in lowering.lowerings


@functools.cache
def e4m3fn_saturates() -> bool:
    """Whether a cast to float8_e4m3fn gives ±448 past the finite range, as from torch 2.13 on, or NaN, as in 2.11."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():  # a graph is being compiled, with fake tensors
        return not bool(torch.tensor([1e6]).to(torch.float8_e4m3fn).float().isnan())


def check_aot_inductor() -> None:
    """Raise where AOTInductor would hand an op other dtypes than it was given, and go on after the op's error.

    torch 2.11 writes the number of ``torch.export``'s list of dtypes and reads it as one of c10's: float8_e4m3fn arrives as
    uint64. The error that this gives is printed, not raised, and the result is whatever memory held. 2.13 is right; 2.12 has
    not been tried. Can go with 2.12.
    """
    from torch._inductor.virtualized import V

    if V.aot_compilation and not hasattr(torch.fx.Graph, "materialize_symints"):  # which came with 2.13
        raise InductorExtError(
            f"AOTInductor of torch {torch.__version__} does not hand on dtypes to operators of a package, so results would be "
            "wrong (wanted torch 2.13 or later). To fix: upgrade torch, or leave inductor_ext's pass out of inductor_configs"
        )


def fake_mode_of(node: Node) -> Any:
    """The fake mode of a graph's tensors."""
    value = node.meta["val"]
    return getattr(value, "fake_mode", None)


def symbolic(graph: Graph, sizes: list[Any]) -> list[Any]:
    """Sizes as arguments of a new node, at the graph's insertion point: symbolic ones become nodes, numbers stay.

    ``Graph.materialize_symints`` does it from torch 2.13 on; the rest can go with 2.12.
    """
    if all(isinstance(size, int) for size in sizes):
        return sizes
    materialize = getattr(graph, "materialize_symints", None)
    if materialize is not None:
        return materialize(sizes)
    return [size if isinstance(size, int) else _size_node(graph, size) for size in sizes]


def _size_node(graph: Graph, size: torch.SymInt) -> Node:
    """Nodes that compute a symbolic size from the graph's inputs."""
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    known = set(graph.nodes)
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    symbols = {symbol: torch.fx.Proxy(_symbol_node(graph, symbol), tracer) for symbol in size.node.expr.free_symbols}
    made = sympy_interp(PythonReferenceAnalysis, symbols, size.node.expr).node
    for node in graph.nodes:
        if node not in known and "val" not in node.meta:
            values = torch.fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
            node.meta["val"] = node.target(*values[0], **values[1])
    return made


def _symbol_node(graph: Graph, symbol: Any) -> Node:
    """An input that is the symbol, or a size of an input that is."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == symbol:
            return node
    for node in inputs:
        value = node.meta.get("val")
        for dim, extent in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(extent, torch.SymInt) and extent.node.expr == symbol:
                made = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                made.meta["val"] = extent
                return made
    raise LookupError(f"no graph input has the size {symbol}")


@functools.cache
def trace_scaled_mm_v2() -> tuple[str, ...]:
    """Let Dynamo trace ``torch.nn.functional.scaled_mm`` and ``scaled_grouped_mm``; says what had to be added.

    torch 2.11 has no trace rule for either and breaks the graph there; the grouped one has neither a rule nor a meta kernel
    up to 2.13. Dynamo asks when it meets the function, so this is called before it traces where that is possible: by
    ``inductor_ext.backend(…)``, `explain` and `verify`, and by the backend for the graphs after its first. The grouped one has
    no CPU kernel in any version: a plain one is added. The rest can go with 2.13.
    """
    from torch._dynamo import trace_rules

    added = []
    for name in ("_scaled_mm_v2", "_scaled_grouped_mm_v2"):
        function = getattr(torch, name, None)
        if function is not None and f"torch.{name}" not in trace_rules.torch_c_binding_in_graph_functions:
            torch._dynamo.allow_in_graph(function)
            added.append(f"trace rule of {name}")
    op = "_scaled_grouped_mm_v2"
    if hasattr(torch.ops.aten, op) and not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", "Meta"):
        _meta_library().impl(op, _meta_scaled_grouped_mm_v2)
        added.append(f"meta kernel of {op}")
    if hasattr(torch.ops.aten, op) and not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", "CPU"):
        _cpu_library().impl(op, _plain_scaled_grouped_mm_v2)
        added.append(f"CPU kernel of {op}")
    return tuple(added)


@functools.cache
def _meta_library() -> torch.library.Library:
    return torch.library.Library("aten", "IMPL", "Meta")  # what it registers lives as long as it does


@functools.cache
def _cpu_library() -> torch.library.Library:
    return torch.library.Library("aten", "IMPL", "CPU")


_mx_grouped: list[Callable[..., torch.Tensor]] = []


def computes_mx_grouped(function: Callable[..., torch.Tensor]) -> None:
    """``function(a, scale_a, b [E, N, K], scale_b, offs, out_dtype, swizzled, w_block)``: MXFP8's grouped
    product in plain operators."""
    _mx_grouped[:] = [function]


def _plain_scaled_grouped_mm_v2(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: Any,
    recipe_a: Any,
    swizzle_a: Any,
    scale_b: Any,
    recipe_b: Any,
    swizzle_b: Any,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    contraction_dim: Any = (),
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """MXFP8 and row-wise, by groups of a's rows: such models can be tried and verified without a GPU."""
    tiles = [1 in swizzle for swizzle in (swizzle_a, swizzle_b)]
    recipes, dtype = [list(recipe_a), list(recipe_b)], out_dtype or torch.bfloat16
    grouped = a.dim() == 2 and b.dim() == 3 and offs is not None and bias is None and not contraction_dim
    if not grouped or recipes not in ([[1], [1]], [[3], [3]]) or tiles[0] != tiles[1]:
        wanted = "1x32 blocks or row-wise scales, a [T, K], b [E, K, N], offs and no bias"
        raise NotImplementedError(f"_scaled_grouped_mm_v2 in plain operators: wanted {wanted}")
    if recipes[0] == [3]:
        from inductor_ext import registry

        registry.ops()  # whichever of them computes it has said so then
        weight = b.transpose(-2, -1).contiguous()
        return _mx_grouped[0](a, scale_a[0], weight, scale_b[0], offs, dtype, tiles[0], 32)
    assert offs is not None
    out, start = a.new_zeros((a.shape[0], b.shape[2]), dtype=dtype), 0
    for expert, end in enumerate(offs.tolist()):
        scale = scale_a[0][start:end, None] * scale_b[0][expert][None]
        out[start:end] = (a[start:end].float() @ b[expert].float() * scale).to(dtype)
        start = end
    return out


def _meta_scaled_grouped_mm_v2(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: Any,
    recipe_a: Any,
    swizzle_a: Any,
    scale_b: Any,
    recipe_b: Any,
    swizzle_b: Any,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    contraction_dim: Any = (),
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """An empty output: rows, columns or the contracted dimension are what groups divide, by which operand has no group."""
    rows, columns = a.shape[-2], b.shape[-1]
    if a.dim() == 2 and b.dim() == 2:
        assert offs is not None
        shape = [offs.shape[0], rows, columns]
    elif a.dim() == 3 and b.dim() == 3:
        shape = [a.shape[0], rows, columns]
    else:
        shape = [rows, columns]
    return a.new_empty(shape, dtype=out_dtype or torch.bfloat16)


def loses_context(device: torch.device) -> bool:
    """Whether PyTorch starts its MXFP8 grouped kernel on a GPU without MX tensor cores: it fails there, and the CUDA
    context is lost. Seen with torch 2.11 on an H200; can go when torch checks the device.
    """
    return device.type == "cuda" and (9, 0) <= torch.cuda.get_device_capability(device) < (10, 0)


class EagerInterpreter(torch.fx.Interpreter):
    """Runs stock graphs for `explain` and `verify`. Where that would lose the CUDA context, MXFP8 grouped products are computed
    from dequantised operands instead.
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        v2 = getattr(torch.ops.aten, "_scaled_grouped_mm_v2", None)
        mxfp8 = v2 is not None and target is v2.default and list(args[3]) == [3]
        if mxfp8 and type(args[0]) is torch.Tensor and loses_context(args[0].device):  # fake tensors lose nothing
            return _plain_scaled_grouped_mm_v2(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def reinplace(gm: torch.fx.GraphModule) -> None:
    """Make a graph's stores in place, as Inductor does after the custom passes. The updater takes a graph before torch 2.13."""
    from torch._inductor.fx_passes import post_grad
    from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
    from torch._inductor.fx_utils import FakeTensorUpdater
    from torch._inductor.virtualized import V

    values = (node.meta.get("val") for node in gm.graph.nodes)
    modes = (value.fake_mode for value in values if isinstance(value, torch.Tensor))
    takes_module = "gm" in inspect.signature(FakeTensorUpdater.__init__).parameters
    updater: Any = FakeTensorUpdater
    with V.set_fake_mode(next(modes, None)):
        reinplace_inplaceable_ops(updater(gm if takes_module else gm.graph), gm.graph)
        post_grad.decompose_auto_functionalized(gm.graph)
    gm.recompile()


def compiles_again() -> None:
    """Forget what compiling a graph has told AOTAutograd of its outputs. Inductor does so too where it compiles one twice."""
    context = torch._guards.TracingContext.try_get()
    if context is not None and context.output_strides:
        context.output_strides.clear()


def run_post_grad_passes(gm: torch.fx.GraphModule, fake_mode: Any, is_inference: bool) -> None:
    """Inductor's post-grad passes, the custom ones with them, and nothing after: what `explain` needs of a compile."""
    from torch._inductor import compile_fx
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.virtualized import V

    with V.set_fake_mode(fake_mode):
        view_to_reshape(gm)
        compile_fx._recursive_post_grad_passes(gm, is_inference=is_inference)
