"""``python -m benchmarks.trust`` without a GPU: no kernel is left out, and each check finds a fault that is put in."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from benchmarks.trust import __main__ as trust
from benchmarks.trust import calls, huge, replay, running, sanitize, threads
from benchmarks.trust.calls import CALLS
from benchmarks.trust.operands import E4, U8, Call, Maker
from inductor_ext import jit, registry
from inductor_ext.bench import summary
from inductor_ext.kernels.downcast_fp8.op import PROGRAM_F32 as STATIC
from tests.support.fakegpu import fake_cuda_inputs

ARCH = "sm_90a"
WITH_KERNELS = [name for name in registry.OP_MODULES if name != "mxfp8_round"]


def named(name: str) -> Call:
    return next(call for call in CALLS if call.name == name)


def few(*ops: str) -> list[Call]:
    """The small calls of some ops."""
    return [call for call in CALLS if call.op in ops and not re.search(r"\d{4}|chip|outside", call.what)]


class Lines(list[tuple[str, str, "str | None"]]):
    """What a part emitted."""

    def __call__(self, op: str, call: str, said: str | None, seconds: float) -> None:
        self.append((op, call, said))

    @property
    def wrong(self) -> list[str]:
        return [f"{op}: {call}: {said}" for op, call, said in self if said]


# ---- nothing is left out ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def specs() -> dict[jit.JitSpec, list[str]]:
    """The kernels of every call, and the calls of every kernel."""
    registry.ops()
    found: dict[jit.JitSpec, list[str]] = {}
    with fake_cuda_inputs(), FakeTensorMode():
        for call in CALLS:
            args = call.make(Maker("cuda"))
            calls.op_named(call.op).fake(*args)
            wanted = calls.specs(call, "cuda", ARCH)
            assert wanted, f"{call.name}: no kernel"
            for spec in wanted:
                found.setdefault(spec, []).append(call.name)
    return found


def test_every_op_with_a_kernel_is_called_replayed_and_named_once() -> None:
    with_kernels = [op.name for op in registry.ops() if op.kernel is not None]
    assert with_kernels == WITH_KERNELS
    assert {call.op for call in CALLS} == set(with_kernels)
    assert len({call.name for call in CALLS}) == len(CALLS)
    assert {named(name).op for name in replay.REPLAYED} == set(with_kernels)


def test_ops_without_a_huge_case_are_those_made_of_others() -> None:
    """Their kernel is another op's with another end, through the same descriptors, or another row of the same template."""
    made = {"scaled_mm_act_mul", "scaled_mm_rope", "norm_quantize", "act_quantize"}
    assert {call.op for call in CALLS} - {case.op for case in huge.CASES} == made


def entry(spec: jit.JitSpec) -> set[tuple[str, ...]]:
    """What tells a kernel's template from another: its file, its class, its end or granularity, its function."""
    known = r"(?:Gate|AddResidual|NormRope|NoNorm|CastThenWeight|WeightThenCast|OnePlusWeightThenCast|Scales<\d)"
    return {
        (spec.source, expression.partition("<")[0], *sorted(set(re.findall(known, expression))), expression.rpartition("::")[2])
        for _, expression in spec.exports
    }


def test_every_template_of_the_examples_is_called(specs: dict[jit.JitSpec, list[str]]) -> None:
    reached = set().union(*(entry(spec) for spec in specs))
    for op in registry.ops():
        for spec in op.examples(ARCH):
            assert entry(spec) <= reached, f"no call takes {spec.describe()}"


def test_the_tiles_that_a_grouped_product_may_take_are_called(specs: dict[jit.JitSpec, list[str]]) -> None:
    from inductor_ext.kernels.mxfp8_grouped_mm import hopper

    reached = {expression for spec in specs for _, expression in spec.exports}
    for kind in ("bf16", "fp8", "fp8_128"):
        for _, tile in hopper.TILES[kind]:
            assert f"{hopper.made((tile, kind, torch.bfloat16))}::run" in reached, (kind, tile)


def test_the_list_to_build_holds_every_kernel_once(specs: dict[jit.JitSpec, list[str]]) -> None:
    with fake_cuda_inputs():
        wanted = trust.kernels("cuda", ARCH)
    assert len(wanted) == len(set(wanted)) and set(wanted) >= set(specs)
    assert {spec.arch for spec in wanted} == {ARCH}
    assert all((jit.kernels_root() / spec.source).is_file() for spec in wanted)


def test_huge_tensors_are_past_2_31_elements() -> None:
    with fake_cuda_inputs(), FakeTensorMode():
        for case in huge.CASES:
            op, args = calls.op_named(case.op), case.make("cuda")
            made = op.fake(*args) if op.out_names else ()
            tensors = running.tensors_of((*args, made))
            reach = max(sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) for x in tensors if x.numel())
            assert reach >= huge.HALF, f"{case.op}: {case.what}: {reach}"


# ---- calls -----------------------------------------------------------------------------------------------------------


def test_calls_are_right_where_an_op_is_its_reference() -> None:
    found = Lines()
    running.run_calls(few("fp8_downcast", "downcast_fp8", "mxfp8_quantize", "moe_combine", "scaled_mm_rope"), "cpu", found)
    for name in WITH_KERNELS:  # whatever defaults their arguments have
        running.run_calls(few(name)[:2], "cpu", found)
    assert len(found) > 60 and not found.wrong
    assert {op for op, _, _ in found} == set(WITH_KERNELS)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("fp8_downcast: tails", lambda args, outs: outs[0][-1, -1:].view(U8).fill_(0xFF), "out: 1 of 91 bytes differ"),
        ("rms_norm_quantize: mx", lambda args, outs: outs[2][3, 5:6].fill_(torch.nan), "out2: nan of the norm"),
        ("downcast_fp8: slices of qkv into one buffer", lambda args, outs: args[2][7, 0, :1].view(U8).add_(1), "k_cache: 1 of"),
        ("scaled_mm: stream:16x64/8, one row", lambda args, outs: outs[0][0, 3:4].mul_(1.5), "out:"),
    ],
)
def test_a_wrong_element_is_found(monkeypatch: pytest.MonkeyPatch, name: str, change: Any, said: str) -> None:
    launch = running.launch

    def wrong(op: Any, args: Any, outs: Any) -> None:
        launch(op, args, outs)
        change(args, outs)

    monkeypatch.setattr(running, "launch", wrong)
    assert said in (running.checked(named(name), "cpu") or "")


def test_a_byte_beside_a_slice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(m: Maker) -> Any:
        k, cache = m.randn(9, 2, 8), m.cache(40, 2, 8)
        return k, None, cache[8:32], None, m.rand(), None, m.slots(9, 24), STATIC, "", E4, 1, 0, False

    launch = running.launch

    def wrong(op: Any, args: Any, outs: Any) -> None:
        launch(op, args, outs)
        running.bytes_of(args[2])[5] += 1

    call = Call("downcast_fp8", "in the middle", make)
    assert running.checked(call, "cpu") == ""
    monkeypatch.setattr(running, "launch", wrong)
    assert running.checked(call, "cpu") == "bytes around the results differ"


def test_what_is_not_written_is_not_equal() -> None:
    poisoned, wanted = torch.full((4,), torch.nan), torch.ones(4)
    for limit in (0.0, 0.5):
        assert running.difference(poisoned, wanted, limit)
        assert running.difference(poisoned, poisoned.clone(), limit) == ""
    assert "against" in running.difference(wanted, wanted[:3], 0.0)


def test_copies_share_memory_as_the_arguments_do() -> None:
    qkv = torch.arange(60.0).view(5, 12)
    k, (q, v), scale = running.copied((qkv[:, 4:8], [qkv[:, :4], qkv.t()], 3))
    assert (scale, k.stride(), v.stride()) == (3, (12, 1), (1, 12))
    assert k.untyped_storage().data_ptr() == q.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()
    assert torch.equal(k, qkv[:, 4:8]) and torch.equal(v, qkv.t())


# ---- replays, threads, huge tensors ----------------------------------------------------------------------------------

REPLAYED = ("downcast_fp8: slices of qkv into one buffer", "rms_norm_quantize: static, 3 scales", "mxfp8_quantize: groups")


def test_replays_are_compared_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Lines()
    replay.run_calls([named(name) for name in REPLAYED], "cpu", 20, found)
    assert len(found) == len(REPLAYED) and not found.wrong
    launch, count = running.launch, 0

    def wrong(op: Any, args: Any, outs: Any) -> None:
        nonlocal count
        launch(op, args, outs)
        count += 1
        if count == replay.POOL + 7:  # the expectations are made first
            running.results(op, args, outs)[0][-1] ^= 1

    monkeypatch.setattr(running, "launch", wrong)
    assert _replayed(REPLAYED[0], 20) == "1 of 20 replays differ"


def test_ops_one_after_the_other_are_replayed() -> None:
    assert replay.replayed(replay._layer, lambda args: [], replay._run_layer, "cpu", 5) == ""


def test_a_call_that_writes_nothing_is_not_called_right() -> None:
    found = Lines()
    replay.run_calls([named("scaled_mm: tile:128x128p, no row")], "cpu", 3, found)
    assert [said for _, _, said in found] == [None]


def test_a_replay_of_the_wrong_operands_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "captured", lambda step, device: lambda: None)  # nothing runs, and so nothing differs
    assert _replayed(REPLAYED[1], 5).startswith("0 of 5 replays were compared")


def _replayed(name: str, times: int) -> str:
    found = Lines()
    replay.run_calls([named(name)], "cpu", times, found)
    return found[0][2] or ""


def test_threads_find_the_one_that_is_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    some = few("mxfp8_quantize", "fp8_downcast")
    found = Lines()
    threads.run(some, "cpu", 40, found)
    assert [op for op, _, _ in found] == ["fp8_downcast", "mxfp8_quantize"] and not found.wrong
    many = threads.Worker.many

    def disturbed(worker: Any, count: int) -> None:
        i = next(i for i, call in enumerate(worker.calls) if call.name == "mxfp8_quantize: plain")
        worker.args[i][0].add_(1)
        many(worker, count)

    monkeypatch.setattr(threads.Worker, "many", disturbed)
    found = Lines()
    threads.run(some, "cpu", 200, found)
    assert len(found.wrong) == 1 and "mxfp8_quantize" in found.wrong[0] and "plain: other bytes" in found.wrong[0]


def test_a_thread_that_fails_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(op: Any, args: Any, outs: Any) -> None:
        raise RuntimeError("no launch")

    monkeypatch.setattr(running, "launch", fails)
    found = Lines()
    threads.run(few("fp8_downcast"), "cpu", 3, found)
    assert "no launch" in found.wrong[0]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of thousands of elements, their edges where they are in the huge ones."""
    sizes = {"HALF": 1 << 19, "ROWS": 2059, "COLUMNS": 256, "SLOTS": 611, "LENGTH": 4, "SEQUENCES": 9, "HEADS": 16}
    sizes |= {"LONG": 70, "WIDE": 48}
    for name, size in sizes.items():
        monkeypatch.setattr(huge, name, size)


SMALL = [case for case in huge.CASES if case.op != "scaled_mm"]  # whose sizes are fixed


def test_huge_checks_at_small_sizes(small: None) -> None:
    found = Lines()
    huge.run(SMALL, "cpu", found)
    product = huge.Case("scaled_mm", "small", huge._product("tile:128x128p", 70, 48, 32), huge._product_check)
    huge.run([product], "cpu", found)
    assert len(found) == len(SMALL) + 1 and not found.wrong


def test_huge_checks_find_a_last_row_that_is_wrong(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = running.launch

    def wrong(op: Any, args: Any, outs: Any) -> None:
        launch(op, args, outs)
        last = outs[0] if outs else args[2]
        last.view(-1).view(U8)[-1] ^= 0x48

    monkeypatch.setattr(running, "launch", wrong)
    ops = ("fp8_downcast", "fp8_quantize", "mxfp8_quantize", "downcast_fp8", "rms_norm_quantize")
    cases = [case for case in SMALL if case.op in ops]
    found = Lines()
    huge.run(cases, "cpu", found)
    assert len(found.wrong) == len(cases), found


# ---- sanitizers ------------------------------------------------------------------------------------------------------

LOG = """
========= COMPUTE-SANITIZER
@@ fp8_downcast: tails
@@ scaled_mm: stream:16x64/8, one row
========= Invalid __global__ read of size 16 bytes
=========     at void inductor_ext::scaled_mm_stream_kernel<...>+0x10
=========     by thread (0,0,0) in block (0,0,0)
========= Invalid __global__ read of size 16 bytes
@@ end
========= ERROR SUMMARY: 2 errors
"""


def test_what_a_sanitizer_says_belongs_to_the_call_before_it() -> None:
    found, outside, summary = sanitize.heard(LOG.splitlines())
    assert [(each.call.name, each.said[:9]) for each in found] == [
        ("fp8_downcast: tails", ""),
        ("scaled_mm: stream:16x64/8, one row", "2 reports"),
    ]
    assert "scaled_mm_stream_kernel" in found[1].said
    assert (outside, summary) == ([], "ERROR SUMMARY: 2 errors")


def test_what_a_sanitizer_says_outside_of_calls_is_not_lost() -> None:
    text = LOG.replace("@@ end\n", "@@ end\n========= Internal Sanitizer Error\n")
    assert sanitize.heard(text.splitlines())[1] == ["Internal Sanitizer Error"]


@pytest.mark.parametrize("name", ["--kernel-name", "--kernel-regex"])
def test_options_are_those_that_the_sanitizer_has(name: str) -> None:
    found = sanitize.command("memcheck", f"--leak-check {name} --padding", ["python"])
    assert found[-3:] == [name, "kns=inductor_ext", "python"]
    assert "--padding" in found and "--print-limit" not in found
    assert "--padding" not in sanitize.command("racecheck", f"{name} --padding", ["python"])


def test_every_kernel_is_in_the_namespace_that_is_watched() -> None:
    for path in jit.kernels_root().rglob("*.cuh"):
        text = path.read_text()
        if "__global__ void" in text:
            assert text.index("namespace inductor_ext {") < text.index("__global__ void"), path


STOPPED = """#!/bin/sh
case "$*" in *--help*) echo "--kernel-name --padding"; exit;; esac
echo "========= COMPUTE-SANITIZER"
echo "@@ fp8_downcast: tails"
echo "@@ fp8_downcast: one row"
exec sleep 60
"""


def test_calls_that_a_slow_sanitizer_does_not_reach_are_not_called_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(STOPPED)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found, told = trust.part_in_a_process("racecheck", 2.0, tmp_path)
    said = {f"{row.op}: {row.call}": row.said for row in found}
    assert len(found) == len(CALLS)
    assert said.pop("fp8_downcast: tails") == "" and set(said.values()) == {None}
    assert "2 of" in told and "stopped after 2 s" in told


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_part_that_hangs_is_stopped(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as out:
        assert sanitize.stopped_after([sys.executable, "-c", "import time; time.sleep(60)"], 1.0, out, {}) is None
        assert sanitize.stopped_after([sys.executable, "-c", "raise SystemExit(3)"], 60.0, out, {}) == 3


def test_a_run_that_could_not_look_everywhere_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compute-sanitizer, and with a part that ends early."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    out = tmp_path / "trust.json"
    done = CliRunner().invoke(_app(), ["--only", "memcheck", "--only", "replay", "--jobs", "2", "--out", str(out)])
    assert done.exit_code == 1
    made = summary.read(out)
    assert "No such file" in made["parts"]["memcheck"] and "exit code 1" in made["parts"]["replay"]


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(trust.main)
    return app


def test_rows_of_a_part_that_was_stopped_are_kept(tmp_path: Path) -> None:
    rows = tmp_path / "replay.jsonl"
    emit = trust.writer("replay", rows)
    emit("scaled_mm", "one", "", 1.0)
    emit("scaled_mm", "two", "3 of 10 replays differ", 1.0)
    rows.write_text(rows.read_text() + '{"check": "replay", "op"')
    found = trust.read(rows)
    assert [row.said for row in found] == ["", "3 of 10 replays differ"]
    line = next(line for line in trust.table(found, ["replay"]) if line["op"] == "scaled_mm")
    assert line["replay"] == "1 FAILED of 2, 2 s"


def test_a_result_names_what_failed_and_what_was_not_looked_at(tmp_path: Path) -> None:
    out = tmp_path / "trust.json"
    rows = [
        trust.Row("memcheck", "scaled_mm", "one", "", 1.0),
        trust.Row("memcheck", "scaled_mm", "two", "1 reports, the first: Invalid", 1.0),
        trust.Row("memcheck", "moe_combine", "three", None, 0.0),
    ]
    trust._write(out, rows, {"memcheck": "$ compute-sanitizer\nERROR SUMMARY: 1 error"}, ["replay", "memcheck"])
    made = summary.read(out)
    assert made["right"] == {"memcheck": 1} and [row["call"] for row in made["others"]] == ["two", "three"]
    text = (tmp_path / "trust_sanitizer.txt").read_text()
    assert text.startswith("$ compute-sanitizer\nERROR SUMMARY: 1 error\n") and "scaled_mm: two: 1 reports" in text
    assert re.search(r"moe_combine +ok 0, 0 s, 1 not", text)
