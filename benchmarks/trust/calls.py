"""Calls of every op that has a kernel, at odd sizes, as data: what is launched under compute-sanitizer, replayed and mixed.

    for call in CALLS: args = call.make(Maker("cuda", seed=0))          the op's arguments, in the schema's order

Tails that are no whole vector, one row, no row, slices of a wider buffer, slots that are negative or past the end, and at least
one call of every kernel template. Random numbers are the host's, the same everywhere; a seed changes what is in the operands,
never their sizes.
"""

from __future__ import annotations

import itertools

from benchmarks.trust import products, quantisations, stores
from benchmarks.trust.operands import Call, Maker
from inductor_ext import jit, registry
from inductor_ext.op import Op

CALLS: tuple[Call, ...] = tuple(itertools.chain(quantisations.calls(), stores.calls(), products.calls()))


def op_named(name: str) -> Op:
    return next(op for op in registry.ops() if op.name == name)


def specs(call: Call, device: str, arch: str) -> list[jit.JitSpec]:
    """The kernels of a call. Fake tensors will do: they cost no memory."""
    return op_named(call.op).specs(call.make(Maker(device)), arch)
