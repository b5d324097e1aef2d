"""Every option and environment variable of inductor_ext, declared once: type, default, one line of doc.

``current()`` reads the environment when it is called, never at import. ``backend(...)`` and ``options=`` override single
fields with ``Settings.replace``; the backend takes one snapshot per compile, so a compile never sees two values.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import platformdirs

from inductor_ext.errors import SettingError

RuleMode = Literal["auto", "always", "off"]
BuildMode = Literal["compile", "defer", "never", "require"]


#: A GPU target: compute capability 9.0 with its own instructions is sm_90a.
ARCH = re.compile(r"sm_[0-9]{2,3}[af]?")


def _option(
    default: Any,
    env: str | None,
    doc: str,
    *,
    choices: tuple[str, ...] | None = None,
    between: tuple[int, int] | None = None,
    path: Literal["folder", "program", ""] = "",
) -> Any:
    """``between``: the least and the largest value of a number. ``path``: a relative one of such a thing is made absolute."""
    metadata = {"env": env, "doc": doc, "choices": choices, "between": between, "path": path}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """One snapshot of every option. Field metadata holds ``env`` (variable name), ``doc`` and ``choices``."""

    rules: Mapping[str, RuleMode] = _option(
        {}, "INDUCTOR_EXT_RULES", 'mode of single rules, "name=auto|always|off,…"; a rule not named is "auto"'
    )
    strict: bool = _option(False, "INDUCTOR_EXT_STRICT", "a rule named in `rules` that matches nothing is an error")
    prefill_only: bool = _option(
        False,
        "INDUCTOR_EXT_PREFILL_ONLY",
        "every sequence starts with an empty KV cache and nothing reads the cache afterwards, says the user: it is not written",
    )
    checks: bool = _option(
        False,
        "INDUCTOR_EXT_CHECKS",
        "kernels check that slots lie in the cache, and raise (one host sync a call); on a CPU they always do",
    )
    build: BuildMode = _option(  # noqa: RUF009 (a dataclasses.field)
        "compile",
        "INDUCTOR_EXT_BUILD",
        "compile: build kernels while the graph compiles; defer: at first call; never: only load binaries that exist; "
        "require: like compile, but a kernel that has to be built is an error",
        choices=get_args(BuildMode),
    )
    cache_dir: str = _option(
        "", "INDUCTOR_EXT_CACHE_DIR", "where kernel binaries are kept (default: the user cache)", path="folder"
    )
    prebuilt_dir: str = _option(
        "", "INDUCTOR_EXT_PREBUILT_DIR", "read-only directory made by `inductor-ext build`", path="folder"
    )
    nvcc: str = _option(
        "", "INDUCTOR_EXT_NVCC", "path of nvcc (default: CUDA_HOME, PATH, pip's wheels, /usr/local/cuda)", path="program"
    )
    arch: str = _option("", "INDUCTOR_EXT_ARCH", "target such as sm_90a (default: the current GPU's)")
    build_jobs: int = _option(
        0, "INDUCTOR_EXT_BUILD_JOBS", "parallel nvcc processes (0: by cores and free memory)", between=(0, 1024)
    )
    build_timeout_s: int = _option(
        1800, "INDUCTOR_EXT_BUILD_TIMEOUT", "seconds before one nvcc process is stopped", between=(1, 86400)
    )
    pdl: bool = _option(
        True, "INDUCTOR_EXT_PDL", "programmatic dependent launch of our kernels; the variable only, read at the first launch"
    )
    tensor_launches: int = _option(
        0,
        "INDUCTOR_EXT_TENSOR_LAUNCHES",
        "1 or 2: launches of a quantisation with one scale for a tensor, wherever possible (0: by size); the variable only",
        between=(0, 2),
    )
    progress: bool = _option(True, "INDUCTOR_EXT_PROGRESS", "show a progress line on a terminal while kernels build")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _checked(field, getattr(self, field.name), f"option {field.name}")
            object.__setattr__(self, field.name, value)

    def replace(self, **changes: Any) -> Settings:
        """A copy with some fields changed; unknown names and bad values raise ``SettingError``."""
        names = {field.name for field in dataclasses.fields(self)}
        for name in changes:
            if name not in names:
                raise SettingError(f"unknown option {name!r}; options are {', '.join(sorted(names))}")
        return dataclasses.replace(self, **changes)

    def cache_path(self) -> Path:
        """Directory of kernel binaries, absolute. Not created here. A user without a home has one of their own in /tmp."""
        if self.cache_dir:
            return Path(self.cache_dir)
        try:
            path = Path(platformdirs.user_cache_dir("inductor_ext"))
        except (RuntimeError, KeyError, OSError):  # neither HOME nor a line in passwd; other versions answer "~/…" then
            path = Path()
        return path if path.is_absolute() else Path(_temporary()) / f"inductor_ext-{os.geteuid()}"

    def prebuilt_path(self) -> Path:
        """``prebuilt_dir`` as a path."""
        return Path(self.prebuilt_dir)


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # no directory at all can be written, which is told where something is built
        return "/tmp"


def _checked(field: dataclasses.Field[Any], value: Any, name: str) -> Any:
    """``value`` as the option holds it. Raises ``SettingError``; ``name`` is the option or the variable that gave it."""
    kind, choices, between = field.type, field.metadata["choices"], field.metadata["between"]
    if field.name == "rules":
        return _checked_rules(value, name)
    if choices:
        if value not in choices:
            raise SettingError(f"{name}: wanted one of {', '.join(choices)}, found {_found(value)}")
    elif kind == "bool":
        if not isinstance(value, bool):
            raise SettingError(f"{name}: wanted True or False, found {_found(value)}")
    elif kind == "int":
        least, largest = between
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= largest:
            raise SettingError(f"{name}: wanted a whole number from {least} to {largest}, found {_found(value)}")
    elif field.metadata["path"]:
        return _checked_path(value, name, field.metadata["path"])
    elif not isinstance(value, str):
        raise SettingError(f"{name}: wanted text, found {_found(value)}")
    elif field.name == "arch" and value and not ARCH.fullmatch(value):
        raise SettingError(f"{name}: wanted something like sm_90a, found {_found(value)}")
    return value


def _found(value: Any) -> str:
    """A value in an error, short; some values have no ``repr`` (a number of 5,000 digits)."""
    try:
        return f"{value!r:.80}"
    except Exception:
        return f"a {type(value).__name__}"


def _checked_rules(value: Any, name: str) -> dict[str, RuleMode]:
    """A copy, so that a snapshot stays what it was."""
    if not isinstance(value, Mapping):
        raise SettingError(f"{name}: wanted a mapping of rule name to mode, found {type(value).__name__}")
    for rule, mode in value.items():
        if not isinstance(rule, str) or not rule:
            raise SettingError(f"{name}: wanted the name of a rule, found {_found(rule)}")
        if mode not in get_args(RuleMode):
            raise SettingError(f"{name}[{rule!r}]: wanted one of {', '.join(get_args(RuleMode))}, found {_found(mode)}")
    return dict(value)


def _checked_path(value: Any, name: str, what: str) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or "\0" in text:
        raise SettingError(f"{name}: wanted a path, found {_found(value)}")
    if not text or (what == "program" and os.sep not in text):  # a bare name is looked up on PATH
        return text
    try:
        return _anchored(text)
    except (OSError, RuntimeError) as error:
        raise SettingError(f"{name}: wanted a path that can be made absolute, found {text!r} ({error})") from None


@functools.cache
def _anchored(text: str) -> str:
    """An absolute path, fixed when a process first uses the text: a ``chdir`` later does not move a directory."""
    return str(Path(text).expanduser().absolute())


def _parse(field: dataclasses.Field[Any], text: str) -> Any:
    env = field.metadata["env"]
    if field.name == "rules":
        pairs = [item.partition("=") for item in text.split(",") if item.strip()]
        return {name.strip(): mode.strip() or "auto" for name, _, mode in pairs}
    if field.type == "bool":
        if text.strip().lower() in ("1", "true", "on", "yes"):
            return True
        if text.strip().lower() in ("0", "false", "off", "no", ""):
            return False
        raise SettingError(f"{env}: wanted 0 or 1, found {text!r}")
    if field.type == "int":
        if not re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text):
            raise SettingError(f"{env}: wanted a whole number, found {text!r:.80}")
        return int(text)
    return text


def current(**overrides: Any) -> Settings:
    """Settings of the environment as it is now, with ``overrides`` on top."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        env = field.metadata["env"]
        if env and env in os.environ:
            values[field.name] = _checked(field, _parse(field, os.environ[env]), env)
    return Settings().replace(**{**values, **overrides})


def table() -> list[tuple[str, str, str, str]]:
    """(option, environment variable, default, doc) of every option, for the CLI and the docs."""
    defaults = Settings()
    return [
        (f.name, f.metadata["env"], str(getattr(defaults, f.name)), f.metadata["doc"]) for f in dataclasses.fields(Settings)
    ]


def checks_enabled() -> bool:
    """`Settings.checks` alone, for the hot path of a kernel call (0.6 µs where a whole snapshot takes 20)."""
    return os.environ.get("INDUCTOR_EXT_CHECKS", "0").lower() in ("1", "true", "on", "yes")
