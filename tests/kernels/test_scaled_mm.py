"""scaled_mm without a GPU: the reference, argument errors, names of configurations, and what the tables choose."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from inductor_ext.kernels.scaled_mm import choice
from inductor_ext.kernels.scaled_mm import op as scaled_mm
from inductor_ext.kernels.scaled_mm.config import Config, parse
from tests.support import scaled_tables as tables
from tests.support.scaled_tables import FASTER, SLOWER, SMALL, STREAM, TILE

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
BF16 = torch.bfloat16
ops = torch.ops.inductor_ext
forgotten = pytest.fixture(autouse=True)(tables.forgetting)


def fp8(*shape: int, dtype: torch.dtype = E4) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def problem(m: int = 24, k: int = 64, n: int = 48, *, row: bool = False, column: bool = False) -> tuple[torch.Tensor, ...]:
    """a [M, K], b [K, N] column-major, and their scales."""
    scale_a = torch.rand(m, 1) + 0.5 if row else torch.rand(()) + 0.5
    scale_b = torch.rand(1, n) + 0.5 if column else torch.rand(()) + 0.5
    return fp8(m, k), fp8(n, k).t(), scale_a, scale_b


def run(a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Any = None, dtype: torch.dtype = BF16, **options: Any) -> Any:
    """The op on single tensors or lists of them."""
    lists = [value if isinstance(value, list) else [value] for value in (a, b, scale_a, scale_b)]
    added = bias if isinstance(bias, list) else [bias] * len(lists[1])
    chosen = {"fast": False, "static_b": False, "config": "", **options}
    return ops.scaled_mm(*lists, added, dtype, *chosen.values())


def in_double(a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Any = None) -> torch.Tensor:
    product = (a.double() @ b.double()) * scale_a.double() * scale_b.double()
    return product if bias is None else product + bias.double()


# ---- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize(("row", "column"), list(itertools.product([False, True], repeat=2)))
def test_reference_against_double(dtype: torch.dtype, row: bool, column: bool) -> None:
    inputs = problem(row=row, column=column)
    bias = torch.randn(48).to(dtype)
    found, wanted = run(*inputs, bias, dtype), in_double(*inputs, bias)
    assert found.dtype is dtype and found.shape == (24, 48) and found.is_contiguous()
    # One rounding to dtype, and fp32 sums of 64 terms before it.
    assert ((found.double() - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + 1e-4).all()


@pytest.mark.parametrize("rowwise", [False, True])
def test_reference_against_torch(rowwise: bool) -> None:
    a, b, scale_a, scale_b = problem(row=rowwise, column=rowwise)
    try:
        wanted = torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=BF16)
    except (RuntimeError, NotImplementedError):
        pytest.skip("this torch has no row-wise _scaled_mm on a CPU")
    torch.testing.assert_close(run(a, b, scale_a, scale_b), wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtypes", [(E4, E5), (E5, E4)])
def test_either_side_may_be_e5m2(dtypes: Any) -> None:
    a, b, s, t = fp8(8, 32, dtype=dtypes[0]), fp8(16, 32, dtype=dtypes[1]).t(), torch.tensor(0.5), torch.tensor(2.0)
    torch.testing.assert_close(run(a, b, s, t, dtype=torch.float32).double(), in_double(a, b, s, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_of_one_element_may_have_any_shape(shape: tuple[int, ...]) -> None:
    a, b, s, t = problem()
    assert torch.equal(run(a, b, s.reshape(shape), t.reshape(shape)), run(a, b, s, t))


@pytest.mark.parametrize("shape", [(48,), (1, 48), (48, 1)])
def test_a_vector_of_scales_may_have_any_shape(shape: tuple[int, ...]) -> None:
    a, b, s, t = problem(row=True, column=True)
    assert torch.equal(run(a, b, s.reshape(24), t.reshape(shape)), run(a, b, s, t))


def test_several_products_stand_side_by_side() -> None:
    a, b, s, t = problem(row=True)
    _, c, _, u = problem(n=16, column=True)
    bias = torch.randn(16).bfloat16()
    both = run(a, [b, c], s, [t, u], [None, bias])
    assert torch.equal(both, torch.cat([run(a, b, s, t), run(a, c, s, u, bias)], 1))


def test_products_with_their_own_left_sides() -> None:
    one, two = problem(k=64), problem(k=128, n=16)
    both = run(*(list(pair) for pair in zip(one, two)))
    assert torch.equal(both, torch.cat([run(*one), run(*two)], 1))


def test_no_rows() -> None:
    found = run(*problem(m=0))
    assert found.shape == (0, 48) and found.dtype is BF16


def test_out_may_be_columns_of_a_wider_buffer() -> None:
    a, b, s, t = problem()
    buffer = torch.full((24, 100), 7.0, dtype=BF16)
    ops.scaled_mm.out([a], [b], [s], [t], [None], BF16, False, False, "", out=buffer[:, 10:58])
    assert torch.equal(buffer[:, 10:58], run(a, b, s, t))
    assert (buffer[:, :10] == 7).all() and (buffer[:, 58:] == 7).all()


def test_opcheck() -> None:
    a, b, s, t = problem(row=True, column=True)
    arguments = ([a], [b], [s], [t], [None], BF16, False, False, "")
    kept = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # test_schema fails for any FP8
    torch.library.opcheck(ops.scaled_mm.default, arguments, test_utils=kept)


# ---- arguments -------------------------------------------------------------------------------------------------------

GOOD = problem(row=True, column=True)
A, B, S, T = GOOD

WRONG: dict[str, tuple[Any, str]] = {
    "no_b": (lambda: run(A, [], S, []), "wanted one of each, shared, or as many as b"),
    "too_many_a": (lambda: run([A, A], B, [S, S], T), "found 2, 2 for 1 b"),
    "scales_of_a": (lambda: run(A, B, [S, S], T), "found 1, 2 for 1 b"),
    "scales_of_b": (lambda: run(A, [B, B], S, T), "wanted 2 of each, as of b, found 1, 2"),
    "biases": (lambda: run(A, [B, B], S, [T, T], [None]), "wanted 2 of each, as of b, found 2, 1"),
    "output": (lambda: run(*GOOD, dtype=E4), "out_dtype: wanted bfloat16, float16 or float32, found torch.float8_e4m3fn"),
    "configuration": (lambda: run(*GOOD, config="tile:big"), "wanted a configuration such as"),
    "dimensions": (lambda: run(A[None], B, S, T), r"a\[0\]: wanted two dimensions, found shape \(1, 24, 64\)"),
    "dtype_of_a": (lambda: run(A.float(), B, S, T), r"a\[0\]: wanted float8_e4m3fn or float8_e5m2, found torch.float32"),
    "dtype_of_b": (lambda: run(A, B.half(), S, T), r"b\[0\]: wanted float8_e4m3fn or float8_e5m2, found torch.float16"),
    "both_e5m2": (lambda: run(A.view(E5), B.view(E5), S, T), "wanted at most one of them in float8_e5m2, found both"),
    "depth": (lambda: run(A[:, :48], B, S, T), r"b\[0\]: wanted \[48, N\] with both multiples of 16, found \(64, 48\)"),
    "odd_depth": (lambda: run(A[:, :40], B[:40], S, T), r"wanted \[40, N\] with both multiples of 16, found \(40, 48\)"),
    "odd_width": (lambda: run(A, B[:, :40], S, T[:, :40]), r"found \(64, 40\)"),
    "rows": (lambda: run([A, A[:8]], [B, B], [S, S[:8]], [T, T]), r"a\[1\]: wanted 24 rows, as a\[0\] has, found 8"),
    "row_major_b": (lambda: run(A, fp8(64, 48), S, T), r"b\[0\]: wanted a column-major tensor, found strides \(48, 1\)"),
    "dtype_of_scale": (lambda: run(A, B, S.double(), T), r"scale_a\[0\]: wanted float32, found torch.float64"),
    "size_of_scale": (lambda: run(A, B, S, T[:, :8]), r"scale_b\[0\]: wanted one element or 48, found shape \(1, 8\)"),
    "size_of_bias": (lambda: run(*GOOD, torch.zeros(8).bfloat16()), r"bias\[0\]: wanted 48 elements of torch.bfloat16"),
    "dtype_of_bias": (lambda: run(*GOOD, torch.zeros(48)), r"bias\[0\]: .* found torch.float32 of shape \(48,\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_argument_errors_say_what_was_wanted_and_found(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert str(caught.value).startswith("scaled_mm: ") or name == "configuration"


# ---- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["stream:16x64/8", "stream:64x128/2", "tile:128x160p", "tile:256x128c@2x1", "blackwell:256x128@2x1", "blackwell:128x128"],
)
def test_a_name_is_its_configuration(name: str) -> None:
    config = parse(name)
    assert config.name == name and parse(config.name) is config
    assert config.source == f"scaled_mm/{config.family}.cuh"
    assert f"{config.m}, {config.n}" in config.cpp(E4, E4, BF16, exact=True)


def test_every_configuration_has_a_name_of_its_own() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given
    from hypothesis import strategies as st

    sizes, clusters = st.integers(1, 512), st.tuples(st.integers(1, 4), st.integers(1, 4))
    configs = st.one_of(
        st.builds(Config, st.just("stream"), sizes, sizes, split=st.integers(1, 16)),
        st.builds(Config, st.just("tile"), sizes, sizes, pingpong=st.booleans(), cluster=clusters),
        st.builds(Config, st.just("blackwell"), sizes, sizes, cluster=clusters),
    )

    @given(configs)
    def round_trip(config: Config) -> None:
        assert parse(config.name) == config

    round_trip()


@pytest.mark.parametrize("name", ["", "tile", "tile:128", "tile:128x128q", "Tile:128x128", "stream:16x64/8 ", "tile:128x128@2"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="wanted a configuration such as tile:128x128p@2x1, found"):
        parse(name)


@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_examples_are_configurations_that_exist(target: str) -> None:
    keys = scaled_mm.examples(target)
    assert keys
    for name, *_, fast in keys:  # type: ignore[misc]
        assert parse(name).supports(not fast)


# ---- choice ----------------------------------------------------------------------------------------------------------


def _table(shapes: Any) -> choice.Table:
    return choice.Table(tables.content(shapes))


KIND = choice.kind(False, False)


@pytest.mark.parametrize(("m", "config"), [(1, STREAM), (16, STREAM), (17, TILE), (16384, TILE), (100_000, TILE)])
def test_the_smallest_measured_m_that_is_not_under_ours(m: int, config: str) -> None:
    chosen = _table({(1024, 1024): FASTER}).choose(KIND, m, 1024, 1024)
    assert chosen is not None and chosen.config.name == config and chosen.use


def test_a_larger_m_than_measured_takes_longer() -> None:
    table = _table({(1024, 1024): FASTER})
    one, two = (table.choose(KIND, m, 1024, 1024) for m in (16384, 32768))
    assert one is not None and two is not None and two.ours_us == 2 * one.ours_us and two.stock_us == 2 * one.stock_us


def test_the_nearest_shape_counts_and_is_named() -> None:
    table = _table({(1024, 1024): FASTER, (8192, 1024): SLOWER, (1024, 8192): SLOWER})
    for n, k, use in ((1024, 1024, True), (1500, 900, True), (6000, 1024, False), (1024, 6000, False)):
        chosen = table.choose(KIND, 16, n, k)
        assert chosen is not None and chosen.use is use
        assert ("the nearest measured to" in chosen.why) == ((n, k) != (1024, 1024))
        assert "a test's GPU" in chosen.why and KIND in chosen.why


def test_a_nearest_shape_has_to_gain_more() -> None:
    gains = {(1024, 1024): ((16, STREAM, 1.0, choice.MEASURED_GAIN),)}
    exact, near = (_table(gains).choose(KIND, 16, n, 1024) for n in (1024, 1040))
    assert exact is not None and near is not None and exact.use and not near.use
    better = {(1024, 1024): ((16, STREAM, 1.0, choice.UNMEASURED_GAIN),)}
    chosen = _table(better).choose(KIND, 16, 1040, 1024)
    assert chosen is not None and chosen.use


def test_a_kind_that_was_not_measured() -> None:
    table = choice.Table(tables.content({(1024, 1024): FASTER}, kinds=(KIND,)))
    assert table.choose(KIND, 16, 1024, 1024) is not None
    assert table.choose(choice.kind(True, False), 16, 1024, 1024) is None


def test_a_target_that_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {(1024, 1024): FASTER})
    assert choice.choose("sm_89", 16, 1024, 1024, False, False) is None
    assert choice.possible("sm_89", 1024, 1024, False, False) == []
    assert scaled_mm.decide("sm_89", 16, (512, 512), 1024, False, False) is None


@pytest.mark.parametrize(
    ("least", "most", "names"),
    [
        (1, choice.MAX_M, {STREAM, TILE}),
        (1, 16, {STREAM}),
        (1, 17, {STREAM, TILE}),
        (17, 64, {TILE}),
        (40_000, choice.MAX_M, {TILE}),
    ],
)
def test_every_choice_of_a_range(monkeypatch: pytest.MonkeyPatch, least: int, most: int, names: set[str]) -> None:
    tables.use(monkeypatch, {(1024, 1024): FASTER})
    found = choice.possible("sm_90a", 1024, 1024, False, False, least, most)
    assert {each.config.name for each in found} == names


@pytest.mark.parametrize(("stock", "use"), [(1.5, True), (0.9, False)])
def test_one_launch_is_compared_with_those_it_replaces(monkeypatch: pytest.MonkeyPatch, stock: float, use: bool) -> None:
    """Together 2 µs, as measured at N = 1024; apart two of PyTorch's."""
    apart, together = ((16, STREAM, 3.0, stock),), ((16, STREAM, 2.0, 9.0),)
    tables.use(monkeypatch, {(512, 1024): apart, (1024, 1024): together})
    chosen = scaled_mm.decide("sm_90a", 16, (512, 512), 1024, False, False)
    assert chosen is not None and chosen.use is use
    assert (chosen.ours_us, chosen.stock_us) == (2.0, 2 * stock)
    assert chosen.why == f"one launch of 2.0 µs for 2 of {2 * stock:.1f} µs together ({STREAM})"


def test_ours_counts_where_it_is_the_faster_one_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {(512, 1024): ((16, STREAM, 0.9, 3.0),), (1024, 1024): ((16, STREAM, 2.0, 9.0),)})
    chosen = scaled_mm.decide("sm_90a", 16, (512, 512), 1024, False, False)
    assert chosen is not None and not chosen.use and chosen.stock_us == 1.8


# ---- keys ------------------------------------------------------------------------------------------------------------


def _arguments(m: int = 24, widths: tuple[int, ...] = (48,), config: str = "") -> tuple[Any, ...]:
    pairs = [problem(m, n=n) for n in widths]
    first = pairs[0]
    weights, scales = [pair[1] for pair in pairs], [pair[3] for pair in pairs]
    return [first[0]], weights, [first[2]], scales, [None] * len(widths), BF16, True, False, config


def test_a_key_holds_what_is_compiled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {(48, 64): SMALL})
    assert scaled_mm.OP.kernel.key(*_arguments()) == (STREAM, E4, E4, BF16, True)
    assert scaled_mm.OP.kernel.keys(*_arguments()) == [(STREAM, E4, E4, BF16, True)]


def test_no_key_where_torch_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {(48, 64): SMALL})
    assert scaled_mm.OP.kernel.key(*_arguments(m=65)) is None


def test_a_configuration_given_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {})
    assert scaled_mm.OP.kernel.key(*_arguments(config=TILE)) == (TILE, E4, E4, BF16, True)


def test_a_group_has_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {(48, 64): FASTER, (32, 64): FASTER, (80, 64): FASTER})
    assert scaled_mm.OP.kernel.key(*_arguments(m=16, widths=(48, 32))) == (STREAM, E4, E4, BF16, True)


def test_a_group_has_no_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the products would be faster apart the group runs all the same: PyTorch's would have to be copied together."""
    tables.use(monkeypatch, {(48, 64): SLOWER, (32, 64): SLOWER, (80, 64): ((16, STREAM, 9.0, 1.0),)})
    chosen = scaled_mm.decide("sm_90a", 16, (48, 32), 64, False, True)
    assert chosen is not None and not chosen.use
    assert scaled_mm.OP.kernel.key(*_arguments(m=16, widths=(48, 32))) == (STREAM, E4, E4, BF16, True)


@pytest.mark.parametrize("wider", [False, True])
@pytest.mark.parametrize("widths", [(48,), (48, 32)])
def test_torchs_operator_writes_into_out(widths: tuple[int, ...], wider: bool) -> None:
    arguments = _arguments(widths=widths)
    buffer = torch.full((24, sum(widths) + 16 * wider), 7.0, dtype=BF16)
    out = buffer[:, : sum(widths)]
    scaled_mm.OP.kernel.stock(*arguments, out)
    torch.testing.assert_close(out, ops.scaled_mm(*arguments), rtol=1e-2, atol=1e-3)
    assert (buffer[:, sum(widths) :] == 7).all()
