"""verify: compare every rewrite with what it replaced, and the compiled model with stock Inductor and eager.

Two questions are answered on the caller's own inputs:

* *Rule by rule*: each graph is kept before the first rule and after every rule, and all these versions run node by node on the
  same inputs, with stores in place as Inductor makes them. What an exact rule leaves must give the same bytes (NaN matching
  NaN) in every output and mutated input. Of another rule each rewrite by itself is held to the rule's tolerance, and the whole
  graph to `REQUANTIZED`. Two outputs, or an output and an input, may overlap in memory if and only if they did before.
  Mutated inputs are not looked at where a rule drops writes that the user has declared dead.
* *End to end*: the model in eager mode, through stock ``torch.compile`` and through this backend.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

from inductor_ext import registry, settings, torch_compat
from inductor_ext.errors import VerifyError
from inductor_ext.graph import copied, copy_of
from inductor_ext.moe import MXFP8Weight
from inductor_ext.report import compare
from inductor_ext.report.events import GraphReport
from inductor_ext.report.explain import cloned, compiled_with, given_either_way, run_passes
from inductor_ext.rule import REQUANTIZED, TOLERANCE


@dataclasses.dataclass
class RuleCheck:
    """One rule on one graph: how many elements of how many differ from the graph before it, and by how much at most.

    ``distance`` is the largest ‖a - b‖ / ‖b‖ of any value, infinite where one is NaN or of another shape and the other not;
    ``local`` the same right behind one rewrite, before anything enlarges it. ``aliasing``: which results share memory now and
    did not, or the reverse.
    """

    rule: str
    graph: str
    rewrites: int
    exact: bool  # what the rule promises
    elements: int = 0
    differing: int = 0
    max_abs: float = 0.0
    where: str = ""
    distance: float = 0.0
    local: float = 0.0
    tolerance: float = TOLERANCE
    aliasing: str = ""

    @property
    def ok(self) -> bool:
        if self.aliasing:
            return False
        return self.differing == 0 if self.exact else self.local <= self.tolerance and self.distance <= REQUANTIZED


@dataclasses.dataclass
class EndToEnd:
    """Relative distance ‖a - b‖ / ‖b‖ between outputs (and mutated arguments), in float64."""

    stock_to_eager: float
    ours_to_eager: float
    ours_to_stock: float

    @property
    def ok(self) -> bool:
        """Not further from eager than stock is, but for what a different rounding does to it."""
        return self.ours_to_eager <= 2 * self.stock_to_eager + 1e-2


@dataclasses.dataclass
class Verification:
    """What `verify` found."""

    checks: list[RuleCheck]
    end_to_end: EndToEnd | None
    graphs: list[GraphReport]

    @property
    def differs(self) -> list[str]:
        """Names of the rules whose result differs from what they replaced."""
        return sorted({check.rule for check in self.checks if not check.ok})

    @property
    def ok(self) -> bool:
        return not self.differs and (self.end_to_end is None or self.end_to_end.ok)

    def raise_if_different(self) -> None:
        if not self.ok:
            raise VerifyError(str(self))

    def to_dict(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        return {"ok": self.ok, "differs": self.differs, "checks": found["checks"], "end_to_end": found["end_to_end"]}

    def __str__(self) -> str:
        from inductor_ext.report import text

        return text.render(self)

    __repr__ = __str__

    def __rich__(self) -> Any:
        from inductor_ext.report import text

        return text.verification(self)


def verify(
    model: Callable[..., Any],
    *args: Any,
    rules: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
    end_to_end: bool = True,
    **kwargs: Any,
) -> Verification:
    """Check ``model(*args, **kwargs)`` rewrite by rewrite; see the module's text. Arguments as for `explain`.

    ``end_to_end=False`` skips the two full compiles.
    """
    chosen = settings.current(**({} if rules is None else {"rules": rules}))
    registry.check_rules(chosen)
    checks: list[RuleCheck] = []
    graphs: list[GraphReport] = []
    stages: list[tuple[str, torch.fx.GraphModule]] = []

    def observe(rule: str, graph: torch.fx.Graph) -> None:
        if not rule:  # from the beginning: a rule has failed and was left out
            stages.clear()
        stages.append((rule, torch.fx.GraphModule(graph.owning_module or {}, copy_of(graph))))

    def compile_stages(gm: torch.fx.GraphModule, example_inputs: Any, **keywords: Any) -> Callable[..., Any]:
        original = copied(gm)
        run_passes(gm, example_inputs, **keywords)
        seen, report = list(stages), graphs[-1]
        stages.clear()

        def run(*inputs: Any) -> Any:
            checks.extend(_compare_stages(seen, report, inputs))
            return torch_compat.EagerInterpreter(original).run(*inputs)

        return given_either_way(run)

    with compiled_with(
        chosen,
        model,
        graphs.append,
        inner_compile=compile_stages,
        observer=observe,
        options=options,
        mode=mode,
        dynamic=dynamic,
    ) as run:
        run(*cloned(args), **cloned(kwargs))
    written = not any(registry.rule_named(check.rule).drops_writes for check in checks)
    end_to_end = end_to_end and not _loses_context(graphs)
    distances = _end_to_end(model, args, kwargs, chosen, options, mode, dynamic, written) if end_to_end else None
    return Verification(checks, distances, graphs)


def _loses_context(graphs: list[GraphReport]) -> bool:
    """Whether the stock model cannot run on this GPU, so that there is nothing to compare end to end: see `torch_compat`."""
    on_gpu = torch.cuda.is_available() and torch_compat.loses_context(torch.device("cuda"))
    return on_gpu and any("aten._scaled_grouped_mm_v2" in graph.before for graph in graphs)


def _compare_stages(stages: list[tuple[str, torch.fx.GraphModule]], report: GraphReport, inputs: Any) -> list[RuleCheck]:
    counts = report.counts()
    found: list[RuleCheck] = []
    before = compare.run(compare.in_place(stages[0][1].graph), inputs)
    for (_, older), (rule, graph) in itertools.pairwise(stages):
        promised = registry.rule_named(rule)
        check = RuleCheck(rule, report.name, counts.get(rule, 0), promised.exact, tolerance=promised.tolerance)
        after = compare.run(compare.in_place(graph.graph), inputs)
        pairs = [(before.outputs, after.outputs), *([] if promised.drops_writes else [(before.inputs, after.inputs)])]
        for old_values, new_values in pairs:
            for index, (old, new) in enumerate(zip(old_values, new_values, strict=True)):
                _compare(check, f"value {index}", old, new)
        for name, old, new in () if promised.differs_unread else compare.rewrites(older, graph, inputs):
            _compare_rewrite(check, name, old, new)
        check.aliasing = _aliasing(compare.shared(before), compare.shared(after))
        before = after
        found.append(check)
    return found


def _aliasing(before: set[tuple[str, str]], after: set[tuple[str, str]]) -> str:
    """What shares memory in one version only, in words."""
    words = [(after - before, "share memory now"), (before - after, "share no memory now")]
    return "; ".join(f"{one} and {two} {what}" for pairs, what in words for one, two in sorted(pairs))


def _compare_rewrite(check: RuleCheck, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
    """One value right behind a rewrite: an exact rule's bytes, how far another's is."""
    own = dataclasses.replace(check, differing=0, distance=0.0, where="")
    _compare(own, f"behind {name}", old, new)
    check.local = max(check.local, own.distance)
    if own.differing and check.exact:
        check.differing += own.differing
    if own.differing:
        check.where = check.where or own.where


def _compare(check: RuleCheck, where: str, old: torch.Tensor, new: torch.Tensor) -> None:
    check.elements += old.numel()
    if old.shape != new.shape or old.dtype != new.dtype:
        check.differing += old.numel()
        check.distance = float("inf")
        check.where = check.where or f"{where}: {old.dtype} {list(old.shape)} became {new.dtype} {list(new.shape)}"
        return
    a, b = old.double() if old.is_floating_point() else old, new.double() if new.is_floating_point() else new
    different = (a != b) & ~(_isnan(a) & _isnan(b))
    if old.is_floating_point():  # zeros of either sign are equal numbers and different bytes
        different |= (a == 0) & (b == 0) & (torch.signbit(a) != torch.signbit(b))
    count = int(different.sum())
    if count:
        check.differing += count
        check.where = check.where or f"{where}, first at {different.nonzero()[0].tolist()}"
        gap = (a[different].double() - b[different].double()).abs().nan_to_num(nan=float("inf"))
        check.max_abs = max(check.max_abs, float(gap.max()))
        check.distance = max(check.distance, _relative(b, a, different))


def _relative(new: torch.Tensor, old: torch.Tensor, different: torch.Tensor) -> float:
    """‖new - old‖ / ‖old‖ over what is finite in ``old``; infinite where only one of them is finite or infinities differ."""
    new, old = new.double(), old.double()
    finite = torch.isfinite(old)
    if bool((different & ~(finite & torch.isfinite(new))).any()):
        return float("inf")
    norm, gap = float(old[finite].norm()), float((new - old)[finite & different].norm())
    return gap / norm if norm else gap


def _isnan(value: torch.Tensor) -> torch.Tensor:
    return torch.isnan(value) if value.is_floating_point() else torch.zeros_like(value, dtype=torch.bool)


def _end_to_end(
    model: Any, args: Any, kwargs: Any, chosen: Any, options: Any, mode: Any, dynamic: Any, written: bool
) -> EndToEnd:
    """``written``: whether arguments count, as the run leaves them, besides outputs."""
    from inductor_ext.backend import backend

    fields = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
    # torch.compile takes a mode or options, not both; a callable backend takes what it is given.
    stock: dict[str, Any] = {"mode": mode} if mode else {"options": _inductor_only(options)}
    runs = [
        model,
        torch.compile(model, dynamic=dynamic, **stock),
        torch.compile(model, backend=backend(**fields), dynamic=dynamic, **({"mode": mode} if mode else {"options": options})),
    ]
    results = []
    for run in runs:
        own_args, own_kwargs = cloned(args), cloned(kwargs)
        outputs = run(*own_args, **own_kwargs)
        results.append(_floats((outputs, own_args, own_kwargs) if written else outputs))
    eager, reference, ours = results
    return EndToEnd(_distance(reference, eager), _distance(ours, eager), _distance(ours, reference))


def _inductor_only(options: dict[str, Any] | None) -> dict[str, Any] | None:
    from inductor_ext.backend import OwnOptions

    return {name: value for name, value in options.items() if name not in OwnOptions} if options else None


def _floats(tree: Any) -> list[torch.Tensor]:
    leaves = [leaf.dequantize() if isinstance(leaf, MXFP8Weight) else leaf for leaf in pytree.tree_leaves(tree)]
    found = [leaf.detach().double() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return [value.nan_to_num() for value in found]


def _distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest relative distance of any tensor."""
    worst = 0.0
    for one, two in zip(a, b, strict=True):
        norm = float(two.norm())
        worst = max(worst, float((one - two).norm()) / norm if norm else float((one - two).norm()))
    return worst
