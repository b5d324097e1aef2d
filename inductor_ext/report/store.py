"""Reports outlive the compile that made them: on a hit in Inductor's caches the rules do not run, and the report is replayed.

Inductor stores with a compiled graph how ``counters["inductor"]`` changed while it was compiled, and adds the same again on a
hit. So the pass counts one key that names the report's content; the report itself lies beside Inductor's cache, under that
name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from pathlib import Path

from torch._dynamo.utils import counters

from inductor_ext.report.events import GraphReport

log = logging.getLogger("inductor_ext")

_PREFIX = "inductor_ext.report."


def publish(report: GraphReport) -> str:
    """Remember a report under its digest and count the key that a cache hit will replay. Gives the key."""
    for rule, count in report.counts().items():
        counters["inductor"][f"inductor_ext.{rule}"] += count
    return _keep(report)


def amend(key: str, report: GraphReport) -> str:
    """``report``, published as ``key``, says more now and its graph is still being compiled. Gives the new key."""
    counters["inductor"][key] -= 1
    if counters["inductor"][key] == 0:
        del counters["inductor"][key]
    return _keep(report)


def _keep(report: GraphReport) -> str:
    text = json.dumps(report.to_dict(), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    _write(digest, text)
    counters["inductor"][_PREFIX + digest] += 1
    return _PREFIX + digest


def snapshot() -> Counter[str]:
    """Report keys counted so far; give it to `replayed` after a compile."""
    return Counter({key: count for key, count in counters["inductor"].items() if key.startswith(_PREFIX)})


def replayed(before: Counter[str]) -> list[GraphReport]:
    """Reports whose keys were counted since ``before``: of graphs compiled now and of graphs that came from a cache."""
    reports = []
    for key, count in (snapshot() - before).items():
        report = _read(key.removeprefix(_PREFIX))
        if report is not None:
            reports.extend([report] * count)
    return reports


def _directory() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "inductor_ext" / "reports"


def _write(digest: str, text: str) -> None:
    path = _directory() / f"{digest}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except OSError as error:
        log.warning("the report of this compile is not kept for later cache hits: %s", error)


def _read(digest: str) -> GraphReport | None:
    path = _directory() / f"{digest}.json"
    try:
        report = GraphReport.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        log.warning("the report of a cached graph cannot be read (%s); rewrites are right, explain is incomplete", error)
        return None
    report.cached = True
    return report
