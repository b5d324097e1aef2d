"""Kernels of one target as a wheel: ``inductor-ext-kernels-sm-90a``, made of a prebuilt directory, found where it is installed.

The wheel holds the directory as it is, under ``inductor_ext_kernels/sm_90a``; wheels of several targets lie side by side. What
is installed is looked at as any prebuilt directory is: its owner, its manifest and each record. Its version is that of the
inductor-ext that made it, which it requires.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import functools
import hashlib
import io
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

from inductor_ext.errors import SettingError
from inductor_ext.jit import headers
from inductor_ext.jit.cache import KernelCache
from inductor_ext.jit.ours import MANIFEST, MARKER

_PREFIX, _FOLDER = "inductor-ext-kernels-", "inductor_ext_kernels"
_DATE = (1980, 1, 1, 0, 0, 0)  # the same kernels make the same wheel
_METADATA = """Metadata-Version: 2.1
Name: {name}
Version: {version}
Summary: Kernels of inductor-ext for {arch}, built ahead: they are loaded without a compiler
License: Apache-2.0
Requires-Dist: inductor-ext=={version}
"""


@dataclasses.dataclass(frozen=True)
class Installed:
    """An installed wheel of kernels. ``unfit`` says why it is not used, "" where it is."""

    name: str
    version: str
    root: Path
    unfit: str

    def describe(self) -> str:
        return f"{self.name} {self.version} in {self.root}"


def name_of(arch: str) -> str:
    return _PREFIX + arch.replace("_", "-")


@functools.cache
def installed(arch: str) -> Installed | None:
    """The wheel of kernels for ``arch``, looked up once a process; None where there is none. Nothing is imported."""
    try:
        found = metadata.distribution(name_of(arch))
    except metadata.PackageNotFoundError:
        return None
    here = headers.package_version(headers.PACKAGE)
    unfit = f"is for inductor-ext {found.version} (here is {here})" if here and here != found.version else ""
    return Installed(name_of(arch), found.version, Path(str(found.locate_file(f"{_FOLDER}/{arch}"))), unfit)


def every() -> list[Installed]:
    """All of them, whatever their target."""
    names = {str(dist.metadata["Name"]).lower().replace("_", "-") for dist in metadata.distributions()}
    arches = [name.removeprefix(_PREFIX).replace("-", "_") for name in sorted(names) if name.startswith(_PREFIX)]
    return [found for arch in arches if (found := installed(arch))]


def pack(directory: Path, arch: str, out: Path) -> Path:
    """A wheel in ``out`` of a prebuilt ``directory`` that holds kernels of ``arch``. Raises ``OSError``, ``SettingError``.

    Its platform is this machine's as pip names it (``linux_x86_64``): an index of one's own takes it, a public one wants the
    oldest libc that it runs on (`auditwheel`).
    """
    name, version = name_of(arch), headers.package_version(headers.PACKAGE)
    if version is None:
        raise SettingError("a wheel of kernels requires the inductor-ext that made it, which is not installed: pip install it")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    stem, tag = f"{name.replace('-', '_')}-{version}", f"py3-none-{platform}"
    files = {f"{_FOLDER}/{arch}/{MARKER}": directory / MARKER, f"{_FOLDER}/{arch}/{MANIFEST}": directory / MANIFEST}
    paths = [path for entry in KernelCache(directory).entries() if entry.arch == arch for path in entry.path.iterdir()]
    for path in sorted(paths):
        files[f"{_FOLDER}/{arch}/{path.relative_to(directory).as_posix()}"] = path
    info = {
        "METADATA": _METADATA.format(name=name, version=version, arch=arch),
        "WHEEL": f"Wheel-Version: 1.0\nGenerator: inductor-ext\nRoot-Is-Purelib: false\nTag: {tag}\n",
        "top_level.txt": f"{_FOLDER}\n",
    }
    wheel, record = out / f"{stem}-{tag}.whl", io.StringIO()
    out.mkdir(parents=True, exist_ok=True)
    rows = csv.writer(record, lineterminator="\n")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:

        def add(to: str, data: bytes) -> None:
            entry = zipfile.ZipInfo(to, _DATE)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            archive.writestr(entry, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.writerow([to, f"sha256={digest}", len(data)])

        for to, path in files.items():
            add(to, path.read_bytes())
        for to, text in info.items():
            add(f"{stem}.dist-info/{to}", text.encode())
        rows.writerow([f"{stem}.dist-info/RECORD", "", ""])
        archive.writestr(zipfile.ZipInfo(f"{stem}.dist-info/RECORD", _DATE), record.getvalue())
    return wheel
