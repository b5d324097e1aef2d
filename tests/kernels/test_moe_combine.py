"""moe_combine: its reference against eager chains, its arguments' errors, its kernel's source on a CPU, and the kernel."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_ext import jit, registry
from inductor_ext.kernels.moe_combine.op import MAX_TOP_K, OP, moe, product_dtype
from tests.support import cuda_on_cpu
from tests.support.equal import assert_same_bytes

registry.ops()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
I64, I32 = torch.int64, torch.int32
combine = torch.ops.inductor_ext.moe_combine
#: y, weights, inverse, expert_ids, out: what the library of the CPU is compiled for, and others
VARIANTS = {
    "bf16": (BF16, BF16, I64, I64, BF16),
    "bf16_by_fp32": (BF16, FP32, I64, I32, BF16),
    "fp16": (FP16, FP16, I32, I64, FP32),
    "fp32": (FP32, FP32, I32, I32, FP32),
}
EXPERTS = 5


def operands(
    tokens: int, top_k: int, columns: int, kind: str = "bf16", device: str = "cpu", masked: bool = True
) -> tuple[Any, ...]:
    """Arguments of the op. Rows of experts that are not here are NaN, as if nothing had been written there."""
    y_dtype, weights_dtype, inverse_dtype, ids_dtype, dtype = VARIANTS[kind]
    made = torch.Generator().manual_seed(tokens + top_k + columns)
    ids = torch.randint(0, EXPERTS + 1, (tokens, top_k), generator=made)
    sorted_ids, perm = torch.sort(ids.view(-1), stable=True)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(tokens * top_k)
    y = torch.randn(tokens * top_k, columns, generator=made).to(y_dtype)
    if masked:
        y[sorted_ids >= EXPERTS] = float("nan")
    weights = torch.rand(tokens, top_k, generator=made).to(weights_dtype)
    table = inverse.view(tokens, top_k).to(inverse_dtype)
    moved = (each.to(device) for each in (y, weights, table, ids.to(ids_dtype)))
    y, weights, table, ids = moved
    return y, weights, table, ids if masked else None, EXPERTS, dtype


def summed_by_fours(y: Any, weights: Any, inverse: Any, ids: Any, experts: int, dtype: Any) -> torch.Tensor:
    """The kernel's own order: product j goes to the sum j % 4."""
    products = y[inverse.view(-1).long()].view(*inverse.shape, y.shape[1])
    if weights is not None:
        products = products * weights.unsqueeze(-1)
    assert products.dtype is product_dtype(y, weights)
    if ids is not None:
        products = torch.where((ids >= experts).unsqueeze(-1), 0.0, products)
    sums = [torch.zeros(inverse.shape[0], y.shape[1], device=y.device) for _ in range(4)]
    for j in range(inverse.shape[1]):
        sums[j % 4] += products[:, j].float()
    return (((sums[0] + sums[1]) + sums[2]) + sums[3]).to(dtype)


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 11])
def test_the_reference_is_the_eager_chain(top_k: int) -> None:
    y, weights, inverse, ids, experts, dtype = operands(7, top_k, 48)
    flat = inverse.view(-1)
    perm = torch.argsort(flat)
    rows = y.masked_fill((ids.view(-1)[perm] >= experts).unsqueeze(-1), 0.0) * weights.view(-1)[perm].unsqueeze(-1)
    assert_same_bytes(combine(y, weights, inverse, ids, experts, dtype), rows[flat].view(7, top_k, 48).sum(1))


def test_the_reference_is_transformers_experts() -> None:
    """Their experts with both matmuls taken as they are: what is left is the sort and the combination."""
    pytest.importorskip("transformers")
    from types import SimpleNamespace
    from unittest import mock

    moe_module = pytest.importorskip("transformers.integrations.moe")
    if not hasattr(moe_module, "grouped_mm_experts_forward"):
        pytest.skip("this transformers has no grouped_mm experts")
    made = torch.randn(6 * 2, 32).bfloat16()  # what the second matmul gives
    experts = SimpleNamespace(
        num_experts=4, has_gate=True, has_bias=False, has_post_expert_norm=False, is_transposed=False, gate_up_proj=None,
        down_proj=None, _is_expert_parallel=False, _apply_gate=lambda both: both,
    )  # fmt: skip
    ids, weights = torch.randint(0, 4, (6, 2)), torch.rand(6, 2).bfloat16()
    with mock.patch.object(moe_module, "_grouped_linear", lambda *_args, **_kwargs: made):
        wanted = moe_module.grouped_mm_experts_forward(experts, torch.randn(6, 32).bfloat16(), ids, weights)
    inverse = torch.argsort(torch.sort(ids.view(-1)).indices).view(6, 2)
    assert_same_bytes(combine(made, weights, inverse, ids, 4, BF16), wanted)


def test_without_weights_and_masks() -> None:
    y, _, inverse, _, _, dtype = operands(5, 3, 16, masked=False)
    assert_same_bytes(combine(y, None, inverse, None, 0, dtype), y[inverse.view(-1)].view(5, 3, 16).sum(1))


def test_a_masked_row_counts_as_zero_whatever_its_weight() -> None:
    y, weights, inverse, ids, experts, dtype = operands(60, 1, 16)
    weights = torch.where(ids >= experts, float("nan"), weights.float()).to(BF16)
    found = combine(y, weights, inverse, ids, experts, dtype)
    assert found.isfinite().all() and (ids >= experts).all(1).any()
    assert not found[(ids >= experts).all(1)].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": lambda y: y.double()}, TypeError, "y: wanted bfloat16, float16 or float32"),
        ({"y": lambda y: y[0]}, ValueError, r"y: wanted rows, \[S, H\]"),
        ({"inverse": lambda i: i.float()}, TypeError, "inverse: wanted int64 or int32"),
        ({"inverse": lambda i: i.view(-1)}, ValueError, r"inverse: wanted \[T, k\]"),
        ({"inverse": lambda i: i.repeat(1, 40)}, ValueError, r"inverse: wanted \[T, k\], k from 1 to 64"),
        ({"weights": lambda w: w.long()}, TypeError, "weights: wanted bfloat16"),
        ({"weights": lambda w: w.t()}, ValueError, "weights: wanted the shape of inverse"),
        ({"expert_ids": lambda e: e.bool()}, TypeError, "expert_ids: wanted int64 or int32"),
        ({"expert_ids": lambda e: e[:1]}, ValueError, "expert_ids: wanted the shape of inverse"),
        ({"dtype": lambda _: torch.int8}, TypeError, "dtype: wanted bfloat16"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("y", "weights", "inverse", "expert_ids", "experts", "dtype")
    values = dict(zip(names, operands(4, 2, 16)))
    values.update({name: make(values[name]) for name, make in change.items()})
    with pytest.raises(error, match=message):
        combine(*values.values())


def test_an_index_outside_y() -> None:
    y, weights, inverse, ids, experts, dtype = operands(4, 2, 16)
    with pytest.raises(IndexError):
        combine(y, weights, inverse + 8, ids, experts, dtype)


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_fake_agrees(tokens: int) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = operands(tokens, 2, 24, "fp16")
    real = combine(*given)
    with FakeTensorMode() as mode:
        fake = combine(*(mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in given))
    assert (real.dtype, real.shape, real.stride()) == (fake.dtype, fake.shape, fake.stride())
    torch.library.opcheck(OP.overload, given, test_utils=("test_schema", "test_faketensor"))


# ---- the kernel's source, on a CPU -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda_on_cpu.compiled("moe_combine", Path(tmp_path_factory.mktemp("moe_combine")))


def on_cpu(library: ctypes.CDLL, kind: str, given: tuple[Any, ...]) -> torch.Tensor:
    y, weights, inverse, ids, experts, dtype = given
    out = torch.full((inverse.shape[0], y.shape[1]), 123.0, dtype=dtype)
    pointers = [None if each is None else ctypes.byref(cuda_on_cpu.Given.of(each)) for each in (y, weights, inverse, ids, out)]
    error = ctypes.create_string_buffer(500)
    failed = getattr(library, kind)(*pointers[:4], ctypes.c_int64(experts), pointers[4], error, 500)
    assert not failed, error.value.decode()
    return out


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 64])
def test_the_source_gives_every_byte(library: ctypes.CDLL, kind: str, top_k: int) -> None:
    """Widths of a few lanes, of all, and of several pieces; the last, with no whole vectors, element by element."""
    for tokens, columns in ((1, 8), (19, 40), (3, 1032), (2, 2048), (3, 100)):
        for masked in (True, False):
            given = operands(tokens, top_k, columns, kind, masked=masked)
            found = on_cpu(library, kind, given)
            assert_same_bytes(found, summed_by_fours(*given))
            torch.testing.assert_close(found, OP.reference(*given), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_the_source_takes_several_vectors_where_there_are_many(library: ctypes.CDLL, kind: str, top_k: int) -> None:
    """On one multiprocessor: several tokens a block and one, whole pieces, and one whose last vectors are not there."""
    library.set_multiprocessors(1)
    try:
        for tokens, columns in ((3300, 40), (130, 1032), (33, 4096), (19, 7176)):
            assert tokens * columns // 8 >= 16 * 128 * 8 // top_k, "enough for the kernels that this is about"
            for masked in (True, False):
                given = operands(tokens, top_k, columns, kind, masked=masked)
                assert_same_bytes(on_cpu(library, kind, given), summed_by_fours(*given))
    finally:
        library.set_multiprocessors(132)


def test_the_source_keeps_no_negative_zero(library: ctypes.CDLL) -> None:
    """A sum begins at +0, in PyTorch too, and so does one of one value."""
    for top_k in (1, 2, 5):
        y, weights, inverse, _, experts, dtype = operands(4, top_k, 64, masked=False)
        given = torch.full_like(y, -0.0), weights, inverse, None, experts, dtype
        found = on_cpu(library, "bf16", given)
        assert not found.signbit().any()
        assert_same_bytes(found, summed_by_fours(*given))


def test_the_source_without_weights_with_a_pitch_and_with_no_tokens(library: ctypes.CDLL) -> None:
    y, _, *rest = operands(4, 2, 64)
    assert_same_bytes(on_cpu(library, "bf16", (y, None, *rest)), summed_by_fours(y, None, *rest))
    for start in (64, 1):  # vectors, and elements
        wide = torch.full((8, 192), float("nan")).bfloat16()
        wide[:, start : start + 64] = y
        assert_same_bytes(on_cpu(library, "bf16", (wide[:, start : start + 64], None, *rest)), summed_by_fours(y, None, *rest))
    assert on_cpu(library, "bf16", operands(0, 2, 64)).shape == (0, 64)


def test_the_source_reads_no_row_outside_y(library: ctypes.CDLL) -> None:
    y, weights, inverse, _, experts, dtype = operands(4, 2, 64, masked=False)
    bad = inverse.clone()
    bad[1, 1], bad[2, 0], bad[3] = 8, -9, inverse[3] - 8  # past the end, before the start, counted from the end
    found = on_cpu(library, "bf16", (y, weights, bad, None, experts, dtype))
    wanted = summed_by_fours(y, weights, inverse, None, experts, dtype)
    assert found[1:3].isnan().all()
    assert_same_bytes(found[[0, 3]], wanted[[0, 3]])


# ---- the kernel ------------------------------------------------------------------------------------------------------


def kernels(arch: str) -> list[jit.JitSpec]:
    calls = [operands(2, 2, 8, kind, masked=masked) for kind, masked in itertools.product(VARIANTS, (True, False))]
    return [spec for call in calls for spec in OP.specs(call, arch)] + [OP.spec_of_key(key, arch) for key in moe(arch)]


gpu = pytest.mark.gpu(kernels=kernels)


@gpu
@pytest.mark.parametrize("kind", VARIANTS)
def test_the_kernel_gives_every_byte(kind: str) -> None:
    for (tokens, top_k), columns in itertools.product(
        ((1, 1), (1, 8), (37, 2), (130, 8), (65, 9), (9, MAX_TOP_K), (2500, 1), (2500, 2), (2500, 4), (70, 6)),
        (8, 64, 100, 1032, 2048, 7168),
    ):
        for masked in (True, False):
            given = operands(tokens, top_k, columns, kind, "cuda", masked)
            found = combine(*given)
            assert_same_bytes(found, summed_by_fours(*given))
            torch.testing.assert_close(found, OP.reference(*given), rtol=2**-7, atol=2**-7)


@gpu
def test_the_kernel_without_weights_with_a_pitch_and_with_no_tokens() -> None:
    y, _, *rest = operands(40, 8, 1024, device="cuda")
    assert_same_bytes(combine(y, None, *rest), summed_by_fours(y, None, *rest))
    for start in (64, 1):
        wide = torch.full((320, 3072), float("nan"), device="cuda").bfloat16()
        wide[:, start : start + 1024] = y
        assert_same_bytes(combine(wide[:, start : start + 1024], None, *rest), summed_by_fours(y, None, *rest))
    assert combine(*operands(0, 8, 64, device="cuda")).shape == (0, 64)


@gpu
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 6, 7, 8, 10])
def test_the_order_of_the_sum_is_that_of_pytorchs_kernel(top_k: int) -> None:
    """What the .cuh says of PyTorch's CUDA reduction; should it fail, only that sentence is wrong."""
    given = operands(300, top_k, 2048, device="cuda", masked=False)
    assert_same_bytes(combine(*given), OP.reference(*given))


@gpu
def test_the_kernel_reads_no_row_outside_y() -> None:
    y, weights, inverse, _, experts, dtype = operands(4, 2, 64, device="cuda", masked=False)
    bad = inverse.clone()
    bad[1, 1], bad[2, 0], bad[3] = 8, -9, inverse[3] - 8
    found = combine(y, weights, bad, None, experts, dtype)
    wanted = summed_by_fours(y, weights, inverse, None, experts, dtype)
    assert found[1:3].isnan().all()
    assert_same_bytes(found[[0, 3]], wanted[[0, 3]])
