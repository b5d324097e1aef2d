"""scaled_mm on a GPU: against fp64, against what PyTorch's operator loses to it, and the ways a kernel is really called.

    pytest -m gpu tests/kernels/test_scaled_mm_gpu.py
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from inductor_ext import jit
from inductor_ext.kernels.fp8_downcast.op import OP as DOWNCAST
from inductor_ext.kernels.scaled_mm import choice
from inductor_ext.kernels.scaled_mm.config import Config, parse
from inductor_ext.kernels.scaled_mm.op import OP
from tests.support.fakegpu import fake_cuda_inputs

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STREAMS = ("stream:8x64/1", "stream:8x128/4", "stream:16x64/8", "stream:32x128/2", "stream:64x64/4", "stream:128x128/2")
PINGPONG = ("tile:64x128p", "tile:64x256p", "tile:128x128p", "tile:128x160p", "tile:128x192p")
COOPERATIVE = ("tile:128x128c", "tile:128x256c")
CLUSTERS = ("tile:256x128c@2x1", "tile:128x128p@2x1", "tile:128x128p@1x2")
CONFIGS = (*STREAMS, *PINGPONG, *COOPERATIVE, *CLUSTERS)
#: Around every tile's edges, and K of one stage, less than one, and not a multiple of one.
SHAPES = ((1, 16, 16), (7, 48, 128), (33, 1040, 272), (130, 528, 2064), (1000, 1056, 400), (2999, 2064, 144))
TENSOR_ARGUMENTS = ("a", "b", "scale_a", "scale_b", "bias")


MEASURED = (1, 2, 16, 17, 64, 100, 128, 500, 1024, 3000, 16384)
DTYPES = ((E4, E5, BF16), (E5, E4, BF16), (E4, E4, FP16), (E4, E4, FP32), (E5, E4, FP32))


def kernels(arch: str) -> list[jit.JitSpec]:
    keys = [(name, E4, E4, BF16, True) for name in CONFIGS]
    keys += [(name, E4, E4, BF16, False) for name in CONFIGS if parse(name).supports(True)]
    keys += [(name, *dtypes, True) for name in ("stream:16x64/8", "tile:128x128c") for dtypes in DTYPES]
    keys += [("stream:64x128/2", E4, E4, BF16, True)]
    specs = [OP.spec_of_key(key, arch) for key in keys]
    specs += DOWNCAST.specs((torch.empty(1, dtype=BF16), [], "f32 max:-448.0 min:448.0", E4), arch)
    with FakeTensorMode(), fake_cuda_inputs():  # what the table chooses
        for m, row, (n, k) in itertools.product(MEASURED, (True, False), ((1024, 1024), (64, 128))):
            a, b = torch.empty(m, k, dtype=E4, device="cuda"), torch.empty(n, k, dtype=E4, device="cuda").t()
            scales = torch.empty((m, 1) if row else (), device="cuda"), torch.empty((1, n) if row else (), device="cuda")
            specs += OP.specs(([a], [b], [scales[0]], [scales[1]], [None], BF16, True, False, ""), arch)
    return specs


pytestmark = pytest.mark.gpu(kernels=kernels, arch="sm_90a")


def operands(
    m: int, n: int, k: int, *, row: bool = True, column: bool = True, dtypes: Any = (E4, E4), seed: int = 0
) -> list[Any]:
    made = torch.Generator("cuda").manual_seed(seed)
    a = torch.randn(m, k, device="cuda", generator=made).to(dtypes[0])
    b = torch.randn(n, k, device="cuda", generator=made).to(dtypes[1]).t()
    scale_a = torch.rand((m, 1) if row else (), device="cuda", generator=made) + 0.5
    scale_b = torch.rand((1, n) if column else (), device="cuda", generator=made) + 0.5
    return [a, b, scale_a, scale_b]


def exact(a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Any = None) -> torch.Tensor:
    product = (a.double() @ b.double()) * scale_a.double() * scale_b.double()
    return product if bias is None else product + bias.double()


def run(
    x: list[Any], config: str = "", *, bias: Any = None, dtype: Any = BF16, fast: bool = True, out: Any = None
) -> torch.Tensor:
    """Through ``.out``, into a buffer of NaN if none is given: what is not written shows."""
    a, b, scale_a, scale_b = x
    if out is None:
        out = torch.full((a.shape[0], b.shape[1]), float("nan"), device="cuda", dtype=dtype)
    torch.ops.inductor_ext.scaled_mm.out([a], [b], [scale_a], [scale_b], [bias], dtype, fast, False, config, out=out)
    return out


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "exact"])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_against_fp64(config: str, fast: bool) -> None:
    if not parse(config).supports(not fast):
        pytest.skip(f"{config} has no exact form: its sums would not fit the registers")
    for (m, n, k), row in itertools.product(SHAPES, (True, False)):
        x = operands(m, n, k, row=row, column=row)
        assert distance(run(x, config, fast=fast), exact(*x)) < 4e-3, (m, n, k, row)


@pytest.mark.parametrize("config", ["stream:16x64/8", "tile:128x128c"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(config: str, dtypes: Any) -> None:
    *operand_dtypes, out_dtype = dtypes
    x = operands(77, 144, 528, dtypes=operand_dtypes)
    bias = torch.randn(144, device="cuda").to(out_dtype)
    limit = {BF16: 4e-3, FP16: 8e-4, FP32: 6e-4}[out_dtype]  # the tensor core's own sums lose 3.5e-4 at K = 528
    assert distance(run(x, config, bias=bias, dtype=out_dtype), exact(*x, bias)) < limit


@pytest.mark.parametrize("config", ["stream:64x64/4", "tile:128x128p"])
@pytest.mark.parametrize(("row", "column"), itertools.product((True, False), repeat=2))
def test_every_combination_of_scales_in_one_binary(config: str, row: bool, column: bool) -> None:
    x = operands(70, 208, 256, row=row, column=column)
    assert distance(run(x, config), exact(*x)) < 4e-3
    flat = [x[0], x[1], x[2].reshape(-1), x[3].reshape(-1)]
    assert torch.equal(run(flat, config), run(x, config)), "a scale's shape does not matter, only its length"


def test_exact_accumulation_is_not_fast_accumulation() -> None:
    """1 and 2^-9 in turn, 8 192 of them: the tensor core drops the small ones from a large sum, sums of 128 keep them."""
    m, n, k = 64, 64, 8192
    a = torch.ones(m, k, device="cuda").to(E4)
    b = torch.full((n, k), 2.0**-9, device="cuda")
    b[:, ::2] = 1.0
    x = [a, b.to(E4).t(), torch.ones((), device="cuda"), torch.ones((), device="cuda")]
    wanted = exact(*x)
    for config in ("stream:64x64/1", "tile:128x128c"):
        fast, slow = (distance(run(x, config, dtype=BF16, fast=mode), wanted) for mode in (True, False))
        assert slow <= fast
    stream = [run(operands(64, 64, 16384), "stream:64x64/1", fast=mode) for mode in (True, False)]
    assert not torch.equal(*stream), "both modes gave the same bytes: one of them is not what it says"


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "exact"])
@pytest.mark.parametrize("k", [128, 1024, 4096, 16384])
def test_not_less_accurate_than_pytorch(k: int, fast: bool) -> None:
    for config, row in itertools.product(("stream:64x64/4", "stream:8x64/1", "tile:64x128p", "tile:128x128c"), (True, False)):
        if config.startswith("stream:8") and row:
            continue
        x = operands(256, 512, k, row=row, column=row, seed=k)
        wanted = exact(*x)
        stock = torch._scaled_mm(*x, out_dtype=BF16, use_fast_accum=fast)
        assert distance(run(x, config, fast=fast), wanted) <= distance(stock, wanted) * 1.02, (config, row)


@pytest.mark.parametrize("config", ["stream:16x64/8", "stream:64x64/1", "tile:128x128p", "tile:128x160p"])
def test_strides(config: str) -> None:
    m, n, k = 150, 208, 272
    a = torch.randn(m, k + 48, device="cuda").to(E4)[:, 16 : 16 + k]
    b = torch.randn(n, k + 32, device="cuda").to(E4)[:, :k].t()
    x = [a, b, torch.rand(m, 3, device="cuda")[:, 1:2], torch.rand(2, n, device="cuda")[1:]]
    wide = torch.full((m, n + 96), float("nan"), device="cuda", dtype=BF16)
    run(x, config, out=wide[:, 32 : 32 + n])
    assert distance(wide[:, 32 : 32 + n], exact(*x)) < 4e-3
    assert wide[:, :32].isnan().all() and wide[:, 32 + n :].isnan().all(), "written outside of the destination"


@pytest.mark.parametrize("config", ["stream:16x64/8", "tile:128x128p", ""])
def test_no_rows(config: str) -> None:
    x = operands(0, 64, 128)
    assert run(x, config).shape == (0, 64)
    assert torch.ops.inductor_ext.scaled_mm(*([each] for each in x), [None], BF16, True, False, config).shape == (0, 64)


@pytest.mark.parametrize("config", ["stream:16x64/8", "stream:64x128/2", "tile:128x128p", "tile:128x128c"])
def test_nan_and_inf_stay_in_their_rows_and_columns(config: str) -> None:
    a, b, scale_a, scale_b = operands(100, 96, 256)
    a[3, 17] = float("nan")
    scale_a[5] = float("inf")
    scale_b[0, 7] = float("nan")
    found, wanted = run([a, b, scale_a, scale_b], config), exact(a, b, scale_a, scale_b)
    assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())
    e5 = [a.float().to(E5), b, scale_a, scale_b]
    e5[0][9, 0] = float("inf")
    if config in ("stream:16x64/8", "tile:128x128c"):
        assert torch.equal(run(e5, config).isfinite(), exact(*e5).isfinite())


@pytest.mark.parametrize("config", ["stream:16x64/8", "tile:128x128p"])
def test_subnormals_and_the_largest_values(config: str) -> None:
    bits = torch.arange(256, dtype=torch.uint8, device="cuda")
    finite = bits[~bits.view(E4).float().isnan()]
    a = finite.repeat(64, 2)[:, :496].contiguous().view(E4)
    b = finite.flip(0).repeat(64, 2)[:, :496].contiguous().view(E4).t()
    x = [a, b, torch.tensor(2.0**-12, device="cuda"), torch.tensor(1.0, device="cuda")]
    assert distance(run(x, config), exact(*x)) < 4e-3


@pytest.mark.parametrize("config", ["stream:16x64/4", "stream:64x64/4", "tile:128x128p", "tile:128x160p", "tile:128x128p@1x2"])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_siblings_write_one_buffer(config: str, count: int) -> None:
    widths = [208, 64, 1040, 16, 128, 336][:count]
    a, _, scale_a, _ = operands(90, 16, 528)
    weights = [operands(1, n, 528, row=False, column=i % 2 == 0, seed=i)[1::2] for i, n in enumerate(widths)]
    bias = [torch.randn(n, device="cuda").bfloat16() if i == 1 else None for i, n in enumerate(widths)]
    out = torch.full((90, sum(widths)), float("nan"), device="cuda", dtype=BF16)
    b, scale_b = ([each[i] for each in weights] for i in range(2))
    torch.ops.inductor_ext.scaled_mm.out([a], b, [scale_a], scale_b, bias, BF16, True, False, config, out=out)
    for part, b_i, s_i, added in zip(out.split(widths, 1), b, scale_b, bias):
        assert distance(part, exact(a, b_i, scale_a, s_i, added)) < 4e-3


def test_products_of_different_k_side_by_side() -> None:
    x, y = operands(90, 208, 528, seed=1), operands(90, 64, 1024, row=False, column=False, seed=2)
    for config in ("stream:64x64/4", "tile:128x128p"):
        out = torch.full((90, 272), float("nan"), device="cuda", dtype=BF16)
        lists = [[one, two] for one, two in zip(x, y)]
        torch.ops.inductor_ext.scaled_mm.out(*lists, [None, None], BF16, True, False, config, out=out)
        assert distance(out[:, :208], exact(*x)) < 4e-3 and distance(out[:, 208:], exact(*y)) < 4e-3


@pytest.mark.parametrize("m", MEASURED)
def test_the_table_serves_any_m(m: int) -> None:
    for row in (True, False):
        x = operands(m, 1024, 1024, row=row, column=row)
        assert distance(run(x), exact(*x)) < 4e-3


def test_another_stream_and_a_cuda_graph() -> None:
    x = operands(64, 1024, 1024)
    wanted = run(x, "stream:64x64/4")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(run(x, "stream:64x64/4"), wanted)
    for config in ("stream:64x64/4", "stream:16x64/8", "tile:128x128p", "tile:128x128p@2x1"):
        out, graph = torch.empty_like(wanted), torch.cuda.CUDAGraph()
        run(x, config, out=out)
        with torch.cuda.graph(graph):
            run(x, config, out=out)
        other = operands(64, 1024, 1024, seed=5)
        for mine, theirs in zip(x, other):
            mine.copy_(theirs)
        graph.replay()
        assert distance(out, exact(*other)) < 4e-3, "a replay must read what the buffers hold now, the scales too"


@pytest.mark.parametrize("config", ["stream:16x64/8", "stream:64x64/4", "tile:64x128p", "tile:128x128p@2x1"])
def test_a_chain_of_dependent_launches(config: str) -> None:
    """Each kernel starts before the one ahead has ended: it must see what that one wrote, and not write what it still reads."""
    n = 512
    weights = [torch.randn(n, n, device="cuda").to(E4).t() for _ in range(4)]
    scales = torch.ones((), device="cuda"), torch.full((), 0.05, device="cuda")
    first = torch.randn(16 if "16x" in config else 200, n, device="cuda").to(E4)

    def chain(static_b: bool, wait: bool) -> torch.Tensor:
        x, buffers = first, [torch.empty(first.shape, device="cuda", dtype=BF16) for _ in range(2)]
        for step in range(24):
            out = buffers[step % 2]
            lists = [[x], [weights[step % 4]], [scales[0]], [scales[1]], [None]]
            torch.ops.inductor_ext.scaled_mm.out(*lists, BF16, True, static_b, config, out=out)
            x = torch.ops.inductor_ext.fp8_downcast(out, [], "f32 max:-448.0 min:448.0", E4)
            if wait:
                torch.cuda.synchronize()
        return out.clone()

    wanted = chain(False, True)
    for _ in range(20):
        assert torch.equal(chain(True, False), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": lambda x: x.float()}, r"a.*wanted float8_e4m3fn"),
        ({"b": lambda x: x.contiguous()}, r"b.*wanted"),
        ({"b": lambda x: x[:120]}, r"b.*wanted"),
        ({"scale_a": lambda x: x[:5]}, r"scale_a.*wanted one element or 32"),
        ({"scale_b": lambda x: x.double()}, r"scale_b.*wanted float32"),
        ({"bias": lambda _: torch.zeros(9, device="cuda", dtype=BF16)}, r"bias.*wanted 64 elements"),
        ({"a": lambda x: torch.cat([x, x], 1)[:, 1:129]}, r"a.*wanted rows that start at multiples of 16 bytes"),
        ({"a": lambda x: x.cpu()}, r"a.*wanted a CUDA tensor"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(change: dict[str, Any], message: str) -> None:
    values = dict(zip(TENSOR_ARGUMENTS, [*operands(32, 64, 128), None]))
    values.update({name: make(values[name]) for name, make in change.items()})
    out = torch.full((32, 64), 7.0, device="cuda", dtype=BF16)
    key = ("stream:16x64/8", E4, E4, BF16, True)
    bound = OP.kernel.bind(jit.load(OP.spec_of_key(key, "sm_90a")), key)  # type: ignore[union-attr]
    with pytest.raises((ValueError, TypeError), match=message):
        bound(*([values[name]] for name in TENSOR_ARGUMENTS), BF16, True, False, "", out)
    assert (out == 7).all()


def test_unknown_configurations_of_the_table_do_not_exist() -> None:
    table = choice.table("sm_90a")
    assert table is not None
    configs: set[Config] = {row.config for shapes in table.kinds.values() for rows in shapes.values() for row in rows}
    assert all(config.family in ("stream", "tile") for config in configs)
