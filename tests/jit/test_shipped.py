"""Kernels as a wheel: made, installed by pip into a folder, and loaded from there without a compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest

from inductor_ext.errors import KernelUnavailable
from inductor_ext.jit import KernelCache, diagnose, forget, headers, load, pack, prebuild, shipped

LOADED = """
import sys
sys.path.insert(0, {site!r})
try:
    print(load(spec, settings)["run"]())
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def site(lab, monkeypatch):
    """A folder into which pip has installed the lab's kernel; the process looks there, and has nothing else of it."""
    prebuild([lab.spec(), lab.spec(arch="sm_100a")], lab.path / "made", lab.settings)
    wheel = pack(lab.path / "made", "sm_90a", lab.path / "dist")
    site = lab.path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    forget()
    return site


def _elsewhere(lab):
    """Settings of a machine with an empty cache and no compiler."""
    return lab.without_compiler.replace(cache_dir=str(lab.path / "empty"))


def test_the_wheel_is_named_after_its_target_and_holds_that_alone(lab, site):
    (wheel,) = (lab.path / "dist").iterdir()
    assert wheel.name.startswith(f"inductor_ext_kernels_sm_90a-{headers.package_version(headers.PACKAGE)}-py3-none-linux_")
    assert {entry.arch for entry in KernelCache(site / "inductor_ext_kernels/sm_90a", prebuilt=True).entries()} == {"sm_90a"}
    (info,) = site.glob("inductor_ext_kernels_sm_90a-*.dist-info")
    assert f"Requires-Dist: inductor-ext=={headers.package_version(headers.PACKAGE)}" in (info / "METADATA").read_text()


def test_the_same_kernels_make_the_same_wheel(lab, site):
    again = pack(lab.path / "made", "sm_90a", lab.path / "again")
    assert again.read_bytes() == (lab.path / "dist" / again.name).read_bytes()


def test_a_process_without_a_compiler_and_without_torch_loads_from_it(lab, site):
    code = LOADED.format(site=str(site)) + "assert sys.modules['torch'] is None"
    before = lab.compiles()
    head = "settings = settings.replace(cache_dir='empty', nvcc='no-such-nvcc')\n"
    assert lab.output(head + code, env={"PATH": ""}) == "41"
    assert lab.compiles() == before


def test_another_target_is_not_looked_for_in_it(lab, site):
    with pytest.raises(Exception, match="not built yet and cannot be"):
        load(lab.spec(arch="sm_100a"), _elsewhere(lab))


def test_a_changed_source_is_not_met_by_it(lab, site):
    (lab.kernels / "include/value.h").write_text("#define VALUE 1\n")
    with pytest.raises(KernelUnavailable, match=r"value\.h changed since it was built"):
        load(lab.spec(), _elsewhere(lab))


def test_the_wheel_of_another_version_is_not_used_and_said(lab, site, caplog, monkeypatch):
    monkeypatch.setattr(headers, "package_version", lambda name: "9.9.9" if name == headers.PACKAGE else "1")
    with pytest.raises(Exception, match="not built yet"):
        load(lab.spec(), _elsewhere(lab))
    assert "inductor-ext-kernels-sm-90a" in caplog.text and "(here is 9.9.9)" in caplog.text


def test_a_wheel_that_others_can_write_is_refused_with_one_warning(lab, site, caplog):
    (site / "inductor_ext_kernels/sm_90a").chmod(0o775)
    for _ in range(2):
        with pytest.raises(KernelUnavailable, match="can be written by its group or by others"):
            load(lab.spec(), _elsewhere(lab))
    assert caplog.text.count("inductor-ext-kernels-sm-90a") == 1 and "chmod -R go-w" in caplog.text


def test_what_the_manifest_does_not_list_is_not_looked_at(lab, site):
    manifest = site / "inductor_ext_kernels/sm_90a/manifest.json"
    manifest.write_text('{"format": 1, "entries": {}}')
    with pytest.raises(KernelUnavailable, match=r"is not what manifest\.json lists"):
        load(lab.spec(), _elsewhere(lab))


def test_doctor_counts_its_kernels(lab, site):
    check = {check.name: check for check in diagnose(lab.settings)}["kernel wheels"]
    assert check.ok and "1 kernels" in check.found and str(site) in check.found


def test_no_wheel_is_installed(lab):
    assert shipped.installed("sm_90a") is None and shipped.every() == []
