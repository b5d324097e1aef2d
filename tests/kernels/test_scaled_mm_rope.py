"""scaled_mm_rope: its reference, arguments, choice of a kernel; on a GPU against the two operators that it replaces.

    pytest -m gpu tests/kernels/test_scaled_mm_rope.py
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from inductor_ext import jit, registry
from inductor_ext.kernels.qk_norm_rope.op import OP as QK_NORM_ROPE
from inductor_ext.kernels.scaled_mm.config import parse
from inductor_ext.kernels.scaled_mm.op import OP as SCALED_MM
from inductor_ext.kernels.scaled_mm_rope.op import DEFAULT, EXACT, NORMALISED, NORMS, OP, is_ours, table
from tests.support import scaled_tables as tables
from tests.support.equal import assert_same_bytes

E4, BF16 = torch.float8_e4m3fn, torch.bfloat16
D = 128
forgotten = pytest.fixture(autouse=True)(tables.forgetting)
ops = torch.ops.inductor_ext


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    registry.ops()


@dataclasses.dataclass
class Given:
    """A call's tensors. ``heads`` of each product; ``positions`` of each of ``sequences``."""

    a: torch.Tensor
    b: list[torch.Tensor]
    scale_a: torch.Tensor
    scale_b: list[torch.Tensor]
    weights: list[torch.Tensor | None]
    cos: torch.Tensor
    sin: torch.Tensor
    rotated: int
    norm: str
    eps: float = 1e-6

    @property
    def widths(self) -> list[int]:
        return [each.shape[1] for each in self.b]

    def arguments(self, fast: bool = True, config: str = "", dtype: torch.dtype = BF16) -> tuple[Any, ...]:
        left = self.a, self.b, self.scale_a, self.scale_b
        return *left, *self.weights, self.cos, self.sin, self.rotated, self.eps, self.norm, dtype, fast, False, config


def operands(
    sequences: int = 2, positions: int = 5, heads: tuple[int, ...] = (2, 1, 1), k: int = 64, norm: str = "cast mul",
    *, rotated: int = 2, rowwise: bool = True, batched: bool = False, device: str = "cpu",
) -> Given:  # fmt: skip
    made = torch.Generator(device).manual_seed(sequences + positions + k)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=made)

    m = sequences * positions
    a, b = normal(m, k).to(E4), [normal(count * D, k).to(E4).t() for count in heads]
    scale_a = normal(*((m, 1) if rowwise else ())).abs() + 0.5
    scale_b = [normal(*((1, count * D) if rowwise else ())).abs() * k**-0.5 + 0.01 for count in heads]
    weights = [(normal(D).abs() + 0.5).to(BF16) if norm and i < rotated else None for i in range(2)]
    angles = normal(sequences if batched else 1, positions, D) * 9
    return Given(a, b, scale_a, scale_b, weights, angles.cos().to(BF16), angles.sin().to(BF16), rotated, norm)


def run(given: Given, *, fast: bool = True, config: str = "", out: torch.Tensor | None = None) -> torch.Tensor:
    """Through ``.out``, into a buffer of NaN: what is not written shows."""
    if out is None:
        out = torch.empty(given.a.shape[0], sum(given.widths), device=given.a.device, dtype=BF16)
    out.fill_(float("nan"))
    ops.scaled_mm_rope.out(*given.arguments(fast, config), out=out)
    return out


def separate(given: Given, *, fast: bool = True, config: str = "") -> torch.Tensor:
    """scaled_mm, then qk_norm_rope on its columns."""
    none = [None] * len(given.b)
    out = ops.scaled_mm([given.a], given.b, [given.scale_a], given.scale_b, none, BF16, fast, False, config)
    parts = list(out.split(given.widths, 1))
    positions = given.cos.shape[1]
    heads = [part.view(-1, positions, part.shape[1] // D, D) for part in parts[: given.rotated]]
    q, k = (*heads, None)[:2]
    turned = ops.qk_norm_rope(q, k, *given.weights, given.cos, given.sin, given.eps, given.norm, BF16)
    for i in range(given.rotated):
        parts[i] = turned[i].reshape(parts[i].shape)
    return torch.cat(parts, 1)


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_reference_is_the_two_operators(norm: str, rowwise: bool, batched: bool) -> None:
    given = operands(norm=norm, rowwise=rowwise, batched=batched)
    assert_same_bytes(run(given), separate(given))
    assert_same_bytes(OP.overload(*given.arguments()), separate(given))


@pytest.mark.parametrize("heads", [(1,), (3,), (2, 1), (4, 2, 2, 1)])
def test_any_number_of_products(heads: tuple[int, ...]) -> None:
    for norm, rotated in itertools.product(("", "cast mul"), range(1, min(len(heads), 2) + 1)):
        given = operands(heads=heads, rotated=rotated, norm=norm)
        assert_same_bytes(run(given), separate(given), f"{heads} {norm!r} {rotated}")


def test_only_the_rotated_products_are_touched() -> None:
    given = operands()
    product = ops.scaled_mm([given.a], given.b, [given.scale_a], given.scale_b, [None] * 3, BF16, True, False, "")
    found, behind = run(given), 3 * D
    assert torch.equal(found[:, behind:], product[:, behind:])
    for low, high in ((0, 2 * D), (2 * D, behind)):
        assert not torch.equal(found[:, low:high], product[:, low:high])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_rows(shape: tuple[int, int]) -> None:
    assert run(operands(*shape)).shape == (0, 4 * D)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"b": []}, ValueError, "b: wanted 1 to 4 products, found 0"),
        ({"b": "five"}, ValueError, "b: wanted 1 to 4 products, found 5"),
        ({"b": "narrow"}, ValueError, r"b\[0\]: wanted \[K, N\], N a multiple of 128, found \(64, 64\)"),
        ({"rotated": 0}, ValueError, "rotated: wanted 1 or 2 of 3 products, found 0"),
        ({"rotated": 3}, ValueError, "rotated: wanted 1 or 2 of 3 products, found 3"),
        ({"norm": "layer"}, ValueError, "norm: wanted one of '', 'cast mul'"),
        ({"norm": ""}, ValueError, "q_weight: wanted None, found shape"),
        ({"weights": [None, None]}, ValueError, "q_weight: wanted a tensor, found None"),
        ({"rotated": 1}, ValueError, "k_weight: wanted None, found shape"),
        ({"weights": [torch.ones(D), torch.ones(D)]}, TypeError, "q_weight: wanted torch.bfloat16, as the output"),
        ({"weights": [torch.ones(64, dtype=BF16)] * 2}, ValueError, "q_weight: wanted 128 elements in a row"),
        ({"weights": [torch.ones(2 * D, dtype=BF16)[::2]] * 2}, ValueError, r"128 elements in a row, found .* strides \(2,\)"),
        ({"cos": torch.ones(1, 5, D)}, TypeError, "cos: wanted torch.bfloat16, as the output, found torch.float32"),
        ({"cos": torch.ones(5, D, dtype=BF16)}, ValueError, r"cos: wanted shape \[1 or B, S, 128\], found \(5, 128\)"),
        ({"sin": torch.ones(1, 5, 64, dtype=BF16)}, ValueError, r"sin: wanted shape \[1 or B, S, 128\], found \(1, 5, 64\)"),
        ({"sin": torch.ones(1, 10, D, dtype=BF16)}, ValueError, "sin: wanted the shape of cos"),
        ({"sin": torch.ones(1, 5, 2 * D, dtype=BF16)[..., ::2]}, ValueError, "sin: wanted columns of unit stride"),
        (dict.fromkeys(("cos", "sin"), torch.ones(1, 3, D, dtype=BF16)), ValueError, "a: wanted rows of whole sequences of 3"),
        (dict.fromkeys(("cos", "sin"), torch.ones(3, 5, D, dtype=BF16)), ValueError, "or a table of each sequence"),
        ({"scale_b": []}, ValueError, "scale_b, bias: wanted 3 of each"),
        ({"a": torch.zeros(10, 64)}, TypeError, "wanted float8_e4m3fn or float8_e5m2, found torch.float32"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = operands()
    weights = {"five": [given.b[1]] * 5, "narrow": [given.b[0][:, :64], *given.b[1:]]}
    if isinstance(change.get("b"), str):
        change = {"b": weights[change["b"]]}
    with pytest.raises(error, match=message):
        OP.overload(*dataclasses.replace(given, **change).arguments())


@pytest.mark.parametrize("config", ["tile:128x160p", "tile:256x128c", "stream:16x64/8"])
def test_tiles_that_are_no_heads(config: str) -> None:
    with pytest.raises(ValueError, match="config: wanted a tile of 64 or 128 by 128"):
        OP.overload(*operands().arguments(config=config))


def test_other_output_dtypes() -> None:
    with pytest.raises(TypeError, match=r"out_dtype: wanted torch\.bfloat16, found torch\.float16"):
        OP.overload(*operands().arguments(dtype=torch.float16))


def test_opcheck() -> None:
    # test_schema compares inputs with allclose, which float8 does not have.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for norm in ("", "cast mul"):
        torch.library.opcheck(OP.overload, operands(norm=norm).arguments(), test_utils=tests)


# ---- the choice --------------------------------------------------------------------------------------------------------


def symbolic(given: Given, environment: ShapeEnv) -> Given:
    """As fakes, whose rows (and those of the tables) are one symbol."""
    mode = FakeTensorMode(shape_env=environment)

    def faked(value: torch.Tensor, dim: int) -> torch.Tensor:
        sizes = [DimDynamic.DUCK if at == dim else DimDynamic.STATIC for at in range(value.dim())]
        return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    lists = {name: [each if each is None else mode.from_tensor(each, static_shapes=True) for each in getattr(given, name)]
             for name in ("b", "scale_b", "weights")}  # fmt: skip
    rows = {"a": faked(given.a, 0), "scale_a": faked(given.scale_a, 0), "cos": faked(given.cos, 1), "sin": faked(given.sin, 1)}
    return dataclasses.replace(given, **lists, **rows)


def test_a_symbolic_m() -> None:
    """The fake fixes no size, and every kernel that some M takes is known."""
    environment = ShapeEnv()
    given = symbolic(operands(1, 33, (16, 8, 8), 1024), environment)
    with given.a.fake_mode:
        made = OP.fake(*given.arguments())
    assert made.shape[0] is given.a.shape[0] or made.shape[0] == given.a.shape[0]
    assert made.shape[1] == 32 * D and not environment.guards
    assert OP.kernel is not None and OP.kernel.keys is not None
    keys = OP.kernel.keys(*given.arguments())
    assert (DEFAULT, E4, E4, BF16, True, "cast mul") in keys and len(keys) == len(set(keys))
    for m in (1, 16, 65, 512, 7168, 16384):
        assert (table("cast mul").choose("sm_90a", m, 4096, 1024, True, True), E4, E4, BF16, True, "cast mul") in keys
    assert not environment.guards
    assert OP.kernel.keys(*given.arguments(config=EXACT)) == [(EXACT, E4, E4, BF16, True, "cast mul")]


def test_every_choice_is_a_kernel_of_whole_heads() -> None:
    shapes, either = ((4096, 1024), (6144, 4096)), (True, False)
    for norm, m, (n, k), rowwise, fast in itertools.product(NORMS, (1, 64, 512, 7168, 16384), shapes, either, either):
        config = parse(table(norm).choose("sm_90a", m, n, k, rowwise, fast))
        assert is_ours(config) and config.supports(not fast)
    assert table("").choose("sm_100a", 512, 4096, 1024, True, True) == ""


def test_heads_with_and_without_a_norm_were_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = tuple(table(norm).kind(True, True) for norm in ("", "cast mul"))
    assert kinds[1] == f"{kinds[0]}, {NORMALISED}"
    for own, other, kind in (("", "cast mul", kinds[0]), ("cast mul", "", kinds[1])):
        tables.use(monkeypatch, {(512, 64): ((16, "tile:64x128p", 2.0, 4.0),)}, kinds=(kind,))
        assert table(own).choose("sm_90a", 512, 512, 64, True, True) == "tile:64x128p"
        assert table(other).choose("sm_90a", 512, 512, 64, True, True) == DEFAULT


def test_kernels_are_named_by_their_norm() -> None:
    assert OP.kernel is not None
    for norm, name in (("", "NoNorm"), ("cast mul", "CastThenWeight"), ("mul+1 cast", "OnePlusWeightThenCast")):
        ((entry, expression),) = OP.spec_of_key((DEFAULT, E4, E4, BF16, True, norm), "sm_90a").exports
        assert entry == "run" and expression.endswith("::run_rope")
        assert f"128, 128, true, false, inductor_ext::NormRope<inductor_ext::{name}>>" in expression


# ---- on a GPU --------------------------------------------------------------------------------------------------------

CONFIGS = ("tile:128x128p", "tile:64x128p", "tile:128x128c", "tile:128x128p@2x1", "tile:128x128p@1x2")
#: Sequences, positions, heads of each product, K. Rows that end inside a tile, and tiles that hold parts of sequences.
SHAPES = (
    (1, 1, (1, 1, 1), 16),
    (3, 37, (2, 1, 1), 144),
    (5, 101, (4, 2, 2), 400),
    (1, 2999, (16, 8, 8), 1024),
    (14, 64, (3, 1), 2064),
)


def kernels(arch: str) -> list[jit.JitSpec]:
    keys = [(name, E4, E4, BF16, True, norm) for name in CONFIGS for norm in ("", "cast mul")]
    keys += [(DEFAULT, E4, E4, BF16, True, norm) for norm in NORMS] + [(EXACT, E4, E4, BF16, False, "cast mul")]
    specs = [OP.spec_of_key(key, arch) for key in keys]
    specs += [SCALED_MM.spec_of_key(key[:5], arch) for key in keys]
    specs += [QK_NORM_ROPE.spec_of_key((BF16, BF16 if norm else None, BF16, norm, BF16), arch) for norm in NORMS]
    return specs


hopper = pytest.mark.gpu(kernels=kernels, arch="sm_90a")


def check(given: Given, found: torch.Tensor, wanted: torch.Tensor, what: Any = "") -> None:
    """Byte for byte without a norm, and what is not normalised. With one, y may be a unit off in few places."""
    behind = sum(given.widths[: given.rotated]) if given.norm else 0
    assert_same_bytes(found[:, behind:], wanted[:, behind:], str(what))
    a, b = found[:, :behind].double(), wanted[:, :behind].double()
    assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isfinite(), b.isfinite()), what
    a, b = a[b.isfinite()], b[b.isfinite()]
    if a.numel() == 0:
        return
    apart, unit = (a - b).abs(), torch.finfo(BF16).eps
    assert bool((apart <= 4 * unit * max(1.0, float(b.abs().max()))).all()), what
    assert int((apart != 0).sum()) <= 3 + a.numel() // 50, f"{what}: more than a rare rounding differs"


@hopper
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("norm", ["", "cast mul"])
def test_the_bytes_of_a_product_and_a_rotation(norm: str, config: str) -> None:
    for (sequences, positions, heads, k), rowwise, batched in itertools.product(SHAPES, (True, False), (True, False)):
        given = operands(sequences, positions, heads, k, norm, rowwise=rowwise, batched=batched, device="cuda")
        found, wanted = run(given, config=config), separate(given, config=config)
        check(given, found, wanted, (config, sequences, positions, heads, k, rowwise, batched))


@hopper
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_and_number_of_products(norm: str) -> None:
    for heads in ((1,), (3,), (2, 1), (4, 2, 2, 1)):
        for rotated in range(1, min(len(heads), 2) + 1):
            given = operands(2, 150, heads, 272, norm, rotated=rotated, device="cuda")
            check(given, run(given, config=DEFAULT), separate(given, config=DEFAULT), (norm, heads, rotated))


@hopper
def test_near_the_reference() -> None:
    """PyTorch's own operators sum in another order: a last place of the product."""
    for norm in NORMS:
        given = operands(3, 37, (4, 2, 2), 256, norm, device="cuda")
        found, wanted = run(given).double(), OP.reference(*given.arguments()).double()
        assert float((found - wanted).norm()) <= 1e-2 * float(wanted.norm())


@hopper
def test_exact_accumulation_and_extremes() -> None:
    given = operands(2, 150, (2, 1, 1), 1040, device="cuda")
    given.scale_a[3], given.scale_a[7], given.scale_a[299] = float("nan"), float("inf"), 0.0
    check(given, run(given, fast=False, config=EXACT), separate(given, fast=False, config=EXACT))


@hopper
def test_tables_and_outputs_of_wider_tensors() -> None:
    for norm in ("", "cast mul"):
        given = operands(3, 101, (2, 1, 1), 272, norm, batched=True, device="cuda")
        wide = torch.randn(3, 101, 3, D, device="cuda").to(BF16)
        given.cos, given.sin = wide[:, :, 1], wide[:, :, 2]
        out = torch.zeros(303, 8 * D, device="cuda", dtype=BF16)
        wanted = separate(given, config=DEFAULT)
        check(given, run(given, config=DEFAULT, out=out[:, D : 5 * D]), wanted)
        assert not out[:, :D].any() and not out[:, 5 * D :].any(), "what lies beside the columns stays"
        given.cos, given.sin = (each[:1, :1].expand(1, 303, D) for each in (given.cos, given.sin))
        check(given, run(given, config=DEFAULT), separate(given, config=DEFAULT), "one angle for all")


@hopper
def test_another_stream_and_a_graph() -> None:
    given = operands(4, 125, (2, 1, 1), 400, "", device="cuda")
    wanted = separate(given, config=DEFAULT)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(given, config=DEFAULT)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bytes(found, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(given, config=DEFAULT)
    given.cos.copy_(torch.randn_like(given.cos))
    given.scale_a.mul_(2.0)
    graph.replay()
    assert_same_bytes(captured, separate(given, config=DEFAULT))


@hopper
def test_no_rows_on_the_gpu() -> None:
    for shape in ((0, 5), (2, 0)):
        assert run(operands(*shape, device="cuda"), config=DEFAULT).shape == (0, 4 * D)
