"""compute-sanitizer over one call of everything in `calls.CALLS`: one process a tool, and what it says by op.

    compute-sanitizer --tool memcheck --kernel-name kns=inductor_ext python -m benchmarks.trust --only bare

Our kernels alone are instrumented, by the namespace in their mangled names. The program prints a line before each call and
waits for the GPU after it, so that what the sanitizer prints in between is that call's. Without PyTorch's caching allocator
every tensor is an allocation of its own, with padding behind it: memcheck sees where it ends.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.trust.calls import CALLS
from benchmarks.trust.operands import Call

#: Options of all tools, and of one of them; those that this version's --help does not know are left out.
OPTIONS = (("--leak-check", "no"), ("--target-processes", "application-only"), ("--print-limit", "1000"))
OF_TOOL = {"memcheck": (("--padding", "4096"),)}
KERNELS = "kns=inductor_ext"
FILTERS = "--kernel-name", "--kernel-regex"  # the newer name, the older
#: Lines of the sanitizer that are no report.
_SAYS = re.compile(r"^========= ?(?P<text>.*)")
_NOISE = re.compile(r"COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY|LEAK SUMMARY|No memory leaks|Target application|^\s*$")
_MARK = re.compile(r"^@@ (?P<name>.*)")


@dataclasses.dataclass
class Heard:
    """What a tool said during one call."""

    call: Call
    lines: list[str] = dataclasses.field(default_factory=list)

    @property
    def said(self) -> str:
        """The first lines of the first report; every report begins at the left margin, its details are indented."""
        reports = [line for line in self.lines if not line.startswith((" ", "\t"))]
        if not self.lines:
            return ""
        return f"{max(len(reports), 1)} reports, the first: {' / '.join(line.strip() for line in self.lines[:4])}"


def found_sanitizer() -> str:
    """On the PATH, or where CUDA's installer puts it; what is not there is an OSError when it is called."""
    return shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def command(tool: str, known: str, program: Sequence[str]) -> list[str]:
    """``known``: what ``compute-sanitizer --help`` prints."""
    found = [found_sanitizer(), "--tool", tool]
    for option, value in (*OPTIONS, *OF_TOOL.get(tool, ())):
        found += [option, value] if option in known else []
    name = next((each for each in FILTERS if each in known), None)
    return [*found, *([name, KERNELS] if name else []), *program]


def heard(output: Iterable[str]) -> tuple[list[Heard], list[str], str]:
    """What was said of each call that was begun, what was said outside of them, and the tool's summary."""
    found: list[Heard] = []
    outside: list[str] = []
    by_name, summary, ended = {call.name: call for call in CALLS}, "", False
    for line in output:
        mark, says = _MARK.match(line), _SAYS.match(line)
        if mark is not None:
            ended = mark["name"] == "end"
            if mark["name"] in by_name:
                found.append(Heard(by_name[mark["name"]]))
        elif says is not None and "SUMMARY" in says["text"]:
            summary = says["text"].strip()
        elif says is not None and not _NOISE.search(says["text"]):
            (found[-1].lines if found and not ended else outside).append(says["text"].rstrip())
    return found, outside, summary


def run(tool: str, seconds: float, log: Path, rows: Path) -> tuple[list[tuple[str, str, str | None]], str]:
    """(op, call, what was said) for each call, None for those that were not reached; and the tool's summary in one line."""
    known = subprocess.run([found_sanitizer(), "--help"], capture_output=True, text=True)
    program = [sys.executable, "-m", "benchmarks.trust", "--only", "bare", "--rows", str(rows)]
    line = command(tool, known.stdout + known.stderr, program)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "INDUCTOR_EXT_BUILD": "never"}
    start = time.perf_counter()
    with log.open("w") as out:
        code = stopped_after(line, seconds, out, environment)
    found, outside, summary = heard(log.read_text(errors="replace").splitlines())
    reached = {each.call.name: each.said for each in found}
    results = [(call.op, call.what, reached.get(call.name)) for call in CALLS]
    if code is None and found:  # the call it was stopped in is not one that was looked at
        results = [(op, what, None if f"{op}: {what}" == found[-1].call.name else said) for op, what, said in results]
    ended = f"stopped after {seconds:.0f} s" if code is None else f"exit code {code}"
    elsewhere = f"; outside of calls: {' / '.join(outside[:6])}" if outside else ""
    took = f"{len(found)} of {len(CALLS)} calls, {time.perf_counter() - start:.0f} s, {ended}{elsewhere}"
    shown = " ".join(["compute-sanitizer", *("python" if each == sys.executable else each for each in line[1:-2])])
    return results, f"$ {shown}\n{summary or 'no summary'}; {took}"


def stopped_after(line: Sequence[str], seconds: float, out: object, environment: dict[str, str]) -> int | None:
    """The exit code; None where the process, and those it started, had to be stopped."""
    process = subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)  # type: ignore[call-overload]
    try:
        return int(process.wait(seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None
