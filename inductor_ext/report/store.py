"""Reports outlive the compile that made them: on a hit in Inductor's caches the rules do not run, and the report is replayed.

Inductor stores with a compiled graph how ``counters["inductor"]`` changed while it was compiled, and adds the same again on a
hit. So the pass counts one key that names the report's content and carries it, compressed: wherever the compiled graph goes, to
another process, in `torch.compiler.save_cache_artifacts` or a saved `standalone_compile` to another machine, its report goes
too. A few per cent of the graph's own size; whoever prints the counters sees the key alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterable

from torch._dynamo.utils import counters

from inductor_ext.jit.files import parse_json
from inductor_ext.jit.spec import JitSpec
from inductor_ext.report.events import GraphReport
from inductor_ext.report.shown import line

log = logging.getLogger("inductor_ext")

_PREFIX = "inductor_ext.report."
_LIMIT = 256 << 20  # bytes; the graph of a large model has a few million characters


class _Key(str):
    """A counted key: the digest of a report, with the report. Equal to its text alone; unpickling one imports this package, and
    with it the ops that the compiled graph calls."""

    packed: bytes

    def __reduce__(self) -> tuple[object, ...]:
        return _key, (str(self), self.packed)


def _key(text: str, packed: bytes) -> _Key:
    found = _Key(text)
    found.packed = packed
    return found


def publish(report: GraphReport) -> str:
    """Remember a report under its digest and count the key that a cache hit will replay. Gives the key."""
    for rule, count in report.counts().items():
        _count(f"inductor_ext.{rule}", count)
    return _keep(report)


def amend(key: str, report: GraphReport) -> str:
    """``report``, published as ``key``, says more now and its graph is still being compiled. Gives the new key."""
    _count(key, -1)
    return _keep(report)


def withdraw(key: str, report: GraphReport) -> None:
    """``report``, published as ``key`` or replayed under it, is of a graph that is compiled again, in another way."""
    for rule, count in report.counts().items():
        _count(f"inductor_ext.{rule}", -count)
    _count(key, -1)


def _count(key: str, change: int) -> None:
    counters["inductor"][key] += change
    if counters["inductor"][key] == 0:
        del counters["inductor"][key]


def _keep(report: GraphReport) -> str:
    text = json.dumps(report.to_dict(), sort_keys=True).encode()
    key = _key(_PREFIX + _digest(text), zlib.compress(text))
    _count(key, 1)
    return key


def snapshot() -> Counter[str]:
    """Report keys counted so far; give it to `replayed` after a compile."""
    return Counter({key: count for key, count in counters["inductor"].items() if key.startswith(_PREFIX)})


def replayed(before: Counter[str], made: Iterable[str] = ()) -> list[tuple[str, GraphReport]]:
    """Reports whose keys were counted since ``before`` and not ``made`` by a compile since: those that caches gave back."""
    reports = []
    for key, count in (snapshot() - before - Counter(made)).items():
        report = _read(key)
        if report is not None:
            reports.extend([(key, report)] * count)
    return reports


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:24]


def _read(key: str) -> GraphReport | None:
    """The report that ``key`` carries."""
    try:
        if not isinstance(key, _Key):
            raise ValueError("it is not with its key")
        text = _unpacked(key.packed)
        if _PREFIX + _digest(text) != key:
            raise ValueError("it is not what was kept")
        report = GraphReport.from_dict(parse_json(text))
        for kernel in report.kernels:
            JitSpec.from_dict(kernel)
    except (zlib.error, ValueError, LookupError, TypeError, AttributeError) as error:  # one of another version has other fields
        log.warning("the report of a cached graph cannot be read (%s); rewrites are right, explain is incomplete", line(error))
        return None
    report.cached = True
    return report


def _unpacked(packed: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(packed, _LIMIT)
    if not unpacker.eof:
        raise ValueError(f"it is not whole, or has more than {_LIMIT} bytes")
    return text
