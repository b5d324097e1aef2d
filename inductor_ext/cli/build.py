"""``inductor-ext build``: kernels ahead of time, for machines without a compiler. Needs nvcc, no GPU."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
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
    wheel: Annotated[
        Path | None, typer.Option(help="Directory for a wheel inductor-ext-kernels-TARGET of them.", file_okay=False)
    ] = None,
) -> None:
    """Build the kernels that ops declare as worth having, before any model needs them.

    Ship the directory and point INDUCTOR_EXT_PREBUILT_DIR at it, or make a wheel and install it: that machine then needs no
    compiler.
    """
    chosen = settings.current()
    wanted = _ops(names or [], preset)
    targets = _targets(arch, chosen)
    for target in targets:
        _check_capability(wanted, names or [], target)
    specs = {
        target: [spec for op in wanted if _runs_on(op, target) for spec in op.examples(target, preset)] for target in targets
    }
    if not any(specs.values()):
        raise SettingError("none of these ops declares a kernel to build ahead")
    if wheel is None:
        _fill(out or chosen.cache_path(), [spec for each in specs.values() for spec in each], chosen)
        return
    for target in targets:  # a wheel holds one target, so that a machine installs what its GPU runs
        with _folder(out, target, len(targets)) as directory:
            _fill(directory, specs[target], chosen)
            stdout().print(f"made {line(jit.pack(directory, target, wheel))}", soft_wrap=True)


def _capability(target: str) -> tuple[int, int]:
    digits = "".join(character for character in target if character.isdigit())
    return int(digits[:-1]), int(digits[-1])


def _runs_on(op: Op, target: str) -> bool:
    return op.kernel is None or _capability(target) >= op.kernel.min_capability


def _check_capability(wanted: list[Op], named: list[str], target: str) -> None:
    """SettingError, before a minute of nvcc's errors, where an op that was named, or every op, has no kernel for ``target``."""
    lacking = {op.name: op.kernel.min_capability for op in wanted if op.kernel is not None and not _runs_on(op, target)}
    asked = [name for name in lacking if name in named]
    if not asked and len(lacking) < sum(op.kernel is not None for op in wanted):
        return
    have, need = ("{}.{}".format(*each) for each in (_capability(target), min(lacking[name] for name in asked or lacking)))
    what = ", ".join(asked) if asked else "these ops"
    raise SettingError(f"--arch {target} is compute capability {have}; kernels of {what} need {need} or later")


@contextlib.contextmanager
def _folder(out: Path | None, target: str, count: int) -> Iterator[Path]:
    """Where the kernels of a wheel are built: in ``out``, where the next call finds them, or in a temporary folder."""
    if out is not None:
        yield out if count == 1 else out / target
        return
    with tempfile.TemporaryDirectory(prefix="inductor_ext-wheel-") as path:
        yield Path(path)


def _fill(directory: Path, specs: list[jit.JitSpec], chosen: settings.Settings) -> None:
    """Build ``specs`` into ``directory`` and say how it goes; ends the command with status 1 where one fails."""
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
