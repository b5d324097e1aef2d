"""Every rule meets what it was not written for: graphs of all dtypes and ranks, around every operator that rules begin at.

No rule raises, whatever its answer is, and what they leave computes what the graph did.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.func import functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from inductor_ext import registry
from inductor_ext.rule import Rule
from tests.support import perturbed

E4 = torch.float8_e4m3fn
DTYPES = (
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool,
    torch.complex64, E4, torch.float8_e5m2,
)  # fmt: skip
SHAPES = ((), (16,), (4, 16), (2, 4, 16), (2, 2, 4, 16), (1, 2, 2, 4, 16), (0, 16), (4, 1))

Function = Callable[..., Any]


def _turned(x: Any) -> Any:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _stored(x: Any, y: Any) -> Any:
    cache = torch.cat((y, y, y)).clone()
    cache[torch.arange(x.shape[0])] = x
    return cache


def _pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))


FUNCTIONS: dict[str, Function] = {
    "chain": lambda x, y: (x / y).clamp(-448, 448).to(E4),
    "chain_of_a_number": lambda x, y: (x * 0.5).to(E4),
    "chain_in_fp32": lambda x, y: (x.float() * y.float().reciprocal()).clamp(-448.0, 448.0).to(E4),
    "row_scale": lambda x, y: ((x / (x.abs().amax(-1, keepdim=True) / 448)).clamp(-448, 448).to(E4), y),
    "tensor_scale": lambda x, y: ((x.float() / x.float().abs().max()).to(E4), (y.float() / y.float().abs().max()).to(E4)),
    "twice": lambda x, y: ((x / 2).to(E4), (x / 2).to(E4), (x / 3).to(E4)),
    "norm": lambda x, y: (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * y).to(E4),
    "residual_norm": lambda x, y: (x + y, torch.nn.functional.rms_norm((x + y).float(), (x.shape[-1],)).to(x.dtype).to(E4)),
    "gated": lambda x, y: (torch.nn.functional.silu(x) * y / 2).to(E4),
    "gelu": lambda x, y: torch.nn.functional.gelu(x) * y,
    "product": lambda x, y: x * y,
    "complex_turn": lambda x, y: torch.view_as_real(x * y),
    "complex_heads": lambda x, y: (lambda a, b: torch.view_as_real(a * b).flatten(-2).to(x.dtype))(_pairs(x), _pairs(y)),
    "rotation": lambda x, y: x * y + _turned(x) * y,
    "alpha": lambda x, y: torch.add(x * y, _turned(x) * y, alpha=2),
    "stored": lambda x, y: _stored(x, y),
    "stored_fp8": lambda x, y: _stored((x / 2).to(E4).view(torch.uint8), y),
    "where": lambda x, y: (torch.where(x > y, x, 0), x.nan_to_num(), torch.where(x.sum() > 1, x, y)),
    "masked": lambda x, y: torch.where(x > y, x, 0).sum(-2),
    "joined": lambda x, y: torch.cat((x @ y.mT, y @ x.mT), -1),
    "attention": lambda x, y: torch.nn.functional.scaled_dot_product_attention(x, y, y),
    "scaled_mm": lambda x, y: (
        torch._scaled_mm(
            x.reshape(-1, 16).to(E4), y.reshape(-1, 16).to(E4).t(), torch.ones(()), torch.ones(()), out_dtype=torch.bfloat16
        )
        + 1
    ),
    "combined": lambda x, y: (x[torch.arange(x.shape[0]).flip(0)].view(2, -1, x.shape[-1]) * y.view(2, -1, 16)[..., :1]).sum(1),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _made(dtype: torch.dtype, shape: tuple[int, ...]) -> list[torch.Tensor]:
    values = [torch.randn(shape) * 3 for _ in range(2)]
    return [value.to(dtype) if dtype is not torch.bool else value > 0 for value in values]


def _graph(fn: Function, inputs: list[torch.Tensor]) -> GraphModule | None:
    """The functional graph of ``fn``, in Inductor's operators and with fake values; None where PyTorch cannot do it."""
    try:
        fn(*(each.clone() for each in inputs))
        traced = make_fx(functionalize(fn), decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
    except Exception:
        return None
    traced.graph.eliminate_dead_code()
    return traced


def _rules() -> list[Rule]:
    return list(registry.rules())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_rule_fails_and_none_is_wrong(name: str) -> None:
    registry.define_lowerings()
    modes = {rule.name: "always" for rule in _rules()}
    seen = 0
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        inputs = _made(dtype, shape)
        module = _graph(FUNCTIONS[name], inputs)
        if module is None:
            continue
        seen += 1
        made, counts = perturbed.rewritten(module.graph, modes)
        wanted = perturbed.run(module.graph, list(inputs)) if counts else None
        if wanted is None:
            continue
        found = perturbed.run(made, list(inputs))
        assert found is not None, f"{dtype} {shape}"
        exact = all(registry.rule_named(rule).exact for rule in counts)
        for a, b in zip(found, wanted, strict=True):
            differing, distance = perturbed.distance(a, b)
            assert differing == 0 if exact else distance < 1e-2, f"{dtype} {shape}: {counts}"
    assert seen > 2
