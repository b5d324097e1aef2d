"""What `bench model` needs and this package does not: transformers, and how its absence is said."""

from __future__ import annotations

from typing import Any

from inductor_ext.demo import quiet
from inductor_ext.errors import InductorExtError

EXTRA = "pip install 'inductor-ext[bench]'"


class BenchError(InductorExtError):
    """The benchmark cannot run here, or a side of it failed."""


def import_transformers() -> Any:
    with quiet("torchao", "torch.utils._pytree"):
        try:
            import transformers
        except ImportError as error:
            raise BenchError(f"this needs transformers ({error}); {EXTRA}") from error
    return transformers
