"""explain: run the model once through Dynamo, AOTAutograd and the rules, without generating code, and say what happened."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from inductor_ext import registry, settings, torch_compat
from inductor_ext.graph import copied
from inductor_ext.report.events import GraphReport, Refusal, Rewrite


class Explanation:
    """What `explain` found. ``graphs`` holds one `GraphReport` for every graph that was compiled."""

    def __init__(self, graphs: list[GraphReport]) -> None:
        self.graphs = graphs

    @property
    def rewrites(self) -> list[Rewrite]:
        return [event for graph in self.graphs for event in graph.rewrites]

    @property
    def refusals(self) -> list[Refusal]:
        return [event for graph in self.graphs for event in graph.refusals]

    def counts(self) -> dict[str, int]:
        """Rule name → number of rewrites."""
        return dict(Counter(event.rule for event in self.rewrites))

    def diff(self) -> str:
        """Unified diff of every graph before and after the rules."""
        parts: list[str] = []
        for graph in self.graphs:
            before, after = graph.before.splitlines(), graph.after.splitlines()
            parts.extend(difflib.unified_diff(before, after, f"{graph.name} before", f"{graph.name} after", lineterm=""))
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {"counts": self.counts(), "graphs": [graph.to_dict() for graph in self.graphs]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained HTML file and return its path."""
        from inductor_ext.report import html

        return html.write(self, Path(path))

    def __str__(self) -> str:
        from inductor_ext.report import text

        return text.render(self)

    __repr__ = __str__

    def __rich__(self) -> Any:
        from inductor_ext.report import text

        return text.renderable(self)


def explain(
    model: Callable[..., Any],
    *args: Any,
    rules: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Explanation:
    """Say what the backend does to ``model(*args, **kwargs)``.

    The model runs once, eagerly, on copies of the tensor arguments; buffers of the model that it mutates are mutated. No
    kernel is built and no code generated. ``rules``, ``options``, ``mode`` and ``dynamic`` are those of ``torch.compile``
    with this backend; all other keywords go to the model.
    """
    overrides: dict[str, Any] = {"build": "defer"} if rules is None else {"build": "defer", "rules": rules}
    chosen = settings.current(**overrides)
    registry.check_rules(chosen)
    graphs: list[GraphReport] = []
    with compiled_with(
        chosen, model, graphs.append, inner_compile=passes_only, options=options, mode=mode, dynamic=dynamic
    ) as run:
        run(*cloned(args), **cloned(kwargs))
    return Explanation(graphs)


@contextlib.contextmanager
def compiled_with(
    chosen: settings.Settings,
    model: Callable[..., Any],
    on_report: Callable[[GraphReport], None] | None,
    *,
    dynamic: bool | None = None,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **keywords: Any,
) -> Iterator[Callable[..., Any]]:
    """``model`` compiled with this backend and all caches off, so that the rules are sure to run."""
    from inductor_ext.backend import compile_graph

    def compile_one(gm: Any, example_inputs: Any, **_: Any) -> Any:
        return compile_graph(
            gm, example_inputs, chosen, mode=mode, options=options, on_report=on_report,
            inductor_options={"fx_graph_cache": False, "fx_graph_remote_cache": False}, **keywords,
        )  # fmt: skip

    import torch._dynamo.config
    import torch._functorch.config

    torch_compat.trace_scaled_mm_v2()
    with (
        # The backward graph of a training step would be compiled when it first runs, and nothing runs backward here.
        torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True),
        # The same function may have been compiled, and explained, before.
        torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=10000),
    ):
        yield torch.compile(model, backend=compile_one, dynamic=dynamic)


def passes_only(gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Callable[..., Any]:
    """An ``inner_compile`` that stops after the post-grad passes; the graph then runs as it came, eagerly."""
    original = copied(gm)
    run_passes(gm, example_inputs, **kwargs)
    return given_either_way(torch_compat.EagerInterpreter(original).run)


def given_either_way(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` for who gives inputs one by one, and for who gives one list of them, as Inductor does when it freezes a model."""

    def call(*inputs: Any) -> Any:
        return run(*inputs[0]) if len(inputs) == 1 and isinstance(inputs[0], list) else run(*inputs)

    return call


def run_passes(gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> None:
    from torch._inductor.compile_fx import fake_tensor_prop

    fake_mode = fake_tensor_prop(gm, example_inputs)
    torch_compat.run_post_grad_passes(gm, fake_mode, kwargs.get("is_inference", True))


def cloned(tree: Any) -> Any:
    """A copy of a tree of arguments: tensors are cloned with their strides, everything else is shared.

    Two views of one buffer stay two views of one (copied) buffer, as a model that writes to its arguments needs.
    """
    memo: dict[Any, torch.UntypedStorage] = {}

    def clone(value: Any) -> Any:
        if type(value) is not torch.Tensor:
            return value
        storage = value.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes(), value.device)
        if key not in memo:
            memo[key] = storage.clone()
        made = torch.empty(0, dtype=value.dtype, device=value.device)
        made.set_(memo[key], value.storage_offset(), value.shape, value.stride())
        return made.requires_grad_(value.requires_grad)

    return pytree.tree_map(clone, tree)
