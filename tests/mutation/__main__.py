"""./run mutate: break each guard and each argument of an inserted op once, and say which breaks the tests do not notice.

    ./run mutate --only '*kv_store*' --out build/mutants.json      some of them, kept
    ./run mutate --resume build/mutants.json                       the rest, or again after a change
    ./run mutate --list                                            what there is

Guards are found in patterns/ and in the files of inductor_ext that read graphs for them; ``sites.py`` and ``parameters.py``
say how. A mutant that the tests cannot notice, since it changes nothing, has a line in ``equivalent.txt`` that says why. Exit
status 1 when another one survives. Tools such as mutmut and cosmic-ray edit sources and run all tests for each mutant: hours.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENTS = Path(__file__).with_name("equivalent.txt")

#: Tests of rules. Those of kernels, of building and of benchmarks run none.
TESTS = ("tests/patterns", "tests/kernels/test_references.py", "tests/moe", "tests/test_passes.py", "tests/test_explain.py")


#: Files that patterns import, and that know nodes, but read no graphs for them.
NO_READERS = ("rule", "autotune", "torch_compat")


def modules() -> dict[str, Path]:
    """What is mutated: all patterns but mere examples, and the files of inductor_ext that they import and that read nodes."""
    found = {}
    imported: set[str] = set()
    for path in sorted((ROOT / "patterns").rglob("*.py")):
        if path.stem.endswith("examples"):
            continue
        inside = path.relative_to(ROOT / "patterns")
        found[".".join(("inductor_ext.patterns", *inside.with_suffix("").parts))] = ROOT / "inductor_ext" / "patterns" / inside
        text = path.read_text(encoding="utf-8")
        imported |= set(re.findall(r"^from inductor_ext\.(\w+) import", text, re.M))
        for names in re.findall(r"^from inductor_ext import (.+)", text, re.M):
            imported |= {name.split(" as ")[0].strip() for name in names.split(",")}
    for name in sorted(imported.difference(NO_READERS)):
        path = ROOT / "inductor_ext" / f"{name}.py"
        if path.exists() and re.search(r"^from torch\.fx import .*\bNode\b", path.read_text(encoding="utf-8"), re.M):
            found[f"inductor_ext.{name}"] = path
    return found


def equivalents(path: Path = EQUIVALENTS) -> dict[str, str]:
    """Why each of these mutants changes nothing: "ID -- sentence" a line."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    bad = [line for line in lines if " -- " not in line]
    if bad:
        raise SystemExit(f"mutate: {path.name}: wanted 'ID -- why it changes nothing', found {bad[0]!r}")
    return {name: why for name, _, why in (line.rpartition(" -- ") for line in lines)}


def inserted() -> list[Any]:
    """Every change to an argument of an op that a rule may insert."""
    from inductor_ext import registry
    from tests.mutation.parameters import parameters

    rules = {rule.name: ROOT / "patterns" / f"{name}.py" for name, rule in zip(registry.RULE_MODULES, registry.rules())}
    return parameters(rules, {op.name: op for op in registry.ops()})


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run mutate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="mutants whose id matches; may be repeated")
    parser.add_argument("--list", action="store_true", help="ids and lines, and nothing else")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="mutants at once [%(default)s]")
    parser.add_argument("--budget", type=float, default=60.0, metavar="S", help="seconds of tests a mutant [%(default)s]")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), metavar="PATH", help="the tests that may notice")
    parser.add_argument("--select", default="", metavar="EXPR", help="of those, the ones that pytest's -k takes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results as JSON; written as they come")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with FILE, and write to it")
    parser.add_argument("--stale", action="store_true", help="record new tests only, in spite of changed sources")
    parser.add_argument("--equivalent", action="store_true", help="run those of equivalent.txt too: one that is killed is none")
    options = parser.parse_args(arguments)

    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what runs, and keeps what is known
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a pool of processes does not survive a fork

    from tests.mutation.sites import Modules, Probe

    probe, found = Probe(), Modules(modules(), ROOT)
    found.install(probe)

    import torch

    import inductor_ext
    from inductor_ext import registry
    from tests.mutation.parameters import Insertions

    changes = inserted()
    insertions = Insertions(probe, {op.name: op for op in registry.ops()}, changes)
    sites = found.sites()
    names = [site.id for site in sites] + [each.id for each in changes]
    chosen = [name for name in names if not options.only or any(fnmatch.fnmatchcase(name, glob) for glob in options.only)]
    if options.list:
        where = {site.id: f"{site.file}:{site.line}" for site in sites}
        for name in chosen:
            print(f"{name}" + (f"  [{where[name].rpartition(':')[2]}]" if name in where else ""))
        return 0

    # A process that is forked has neither threads nor, to begin with, what the first compile imports.
    torch.set_num_threads(1)
    inductor_ext.explain(lambda x: (x.float() / 2).to(torch.float8_e4m3fn), torch.ones(2, 2))

    import pytest

    from tests.mutation.campaign import TEST_LIMIT, Campaign, Options, State

    source_digest = registry.source_digest()

    def fresh(name: str) -> None:
        registry.source_digest = lambda: source_digest + name.encode()  # type: ignore[assignment]

    def wrap(campaign: Campaign) -> None:
        for rule in registry.rules():
            object.__setattr__(rule, "replace", insertions.wrap(rule.name, rule.replace))

    by_file = {found.named(module): module for module in found.paths}
    out = options.resume or options.out
    state = State.read(options.resume) if options.resume and options.resume.exists() else State()
    known = equivalents()
    plan = Options(
        modules=found,
        mutants=chosen,
        files={site.id: by_file[site.file] for site in sites} | {each.id: "" for each in changes},
        equivalents={} if options.equivalent else known,
        state=state,
        jobs=options.jobs,
        stale=options.stale,
        budget=options.budget,
        out=out,
        shared=(ROOT / "tests" / "support",),
        prepare=wrap,
        fresh=fresh,
        texts=insertions.texts,
        changed=lambda: insertions.changed if probe.active in insertions.known else None,
    )
    # Kept in memory, what a test prints is each process's own.
    given = ["-q", "--no-header", "--no-summary", "-p", "no:cacheprovider", "--capture=sys", f"--timeout={TEST_LIMIT}"]
    given += ["-k", options.select, *options.tests]
    given_cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    status = pytest.main(given, plugins=[Campaign(probe, plan)])
    made_cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # by tests/conftest.py, for all processes
    if made_cache is not None and made_cache != given_cache:
        shutil.rmtree(made_cache, ignore_errors=True)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return int(status)
    results = {name: state.results[name] for name in chosen if name in state.results}
    for name, result in results.items():
        if result.status in ("survived", "golden", "hung"):
            print(f"{name}\n    {result.text()}")
    counts = Counter(result.status for result in results.values())
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())), f"of {len(chosen)} mutants")
    survived = [name for name, result in results.items() if result.status == "survived" and name not in known]
    wrong = [name for name in known if options.equivalent and name in results and results[name].status in ("killed", "golden")]
    for name in wrong:
        print(f"equivalent.txt: it is killed, and so not equivalent: {name}\n    {results[name].text()}")
    return 1 if survived or wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
