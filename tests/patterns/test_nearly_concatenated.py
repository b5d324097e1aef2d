"""An activation beside other columns: spellings that are read, what is nearly one, and what Inductor writes around its op."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext.patterns.support.has_run import NOT_MEASURED
from tests.support.fakegpu import fake_cuda_inputs, fake_gpu
from tests.support.nearly import check, quantise_rows, reasons, refused

F = torch.nn.functional
RULE = "act_cat_quantize"


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def beside(x: torch.Tensor, h: torch.Tensor) -> Any:
    return quantise_rows(torch.cat((x, F.gelu(h)), -1))


def gpt_oss(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def h(*leading: int) -> torch.Tensor:
    return made(*leading, 64, seed=1)


#: x and how it becomes [3, 8, 32].
SOURCES: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]] = {
    "heads_before_positions": (made(3, 2, 8, 16), lambda x: x.transpose(1, 2).flatten(2)),
    "heads_after_positions": (made(3, 8, 2, 16), lambda x: x.flatten(2)),
    "heads_of_tokens": (made(24, 2, 16), lambda x: x.view(3, 8, 32)),
    "heads_in_other_batches": (made(6, 4, 2, 16), lambda x: x.reshape(3, 8, 32)),
    "heads_in_two_dimensions": (made(3, 8, 2, 2, 8), lambda x: x.reshape(3, 8, 32)),
    "one_head": (made(3, 1, 8, 32), lambda x: x.transpose(1, 2).flatten(2)),
    "heads_of_one_column": (made(3, 32, 8, 1), lambda x: x.transpose(1, 2).flatten(2)),
    "positions_before_samples": (made(8, 3, 32), lambda x: x.transpose(0, 1)),
    "a_copy": (made(8, 3, 32), lambda x: x.transpose(0, 1).contiguous()),
    "some_positions": (made(3, 20, 32), lambda x: x[:, 5:13]),
    "some_columns": (made(3, 8, 96), lambda x: x[..., 32:64]),
    "q_of_qkv": (made(3, 8, 3, 2, 16), lambda x: x[:, :, 1].flatten(2)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_where_the_other_columns_come_from(name: str) -> None:
    x, columns = SOURCES[name]
    check(RULE, lambda x, h: beside(columns(x), h), x, h(3, 8), count=1)


@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (1, 1), (1,)], ids=str)
def test_leading_dimensions_of_any_number(shape: tuple[int, ...]) -> None:
    check(RULE, beside, made(*shape, 32), h(*shape), count=1)


def test_a_number_beside_a_vector() -> None:
    def fn(x: torch.Tensor, h: torch.Tensor) -> Any:
        both = torch.cat((x.reshape(1), F.gelu(h)), -1)
        return torch.ops.inductor_ext.mxfp8_quantize(both.view(1, 64), None, "rceil", False)

    check(RULE, fn, made(), made(63, seed=1), count=1)


#: What is activated, of [3, 8, 64], by model libraries' lines.
ACTIVATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "silu": F.silu,
    "relu_squared": lambda h: F.relu(h).square(),
    "halves": lambda h: F.silu(h[..., :32]) * h[..., 32:],
    "pairs": lambda h: gpt_oss(h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)),
    "in_fp32": lambda h: (F.silu(h[..., :32].float()) * h[..., 32:].float()).to(h.dtype),
}


@pytest.mark.parametrize("x_first", [True, False])
@pytest.mark.parametrize("name", ACTIVATED)
def test_every_activation_on_either_side(name: str, x_first: bool) -> None:
    def both(x: torch.Tensor, h: torch.Tensor) -> Any:
        parts = x, ACTIVATED[name](h)
        return quantise_rows(torch.cat(parts if x_first else parts[::-1], -1))

    check(RULE, both, made(3, 8, 32), h(3, 8), count=1)


def test_which_side_is_which_shows() -> None:
    """Both of one width."""
    for fn in (beside, lambda x, h: quantise_rows(torch.cat((F.gelu(h), x), -1))):
        check(RULE, fn, made(3, 8, 64), h(3, 8), count=1)


NEARLY: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "three_pitches": (lambda x: x[:, :, :3].permute(1, 0, 2, 3), made(2, 4, 5, 32)),
    "columns_of_heads_first": (lambda x: x.permute(0, 2, 3, 1).flatten(2), made(4, 2, 3, 16)),
    "rows_of_one_sample": (lambda x: x.expand(4, 2, 32), made(1, 2, 32)),
}


@pytest.mark.parametrize("name", NEARLY)
def test_what_no_kernel_reads_where_it_lies(name: str) -> None:
    columns, x = NEARLY[name]
    refused(RULE, lambda x, h: beside(columns(x), h), x, h(*columns(x).shape[:-1]), reason="input layout")


def test_heads_that_are_copied_in_another_order_than_rows_are_left_to_inductor() -> None:
    """[B, H, S, D] flattened to tokens: what the copy is of has no rows of tokens."""
    x, tokens = made(3, 2, 8, 16), h(24)
    fn = lambda x, h: beside(x.transpose(1, 2).reshape(24, 32), h)  # noqa: E731
    found = inductor_ext.verify(fn, x, tokens, end_to_end=False)
    assert reasons(found, RULE) == ["Inductor fuses this concatenation into its producer for free"]
    check(RULE, fn, x, tokens, count=1)


def test_a_concatenation_without_an_activation_is_none_of_its_business() -> None:
    fn = lambda x, h: quantise_rows(torch.cat((x, torch.sin(h)), -1))  # noqa: E731
    found = inductor_ext.verify(fn, made(8, 32), h(8), end_to_end=False)
    assert reasons(found, RULE) == []


def test_an_input_of_no_rank_beside_it() -> None:
    """PyTorch lets an empty vector take part in any concatenation."""
    found = inductor_ext.verify(beside, torch.empty(0).bfloat16(), h(3, 8), end_to_end=False)
    assert found.differs == [] and "the rule failed" not in reasons(found, RULE)


def test_as_many_columns_as_the_kernel_takes() -> None:
    check(RULE, beside, made(2, 32768 - 64), h(2), count=1)
    refused(RULE, beside, made(2, 32769 - 64), h(2), reason="too many columns")


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_copy_of_heads_and_no_other_kernel(dynamic: bool) -> None:
    def block(x: torch.Tensor, h: torch.Tensor) -> Any:
        return beside(x.transpose(1, 2).flatten(2), h)

    def inputs() -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((3, 2, 8, 16), (3, 8, 64)))

    with fake_gpu() as gpu:
        source = gpu.source(block, inputs, backend=inductor_ext.backend(build="defer"), dynamic=dynamic)
    body = source.split("benchmark_compiled_module")[0].split("runner = ")[0]
    assert len(re.findall(r"inductor_ext_act_cat_quantize\(", body)) == 1
    assert ".run(" not in body
    assert len(re.findall(r"empty_strided_cuda\(", body)) == 2


@pytest.mark.parametrize(("capability", "count"), [((9, 0), 1), ((8, 9), 0), ((10, 0), 0)])
def test_it_is_on_where_act_quantize_was_measured(capability: tuple[int, int], count: int) -> None:
    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
        given = [torch.empty(3, 8, columns, dtype=torch.bfloat16, device="cuda") for columns in (32, 64)]
        with mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: capability):
            auto, forced = (inductor_ext.explain(beside, *given, rules={RULE: mode}) for mode in ("auto", "always"))
    assert (auto.counts().get(RULE, 0), forced.counts()[RULE]) == (count, 1)
    assert count or NOT_MEASURED in [each.reason for each in auto.refusals if each.rule == RULE]
