"""qk_norm_rope_store: the bytes of qk_norm_rope and then downcast_fp8 or a copy, whatever the layouts, rows and values.

The kernel's own source runs on the CPU too, beside qk_norm_rope's.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_ext import jit
from inductor_ext.kernels.qk_norm_rope.op import NORMS
from inductor_ext.kernels.qk_norm_rope.op import OP as ROTATE
from inductor_ext.kernels.qk_norm_rope_store.op import OP
from tests.kernels.test_qk_norm_rope import operands
from tests.support import cuda_on_cpu
from tests.support.equal import assert_same_bytes

E4, E5, U8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PROGRAM = "f32 div:s0 max:-448.0 min:448.0"


@dataclasses.dataclass
class Case:
    """A call's operands, and what is done with them."""

    k: torch.Tensor
    q: torch.Tensor | None
    v: torch.Tensor | None
    k_weight: torch.Tensor | None
    q_weight: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    loc: torch.Tensor | None
    norm: str
    dtype: torch.dtype
    program: str
    cache_dtype: torch.dtype
    keep_k: bool = False
    mult: int = 1
    offset: int = 0
    wrap: bool = False
    raises: bool = False
    pairs: bool = False
    rotary: int = 0

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.inductor_ext.qk_norm_rope_store(*self.arguments())

    def arguments(self) -> tuple[Any, ...]:
        tensors = [getattr(self, field.name) for field in dataclasses.fields(self)[:12]]
        options = (1e-6, self.norm, self.dtype, self.program, self.program, self.cache_dtype, self.keep_k)
        return *tensors, *options, self.mult, self.offset, self.wrap, self.raises, self.pairs, self.rotary

    def copied(self, **changes: Any) -> Case:
        """With caches of its own, laid out alike."""
        caches = {name: None if x is None else _like(x) for name, x in (("k_cache", self.k_cache), ("v_cache", self.v_cache))}
        return dataclasses.replace(self, **{**caches, **changes})

    def in_two(self) -> tuple[torch.Tensor, torch.Tensor]:
        """qk_norm_rope, and then the stores: downcast_fp8 sequence by sequence, or a copy of each row."""
        rotation = (self.k_weight, self.q_weight, self.cos, self.sin, 1e-6, self.norm, self.dtype, self.pairs, self.rotary)
        k_out, q_out = torch.ops.inductor_ext.qk_norm_rope(self.k, self.q, *rotation)
        for n in range(self.k_cache.shape[0]):
            sides = ((k_out, self.k_cache, self.k_scale), (self.v, self.v_cache, self.v_scale))
            halves = [(_rows(x, n, c.shape[0]), c[n], s) for x, c, s in sides if x is not None and c is not None]
            for x, cache, scale in halves:
                if self.cache_dtype not in (E4, E5):
                    self._copy(x, cache)
                    continue
                rows = _by_rows(cache)
                at = (self.loc, self.program, "", self.cache_dtype, self.mult, self.offset, self.wrap)
                torch.ops.inductor_ext.downcast_fp8(x.contiguous(), None, rows, None, scale, None, *at)
                if rows is not cache:
                    cache.view(U8).copy_(rows.view(U8))
        return q_out, k_out if self.keep_k else k_out.new_empty(0)

    def _copy(self, x: torch.Tensor, cache: torch.Tensor) -> None:
        locs = range(x.shape[0]) if self.loc is None else self.loc.tolist()
        for token, loc in enumerate(locs):
            row = loc * self.mult + self.offset
            row = row + cache.shape[0] if self.wrap and row < 0 else row
            if (self.wrap or loc >= 0) and 0 <= row < cache.shape[0]:
                cache[row] = x[token]

    def check(self) -> None:
        wanted, found = self.copied(), self.copied()
        outs = wanted.in_two()
        for name, a, b in zip(("q_out", "k_out"), found.run(), outs, strict=True):
            assert a.is_contiguous()
            assert_same_bytes(a, b, name)
        for name in ("k_cache", "v_cache"):
            a, b = getattr(found, name), getattr(wanted, name)
            if a is not None:
                assert_same_bytes(_bits(a), _bits(b), name)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(U8) if x.element_size() == 1 else x


def _like(x: torch.Tensor) -> torch.Tensor:
    """A copy of the same strides, between whose rows there is memory of its own."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1 if x.numel() else 0
    memory = torch.as_strided(x, (last,), (1,)).view(U8).clone().view(x.dtype)
    return torch.as_strided(memory, x.shape, x.stride())


def _rows(x: torch.Tensor, n: int, sequences: int) -> torch.Tensor:
    """The tokens whose rows are in sequence ``n`` of the cache."""
    return x.reshape(sequences, x.shape[0] * x.shape[1] // sequences, *x.shape[2:])[n]


def _by_rows(cache: torch.Tensor) -> torch.Tensor:
    """What downcast_fp8 takes: rows that are contiguous."""
    row = cache.stride(1) == cache.shape[2] and cache.stride(2) == 1
    return cache if row else cache.view(U8).contiguous().view(cache.dtype)


def cache_of(shape: Any, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    if dtype in (E4, E5, U8):
        return torch.randint(1, 100, tuple(shape), dtype=U8, device=device).view(dtype)
    return torch.randn(*shape, device=device).to(dtype)


def made(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype = BF16,
    norm: str = "",
    cache_dtype: torch.dtype = E4,
    *,
    slots: int = 0,
    by_sequence: bool = False,
    index: torch.dtype = torch.int64,
    device: str = "cpu",
    **changes: Any,
) -> Case:
    """q, k and v as columns of one buffer, of B, S, H, Hkv, D; slots that do not repeat, in no order."""
    b, s, h, kv, d = shape
    q, k, weights, cos, sin = operands(shape, dtype, norm, device=device)
    v = q._base[..., (h + kv) * d :].view(b, s, kv, d)
    tokens = s if by_sequence else b * s
    slots = slots or 2 * tokens + 3
    sizes = (b, kv, slots, d) if by_sequence else (1, slots, kv, d)
    caches = [cache_of(sizes, cache_dtype, device) for _ in range(2)]
    caches = [cache.permute(0, 2, 1, 3) for cache in caches] if by_sequence else caches
    fp8 = cache_dtype in (E4, E5)
    scales = [torch.tensor(x, device=device) if fp8 else None for x in (0.013, 0.021)]
    loc = torch.randperm(slots, generator=torch.Generator().manual_seed(3))[:tokens].to(device, index)
    return Case(
        k, q, v, weights[1], weights[0], cos, sin, *caches, *scales, loc, norm, dtype,
        PROGRAM.replace("448.0", str(torch.finfo(cache_dtype).max)) if fp8 else "", cache_dtype, **changes,
    )  # fmt: skip


LAYOUTS: dict[str, Callable[[Case], Case]] = {
    "as_made": lambda c: c,
    "k_is_kept": lambda c: dataclasses.replace(c, keep_k=True),
    "without_q": lambda c: dataclasses.replace(c, q=None, q_weight=None),
    "without_v": lambda c: dataclasses.replace(c, v=None, v_cache=None, v_scale=None),
    "without_q_and_v": lambda c: dataclasses.replace(c, q=None, q_weight=None, v=None, v_cache=None, v_scale=None),
    "v_of_its_own": lambda c: dataclasses.replace(c, v=c.v.contiguous()),
    "heads_first_in_memory": lambda c: dataclasses.replace(c, k=c.k.transpose(1, 2).contiguous().transpose(1, 2)),
    "unaligned_v": lambda c: dataclasses.replace(c, v=torch.cat((c.v, c.v), -1)[..., 1 : 1 + c.v.shape[3]]),
    "unaligned_cache": lambda c: dataclasses.replace(c, k_cache=_odd(c.k_cache), v_cache=_odd(c.v_cache)),
    "halves_of_one_cache": lambda c: dataclasses.replace(c, **_side_by_side(c)),
}


def _odd(cache: torch.Tensor) -> torch.Tensor:
    bits = _bits(cache)
    return torch.cat((bits, bits), -1)[..., 1 : 1 + cache.shape[3]].view(cache.dtype)


def _side_by_side(c: Case) -> dict[str, torch.Tensor]:
    both = torch.cat((_bits(c.k_cache), _bits(c.v_cache)), 2).view(c.k_cache.dtype)
    return dict(zip(("k_cache", "v_cache"), both.split(c.k_cache.shape[2], 2)))


#: loc of 12 tokens into 16 slots, and what else: padding, past the end, repeated, consecutive.
ROWS: dict[str, dict[str, Any]] = {
    "padding": {"loc": [3, -1, 5, -7, 0, 1, 2, -1, 15, 14, 13, 12]},
    "all_padding": {"loc": [-1] * 12},
    "past_the_end": {"loc": [16, 3, 2**40, 15, 1000, 2**62, 1, 2, 4, 5, 6, 7]},
    "from_the_end": {"loc": [-1, 3, -16, 5, -17, -100, 16, 1, 2, 4, 6, 7], "wrap": True},
    "repeated": {"loc": [3, 3, 5, 3, 5, 1, 1, 1, 9, 9, 3, 0]},
    "repeated_from_the_end": {"loc": [3, -13, 5, 3, -11, 1, 1, -15, 9, 9, 3, 0], "wrap": True},
    "all_the_same": {"loc": [7] * 12},
    "by_three": {"loc": [0, 1, 2, 3, 4, -1, 5, 4, 3, 9, 2, 2], "mult": 3, "offset": 1},
    "one_row_for_all": {"loc": list(range(12)), "mult": 0, "offset": 4},
    "consecutive": {"loc": None, "offset": 3},
    "every_other": {"loc": None, "mult": 2, "offset": -3},
}


def with_rows(case: Case, name: str) -> Case:
    given = dict(ROWS[name])
    locs = given.pop("loc")
    loc = None if locs is None else torch.tensor(locs, dtype=torch.int64).to(case.k.device)
    return dataclasses.replace(case, loc=loc, **given)


def spoilt(case: Case) -> Case:
    """NaN, infinities, zeros of both signs and subnormal numbers in k and v, and zeros in the tables."""
    k, v = case.k.clone(), case.v.clone()
    for at, value in enumerate((float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 9e-39, 3e38)):
        k[0, at], v[0, at] = value, value
        k[1, at, :, 3::5], v[1, at, :, 5::7] = value, value
    cos, sin = case.cos.clone(), case.sin.clone()
    cos[:, 8::9], sin[:, 4::9] = 0.0, -0.0
    return dataclasses.replace(case, k=k, v=v, cos=cos, sin=sin)


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_dtype", [E4, E5, None], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_the_reference_is_two_ops(norm: str, dtype: Any, cache_dtype: Any) -> None:
    for by_sequence in (False, True):
        made((2, 5, 4, 2, 80), dtype, norm, cache_dtype or dtype, by_sequence=by_sequence).check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    LAYOUTS[layout](made((2, 5, 4, 2, 16), norm="cast mul")).check()


@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows: str) -> None:
    for cache_dtype in (E4, BF16):
        with_rows(made((2, 6, 4, 2, 16), cache_dtype=cache_dtype, slots=16), rows).check()
        with_rows(made((2, 12, 4, 2, 16), cache_dtype=cache_dtype, slots=16, by_sequence=True), rows).check()


def test_bytes_of_a_cache_in_fp8() -> None:
    case = made((2, 5, 4, 2, 16))
    dataclasses.replace(case, k_cache=case.k_cache.view(U8), v_cache=case.v_cache.view(U8)).check()


def test_fp32_tables() -> None:
    q, k, _, cos, sin = operands((2, 5, 4, 2, 16), table=FP32)
    case = dataclasses.replace(made((2, 5, 4, 2, 16)), q=q, k=k, cos=cos, sin=sin)
    case.check()
    dataclasses.replace(case, dtype=FP32).check()  # k is cast from fp32, v from bf16


@pytest.mark.parametrize("shape", [(0, 3, 4, 2, 16), (2, 0, 4, 2, 16), (1, 1, 1, 1, 2), (2, 3, 4, 0, 16)])
def test_empty_and_small(shape: Any) -> None:
    made(shape, norm="cast mul", slots=4 + shape[0] * shape[1]).check()
    made(shape, norm="cast mul", slots=4 + shape[1], by_sequence=True).check()


def test_with_checks_a_row_past_the_end_raises_and_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_CHECKS", "1")
    case = with_rows(made((2, 6, 4, 2, 16), slots=16), "past_the_end").copied()
    before = case.k_cache.clone()
    with pytest.raises(IndexError, match=r"qk_norm_rope_store: loc: wanted rows in \[0, 16\), found 16 for token 0"):
        case.run()
    assert_same_bytes(case.k_cache, before, "nothing is written")
    with_rows(made((2, 6, 4, 2, 16), slots=16), "padding").check()


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": lambda k: k.double()}, TypeError, "k: wanted bfloat16, float16 or float32"),
    ({"q": lambda q: q[:, :2]}, ValueError, "q: wanted torch.bfloat16, tokens and D of k"),
    ({"k_weight": lambda _: None}, ValueError, "k_weight: wanted a tensor, found None"),
    ({"q": lambda _: None}, ValueError, "q_weight: wanted None"),
    ({"q_weight": lambda w: w.float()}, TypeError, "q_weight: wanted torch.bfloat16, as k_weight"),
    ({"cos": lambda c: c.half()}, TypeError, "cos: wanted torch.bfloat16, as k, or float32"),
    ({"v": lambda v: v.half()}, ValueError, "v: wanted torch.bfloat16 of k's shape"),
    ({"v": lambda v: v[:, :, :1]}, ValueError, "v: wanted torch.bfloat16 of k's shape"),
    ({"v": lambda _: None}, ValueError, "wanted both v and v_cache or neither"),
    ({"k_cache": lambda c: c.view(U8).view(E5)}, TypeError, "k_cache: wanted torch.float8_e4m3fn or torch.uint8"),
    ({"k_cache": lambda c: c[0]}, ValueError, r"k_cache: wanted shape \[1 or 2, S, 2, 16\], found"),
    ({"k_cache": lambda c: c[..., :8]}, ValueError, "k_cache: wanted shape"),
    ({"k_cache": lambda c: c.view(U8).mT.contiguous().mT.view(E4)}, ValueError, "k_cache: wanted a last dimension of unit"),
    ({"v_cache": lambda c: c[:, :3]}, ValueError, "v_cache: wanted k_cache's .* first sizes"),
    ({"k_scale": lambda s: s.expand(2)}, ValueError, "k_scale: wanted one element"),
    ({"k_scale": lambda _: None}, ValueError, "names s0, but 0 operands were given"),
    ({"loc": lambda x: x[:5]}, ValueError, "loc: wanted one index for each of 6 tokens, found 5"),
    ({"loc": lambda x: x.float()}, ValueError, "loc: wanted a 1-d int32 or int64 tensor"),
    ({"cache_dtype": lambda _: FP16}, TypeError, "cache_dtype: wanted float8_e4m3fn, float8_e5m2 or torch.bfloat16"),
    ({"program": lambda _: "f32 mul:2 oops"}, ValueError, "oops"),
    ({"program": lambda p: "mul:1.0 mul:1.0 mul:1.0 " + p}, ValueError, "at most 8 numbers in both programs together"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = made((2, 3, 4, 2, 16), norm="cast mul").copied()
    before = case.k_cache.clone()
    wrong = dataclasses.replace(case, **{name: make(getattr(case, name)) for name, make in change.items()})
    with pytest.raises(error, match=message):
        wrong.run()
    assert_same_bytes(case.k_cache, before, "nothing is written")


def test_a_copy_has_no_steps() -> None:
    case = made((2, 3, 4, 2, 16), cache_dtype=BF16).copied()
    with pytest.raises(ValueError, match=r"k_program: wanted none, and no scale, for a cache of torch.bfloat16"):
        dataclasses.replace(case, program="mul:2.0").run()
    tables = {"cos": case.cos.float(), "sin": case.sin.float(), "dtype": FP32, "cache_dtype": FP32}
    wide = {"k_cache": case.k_cache.float(), "v_cache": case.v_cache.float()}
    with pytest.raises(TypeError, match=r"v: wanted torch.float32, to be copied, found torch.bfloat16"):
        dataclasses.replace(case, **tables, **wide).run()


# ---- the fake --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["as_made", "k_is_kept", "without_q", "without_v"])
def test_opcheck(layout: str) -> None:
    for by_sequence in (False, True):
        copy = made((2, 3, 4, 2, 16), norm="cast mul", cache_dtype=BF16, by_sequence=by_sequence)
        fp8 = made((2, 3, 4, 2, 16), norm="cast mul", by_sequence=by_sequence)
        fp8 = dataclasses.replace(fp8, k_cache=fp8.k_cache.view(U8), v_cache=fp8.v_cache.view(U8))  # opcheck cannot add FP8
        for case in (copy, fp8):
            torch.library.opcheck(OP.overload, LAYOUTS[layout](case).copied().arguments())


def test_out_overload_writes_what_the_function_returns() -> None:
    case = made((2, 3, 4, 2, 16), keep_k=True)
    wanted, found = case.copied(), case.copied()
    outs = [torch.empty_like(each) for each in wanted.run()]
    torch.ops.inductor_ext.qk_norm_rope_store.out(*found.arguments(), out0=outs[0], out1=outs[1])
    for a, b in zip((*outs, found.k_cache, found.v_cache), (*case.copied().run(), wanted.k_cache, wanted.v_cache), strict=True):
        assert_same_bytes(_bits(a), _bits(b))


# ---- the source, on the CPU ------------------------------------------------------------------------------------------


class _Call(ctypes.Structure):
    _tensors = ("k", "q", "v", "k_weight", "q_weight", "cos", "sin", "k_cache", "v_cache", "k_scale", "v_scale", "loc")
    _fields_ = (
        *((name, ctypes.POINTER(cuda_on_cpu.Given)) for name in (*_tensors, "q_out", "k_out")),
        *((name, ctypes.c_int64) for name in ("rotary", "mult", "offset", "wrap", "keep_k", "check")),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda_on_cpu.compiled("qk_norm_rope_store", Path(tmp_path_factory.mktemp("qk_norm_rope_store")))


def on_cpu(library: ctypes.CDLL, case: Case, entry: str, check: bool = False, keep_k: bool | None = None) -> Any:
    """q_out and k_out of one of the library's functions; it writes the case's caches."""
    keep_k = case.keep_k if keep_k is None else keep_k
    outs = [torch.full(x.shape, 7.0, dtype=case.dtype) for x in (case.q if case.q is not None else case.k[:0], case.k)]
    if not keep_k:
        outs[1] = torch.empty(0, dtype=case.dtype)
    if case.q is None:
        outs[0] = torch.empty(0, dtype=case.dtype)
    tensors = {name: getattr(case, name) for name in _Call._tensors} | dict(zip(("q_out", "k_out"), outs))
    given = {name: None if x is None else ctypes.pointer(cuda_on_cpu.Given.of(x)) for name, x in tensors.items()}
    numbers = {name: getattr(case, name) for name in ("rotary", "mult", "offset", "wrap")} | {"keep_k": keep_k, "check": check}
    error = ctypes.create_string_buffer(500)
    call = _Call(**given, **numbers)
    if getattr(library, entry)(ctypes.byref(call), error, 500) != 0:
        raise RuntimeError(error.value.decode())
    return outs[0], outs[1]


def _entry(case: Case) -> str:
    kind = {BF16: "bf16", FP32: "fp32"}[case.dtype] + ("" if case.norm else "_plain")
    columns = case.rotary or case.k.shape[-1]
    joined = case.cos.dim() == 4
    turn = (case.pairs, joined or case.cos.shape[-1] != columns, case.rotary not in (0, case.k.shape[-1]), *[joined] * joined)
    kind += "_" + "".join(str(int(each)) for each in turn) if any(turn) else ""
    return f"{'fp8' if case.cache_dtype is E4 else 'copy'}_{kind}"


def check_source(library: ctypes.CDLL, case: Case) -> None:
    """Byte for byte: q_out and k_out those of qk_norm_rope's source, the caches what PyTorch makes of that k."""
    if case.cache_dtype is not E4 and case.loc is not None:
        case = dataclasses.replace(case, loc=case.loc.clamp(-(2**31), 2**31 - 1).int())
    wanted, found = case.copied(), case.copied()
    q, k = on_cpu(library, found, _entry(case))
    assert library.launches_of_last_call() == (1 if case.k.numel() or q.numel() else 0)
    q_turned, turned = on_cpu(library, case, f"turn_{_entry(case).partition('_')[2]}", keep_k=True)
    assert_same_bytes(q, q_turned, "q_out")
    assert_same_bytes(k, turned if case.keep_k else turned.new_empty(0), "k_out")
    _store_as(dataclasses.replace(wanted, k=turned))
    for name in ("k_cache", "v_cache"):
        a, b = getattr(found, name), getattr(wanted, name)
        if a is not None:
            assert_same_bytes(_bits(a), _bits(b), name)


def _store_as(case: Case) -> None:
    """The stores of a k that is turned already."""
    for n in range(case.k_cache.shape[0]):
        for x, cache, scale in ((case.k, case.k_cache, case.k_scale), (case.v, case.v_cache, case.v_scale)):
            if x is None or cache is None:
                continue
            rows = _rows(x, n, case.k_cache.shape[0])
            if case.cache_dtype is E4:
                rows = (rows.float() / scale).clamp(-448.0, 448.0).to(E4).view(U8)
                case._copy(rows, cache[n].view(U8))
            else:
                case._copy(rows, cache[n])


@pytest.mark.parametrize("d", [2, 6, 8, 16, 24, 64, 72, 128, 192, 256])
@pytest.mark.parametrize(("dtype", "norm"), [(BF16, "cast mul"), (BF16, ""), (FP32, "")], ids=str)
def test_source_at_every_head_dim(library: Any, dtype: Any, norm: str, d: int) -> None:
    for cache_dtype in (E4, dtype):
        check_source(library, made((2, 3, 5, 3, d), dtype, norm, cache_dtype))
        check_source(library, made((2, 3, 3, 1, d), dtype, norm, cache_dtype, by_sequence=True, keep_k=True))


#: Dtype, norm, and what is turned: pairs, tables of half as many columns, some columns only; one table of cos and sin.
TURNS = [
    *((dtype, norm, turn) for dtype, norm, turn in ((BF16, "", "1101"), (FP32, "", "1111"), (BF16, "cast mul", "1111"))),
    *((BF16, "", turn) for turn in ("010", "001", "110", "101")),
    *((FP32, "", turn) for turn in ("011", "100", "110")),
    *((BF16, "cast mul", turn) for turn in ("011", "111")),
]


SOME_COLUMNS = [(16, 8), (24, 16), (64, 16), (72, 12), (80, 32), (128, 96), (256, 64), (36, 8), (20, 4)]


@pytest.mark.parametrize(("d", "rotary"), SOME_COLUMNS)
@pytest.mark.parametrize(("dtype", "norm", "turn"), TURNS, ids=str)
def test_source_of_other_rotations(library: Any, dtype: Any, norm: str, turn: str, d: int, rotary: int) -> None:
    """The rotation is the reference's; what is stored of it, PyTorch's."""
    pairs, halved, partial, joined = (flag == "1" for flag in turn.ljust(4, "0"))
    columns = rotary if partial else d
    for cache_dtype, shape in ((E4, (2, 3, 5, 3, d)), (dtype, (1, 9, 3, 1, d))):
        case = made(shape, dtype, norm, cache_dtype, keep_k=True)
        cos, sin = (each[..., : columns // 2 if halved else columns] for each in (case.cos, case.sin))
        if joined:
            cos = sin = torch.stack((cos, sin), -1)
        case = dataclasses.replace(case, cos=cos, sin=sin, pairs=pairs, rotary=rotary if partial else 0)
        check_source(library, case)
        q, k = on_cpu(library, case, f"turn_{_entry(case).partition('_')[2]}")
        weights = case.k_weight, case.q_weight
        wanted = ROTATE.reference(case.k, case.q, *weights, cos, sin, 1e-6, norm, dtype, pairs, case.rotary)
        for found, each in zip((k, q), wanted, strict=True):
            if norm:
                torch.testing.assert_close(found.float(), each.float(), rtol=2**-6, atol=2**-5)
            else:
                assert_same_bytes(found, each)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d", [16, 8, 6])
def test_source_layouts(library: Any, layout: str, d: int) -> None:
    for cache_dtype in (E4, BF16):
        check_source(library, LAYOUTS[layout](made((2, 5, 4, 2, d), norm="cast mul", cache_dtype=cache_dtype)))


@pytest.mark.parametrize("rows", [name for name, given in ROWS.items() if given.get("mult") != 0])
@pytest.mark.parametrize("multiprocessors", [1, 132], ids=["eight_tokens_a_block", "one_token_a_block"])
def test_source_rows(library: Any, rows: str, multiprocessors: int) -> None:
    """On a GPU of one multiprocessor 16 tokens are many."""
    library.set_multiprocessors(multiprocessors)
    for cache_dtype, keep_k in ((E4, True), (BF16, False)):
        case = made((4, 6, 4, 2, 16), norm="cast mul", cache_dtype=cache_dtype, slots=16, keep_k=keep_k)
        short = with_rows(case, rows)
        twice = short if short.loc is None else dataclasses.replace(short, loc=torch.cat((short.loc, short.loc.flip(0))))
        check_source(library, twice)
        by_sequence = made((3, 12, 4, 2, 16), cache_dtype=cache_dtype, slots=16, by_sequence=True)
        check_source(library, with_rows(by_sequence, rows))
    library.set_multiprocessors(132)


@pytest.mark.parametrize("by_sequence", [False, True])
def test_source_of_claimed_rows_one_token_stands(library: Any, by_sequence: bool) -> None:
    """With a factor of zero all go to one row, and are not compared with each other."""
    case = with_rows(made((1, 12, 4, 2, 16), slots=16, keep_k=True, by_sequence=by_sequence), "one_row_for_all")
    found, every = case.copied(), dataclasses.replace(case.copied(), loc=None, mult=1, offset=0)
    _, k = on_cpu(library, found, "fp8_bf16_plain")
    _, wanted = on_cpu(library, every, "fp8_bf16_plain")
    assert_same_bytes(k, wanted, "k_out, of all tokens")
    stored = torch.stack((found.k_cache[0, 4], found.v_cache[0, 4])).view(U8)
    options = torch.stack((every.k_cache[0, :12], every.v_cache[0, :12]), 1).view(U8)
    assert (options == stored).flatten(1).all(1).any()
    others = [row for row in range(16) if row != 4]
    for name in ("k_cache", "v_cache"):
        assert_same_bytes(getattr(found, name).view(U8)[0, others], getattr(case, name).view(U8)[0, others])


def test_source_extremes(library: Any) -> None:
    for norm, cache_dtype in itertools.product(("", "cast mul"), (E4, BF16)):
        check_source(library, spoilt(made((2, 9, 4, 2, 16), norm=norm, cache_dtype=cache_dtype, keep_k=True)))


def test_source_with_nothing_to_do(library: Any) -> None:
    for shape in ((0, 3, 4, 2, 16), (2, 0, 4, 2, 16)):
        check_source(library, made(shape, slots=4))
    check_source(library, made((2, 3, 4, 0, 16)))


def test_source_names_the_token_outside(library: Any) -> None:
    case = with_rows(made((2, 6, 4, 2, 16), slots=16), "past_the_end").copied()
    with pytest.raises(RuntimeError, match=r"IndexError: loc: wanted rows in \[0, 16\), found row 16 for token 0 \(loc = 16\)"):
        on_cpu(library, case, "fp8_bf16_plain", check=True)
    inside = with_rows(made((2, 6, 4, 2, 16), slots=16), "padding").copied()
    on_cpu(library, inside, "fp8_bf16_plain", check=True)  # what was noted is gone


# ---- the kernel ------------------------------------------------------------------------------------------------------


KINDS = [(BF16, "cast mul"), (BF16, ""), (FP16, "mul cast"), (FP32, "mul+1 cast")]
GPU_KINDS = pytest.mark.parametrize(("dtype", "norm"), KINDS, ids=str)


def kernels(arch: str) -> list[jit.JitSpec]:
    """V left out, and rows by int32, are tried with the first kind only."""
    specs = []
    for dtype, norm in KINDS:
        weight, first = dtype if norm else None, (dtype, norm) == KINDS[0]
        for index, cache in itertools.product((torch.int32, torch.int64) if first else (torch.int64,), (E4, dtype)):
            scale, program = (FP32, PROGRAM) if cache is E4 else (None, "")
            for v in (program, None) if first and index is torch.int64 else (program,):
                key = (dtype, weight, dtype, norm, dtype, cache, program, v, scale, None if v is None else scale, index)
                specs.append(OP.spec_of_key(key, arch))
    return specs


class TestOnTheGpu:
    pytestmark = pytest.mark.gpu(kernels=kernels)

    @GPU_KINDS
    def test_every_head_dim(self, dtype: Any, norm: str) -> None:
        for d, cache_dtype in itertools.product((2, 30, 64, 72, 80, 96, 128, 136, 192, 256), (E4, dtype)):
            for shape in ((1, 1, 16, 8, d), (3, 37, 5, 1, d), (2, 1100, 7, 3, d)):
                made(shape, dtype, norm, cache_dtype, device="cuda").check()
            made((3, 37, 5, 2, d), dtype, norm, cache_dtype, by_sequence=True, keep_k=True, device="cuda").check()

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout: str) -> None:
        for d, cache_dtype, tokens in itertools.product((128, 72, 6), (E4, BF16), (19, 2100)):
            LAYOUTS[layout](made((2, tokens, 4, 2, d), BF16, "cast mul", cache_dtype, device="cuda")).check()

    @pytest.mark.parametrize("rows", ROWS)
    @pytest.mark.parametrize("times", [1, 200])
    def test_rows(self, rows: str, times: int) -> None:
        """2400 tokens have eight of them to a block."""
        for cache_dtype in (E4, BF16):
            case = with_rows(made((2, 6, 4, 2, 128), cache_dtype=cache_dtype, slots=16, device="cuda"), rows)
            if times > 1 and case.loc is not None:
                wide = made((2, 6 * times, 4, 2, 128), cache_dtype=cache_dtype, slots=16, device="cuda")
                options = {"mult": case.mult, "offset": case.offset, "wrap": case.wrap}
                case = dataclasses.replace(wide, loc=case.loc.repeat(times), **options)
            if case.mult == 0:
                continue  # of rows that are claimed any may stand: below
            case.check()

    def test_of_claimed_rows_one_token_stands_whole(self) -> None:
        """More tokens than are compared: K and V of one token each, never a mixture."""
        tokens, slots = 9000, 50
        case = made((1, tokens, 4, 8, 128), slots=slots, device="cuda").copied()
        where = torch.randint(0, slots, (tokens,), device="cuda")
        every = dataclasses.replace(case, loc=None, k_cache=_wide(case.k_cache, tokens), v_cache=_wide(case.v_cache, tokens))
        every.run()
        for _ in range(20):
            dataclasses.replace(case, loc=where).run()
            for slot in range(slots):
                candidates = (where == slot).nonzero().flatten()
                found = torch.stack((case.k_cache[0, slot], case.v_cache[0, slot])).view(U8)
                options = torch.stack((every.k_cache[0, candidates], every.v_cache[0, candidates]), 1).view(U8)
                assert (options == found).flatten(1).all(1).any(), f"slot {slot} is a mixture"

    @pytest.mark.parametrize("tokens", [4096, 4097, 9000])
    def test_many_tokens(self, tokens: int) -> None:
        for index in (torch.int32, torch.int64):
            made((1, tokens, 16, 8, 128), BF16, "cast mul", index=index, device="cuda").check()

    def test_extremes_and_empty_input(self) -> None:
        for norm, cache_dtype in itertools.product(("", "cast mul"), (E4, BF16)):
            spoilt(made((2, 33, 4, 2, 128), norm=norm, cache_dtype=cache_dtype, keep_k=True, device="cuda")).check()
            made((2, 0, 4, 2, 128), norm=norm, cache_dtype=cache_dtype, slots=4, device="cuda").check()

    def test_a_cuda_graph_and_another_stream(self) -> None:
        case = made((2, 19, 4, 2, 128), device="cuda")
        stored, captured = case.copied(), case.copied()
        wanted = stored.run()
        captured.copied().run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = captured.run()
        for each in (*found, captured.k_cache.view(U8), captured.v_cache.view(U8)):
            each.zero_()
        graph.replay()
        torch.cuda.synchronize()
        written = case.loc
        for a, b in zip(found, wanted, strict=True):
            assert_same_bytes(a, b)
        for a, b in ((captured.k_cache, stored.k_cache), (captured.v_cache, stored.v_cache)):
            assert_same_bytes(a.view(U8)[0, written], b.view(U8)[0, written])
        other, stream = case.copied(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            other.run()
        stream.synchronize()
        assert_same_bytes(other.k_cache.view(U8), stored.k_cache.view(U8))

    def test_with_checks_it_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("INDUCTOR_EXT_CHECKS", "1")
        OP._loaded.clear()  # a kernel is bound with or without checks
        case = with_rows(made((2, 6, 4, 2, 16), slots=16, device="cuda"), "past_the_end").copied()
        with pytest.raises(IndexError, match=r"loc: wanted rows in \[0, 16\), found row 16 for token 0"):
            case.run()
        OP._loaded.clear()

    def test_the_kernel_names_a_bad_argument(self) -> None:
        case = made((2, 3, 4, 2, 64), device="cuda").copied()
        outs = {"out0": torch.empty_like(case.q), "out1": torch.empty(0, device="cuda", dtype=BF16)}
        for change, message in (
            ({"k_cache": case.k_cache[:, :, :1]}, "k_cache: wanted shape"),
            ({"loc": case.loc[:5]}, "loc: wanted shape"),
            ({"k": case.k.transpose(2, 3).contiguous().transpose(2, 3)}, "k: wanted strides"),
            ({"v": case.v[..., :32]}, "v: wanted shape"),
        ):
            with pytest.raises(ValueError, match=message):
                OP._call(*dataclasses.replace(case, **change).arguments(), **outs)


def _wide(cache: torch.Tensor, slots: int) -> torch.Tensor:
    return torch.zeros(1, slots, *cache.shape[2:], dtype=U8, device=cache.device).view(cache.dtype)
