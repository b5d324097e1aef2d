"""mxfp8_round: what mxfp8_quantize leaves of x."""

from __future__ import annotations

import pytest
import torch

from tests.support.equal import assert_same_bytes

ops = torch.ops.inductor_ext


@pytest.mark.parametrize("rounding", ["rceil", "floor"])
@pytest.mark.parametrize("shape", [(7, 96), (2, 3, 64), (0, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_it_rounds(dtype: torch.dtype, shape: tuple[int, ...], rounding: str) -> None:
    x = (torch.randn(shape) * 3).to(dtype)
    data, scales = ops.mxfp8_quantize(x, None, rounding, False)
    power = torch.exp2(scales.view(torch.uint8).double() - 127).repeat_interleave(32, -1)
    found = ops.mxfp8_round(x, rounding)
    assert found.dtype is dtype
    assert_same_bytes(found, (data.double() * power).to(dtype))
    assert_same_bytes(ops.mxfp8_round(found, rounding), found)


def test_errors_and_opcheck() -> None:
    with pytest.raises(ValueError, match="x: wanted rows of a multiple of 32 elements"):
        ops.mxfp8_round(torch.zeros(4, 40), "rceil")
    with pytest.raises(ValueError, match="rounding: wanted rceil or floor, found 'even'"):
        ops.mxfp8_round(torch.zeros(4, 32), "even")
    torch.library.opcheck(ops.mxfp8_round.default, (torch.randn(4, 64), "rceil"))
