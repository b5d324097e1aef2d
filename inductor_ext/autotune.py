"""Inductor's own autotuner, and our kernels in it.

Under ``max_autotune`` Inductor measures every way it knows to compute a matrix product and takes the fastest. An op that
declares an `Autotune` has its kernels measured too, beside PyTorch's operator (``aten``) and Inductor's templates (``triton``).
Rules that would replace such a product by a table's word then stand aside (`active`).

What wins is called from generated code as ``extern_kernels.inductor_ext_<op>_tuned(*operands, <options>, out=buf0)``: one
Python function an op, defined with its lowering, so that cached code finds it in any process; the options say which kernel.

Only graphs compiled by our backend see the candidates: our pass in Inductor's config tells them, and it is there wherever such
a graph is compiled, a backward graph long after its forward too. Sizes must be numbers; with symbolic ones the table stays.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from inductor_ext import jit
from inductor_ext.op import Autotune, Op, Operand, Problem
from inductor_ext.settings import Settings

log = logging.getLogger("inductor_ext")


class Compiling(Protocol):
    """What the autotuner wants of our pass in Inductor's config, the mark of a graph of ours."""

    settings: Settings

    def add_autotuned(self, line: str, kernel: jit.JitSpec | None) -> None: ...


def active() -> bool:
    """Whether Inductor will measure the matrix products of the graph that is being compiled, our kernels with them.

    To be asked while Inductor's config is that of the compile: in a pass, a rule's guard, a lowering. Products with a symbolic
    size are autotuned without ours, so a rule asks only where sizes are numbers.
    """
    import torch._inductor.config as config

    wanted = config.max_autotune or config.max_autotune_gemm
    stock = "ATEN" in config.max_autotune_gemm_backends.upper().replace(" ", "").split(",")  # ours stand beside it
    # C++ wrappers cannot call ours; deterministic means that nothing is measured; other processes do not know ours.
    against = ("cpp_wrapper", "deterministic", "autotune_in_subproc", "pipeline_max_autotune_gemm")
    return bool(wanted and stock and not any(getattr(config, option, False) for option in against))


# ---- hooks in Inductor -----------------------------------------------------------------------------------------------

_ways: dict[str, list[tuple[Op, Autotune, Any]]] = {}  # by stock name: op, its declaration, Inductor's ExternKernelChoice


def register(op: Op, digest: bytes) -> None:
    """Put an op's kernels into Inductor's autotuner. Called once, with its lowering. ``digest``: of all sources."""
    from torch._inductor.select_algorithm import ExternKernelChoice, add_feedback_saver, add_preprocessing_fn

    way = op.autotune
    assert way is not None
    if not _ways:
        add_preprocessing_fn(_with_candidates)
        add_feedback_saver(_report)
    _ways.setdefault(way.stock, []).append((op, way, ExternKernelChoice(_caller(op, way, digest), name=_name(op))))


def _name(op: Op) -> str:
    return f"inductor_ext_{op.name}_tuned"


def _caller(op: Op, way: Autotune, digest: bytes) -> Callable[..., None]:
    def call(*operands: Any, out: torch.Tensor, **options: Any) -> None:
        op._call(*way.arguments(*operands, out=out, **options), out=out)

    # Inductor keeps timings under a hash of the function's name and text: those of other kernels must not be found.
    call.__name__ = f"{_name(op)}_{digest.hex()[:16]}"
    return call


def _compiling() -> Compiling | None:
    import torch._inductor.config as config

    found = config.post_grad_custom_post_pass
    return found if hasattr(found, "add_autotuned") else None


def _with_candidates(choices: list[Any]) -> list[Any]:
    """Inductor asks this before it measures ``choices``."""
    from torch._inductor.select_algorithm import ExternKernelCaller

    ours = _compiling()
    if ours is None or not active():
        return choices
    added = []
    for stock in choices:
        if isinstance(stock, ExternKernelCaller):
            for op, way, choice in _ways.get(stock.name, ()):
                problem = _problem(stock)
                if problem is not None and _runs_on(op, problem.device):
                    added += _callers(op, way, choice, problem, stock, ours)
    return [*choices, *added]


def _callers(op: Op, way: Autotune, choice: Any, problem: Problem, stock: Any, ours: Compiling) -> list[Any]:
    """Inductor's callers of the candidates whose kernel can be had. Kernels are built in parallel, before anything is timed."""
    arch = jit.current_arch(ours.settings)
    candidates = [(each, op.spec_of_key(each.key, arch) if arch else None) for each in way.candidates(problem)]
    if ours.settings.build != "defer":  # then the first call builds, which is the measurement's
        built = jit.prepare([spec for _, spec in candidates if spec is not None], ours.settings)
        for each, spec in candidates:
            if spec is not None and isinstance(built[spec], Exception):
                log.debug("%s: %s is not measured: %s", op.name, each.label, built[spec])
        candidates = [(each, spec) for each, spec in candidates if spec and not isinstance(built[spec], Exception)]
    made = []
    for each, spec in candidates:
        caller = choice.bind(stock.input_nodes, stock.layout, **each.options)
        caller.description = each.label
        caller.inductor_ext_spec = spec
        made.append(caller)
    return made


def _runs_on(op: Op, device: torch.device) -> bool:
    return (
        device.type == "cuda" and op.kernel is not None and torch.cuda.get_device_capability(device) >= op.kernel.min_capability
    )


def _problem(stock: Any) -> Problem | None:
    """What Inductor's caller of PyTorch's operator computes; None where a size is symbolic."""
    from torch._inductor.virtualized import V

    operands = [_operand(node, node.get_layout()) for node in stock.input_nodes]
    out = _operand(stock.layout, stock.layout)
    known = [operand for operand in operands if operand is not None]
    if out is None or len(known) < len(operands):
        return None
    return Problem(V.graph.current_node, tuple(known), out, dict(stock.kwargs), stock.layout.device)


def _operand(node: Any, layout: Any) -> Operand | None:
    try:
        shape, stride, offset = tuple(map(int, layout.size)), tuple(map(int, layout.stride)), int(layout.offset)
    except TypeError:  # a symbolic expression
        return None
    return Operand(shape, stride, offset, layout.dtype)


# ---- what was chosen -------------------------------------------------------------------------------------------------


def _report(timings: Mapping[Any, float], name: str, input_nodes: Sequence[Any], *_: Any) -> None:
    """Inductor tells this what it measured, in milliseconds."""
    from torch._inductor.select_algorithm import ExternKernelCaller

    names = {_name(op) for ways in _ways.values() for op, _, _ in ways}
    ours = _compiling()
    if ours is None or not any(choice.name in names for choice in timings):
        return
    best: dict[str, tuple[float, Any]] = {}  # of each kind, and of each of our candidates: µs, Inductor's caller
    for choice, milliseconds in timings.items():
        extern = isinstance(choice, ExternKernelCaller)
        kind = choice.description if choice.name in names else "aten" if extern else "triton"
        if math.isfinite(milliseconds) and (kind not in best or milliseconds * 1e3 < best[kind][0]):
            best[kind] = milliseconds * 1e3, choice
    if not best:
        return
    (winner, (first, chosen)), *rest = sorted(best.items(), key=lambda item: item[1][0])
    sizes = ", ".join(f"[{', '.join(map(str, node.get_size()))}]" for node in input_nodes[:2])
    others = ", ".join(f"{kind} {time:.1f}" for kind, (time, _) in rest)
    line = f"{name} of {sizes}: {winner} is the fastest, {first:.1f} µs" + (f"; {others}" if others else "")
    log.info("%s", line)
    ours.add_autotuned(line, getattr(chosen, "inductor_ext_spec", None))
