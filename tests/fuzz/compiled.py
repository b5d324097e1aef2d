"""The sample that goes through all of Inductor: eager, stock torch.compile and this backend, on copies of the same inputs.

Where stock differs from eager, ours may differ as much: that is stock's fault, or its freedom.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config

import inductor_ext
from inductor_ext import registry
from inductor_ext.report.explain import cloned
from tests.fuzz.capture import Ran, tensors
from tests.fuzz.check import moved
from tests.fuzz.compare import Fault, sharing
from tests.fuzz.program import Loaded

WHERE = "compiled"


def faults_of(program: Loaded, device: str = "cpu", build: str = "compile") -> list[Fault]:
    inputs = moved(program.inputs(), device)
    eager = _ran(program.fn, inputs)
    ours = _compiled(program, inputs, inductor_ext.backend(rules=dict(program.rules), build=build, **dict(program.options)))
    if _alike(eager, ours, program):
        return []
    stock = _compiled(program, inputs, "inductor")
    found = []
    if bool(ours.error) != bool(eager.error) and bool(ours.error) != bool(stock.error):
        found.append(Fault(WHERE, "raises" if ours.error else "does not raise where eager does", ours.error or eager.error))
    if not ours.error and not eager.error and not stock.error:
        found += _values(eager, stock, ours, program)
        shared = [sharing(each.outputs, each.inputs) for each in (eager, stock, ours)]
        if shared[2] not in shared[:2]:
            found.append(Fault(WHERE, "results share memory otherwise than eager's and stock's", str(shared[2] ^ shared[1])))
    return found


def _ran(fn: Callable[..., Any], inputs: Any) -> Ran:
    copies = cloned(inputs)
    try:
        outputs = tensors(fn(*copies))
    except Exception as error:
        return Ran([], [], f"{type(error).__name__}: {error}"[:200])
    return Ran(outputs, tensors(copies))


def _compiled(program: Loaded, inputs: Any, backend: Any) -> Ran:
    torch._dynamo.reset()
    with _fresh():
        return _ran(torch.compile(program.fn, backend=backend, dynamic=program.dynamic), inputs)


@contextlib.contextmanager
def _fresh() -> Iterator[None]:
    with (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1),
    ):
        yield


def _pairs(one: Ran, two: Ran, program: Loaded) -> list[tuple[torch.Tensor, torch.Tensor]]:
    dropped = bool(program.options.get("prefill_only"))  # the user has said that nothing reads what was written
    found = list(zip(one.outputs, two.outputs, strict=True))
    return found if dropped else [*found, *zip(one.inputs, two.inputs, strict=True)]


def _alike(eager: Ran, ours: Ran, program: Loaded) -> bool:
    if eager.error or ours.error:
        return bool(eager.error) == bool(ours.error)
    close = all(distance(a, b) <= 1e-3 for a, b in _pairs(eager, ours, program))
    return close and sharing(eager.outputs, eager.inputs) == sharing(ours.outputs, ours.inputs)


def _values(eager: Ran, stock: Ran, ours: Ran, program: Loaded) -> list[Fault]:
    allowed = max((registry.rule_named(name).tolerance for name in program.rules), default=1e-2)
    triples = zip(_pairs(eager, stock, program), _pairs(eager, ours, program))
    for index, ((wanted, theirs), (_, found)) in enumerate(triples):
        far, other = distance(wanted, found), distance(wanted, theirs)
        if far > 2 * other + max(allowed, 1e-2):
            return [Fault(WHERE, "further from eager than stock", f"value {index}: {far:.1e}, stock {other:.1e}")]
    return []


def distance(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """‖a - b‖ / ‖b‖, infinite where shapes or dtypes differ or one is finite and the other not."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return float("inf")
    if type(wanted) is not torch.Tensor:
        return 0.0
    a, b = (t.detach().cpu() for t in (wanted, found))
    a, b = (torch.view_as_real(t).double() if t.is_complex() else t.double() for t in (a, b))
    finite = a.isfinite()
    if not bool((finite == b.isfinite()).all()):
        return float("inf")
    norm, gap = float(a[finite].norm()), float((a - b)[finite].norm())
    return gap / norm if norm else gap
