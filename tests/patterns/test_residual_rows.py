"""residual_rows: what the norms of a vision or sound encoder make of it, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext.report.explain import Explanation
from tests.support.equal import assert_all_same_bytes
from tests.support.fakegpu import fake_gpu

E4, BF16 = torch.float8_e4m3fn, torch.bfloat16
B, C, T = 2, 64, 24
F = torch.nn.functional


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    x, positions = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in ((B, C, T), (T, C)))
    return x.to(device, dtype), positions.to(device, dtype)


def cast(s: torch.Tensor) -> torch.Tensor:
    return s.contiguous().clamp(-448.0, 448.0).to(E4)


def quantised(y: torch.Tensor) -> torch.Tensor:
    scale = y.abs().amax(-1, keepdim=True).float() / 448.0
    return (y.float() / scale).clamp(-448.0, 448.0).to(E4)


def encoder(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Three norms, as in a layer of Whisper's encoder and the beginning of the next."""
    s = F.gelu(x).permute(0, 2, 1) + positions
    first = quantised(F.layer_norm(s, (C,)))
    s = s + first.to(s.dtype)
    second = quantised(F.layer_norm(s, (C,)))
    return first, second, quantised(F.layer_norm(s + second.to(s.dtype), (C,)))


def calls_of(found: Explanation, op: str) -> list[str]:
    return [line for line in found.graphs[0].after.splitlines() if f"inductor_ext.{op}.default" in line]


def test_norms_take_the_sums_of_an_encoder() -> None:
    found = inductor_ext.explain(encoder, *inputs(BF16))
    assert found.counts() == {"residual_rows": 1, "layer_norm_quantize": 3}
    made = calls_of(found, "norm_quantize")
    assert "None, None, None, None, None," in made[0] and not any("None, None, None, None, None," in each for each in made[1:])
    without = inductor_ext.explain(encoder, *inputs(BF16), rules={"residual_rows": "off"})
    assert all("None, None, None, None, None," in each for each in calls_of(without, "norm_quantize")), "no norm has a residual"


def test_the_convolution_is_read_once() -> None:
    """Without the rule each sum is taken apart down to the convolution's output, by a kernel of its own."""

    def make() -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(shape, dtype=BF16, device="cuda") for shape in ((B, C, T), (T, C)))

    readers = {}
    for mode in ("auto", "off"):
        with fake_gpu() as gpu:
            source = gpu.source(encoder, make, backend=inductor_ext.backend(build="defer", rules={"residual_rows": mode}))
        readers[mode] = sum(".run(arg0_1" in line for line in source.split("runner = ")[0].splitlines())
    assert readers == {"auto": 1, "off": 3}


def _kept(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The sum and the norm's copy of it are both returned: the caller may write to one."""
    s = x.transpose(1, 2) + positions
    t = s + cast(s).to(s.dtype)
    return cast(t), t.contiguous(), t.amax(1)


def _mean(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    s = x.transpose(1, 2) + positions
    return cast(s), s.reshape(B, T, 4, C // 4).transpose(1, 2).contiguous()


@pytest.mark.parametrize("fn", [_kept, _mean])
def test_what_is_returned_has_the_strides_of_eager(fn: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    given = inputs()
    found = inductor_ext.explain(fn, *given)
    assert found.counts().get("residual_rows", 0) == 1
    wanted, compiled = fn(*given), torch.compile(fn, backend="inductor_ext")(*given)
    assert_all_same_bytes(compiled, wanted)
    assert [each.stride() for each in compiled] == [each.stride() for each in wanted]
    assert len({each.untyped_storage().data_ptr() for each in compiled}) == len(wanted)


def _no_fp8(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    s = x.transpose(1, 2) + positions
    return s.contiguous().clamp(-1, 1), s * 2


def _of_an_input(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    s = x.transpose(1, 2)
    return cast(s), (s + positions).amax(-1)


def _one_reader(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return cast(x.transpose(1, 2) + positions)


def _in_rows(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Slices of a wider buffer, whose columns lie side by side already."""
    s = F.pad(x.transpose(1, 2).contiguous() + positions, (0, 8))[..., :C].clone() + 1
    return cast(s), (s + 1).amax(-1)


def _of_integers(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    s = x.transpose(1, 2).int() + positions.int()
    return s.contiguous().to(E4), s.amax(-1)


def _channels_last(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A copy that does not lie in rows."""
    s = x.view(B, 8, 8, T) + 1
    return cast(s.permute(0, 3, 1, 2).abs().clone(memory_format=torch.channels_last)), s.amax(-1)


@pytest.mark.parametrize("fn", [_no_fp8, _of_an_input, _one_reader, _in_rows, _of_integers, _channels_last])
def test_left_alone(fn: Callable[..., Any]) -> None:
    found = inductor_ext.explain(fn, *inputs())
    assert "residual_rows" not in found.counts() and not [each for each in found.refusals if each.rule == "residual_rows"]


def test_a_store_may_see_how_it_lies() -> None:
    def fn(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        s = x.transpose(1, 2) + positions
        positions.copy_(s[0])
        return cast(s)

    found = inductor_ext.explain(fn, *inputs())
    assert "residual_rows" not in found.counts()
    assert [each.reason for each in found.refusals if each.rule == "residual_rows"] == [
        "something may see how the residual stream lies"
    ]
