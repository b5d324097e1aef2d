"""inductor_ext: a torch.compile backend that gives FP8 models fused kernels, and says what it rewrote and why.

    torch.compile(model, backend="inductor_ext")        compile
    inductor_ext.explain(model, *inputs)                what was rewritten, what was not, and why
    inductor_ext.verify(model, *inputs)                 compare every rewrite with what it replaced
    inductor_ext.backend(rules=…, strict=…)             a configured backend
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

__version__ = "0.1.0"
__all__ = ["InductorExtError", "MXFP8Weight", "Settings", "backend", "explain", "quantize_moe_", "verify"]

registry.ops()


def explain(model, *args, **kwargs):
    """See `inductor_ext.report.explain.explain`."""
    from inductor_ext.report.explain import explain as run

    return run(model, *args, **kwargs)


def verify(model, *args, **kwargs):
    """See `inductor_ext.report.verify.verify`."""
    from inductor_ext.report.verify import verify as run

    return run(model, *args, **kwargs)
