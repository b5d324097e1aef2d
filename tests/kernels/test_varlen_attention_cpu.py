"""varlen_attention's kernel for compute capability 9.0 without a GPU: its source run on the CPU, where what is asynchronous
happens as late as it may (``tests/support/hopper_on_cpu``). NaNs lie around all that is read, and in the output."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inductor_ext.kernels import steps
from inductor_ext.kernels.varlen_attention.op import reference
from tests.support.hopper_on_cpu import AttentionKernel

BF16, FP16 = torch.bfloat16, torch.float16
Kernel = Callable[[torch.dtype, int], AttentionKernel]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    @functools.cache
    def made(dtype: torch.dtype, width: int) -> AttentionKernel:
        folder: Path = tmp_path_factory.mktemp("attention")
        return AttentionKernel(steps.CPP_TYPES[dtype], width, folder)

    return made


def rows(*sizes: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random, each row with NaNs behind it."""
    made = torch.Generator().manual_seed(seed)
    buffer = torch.full((*sizes[:-1], sizes[-1] + 8), torch.nan, dtype=dtype)
    view = buffer[..., : sizes[-1]]
    view.copy_(torch.randn(sizes, generator=made))
    return view


def packed(
    kernel: AttentionKernel, lengths: tuple[int, ...], heads: tuple[int, int], width: int, dtype: torch.dtype, left: int = -1,
    right: int = 0, behind: int = 7, **options: int,
) -> None:  # fmt: skip
    """Compares with the reference, and with zeros behind the last sequence."""
    total = sum(lengths)
    q, k, v = (rows(total + behind, each, width, dtype=dtype, seed=i) for i, each in enumerate((*heads, heads[1])))
    for each in (q, k, v):
        each[total:] = torch.nan
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    out = torch.full(q.shape, torch.nan, dtype=dtype)
    kernel(q, k, v, ends, width**-0.5, left, right, True, out, **options)
    wanted = reference(*(x[:total].double() for x in (q, k, v)), ends, 0, width**-0.5, left, right, 0.0, True, "")
    assert (out[:total].double() - wanted).norm() <= 6e-3 * wanted.norm()
    assert torch.equal(out[total:], torch.zeros_like(out[total:]))


@pytest.mark.parametrize(("dtype", "width"), [(BF16, 128), (FP16, 64)], ids=str)
@pytest.mark.parametrize("bounds", [(-1, 0), (-1, -1), (50, 0), (64, 200)], ids=str)
def test_sequences_of_all_sizes(kernel: Kernel, dtype: torch.dtype, width: int, bounds: tuple[int, int]) -> None:
    packed(kernel(dtype, width), (5, 130, 0, 300, 64, 129), (3, 1), width, dtype, *bounds)


@pytest.mark.parametrize("heads", [(2, 1), (4, 1), (3, 3)], ids=str)
def test_short_sequences_have_two_heads_in_a_tile(kernel: Kernel, heads: tuple[int, int]) -> None:
    packed(kernel(BF16, 128), (5, 64, 1, 0, 33, 65, 70), heads, 128, BF16, behind=0)


@pytest.mark.parametrize("seed", range(3))
def test_more_blocks_than_stages(kernel: Kernel, seed: int) -> None:
    """The second warpgroup has no queries of the last tile: it frees the stages that the first one reads."""
    packed(kernel(BF16, 128), (650, 3), (1, 1), 128, BF16, sms=1 + seed, seed=seed)


def test_batches(kernel: Kernel) -> None:
    """q, k and v as slices of one product, and [B, H, S, D] in memory."""
    wide = rows(2, 200, 8 * 128, dtype=BF16, seed=3).view(2, 200, 8, 128)
    slices = wide.split([4, 2, 2], 2)
    for q, k, v in (slices, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in slices]):
        out = torch.full((2, 200, 4, 128), torch.nan, dtype=BF16)
        kernel(BF16, 128)(q, k, v, None, 0.1, -1, 0, False, out)
        wanted = reference(q.double(), k.double(), v.double(), None, 0, 0.1, -1, 0, 0.0, False, "")
        assert (out.double() - wanted).norm() <= 6e-3 * wanted.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_sequence_of_nans_stays_alone(kernel: Kernel, value: float) -> None:
    ends = torch.tensor([0, 70, 90, 220], dtype=torch.int32)
    q, k, v = (rows(220, 2, 128, dtype=BF16, seed=i) for i in range(3))
    wanted, found = (torch.full((220, 2, 128), torch.nan, dtype=BF16) for _ in range(2))
    kernel(BF16, 128)(q, k, v, ends, 0.1, -1, 0, False, wanted)
    for each in (q, k, v):
        each[70:90] = value
    kernel(BF16, 128)(q, k, v, ends, 0.1, -1, 0, False, found)
    assert torch.equal(found[:70], wanted[:70]) and torch.equal(found[90:], wanted[90:])
    assert found[70:90].isnan().all()


def test_ends_past_the_rows_write_nothing_outside(kernel: Kernel) -> None:
    """`cu_seqlens` of another batch: rows that are not there are not written."""
    q, k, v = (rows(100, 1, 128, dtype=BF16, seed=i) for i in range(3))
    buffer = torch.full((200, 1, 128), 7.0, dtype=BF16)
    kernel(BF16, 128)(q, k, v, torch.tensor([0, 180], dtype=torch.int32), 0.1, -1, 0, False, buffer[:100])
    assert torch.equal(buffer[100:], torch.full_like(buffer[100:], 7.0))


def test_what_the_copy_engine_cannot_read_is_refused(kernel: Kernel) -> None:
    q = torch.zeros(9 * 128 + 4, dtype=BF16)[4:].view(9, 1, 128)
    out = torch.empty_like(q)
    with pytest.raises(RuntimeError, match="refused"):
        kernel(BF16, 128)(q, q, q, torch.tensor([0, 9], dtype=torch.int32), 0.1, -1, 0, False, out)
