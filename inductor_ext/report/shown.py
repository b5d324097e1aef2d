"""What a user's string looks like on a terminal and on a page: no character of it is obeyed, each is shown.

A module, a source line, a file or a compiler's message may hold escape sequences that move the cursor, set the window's title
or change what the reader believes to be reading (bidirectional overrides). Every formatter sends such strings through here.
"""

from __future__ import annotations

import re

#: C0 and C1 controls, what turns the direction of text, what Unicode counts as a line's end, and halves of a pair (a file name
#: that is no UTF-8 holds them, and no terminal can print one).
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def shown(value: object) -> str:
    """``value`` as text, control characters spelt out (``\\x1b``). Line feeds and tabs stay: they only lay text out."""
    return _OBEYED.sub(_spelt, str(value))


def line(value: object) -> str:
    """The same for what has to stay on one line, a name or a path: line feeds and tabs are spelt out too."""
    return shown(value).replace("\n", "\\n").replace("\t", "\\t")


def _spelt(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
