"""Why a reading of a graph went no further: the exception that says so, and the wordings that several readers share.

A reader that meets something like what it looks for, but not quite, raises a `Miss`. Nobody hands it around: the pass catches
it once and reports it as a near miss of the rule that asked. A rule that can do with less catches it itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

from torch.fx import Node

from inductor_ext.graph import describe

Found = TypeVar("Found")

# One wording for one reason: what more than one reader says stands here, and a test finds what does not.
CACHE_IS_NO_INPUT = "the cache is not a graph input"
CACHE_LAYOUT = "cache layout"
CONTRACTION_DIM = "contraction_dim is given"
DEVICE = "device"
DROPOUT = "dropout"
DTYPES = "dtypes"
HEAD_DIM = "head dimension"
INDEX_LAYOUT = "index layout"
INPUT_DTYPE = "input dtype"
INPUT_LAYOUT = "input layout"
LOG_SUM_EXP = "log-sum-exp is used"
NOT_FASTER = "it would not be faster"
NOT_MEASURED = "not measured"
NOT_WHOLE_COLUMNS = "not whole columns"
NO_KERNEL = "no kernel for this GPU"
OLD_ROWS_READ_LATE = "the old rows are read after the new ones"
OUTPUT_DTYPE = "output dtype"
ROWS_BROADCAST = "the stored rows broadcast"
SCALE_DTYPE = "scale dtype"
SCALE_LATE = "the scale is computed too late"
SCALE_LAYOUT = "scale layout"
SEVERAL_SCALES = "several scales in one chain"
STORE_ACCUMULATES = "the store accumulates"
TOO_MANY_NUMBERS = "too many numbers"


def second_user(what: str) -> str:
    return f"{what} has a second user"


def fused(what: str, neighbour: str) -> str:
    return f"Inductor fuses this {what} into its {neighbour} for free"


class Miss(Exception):
    """The first condition that failed, at ``node``: ``reason`` names it, then what it wanted and what it found."""

    def __init__(self, reason: str, node: Node, wanted: str, found: str) -> None:
        super().__init__(f"{reason}: wanted {wanted}, found {found}")
        self.reason, self.node, self.wanted, self.found = reason, node, wanted, found

    def at(self, node: Node) -> Miss:
        """The same, reported of another node."""
        return Miss(self.reason, node, self.wanted, self.found)


def no_other_users(nodes: Iterable[Node], own: Collection[Node], what: str, wanted: str) -> None:
    """Miss where anything but ``own`` reads one of ``nodes``, which a rewrite would leave out."""
    for node in nodes:
        other = next((user for user in node.users if user not in own), None)
        if other is not None:
            raise Miss(second_user(what), node, wanted, describe(other))


def found_or_none(read: Callable[..., Found], *args: Any) -> Found | None:
    """What ``read`` gives, or None where it misses."""
    try:
        return read(*args)
    except Miss:
        return None
