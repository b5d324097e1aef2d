"""Read an FP8 matrix product, ``aten._scaled_mm`` or ``aten._scaled_mm_v2``, in whatever spelling it has.

    parse(node)  →  Product(a, b, scale_a, scale_b, bias, out_dtype, fast, added)   or a Miss

A bias may also be added behind the operator, as a linear layer does that does not give it to the operator. The op adds it
before it rounds, where two operators round twice. Who replaces the operator then calls `absorb` first; `way` leads from values
back to the product that they are of.

A `Product` is one that ``inductor_ext.scaled_mm`` can compute: a [M, K] row-major, b [K, N] column-major, one scale or a vector
of them for each, bias [N] or None. Whether it should is not asked here. Sizes K and N are numbers, M may be symbolic.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from inductor_ext import torch_compat
from inductor_ext.calls import arguments, aten, calling, is_call
from inductor_ext.graph import call, describe, erase_dead, known_equal, same_sizes, value_of
from inductor_ext.kernels.scaled_mm.op import ALIGNMENT, FP8, OUT_DTYPES
from inductor_ext.miss import CONTRACTION_DIM, OUTPUT_DTYPE, SCALE_LAYOUT, Miss
from inductor_ext.patterns.support import columns
from inductor_ext.patterns.support.same import IN_ORDER, way_in_order

TARGETS = (aten._scaled_mm.default, aten._scaled_mm_v2.default)

#: Values of ``torch.nn.functional.ScalingType`` and ``SwizzleType``.
TENSOR_WISE, ROW_WISE, NO_SWIZZLE = 0, 1, 0


@dataclasses.dataclass(frozen=True)
class Product:
    """One product that the op can compute; everything but ``out_dtype`` and ``fast`` is a node."""

    node: Node
    a: Node
    b: Node
    scale_a: Node
    scale_b: Node
    bias: Node | None
    out_dtype: torch.dtype
    fast: bool
    added: Node | None = None  # where ``bias`` is added behind ``node``; None where the operator adds it, or there is none

    @property
    def end(self) -> Node:
        """What the op computes: ``node`` or, of another shape maybe, the sum of it and the bias."""
        return self.node if self.added is None else self.added

    @property
    def m(self) -> Any:
        return value_of(self.a).shape[0]

    @property
    def k(self) -> int:
        return int(value_of(self.b).shape[0])

    @property
    def n(self) -> int:
        return int(value_of(self.b).shape[1])

    @property
    def rowwise(self) -> bool:
        return any(value_of(scale).numel() != 1 for scale in (self.scale_a, self.scale_b))


def is_product(node: Any) -> bool:
    return is_call(node, *TARGETS)


products = calling(*TARGETS)


def parse(node: Node) -> Product:
    """The product of a `is_product` node, or the first condition under which the op cannot compute it."""
    given = arguments(node)
    _check_options(node, given)
    v2 = node.target is aten._scaled_mm_v2.default
    scale_a, scale_b = (given[name][0] if v2 else given[name] for name in ("scale_a", "scale_b"))
    product = Product(
        node, given["self"], given["mat2"], scale_a, scale_b, given["bias"], given["out_dtype"], bool(given["use_fast_accum"])
    )
    _check_operands(product)
    _check_layout(product)
    _check_scales(product, given)
    _check_bias(product)
    added = None if product.bias is not None else _added(node)
    return product if added is None else dataclasses.replace(product, bias=added[1], added=added[0])


def way(node: Any) -> tuple[Any, list[Node]]:
    """`way_in_order`, on which a bias that `parse` finds behind a product is no end."""
    at, path = way_in_order(node)
    if not is_call(at, aten.add.Tensor):
        return at, path
    for operand in at.args:
        source, more = way_in_order(operand)
        if is_product(source) and (_added(source) or (None,))[0] is at:
            return source, [*path, at, *more]
    return at, path


def absorb(product: Product) -> None:
    """Let what reads a bias's sum read a view of the product, for a call in its place that adds the bias itself."""
    if product.added is None:
        return
    columns.hoist(product.bias, product.node, move=True)
    made, graph, shape = product.node, product.node.graph, value_of(product.added).shape
    if len(shape) != 2:
        with graph.inserting_before(product.added):
            sizes = torch_compat.symbolic(graph, list(shape))
            made = call(graph, aten.reshape.default, made, sizes, like=product.added)
    product.added.replace_all_uses_with(made)
    erase_dead(product.added)


def _added(node: Node) -> tuple[Node, Node] | None:
    """The only thing that is done to a product, if that is adding a vector to its rows: that sum, and the vector."""
    if arguments(node)["bias"] is not None:
        return None
    at = node
    while True:
        users = list(at.users)
        if len(users) != 1:
            return None
        if not is_call(users[0], *IN_ORDER):
            break
        at = users[0]
    (add,) = users
    if not is_call(add, aten.add.Tensor) or list(add.args).count(at) != 1:
        return None
    bias = add.args[1 if add.args[0] is at else 0]
    width, sum_ = value_of(node).shape[-1], value_of(add)
    if not isinstance(bias, Node) or not isinstance(value_of(bias), torch.Tensor):
        return None
    value = value_of(bias)
    row = value.dim() == 1 and known_equal(value.shape[0], width)
    rows = known_equal(value_of(at).shape[-1], width) and same_sizes(sum_.shape, value_of(at).shape)
    if not row or not rows or value.dtype is not sum_.dtype or sum_.dtype is not value_of(node).dtype:
        return None
    if not value.is_contiguous() or columns.hoist(bias, node, move=False) is not None:
        return None
    return add, bias


def _check_options(node: Node, given: dict[str, Any]) -> None:
    if given.get("scale_result") is not None:
        raise Miss("scale_result is given", node, "None, as torch ignores it", describe(given["scale_result"]))
    if given.get("contraction_dim"):
        raise Miss(CONTRACTION_DIM, node, "none", str(list(given["contraction_dim"])))
    if given["out_dtype"] not in OUT_DTYPES:
        # Without one PyTorch takes a's dtype, which is FP8.
        found = f"{given['out_dtype']}" + (" (the dtype of a)" if given["out_dtype"] is None else "")
        raise Miss(OUTPUT_DTYPE, node, "bfloat16, float16 or float32", found)
    for name in "ab":
        recipe, swizzle = given.get(f"recipe_{name}", [TENSOR_WISE]), given.get(f"swizzle_{name}", [])
        if list(recipe) not in ([TENSOR_WISE], [ROW_WISE]) or any(kind != NO_SWIZZLE for kind in swizzle):
            wanted = "one tensor-wise or row-wise scale, not swizzled"
            raise Miss(SCALE_LAYOUT, node, wanted, f"recipe {list(recipe)}, swizzle {list(swizzle)} for scale_{name}")


def _check_operands(product: Product) -> None:
    node, a, b = product.node, value_of(product.a), value_of(product.b)
    if a.dtype not in FP8 or b.dtype not in FP8:
        raise Miss("operand dtype", node, "float8_e4m3fn or float8_e5m2", f"{a.dtype} and {b.dtype}")
    if a.dtype is torch.float8_e5m2 and b.dtype is torch.float8_e5m2:
        raise Miss("both operands are float8_e5m2", node, "at most one of them", f"{a.dtype} and {b.dtype}")
    k, n = b.shape
    if not isinstance(k, int) or not isinstance(n, int):
        raise Miss("K or N is symbolic", node, "numbers; only M may change between calls", f"K {k}, N {n}")
    if k % ALIGNMENT or n % ALIGNMENT or not k or not n:
        raise Miss(f"K or N is not a multiple of {ALIGNMENT}", node, f"multiples of {ALIGNMENT}", f"K {k}, N {n}")
    if not known_equal(a.shape[1], k):
        raise Miss("the operands do not fit", node, f"a [M, {k}] for b [{k}, {n}]", describe(product.a))
    if isinstance(a.shape[0], torch.SymInt) and free_unbacked_symbols(a.shape[0]):
        raise Miss("M depends on data", node, "a size known before the graph runs", f"M {a.shape[0]}")


def _check_layout(product: Product) -> None:
    for name, node, along_k in (("A is not row-major", product.a, 1), ("B is not column-major", product.b, 0)):
        value = value_of(node)
        pitch, offset = value.stride(1 - along_k), value.storage_offset()
        if not known_equal(value.stride(along_k), 1) or not all(_aligned(size) for size in (pitch, offset)):
            wanted = f"K with unit stride, and each of its runs at a multiple of {ALIGNMENT} bytes"
            found = f"{describe(node)} strides {list(value.stride())} offset {offset}"
            raise Miss(name, product.node, wanted, found)


def _aligned(size: Any) -> bool:
    return statically_known_true(size % ALIGNMENT == 0)


def _check_scales(product: Product, given: dict[str, Any]) -> None:
    for name, node, extent in (("a", product.scale_a, product.m), ("b", product.scale_b, product.n)):
        value, recipe = value_of(node), list(given.get(f"recipe_{name}", ()))
        long = [size for size in value.shape if not known_equal(size, 1)]
        single = not long and recipe != [ROW_WISE]
        vector = recipe != [TENSOR_WISE] and len(long) <= 1 and known_equal(value.numel(), extent)
        if value.dtype is not torch.float32 or not (single or (vector and value.is_contiguous())):
            wanted = f"scale_{name} of one float32, or of {extent} in a row"
            raise Miss(SCALE_LAYOUT, product.node, wanted, f"{describe(node)} strides {list(value.stride())}")


def _check_bias(product: Product) -> None:
    if product.bias is None:
        return
    value = value_of(product.bias)
    if value.dtype is product.out_dtype and value.numel() == product.n and value.is_contiguous():
        return
    wanted = f"{product.n} elements of {product.out_dtype}, as the output"
    raise Miss("bias", product.node, wanted, f"{describe(product.bias)} strides {list(value.stride())}")
