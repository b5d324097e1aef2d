"""Single compilers: where they are looked for, and what they answer when asked for their version.

Versions are part of a binary's identity, and asking nvcc costs 40 ms, so answers are kept in ``<cache>/toolchain.json``
under a fingerprint of the compiler's file (path, time, size).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from inductor_ext.errors import ToolchainError
from inductor_ext.jit import process, wheels
from inductor_ext.jit.files import Folder, parse_json, read_regular, scratch, write_atomically
from inductor_ext.jit.ours import is_marked
from inductor_ext.report.shown import shown
from inductor_ext.settings import Settings

_PROBE_TIMEOUT_S = 60
INSTALL_NVCC = (
    "`pip install 'inductor-ext[nvcc]'` brings nvcc in wheels (or install the CUDA toolkit, or set INDUCTOR_EXT_NVCC to nvcc's "
    "path, or run from prebuilt kernels)"
)
INSTALL_HOST = "install g++ (`apt install g++`, `dnf install gcc-c++`) or set NVCC_CCBIN to a host compiler"


def find_nvcc(settings: Settings) -> tuple[Path | None, list[str]]:
    """(nvcc or None, every place looked at). A path set by hand is the only place looked at."""
    places: list[tuple[str, str | None]] = []
    if settings.nvcc:
        places.append((f"INDUCTOR_EXT_NVCC={settings.nvcc}", shutil.which(settings.nvcc)))
    else:
        for variable in ("CUDA_HOME", "CUDA_PATH"):
            if home := os.environ.get(variable):
                places.append((f"{variable}={home}", shutil.which(str(Path(home) / "bin" / "nvcc"))))
            else:
                places.append((f"{variable} (not set)", None))
        places.append(("PATH", shutil.which("nvcc")))
        if found := wheels.installed():
            places.append((found.describe(), None if found.unfit else shutil.which(str(found.nvcc))))
        else:
            places.append((f"{wheels.NVCC} (not installed)", None))
        places.append(("/usr/local/cuda/bin/nvcc", shutil.which("/usr/local/cuda/bin/nvcc")))
    return next((Path(path) for _, path in places if path), None), [place for place, _ in places]


def find_host_compiler() -> tuple[Path | None, list[str]]:
    """(host compiler or None, every place looked at): NVCC_CCBIN, CXX, then g++ and c++ on PATH."""
    looked = []
    for variable in ("NVCC_CCBIN", "CXX"):
        words = shlex.split(os.environ.get(variable, ""))
        looked.append(f"{variable}={words[0]}" if words else f"{variable} (not set)")
        if words and (found := shutil.which(words[0])):
            return Path(found), looked
    for name in ("g++", "c++"):
        looked.append(f"{name} on PATH")
        if found := shutil.which(name):
            return Path(found), looked
    return None, looked


def short_version(text: str) -> str:
    """``13.0.88`` out of a compiler's version text."""
    match = re.search(r"\bV(\d+\.\d+\.\d+)", text) or re.search(r"version (\d[\w.]*)", text)
    return match.group(1) if match else (text.strip().splitlines() or ["?"])[-1]


def with_environment(version: str, nvcc: Path) -> str:
    """nvcc takes options from two variables too, and its parts may be wheels: they change the binary as much as it does."""
    extra = [f"{v}={os.environ[v]}" for v in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS") if os.environ.get(v)]
    extra += [f"{name} {found}" for name, found in wheels.versions_beside(nvcc).items() if name != wheels.NVCC]
    return "\n".join([version, *extra])


def _ask(*command: str) -> str:
    """Output of a short question to a compiler. Raises ``ToolchainError`` when it cannot be run or fails.

    Include variables are left out: they would be listed as the compiler's own directories.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")}
    try:
        with scratch() as answer:
            code = process.run(command, answer, _PROBE_TIMEOUT_S, env={**env, "LC_ALL": "C"})
            answer.seek(0)
            output = shown(answer.read())
    except (OSError, process.TimedOut) as error:
        why = error if isinstance(error, OSError) else f"it gave no answer in {_PROBE_TIMEOUT_S} s and was stopped"
        raise ToolchainError(f"{command[0]} does not run: {why}. To fix: {INSTALL_NVCC}") from error
    if code:
        raise ToolchainError(f"`{shlex.join(command)}` failed ({code}): {output.strip()[-300:]}")
    return output


def probe_nvcc(path: Path) -> tuple[str, list[str]]:
    """(version text, the toolkit's include directories)."""
    version = _ask(str(path), "--version").strip()
    try:
        plan = _ask(str(path), "--dryrun", "x.cu")
    except ToolchainError:  # without a host compiler, or a wrapper that does not know the option: nothing is attributed
        plan = ""
    lines = [line for line in plan.splitlines() if re.match(r"#\$ (SYSTEM_)?INCLUDES=", line)]
    found = re.findall(r'"-I([^"]+)"|"-isystem" "([^"]+)"', "\n".join(lines))
    return version, [str(Path(a or b).resolve()) for a, b in found]


def probe_host(path: Path) -> tuple[str, list[str]]:
    """(version text, its own include directories). /usr/local is left out: it holds what people install themselves."""
    output = _ask(str(path), "-v", "-E", "-x", "c++", os.devnull)
    version = next((line for line in output.splitlines() if " version " in line), path.name)
    listed = output.partition("#include <...> search starts here:")[2].partition("End of search list.")[0]
    dirs = {str(Path(line.split(" (framework")[0].strip()).resolve()) for line in listed.splitlines() if line.strip()}
    return version.strip(), sorted(d for d in dirs if not d.startswith("/usr/local/"))


def _fingerprint(path: Path) -> str:
    """Changes when the compiler does. A small script (``exec /opt/cuda/bin/nvcc …``) counts with the files it names."""
    parts = []
    real = path.resolve()
    stat = real.stat()
    parts.append(f"{real} {stat.st_mtime_ns} {stat.st_size}")
    if stat.st_size < 4096:
        script = read_regular(real, 4096).decode(errors="replace")
        for word in sorted(set(re.findall(r"/[\w./+-]+", script))):
            named = Path(word)
            if named.is_file():
                parts.append(f"{word} {named.stat().st_mtime_ns}")
    return "; ".join(parts)


class VersionMemo:
    """``fingerprint -> (version text, include directories)`` in a JSON file, which may be missing or read-only."""

    _process: ClassVar[dict[str, tuple[str, list[str]]]] = {}  # answers of this process, shared on purpose

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, compiler: Path, probe: Callable[[Path], tuple[str, list[str]]]) -> tuple[str, list[str]]:
        """The kept answer, else ``probe(compiler)``. Raises ``ToolchainError`` from the probe."""
        try:
            key = _fingerprint(compiler)
        except OSError as error:
            raise ToolchainError(f"{compiler} cannot be read: {error}") from error
        if key not in self._process:
            kept = self._read()
            if key not in kept:
                kept[key] = probe(compiler)
                self._write(kept)
            self._process[key] = kept[key]
        return self._process[key]

    def _read(self) -> dict[str, tuple[str, list[str]]]:
        try:
            with Folder(self.path.parent) as root:
                raw = parse_json(root.read(self.path.name, 1 << 20))
        except (OSError, ValueError):
            return {}
        return {key: (value[0], value[1]) for key, value in raw.items() if _is_answer(value)} if isinstance(raw, dict) else {}

    def _write(self, kept: dict[str, tuple[str, list[str]]]) -> None:
        newest = dict(list(kept.items())[-32:])
        try:  # without the directory nothing is kept: a load creates none; nor in a folder that is not a cache
            with Folder(self.path.parent) as root:
                if is_marked(root):
                    write_atomically(self.path, json.dumps(newest, indent=1))
        except OSError:
            return


def _is_answer(value: object) -> bool:
    """[version text, [include directory, …]]."""
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], list):
        return False
    return all(isinstance(text, str) for text in (value[0], *value[1]))
