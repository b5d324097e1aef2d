"""What one declaration of an op gives: schema, fake, reference, ``.out``, lowering; with an op made up for the test."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from inductor_ext import jit, lowering, registry
from inductor_ext.errors import BuildError
from inductor_ext.op import Kernel, Op
from inductor_ext.signature import Call
from tests.support.compiled import run_compiled, run_copies
from tests.support.equal import assert_all_same_bytes, assert_same_bytes
from tests.support.fakegpu import fake_gpu

E4 = torch.float8_e4m3fn
PROGRAM = "f32 div:s0 max:-448.0 min:448.0"


def _halves(x: torch.Tensor, times: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x * times, (x * times).sum(-1)


@pytest.fixture(scope="module")
def two_outputs() -> Op:
    op = Op(
        "test_two_outputs",
        "for tests",
        reference=_halves,
        fake=lambda x: (torch.empty_like(x), x.new_empty(x.shape[:-1])),
        kernel=Kernel(
            source="nowhere.cuh",
            key=lambda x: x.dtype,
            exports=lambda key: "nowhere::run",
            bind=lambda module, key: module,
        ),
    )
    op.define()
    lowering.define(op)
    return op


def test_one_declaration_gives_both_overloads(two_outputs: Op) -> None:
    assert two_outputs.packet.overloads() == ["default", "out"]
    out = two_outputs.packet.out._schema
    assert [argument.name for argument in out.arguments if argument.is_write] == ["out0", "out1"]
    assert not two_outputs.mutates and torch.Tag.pt2_compliant_tag in two_outputs.overload.tags


def test_the_reference_runs_on_the_cpu(two_outputs: Op) -> None:
    x = torch.randn(4, 8)
    assert_all_same_bytes(two_outputs.packet(x, 2.0), _halves(x, 2.0))
    outs = torch.empty(4, 8), torch.empty(4)
    assert two_outputs.packet.out(x, 2.0, out0=outs[0], out1=outs[1]) is None
    assert_all_same_bytes(outs, _halves(x, 2.0))


def test_out_may_have_other_strides(two_outputs: Op) -> None:
    x, wide = torch.randn(4, 8), torch.zeros(4, 16)
    two_outputs.packet.out(x, 2.0, out0=wide[:, ::2], out1=torch.empty(4))
    assert_same_bytes(wide[:, ::2], x * 2.0)
    assert not wide[:, 1::2].any()


def test_the_fake_runs_for_fake_tensors(two_outputs: Op) -> None:
    with FakeTensorMode():
        one, two = two_outputs.packet(torch.empty(4, 8), 2.0)
    assert (one.shape, two.shape) == ((4, 8), (4,))


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_with_our_backend_and_with_stock_inductor(two_outputs: Op, dynamic: bool) -> None:
    def fn(x: Any) -> Any:
        one, two = torch.ops.inductor_ext.test_two_outputs(x + 1, 2.0)
        return one.sin(), two + 1

    x = torch.randn(4, 8)
    found, _ = run_compiled(fn, (x,), dynamic=dynamic)
    for ours, eager in zip(found, run_copies(fn, (x,)), strict=True):
        torch.testing.assert_close(ours, eager)
    torch._dynamo.reset()
    for stock, eager in zip(torch.compile(fn, dynamic=dynamic)(x), fn(x), strict=True):
        torch.testing.assert_close(stock, eager)


def test_a_persons_own_call_with_keywords() -> None:
    def fn(k: Any, cache: Any, loc: Any, x: Any, s: Any) -> Any:
        ops = torch.ops.inductor_ext
        ops.downcast_fp8(k, None, cache, None, s, None, loc=loc, k_program=PROGRAM, v_program="", dtype=E4, wrap=True)
        return ops.fp8_downcast(x, operands=[s], dtype=E4, program=PROGRAM)

    k, x, s = torch.randn(4, 2, 8).bfloat16(), torch.randn(8, 8).bfloat16(), torch.tensor(0.5)
    cache = torch.zeros(16, 2, 8, dtype=torch.uint8).view(E4)
    given = (k, cache, torch.tensor([-1, 0, 3, -5]), x, s)
    found, _ = run_compiled(fn, given)
    assert_all_same_bytes(found, run_copies(fn, given))
    assert_same_bytes(found[2][15], (k[0].float() / s).clamp(-448, 448).to(E4))


def test_export_keeps_the_op() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Any, s: Any) -> Any:
            return torch.ops.inductor_ext.fp8_downcast(x, [s], PROGRAM, E4)

    x, s = torch.randn(8, 8).bfloat16(), torch.tensor(0.5)
    program = torch.export.export(Model(), (x, s))
    assert "torch.ops.inductor_ext.fp8_downcast.default" in program.graph_module.code
    assert_same_bytes(program.module()(x, s), Model()(x, s))


def test_the_spec_of_a_call() -> None:
    op = next(op for op in registry.ops() if op.name == "fp8_downcast")
    x, s = torch.empty(8, 8, dtype=torch.bfloat16), torch.empty(())
    (spec,) = op.specs((x, [s], PROGRAM, E4), "sm_90a")
    assert spec is not None
    assert (spec.name, spec.source, spec.arch) == ("fp8_downcast", "fp8_downcast/fp8_downcast.cuh", "sm_90a")
    assert [spec] == op.specs((x[:4], [s + 1], PROGRAM, E4), "sm_90a"), "neither sizes nor values are compiled in"
    assert [spec] != op.specs((x.float(), [s], PROGRAM, E4), "sm_90a")
    assert jit.JitSpec.from_dict(spec.to_dict()) == spec


def _shift(key: torch.Tensor, device: int, run: float) -> torch.Tensor:
    return key * run + device


def _positive(device: int) -> None:
    if device < 0:
        raise ValueError(f"test_names: device: wanted 0 or more, found {device}")


@pytest.fixture(scope="module")
def names() -> Op:
    """Its arguments are called what the function that runs an op might call its own."""
    op = Op(
        "test_names",
        "for tests",
        reference=_shift,
        checks=[_positive],
        fake=lambda key: torch.empty_like(key),
        kernel=Kernel(
            source="nowhere.cuh",
            key=lambda run, key: (key.dtype, run),
            exports=lambda key: "nowhere::run",
            bind=lambda module, key: Call(module, "out, scale, key, device", scale=key[1]),
        ),
    )
    op.define()
    return op


def test_a_call_takes_outputs_by_name(names: Op) -> None:
    out = torch.empty(4, 8)
    names._call(x := torch.randn(4, 8), 3, 0.5, out=out)
    assert_same_bytes(out, _shift(x, 3, 0.5))


def test_a_kernel_gets_what_bind_names(names: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(Op, "_bound", lambda self, key, device: self.kernel.bind(lambda *args: given.append(args), key))
    names._loaded.clear()
    x, out = torch.randn(4, 8), torch.empty(4, 8)
    names._call(x, 3, 0.5, out=out)
    ((first, scale, second, device),) = given
    assert (scale, device) == (0.5, 3) and first is out and second is x


def test_checks_come_before_the_fake_and_the_reference(names: Op) -> None:
    for function in (names.fake, names.reference, names.overload):
        with pytest.raises(ValueError, match="test_names: device: wanted 0 or more, found -1"):
            function(torch.randn(4, 8), -1, 0.5)


# ---- kernels that cannot be had -------------------------------------------------------------------------------------------


class _Cuda:
    """Stands for the device of a CUDA tensor."""

    type, index = "cuda", 0


def test_no_kernel_costs_one_warning_and_runs_the_reference(
    two_outputs: Op, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(spec: Any, options: Any) -> Any:
        raise BuildError("kernel test_two_outputs was not built: no nvcc")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(jit, "load", load)
    monkeypatch.setattr(jit, "current_arch", lambda options=None: "sm_90a")
    two_outputs._loaded.clear()
    with caplog.at_level(logging.WARNING, logger="inductor_ext"):
        first = two_outputs._bound(torch.float32, _Cuda())  # type: ignore[arg-type]
    x, outs = torch.randn(4, 8), (torch.empty(4, 8), torch.empty(4))
    first(x, 2.0, *outs)
    assert_all_same_bytes(outs, _halves(x, 2.0))
    (record,) = [record for record in caplog.records if record.name == "inductor_ext"]
    assert "running PyTorch's own operators instead" in record.getMessage() and "no nvcc" in record.getMessage()
    assert two_outputs._loaded[torch.float32, 0] is first, "asked for once"
    two_outputs._loaded.clear()


def test_an_older_device_costs_one_warning(
    two_outputs: Op, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    two_outputs._loaded.clear()
    with caplog.at_level(logging.WARNING, logger="inductor_ext"):
        two_outputs._bound(torch.float32, _Cuda())  # type: ignore[arg-type]
    assert "test_two_outputs: needs compute capability 8.9, found 8.0" in caplog.text
    two_outputs._loaded.clear()


# ---- order of reads and writes ----------------------------------------------------------------------------------------------


def test_reads_of_a_buffer_come_before_an_ops_write_to_it() -> None:
    """Inductor computes ``index`` when it is used, after the op, unless the lowering tells it that the buffer changes."""

    def fn(k: Any, cache: Any, at: Any) -> Any:
        old = cache[at]
        torch.ops.inductor_ext.downcast_fp8(k, None, cache, None, None, None, at, "div:0.5", "", E4)
        return old.float() + 1

    given = (torch.randn(4, 2, 8).bfloat16(), torch.zeros(16, 2, 8, dtype=torch.uint8).view(E4), torch.arange(4))
    found, _ = run_compiled(fn, given)
    assert_all_same_bytes(found, run_copies(fn, given))


@pytest.fixture(scope="module")
def scratching() -> Op:
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    op = Op(
        "test_keeps",
        "for tests",
        reference=reference,
        fake=torch.empty_like,
        kernel=Kernel(
            source="nowhere.cuh",
            key=lambda x: None if x.dtype is torch.float64 else x.dtype,
            exports=lambda key: "nowhere::run",
            bind=lambda module, key: module,
            scratch=lambda x: 0 if x.dtype is torch.float64 else 96,
        ),
    )
    op.define()
    lowering.define(op)
    return op


def test_scratch_is_planned_as_outputs_are(scratching: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(Op, "_bound", lambda self, key, device: lambda *values: given.append(values))

    def fn(x: Any) -> Any:
        return torch.ops.inductor_ext.test_keeps(x.sin()).cos()

    run_compiled(fn, (torch.randn(4, 8),))
    ((_, out, scratch),) = given
    assert scratch.shape == (96,) and scratch.dtype is torch.uint8
    assert scratch.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_does_without_scratch(scratching: Op, dtype: torch.dtype) -> None:
    def fn(x: Any) -> Any:
        return torch.ops.inductor_ext.test_keeps(x.sin()).cos()

    x = torch.randn(4, 8, dtype=dtype)
    torch.testing.assert_close(run_compiled(fn, (x,))[0][0], (x.sin() + 1).cos())
    out, scratch = torch.empty(4, 8, dtype=dtype), torch.empty(96, dtype=torch.uint8)
    scratching.packet.out(x, out=out)
    assert_same_bytes(out, x + 1)
    scratching.packet.out(x + 1, out=out, scratch=scratch)
    assert_same_bytes(out, x + 1 + 1)


def test_only_an_op_with_scratch_has_it_in_its_schema(scratching: Op, two_outputs: Op) -> None:
    assert str(scratching.packet.out._schema).count("scratch") == 1
    assert "scratch" not in str(two_outputs.packet.out._schema) and "scratch" not in str(scratching.overload._schema)


def test_the_lowering_plans_buffers_with_the_fakes_strides() -> None:
    def fn(x: Any, s: Any) -> Any:
        return torch.ops.inductor_ext.fp8_downcast(x, [s], PROGRAM, E4)

    def make() -> tuple[Any, ...]:
        return torch.empty(64, 32, dtype=torch.bfloat16, device="cuda").t(), torch.empty((), device="cuda")

    import inductor_ext

    with fake_gpu() as gpu:
        source = gpu.source(fn, make, backend=inductor_ext.backend(build="defer"))
    assert "empty_strided_cuda((32, 64), (1, 32), torch.float8_e4m3fn)" in source
