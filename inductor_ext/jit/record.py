"""``entry.json``, what is written beside a binary: read as if anybody had written it.

Every field has its type and every text its shape before anything is done with it, so that a record of any other shape is a
``ValueError`` here and not a ``TypeError`` somewhere in a compile.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from inductor_ext.jit.files import parse_json
from inductor_ext.jit.spec import JitSpec

FORMAT = 1
RECORD_LIMIT = 4 << 20  # bytes; a CUTLASS kernel's has 40,000
BINARY_LIMIT = 1 << 30
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Record:
    """What a binary was made from, and which bytes it has."""

    spec: JitSpec
    nvcc: str
    host: str
    packages: Mapping[str, str]
    headers: Mapping[str, str]
    seconds: float
    sha256: str
    size: int
    created: float

    @classmethod
    def parse(cls, data: bytes) -> Record:
        """Raises ``ValueError`` saying which field is not what it has to be."""
        raw = _mapping(parse_json(data), "the record")
        if raw.get("format") != FORMAT or isinstance(raw["format"], bool):
            raise ValueError(f"format: wanted {FORMAT}, found {raw.get('format')!r:.40}")
        made, binary = _mapping(raw.get("made"), "made"), _mapping(raw.get("binary"), "binary")
        size, sha256 = binary.get("size"), _text(binary.get("sha256"), "binary.sha256")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= BINARY_LIMIT:
            raise ValueError(f"binary.size: wanted a number of bytes, found {size!r:.40}")
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"binary.sha256: wanted 64 hexadecimal digits, found {sha256!r:.40}")
        return cls(
            _spec(raw.get("spec")),
            _text(made.get("nvcc"), "made.nvcc"),
            _text(made.get("host compiler"), "made.host compiler"),
            _texts(made.get("packages"), "made.packages"),
            _texts(raw.get("headers"), "headers"),
            _number(raw.get("seconds"), "seconds"),
            sha256,
            size,
            _number(raw.get("created"), "created"),
        )

    def text(self) -> str:
        """The record as it lies on disk; ``parse`` gives an equal one back."""
        made = {"nvcc": self.nvcc, "host compiler": self.host, "packages": dict(self.packages)}
        binary = {"sha256": self.sha256, "size": self.size}
        whole = {"format": FORMAT, "spec": self.spec.to_dict(), "made": made, "headers": dict(self.headers)}
        return json.dumps({**whole, "seconds": self.seconds, "binary": binary, "created": self.created}, indent=1)

    def made(self) -> list[tuple[str, Any]]:
        """Compilers and packages in a fixed order, for the entry's key."""
        return [("host compiler", self.host), ("nvcc", self.nvcc), ("packages", dict(self.packages))]


def _spec(value: object) -> JitSpec:
    """Only a spec that gives this very record back: nothing that is merely read as one."""
    raw = _mapping(value, "spec")
    try:
        spec = JitSpec.from_dict(raw)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"spec: no JitSpec ({type(error).__name__}: {error})") from None
    if spec.to_dict() != raw:
        raise ValueError("spec: has other fields, or fields of other types, than a JitSpec")
    return spec


def _mapping(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: wanted a mapping, found {type(value).__name__}")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what}: wanted text, found {type(value).__name__}")
    return value


def _texts(value: object, what: str) -> dict[str, str]:
    return {name: _text(text, f"{what}[{name!r:.80}]") for name, text in _mapping(value, what).items()}


def _number(value: object, what: str) -> float:
    """Finite, and small enough to be a time or a duration."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e15 or not math.isfinite(value):
        raise ValueError(f"{what}: wanted a number, found {value!r:.40}")
    return float(value)
