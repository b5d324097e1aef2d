"""MXFP8Weight: experts' weights in MXFP8 in the place of a bf16 parameter, for ``torch.nn.functional.grouped_mm``.

    w [E, N, K] bf16   →   data [E, N, K] e4m3, scale [E, N, K/32] e8m0 bytes          w ≈ data · 2^(scale - 127)

It says that it is bf16, of w's shape and strides, and may be transposed: it is for ``grouped_mm(x, w.transpose(-2, -1),
offs=offs)``. Eagerly that dequantises (exactly: a product of an e4m3 number and a power of two is a bf16 number) and calls
PyTorch's grouped product; with ``activations="mxfp8"`` x is rounded to MXFP8 first (`mxfp8_round`), and with "fp8" to e4m3 with
one scale a row, which multiplies the product. torch.compile traces just that, so that every backend can compile it; the rule
``mxfp8_grouped_mm`` gives it a kernel that reads MXFP8.

Everything else that reads it dequantises, with one warning an operator, since that takes a bf16 copy. Writing to it and casting
it to another dtype are errors: quantise again instead, or take ``dequantize()``. It moves, copies, saves and loads like a
parameter (`torch.load` of it needs ``import inductor_ext``). It has no gradient; gradients flow through it to x.

For "fp8" 128 elements of K, where they divide it, get one scale, stored four times, so that it is MXFP8 all the same: FP8
tensor cores of compute capability 9.0 then sum 128 products before a scale is applied. e4m3 has an exponent of its own, so that
the coarser scale costs nothing that can be measured (2.66 % of a normal weight both ways, tests/moe/test_weight.py).

The scales are kept as uint8: Triton has no e8m0. ``swizzled`` scales, [E, ceil128(N) · ceil4(K/32)], lie as tensor cores of
compute capability 10.0 read them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from inductor_ext.moe import mx

log = logging.getLogger("inductor_ext")

aten = torch.ops.aten
BLOCK = 32
WIDE_BLOCK = 128
ACTIVATIONS = ("bf16", "fp8", "mxfp8")
_warned: set[str] = set()


def dequantize(data: torch.Tensor, scale: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """``data`` [..., K] e4m3 and plain ``scale`` [..., K/32] e8m0 as uint8, in bf16; ``block`` elements share a scale.

    The scale's byte is a bf16 exponent; at both of its ends, 2^-127 and NaN, a bit of the mantissa goes with it.
    """
    if block != BLOCK:
        scale = scale[..., :: block // BLOCK]
    bits = scale.to(torch.int16) << 7
    bits = torch.where((scale == 0) | (scale == 255), bits | 64, bits)
    values = data.to(torch.bfloat16).view(*scale.shape, block)
    return (values * bits.view(torch.bfloat16).unsqueeze(-1)).view(data.shape)


def unswizzle(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[E, bytes of tiles of 128 × 4] to plain scales [E, rows, columns]: byte (r % 32)·16 + (r / 32)·4 + c of a tile."""
    tiles = scale.view(scale.shape[0], -(-rows // 128), -(-columns // 4), 32, 4, 4)  # [E, R, C, r % 32, r / 32, c]
    plain = tiles.permute(0, 1, 4, 3, 2, 5).reshape(scale.shape[0], -(-rows // 128) * 128, -(-columns // 4) * 4)
    return plain[:, :rows, :columns]


class MXFP8Weight(torch.Tensor):
    """See the module's text. ``data`` is [E, N, K]; ``transposed`` weights show [E, K, N]."""

    _data: torch.Tensor
    _scale: torch.Tensor
    _transposed: bool
    _swizzled: bool
    _activations: str
    _rounding: str
    _block: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor, transposed: bool, *_: Any) -> MXFP8Weight:
        experts, n, k = data.shape
        shape, strides = ((experts, k, n), (n * k, 1, k)) if transposed else ((experts, n, k), (n * k, k, 1))
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, strides=strides, dtype=torch.bfloat16, device=data.device, requires_grad=False
        )

    def __init__(
        self,
        data: torch.Tensor,
        scale: torch.Tensor,
        transposed: bool,
        swizzled: bool,
        activations: str,
        rounding: str,
        block: int,
    ) -> None:
        self._data, self._scale, self._block = data, scale, block
        self._transposed, self._swizzled, self._activations, self._rounding = transposed, swizzled, activations, rounding

    @classmethod
    def quantize(
        cls,
        weight: torch.Tensor,
        *,
        transposed: bool = False,
        activations: str = "bf16",
        rounding: str = "rceil",
        swizzled: bool = False,
    ) -> MXFP8Weight:
        """``weight`` [E, N, K] (``transposed``: [E, K, N]) in bf16, K a multiple of 32, quantised along K."""
        check(weight, transposed, activations, rounding)
        along_k = weight.detach().transpose(-2, -1) if transposed else weight.detach()
        wide = activations == "fp8" and not swizzled and along_k.shape[-1] % WIDE_BLOCK == 0

        def quantize(expert: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if wide:
                return mx.quantize(expert, rounding, WIDE_BLOCK)
            made: tuple[torch.Tensor, torch.Tensor] = torch.ops.inductor_ext.mxfp8_quantize(expert, None, rounding, swizzled)
            return made

        # An expert at a time: the reference works in fp32, and all experts at once would take four times their memory.
        parts = [quantize(expert[None].contiguous()) for expert in along_k]
        data, scale = (torch.cat([part[i].view(torch.uint8) for part in parts]) for i in range(2))
        block = WIDE_BLOCK if wide else BLOCK
        return cls(data.view(torch.float8_e4m3fn), scale, transposed, swizzled, activations, rounding, block)

    # ---- what it holds ----------------------------------------------------------------------------------------------

    @property
    def quantized_nbytes(self) -> int:
        """Bytes in memory; ``nbytes`` says what bf16 would take."""
        return self._data.nbytes + self._scale.nbytes

    @property
    def plain_scale(self) -> torch.Tensor:
        """[E, N, K/32] uint8."""
        _, n, k = self._data.shape
        return unswizzle(self._scale, n, k // BLOCK) if self._swizzled else self._scale

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        """The weight as a plain bf16 tensor, as it shows itself."""
        made = dequantize(self._data, self.plain_scale, self._block)
        return made.transpose(-2, -1) if self._transposed else made

    def experts(self) -> Iterator[torch.Tensor]:
        """`dequantize`, an expert at a time."""
        for data, scale in zip(self._data, self.plain_scale):
            made = dequantize(data, scale, self._block)
            yield made.transpose(-2, -1) if self._transposed else made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        rest = f"activations={self._activations!r}, rounding={self._rounding!r}, swizzled={self._swizzled}"
        rest += f", block={self._block}" if self._block != BLOCK else ""
        return f"MXFP8Weight({list(self.shape)}, device={self.device}, transposed={self._transposed}, {rest})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_data", "_scale"], (self._transposed, self._swizzled, self._activations, self._rounding, self._block)

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, meta: Any, outer_size: Any, outer_stride: Any) -> MXFP8Weight:
        return cls(inner["_data"], inner["_scale"], *meta)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on: AOTAutograd's cache asks."""
        inner = [(part.dtype, tuple(part.shape), part.stride(), str(part.device)) for part in (self._data, self._scale)]
        return hashlib.sha256(repr((type(self).__qualname__, inner, self.__tensor_flatten__()[1])).encode()).hexdigest()

    def _with(self, function: Callable[[torch.Tensor], torch.Tensor], transposed: bool | None = None) -> MXFP8Weight:
        shown = self._transposed if transposed is None else transposed
        made = function(self._data), function(self._scale)
        return type(self)(*made, shown, self._swizzled, self._activations, self._rounding, self._block)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        made: Any = self._with(torch.clone)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=False)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        parameter = isinstance(self, torch.nn.Parameter)
        return _rebuild, (self._data, self._scale, *self.__tensor_flatten__()[1], parameter)

    # ---- what is done with it ---------------------------------------------------------------------------------------

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        found = handler(func, args, kwargs) if handler is not None else NotImplemented
        return _dequantized(func, args, kwargs) if found is NotImplemented else found


def _rebuild(data: Any, scale: Any, *meta_and_parameter: Any) -> Any:
    *meta, parameter = meta_and_parameter
    made = MXFP8Weight(data, scale, *meta)
    return torch.nn.Parameter(made, requires_grad=False) if parameter else made


def check(weight: torch.Tensor, transposed: bool, activations: str, rounding: str) -> None:
    """TypeError or ValueError naming the argument that is wrong."""
    if weight.dtype is not torch.bfloat16:
        raise TypeError(f"MXFP8Weight: weight: wanted bfloat16, found {weight.dtype}")
    shown = "[E, K, N]" if transposed else "[E, N, K]"
    if weight.dim() != 3:
        raise ValueError(f"MXFP8Weight: weight: wanted {shown}, found shape {list(weight.shape)}")
    k = weight.shape[-2 if transposed else -1]
    if not weight.numel() or k % BLOCK:
        raise ValueError(f"MXFP8Weight: weight: wanted {shown}, K a multiple of {BLOCK}, found shape {list(weight.shape)}")
    if activations not in ACTIVATIONS:
        raise ValueError(f"MXFP8Weight: activations: wanted {', '.join(ACTIVATIONS)}, found {activations!r}")
    if rounding not in ("rceil", "floor"):
        raise ValueError(f"MXFP8Weight: rounding: wanted rceil or floor, found {rounding!r}")


def _grouped_mm(func: Any, args: Any, kwargs: Any) -> Any:
    """x [T, K] · weights [E, K, N]: what PyTorch computes from the dequantised weights."""
    x, weight, *rest = args
    if not isinstance(weight, MXFP8Weight) or isinstance(x, MXFP8Weight):
        return NotImplemented
    if not weight._transposed or weight._activations == "bf16" or x.dim() != 2:
        return func(x, weight.dequantize(), *rest, **kwargs)
    if weight._activations == "mxfp8":
        return func(torch.ops.inductor_ext.mxfp8_round(x, weight._rounding), weight.dequantize(), *rest, **kwargs)
    data, scale = by_rows(x)
    made = func(data.to(torch.bfloat16), weight.dequantize(), *rest, **kwargs)
    return (made * scale).to(made.dtype)


def by_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] as e4m3 [T, K] and float32 [T, 1]: x ≈ data · scale, the largest of a row being 448."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


def _transpose(func: Any, args: Any, kwargs: Any) -> Any:
    weight, *dims = args
    if {dim % 3 for dim in dims} != {1, 2}:
        return NotImplemented
    return weight._with(aten.alias.default, not weight._transposed)


def _permute(func: Any, args: Any, kwargs: Any) -> Any:
    weight, dims = args
    order = [dim % 3 for dim in dims]
    if order not in ([0, 1, 2], [0, 2, 1]):
        return NotImplemented
    return weight._with(aten.alias.default, weight._transposed ^ (order == [0, 2, 1]))


def _each(func: Any, args: Any, kwargs: Any) -> Any:
    """Operators that do the same to data and scales: clone, detach, alias."""
    return args[0]._with(lambda inner: func(inner, *args[1:]))


def _to(func: Any, args: Any, kwargs: Any) -> Any:
    dtype = kwargs.get("dtype")
    if dtype not in (None, torch.bfloat16):
        # A plain tensor would do for t.half(), but model.half() is the same call, and on some torch versions keeps this class.
        advice = "take weight.dequantize() first, or quantise another model"
        raise TypeError(f"MXFP8Weight: dtype: wanted bfloat16, which quantised weights stand for, found {dtype}; {advice}")
    rest = {name: value for name, value in kwargs.items() if name not in ("dtype", "memory_format")}
    return args[0]._with(lambda inner: func(inner, **rest))


def _empty_like(func: Any, args: Any, kwargs: Any) -> Any:
    """Without a dtype of its own (``Module.to_empty``), another MXFP8Weight."""
    if kwargs.get("dtype") not in (None, torch.bfloat16):
        return NotImplemented
    device = kwargs.get("device")
    return args[0]._with(lambda inner: torch.empty_like(inner, device=device))


def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    """``load_state_dict``: bytes of one quantised weight into another's."""
    into, source = args[:2]
    if not isinstance(into, MXFP8Weight):
        return NotImplemented  # dequantised into a plain tensor
    if not isinstance(source, MXFP8Weight):
        advice = "load the checkpoint into the model first, and call quantize_moe_ then"
        raise TypeError(f"MXFP8Weight: copy_: wanted quantised weights to copy from, found {source.dtype}; {advice}")
    for name in ("_transposed", "_swizzled", "_rounding", "_block"):
        wanted, found = getattr(into, name), getattr(source, name)
        if wanted != found:
            expected = f"{name[1:]}={wanted}, as the weight that is written has"
            raise ValueError(f"MXFP8Weight: copy_: wanted {expected}, found {found}")
    if into.shape != source.shape:
        raise ValueError(f"MXFP8Weight: copy_: wanted shape {list(into.shape)}, found {list(source.shape)}")
    into._data.copy_(source._data)
    into._scale.copy_(source._scale)
    return into


_HANDLERS: dict[Any, Callable[[Any, Any, Any], Any]] = {
    aten._grouped_mm.default: _grouped_mm,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.clone.default: _each,
    aten.detach.default: _each,
    aten.alias.default: _each,
    aten._to_copy.default: _to,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy,
}


def _dequantized(func: Any, args: Any, kwargs: Any) -> Any:
    """Any other operator: on the bf16 weight, with a warning; an error if it would write to it."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
    for argument in func._schema.arguments:
        if argument.is_write and isinstance(named.get(argument.name), MXFP8Weight):
            raise TypeError(f"{func}: wanted a tensor that can be written in place, found an MXFP8Weight, which is quantised")
    name = str(func)
    if name not in _warned:
        _warned.add(name)
        log.warning("MXFP8Weight: %s has no MXFP8 form here: the weight is dequantised to bf16 for it, at every call", name)

    def plain(value: Any) -> Any:
        return value.dequantize() if isinstance(value, MXFP8Weight) else value

    args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs))
    return func(*args, **kwargs)


torch.serialization.add_safe_globals([MXFP8Weight, _rebuild])
