"""``inductor-ext build``: kernels ahead of time, for machines without a compiler. Needs nvcc, no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from inductor_ext import jit, registry, settings
from inductor_ext.cli.common import op_named, stderr, stdout
from inductor_ext.errors import BuildError, SettingError
from inductor_ext.op import Op
from inductor_ext.report.shown import line, shown


def build(
    names: Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="Ops to build; see `inductor-ext ops`.")] = None,
    preset: Annotated[str, typer.Option(help=f"A set of ops: {', '.join(registry.PRESETS)} or all.")] = "",
    arch: Annotated[list[str] | None, typer.Option(help="Target such as sm_90a; may be repeated. Default: this GPU.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to fill. Default: the kernel cache.", file_okay=False)] = None,
) -> None:
    """Build the kernels that ops declare as worth having, before any model needs them.

    Ship the directory and point INDUCTOR_EXT_PREBUILT_DIR at it: that machine then needs no compiler.
    """
    chosen = settings.current()
    wanted = _ops(names or [], preset)
    specs = [spec for target in _targets(arch, chosen) for op in wanted for spec in op.examples(target, preset)]
    if not specs:
        raise SettingError("none of these ops declares a kernel to build ahead")
    directory = out or chosen.cache_path()
    console = stderr()

    def tell(event: jit.BuildEvent) -> None:
        if event.state != "building":
            what = f"{event.state} {event.spec.name} ({event.spec.arch}) in {event.seconds:.1f} s"
            console.print(Text(f"[{event.done}/{event.total}] {what}"))

    results = jit.prebuild(specs, directory, chosen, on_progress=tell)
    failures = {str(error): error for error in results.values() if isinstance(error, Exception)}
    for error in failures.values():
        first = error.first_error if isinstance(error, BuildError) else ""
        detail = f"\n  {first}" if first not in str(error) else ""
        console.print(Text.assemble(("error: ", "bold red"), shown(f"{error}{detail}")), soft_wrap=True)
    built = sum(not isinstance(result, Exception) for result in results.values())
    stdout().print(f"{built} of {len(results)} kernels are in {line(directory)}", soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def _ops(names: list[str], preset: str) -> list[Op]:
    wanted = list(names)
    if preset == "all":
        wanted += [op.name for op in registry.ops()]
    elif preset:
        if preset not in registry.PRESETS:
            raise SettingError(f"--preset: wanted one of {', '.join(registry.PRESETS)}, all; found {preset!r}")
        wanted += registry.PRESETS[preset]
    if not wanted:
        raise SettingError("name ops to build, or use --preset all")
    return [op_named(name) for name in dict.fromkeys(wanted)]


def _targets(arch: list[str] | None, chosen: settings.Settings) -> list[str]:
    if arch:
        return [jit.current_arch(chosen.replace(arch=one)) or one for one in arch]
    found = jit.current_arch(chosen)
    if found is None:
        raise SettingError("there is no GPU to take the target from; name one: --arch sm_90a (H200), --arch sm_100a (B200)")
    return [found]
