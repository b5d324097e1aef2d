"""What to compile: one ``.cuh``, the C++ expressions to export from it, the target and extra flags.

A ``JitSpec`` is a value: hashable, comparable, a JSON round trip away from another process. It holds no path of a
machine, so a spec written down while a graph compiles can be built elsewhere.

    spec = JitSpec("fp8_downcast", "fp8_downcast/fp8_downcast.cuh",
                   (("run", "inductor_ext::fp8_downcast<__nv_bfloat16, 8>::run"),), arch="sm_90a")
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from inductor_ext.settings import ARCH

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class JitSpec:
    """One kernel binary. Raises ``ValueError`` for a name, path, export or target that cannot be built.

    ``source`` is relative to the ``kernels/`` folder, posix. ``exports`` are (exported name, C++ expression) pairs.
    ``arch`` is exact: ``sm_90a`` and ``sm_90`` are different binaries.
    """

    name: str
    source: str
    exports: tuple[tuple[str, str], ...]
    arch: str
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "exports", tuple((str(name), str(expr)) for name, expr in self.exports))
        object.__setattr__(self, "flags", tuple(self.flags))
        for field in (self.name, self.source, self.arch, *self.flags):
            if not isinstance(field, str):
                raise ValueError(f"JitSpec: wanted text for name, source, arch and every flag, found {field!r}")
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"JitSpec.name: wanted letters, digits, '_', '-' and '.', found {self.name!r}")
        path = PurePosixPath(self.source)
        if not self.source or path.is_absolute() or ".." in path.parts or re.search(r'[\\"\n]', self.source):
            raise ValueError(f"JitSpec.source: wanted a posix path inside kernels/, found {self.source!r}")
        if not ARCH.fullmatch(self.arch):
            raise ValueError(f"JitSpec.arch: wanted something like sm_90a, found {self.arch!r}")
        if not self.exports:
            raise ValueError(f"JitSpec {self.name}: wanted at least one export, found none")
        for name, expression in self.exports:
            if not _IDENTIFIER.fullmatch(name) or not expression.strip():
                raise ValueError(f"JitSpec {self.name}: not an export (C name, C++ expression): {(name, expression)!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` gives an equal spec back."""
        return {
            "name": self.name,
            "source": self.source,
            "exports": [list(pair) for pair in self.exports],
            "arch": self.arch,
            "flags": list(self.flags),
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> JitSpec:
        """The spec of ``to_dict``. Raises ``KeyError`` or ``ValueError`` when ``d`` is no such thing."""
        exports = tuple((name, expression) for name, expression in d["exports"])
        return cls(d["name"], d["source"], exports, d["arch"], tuple(d.get("flags", ())))

    def translation_unit(self) -> str:
        """The generated ``.cu``. Expressions stand in parentheses: the export macro would split at template commas."""
        lines = ["#include <tvm/ffi/function.h>", f'#include "{self.source}"']
        lines += [f"TVM_FFI_DLL_EXPORT_TYPED_FUNC({name}, ({expression}));" for name, expression in self.exports]
        return "\n".join(lines) + "\n"

    def gencode(self) -> str:
        """nvcc's target option; one exact target, no PTX, so a binary never runs on a GPU that it was not built for."""
        number = self.arch.removeprefix("sm_")
        return f"-gencode=arch=compute_{number},code=sm_{number}"

    def describe(self) -> str:
        """One line for people."""
        flags = f" [{' '.join(self.flags)}]" if self.flags else ""
        return f"{self.name} ({self.arch}) {self.source}: {', '.join(expr for _, expr in self.exports)}{flags}"
