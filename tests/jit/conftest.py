"""A small ``kernels/`` folder, a fake nvcc (g++ behind a script that counts its calls) and settings that use them.

The fake compiles host code against a stub of tvm-ffi's export macro in 0.1 s, so that the tests are about the cache,
not about CUDA. ``Lab.python`` starts a process without torch: importing it would cost each of them three seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from inductor_ext import settings as settings_module
from inductor_ext.jit import JitSpec, headers, loader
from inductor_ext.settings import Settings

REPOSITORY = Path(settings_module.__file__).resolve().parent.parent

STUB = """
#pragma once
#include <stdint.h>
struct Value { int32_t type_index; uint32_t padding; int64_t number; };
#define TVM_FFI_DLL_EXPORT_TYPED_FUNC(name, function)                                                          \\
  extern "C" int __tvm_ffi_##name(void*, const void*, int32_t, Value* result) {                                \\
    result->type_index = 1; result->padding = 0; result->number = (function)(); return 0;                      \\
  }
"""

FAKE_NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 99.1, V99.1.{version}"; exit 0;;
  --dryrun) exit 0;;
esac
echo compile >> {calls}
{before}
while [ $# -gt 0 ]; do
  case "$1" in
    -ccbin) host=$2; shift;;
    -MF) dep=$2; shift;;
    -o) out=$2; shift;;
    -I) include="$include -I$2"; shift;;
    -isystem) shift;;
    *.cu) source=$1;;
  esac
  shift
done
exec "$host" -x c++ -std=c++17 -shared -fPIC -I {stub} $include -MD -MF "$dep" -o "$out" "$source"
"""

SUBPROCESS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
import sys, types
package = types.ModuleType("inductor_ext")
package.__path__ = [{package!r}]
sys.modules["inductor_ext"], sys.modules["torch"] = package, None
from pathlib import Path
from inductor_ext.errors import *
from inductor_ext.jit import JitSpec, KernelCache, headers, load, try_load
from inductor_ext.settings import Settings
headers.kernels_root = lambda: Path({kernels!r})
settings = Settings().replace(cache_dir={cache!r}, nvcc={nvcc!r})
spec = JitSpec("answer", "answer/answer.cuh", (("run", "t::run<1>"),), arch="sm_90a")
"""


@dataclass
class Lab:
    """One test's world: folders, the fake compiler and the settings that name them."""

    path: Path

    @property
    def kernels(self) -> Path:
        return self.path / "kernels"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def nvcc(self) -> Path:
        return self.path / "nvcc"

    @property
    def settings(self) -> Settings:
        return Settings().replace(cache_dir=str(self.cache), nvcc=str(self.nvcc), progress=False)

    @property
    def without_compiler(self) -> Settings:
        return self.settings.replace(nvcc=str(self.path / "no-such-nvcc"))

    def spec(self, **changes: object) -> JitSpec:
        values: dict = {
            "name": "answer",
            "source": "answer/answer.cuh",
            "exports": (("run", "t::run<1>"),),
            "arch": "sm_90a",
        }
        return JitSpec(**{**values, **changes})

    def fake_nvcc(self, *, before: str = "", version: int = 1) -> None:
        """Write the fake; ``before`` is shell code that runs before it compiles."""
        stub, calls = self.path / "stub", self.path / "calls"
        self.nvcc.write_text(FAKE_NVCC.format(before=before, version=version, calls=calls, stub=stub))
        self.nvcc.chmod(0o755)

    def compiles(self) -> int:
        """How often the fake compiled."""
        calls = self.path / "calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    def python(self, code: str, *, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a fresh process with ``spec`` and ``settings`` of this lab defined."""
        head = SUBPROCESS.format(
            package=str(REPOSITORY / "inductor_ext"),
            kernels=str(self.kernels),
            cache=str(self.cache),
            nvcc=str(self.nvcc),
        )
        return subprocess.Popen(
            [sys.executable, "-c", head + textwrap.dedent(code)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
            cwd=self.path,
        )

    def output(self, code: str, *, env: dict[str, str] | None = None) -> str:
        """Output of a fresh process that has to succeed."""
        process = self.python(code, env=env)
        text = process.communicate(timeout=60)[0]
        assert process.returncode == 0, text
        return text.strip()


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    if shutil.which("g++") is None:
        pytest.skip("no g++: the fake nvcc needs one")
    lab = Lab(tmp_path)
    for name in ("kernels/answer", "kernels/include", "stub/tvm/ffi"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "stub/tvm/ffi/function.h").write_text(STUB)
    (lab.kernels / "include/value.h").write_text("#define VALUE 40\n")
    source = '#include "value.h"\nnamespace t { template <int N> int run() { return VALUE + N; } }\n'
    (lab.kernels / "answer/answer.cuh").write_text(source)
    lab.fake_nvcc()
    monkeypatch.setattr(headers, "kernels_root", lambda: lab.kernels)
    for variable in ("NVCC_CCBIN", "CXX", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(variable, raising=False)
    loader.forget()
    return lab
