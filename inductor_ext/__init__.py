"""inductor_ext: a torch.compile backend that gives FP8 models fused kernels, and says what it rewrote and why.

    torch.compile(model, backend="inductor_ext")        compile
    inductor_ext.explain(model, *inputs)                what was rewritten, what was not, and why
    inductor_ext.verify(model, *inputs)                 compare every rewrite with what it replaced
    inductor_ext.backend(rules=…, strict=…)             a configured backend
    inductor_ext.graph_pass(rules=…, …)                 the rewrites as a pass, for frameworks that call Inductor themselves
    inductor_ext.whole_model()                          a block whose graphs `strict` counts together
    inductor_ext.quantize_moe_(model)                   the experts' weights to MXFP8, in place, and what it costs
    torch.ops.inductor_ext.*                            the operators themselves

Importing this package defines the operators and does nothing else: no CUDA, no compiler, no directory.
"""

from __future__ import annotations

from inductor_ext import registry
from inductor_ext.backend import backend
from inductor_ext.errors import InductorExtError
from inductor_ext.moe import MXFP8Weight, quantize_moe_
from inductor_ext.settings import Settings
from inductor_ext.strict import whole_model

__version__ = "0.1.0"
__all__ = [
    "InductorExtError",
    "MXFP8Weight",
    "Settings",
    "backend",
    "explain",
    "graph_pass",
    "quantize_moe_",
    "verify",
    "whole_model",
]

registry.ops()


def explain(model, *args, **kwargs):
    """See `inductor_ext.report.explain.explain`."""
    from inductor_ext.report.explain import explain as run

    return run(model, *args, **kwargs)


def graph_pass(**options):
    """See `inductor_ext.hosted.graph_pass`."""
    from inductor_ext.hosted import graph_pass as make

    return make(**options)


def verify(model, *args, **kwargs):
    """See `inductor_ext.report.verify.verify`."""
    from inductor_ext.report.verify import verify as run

    return run(model, *args, **kwargs)
