"""Reading and editing post-grad FX graphs: what rules share and that knows nothing of any rule."""

from __future__ import annotations

import copy
import math
import operator
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from inductor_ext import torch_compat
from inductor_ext.calls import aten, is_call

#: Operators that rearrange or select elements without changing them and give one output element per input element.
RESHAPES = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.permute.default,
        aten.alias.default,
    }
)

#: Matrix products, attention and convolutions: Inductor calls a library or a template for them. They are listed because
#: some of them do have a lowering, and so do not count as fallbacks.
OPAQUE_NAMES = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_mm",
    "_scaled_mm_v2",
    "_grouped_mm",
    "_scaled_grouped_mm",
    "_scaled_grouped_mm_v2",
    "convolution",
    "_scaled_dot_product_",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_cudnn_attention_forward",
    "_varlen_attn",
)


def value_of(node: Any) -> Any:
    """The fake value of a node, or the thing itself when it is a constant."""
    return node.meta.get("val") if isinstance(node, Node) else node


def known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every input, without adding a guard."""
    return a is b or statically_known_true(a == b)


def guarded_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal now; if not for every input, a guard keeps the graph to inputs where they are."""
    if known_equal(a, b):
        return True
    environments = [size.node.shape_env for size in (a, b) if isinstance(size, torch.SymInt)]
    return not any(environment.frozen for environment in environments) and guard_or_false(a == b)


def guarded_at_most(size: Any, limit: int) -> bool:
    """Whether a size is at most ``limit`` now; if not for every input, a guard keeps the graph to inputs where it is."""
    if statically_known_true(size <= limit):
        return True
    return isinstance(size, torch.SymInt) and not size.node.shape_env.frozen and guard_or_false(size <= limit)


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(known_equal, a, b))


def is_reshape(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in RESHAPES


def through_reshapes(node: Node) -> Node:
    """The first node above ``node`` that is not a reshape."""
    while is_reshape(node):
        node = node.args[0]
    return node


def producer(node: Node) -> Node:
    """The node whose kernel makes ``node``'s memory: through reshapes, slices, getitems and splits."""
    lookthrough = {
        aten.slice.Tensor,
        aten.select.int,
        aten.split_with_sizes.default,
        aten.split.Tensor,
        aten.unbind.int,
    }
    while is_reshape(node) or is_call(node, operator.getitem, *lookthrough):
        node = node.args[0]
    return node


def is_opaque(node: Node) -> bool:
    """Whether what makes ``node``'s memory is something Inductor cannot fuse a pointwise consumer into."""
    made_by = producer(node)
    if made_by.op in ("placeholder", "get_attr"):
        return True
    if made_by.op != "call_function":
        return False
    return _runs_alone(made_by.target)


def feeds_opaque(node: Node) -> bool:
    """Whether ``node`` has to be in memory anyway: the graph returns it, or something reads it that Inductor cannot fuse."""
    for user in node.users:
        if user.op == "output":
            return True
        if is_reshape(user) or is_call(user, aten.view.dtype, aten.slice.Tensor):
            if feeds_opaque(user):
                return True
        elif user.op == "call_function" and _runs_alone(user.target):
            return True
    return False


def _runs_alone(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return isinstance(target, torch._ops.HigherOrderOperator)
    if target.namespace not in ("aten", "prims"):
        return True
    name = target._schema.name.removeprefix("aten::").removeprefix("prims::")
    return any(name == known or (known.endswith("_") and name.startswith(known)) for known in OPAQUE_NAMES) or (
        torch_compat.is_fallback(target)
    )


def constant_of(node: Any) -> float | None:
    """The number a node stands for: a Python scalar, or ``aten.full([], c)`` and what is left of it after converts."""
    if isinstance(node, (int, float)) and not isinstance(node, bool):
        return float(node)
    if is_call(node, aten.full.default) and isinstance(node.args[1], (int, float)) and _single(node):
        return _stored(float(node.args[1]), value_of(node).dtype)
    if is_call(node, aten.scalar_tensor.default, aten.lift_fresh_copy.default) and isinstance(node.args[0], (int, float)):
        return _stored(float(node.args[0]), value_of(node).dtype)
    return None


def _stored(number: float, dtype: torch.dtype) -> float | None:
    """``number`` as a tensor of ``dtype`` holds it, through fp32; an operator in fp32 rounds what it is given itself."""
    if dtype in (torch.float32, torch.float64):
        return number
    if dtype in (torch.bfloat16, torch.float16):
        info, bits = torch.finfo(dtype), 8 if dtype is torch.bfloat16 else 11
        if not info.tiny <= abs(number) <= info.max:
            return number if number == 0 else None
        (single,) = struct.unpack("f", struct.pack("f", number))
        mantissa, exponent = math.frexp(single)
        held = math.ldexp(round(mantissa * 2**bits), exponent - bits)  # to even, where it lies half way
        return held if abs(held) <= info.max else None
    return number if number.is_integer() and dtype is not torch.bool else None


def _single(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dim() == 0


def describe(node: Any) -> str:
    """A node for people: ``aten.mul.Tensor 'mul_3' bfloat16[14, 512, 1024]``."""
    if not isinstance(node, Node):
        return repr(node)
    value = value_of(node)
    kind = f"{str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
    if node.op == "placeholder":
        target = "graph input"
    elif node.op == "call_function" and not hasattr(node.target, "_schema"):
        made_by = producer(node)  # getitem says little; what it takes an item of says more
        target = _name(made_by.target) if made_by is not node else _name(node.target)
    else:
        target = _name(node.target)
    return f"{target} '{node.name}' {kind}".rstrip()


def _name(target: Any) -> str:
    if isinstance(target, str) or hasattr(target, "_schema"):
        return str(target).replace("torch.ops.", "")
    return getattr(target, "__name__", str(target))


def index_of(graph: Graph) -> dict[Node, int]:
    return {node: index for index, node in enumerate(graph.nodes)}


def call(graph: Graph, target: Callable[..., Any], *args: Any, like: Node | None = None, **kwargs: Any) -> Node:
    """Insert a call with its fake value: ``target`` of the arguments' fake values, in their mode or that of ``like``'s
    where none is a tensor.

    Sizes among the arguments may be symbolic: nodes compute them, for a graph cannot hold a symbol.
    """
    args, kwargs = pytree.tree_map_only(torch.SymInt, lambda size: torch_compat.symbolic(graph, [size])[0], (args, kwargs))
    node = graph.call_function(target, args, kwargs)
    fake_args, fake_kwargs = torch.fx.map_arg((args, kwargs), value_of)
    known = (fake_args, fake_kwargs, None if like is None else like.meta.get("val"))
    mode = next((m for m in map(_fake_mode, pytree.tree_leaves(known)) if m is not None), None)
    if mode is not None:
        with mode:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
    if like is not None:
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten", "from_node"):
            if name in like.meta:
                node.meta[name] = like.meta[name]
    return node


def _fake_mode(value: Any) -> Any:
    return getattr(value, "fake_mode", None)


def replay(graph: Graph, views: Sequence[Node], value: Node) -> Node:
    """Apply copies of ``views`` (a chain of one-input calls, innermost first) to ``value``."""
    for view in views:
        value = call(graph, view.target, value, *view.args[1:], like=view, **view.kwargs)
    return value


def fake_replay(views: Sequence[Node], value: torch.Tensor) -> torch.Tensor:
    """What `replay` gives, on fake values only: the graph is not touched."""
    with value.fake_mode:
        for view in views:
            arguments, keywords = torch.fx.map_arg((view.args[1:], view.kwargs), value_of)
            value = view.target(value, *arguments, **keywords)
    return value


def erase_dead(node: Node) -> None:
    """Erase ``node`` if nothing uses it, and what only it used."""
    pending = [node]
    while pending:
        dead = pending.pop()
        if dead.users or dead._erased or dead.op in ("placeholder", "output") or dead.is_impure():
            continue
        pending.extend(dead.all_input_nodes)
        dead.graph.erase_node(dead)


def copy_of(graph: Graph) -> Graph:
    made = Graph()
    made.output(made.graph_copy(graph, {}))
    return made


def snapshot(graph: Graph) -> Callable[[], None]:
    """What brings the graph, in place, back to what it is now: its nodes are new ones then."""
    kept, meta = copy_of(graph), dict(graph.output_node().meta)

    def restore() -> None:
        nodes_now = list(graph.nodes)
        for node in nodes_now:  # in whatever order they are
            node.args, node.kwargs = (), {}
        for node in nodes_now:
            graph.erase_node(node)
        graph._graph_namespace = type(graph._graph_namespace)()  # else every node would get another name
        graph.output(graph.graph_copy(kept, {})).meta = dict(meta)

    return restore


def copied(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy that shares the graph's constants: under the fake mode that Inductor sets, real tensors cannot be copied."""
    held = [each for module in gm.modules() for each in vars(module).values()]
    constants = [each for each in held if isinstance(each, (torch.Tensor, torch.ScriptObject))]
    constants += [*gm.parameters(), *gm.buffers()]
    return copy.deepcopy(gm, {id(each): each for each in constants})


def text_of(graph: Graph) -> str:
    """One line a node: name, target, arguments, dtype and shape. Stable between runs and torch versions."""
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {torch.fx.map_arg(node.args[0], lambda n: n)}")
            continue
        value = node.meta.get("val")
        kind = f"  # {str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
        if node.op == "placeholder":
            lines.append(f"{node.name} = input(){kind}")
            continue
        target = str(node.target) if not callable(node.target) or hasattr(node.target, "_schema") else node.target.__name__
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            target = node.target.name()
        arguments = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
        lines.append(f"{node.name} = {target.replace('torch.ops.', '')}({', '.join(arguments)}){kind}")
    return "\n".join(lines)
