"""The step language: every program is the PyTorch code it stands for, and the C++ type that it becomes."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from inductor_ext import torch_compat
from inductor_ext.kernels import steps
from inductor_ext.kernels.downcast_fp8 import op as downcast_fp8
from inductor_ext.kernels.qk_norm_rope import op as qk_norm_rope
from inductor_ext.kernels.qk_norm_rope_store import op as qk_norm_rope_store
from tests.support.compiled import run_compiled, run_copies
from tests.support.equal import assert_all_same_bytes, assert_same_bytes

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

numbers = st.floats(-1e4, 1e4, width=32).filter(lambda number: number != 0)
# AOTAutograd clamps fp16 in fp32: a bound that is zero in fp16 and not in fp32 gives zeros of another sign than eager.
plain = numbers.filter(lambda number: abs(number) > 1e-3)
operands = st.one_of(numbers.map(str), st.sampled_from(["s0", "r1"]))
tokens = st.one_of(
    st.sampled_from(list(DTYPES)),
    st.sampled_from(["recip", "abs", "ceil", "floor"]),
    st.builds("{}:{}".format, st.sampled_from(["mul", "div", "max", "min"]), operands),
    st.builds("{}:{}".format, st.sampled_from(["add", "positive_or", "nonzero_or"]), numbers.map(str)),
    st.builds("{}:{}|recip|mul:{}".format, st.sampled_from(["mul", "div", "min"]), st.sampled_from(["s0", "r1"]), numbers),
)
programs = st.lists(tokens, max_size=8).map(" ".join)


def values(dtype: torch.dtype, seed: int) -> torch.Tensor:
    made = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed)) * 300
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, 464.0, -61440.0, 3e38, 1e-7])
    return torch.cat([made, special[None]]).to(dtype)


def by_hand(text: str, x: torch.Tensor, s0: torch.Tensor, r1: torch.Tensor) -> torch.Tensor:
    """The program as a person would write it."""
    for token in text.split():
        op, _, name = token.partition(":")
        name, *via = name.split("|")
        operand: Any = {"s0": s0, "r1": r1}[name] if name in ("s0", "r1") else float(name) if name else None
        if via:
            operand = operand.reciprocal() * float(via[1].partition(":")[2])
        if op in DTYPES:
            x = x.to(DTYPES[op])
        elif op in ("recip", "abs", "ceil", "floor"):
            x = {"recip": torch.reciprocal, "abs": torch.abs, "ceil": torch.ceil, "floor": torch.floor}[op](x)
        elif op == "add":
            x = x + operand
        elif op == "positive_or":
            x = x.masked_fill((x <= 0) | x.isnan(), operand)
        elif op == "nonzero_or":
            x = x.masked_fill(x == 0, operand)
        elif op == "mul":
            x = x * operand
        elif op == "div":
            x = x / operand
        else:
            x = x.clamp(min=operand) if op == "max" else x.clamp(max=operand)
    return x


@settings(max_examples=150, deadline=None)
@given(text=programs, dtype=st.sampled_from(list(DTYPES.values())), seed=st.integers(0, 99))
def test_a_program_is_the_code_it_stands_for(text: str, dtype: torch.dtype, seed: int) -> None:
    x, s0, r1 = values(dtype, seed), torch.tensor(0.37), torch.rand(7, 1) + 0.1
    assert_same_bytes(steps.evaluate(text, x, [s0, r1]), by_hand(text, x, s0, r1), text)
    assert steps.text_of(steps.parse(text)) == " ".join(text.split()) or "e" in text
    assert steps.parse(steps.text_of(steps.parse(text))) == steps.parse(text)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scaling=st.lists(st.tuples(st.sampled_from(["mul", "div"]), st.one_of(plain, st.just("s"))), min_size=1, max_size=3),
    bounds=st.lists(st.tuples(st.sampled_from(["max", "min"]), plain), max_size=3),
    casts=st.lists(st.sampled_from(list(DTYPES)), max_size=2),
    dtype=st.sampled_from(list(DTYPES.values())),
    fp8=st.sampled_from([E4, E5]),
)
def test_a_random_chain_compiles_to_eagers_bytes(scaling: Any, bounds: Any, casts: Any, dtype: Any, fp8: Any) -> None:
    def chain(x: Any, s: Any) -> Any:
        for name in casts[:1]:
            x = x.to(DTYPES[name])
        for op, number in scaling:
            other = s if number == "s" else number
            x = x * other if op == "mul" else x / other
        for name in casts[1:]:
            x = x.to(DTYPES[name])
        for op, number in bounds:
            x = x.clamp(min=number) if op == "max" else x.clamp(max=number)
        return x.to(fp8)

    inputs = (values(dtype, 1), torch.tensor(0.37))
    found, recorder = run_compiled(chain, inputs, rules={"fp8_downcast": "always"}, build="defer")
    assert recorder.counts() == {"fp8_downcast": 1}
    assert_all_same_bytes(found, run_copies(chain, inputs))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f63", "'f63' is none of f32, bf16, f16, f64, recip, abs,"),
        ("mul", "'mul' is none of"),
        ("mul:", "'mul:' is none of"),
        ("sub:1", "'sub:1' is none of"),
        ("f32 mul:x", "wanted a number, sN, rN, scale or amax after the colon, found 'mul:x'"),
        ("recip:2", "'recip:2' is none of"),
        ("mul:scale|", "'' is none of"),
        ("mul:scale|sub:1", "'sub:1' is none of"),
        ("mul:2.0|recip", r"'mul:2.0\|recip' is none of"),
    ],
)
def test_a_bad_token_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps.parse(text)


def test_an_empty_program_changes_nothing() -> None:
    x = torch.randn(3)
    assert steps.evaluate("", x) is x and steps.parse("") == ()


@pytest.mark.parametrize(
    ("text", "dtype", "wanted"),
    [
        ("f32 div:s0 max:-448.0 min:448.0", E4, True),
        ("min:448.0 max:-448.0 bf16", E4, True),
        ("max:-57344.0 min:57344.0", E4, False),
        ("max:-57344.0 min:57344.0", E5, True),
        ("max:-448.0 min:448.0 mul:2.0", E4, False),
        ("max:-448.0", E4, False),
        ("max:s0 min:448.0", E4, False),
        ("max:-500.0 min:448.0 max:-448.0", E4, True),
        ("", E4, False),
        ("min:464.0 max:-464.0", E4, False),
    ],
)
def test_saturated_says_when_the_cast_cannot_overflow(
    text: str, dtype: torch.dtype, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_compat, "e4m3fn_saturates", lambda: False)
    assert steps.saturated(text, dtype) is wanted
    monkeypatch.setattr(torch_compat, "e4m3fn_saturates", lambda: True)
    assert steps.saturated(text, dtype) is (wanted or dtype is E4)


def test_e4m3fn_saturates_is_what_this_torch_does() -> None:
    cast = torch.tensor([1e6, -1e6, float("inf"), float("nan")]).to(E4).float()
    wanted = [448.0, -448.0, 448.0, float("nan")] if torch_compat.e4m3fn_saturates() else [float("nan")] * 4
    torch.testing.assert_close(cast, torch.tensor(wanted), equal_nan=True)
    torch_compat.e4m3fn_saturates.cache_clear()
    with FakeTensorMode():
        assert torch_compat.e4m3fn_saturates() is (wanted[0] == 448.0)


@settings(max_examples=150, deadline=None)
@given(text=programs, dtype=st.sampled_from(list(DTYPES.values())), fp8=st.sampled_from([E4, E5]))
def test_saturated_is_never_wrong(text: str, dtype: torch.dtype, fp8: torch.dtype) -> None:
    with mock.patch.object(torch_compat, "e4m3fn_saturates", lambda: False):
        saturated = steps.saturated(text, fp8)
    if saturated:
        result = by_hand(text, values(dtype, 3), torch.tensor(0.37), torch.rand(7, 1) + 0.1)
        limit = steps.FP8_MAX[fp8]
        assert bool(((result.float().abs() <= limit) | result.isnan()).all()), text


@pytest.mark.parametrize(
    ("text", "dtype", "operands", "first", "wanted"),
    [
        ("", torch.float32, (), 0, "Steps<>"),
        (
            "f32 div:s0 max:-448.0 min:448.0", torch.bfloat16, (torch.float32,), 0,
            "Steps<To<float>, Div<float, Scalar<0, float>>, Max<float, Const<0>>, Min<float, Const<1>>>",
        ),
        (
            "mul:r0 f32 mul:2.0 f16", torch.float16, (torch.bfloat16,), 3,
            "Steps<Mul<__half, Row<0, __nv_bfloat16>>, To<float>, Mul<float, Const<3>>, To<__half>>",
        ),
        (
            "f32 div:scale max:-448.0", torch.bfloat16, (), 2,
            "Steps<To<float>, Div<float, Scale>, Max<float, Const<2>>>",
        ),
        (
            "mul:s0 mul:s1 mul:3.0 mul:s2", torch.float32, (None, torch.float32, None), 0,
            "Steps<Mul<float, Const<1>>, Mul<float, Scalar<1, float>>, Mul<float, Const<0>>, Mul<float, Const<2>>>",
        ),
        (
            "f32 max:1e-12 recip mul:448.0", torch.bfloat16, (), 0,
            "Steps<To<float>, Max<float, Const<0>>, Recip<float>, Mul<float, Const<1>>>",
        ),
        (
            "f32 mul:scale|recip|mul:3.0 max:-448.0", torch.bfloat16, (), 1,
            "Steps<To<float>, Mul<float, Through<Scale, Steps<Recip<__half>, Mul<__half, Const<1>>>>>, Max<float, Const<2>>>",
        ),
        (
            "f32 div:amax|f32|add:1.0", torch.bfloat16, (), 0,
            "Steps<To<float>, Div<float, Through<OfAmax, Steps<To<float>, Add<float, Const<0>>>>>>",
        ),
        (
            "mul:r0|recip", torch.float32, (torch.bfloat16,), 0,
            "Steps<Mul<float, Through<Row<0, __nv_bfloat16>, Steps<Recip<__nv_bfloat16>>>>>",
        ),
        (
            "f64 max:1e-12 recip mul:448.0 f32 pow2 mul:2.0", torch.bfloat16, (), 0,
            "Steps<Wide<wide::Max<0x3d719799812dea11ull>, wide::Recip, wide::Mul<0x407c000000000000ull>>, Pow2<float>, "
            "Mul<float, Const<2>>>",
        ),
        ("f32 nonzero_or:1.0 bits_up ue8m0", torch.float16, (), 0,
         "Steps<To<float>, NonzeroOr<float, Const<0>>, BitsUp<float>, Ue8m0<float>>"),
    ],
)  # fmt: skip
def test_cpp_text(text: str, dtype: torch.dtype, operands: Any, first: int, wanted: str) -> None:
    assert steps.to_cpp(text, dtype, operands, first, scale=torch.float16).replace("inductor_ext::", "") == wanted


@pytest.mark.parametrize(
    ("text", "fp8", "left"),
    [
        ("f32 div:scale max:-448.0 min:448.0", E4, "To<float>, Div<float, Scale>"),
        ("div:scale min:448.0 max:-448.0 f32", E4, "Div<__nv_bfloat16, Scale>, To<float>"),
        ("max:-448.0 mul:2.0 max:-448.0 min:448.0", E4, "Max<__nv_bfloat16, Const<0>>, Mul<__nv_bfloat16, Const<1>>"),
        ("f32 max:-57344.0 min:57344.0", E5, "To<float>"),
        ("f32 max:-448.0 min:448.0", E5, "To<float>, Max<float, Const<0>>, Min<float, Const<1>>"),
        ("f32 max:-447.0 min:448.0", E4, "To<float>, Max<float, Const<0>>, Min<float, Const<1>>"),
        ("f32 max:-448.0 min:447.0", E4, "To<float>, Max<float, Const<0>>, Min<float, Const<1>>"),
        ("f32 min:448.0", E4, "To<float>, Min<float, Const<0>>"),
    ],
)
def test_clamps_that_the_cast_makes_itself_are_left_out(text: str, fp8: torch.dtype, left: str) -> None:
    assert steps.to_cpp(text, torch.bfloat16, fp8=fp8).replace("inductor_ext::", "") == f"Steps<{left}>"


def test_constants_in_the_order_of_the_cpp_text() -> None:
    assert steps.constants("f32 max:1e-12 recip mul:448.0", "div:scale min:2.0") == [1e-12, 448.0, 2.0]
    assert steps.constants("mul:scale|recip|max:5.0 min:2.0", "add:1.0") == [5.0, 2.0, 1.0]
    assert steps.padded_constants("mul:3.0") == (3.0, *[0.0] * 7)
    assert steps.call_constants("mul:s0 mul:3.0", [torch.tensor(5.0)]) == (3.0, 5.0, *[0.0] * 6)


def test_what_a_program_needs() -> None:
    assert steps.operand_names("mul:s1 div:s0 min:s1 max:scale mul:amax|recip mul:s2|recip") == ["s0", "s1", "s2"]
    assert steps.result_dtype("f32 mul:2.0 bf16 max:1.0", torch.float16) is torch.bfloat16
    assert steps.result_dtype("mul:2.0", torch.float16) is torch.float16


@pytest.mark.parametrize(
    ("text", "operands", "message"),
    [
        ("mul:s1", 1, "op: 'mul:s1' names s1, but 1 operands were given"),
        (" ".join(f"mul:{i}.0" for i in range(1, 10)), 0, "op: wanted at most 8 numbers, found 9"),
        ("mul:scale", 0, "op: wanted numbers and operands, found 'mul:scale', which names a dynamic scale"),
        ("mul:amax|recip", 0, "op: wanted numbers and operands, found 'mul:amax|recip', which names a dynamic amax"),
        ("", 5, "op: wanted at most 4 operands, found 5"),
        ("f64 mul:2.0 bf16", 0, "op: wanted f32 behind f64, found bf16"),
        ("f64 mul:2.0", 0, "op: wanted f32 behind f64, found the end"),
        ("mul:s0|f64|recip", 1, "op: wanted f32 behind f64, found the end"),
        ("f64 log2 f32", 0, "op: wanted steps by a number behind f64, found log2"),
        ("f64 mul:s0 f32", 1, "op: wanted steps by a number behind f64, found mul:s0"),
    ],
)
def test_programs_that_no_kernel_takes(text: str, operands: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        steps.check_program("op", text, operands)


def test_a_program_may_name_the_scale_and_the_maximum_where_there_are_such() -> None:
    steps.check_program("op", "mul:scale|recip div:amax", 0, made=("scale", "amax"))
    with pytest.raises(ValueError, match="wanted numbers and operands and scale, found 'div:amax', which names a dynamic amax"):
        steps.check_program("op", "div:amax", 0, made=("scale",))


@pytest.mark.parametrize("saturates", [False, True])
def test_one_cast_for_two_programs_leaves_out_no_clamp_that_it_does_not_make(
    monkeypatch: pytest.MonkeyPatch, saturates: bool
) -> None:
    """V is clamped past the range, so that the cast must give NaN there as PyTorch's does before 2.13: K, which is clamped
    to the range, needs its clamps then. Found by random programs on a GPU: K was NaN too."""
    monkeypatch.setattr(torch_compat, "e4m3fn_saturates", lambda: saturates)
    narrow, wide = (f"f32 div:s0 max:-{limit} min:{limit}" for limit in (448.0, 57344.0))
    end = narrow, wide, torch.float32, torch.float32, torch.int64
    stored, rotated = (torch.bfloat16, E4, *end), (*qk_norm_rope.LLAMA, E4, *end)
    for op, key in ((downcast_fp8, stored), (qk_norm_rope_store, rotated)):
        ((_, both),) = op.OP.spec_of_key(key, "sm_90a").exports
        ((_, alone),) = op.OP.spec_of_key(tuple(narrow if each is wide else each for each in key), "sm_90a").exports
        clamps = [text.count("::Max<") + text.count("::Min<") for text in (both, alone)]
        assert clamps == ([2, 0] if saturates else [4, 0]), both


def test_v_that_is_only_cast_overflows_as_pytorchs_cast_does() -> None:
    """Beside a K that is clamped: the hardware's cast, which gives 57344 and not infinity, serves neither then."""
    end = "f32 div:s0 max:-57344.0 min:57344.0", "", torch.float32, None, torch.int64
    for op, key in (
        (downcast_fp8, (torch.bfloat16, torch.float8_e5m2, *end)),
        (qk_norm_rope_store, (*qk_norm_rope.LLAMA, torch.float8_e5m2, *end)),
    ):
        ((_, cpp),) = op.OP.spec_of_key(key, "sm_90a").exports
        assert "__nv_fp8_e5m2, false, " in cpp and cpp.count("::Max<") == cpp.count("::Min<") == 1
