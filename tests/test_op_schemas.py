"""Every op's schemas, byte for byte: graphs that were saved or cached call ops by them, and so do people's own programs."""

from __future__ import annotations

from pathlib import Path

from inductor_ext import registry
from tests.support.golden import assert_golden


def test_schemas_are_those_of_the_list() -> None:
    packets = [op.packet for op in registry.ops()]
    lines = [str(getattr(packet, name)._schema) for packet in packets for name in packet.overloads()]
    assert_golden(Path(__file__).parent / "golden" / "schemas.txt", "\n".join(lines))
