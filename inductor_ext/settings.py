"""Every option and environment variable of inductor_ext, declared once: type, default, one line of doc.

``current()`` reads the environment when it is called, never at import. ``backend(...)`` and ``options=`` override single
fields with ``Settings.replace``; the backend takes one snapshot per compile, so a compile never sees two values.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import platformdirs

from inductor_ext.errors import SettingError

RuleMode = Literal["auto", "always", "off"]
BuildMode = Literal["compile", "defer", "never", "require"]


def _option(default: Any, env: str | None, doc: str, *, choices: tuple[str, ...] | None = None) -> Any:
    metadata = {"env": env, "doc": doc, "choices": choices}
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
    checks: bool = _option(False, "INDUCTOR_EXT_CHECKS", "kernels check that slots lie in the cache, and raise (one host sync a call); on a CPU they always do")
    build: BuildMode = _option(  # noqa: RUF009 (a dataclasses.field)
        "compile",
        "INDUCTOR_EXT_BUILD",
        "compile: build kernels while the graph compiles; defer: at first call; never: only load binaries that exist; "
        "require: like compile, but a kernel that has to be built is an error",
        choices=get_args(BuildMode),
    )
    cache_dir: str = _option("", "INDUCTOR_EXT_CACHE_DIR", "where kernel binaries are kept (default: the user cache)")
    prebuilt_dir: str = _option("", "INDUCTOR_EXT_PREBUILT_DIR", "read-only directory made by `inductor-ext build`")
    nvcc: str = _option("", "INDUCTOR_EXT_NVCC", "path of nvcc (default: CUDA_HOME, then PATH, then /usr/local/cuda)")
    arch: str = _option("", "INDUCTOR_EXT_ARCH", "target such as sm_90a (default: the current GPU's)")
    build_jobs: int = _option(0, "INDUCTOR_EXT_BUILD_JOBS", "parallel nvcc processes (0: by cores and free memory)")
    build_timeout_s: int = _option(1800, "INDUCTOR_EXT_BUILD_TIMEOUT", "seconds before one nvcc process is stopped")
    pdl: bool = _option(
        True, "INDUCTOR_EXT_PDL", "programmatic dependent launch of our kernels; the variable only, read at the first launch"
    )
    tensor_launches: int = _option(
        0,
        "INDUCTOR_EXT_TENSOR_LAUNCHES",
        "1 or 2: launches of a quantisation with one scale for a tensor, wherever possible (0: by size); the variable only",
    )
    progress: bool = _option(True, "INDUCTOR_EXT_PROGRESS", "show a progress line on a terminal while kernels build")

    def replace(self, **changes: Any) -> Settings:
        """A copy with some fields changed; unknown names and bad values raise ``SettingError``."""
        fields = {f.name: f for f in dataclasses.fields(self)}
        for name, value in changes.items():
            if name not in fields:
                raise SettingError(f"unknown option {name!r}; options are {', '.join(sorted(fields))}")
            choices = fields[name].metadata["choices"]
            if choices and value not in choices:
                raise SettingError(f"option {name}: wanted one of {', '.join(choices)}, found {value!r}")
            if name == "rules":
                _check_rules(value)
        return dataclasses.replace(self, **changes)

    def cache_path(self) -> Path:
        """Directory of kernel binaries. Not created here."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else Path(platformdirs.user_cache_dir("inductor_ext"))


def _check_rules(rules: Any) -> None:
    if not isinstance(rules, Mapping):
        raise SettingError(f"rules: wanted a mapping of rule name to mode, found {type(rules).__name__}")
    for rule, mode in rules.items():
        if mode not in get_args(RuleMode):
            raise SettingError(f"rules[{rule!r}]: wanted one of {', '.join(get_args(RuleMode))}, found {mode!r}")


def _parse(field: dataclasses.Field[Any], text: str) -> Any:
    env = field.metadata["env"]
    if field.name == "rules":
        pairs = [item.partition("=") for item in text.split(",") if item.strip()]
        return {name.strip(): mode.strip() or "auto" for name, _, mode in pairs}
    if field.type == "bool":
        if text.lower() in ("1", "true", "on", "yes"):
            return True
        if text.lower() in ("0", "false", "off", "no", ""):
            return False
        raise SettingError(f"{env}: wanted 0 or 1, found {text!r}")
    if field.type == "int":
        try:
            return int(text)
        except ValueError:
            raise SettingError(f"{env}: wanted a whole number, found {text!r}") from None
    return text


def current(**overrides: Any) -> Settings:
    """Settings of the environment as it is now, with ``overrides`` on top."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        env = field.metadata["env"]
        if env and env in os.environ:
            values[field.name] = _parse(field, os.environ[env])
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
