"""A vector that is added behind an FP8 product is its bias, whichever rule takes the product; what looks like one is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inductor_ext.patterns.scaled_mm import bias_added, product, rowwise, with_bias
from tests.support.compiled import run_compiled

ALWAYS: dict[str, Any] = {"scaled_mm": "always", "scaled_mm_siblings": "off"}


def _taken(fn: Any, inputs: tuple[Any, ...], **rules: Any) -> bool:
    """Whether the op gets a bias and nothing is added behind it; the result is that of eager, but for one rounding."""
    found, recorder = run_compiled(fn, inputs, rules={**ALWAYS, **rules})
    torch.testing.assert_close(found[0], fn(*inputs), rtol=2e-2, atol=2e-2)
    (report,) = recorder.reports
    assert report.counts() == {"scaled_mm": 1}
    (line,) = (line for line in report.after.splitlines() if "inductor_ext.scaled_mm.default" in line)
    return "[None]" not in line and "aten.add.Tensor" not in report.after


def _inputs() -> tuple[Any, ...]:
    torch.manual_seed(0)
    return with_bias(rowwise("cpu"))


def test_through_views_and_in_either_order() -> None:
    assert _taken(bias_added, _inputs())
    assert _taken(lambda *i: i[4] + product(*i[:4]), _inputs())


def test_it_is_added_before_rounding() -> None:
    """The sum is rounded once, where two operators round twice."""
    a, w, s, t, b = _inputs()
    found, _ = run_compiled(bias_added, (a, w, s, t, b), rules=ALWAYS)
    exact = ((a.float() @ w.float().t()) * s * t.t() + b.float()).view(2, 20, 48)
    assert torch.equal(found[0], exact.bfloat16())


def test_a_bias_that_is_computed_later_than_the_product_comes_first() -> None:
    assert _taken(lambda a, w, s, t, b: product(a, w, s, t) + b.view(2, 24).reshape(48), _inputs())


def _needs_the_product(a: Any, w: Any, s: Any, t: Any, b: Any) -> torch.Tensor:
    p = product(a, w, s, t)
    return p + p.sum(0)


OTHERS: dict[str, Any] = {
    "a_matrix": lambda a, w, s, t, b: product(a, w, s, t) + b.expand(40, 48).sigmoid(),
    "a_column": lambda a, w, s, t, b: product(a, w, s, t) + b[:40, None],
    "one_element": lambda a, w, s, t, b: product(a, w, s, t) + b[:1],
    "another_dtype": lambda a, w, s, t, b: product(a, w, s, t) + b.float(),
    "alpha": lambda a, w, s, t, b: torch.add(product(a, w, s, t), b, alpha=2),
    "itself": lambda a, w, s, t, b: (p := product(a, w, s, t)) + p,
    "columns_split": lambda a, w, s, t, b: product(a, w, s, t).view(80, 24) + b[:24],
    "columns_moved": lambda a, w, s, t, b: product(a, w, s, t).view(40, 2, 24).transpose(1, 2).reshape(40, 48) + b,
    "strided": lambda a, w, s, t, b: product(a, w, s, t) + torch.stack([b, b], 1)[:, 0],
    "a_second": lambda a, w, s, t, b: product(a, w, s, t, bias=b) + b,
    "of_the_product": _needs_the_product,
    "read_besides": lambda a, w, s, t, b: ((p := product(a, w, s, t)) + b, p.float().sigmoid()),
    "a_view_is_read_besides": lambda a, w, s, t, b: ((p := product(a, w, s, t).view(2, 20, 48)) + b, p.float().sigmoid()),
    "returned_besides": lambda a, w, s, t, b: ((p := product(a, w, s, t)) + b, p),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_bias_is_added_as_before(name: str) -> None:
    fn = OTHERS[name]
    found, recorder = run_compiled(fn, _inputs(), rules=ALWAYS)
    wanted = fn(*_inputs())
    torch.testing.assert_close(found[0], wanted[0] if isinstance(wanted, tuple) else wanted, rtol=2e-2, atol=2e-2)
    (report,) = recorder.reports
    assert "aten.add.Tensor" in report.after or (name == "itself" and "aten.mul" in report.after)
