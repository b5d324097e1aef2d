"""``strict`` over the graphs of a model: graph breaks, prefill and decode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import inductor_ext
from inductor_ext.errors import StrictError

E4 = torch.float8_e4m3fn
RULES = {"fp8_downcast": "auto"}


def chain(x: Any) -> Any:
    return (x.float() / 0.5).clamp(-448.0, 448.0).to(E4)


def broken(x: Any) -> Any:
    """Two graphs; the second holds what is asked for."""
    y = torch.sin(x)
    torch._dynamo.graph_break()
    return y, chain(x)


def x() -> torch.Tensor:
    return torch.randn(8, 256).bfloat16()


def test_a_later_graph_need_not_match_again() -> None:
    """A decode step does not hold what the prefill held."""
    backend = inductor_ext.backend(rules=RULES, strict=True)
    torch.compile(chain, backend=backend)(x())
    torch.compile(torch.sin, backend=backend)(x())


def test_the_first_graph_has_to_match_where_nothing_else_is_said() -> None:
    with pytest.raises(BackendCompilerFailed, match="fp8_downcast matched nothing in this graph"):
        torch.compile(broken, backend=inductor_ext.backend(rules=RULES, strict=True))(x())


@pytest.mark.parametrize("how", ["configured", "options", "name"])
def test_a_block_counts_all_graphs_in_it(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keywords: dict[str, Any] = {"backend": "inductor_ext"}
    if how == "configured":
        keywords = {"backend": inductor_ext.backend(rules=RULES, strict=True)}
    elif how == "options":
        keywords["options"] = {"rules": RULES, "strict": True}
    else:
        monkeypatch.setenv("INDUCTOR_EXT_RULES", "fp8_downcast")
        monkeypatch.setenv("INDUCTOR_EXT_STRICT", "1")
    with inductor_ext.whole_model():
        torch.compile(broken, **keywords)(x())


def test_a_block_in_which_nothing_matched_names_the_rule_and_the_graphs() -> None:
    backend = inductor_ext.backend(rules={"moe_combine": "auto", **RULES, "fp8_quantize": "off"}, strict=True)
    with pytest.raises(StrictError) as caught, inductor_ext.whole_model():
        torch.compile(torch.sin, backend=backend)(x())
        torch.compile(lambda x: chain(torch.cos(x)), backend=backend)(x())
    message = str(caught.value)
    assert message.startswith("strict=True: moe_combine, fp8_downcast matched nothing in any of 2 graphs\n  fp8_downcast at ")
    assert "for free; wanted a graph input" in message


def test_an_error_in_a_block_is_not_replaced_by_its_check() -> None:
    with pytest.raises(ZeroDivisionError), inductor_ext.whole_model():
        torch.compile(torch.sin, backend=inductor_ext.backend(rules=RULES, strict=True))(x())
        raise ZeroDivisionError


def test_after_a_block_graphs_are_checked_as_before() -> None:
    with inductor_ext.whole_model():
        torch.compile(chain, backend=inductor_ext.backend(rules=RULES, strict=True))(x())
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="matched nothing in this graph"):
        torch.compile(torch.sin, backend=inductor_ext.backend(rules=RULES, strict=True))(x())


def test_a_backend_that_is_not_strict_is_not_checked() -> None:
    with inductor_ext.whole_model():
        torch.compile(torch.sin, backend=inductor_ext.backend(rules=RULES))(x())
