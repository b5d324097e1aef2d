"""scaled_mm_act_mul: reference, arguments, the choice of a kernel; on a GPU against the operators that it replaces.

    pytest -m gpu tests/kernels/test_scaled_mm_act_mul.py

The kernel's own source, run on the CPU: test_scaled_mm_tile_cpu.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from inductor_ext import jit, registry
from inductor_ext.kernels.act_mul_quantize.op import ACTIVATIONS
from inductor_ext.kernels.scaled_mm.config import parse
from inductor_ext.kernels.scaled_mm.op import OP as SCALED_MM
from inductor_ext.kernels.scaled_mm_act_mul.op import DEFAULT, EXACT, OP, TABLE, is_ours
from tests.support.equal import assert_same_bytes

E4 = torch.float8_e4m3fn
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CONFIGS = ("tile:64x128p", DEFAULT, "tile:64x256p", EXACT, "tile:128x256c", "tile:256x128c@2x1", "tile:128x128p@1x2")
SHAPES = ((1, 16, 16), (7, 48, 128), (130, 528, 2064), (1000, 1056, 400), (2999, 2064, 144))


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    registry.ops()


def operands(device: str, m: int, n: int, k: int, rowwise: bool = True) -> list[torch.Tensor]:
    """a, gate, up, and their scales: products of about 3, so that the activation is neither 0 nor its argument."""
    torch.manual_seed(m + n + k)
    a, *weights = (torch.randn(rows, k, device=device).to(E4) for rows in (m, n, n))
    shapes = ((m, 1), (1, n), (1, n)) if rowwise else ((), (), ())
    scales = [(torch.rand(shape, device=device) + 0.5) * 1.5 / k**0.25 for shape in shapes]
    return [a, *(weight.t() for weight in weights), *scales]


def biases(n: int, device: str = "cuda", dtype: torch.dtype = BF16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, device=device).to(dtype), torch.randn(n, device=device).to(dtype)


def run(
    x: list[torch.Tensor],
    act: str = "silu",
    *,
    bias: Any = (None, None),
    dtype: Any = BF16,
    fast: bool = True,
    config: str = "",
) -> torch.Tensor:
    """Through ``.out``, into a buffer of NaN: what is not written shows."""
    out = torch.full((x[0].shape[0], x[1].shape[1]), float("nan"), device=x[0].device, dtype=dtype)
    torch.ops.inductor_ext.scaled_mm_act_mul.out(*x, *bias, act, dtype, fast, False, config, out=out)
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_reference_rounds_each_step(act: str, dtype: torch.dtype) -> None:
    x = operands("cpu", 24, 32, 64)
    a, gate, up, scale_a, scale_gate, scale_up = x
    bias = biases(32, "cpu", dtype)
    g = ((a.float() @ gate.float()) * scale_a * scale_gate + bias[0].float()).to(dtype)
    u = ((a.float() @ up.float()) * scale_a * scale_up + bias[1].float()).to(dtype)
    found, wanted = run(x, act, bias=bias, dtype=dtype), ACTIVATIONS[act](g) * u
    # GELU of a CPU depends on whether the numbers lie side by side.
    torch.testing.assert_close(found, wanted, rtol=0.0 if act == "silu" else 2**-7, atol=0.0 if act == "silu" else 2**-9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"act": "relu"}, ValueError, "act: wanted one of silu, gelu, gelu_tanh, found 'relu'"),
        ({"dtype": FP32}, TypeError, "out_dtype: wanted bfloat16 or float16, found torch.float32"),
        ({"config": "tile:128x160p"}, ValueError, "config: wanted a tile of 128 or 256 channels, found 'tile:128x160p'"),
        ({"up": (48, 64)}, ValueError, r"up: wanted torch.float8_e4m3fn of shape \(64, 32\) .* found .* of shape \(64, 48\)"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x = operands("cpu", 24, 32, 64)
    if "up" in change:
        x[2] = torch.zeros(change["up"]).to(E4).t()
    act, dtype, config = change.get("act", "silu"), change.get("dtype", BF16), change.get("config", "")
    with pytest.raises(error, match=message):
        torch.ops.inductor_ext.scaled_mm_act_mul(*x, None, None, act, dtype, True, False, config)


def test_every_choice_is_a_kernel_that_gates() -> None:
    shapes, either = ((3072, 1024), (12288, 4096), (14336, 4096), (512, 256)), (True, False)
    for m, (n, k), rowwise, fast in itertools.product((1, 64, 512, 7168, 16384), shapes, either, either):
        config = parse(TABLE.choose("sm_90a", m, n, k, rowwise, fast))
        assert is_ours(config) and config.supports(not fast)
    assert TABLE.choose("sm_100a", 512, 1024, 1024, True, True) == ""
    assert TABLE.decide("sm_100a", 7168, 3072, 1024, True, True) is None
    assert TABLE.decide("sm_90a", 7168, 3072, 1024, True, False) is None, "exact accumulation was not measured"


def test_the_table_says_where_it_pays() -> None:
    """Qwen3-0.6B's gate and up do on an H200, Llama-3.1-8B's do not; fewer rows than were measured are not known."""
    row, tensor, large = (
        TABLE.decide("sm_90a", 7168, n, k, rowwise, True)
        for n, k, rowwise in ((3072, 1024, True), (3072, 1024, False), (14336, 4096, True))
    )
    assert row is not None and tensor is not None and large is not None
    assert [row.use, tensor.use, large.use] == [True, True, False]
    assert "the products and act_mul_quantize at M=7168" in row.why
    assert TABLE.decide("sm_90a", 511, 3072, 1024, True, True) is None


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def kernels(arch: str) -> list[jit.JitSpec]:
    plain = [(name, E4, E4, BF16, True) for name in CONFIGS if name != EXACT]
    plain += [(DEFAULT, E4, E4, FP16, True), (EXACT, E4, E4, BF16, False)]
    specs = [SCALED_MM.spec_of_key(key, arch) for key in plain] + [OP.spec_of_key((*key, "silu"), arch) for key in plain]
    specs += [OP.spec_of_key((DEFAULT, E4, E4, BF16, True, act), arch) for act in ACTIVATIONS]
    return specs


hopper = pytest.mark.gpu(kernels=kernels, arch="sm_90a")


def separate(
    x: list[torch.Tensor],
    act: str = "silu",
    *,
    bias: Any = (None, None),
    dtype: Any = BF16,
    fast: bool = True,
    config: str = "",
) -> torch.Tensor:
    """The same kernel storing both products, and PyTorch's activation: the bytes that are wanted."""
    a, gate, up, scale_a, *scales = x
    both = torch.empty(a.shape[0], 2 * gate.shape[1], device="cuda", dtype=dtype)
    arguments = [a], [gate, up], [scale_a], scales, list(bias), dtype, fast, False, config
    torch.ops.inductor_ext.scaled_mm.out(*arguments, out=both)
    g, u = both.chunk(2, 1)
    return ACTIVATIONS[act](g) * u


@hopper
@pytest.mark.parametrize("config", CONFIGS)
def test_the_bytes_of_products_and_an_activation(config: str) -> None:
    fast = config != EXACT
    for (m, n, k), rowwise in itertools.product(SHAPES, (True, False)):
        x = operands("cuda", m, n, k, rowwise)
        options: dict[str, Any] = {"fast": fast, "config": config, "bias": biases(n) if rowwise else (None, None)}
        assert_same_bytes(run(x, **options), separate(x, **options), f"{config} {m} {n} {k}")
        x[1], x[2] = x[2], x[1]  # the other one of the two lies first in memory
        assert_same_bytes(run(x, **options), separate(x, **options), f"{config} {m} {n} {k}")


@hopper
def test_every_16_bit_number() -> None:
    """1 · 1 · scale is any number at all: a channel for each that gate can be, in bf16."""
    every = torch.arange(65536, device="cuda", dtype=torch.int32).to(torch.int16).view(BF16)
    ones = torch.zeros(65536, 16, device="cuda").to(E4)
    ones[:, 0] = torch.ones(65536, device="cuda").to(E4)
    a = ones[:3].clone()
    one = torch.ones((), device="cuda")
    for up in (1.0, -0.375):
        x = [a, ones.t(), ones.clone().t(), one, every.float().reshape(1, -1), torch.full((1, 65536), up, device="cuda")]
        wanted = (torch.nn.functional.silu(every) * torch.tensor(up, device="cuda", dtype=BF16)).expand(3, -1)
        assert_same_bytes(run(x, config=DEFAULT), wanted)


@hopper
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act: str) -> None:
    for shape in SHAPES:
        x = operands("cuda", *shape)
        found, wanted = run(x, act, config=DEFAULT), separate(x, act, config=DEFAULT)
        if act == "silu":
            assert_same_bytes(found, wanted)
        else:  # PyTorch's own erf and tanh may be compiled otherwise
            torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-9)


@hopper
def test_fp16() -> None:
    for m, n, k in SHAPES:
        x = operands("cuda", m, n, k)
        options: dict[str, Any] = {"dtype": FP16, "config": DEFAULT, "bias": biases(n, dtype=FP16)}
        assert_same_bytes(run(x, **options), separate(x, **options))


@hopper
def test_halves_of_one_weight_another_stream_and_a_graph() -> None:
    x = operands("cuda", 500, 272, 400)
    both = torch.randn(3 * 272, 400, device="cuda").to(E4)
    for first, second in ((0, 272), (544, 0)):
        x[1], x[2] = both[first : first + 272].t(), both[second : second + 272].t()
        wanted = separate(x, config=DEFAULT)
        assert_same_bytes(run(x, config=DEFAULT), wanted)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(x, config=DEFAULT)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bytes(found, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x, config=DEFAULT)
    x[3].copy_(torch.rand(500, 1, device="cuda"))
    graph.replay()
    assert_same_bytes(captured, separate(x, config=DEFAULT))


@hopper
def test_no_rows() -> None:
    assert run(operands("cuda", 0, 48, 64), config=DEFAULT).shape == (0, 48)
