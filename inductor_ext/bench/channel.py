"""Messages between the run and the process of a side: one JSON object a line, over a socket of their own.

Not stdout: what libraries print there goes to the side's log.
"""

from __future__ import annotations

import json
import select
import socket
from typing import Any


class Channel:
    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.file = end.makefile("rw", encoding="utf-8")

    def send(self, **message: Any) -> None:
        self.file.write(json.dumps(message) + "\n")
        self.file.flush()

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The next message; None when the other process is gone. ``TimeoutError`` when it says nothing for so long."""
        if timeout_s is not None and not select.select([self.end], [], [], max(0.0, timeout_s))[0]:
            raise TimeoutError
        try:
            line = self.file.readline()
        except ConnectionError:
            return None
        return json.loads(line) if line else None

    def close(self) -> None:
        self.file.close()
        self.end.close()
