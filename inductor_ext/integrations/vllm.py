"""The rewrites in vLLM's own pass manager.

    from inductor_ext.integrations.vllm import graph_pass
    LLM(model, compilation_config={"inductor_compile_config": {"post_grad_custom_post_pass": graph_pass()}})

vLLM adds what stands there to its manager, behind its own passes, and asks that it be of its own class.
"""

from __future__ import annotations

from typing import Any

from inductor_ext import hosted

try:
    from vllm.compilation.passes.inductor_pass import InductorPass
except ModuleNotFoundError:  # before it had a folder of passes
    from vllm.compilation.inductor_pass import InductorPass


class VllmGraphPass(hosted.GraphPass, InductorPass):  # type: ignore[misc]
    """An `inductor_ext.hosted.GraphPass` that is a pass of vLLM's too."""

    def __reduce__(self) -> Any:
        return _made, (self.settings, self.first, self.then)


def _made(chosen: Any, first: Any, then: Any) -> VllmGraphPass:
    return VllmGraphPass(chosen, first=first, then=then)


def graph_pass(*, first: Any = None, then: Any = None, on_report: Any = None, **options: Any) -> VllmGraphPass:
    """`inductor_ext.graph_pass` for ``inductor_compile_config["post_grad_custom_post_pass"]`` of vLLM."""
    from inductor_ext import settings

    return VllmGraphPass(settings.current(**options), first=first, then=then, on_report=on_report)
