"""Settings by which an editor understands the kernels' sources."""

from __future__ import annotations

import json
from pathlib import Path

from inductor_ext.errors import InductorExtError, ToolchainError
from inductor_ext.jit import headers
from inductor_ext.jit.toolchain import BASE_FLAGS, current_arch, find_toolchain
from inductor_ext.settings import Settings, current


def write_clangd(directory: Path, settings: Settings | None = None) -> list[Path]:
    """Write ``.clangd`` and ``compile_commands.json`` so that an editor understands ``kernels/*.cuh``.

    Both name paths of this machine, so they are not for a repository. Raises ``ToolchainError`` when they cannot be
    written.
    """
    settings = settings or current()
    arguments = _clang_arguments(settings)
    root = headers.kernels_root()
    sources = sorted(p for p in root.rglob("*") if p.suffix in (".cuh", ".cu"))
    commands = [{"directory": str(root), "file": str(p), "arguments": ["clang++", *arguments, str(p)]} for p in sources]
    lines = ["# Made by `inductor-ext clangd`; names paths of this machine.", "CompileFlags:", "  Add:"]
    lines += [f"    - {json.dumps(argument)}" for argument in arguments]
    lines += ["Diagnostics:", '  Suppress: ["drv_unsupported_cuda_version"]']
    written = [Path(directory) / ".clangd", Path(directory) / "compile_commands.json"]
    try:
        written[0].write_text("\n".join(lines) + "\n")
        written[1].write_text(json.dumps(commands, indent=1) + "\n")
    except OSError as error:
        raise ToolchainError(f"cannot write editor settings: {error}") from error
    return written


def _clang_arguments(settings: Settings) -> list[str]:
    try:
        arch = current_arch(settings)
    except InductorExtError:
        arch = None
    arguments = ["-xcuda", BASE_FLAGS[0], f"--cuda-gpu-arch={arch or 'sm_90a'}", "--no-cuda-version-check"]
    try:
        toolkit = next(iter(d for d in find_toolchain(settings).system_dirs if (d / "cuda_runtime.h").is_file()), None)
    except ToolchainError:
        toolkit = None
    if toolkit is not None:  # <toolkit>/targets/<platform>/include or <toolkit>/include
        up = 3 if toolkit.parent.parent.name == "targets" else 1
        arguments.append(f"--cuda-path={toolkit.parents[up - 1]}")
    return [*arguments, *(f"-I{path}" for path in headers.include_dirs())]
