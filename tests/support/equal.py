"""Byte equality, NaN matching NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def different(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mask of the elements whose bytes differ, two NaNs of any payload counting as equal."""
    assert a.dtype == b.dtype and a.shape == b.shape, f"{a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}"
    if a.device != b.device:  # both on a GPU are compared there: hundreds of megabytes, in some tests
        a, b = a.cpu(), b.cpu()
    a, b = (t.detach().clone(memory_format=torch.contiguous_format) for t in (a, b))  # one element may have any stride
    if not a.numel():
        return torch.zeros(a.shape, dtype=torch.bool, device=a.device)
    one, two = (t.reshape(-1).view(torch.uint8).reshape(t.numel(), t.element_size()) for t in (a, b))
    bytes_differ = (one != two).any(-1).reshape(a.shape)
    if not a.is_floating_point():
        return bytes_differ
    return bytes_differ & ~(a.float().isnan() & b.float().isnan())


def assert_same_bytes(found: torch.Tensor, wanted: torch.Tensor, what: str = "") -> None:
    mask = different(found, wanted)
    if mask.any():
        at = mask.nonzero()[0].tolist()
        index = tuple(at)
        values = f"wanted {wanted[index].double().item()}, found {found[index].double().item()}"
        raise AssertionError(f"{what or 'tensors'} differ in {int(mask.sum())} of {mask.numel()}, first at {at}: {values}")


def assert_all_same_bytes(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert_same_bytes(a, b, f"tensor {index}")
