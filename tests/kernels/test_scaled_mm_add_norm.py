"""scaled_mm_add_norm: its reference, arguments, choice of a kernel; on a GPU against the two operators that it replaces.

    pytest -m gpu tests/kernels/test_scaled_mm_add_norm.py
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from inductor_ext import registry
from inductor_ext.kernels.rms_norm_quantize.op import NORMS, TORCHAO_PROGRAM, TORCHAO_SCALE
from inductor_ext.kernels.rms_norm_quantize.op import OP as RMS_NORM
from inductor_ext.kernels.scaled_mm.config import parse
from inductor_ext.kernels.scaled_mm_add.op import OP as ADD
from inductor_ext.kernels.scaled_mm_add_norm.op import CTAS, OP, TILE, WIDTHS, Key, is_ours, table
from tests.support import scaled_tables as tables
from tests.support.equal import assert_same_bytes
from tests.support.kernels import arch_or_skip, build

E4, E5, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
forgotten = pytest.fixture(autouse=True)(tables.forgetting)
ops = torch.ops.inductor_ext
#: PyTorch's own cast is asked for what is past the range; a scale in the values' dtype.
E5_PROGRAMS = "max:1e-12 div:57344.0", "div:scale f32", E5


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    registry.ops()


@dataclasses.dataclass
class Given:
    """A call's tensors and numbers."""

    a: torch.Tensor
    b: torch.Tensor
    scale_a: torch.Tensor
    scale_b: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor
    weight: torch.Tensor
    norm: str = "cast mul"
    programs: tuple[str, str, torch.dtype] = (TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
    eps: float = 1e-6

    @property
    def product(self) -> tuple[Any, ...]:
        return self.a, self.b, self.scale_a, self.scale_b, self.bias, self.residual

    def arguments(self, fast: bool = True, config: str = "", dtype: torch.dtype = BF16) -> tuple[Any, ...]:
        return *self.product, self.weight, self.eps, self.norm, *self.programs, dtype, fast, False, config


def operands(
    m: int = 24, n: int = 256, k: int = 64, *, rowwise: bool = True, bias: bool = False, device: str = "cpu", **options: Any
) -> Given:
    torch.manual_seed(m + n + k)
    a, b = torch.randn(m, k, device=device).to(E4), torch.randn(n, k, device=device).to(E4).t()
    scales = [torch.rand(shape if rowwise else (), device=device) + 0.5 for shape in ((m, 1), (1, n))]
    residual, weight = torch.randn(m, n, device=device) * k**0.5, torch.rand(n, device=device) + 0.5
    added = torch.randn(n, device=device).to(BF16) if bias else None
    return Given(a, b, *scales, added, residual.to(BF16), weight.to(BF16), **options)


def run(given: Given, *, fast: bool = True, config: str = "", total: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Through ``.out``, into buffers of NaN: what is not written shows."""
    total = torch.empty_like(given.residual, memory_format=torch.contiguous_format) if total is None else total
    scale, _, dtype = given.programs
    kinds = dtype, (torch.float32 if scale.endswith("f32") else BF16)
    shapes = total.shape, (total.shape[0], 1)
    outs = total, *(torch.zeros(shape, device=total.device).to(kind) for shape, kind in zip(shapes, kinds))
    for each in outs:
        each.copy_(torch.full_like(each, float("nan"), dtype=torch.float32))
    ops.scaled_mm_add_norm.out(*given.arguments(fast, config), out0=outs[0], out1=outs[1], out2=outs[2])
    return outs


def separate(given: Given, *, fast: bool = True, config: str = "") -> tuple[torch.Tensor, ...]:
    """scaled_mm_add, then rms_norm_quantize."""
    total = ops.scaled_mm_add(*given.product, BF16, fast, False, config.partition("@")[0])
    norm = given.weight, given.eps, given.norm, "row", *given.programs, []
    return total, *ops.rms_norm_quantize(total, None, *norm)[:2]


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rowwise", [False, True], ids=["tensorwise", "rowwise"])
def test_the_reference_is_the_two_operators(rowwise: bool, norm: str, n: int) -> None:
    given = operands(n=n, rowwise=rowwise, bias=rowwise, norm=norm)
    for found in (run(given), OP.overload(*given.arguments())):
        for one, other in zip(found, separate(given), strict=True):
            assert_same_bytes(one, other)


def test_other_programs() -> None:
    given = operands(programs=E5_PROGRAMS)
    found = run(given)
    assert found[1].dtype is E5 and found[2].dtype is BF16
    for one, other in zip(found, separate(given), strict=True):
        assert_same_bytes(one, other)


def test_no_rows() -> None:
    assert [each.shape for each in run(operands(0))] == [(0, 256), (0, 256), (0, 1)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"b": torch.zeros(128, 64).to(E4).t()}, ValueError, r"N one of 256, 512, 1024, found shape \(64, 128\)"),
        ({"b": torch.zeros(2048, 64).to(E4).t()}, ValueError, r"found shape \(64, 2048\)"),
        ({"norm": "layer"}, ValueError, "norm: wanted one of cast mul, mul cast, mul\\+1 cast, found 'layer'"),
        ({"weight": torch.ones(256)}, TypeError, "weight: wanted torch.bfloat16, as the output, found torch.float32"),
        ({"weight": torch.ones(128, dtype=BF16)}, ValueError, r"weight: wanted 256 elements in a row, found shape \(128,\)"),
        ({"weight": torch.ones(512, dtype=BF16)[::2]}, ValueError, r"256 elements in a row, found .* strides \(2,\)"),
        ({"residual": torch.zeros(24, 256)}, TypeError, "residual: wanted torch.bfloat16 of two dimensions"),
        ({"programs": ("div:scale", "", E4)}, ValueError, "names a dynamic scale"),
        ({"programs": ("f32", "", BF16)}, TypeError, "dtype: wanted float8_e4m3fn or float8_e5m2, found torch.bfloat16"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OP.overload(*dataclasses.replace(operands(), **change).arguments())


OTHERS = "tile:128x128p", "tile:128x128p@1x4", "tile:128x128p@2x2", "tile:256x128c@1x2", "stream:16x64/8"


@pytest.mark.parametrize("config", OTHERS)
def test_clusters_that_have_no_whole_rows(config: str) -> None:
    with pytest.raises(ValueError, match="config: wanted a tile of 64 or 128 by 128 in clusters of 1x2, found"):
        OP.overload(*operands().arguments(config=config))


def test_other_output_dtypes() -> None:
    with pytest.raises(TypeError, match=r"out_dtype: wanted torch\.bfloat16, found torch\.float16"):
        OP.overload(*operands().arguments(dtype=torch.float16))


def test_opcheck() -> None:
    # test_schema compares inputs with allclose, which float8 does not have.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OP.overload, operands().arguments(), test_utils=tests)


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_every_choice_is_a_cluster_of_whole_rows() -> None:
    either = (True, False)
    for n, m, k, rowwise, fast in itertools.product(WIDTHS, (1, 512, 7168, 16384), (2048, 3072), either, either):
        config = parse(table(n).choose("sm_90a", m, n, k, rowwise, fast))
        assert is_ours(config, n) and config.supports(not fast)
        assert table(n).choose("sm_100a", m, n, k, rowwise, fast) == ""


def test_rows_of_another_width_were_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the nearest in the table would be taken, whose cluster is another."""
    kind = table(1024).kind(True, True)
    assert kind == "row-wise, fast accumulation, clusters of 1x8"
    tables.use(monkeypatch, {(1024, 64): ((16, "tile:64x128p@1x8", 2.0, 4.0),)}, kinds=(kind,))
    assert table(1024).choose("sm_90a", 512, 1024, 64, True, True) == "tile:64x128p@1x8"
    assert table(512).choose("sm_90a", 512, 512, 64, True, True) == "tile:128x128p@1x4"
    assert table(512).decide("sm_90a", 512, 512, 64, True, True) is None


def test_a_symbolic_m(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake fixes no size, and every kernel that some M takes is known."""
    rows = (512, "tile:64x128p@1x8", 2.0, 4.0), (16384, "tile:128x128p@1x8", 2.0, 4.0)
    tables.use(monkeypatch, {(1024, 64): rows}, kinds=(table(1024).kind(True, True),))
    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment):
        m = environment.create_unbacked_symint()
        torch._check(m >= 512)
        a, scale = torch.empty(m, 64, dtype=E4), torch.empty(m, 1)
        b, residual = torch.empty(1024, 64, dtype=E4).t(), torch.empty(m, 1024, dtype=BF16)
        given = Given(a, b, scale, torch.empty(1, 1024), None, residual, torch.empty(1024, dtype=BF16))
        total, quantised, scales = OP.fake(*given.arguments())
        assert OP.kernel is not None and OP.kernel.keys is not None
        keys = OP.kernel.keys(*given.arguments())
    assert all(each.shape[0] == m for each in (total, quantised, scales))
    assert [key.config for key in keys] == ["tile:64x128p@1x8", "tile:128x128p@1x8"]


def test_kernels_are_named_by_their_norm_and_programs() -> None:
    assert OP.kernel is not None
    key = Key("tile:128x128p@1x8", E4, E4, True, "mul+1 cast", TORCHAO_SCALE, TORCHAO_PROGRAM, E4)
    ((entry, expression),) = OP.kernel.exports(key)
    assert entry == "run" and expression.endswith("::run_add_norm")
    end = "128, 128, true, false, inductor_ext::AddNorm<inductor_ext::OnePlusWeightThenCast, __nv_fp8_e4m3, true, float, "
    assert end in expression


# ---- on a GPU --------------------------------------------------------------------------------------------------------

TILES = ("tile:128x128p", "tile:64x128p", "tile:128x128c")
ROWS = (1, 63, 128, 500, 2999)


def keys() -> list[Key]:
    torchao = TORCHAO_SCALE, TORCHAO_PROGRAM, E4
    # The cluster is no part of the kernel, but of its name.
    made = [Key(f"{tile}@1x8", E4, E4, True, norm, *torchao) for tile in TILES for norm in NORMS]
    made += [Key(table(n).default, E4, E4, True, "cast mul", *torchao) for n in WIDTHS]
    made += [Key(f"{tile}@1x{ctas}", E4, E4, True, "cast mul", *torchao) for tile in TILES for ctas in CTAS]
    exact = [Key(table(n).exact, E4, E4, False, "cast mul", *torchao) for n in WIDTHS]
    return made + exact + [Key(table(1024).default, E4, E4, True, "cast mul", *E5_PROGRAMS)]


@pytest.fixture
def hopper() -> None:
    arch = arch_or_skip("sm_90a")
    specs = [OP.spec_of_key(key, arch) for key in keys()]
    specs += [ADD.spec_of_key((tile, E4, E4, BF16, True), arch) for tile in TILES]
    specs += [ADD.spec_of_key(("tile:128x128c", E4, E4, BF16, False), arch)]
    torchao = "row", TORCHAO_SCALE, TORCHAO_PROGRAM, E4
    specs += [RMS_NORM.spec_of_key((BF16, False, BF16, norm, *torchao), arch) for norm in NORMS]
    specs += [RMS_NORM.spec_of_key((BF16, False, BF16, "cast mul", "row", *E5_PROGRAMS), arch)]
    build(list(dict.fromkeys(specs)))


def check(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...], what: Any = "") -> None:
    """The sum byte for byte. The mean is summed in another order: a scale within its last place, one of bf16, FP8 one step."""
    assert_same_bytes(found[0], wanted[0], f"{what}: the sum")
    one, other = found[2].float(), wanted[2].float()
    assert torch.equal(one.isnan(), other.isnan()) and torch.equal(one.isinf(), other.isinf()), what
    finite = other.isfinite()
    assert bool(((one - other).abs() <= other.abs() * torch.finfo(BF16).eps)[finite].all()), f"{what}: scales"
    assert torch.equal(found[1].float().isnan(), wanted[1].float().isnan()), what
    numbers = ~wanted[1].float().isnan()
    a, b = (each.view(torch.uint8)[numbers].short() for each in (found[1], wanted[1]))
    steps = (torch.where(a < 128, a, 128 - a) - torch.where(b < 128, b, 128 - b)).abs()
    assert not bool((steps > 1).any()), f"{what}: more than a step of FP8"
    assert int((steps != 0).sum()) <= 3 + steps.numel() // 50, f"{what}: more than a rare rounding differs"


@pytest.mark.gpu
@pytest.mark.parametrize("ctas", CTAS)
@pytest.mark.parametrize("tile", TILES)
def test_against_two_launches(hopper: None, tile: str, ctas: int) -> None:
    config = f"{tile}@1x{ctas}"
    for m, k, rowwise in itertools.product(ROWS, (16, 400, 2048), (True, False)):
        given = operands(m, ctas * TILE, k, rowwise=rowwise, bias=rowwise, device="cuda")
        check(run(given, config=config), separate(given, config=config), (config, m, k, rowwise))


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tile", TILES)
def test_every_norm(hopper: None, tile: str, norm: str) -> None:
    given = operands(1500, 1024, 272, norm=norm, device="cuda")
    config = f"{tile}@1x8"
    check(run(given, config=config), separate(given, config=config), (config, norm))


@pytest.mark.gpu
def test_many_tiles_again_and_again(hopper: None) -> None:
    """What CTAs tell each other too early or too late shows sometimes only; every run gives the same bytes."""
    given = operands(20000, 1024, 256, device="cuda")
    wanted, first = separate(given, config="tile:128x128p"), run(given, config="tile:128x128p@1x8")
    check(first, wanted)
    for _ in range(100):
        for one, other in zip(run(given, config="tile:128x128p@1x8"), first, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.gpu
def test_other_programs_on_the_gpu(hopper: None) -> None:
    given = operands(700, 1024, 272, programs=E5_PROGRAMS, device="cuda")
    check(run(given, config="tile:128x128p@1x8"), separate(given, config="tile:128x128p"))


@pytest.mark.gpu
def test_near_the_reference(hopper: None) -> None:
    """PyTorch's own operators sum in another order: a last place of the product."""
    given = operands(300, 1024, 256, device="cuda")
    found, wanted = run(given), OP.reference(*given.arguments())
    for one, other in zip(found, wanted, strict=True):
        assert float((one.double() - other.double()).norm()) <= 2e-2 * float(other.double().norm())


@pytest.mark.gpu
@pytest.mark.parametrize("n", WIDTHS)
def test_exact_accumulation_and_extremes(hopper: None, n: int) -> None:
    given = operands(300, n, 1040, device="cuda")
    given.scale_a[3], given.scale_a[7] = float("nan"), float("inf")
    given.residual[130], given.scale_a[130], given.residual[299, 5] = 0.0, 0.0, float("inf")
    config = table(n).exact
    check(run(given, fast=False, config=config), separate(given, fast=False, config=config))


@pytest.mark.gpu
def test_wider_tensors_another_stream_and_a_graph(hopper: None) -> None:
    given, config = operands(500, 1024, 400, device="cuda"), "tile:128x128p@1x8"
    wide = torch.randn(500, 3072, device="cuda").to(BF16)
    given.residual = wide[:, 1024:2048]
    around = torch.zeros(500, 3072, device="cuda", dtype=BF16)
    wanted = separate(given, config=config)
    check(run(given, config=config, total=around[:, 1024:2048]), wanted)
    assert not around[:, :1024].any() and not around[:, 2048:].any(), "what lies beside the columns stays"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(given, config=config)
    torch.cuda.current_stream().wait_stream(stream)
    check(found, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(given, config=config)
    given.scale_a.mul_(2.0)
    given.residual.copy_(torch.randn(500, 1024, device="cuda"))
    graph.replay()
    check(captured, separate(given, config=config))


@pytest.mark.gpu
def test_no_rows_on_the_gpu(hopper: None) -> None:
    assert [each.shape for each in run(operands(0, 1024, device="cuda"))] == [(0, 1024), (0, 1024), (0, 1)]
