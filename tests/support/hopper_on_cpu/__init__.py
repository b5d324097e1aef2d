"""Kernels for compute capability 9.0 on the CPU, their own source compiled by g++ (``hopper_on_cpu.h``): mxfp8_grouped_mm's,
those of scaled_mm's tile family, and varlen_attention's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_ext.kernels.mxfp8_grouped_mm import hopper
from tests.support.cuda_on_cpu import FLAGS, KERNELS, Given

HERE = Path(__file__).parent


def _compiled(name: str, folder: Path, options: list[str]) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    made = folder / "kernel.so"
    command = [compiler, *FLAGS, *options, f"-I{KERNELS}"]
    run = subprocess.run([*command, str(HERE / f"{name}.cpp"), "-o", str(made)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[:4000]
    return ctypes.CDLL(str(made))


class Kernel:
    """One tile, by the key that `hopper` has for it. A call raises RuntimeError where hardware would hang or fault. There is
    room for so many ``clusters``, of one CTA each where the tile's name has no ``@``."""

    def __init__(self, key: Any, folder: Path) -> None:
        types, _, _ = hopper.made(key).partition("<")[2].rpartition(">")
        values = zip(("KIND", "OUT", "W", "N", "CLUSTER_W", "CLUSTER_N"), types.split(", "))
        defines = [f"-DMXFP8_{name}={value}" for name, value in values]
        self.cluster = hopper.sizes(key[0])[2]
        self.library = _compiled("mxfp8_grouped_mm", folder, [*defines, f"-I{HERE}", f"-I{KERNELS / 'include'}"])

    def __call__(
        self, x: torch.Tensor, x_scale: torch.Tensor | None, w: Any, w_scale: Any, offs: Any, out: Any, *, clusters: int = 2
    ) -> None:
        given = [None if each is None else Given.of(each) for each in (x, x_scale, w, w_scale, offs, out)]
        error = ctypes.create_string_buffer(500)
        sms = clusters * self.cluster
        if self.library.mxfp8_grouped_mm(*(each and ctypes.byref(each) for each in given), sms, error, 500):
            raise RuntimeError(error.value.decode())


    def to_bf16(self, x: torch.Tensor, x_scale: torch.Tensor, out: torch.Tensor) -> None:
        """What makes bf16 of MXFP8 tokens, whatever the tile."""
        given = [Given.of(each) for each in (x, x_scale, out.view(-1).view(torch.uint8))]
        error = ctypes.create_string_buffer(500)
        if self.library.mxfp8_to_bf16(*(ctypes.byref(each) for each in given), 2, error, 500):
            raise RuntimeError(error.value.decode())


class TileKernel:
    """One class of scaled_mm's tile family, by its C++ name. A call raises RuntimeError where hardware would hang or fault, or
    where what it reads changes while it does. Options: ``static_b``; ``sms``, how many CTAs there are at most; ``seed`` of the
    order in which things happen."""

    def __init__(self, cpp: str, folder: Path, kernels: Path = KERNELS) -> None:
        self.library = _compiled("scaled_mm_tile", folder, [*_with_stand_ins(folder, kernels), f"-DTILE={cpp}"])

    def run(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        scale_a: torch.Tensor,
        scale_b: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        *,
        residual: torch.Tensor | None = None,
        **options: int,
    ) -> None:
        self._call("run", *map(_given, (a, b, scale_a, scale_b, bias, residual, out)), **options)

    def run_group(
        self,
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        scale_a: Sequence[torch.Tensor],
        scale_b: Sequence[torch.Tensor],
        bias: Sequence[torch.Tensor | None],
        out: torch.Tensor,
        **options: int,
    ) -> None:
        counted = [_list(a), len(a), _list(b), len(b)]
        self._call("run_group", *counted, _list(scale_a), _list(scale_b), _list(bias), _given(out), **options)

    def run_act_mul(
        self,
        a: torch.Tensor,
        b: Sequence[torch.Tensor],
        scale_a: torch.Tensor,
        scale_b: Sequence[torch.Tensor],
        bias: Sequence[torch.Tensor | None],
        out: torch.Tensor,
        *,
        cluster: tuple[int, int] = (1, 1),
        **options: int,
    ) -> None:
        """gate and up are the two of ``b``; the activation, in ``scaled_mm_tile.cpp`` beside this, is x + |x|."""
        pairs = [_list(b), _given(scale_a), _list(scale_b), _list(bias)]
        self._call("run_act_mul", _given(a), *pairs, *cluster, _given(out), **options)

    def run_rope(
        self,
        a: torch.Tensor,
        b: Sequence[torch.Tensor],
        scale_a: torch.Tensor,
        scale_b: Sequence[torch.Tensor],
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rotated: int,
        eps: float,
        out: torch.Tensor,
        **options: int,
    ) -> None:
        rope = [*map(_given, (q_weight, k_weight, cos, sin)), rotated, ctypes.c_double(eps)]
        self._call("run_rope", _given(a), _list(b), len(b), _given(scale_a), _list(scale_b), *rope, _given(out), **options)

    def _call(self, entry: str, *arguments: Any, static_b: bool = False, sms: int = 2, seed: int = 7) -> None:
        error = ctypes.create_string_buffer(500)
        if getattr(self.library, entry)(*arguments, static_b, sms, seed, error, 500):
            raise RuntimeError(error.value.decode())


class AttentionKernel:
    """varlen_attention's, for one dtype (its C++ name) and head size. A call raises RuntimeError as `TileKernel`'s."""

    def __init__(self, dtype: str, width: int, folder: Path) -> None:
        options = [*_with_stand_ins(folder, KERNELS), f"-DATTENTION={dtype},{width}"]
        self.library = _compiled("varlen_attention", folder, options)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor | None, scale: float, left: int, right: int,
        padded: bool, out: torch.Tensor, *, sms: int = 2, seed: int = 7,
    ) -> None:  # fmt: skip
        error = ctypes.create_string_buffer(500)
        numbers = ctypes.c_double(scale), ctypes.c_int64(left), ctypes.c_int64(right), padded
        if self.library.run(*map(_given, (q, k, v, ends)), *numbers, _given(out), sms, seed, error, 500):
            raise RuntimeError(error.value.decode())


def _with_stand_ins(folder: Path, kernels: Path) -> list[str]:
    """Options: headers include those beside them, so stand-ins take the place of some, and all lie together."""
    together = folder / "include" / "inductor_ext"
    together.mkdir(parents=True)
    real, instead = kernels / "include" / "inductor_ext", HERE / "inductor_ext"
    for name in {each.name for place in (real, instead) for each in place.iterdir()}:
        (together / name).symlink_to((instead if (instead / name).exists() else real) / name)
    return [f"-I{together.parent}", f"-I{HERE}", f"-I{kernels}", "-fno-strict-aliasing"]


def _given(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else ctypes.pointer(Given.of(tensor))


def _list(tensors: Sequence[torch.Tensor | None]) -> Any:
    return (ctypes.POINTER(Given) * len(tensors))(*map(_given, tensors))
