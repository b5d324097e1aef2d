"""Read an FP8 matrix product, ``aten._scaled_mm`` or ``aten._scaled_mm_v2``, in whatever spelling it has.

    parse(node)  →  Product(a, b, scale_a, scale_b, bias, out_dtype, fast)   or a Miss

A `Product` is one that ``inductor_ext.scaled_mm`` can compute: a [M, K] row-major, b [K, N] column-major, one scale or a vector
of them for each, bias [N] or None. Whether it should is not asked here. Sizes K and N are numbers, M may be symbolic.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from inductor_ext.calls import arguments, aten, calling, is_call
from inductor_ext.graph import describe, known_equal, value_of
from inductor_ext.kernels.scaled_mm.op import ALIGNMENT, FP8, OUT_DTYPES
from inductor_ext.miss import CONTRACTION_DIM, OUTPUT_DTYPE, SCALE_LAYOUT, Miss

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
    return product


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
