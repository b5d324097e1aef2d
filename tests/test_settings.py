"""Settings: the environment, overrides, errors that say what was wanted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from inductor_ext import settings
from inductor_ext.errors import InductorExtError, SettingError
from inductor_ext.settings import Settings


def test_defaults_need_no_environment() -> None:
    assert settings.current() == Settings()
    assert Settings().rules == {} and Settings().build == "compile" and Settings().strict is False


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("INDUCTOR_EXT_RULES", "one=off, other = always", "rules", {"one": "off", "other": "always"}),
        ("INDUCTOR_EXT_RULES", "fp8_downcast", "rules", {"fp8_downcast": "auto"}),
        ("INDUCTOR_EXT_RULES", "", "rules", {}),
        ("INDUCTOR_EXT_STRICT", "1", "strict", True),
        ("INDUCTOR_EXT_STRICT", "No", "strict", False),
        ("INDUCTOR_EXT_CHECKS", "true", "checks", True),
        ("INDUCTOR_EXT_CHECKS", "", "checks", False),
        ("INDUCTOR_EXT_BUILD", "never", "build", "never"),
        ("INDUCTOR_EXT_BUILD_JOBS", "3", "build_jobs", 3),
        ("INDUCTOR_EXT_BUILD_TIMEOUT", "60", "build_timeout_s", 60),
        ("INDUCTOR_EXT_PROGRESS", "off", "progress", False),
        ("INDUCTOR_EXT_ARCH", "sm_100a", "arch", "sm_100a"),
        ("INDUCTOR_EXT_CACHE_DIR", "/somewhere", "cache_dir", "/somewhere"),
    ],
)  # fmt: skip
def test_environment(monkeypatch: pytest.MonkeyPatch, variable: str, text: str, field: str, value: Any) -> None:
    monkeypatch.setenv(variable, text)
    assert getattr(settings.current(), field) == value


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("INDUCTOR_EXT_STRICT", "maybe", "INDUCTOR_EXT_STRICT: wanted 0 or 1, found 'maybe'"),
        ("INDUCTOR_EXT_BUILD_JOBS", "many", "INDUCTOR_EXT_BUILD_JOBS: wanted a whole number, found 'many'"),
        ("INDUCTOR_EXT_BUILD", "soon", "INDUCTOR_EXT_BUILD: wanted one of compile, defer, never, require, found 'soon'"),
        ("INDUCTOR_EXT_RULES", "a=b", r"INDUCTOR_EXT_RULES\['a'\]: wanted one of auto, always, off, found 'b'"),
    ],
)
def test_bad_environment(monkeypatch: pytest.MonkeyPatch, variable: str, text: str, message: str) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(SettingError, match=message):
        settings.current()


def test_overrides_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_BUILD", "never")
    assert settings.current(build="defer").build == "defer"


def test_errors_are_of_this_package_and_of_python() -> None:
    with pytest.raises(ValueError) as caught:
        Settings().replace(nothing=1)
    assert isinstance(caught.value, InductorExtError) and "unknown option 'nothing'" in str(caught.value)


def test_settings_are_frozen_and_replace_copies() -> None:
    before = Settings()
    after = before.replace(rules={"fp8_downcast": "off"})
    assert before.rules == {} and after.rules == {"fp8_downcast": "off"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.strict = True  # type: ignore[misc]


def test_the_cache_path_is_not_created(tmp_path: Path) -> None:
    path = Settings().replace(cache_dir=str(tmp_path / "cache")).cache_path()
    assert path == tmp_path / "cache" and not path.exists()
    assert Settings().cache_path().name == "inductor_ext"


def test_every_option_is_documented_once() -> None:
    rows = settings.table()
    assert [row[0] for row in rows] == [field.name for field in dataclasses.fields(Settings)]
    variables = [row[1] for row in rows]
    assert len(set(variables)) == len(variables) and all(name.startswith("INDUCTOR_EXT_") for name in variables)
    assert all(row[3] for row in rows)


@pytest.mark.parametrize(("text", "wanted"), [("1", True), ("on", True), ("0", False), ("", False), (None, False)])
def test_checks_are_read_at_the_call(monkeypatch: pytest.MonkeyPatch, text: str | None, wanted: bool) -> None:
    if text is not None:
        monkeypatch.setenv("INDUCTOR_EXT_CHECKS", text)
    assert settings.checks_enabled() is wanted
