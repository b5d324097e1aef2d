"""The command line, each command as a person calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import inductor_ext
from inductor_ext import registry
from inductor_ext.cli import app
from inductor_ext.cli.doctor import summary
from inductor_ext.jit import Check, KernelCache

MODEL = """
import torch

def forward(x, s, by=1.0):
    y = torch.sin(x) * by
    return [(v.float() / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn) for v in (x, y)]

def case():
    return forward, (torch.randn(32, 64).bfloat16(), torch.tensor(0.5)), {"by": 2.0}

def nothing():
    return torch.sin, torch.randn(3)

def wrong():
    return 3
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "model_under_test.py"
    path.write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    return path


def invoke(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, result.output
    return result


def test_version_and_help() -> None:
    assert inductor_ext.__version__ in invoke("--version").stdout
    shown = invoke("--help").stdout
    commands = ("demo", "explain", "repro", "doctor", "ops", "rules", "build", "cache", "bench", "clangd")
    assert all(command in shown for command in commands)
    for command in commands:
        assert "Usage" in invoke(command, "--help").stdout


# ---- explain ---------------------------------------------------------------------------------------------------------


def test_explain(script: Path) -> None:
    shown = invoke("explain", f"{script.name}:case", "--diff").stdout
    assert "rewrote fp8_downcast ×1; 1 near miss" in shown
    assert "model_under_test.py:6" in shown
    assert "\n-clamp_min = " in shown and "inductor_ext.fp8_downcast.default(" in shown


def test_explain_module_rules_and_json(script: Path) -> None:
    result = invoke("explain", "model_under_test:case", "--rules", "fp8_downcast=always", "--json")
    assert json.loads(result.stdout)["counts"] == {"fp8_downcast": 2}


def test_explain_verify_and_html(script: Path, tmp_path: Path) -> None:
    result = invoke("explain", str(script) + ":case", "--verify", "--json", "--html", "report.html")
    found = json.loads(result.stdout)
    assert found["verify"]["ok"] and found["verify"]["checks"][0]["differing"] == 0
    assert "Each rewrite against what it replaced" in (tmp_path / "report.html").read_text()


def test_explain_says_what_to_try(script: Path) -> None:
    assert "What to try" in invoke("explain", f"{script.name}:nothing").stdout


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("model_under_test.py", "wanted path.py:function"),
        ("absent.py:case", "there is no file absent.py"),
        ("absent_module:case", "there is no module 'absent_module'"),
        ("model_under_test.py:other", "its functions are: case, forward, nothing, wrong"),
        ("model_under_test.py:wrong", "must return (model, args)"),
    ],
)
def test_explain_errors(script: Path, target: str, message: str) -> None:
    assert message in invoke("explain", target, code=1).stderr


def test_explain_unknown_rule_and_mode(script: Path) -> None:
    assert "no rule is called 'nope'" in invoke("explain", f"{script.name}:case", "--rules", "nope=off", code=1).stderr
    result = invoke("explain", f"{script.name}:case", "--rules", "fp8_downcast=maybe", code=1)
    assert "wanted one of auto, always, off" in result.stderr


def test_errors_of_the_backend_are_shown_plainly(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_RULES", "nope=always")
    assert "no rule is called 'nope'" in invoke("explain", f"{script.name}:case", code=1).stderr
    monkeypatch.setenv("INDUCTOR_EXT_RULES", "downcast_fp8")
    monkeypatch.setenv("INDUCTOR_EXT_STRICT", "1")
    assert "matched nothing" in invoke("explain", f"{script.name}:case", code=1).stderr


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_CACHE_DIR", str(tmp_path))
    found = json.loads(invoke("doctor", "--json").stdout)
    assert found["ok"] and {check["name"] for check in found["checks"]} >= {
        "backend",
        "nvcc",
        "torch",
        "cache directory",
    }


def test_doctor_reference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPU and nvcc is fine."""
    absent = [
        Check("nvcc", None, "none", "install it"),
        Check("host compiler", True, "g++"),
        Check("GPU", None, "none"),
    ]
    monkeypatch.setattr("inductor_ext.cli.doctor.jit.diagnose", lambda: absent)
    monkeypatch.setattr("inductor_ext.cli.doctor._has_gpu", lambda: False)
    shown = invoke("doctor").stdout
    assert "Reference mode" in shown and "only loads kernels: it has no nvcc" in shown and "install it" in shown


@pytest.mark.parametrize(
    ("present", "said"),
    [
        ((), "No prebuilt kernels, and this environment only loads kernels: it has no nvcc, no host compiler."),
        (("kernel wheels",), "Ready. This environment only loads kernels: it has no nvcc, no host compiler."),
        (("prebuilt directory", "host compiler"), "Ready. This environment only loads kernels: it has no nvcc."),
        (("nvcc", "host compiler"), "Ready. This environment builds kernels but those of products: it has no CUTLASS headers."),
        (("nvcc", "host compiler", "CUTLASS headers"), "Ready. This environment builds kernels."),
    ],
)
def test_doctor_says_whether_an_environment_builds_or_loads(
    monkeypatch: pytest.MonkeyPatch, present: tuple[str, ...], said: str
) -> None:
    names = ("nvcc", "host compiler", "CUTLASS headers", "prebuilt directory", "kernel wheels")
    checks = [Check(name, True if name in present else None, "") for name in names]
    monkeypatch.setattr("inductor_ext.cli.doctor._has_gpu", lambda: True)
    found = summary(checks)
    assert found.startswith(said)


def test_doctor_fails_when_something_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inductor_ext.cli.doctor.jit.diagnose", lambda: [Check("tvm-ffi", False, "gone", "pip install")])
    assert "Broken: tvm-ffi" in invoke("doctor", code=1).stdout


# ---- ops and rules ---------------------------------------------------------------------------------------------------


def test_ops() -> None:
    found = json.loads(invoke("ops", "--json").stdout)
    assert [op["name"] for op in found] == [op.name for op in registry.ops()]
    for op, listed in zip(registry.ops(), found):
        if op.kernel is None and op.library is None:  # PyTorch's operators
            assert listed["kernel"] is None and listed["min_capability"] is None
        elif op.library is None:
            assert listed["kernel"].endswith(".cuh") and listed["min_capability"]
        else:
            assert listed["kernel"].endswith(".cuh, other libraries'") and listed["min_capability"] == "9.0"
    assert "fp8_downcast/fp8_downcast.cuh" in invoke("ops").stdout


def test_ops_show() -> None:
    for op in registry.ops():
        found = json.loads(invoke("ops", "show", op.name, "--json").stdout)
        assert found["schema"] == op.schema and len(found["documentation"]) > 200, op.name
    shown = invoke("ops", "show", "act_quantize").stdout
    assert "C up to 32 768" in shown and "compute capability 8.9 or later" in shown and "act_quantize.cuh" in shown
    assert "no op is called 'nope'" in invoke("ops", "show", "nope", code=1).stderr


def test_rules() -> None:
    found = json.loads(invoke("rules", "--json").stdout)
    assert [rule["name"] for rule in found] == [rule.name for rule in registry.rules()]
    assert "bit-exact" in invoke("rules").stdout


def test_rules_show_every_example() -> None:
    shown = invoke("rules", "show", "quantize_once").stdout
    rule = registry.rule_named("quantize_once")
    assert shown.count("✓") == len(rule.matches) + len(rule.near_misses)
    assert rule.near_misses[0].reason in shown


def test_rules_show_one_example() -> None:
    outcomes = json.loads(invoke("rules", "show", "fp8_downcast", "--example", "e5m2", "--json").stdout)
    assert [outcome["rewrites"] for outcome in outcomes] == [1]
    assert "has no example 'nope'" in invoke("rules", "show", "fp8_downcast", "--example", "nope", code=2).output
    assert "no rule is called" in invoke("rules", "show", "nope", code=1).stderr


# ---- build and cache -------------------------------------------------------------------------------------------------


def test_build_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inductor_ext.cli.build.jit.current_arch", lambda chosen: None)
    assert "name ops to build" in invoke("build", code=1).stderr
    assert "no op is called 'nope'" in invoke("build", "nope", code=1).stderr
    assert "--preset: wanted" in invoke("build", "--preset", "nope", code=1).stderr
    assert "name one: --arch" in invoke("build", "fp8_downcast", code=1).stderr


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--preset", "qwen3", "--arch", "sm_80"), "sm_80 is compute capability 8.0; kernels of these ops need 8.9 or later"),
        (("fp8_downcast", "--arch", "sm_90a", "--arch", "sm_75"), "sm_75 is compute capability 7.5; kernels of fp8_downcast"),
        (("scaled_mm", "--arch", "sm_89"), "sm_89 is compute capability 8.9; kernels of scaled_mm need 9.0 or later"),
    ],
)
def test_build_says_at_once_what_a_gpu_lacks(monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...], message: str) -> None:
    monkeypatch.setattr("inductor_ext.cli.build.jit.prebuild", lambda *args, **kwargs: pytest.fail("nothing is to be built"))
    assert message in " ".join(invoke("build", *asked, code=1).stderr.split())


def test_build_leaves_out_what_a_gpu_has_no_kernel_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a set of ops: on compute capability 8.9 there is no kernel for products."""
    asked = []
    monkeypatch.setattr(
        "inductor_ext.cli.build.jit.prebuild",
        lambda specs, directory, settings, on_progress: asked.extend(specs) or {spec: directory for spec in specs},
    )
    invoke("build", "--preset", "qwen3", "--arch", "sm_89")
    names = {spec.name for spec in asked}
    assert "fp8_downcast" in names and not [name for name in names if name.startswith("scaled_mm")]


def test_build_with_a_bad_target() -> None:
    assert "wanted something like sm_90a" in invoke("build", "fp8_downcast", "--arch", "hopper", code=1).stderr


def test_build_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel fails for the same reason, which is said once."""
    monkeypatch.setenv("INDUCTOR_EXT_NVCC", str(tmp_path / "absent"))
    result = invoke("build", "--preset", "downcast", "--arch", "sm_90a", "--out", str(tmp_path / "out"), code=1)
    assert result.stderr.count("error: ") == 1 and "nvcc" in result.stderr
    assert result.stdout.startswith("0 of ")


def test_build_hands_every_example_to_prebuild(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def prebuild(specs, directory, settings, *, on_progress):  # type: ignore[no-untyped-def]
        asked.extend(specs)
        return {spec: Path(directory) for spec in specs}

    monkeypatch.setattr("inductor_ext.cli.build.jit.prebuild", prebuild)
    shown = invoke("build", "fp8_downcast", "fp8_downcast", "--arch", "sm_90a", "--arch", "sm_100a").stdout
    op = next(op for op in registry.ops() if op.name == "fp8_downcast")
    assert op.kernel is not None
    assert asked == [spec for arch in ("sm_90a", "sm_100a") for spec in op.examples(arch)]
    assert f"{len(asked)} of {len(asked)} kernels" in shown


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_CACHE_DIR", str(tmp_path))
    assert invoke("cache", "path").stdout.strip() == str(tmp_path)
    assert "no kernels in" in invoke("cache", "list").stdout
    assert json.loads(invoke("cache", "list", "--json").stdout) == []
    assert "deleted 0 kernels" in invoke("cache", "clear").stdout


EVIL = "\x1b]0;t\x07[red]x[/red]"


def test_cache_clear_deletes_nothing_in_a_folder_that_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_CACHE_DIR", str(tmp_path))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "precious.log").write_text("")
    said = invoke("cache", "clear", code=1).stderr
    assert "INDUCTOR_EXT_CACHE_DIR: wanted a kernel cache" in said and "logs/precious.log" in said
    assert (tmp_path / "logs" / "precious.log").exists()


def test_cache_clear_names_what_it_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_CACHE_DIR", str(tmp_path / EVIL))
    KernelCache(tmp_path / EVIL).make_writable()
    (tmp_path / EVIL / EVIL.replace("/", "-")).write_text("")
    shown = invoke("cache", "clear").stdout
    assert "left alone" in shown and "\\x1b]0;t\\x07[red]x[-red]" in shown and "\x1b" not in shown


def test_build_refuses_a_folder_that_holds_other_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho V1.2.3\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("INDUCTOR_EXT_NVCC", str(nvcc))
    (tmp_path / "out" / "kernels").mkdir(parents=True)
    (tmp_path / "out" / "kernels" / "gemm.cu").write_text("precious")
    said = invoke("build", "fp8_downcast", "--arch", "sm_90a", "--out", str(tmp_path / "out"), code=1).stderr
    assert said.count("holds kernels/gemm.cu and no file INDUCTOR_EXT") == 1
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["kernels", "gemm.cu"]


@pytest.mark.parametrize("command", [("cache", "list"), ("cache", "clear"), ("doctor",)])
def test_paths_are_shown_not_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_CACHE_DIR", str(tmp_path / EVIL))
    result = CliRunner().invoke(app, list(command))
    assert "\x1b" not in result.output and "\x07" not in result.output
    assert "\\x1b]0;t\\x07[red]x[/red]" in result.output.replace("\n", "").replace("│", "").replace(" ", "")


def test_errors_are_shown_not_obeyed(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_RULES", f"{EVIL}=off")
    said = invoke("explain", f"{script.name}:case", code=1).stderr
    assert "\x1b" not in said and "[red]x[/red]" in said


# ---- bench and clangd ------------------------------------------------------------------------------------------------


def test_repro_runs_what_pytorch_wrote_of_a_graph(tmp_path: Path) -> None:
    """The script of TORCH_COMPILE_DEBUG alone compiles as stock does: it holds no pass."""
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "def f(x, w):\n"
        "    h = torch.nn.functional.gelu(x @ w)\n"
        "    scale = (h.abs().amax(-1, keepdim=True) / 448.0).float()\n"
        "    return (h.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale\n"
        "with torch.no_grad():\n"
        "    torch.compile(f, backend='inductor_ext')(torch.randn(32, 64).bfloat16(), torch.randn(64, 128).bfloat16())\n"
    )
    environment = {
        **os.environ, "TORCH_COMPILE_DEBUG": "1", "TORCH_COMPILE_DEBUG_DIR": str(tmp_path / "debug"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    subprocess.run([sys.executable, str(program)], env=environment, cwd=tmp_path, check=True, capture_output=True)
    (script,) = (tmp_path / "debug").rglob("fx_graph_runnable.py")
    command = [sys.executable, "-m", "inductor_ext.cli", "repro"]
    for arguments, told in (([], "rewrote act_quantize ×1"), (["--rules", "act_quantize=off"], "rewrote nothing")):
        done = subprocess.run(
            [*command, *arguments, str(script)], cwd=tmp_path, check=True, capture_output=True, text=True, encoding="utf-8"
        )
        assert told in done.stderr


def test_repro_gives_a_script_its_arguments(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, torch\nprint(sys.argv[1:], torch._inductor.config.post_grad_custom_post_pass is not None)\n")
    assert invoke("repro", str(script), "minify", "--offload").stdout == "['minify', '--offload'] True\n"
    assert "does not exist" in invoke("repro", str(tmp_path / "absent.py"), code=2).output


def test_bench_lists_scripts() -> None:
    assert "kernels/downcast" in invoke("bench").stdout


def test_bench_without_a_gpu_or_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "there is no GPU here" in invoke("bench", "kernels/downcast", code=1).stderr
    assert "there is no benchmark 'nope'" in invoke("bench", "nope", code=1).stderr


def test_bench_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inductor_ext.cli.bench.jit.kernels_root", lambda: tmp_path / "kernels")
    assert "benchmarks are in the checkout" in invoke("bench", code=1).stderr


def test_bench_passes_arguments_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inductor_ext.cli.bench.jit.kernels_root", lambda: tmp_path / "kernels")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    script = tmp_path / "benchmarks" / "kernels" / "one.py"
    script.parent.mkdir(parents=True)
    script.write_text(
        '"""One."""\nif __name__ == "__main__":\n    import sys\n    sys.exit(sys.argv[1:] == ["--time", "3"] and 7)\n'
    )
    invoke("bench", "kernels", "--time", "3", code=7)


def test_clangd(tmp_path: Path) -> None:
    shown = invoke("clangd", str(tmp_path)).stdout
    assert {Path(line).name for line in shown.split()} == {".clangd", "compile_commands.json"}
    assert json.loads((tmp_path / "compile_commands.json").read_text())
