"""Reports outlive the compile that made them: on a hit in Inductor's caches the rules do not run, and the report is replayed.

Inductor stores with a compiled graph how ``counters["inductor"]`` changed while it was compiled, and adds the same again on a
hit. So the pass counts one key that names the report's content; the report itself lies beside Inductor's cache, under that
name.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from torch._dynamo.utils import counters

from inductor_ext.jit.files import make_folder, parse_json, read_regular, said, write_atomically
from inductor_ext.jit.spec import JitSpec
from inductor_ext.report.events import GraphReport
from inductor_ext.report.shown import line

log = logging.getLogger("inductor_ext")

_PREFIX = "inductor_ext.report."
_LIMIT = 256 << 20  # bytes; the graph of a large model has a few million characters


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
    text = json.dumps(report.to_dict(), sort_keys=True)
    digest = _digest(text)
    _write(digest, text)
    _count(_PREFIX + digest, 1)
    return _PREFIX + digest


def snapshot() -> Counter[str]:
    """Report keys counted so far; give it to `replayed` after a compile."""
    return Counter({key: count for key, count in counters["inductor"].items() if key.startswith(_PREFIX)})


def replayed(before: Counter[str], made: Iterable[str] = ()) -> list[tuple[str, GraphReport]]:
    """Reports whose keys were counted since ``before`` and not ``made`` by a compile since: those that caches gave back."""
    reports = []
    for key, count in (snapshot() - before - Counter(made)).items():
        report = _read(key.removeprefix(_PREFIX))
        if report is not None:
            reports.extend([(key, report)] * count)
    return reports


def _path(digest: str) -> Path:
    """Raises ``OSError`` where Inductor's cache cannot be made, ``KeyError`` where torch finds no name for the user."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "inductor_ext" / "reports" / f"{digest}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _write(digest: str, text: str) -> None:
    try:
        path = _path(digest)
        make_folder(path.parent, 0o700)
        write_atomically(path, text)
    except (OSError, KeyError) as error:
        log.warning("the report of this compile is not kept for later cache hits: %s", line(error))


def _read(digest: str) -> GraphReport | None:
    """The report that was kept under ``digest``: what has that digest is what was kept, whoever could write there since."""
    try:
        text = read_regular(_path(digest), _LIMIT, links=False).decode()
        if _digest(text) != digest:
            raise ValueError("it is not what was written")
        report = GraphReport.from_dict(parse_json(text.encode()))
        for kernel in report.kernels:
            JitSpec.from_dict(kernel)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # one of another version has other fields
        reason = said(error) if isinstance(error, OSError) else error
        log.warning("the report of a cached graph cannot be read (%s); rewrites are right, explain is incomplete", line(reason))
        return None
    report.cached = True
    return report
