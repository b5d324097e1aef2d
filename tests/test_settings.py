"""Settings: the environment, overrides, errors that say what was wanted."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

import inductor_ext
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


BAD_OPTIONS = [
    ("build_jobs", -1, "wanted a whole number from 0 to 1024, found -1"),
    ("build_jobs", 10**5000, "wanted a whole number from 0 to 1024, found a int"),
    ("build_jobs", True, "wanted a whole number from 0 to 1024, found True"),
    ("build_jobs", 2.0, "wanted a whole number from 0 to 1024, found 2.0"),
    ("build_jobs", "3", "wanted a whole number from 0 to 1024, found '3'"),
    ("build_timeout_s", 0, "wanted a whole number from 1 to 86400, found 0"),
    ("build_timeout_s", -5, "wanted a whole number from 1 to 86400, found -5"),
    ("build_timeout_s", float("inf"), "wanted a whole number from 1 to 86400, found inf"),
    ("tensor_launches", 3, "wanted a whole number from 0 to 2, found 3"),
    ("strict", "yes", "wanted True or False, found 'yes'"),
    ("strict", 1, "wanted True or False, found 1"),
    ("progress", None, "wanted True or False, found None"),
    ("checks", [], "wanted True or False, found []"),
    ("arch", "sm_xyz", "wanted something like sm_90a, found 'sm_xyz'"),
    ("arch", "sm_\u0669\u0660", "wanted something like sm_90a"),
    ("arch", "90a", "wanted something like sm_90a, found '90a'"),
    ("arch", 90, "wanted text, found 90"),
    ("build", ["never"], "wanted one of compile, defer, never, require, found ['never']"),
    ("build", "", "wanted one of compile, defer, never, require, found ''"),
    ("cache_dir", 3, "wanted a path, found 3"),
    ("cache_dir", b"/x", "wanted a path, found b'/x'"),
    ("prebuilt_dir", "a\0b", "wanted a path, found 'a\\x00b'"),
    ("cache_dir", "~nobody-of-this-name/x", "wanted a path that can be made absolute"),
    ("nvcc", None, "wanted a path, found None"),
    ("rules", {"": "off"}, "wanted the name of a rule, found ''"),
    ("rules", {3: "off"}, "wanted the name of a rule, found 3"),
    ("rules", {"a": []}, "wanted one of auto, always, off, found []"),
    ("rules", "a=off", "wanted a mapping of rule name to mode, found str"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_OPTIONS, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BAD_OPTIONS)])
def test_every_bad_option_says_its_name_what_was_wanted_and_what_was_found(name: str, value: Any, message: str) -> None:
    for make in (Settings().replace, settings.current, inductor_ext.backend, Settings):
        with pytest.raises(SettingError) as caught:
            make(**{name: value})
        assert str(caught.value).startswith(f"option {name}") and message in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("INDUCTOR_EXT_BUILD_JOBS", "-1", "wanted a whole number from 0 to 1024, found -1"),
        ("INDUCTOR_EXT_BUILD_JOBS", "1_0", "wanted a whole number, found '1_0'"),
        ("INDUCTOR_EXT_BUILD_JOBS", "\u0663", "wanted a whole number, found '\u0663'"),
        ("INDUCTOR_EXT_BUILD_TIMEOUT", "0", "wanted a whole number from 1 to 86400, found 0"),
        ("INDUCTOR_EXT_BUILD_TIMEOUT", "9" * 18, "wanted a whole number from 1 to 86400"),
        ("INDUCTOR_EXT_BUILD_TIMEOUT", "9" * 5000, "wanted a whole number, found"),
        ("INDUCTOR_EXT_TENSOR_LAUNCHES", "3", "wanted a whole number from 0 to 2, found 3"),
        ("INDUCTOR_EXT_ARCH", "sm_xyz", "wanted something like sm_90a, found 'sm_xyz'"),
        ("INDUCTOR_EXT_RULES", "=off", "wanted the name of a rule, found ''"),
        ("INDUCTOR_EXT_CACHE_DIR", "~nobody-of-this-name/x", "wanted a path that can be made absolute"),
    ],
)
def test_every_bad_variable_says_its_name(monkeypatch: pytest.MonkeyPatch, variable: str, text: str, message: str) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(SettingError) as caught:
        settings.current()
    assert str(caught.value).startswith(variable) and message in str(caught.value)


def test_a_path_may_be_a_path() -> None:
    assert Settings(cache_dir=Path("/a/b")).cache_path() == Path("/a/b")  # type: ignore[arg-type]


def test_relative_paths_are_fixed_when_they_are_first_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "later").mkdir()
    monkeypatch.chdir(tmp_path)
    name = f"relative-{tmp_path.name}"
    monkeypatch.setenv("INDUCTOR_EXT_CACHE_DIR", name)
    monkeypatch.setenv("INDUCTOR_EXT_PREBUILT_DIR", f"./{name}")
    monkeypatch.setenv("INDUCTOR_EXT_NVCC", f"bin-{tmp_path.name}/nvcc")
    first = settings.current()
    monkeypatch.chdir(tmp_path / "later")
    assert settings.current() == first and first.cache_path() == tmp_path / name == first.prebuilt_path()
    assert first.nvcc == f"{tmp_path}/bin-{tmp_path.name}/nvcc"
    assert Settings(nvcc="nvcc-13").nvcc == "nvcc-13"  # looked up on PATH


@pytest.mark.parametrize("home", [None, "~"])
def test_without_a_home_the_cache_is_the_users_own_in_the_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    """platformdirs raises or answers ``~/.cache``, by its version, when there is neither HOME nor a line in passwd."""

    def nobody(*args: Any) -> str:
        if home is None:
            raise RuntimeError("could not determine the home directory")
        return f"{home}/.cache/inductor_ext"

    monkeypatch.setattr("platformdirs.user_cache_dir", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert Settings().cache_path() == tmp_path / f"inductor_ext-{os.geteuid()}"


def test_a_snapshot_keeps_the_rules_that_it_was_given() -> None:
    rules: dict[str, Any] = {"fp8_downcast": "off"}
    chosen = Settings().replace(rules=rules)
    rules["fp8_downcast"] = "nonsense"
    assert chosen.rules == {"fp8_downcast": "off"}


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
