"""Typed errors. Every message says cause, what was wanted, what was found, and what to do."""

from __future__ import annotations


class InductorExtError(Exception):
    """Base class of every error this package raises itself."""


class SettingError(InductorExtError, ValueError):
    """An option or environment variable has a name or value that is not understood."""


class StrictError(InductorExtError):
    """``strict=True`` and a requested rule matched nothing."""


class VerifyError(InductorExtError):
    """A rewrite's result differs from the graph that it replaced."""


class ToolchainError(InductorExtError):
    """No usable compiler or header set; the message lists what was looked for, where, and the fix."""


class BuildError(InductorExtError):
    """A kernel did not compile. ``first_error`` is the compiler's first error line, ``log`` the path of its full output.

    ``transient``: the same may work in a minute (a full disk, no memory, a time limit, a signal), so it is not remembered.
    """

    def __init__(self, message: str, *, first_error: str = "", log: str = "", transient: bool = False) -> None:
        super().__init__(message)
        self.first_error = first_error
        self.log = log
        self.transient = transient


class KernelUnavailable(InductorExtError):
    """A kernel exists neither prebuilt nor cached and ``build="never"`` or ``"require"`` forbids building it."""
