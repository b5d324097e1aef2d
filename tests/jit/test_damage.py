"""Files of any shape in the place of ours: a miss that is healed where it is ours to heal, never an exception, never a wait."""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inductor_ext.jit import KernelCache, find_toolchain, forget, load, prepare, try_load
from inductor_ext.jit.record import Record

SHAPES = ("fifo", "link to itself", "link to a file", "folder", "full folder", "socket")
SHAPES += ("empty", "binary", "deep", "huge", "closed")


def _put(path, shape: str) -> None:
    """Something of the shape at a path, in the place of what is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if shape == "fifo":
        os.mkfifo(path, 0o700)
    elif shape == "link to itself":
        path.symlink_to(path.name)
    elif shape == "link to a file":
        path.symlink_to("/etc/passwd")
    elif shape == "folder":
        path.mkdir(mode=0o700)
    elif shape == "full folder":
        (path / "kernel.so").mkdir(parents=True, mode=0o700)
    elif shape == "socket":
        here = os.open(path.parent, os.O_RDONLY)  # the address of a socket has room for 108 bytes
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)
    elif shape == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        path.write_bytes({"empty": b"", "binary": bytes(range(256)), "deep": b"[" * 1_000_000, "closed": b"{}"}[shape])
        path.chmod(0o000 if shape == "closed" else 0o600)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", ["{entry}/entry.json", "{entry}/kernel.so", "{entry}", "{slot}"])
def test_an_entry_of_any_shape_is_built_again(lab, where, shape):
    load(lab.spec(), lab.settings)
    forget()
    (entry,) = KernelCache(lab.cache).entries()
    _put(lab.path / where.format(entry=entry.path, slot=entry.path.parent), shape)
    assert try_load(lab.spec(), lab.settings) is None
    assert KernelCache(lab.cache).entries() == [] or where.endswith("kernel.so")
    assert load(lab.spec(), lab.settings)["run"]() == 41
    forget()
    assert try_load(lab.spec(), lab.settings)["run"]() == 41 and lab.compiles() == 2
    (entry,) = KernelCache(lab.cache).entries()
    assert entry.damage() is None
    assert list((lab.cache / "tmp").iterdir()) == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", ["toolchain.json", "failed/{slot}.json", "locks/{slot}.lock", "logs/{slot}.log"])
def test_what_lies_beside_the_entries_can_have_any_shape(lab, where, shape):
    cache = KernelCache(lab.cache)
    cache.make_writable()
    _put(lab.cache / where.format(slot=cache.slot(lab.spec())), shape)
    find_toolchain(lab.settings)
    assert load(lab.spec(), lab.settings)["run"]() == 41
    bad = lab.spec(name="bad", exports=(("run", "t::nothing"),))
    _put(lab.cache / where.format(slot=cache.slot(bad)), shape)
    assert "nothing" in str(prepare([bad], lab.settings)[bad])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", ["", "kernels", "locks", "tmp", "INDUCTOR_EXT"])
def test_a_root_of_any_shape_costs_at_most_a_private_build(lab, where, shape):
    load(lab.spec(), lab.settings)
    forget()
    _put(lab.cache / where, shape)
    assert load(lab.spec(), lab.settings)["run"]() == 41


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400) | st.just("\ud800\0"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)

RECORD = {
    "format": 1,
    "spec": {"name": "a", "source": "a.cuh", "exports": [["run", "f"]], "arch": "sm_90a", "flags": ["-DX"]},
    "made": {"nvcc": "13", "host compiler": "12", "packages": {"apache-tvm-ffi": "0.1"}},
    "headers": {"kernels:a.cuh": "00"},
    "seconds": 1.5,
    "binary": {"sha256": "0" * 64, "size": 100},
    "created": 1.0,
}


def _places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


@st.composite
def records(draw):
    """A record with one value, at any depth, exchanged or left out."""
    changed = copy.deepcopy(RECORD)
    place = draw(st.sampled_from(list(_places(RECORD))))
    if not place:
        return draw(JSON)
    where = changed
    for key in place[:-1]:
        where = where[key]
    if draw(st.booleans()):
        where[place[-1]] = draw(JSON)
    else:
        del where[place[-1]]
    return changed


def test_a_record_comes_back_as_it_was_written():
    record = Record.parse(json.dumps(RECORD).encode())
    assert Record.parse(record.text().encode()) == record and json.loads(record.text()) == RECORD


@settings(max_examples=400, deadline=None)
@given(records())
def test_a_record_of_any_shape_is_read_or_refused(value):
    try:
        record = Record.parse(json.dumps(value).encode())
    except ValueError:
        return
    assert isinstance(record.spec.describe(), str) and isinstance(record.text(), str)  # what is done with one that was read


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_record_are_refused(data):
    with pytest.raises(ValueError):
        Record.parse(data)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=records())
def test_an_entry_with_any_record_is_a_miss_or_a_hit(lab, value):
    cache = KernelCache(lab.cache)
    if not cache.entries():
        load(lab.spec(), lab.settings)
    (path,) = (lab.cache / "kernels").glob("*/*/entry.json")
    kept = path.read_bytes()
    try:
        path.write_text(json.dumps(value))
        forget()
        assert try_load(lab.spec(), lab.settings) is None
    finally:
        path.write_bytes(kept)
    forget()
    assert try_load(lab.spec(), lab.settings)["run"]() == 41


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON, name=st.sampled_from(["toolchain.json", "failed"]))
def test_a_memo_or_a_note_of_any_shape_is_not_believed(lab, value, name):
    cache = KernelCache(lab.cache)
    cache.make_writable()
    path = lab.cache / name if name != "failed" else lab.cache / "failed" / f"{cache.slot(lab.spec())}.json"
    path.write_text(json.dumps(value))
    from inductor_ext.jit.compilers import VersionMemo

    VersionMemo._process.clear()
    assert "V99.1.1" in find_toolchain(lab.settings).nvcc_version
    assert cache.failure_since(lab.spec(), 0.0, "") is None


HEADERS = ("/dev/zero", "{lab}/fifo", "{lab}", "a\0b", "\ud800", "kernels:../../../dev/zero", "kernels:\0")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HEADERS)
def test_a_record_that_names_any_file_as_a_header_is_a_miss(lab, name):
    load(lab.spec(), lab.settings)
    forget()
    os.mkfifo(lab.path / "fifo")
    (path,) = (lab.cache / "kernels").glob("*/*/entry.json")
    record = json.loads(path.read_text())
    record["headers"][name.format(lab=lab.path)] = "0" * 64
    path.write_text(json.dumps(record))
    from inductor_ext.jit import cache

    path.parent.rename(path.parent.with_name(cache._key_of(Record.parse(path.read_bytes()))))
    assert try_load(lab.spec(), lab.settings) is None
    assert load(lab.spec(), lab.settings)["run"]() == 41
