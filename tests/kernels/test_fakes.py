"""Fakes agree with what the ops really give: shapes, dtypes, strides, symbolic sizes; and opcheck agrees with both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
ops = torch.ops.inductor_ext
STATIC = "f32 div:s0 max:-448.0 min:448.0"
ROW = "f32 max:1e-12 div:448.0", "f32 div:scale max:-448.0 min:448.0"


def _layouts() -> dict[str, torch.Tensor]:
    base = torch.randn(6, 8, 10).bfloat16()
    return {
        "contiguous": base,
        "permuted": base.permute(2, 0, 1),
        "rows_of_a_wider_buffer": base[:, :, 2:8],
        "columns": base[:, :, ::2],
        "one_row": base[0, :1],
        "empty": base[:0],
        "vector": base[0, 0],
        "expanded": base[:1].expand(6, 8, 10),
    }


def _like(tensor: Any) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.stride() if tensor.numel() else (), tensor.device


CALLS: dict[str, Any] = {
    "fp8_downcast": lambda x: (ops.fp8_downcast(x, [x.new_ones(()).float()], STATIC, E4),),
    "fp8_downcast_bf16": lambda x: (ops.fp8_downcast(x, [], "mul:0.5", E5),),
    "fp8_quantize_row": lambda x: ops.fp8_quantize(x, "row", *ROW, E4),
    "fp8_quantize_row_bf16_scale": lambda x: ops.fp8_quantize(x, "row", "", "div:scale", E4),
    "fp8_quantize_tensor": lambda x: ops.fp8_quantize(x, "tensor", *ROW, E4) if x.numel() else (),
}


@pytest.mark.parametrize("layout", list(_layouts()))
@pytest.mark.parametrize("call", list(CALLS))
def test_fake_agrees_with_real(call: str, layout: str) -> None:
    x = _layouts()[layout]
    real = CALLS[call](x)
    mode = FakeTensorMode()
    with mode:
        fake = CALLS[call](mode.from_tensor(x))
    assert [_like(t) for t in fake] == [_like(t) for t in real]


@pytest.mark.parametrize("call", list(CALLS))
def test_fake_takes_symbolic_sizes(call: str) -> None:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    x, environment = torch.randn(6, 8).bfloat16(), ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    symbolic = mode.from_tensor(x, symbolic_context=context)
    with mode:
        fake = CALLS[call](symbolic)
    real = CALLS[call](x)
    for one, other in zip(fake, real, strict=True):
        assert (one.dtype, one.dim()) == (other.dtype, other.dim())
        assert all(isinstance(size, torch.SymInt) or size == 1 for size in one.shape)
    assert not environment.guards, "a fake must not fix sizes"


def test_downcast_fp8_takes_symbolic_sizes() -> None:
    def fn(k: Any, kc: Any, loc: Any) -> None:
        ops.downcast_fp8(k, None, kc, None, None, None, loc, "div:2.0", "", E4, offset=k.shape[0])

    def given(tokens: int, slots: int) -> tuple[Any, ...]:
        cache = torch.zeros(slots, 2, 8, dtype=torch.uint8).view(E4)
        return torch.randn(tokens, 2, 8), cache, torch.arange(tokens)

    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(fn, backend=counter, dynamic=True)
    for tokens, slots in ((4, 16), (5, 33), (7, 20)):
        compiled(*given(tokens, slots))
    assert counter.frame_count == 1


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "rows_of_a_wider_buffer"])
def test_out_overloads_write_what_the_functions_return(layout: str) -> None:
    x = _layouts()[layout]
    one = ops.fp8_downcast(x, [], "mul:0.5", E4)
    out = torch.empty_like(one)
    ops.fp8_downcast.out(x, [], "mul:0.5", E4, out=out)
    assert torch.equal(out.view(torch.uint8), one.view(torch.uint8)) and out.stride() == one.stride()
    q, s = ops.fp8_quantize(x, "row", *ROW, E4)
    outs = torch.empty_like(q), torch.empty_like(s)
    ops.fp8_quantize.out(x, "row", *ROW, E4, out0=outs[0], out1=outs[1])
    assert torch.equal(outs[0].view(torch.uint8), q.view(torch.uint8)) and torch.equal(outs[1], s)


# test_schema compares inputs with allclose, which float8 does not have: it fails whatever the op when one is passed in.
EVERYTHING = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_opcheck_fp8_downcast() -> None:
    x = torch.randn(6, 8).bfloat16()
    for operands, program in (([], "mul:0.5"), ([torch.tensor(0.5)], STATIC), ([torch.rand(6, 1)], "mul:r0")):
        torch.library.opcheck(ops.fp8_downcast.default, (x, operands, program, E4), test_utils=EVERYTHING[1:])


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_opcheck_fp8_quantize(granularity: str) -> None:
    x = torch.randn(6, 8).bfloat16()
    torch.library.opcheck(ops.fp8_quantize.default, (x, granularity, *ROW, E4), test_utils=EVERYTHING[1:])


@pytest.mark.parametrize("as_bytes", [False, True])
def test_opcheck_downcast_fp8(as_bytes: bool) -> None:
    k, loc, s = torch.randn(4, 2, 8).bfloat16(), torch.tensor([3, 1, 0, 9]), torch.tensor(0.5)
    caches = [torch.zeros(16, 2, 8, dtype=torch.uint8) for _ in range(2)]
    caches = caches if as_bytes else [cache.view(E4) for cache in caches]
    tests = EVERYTHING if as_bytes else EVERYTHING[1:]
    torch.library.opcheck(ops.downcast_fp8.default, (k, k, *caches, s, s, loc, STATIC, STATIC, E4), test_utils=tests)


def test_schemas_say_what_is_written() -> None:
    written = {
        name: [argument.name for argument in getattr(ops, name).default._schema.arguments if argument.is_write]
        for name in ("fp8_downcast", "fp8_quantize", "downcast_fp8")
    }
    assert written == {"fp8_downcast": [], "fp8_quantize": [], "downcast_fp8": ["k_cache", "v_cache"]}
