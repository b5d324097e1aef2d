"""scaled_mm_add: reference, arguments, the choice of a kernel; on a GPU against the two operators that it replaces.

    pytest -m gpu tests/kernels/test_scaled_mm_add.py
"""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from inductor_ext import jit, registry
from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm import product
from inductor_ext.kernels.scaled_mm.config import parse
from inductor_ext.kernels.scaled_mm_add.op import DEFAULT, MAX_ACCUMULATORS, OP, TABLE

E4 = torch.float8_e4m3fn
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CONFIGS = ("tile:64x128p", "tile:128x128p", "tile:128x160p", "tile:128x128c", "tile:128x256c", "tile:256x128c@2x1")
SHAPES = ((1, 16, 16), (7, 48, 128), (130, 528, 2064), (1000, 1056, 400), (2999, 2064, 144))


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    registry.ops()


def operands(device: str, m: int, n: int, k: int, rowwise: bool = True, dtype: torch.dtype = BF16) -> list[torch.Tensor]:
    """a, b, their scales and a residual that a product's rounding shows in."""
    torch.manual_seed(m + n + k)
    a, b = torch.randn(m, k, device=device).to(E4), torch.randn(n, k, device=device).to(E4).t()
    scales = [torch.rand(shape if rowwise else (), device=device) + 0.5 for shape in ((m, 1), (1, n))]
    return [a, b, *scales, (torch.randn(m, n, device=device) * k**0.5).to(dtype)]


def run(x: list[torch.Tensor], *, bias: Any = None, dtype: Any = BF16, fast: bool = True, config: str = "") -> torch.Tensor:
    """Through ``.out``, into a buffer of NaN: what is not written shows."""
    *inputs, residual = x
    out = torch.full(residual.shape, float("nan"), device=residual.device, dtype=dtype)
    torch.ops.inductor_ext.scaled_mm_add.out(*inputs, bias, residual, dtype, fast, False, config, out=out)
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("rowwise", [True, False])
def test_the_reference_rounds_twice(rowwise: bool, dtype: torch.dtype) -> None:
    x = operands("cpu", 24, 32, 64, rowwise, dtype)
    a, b, scale_a, scale_b, residual = x
    bias = torch.randn(32).to(dtype)
    product = ((a.float() @ b.float()) * scale_a * scale_b + bias.float()).to(dtype)
    assert torch.equal(run(x, bias=bias, dtype=dtype), product + residual)


def test_rows_of_a_wider_tensor() -> None:
    x = operands("cpu", 24, 32, 64)
    wide = torch.randn(24, 96).to(BF16)
    assert torch.equal(run([*x[:4], wide[:, 32:64]]), run([*x[:4], wide[:, 32:64].contiguous()]))


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.zeros(24, 32), TypeError, "residual: wanted torch.bfloat16 of two dimensions, .* found torch.float32"),
        (torch.zeros(24 * 32, dtype=BF16), TypeError, "found torch.bfloat16 of shape \\(768,\\)"),
        (torch.zeros(24, 16, dtype=BF16), ValueError, "residual: wanted shape \\(24, 32\\), found \\(24, 16\\)"),
    ],
)
def test_bad_residuals(residual: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch.ops.inductor_ext.scaled_mm_add(*operands("cpu", 24, 32, 64)[:4], None, residual, BF16, True, False, "")


def test_every_choice_is_a_kernel_that_adds() -> None:
    shapes, either = ((1024, 2048), (1024, 3072), (4096, 14336)), (True, False)
    for m, (n, k), rowwise, fast in itertools.product((1, 64, 512, 7168, 16384), shapes, either, either):
        config = parse(TABLE.choose("sm_90a", m, n, k, rowwise, fast))
        assert config.family == "tile" and config.supports(not fast) and config.accumulators <= MAX_ACCUMULATORS
    assert TABLE.choose("sm_100a", 512, 1024, 1024, True, True) == ""


def test_the_table_says_where_it_pays() -> None:
    """Qwen3-0.6B's o and down do on an H200, Llama-3.1-8B's do not; fewer rows than were measured are not known."""
    shapes = ((1024, 2048), (1024, 3072), (4096, 4096), (4096, 14336))
    pays = [TABLE.decide("sm_90a", 7168, n, k, True, True) for n, k in shapes]
    assert [found.use for found in pays if found is not None] == [True, True, False, False]
    assert all(found is not None and "a product and a norm that adds at M=7168" in found.why for found in pays)
    fewer, least = (TABLE.decide("sm_90a", m, 1024, 2048, True, True) for m in (511, 512))
    assert fewer is None and least is not None
    assert TABLE.decide("sm_90a", 7168, 1024, 2048, True, False) is None, "exact accumulation was not measured"
    assert TABLE.decide("sm_100a", 7168, 1024, 2048, True, True) is None


def test_keys_of_a_symbolic_number_of_rows() -> None:
    """Each a tuple of a name and dtypes: a symbolic truth value among them cannot be looked up."""
    env = ShapeEnv()
    m = env.create_unbacked_symint()
    torch._check(m >= 512)
    with FakeTensorMode(shape_env=env):
        given = torch.empty(m, 2048, dtype=E4), torch.empty(2048, 1024, dtype=E4), torch.empty(m, 1), torch.empty(1, 1024)
        with mock.patch.object(product, "target_of", lambda device: "sm_90a"):
            found = OP.kernel.keys(*given, None, None, BF16, True, False, "")
    assert {type(each) for key in found for each in key} == {str, torch.dtype, bool}
    assert {key[0] for key in found} == {"tile:64x128p", "tile:128x128c", "tile:128x128p"}


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def kernels(arch: str) -> list[jit.JitSpec]:
    keys = [(name, E4, E4, BF16, True) for name in CONFIGS] + [(DEFAULT, E4, E4, each, True) for each in (FP16, FP32)]
    keys += [("tile:128x128c", E4, E4, BF16, False)]
    return [op.spec_of_key(key, arch) for op in (OP, scaled_mm.OP) for key in keys]


hopper = pytest.mark.gpu(kernels=kernels, arch="sm_90a")


def separate(x: list[torch.Tensor], bias: Any, dtype: torch.dtype, fast: bool, config: str) -> torch.Tensor:
    """The same kernel without a residual, and PyTorch's addition: the bytes that are wanted."""
    a, b, scale_a, scale_b, residual = x
    product = torch.empty_like(residual)
    torch.ops.inductor_ext.scaled_mm.out([a], [b], [scale_a], [scale_b], [bias], dtype, fast, False, config, out=product)
    return product + residual


@hopper
@pytest.mark.parametrize("config", CONFIGS)
def test_the_bytes_of_a_product_and_a_sum(config: str) -> None:
    for shape, rowwise in itertools.product(SHAPES, (True, False)):
        x = operands("cuda", *shape, rowwise)
        bias = torch.randn(shape[1], device="cuda").to(BF16) if rowwise else None
        assert torch.equal(run(x, bias=bias, config=config), separate(x, bias, BF16, True, config)), (config, shape, rowwise)


@hopper
@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = operands("cuda", *shape, dtype=dtype)
        assert torch.equal(run(x, dtype=dtype, config=DEFAULT), separate(x, None, dtype, True, DEFAULT)), shape


@hopper
def test_exact_accumulation_and_extremes() -> None:
    x = operands("cuda", 300, 272, 1040)
    x[4][0, 0], x[4][1, 1], x[4][299, 271] = float("nan"), float("inf"), -float("inf")
    config = "tile:128x128c"
    found, wanted = run(x, fast=False, config=config), separate(x, None, BF16, False, config)
    assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.nan_to_num(), wanted.nan_to_num())


@hopper
def test_a_wide_residual_another_stream_and_a_graph() -> None:
    x = operands("cuda", 500, 272, 400)
    wide = torch.randn(500, 816, device="cuda").to(BF16)
    x[4] = wide[:, 272:544]
    wanted = separate([*x[:4], x[4].contiguous()], None, BF16, True, DEFAULT)
    assert torch.equal(run(x, config=DEFAULT), wanted)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(x, config=DEFAULT)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x, config=DEFAULT)
    x[4].copy_(torch.randn(500, 272, device="cuda"))
    graph.replay()
    assert torch.equal(captured, separate([*x[:4], x[4].contiguous()], None, BF16, True, DEFAULT))


@hopper
def test_no_rows() -> None:
    assert run(operands("cuda", 0, 48, 64), config=DEFAULT).shape == (0, 48)
